"""An embedding whose rows live in a table by 64-bit key, as a module of the user's model.

In a run the workers of a machine share one table; the gradients of a step are summed by key and applied by the rows' own
optimizer. In a plain loop ``step(model)`` does that. In a bundle the table is ``keys`` and ``rows`` of the state_dict.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.errors import JobError
from shoal.ps.initialisers import Initialiser, Normal
from shoal.ps.kernel import Batch, Kernel
from shoal.ps.optimizers import Adagrad, RowOptimizer
from shoal.ps.spec import TableSpec
from shoal.ps.table import Rows, Table

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Of a table that is only read, or trained in a plain loop, so many parts are enough.
_LOCAL_SHARDS = 8
# What a table is called whose module is the whole model.
_ROOT = "(the model)"


@dataclass(frozen=True)
class Gathered:
    """The gradient of one pass: different keys, how often each stood there, and its sum (n, width)."""

    keys: np.ndarray
    counts: np.ndarray
    rows: torch.Tensor


class Embedding(nn.Module):
    """Keys (any int64) of any shape -> rows, (…, width); with ``mode`` the last dimension is summed: (…, L) -> (…, width).

    A row comes into being when a key is first trained on; before that it reads as its first values, a function of the seed
    and the key. The seed is drawn from torch's random stream when the module is made. The module has no parameters.

    Args:
        width: numbers in a row; rows have torch's default dtype, float32 or float64.
        optimizer: of the rows: ``SGD``, ``Adagrad`` (the default, with lr=0.05), ``RowWiseAdagrad``, ``Adam``, ``FTRL``.
        init: ``Normal(0.05)`` by default, ``Uniform``, ``Constant``, ``Zeros``.
        mode: None; "sum" or "mean" over the last dimension (the mean counts keys that are not ``padding_key``).
        padding_key: a key whose row is zeros and is never trained.
        admission: how often a key must have been seen in training before it gets a row.
        max_age: steps after which a row that nobody trained begins anew; None: never.
        memory: what rows may take, in bytes or as "2GB"; those used longest ago go to disk beyond it. None: no limit.

    Raises:
        JobError: an argument is out of its range.
    """

    def __init__(
        self, width: int, *, optimizer: RowOptimizer | None = None, init: Initialiser | None = None,
        mode: str | None = None, padding_key: int | None = None, admission: int = 1, max_age: int | None = None,
        memory: int | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if mode not in (None, "sum", "mean"):
            raise JobError(f'mode is {mode!r}; give "sum", "mean" or None.')
        if padding_key is not None and (isinstance(padding_key, bool) or not isinstance(padding_key, int)):
            raise JobError(f"padding_key is {padding_key!r}; give a whole number, or None.")
        self.spec = TableSpec(
            name="embedding",
            width=width,
            dtype=torch.get_default_dtype(),
            optimizer=optimizer if optimizer is not None else Adagrad(),
            init=init if init is not None else Normal(),
            admission=admission,
            max_age=max_age,
            memory_bytes=parse_bytes(memory),
            seed=int(torch.randint(1 << 62, ())),
        )
        self.mode = mode
        self.padding_key = padding_key
        self._table: Table | None = None
        self._gathered: list[Gathered] = []
        # Steps that are done: what ageing and Adam count by. In a run it is the run that counts.
        self.steps = 0
        self.clock: Callable[[], int] | None = None

    # -- computing -----------------------------------------------------------------------------------------------

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """Look keys up; JobError where they are no whole numbers."""
        if not isinstance(keys, torch.Tensor) or keys.dtype not in (torch.int64, torch.int32):
            kind = keys.dtype if isinstance(keys, torch.Tensor) else type(keys).__name__
            raise JobError(f"{self.spec.name} got keys of {kind}; give an int64 tensor (hash or round them beforehand).")
        if self.mode and not keys.dim():
            raise JobError(f"{self.spec.name} sums over the last dimension of its keys; give a tensor with one.")
        bag = keys.shape[-1] if self.mode else 1
        shape = (*(keys.shape[:-1] if self.mode else keys.shape), self.spec.width)
        if not keys.numel():
            return torch.zeros(shape, dtype=self.spec.dtype)
        table = self.table
        flat = keys.detach().to(torch.int64).reshape(-1).contiguous().numpy()
        batch = table.unique(flat, self.padding_key)
        rows = table.pull(batch.keys, self.steps if self.clock is None else self.clock())
        if torch.is_grad_enabled():
            rows.requires_grad_()
            rows.register_post_accumulate_grad_hook(self._keeper(batch))
        out = _Lookup.apply(rows, batch, bag, table.kernel).view(shape)  # type: ignore[no-untyped-call]
        if self.mode == "mean":
            there = torch.from_numpy((batch.inverse >= 0).reshape(-1, bag).sum(1)).clamp(min=1)
            out = out / there.view(shape[:-1]).unsqueeze(-1).to(out.dtype)
        return out

    def _keeper(self, batch: Batch) -> Callable[[torch.Tensor], None]:
        def keep(rows: torch.Tensor) -> None:
            assert rows.grad is not None
            self._gathered.append(Gathered(batch.keys, batch.counts, rows.grad))
            rows.grad = None

        return keep

    def take_gathered(self) -> Gathered | None:
        """The gradients since this was last asked, summed by key in the order of the passes; None where there were none."""
        found, self._gathered = self._gathered, []
        if len(found) <= 1:
            return found[0] if found else None
        batch = self.table.unique(np.concatenate([g.keys for g in found]))
        sums = self.table.kernel.scatter(torch.cat([g.rows for g in found]), batch.inverse, 1, len(batch.keys))
        counts = np.bincount(batch.inverse, np.concatenate([g.counts for g in found]), len(batch.keys))
        return Gathered(batch.keys, counts.astype(np.uint32), sums)

    def forget_gathered(self) -> None:
        """Drop gradients that are not to be used."""
        self._gathered = []

    def step(self) -> None:
        """Apply the gradients since the last step: for plain loops; in a run shoal does it."""
        found = self.take_gathered()
        if found is not None:
            self.table.push(found.keys, found.rows, found.counts, step=self.steps)
        self.steps += 1

    # -- the table -----------------------------------------------------------------------------------------------

    @property
    def table(self) -> Table:
        """The rows; a table of this process's own where no run has given it one."""
        if self._table is None:
            self.spec = dataclasses.replace(self.spec, shards=min(self.spec.shards, _LOCAL_SHARDS))
            self._table = Table.create(self.spec)
        return self._table

    @property
    def has_rows(self) -> bool:
        """Whether there is a table already."""
        return self._table is not None

    def use(self, table: Table) -> None:
        """Read and write a run's table from now on."""
        self.spec = table.spec
        self._table = table
        self._gathered = []

    def export(self) -> Rows:
        return self.table.export()

    def begin_as(self, spec: TableSpec) -> None:
        """Have no rows, and read keys without one as a table with this seed does."""
        if self.spec.seed != spec.seed:
            self.spec = dataclasses.replace(self.spec, seed=spec.seed)
            self._table = None
        elif self._table is not None:
            self._table.discard(None)
        self._gathered = []

    def put_rows(self, keys: np.ndarray, rows: torch.Tensor) -> None:
        """Put weights there, (n, width), with the optimizer's first state."""
        if len(keys):
            self.table.put(with_first_state(torch.from_numpy(keys), rows, self.spec))

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.width}, optimizer={spec.optimizer}, init={spec.init}"

    # -- what torch does with modules ----------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Embedding:
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.spec.dtype))
        if probe.device.type != "cpu" and probe.device.type != "meta":
            raise JobError(f"{self.spec.name} keeps its rows in the machine's memory; move its output to the device instead.")
        if probe.dtype != self.spec.dtype:
            rows = self.export() if self._table is not None else None
            self.spec = dataclasses.replace(self.spec, dtype=probe.dtype)
            self._table = None
            if rows is not None:
                self.table.put(rows)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(state_of(prefix, self.export() if self._table is not None else None, self.spec))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        keys, rows = state_dict.get(prefix + "keys"), state_dict.get(prefix + "rows")
        for name in ("keys", "rows"):
            if strict and prefix + name not in state_dict:
                missing_keys.append(prefix + name)
        if keys is None or rows is None:
            return
        if keys.dtype != torch.int64 or rows.dim() != 2 or rows.shape != (len(keys), self.spec.width):
            rest[-1].append(
                f"{prefix}rows has the shape {tuple(rows.shape)} for {len(keys)} keys; rows here are {self.spec.width} wide."
            )
            return
        self._table = None
        self.table.put(with_first_state(keys, rows, self.spec))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_table"] = self.export() if self._table is not None else None
        state["_gathered"], state["clock"] = [], None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state.pop("_table")
        super().__setstate__({**state, "_table": None})
        if rows is not None:
            self.table.put(rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> Embedding:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made


class _Lookup(torch.autograd.Function):
    """Rows by position, summed in bags; backwards, gradients summed by position."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, batch: Batch, bag: int, kernel: Kernel) -> torch.Tensor:
        ctx.batch, ctx.bag, ctx.kernel = batch, bag, kernel
        return kernel.gather(rows.detach(), batch.inverse, bag)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        batch = ctx.batch
        return ctx.kernel.scatter(gradient.contiguous(), batch.inverse, ctx.bag, len(batch.keys)), None, None, None


def embeddings(model: nn.Module) -> Iterator[tuple[str, Embedding]]:
    """The embeddings of a model, each once, by their path."""
    for name, module in model.named_modules():
        if isinstance(module, Embedding):
            yield name, module


def table_name(path: str) -> str:
    """What the table of the module at a path of a model is called; the model itself may be one."""
    return path or _ROOT


def prefix_of(spec: TableSpec) -> str:
    """What the names of a table's tensors in the model's state_dict begin with."""
    return "" if spec.name == _ROOT else spec.name + "."


def step(model: nn.Module) -> None:
    """Let every ``Embedding`` of a model apply its gradients: beside ``optimizer.step()`` in a plain training loop."""
    for _, module in embeddings(model):
        module.step()


def state_of(prefix: str, rows: Rows | None, spec: TableSpec) -> dict[str, torch.Tensor]:
    """What a table is in a model's state_dict: ``keys`` int64 (n,), ascending, and ``rows`` (n, width)."""
    if rows is None:
        return {prefix + "keys": torch.empty(0, dtype=torch.int64), prefix + "rows": torch.empty(0, spec.width, dtype=spec.dtype)}
    return {prefix + "keys": torch.from_numpy(rows.keys), prefix + "rows": rows.values[:, : spec.width].contiguous()}


def with_first_state(keys: torch.Tensor, rows: torch.Tensor, spec: TableSpec) -> Rows:
    """Rows out of a state_dict, with the optimizer's first state."""
    first = getattr(spec.optimizer, "initial_accumulator_value", 0.0)
    n = len(keys)
    # By numpy, on one thread: see ``Reader.load_into``.
    filled = np.full((n, spec.width + spec.state), first, np.float32 if spec.dtype == torch.float32 else np.float64)
    filled[:, : spec.width] = rows.detach().to("cpu", spec.dtype).numpy()
    values = torch.from_numpy(filled)
    return Rows(keys.contiguous().numpy(), values, np.full(n, spec.admission, np.uint32), np.zeros(n, np.int64))


def parse_bytes(given: int | str | None) -> int | None:
    """Bytes of "2GB" or a number of them; JobError where it is neither."""
    if given is None or (isinstance(given, int) and not isinstance(given, bool) and given > 0):
        return given  # type: ignore[return-value]
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", given) if isinstance(given, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise JobError(f'memory is {given!r}; give bytes, or a size such as "500MB" or "2GB".')
    return int(float(match[1]) * unit)

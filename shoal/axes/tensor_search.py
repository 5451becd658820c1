"""Finding the layout of a model: rehearsals in one process, in which all workers' parts are there at once.

In a rehearsal the model's own code runs on a small batch. A layer that gets a whole input splits its outputs (column);
one that gets an input that is split along what it sums over meets it there (row). Whatever a part must be put together
for is reported, and the layer that made it is split in another way, put together at once, or left whole, until nothing
is reported. The last rehearsal is held against the model as it is.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shoal.axes.tensor_cut import Cut, Team, Unsplit, guard_functions, plain
from shoal.axes.tensor_layout import LEAST_EMBEDDING, Candidate, Exchange, Style, small
from shoal.axes.tensor_modules import Swapped
from shoal.errors import PlanError

MOST_REHEARSALS = 24
MOST_GUESSED_BLOCKS = 4
Example = Callable[[nn.Module], Any]


class NoDropout(TorchFunctionMode):
    """While it is active, dropout does nothing, so that two passes can be compared."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "dropout" in name and args and isinstance(args[0], torch.Tensor):
            return args[0]
        if name == "scaled_dot_product_attention" and (kwargs.get("dropout_p") or (len(args) > 4 and args[4])):
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = kwargs | {"dropout_p": 0.0} if len(args) <= 4 else kwargs
        return func(*args, **kwargs)


class Search:
    """Decides the role of every candidate by rehearsals.

    Attributes:
        loss_parallel: the head's output may stay split by class.
        exchanges: what the last rehearsal exchanged.
    """

    def __init__(
        self, model: nn.Module, found: dict[str, Candidate], ways: int, example: Example, sequence: bool
    ) -> None:
        self.model, self.found, self.ways, self.example = model, found, ways, example
        self.sequence = sequence
        self.loss_parallel = False
        self.exchanges: tuple[Exchange, ...] = ()
        self.heads: dict[str, int] = {}
        self._events: list[tuple[str, str, frozenset[str], tuple[int, ...]]] = []
        self._met: set[str] = set()
        self._used: set[str] = set()
        self._decided: dict[str, str] = {}

    def run(self) -> None:
        """Rehearse until nothing changes; PlanError where heads do not divide."""
        for _ in range(MOST_REHEARSALS):
            failure: Unsplit | None = None
            try:
                with unchanged(self.model):
                    self.rehearse()
            except Unsplit as error:
                failure = error
            except Exception as error:
                if not self._give_up(error):
                    raise
                continue
            if not self._learn(failure):
                return
        # Nothing this process knows of comes here; what is left is right, if slower, without the layers that still report.
        for event in self._events:
            for path in event[2]:
                self._leave(self.found[path], "no way to split it was found")

    # -- one rehearsal -------------------------------------------------------------------------------------------

    def rehearse(self, then: Callable[[Any], Any] = lambda result: result) -> Any:
        """Run the example with all parts in this process, within ``unchanged``; ``then`` sees its result, put
        together."""
        team = Team(self.ways, sequence=self.sequence)
        counter: Counter[tuple[str, bool, int]] = Counter()
        team.count = lambda *exchange: counter.update([exchange])
        self._events, self._met, self._used, self._decided = [], set(), set(), {}
        team.report = lambda *event: self._events.append(event)
        swapped = Swapped(team)
        undo = guard_functions()
        try:
            for candidate in self.found.values():
                self._prepare(candidate, swapped)
            swapped.hook(self.model.register_forward_hook(self._see_output))
            result = then(plain(self.example(self.model)))
        finally:
            swapped.restore()
            undo()
        self.exchanges = tuple(Exchange(*key, count) for key, count in sorted(counter.items()))
        return result

    def _prepare(self, candidate: Candidate, swapped: Swapped) -> None:
        module, path = candidate.module, candidate.path
        if candidate.role == "whole":
            return

        def decide(module: nn.Module, args: Any, kwargs: Any) -> None:
            if candidate.kind == "experts":
                self._used.add(path)
                return
            x = args[0] if args else next(iter(kwargs.values()), None)
            feature = candidate.feature % x.dim() if isinstance(x, torch.Tensor) and x.dim() else 0
            meets = isinstance(x, Cut) and x.split_dim == feature
            if isinstance(x, Cut) and meets:
                self._met |= x.origins
                inputs.extend(x.origins)
            self._used.add(path)
            role = candidate.role or ("row" if meets else "column")
            if candidate.weight.shape[candidate.in_dim if role == "row" else candidate.out_dim] < self.ways:
                self._leave(candidate, "it is narrower than there are workers")
            if candidate.role == "whole":
                return
            if self._decided.setdefault(path, role) != role:
                # Used with a whole input and with a split one: from now on with a whole one each time.
                candidate.role = "column"
                raise Unsplit("a layer that is used in two ways", frozenset(inputs))
            if path not in ready:
                ready.add(path)
                swapped.style(self.model, path, self._style(candidate, role))

        ready: set[str] = set()
        inputs: list[str] = []
        if candidate.role:
            ready.add(path)
            swapped.style(self.model, path, self._style(candidate, candidate.role))
        swapped.hook(module.register_forward_pre_hook(decide, with_kwargs=True))

    def _style(self, candidate: Candidate, role: str) -> Style:
        before, candidate.role = candidate.role, role
        try:
            return Style(role, candidate.splits(self.ways), candidate.gather)
        finally:
            candidate.role = before

    def _see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        for value in pytree.tree_leaves(output):
            if isinstance(value, Cut):
                self._events.append(("output", "the model's output", value.origins, ()))

    # -- what follows from it ------------------------------------------------------------------------------------

    def _learn(self, failure: Unsplit | None) -> bool:
        """Change what the events ask for; whether there is anything to rehearse again."""
        changed = False
        if failure is not None:
            if not failure.origins:
                return self._give_up(failure)
            # What came before it may have come from it.
            self._events = [("gather", failure.what, failure.origins, ())]
        for kind, _, origins, sizes in self._events:
            if kind == "fits":
                self._note_heads(origins, sizes[0])
        # Blocks first: what is put together for want of them, and what follows from that, is no finding.
        for _, what, candidate, sizes in self._about_candidates("view", "blocks"):
            # A view by heads that do not divide names no blocks: see ``_refuse_heads``.
            uneven = sizes[0] % self.ways and head_count(self.model, candidate.path, sizes[0])
            if what != "view" or (sizes[0] <= MOST_GUESSED_BLOCKS and not uneven):
                changed |= self._try_blocks(candidate, sizes if what != "view" else (1,) * sizes[0])
        changed |= self._try_slices()
        if changed:
            return True
        self._refuse_heads()
        for _, what, candidate, _ in self._about_candidates("gather", "view", "blocks", "slice"):
            changed |= self._alone(candidate, what)
        if changed:
            return True
        return self._settle(failure)

    def _give_up(self, error: Exception) -> bool:
        """The model's code failed on split tensors in a way that names no layer; whether there is anything left to take
        back."""
        if self.sequence:
            self.sequence = False
            return True
        why = f"split, the model's own code fails ({type(error).__name__})"
        if self.leave_experts(why):
            return True
        split = [c for c in self.found.values() if c.role != "whole"]
        for candidate in split:
            self._leave(candidate, why)
        return bool(split)

    def leave_experts(self, why: str) -> bool:
        """Take back what is split inside of modules that nobody here has looked into; whether there is any."""
        return any([self._leave(c, why) for c in self.found.values() if c.kind == "experts"])

    def _about_candidates(self, *kinds: str) -> Iterator[tuple[str, str, Candidate, tuple[int, ...]]]:
        """The events of these kinds, by the candidates that they are about."""
        for kind, what, origins, sizes in self._events:
            about = [self.found[p] for p in sorted(origins) if kind in kinds and p in self.found]
            # A module with heads does its own exchanges: it is at fault only where its input was whole.
            others = [c for c in about if not c.does_its_own_exchanges and c.role != "whole"]
            for candidate in others or about:
                if candidate.role != "whole":
                    yield kind, what, candidate, sizes

    def _settle(self, failure: Unsplit | None) -> bool:
        """Nothing has to change: make what was decided on the way the layout; whether that changes anything after
        all."""
        changed = False
        lost = {p for kind, _, origins, _ in self._events if kind in ("loss", "output") for p in origins}
        summed = {p for kind, _, origins, _ in self._events if kind == "loss" for p in origins}
        gathered = {p for kind, _, origins, _ in self._events if kind == "gather" for p in origins}
        self.loss_parallel = bool(summed) and not (gathered & summed)
        for path, candidate in self.found.items():
            role = candidate.role or self._decided.get(path, "")
            if role == "whole":
                continue
            if path not in self._used and candidate.kind != "heads" and not self._tied(candidate):
                changed |= self._leave(candidate, "the trial batch did not use it")
                continue
            ends = role == "column" and not candidate.gather and path not in self._met
            if ends and self._too_small(candidate) and not self._tied(candidate):
                changed |= self._leave(candidate, "it is too small to be worth an exchange")
            elif ends and not (path in summed and self.loss_parallel):
                changed |= self._alone(candidate, "the model's output" if path in lost else "nothing")
        if not changed:
            for path, role in self._decided.items():
                self.found[path].role = self.found[path].role or role
        return changed or failure is not None

    def _try_blocks(self, candidate: Candidate, lengths: tuple[int, ...]) -> bool:
        """Split each of the blocks by itself, where that was not tried yet."""
        total, given = candidate.outputs, sum(lengths)
        if candidate.kind != "linear" or total % given:
            return False
        blocks = tuple(n * total // given for n in lengths)
        if blocks in candidate.tried or min(blocks) < self.ways:
            return False
        candidate.tried.add(blocks)
        candidate.blocks = blocks
        return True

    def _try_slices(self) -> bool:
        """Slices that together are the whole dim name blocks as well."""
        slices: dict[str, set[tuple[int, ...]]] = {}
        for _, _, candidate, sizes in self._about_candidates("slice"):
            slices.setdefault(candidate.path, set()).add(sizes)
        changed = False
        for path, found in slices.items():
            ordered = sorted(found)
            borders = [low for low, _, _ in ordered] + [ordered[0][2]]
            if borders[0] == 0 and [high for _, high, _ in ordered] == borders[1:]:
                changed |= self._try_blocks(self.found[path], tuple(high - low for low, high, _ in ordered))
        return changed

    def _alone(self, candidate: Candidate, what: str) -> bool:
        """Its output is needed whole: put it together at once, where the layer is worth that."""
        if candidate.gather and candidate.role == "column":
            return False
        role = candidate.role or self._decided.get(candidate.path, "")
        candidate.blocks = ()
        if candidate.does_its_own_exchanges or role != "column" or self._too_small(candidate):
            small = " and it is too small to be worth an exchange" if role == "column" else ""
            return self._leave(candidate, f"its output is needed whole by {what}{small}")
        candidate.role, candidate.gather = "column", True
        return True

    def _too_small(self, candidate: Candidate) -> bool:
        if candidate.fixed:
            return False
        if candidate.outputs < self.ways:
            return True
        return candidate.kind == "linear" and small(candidate.weight)

    def _tied(self, candidate: Candidate) -> bool:
        """Whether it shares its weight with an embedding that is split and used."""
        same = [c for c in self.found.values() if c is not candidate and c.weight is candidate.weight]
        return any(c.role == "embedding" and c.path in self._used for c in same)

    def _leave(self, candidate: Candidate, why: str) -> bool:
        if candidate.role == "whole":
            return False
        candidate.role, candidate.why, candidate.gather = "whole", why, False
        return True

    # -- heads ---------------------------------------------------------------------------------------------------

    def _note_heads(self, origins: frozenset[str], count: int) -> None:
        for path in origins:
            if head_count(self.model, path, count):
                self.heads[path] = count

    def _refuse_heads(self) -> None:
        uneven: dict[str, int] = {}
        for _, _, candidate, sizes in self._about_candidates("view"):
            for count in sizes:
                if count % self.ways and head_count(self.model, candidate.path, count):
                    uneven.setdefault(candidate.path, count)
        for path, count in uneven.items():
            refuse_heads(self.ways, path, count, [*self.heads.values(), *uneven.values()])


def head_count(model: nn.Module, path: str, count: int) -> bool:
    """Whether a module that this one lies in, or its configuration, says that it has so many heads."""
    parts = path.split(".")
    for k in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:k]))
        for holder in (
            module,
            getattr(module, "config", None),
            getattr(module, "cfg", None),
            getattr(module, "args", None),
        ):
            for name, value in getattr(holder, "__dict__", {}).items():
                if (
                    "head" in name
                    and "dim" not in name
                    and "size" not in name
                    and type(value) is int
                    and value == count
                ):
                    return True
    return False


def refuse_heads(ways: int, path: str, count: int, others: Any) -> None:
    """PlanError: the heads of a module cannot be shared evenly; says how many ways would do for all of them."""
    common = math.gcd(count, *others)
    fits = [k for k in range(2, common + 1) if common % k == 0]
    if fits:
        words = [f"tp={k}" for k in fits]
        remedy = f"{' or '.join([', '.join(words[:-1]), words[-1]] if words[1:] else words)} would fit"
    else:
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path.rpartition(".")[0] or path)
        remedy = f'leave tp out, or leave it whole with tensor_plan={{"{pattern}": "replicate"}}'
    raise PlanError(
        f"tp={ways} does not fit this model: {path} works on {count} heads, which {ways} workers cannot share evenly; {remedy}."
    )


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Leave buffers, random streams and gradients as they were; no dropout within."""
    buffers = {name: b.clone() for name, b in model.named_buffers() if not b.is_meta}
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), NoDropout():
        torch.manual_seed(0)
        try:
            yield
        finally:
            now = dict(model.named_buffers())
            with torch.no_grad():
                for name, before in buffers.items():
                    if name in now and now[name].shape == before.shape:
                        now[name].copy_(before)


@contextlib.contextmanager
def fingerprints(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Three numbers of each parameter's gradient, so that two passes can be compared without keeping the gradients."""
    found: dict[str, torch.Tensor] = {}
    handles, kept = [], []

    def take_from(name: str, p: torch.Tensor) -> None:
        assert p.grad is not None
        g = p.grad.detach().to_dense() if p.grad.is_sparse else p.grad.detach()
        rows = g.reshape(g.shape[0] if g.dim() else 1, -1)
        probes = [torch.cos(torch.arange(n, dtype=g.dtype)) for n in rows.shape]
        found[name] = torch.stack([probes[0] @ (rows @ probes[1]), rows.sum(), rows.norm()])
        p.grad = None

    for name, p in model.named_parameters():
        if p.requires_grad and not p.is_meta:
            kept.append((p, p.grad))
            p.grad = None
            handles.append(p.register_post_accumulate_grad_hook(lambda q, name=name: take_from(name, q)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for p, gradient in kept:
            p.grad = gradient


def differs(model: nn.Module, search: Search) -> str | None:
    """Where the split model computes something else than the whole one, forward or backward: what does, else None."""

    def seen(result: Any, back: bool = True) -> list[torch.Tensor]:
        values = [v for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor) and v.is_floating_point()]
        total = sum((v.sum() for v in values if v.requires_grad), torch.zeros(()))
        if back and total.requires_grad and not total.is_meta:
            total.backward()
        return [v.detach() for v in values]

    with unchanged(model), fingerprints(model) as slopes:
        whole = seen(search.example(model))
    with unchanged(model):
        again = seen(search.example(model), back=False)
    # Layers that are computed again in the backward pass have to be split then, too.
    with unchanged(model), fingerprints(model) as split_slopes:
        split = search.rehearse(seen)
    if any(v.is_meta for v in whole) or not all(torch.equal(a, b) for a, b in zip(whole, again, strict=True)):
        return None  # There is nothing to compare, or two runs of the model differ by themselves.
    precise = all(v.dtype == torch.float64 for v in whole)
    tolerance = 1e-6 if precise else 1e-3
    if any(not _near(a, b, tolerance, 0.0) for a, b in zip(whole, split, strict=True)):
        return "another result"
    largest = max([float(v[2]) for v in slopes.values()], default=0.0)
    for name, slope in slopes.items():
        if name not in split_slopes or not _near(slope, split_slopes[name], tolerance, 10 * tolerance * largest):
            return f"another gradient of {name}"
    return None


def _near(a: torch.Tensor, b: torch.Tensor, relative: float, absolute: float) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(a.abs().max()) if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=relative, atol=max(relative * scale, absolute), equal_nan=True))


def decide_embeddings(found: dict[str, Candidate], shared: Callable[[str], list[str]]) -> None:
    """Which embeddings are split by vocabulary: large ones, and those that share their weight with a head."""
    for path, candidate in found.items():
        if candidate.kind != "embedding" or candidate.role == "whole" or candidate.fixed:
            continue
        tied = [
            found[n.rpartition(".")[0]]
            for n in shared(f"{path}.weight" if path else "weight")
            if n.rpartition(".")[0] in found
        ]
        heads = [c for c in tied if c.kind == "linear"]
        if heads and all(c.role in ("", "column") for c in heads):
            for head in heads:
                head.role = "column"
        elif candidate.weight.numel() < LEAST_EMBEDDING:
            candidate.role, candidate.why = "whole", "it is too small to be worth an exchange"

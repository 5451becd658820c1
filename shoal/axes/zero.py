"""The sharded axis: what every worker of the data axis would hold once each, they hold once together.

``zero=1`` and ``zero=2`` on one machine are what the arena does anyway (see ``data.py``). The arena holds the weights
once and the optimizer state once, and each worker updates its own slice of both, so nothing of either is repeated.
Of gradients there is a stripe for each worker, which is what it computes into; the sum exists only slice by slice.
So with P bytes of weights, s state tensors and N workers the machine holds (1 + s) · P + N · P, and a worker
touches P of weights, s · P/N of state, and P of its own stripe with P/N of each other one.

``zero=3`` shards the weights themselves, by torch FSDP2 (``fully_shard``, PyTorch FSDP: Zhao et al. 2023; ZeRO:
Rajbhandari et al. 2020). How a step travels::

    worker 0 (rows 0..n/2)             worker 1 (rows n/2..n)
    for each block, forward:           1. all_gather the block's shards into whole private weights,
      gather, compute, drop               compute, drop them again
    for each block, backward:          2. gather again, compute gradients of whole weights,
      gather, compute, scatter            reduce_scatter: each keeps the *sum* over the workers of its rows
    update own rows                    3. no further exchange: the gradients of a worker's rows are complete

Each parameter is cut along its first dim into N chunks of ⌈rows/N⌉ rows; the last ones may be shorter or empty. What has
no first dim (a scalar), or whose dtype is not that of most of the trained weights, stays whole: ``kept_whole`` names
it, it is trained as without sharding, and its gradients are the caller's to sum. Buffers stay whole.

What it moves and holds: ``moved`` and ``held``. All workers must call the model equally often (also to evaluate): each
call gathers. Modules are wrapped block by block (``blocks.py``) and the rest is one group, gathered from the beginning of
the forward to the end of the backward pass, because code may read those weights without calling their module.
``precision=bf16`` gathers float32 and lets autocast round: the rounded weights stay saved for the backward pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.errors import PlanError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from shoal.comm.table import Region


SMALLEST_SHARE = 0.1
"""A block that holds less than this part of what the largest one holds is gathered with what lies outside of blocks."""


# -- pure: numbers in, numbers out ------------------------------------------------------------------------------------


def chunk_rows(rows: int, ways: int) -> list[tuple[int, int]]:
    """Return (start, stop) of each rank's rows, as FSDP2 cuts them: chunks of ⌈rows/ways⌉, the last ones short or empty."""
    size = -(-rows // ways)
    return [(min(rank * size, rows), min((rank + 1) * size, rows)) for rank in range(ways)]


def shards(shapes: Mapping[str, Sequence[int]], ways: int) -> dict[str, tuple[Region, ...]]:
    """Return for each parameter the region that each rank holds; scalars, which nobody can cut, are left out.

    Args:
        shapes: name -> shape of the tensor that is cut: the whole one, or the local one where the tensor axis cut first.
        ways: how many ranks share it.
    """
    from shoal.comm.table import Region

    return {
        name: tuple(Region(0, (rows,)) for rows in chunk_rows(shape[0], ways))
        for name, shape in shapes.items()
        if len(shape)
    }


@dataclass(frozen=True)
class Moved:
    """Bytes that one worker receives in a step by each collective, and how many calls there are."""

    all_gather: int
    reduce_scatter: int
    calls: int

    @property
    def total(self) -> int:
        return self.all_gather + self.reduce_scatter


def moved(blocks: Sequence[int], rest: int, ways: int, *, microbatches: int = 1) -> Moved:
    """What ``zero=3`` moves in a step.

    Args:
        blocks: bytes of weights of each block.
        rest: bytes of the weights outside of the blocks.
        microbatches: pieces that the worker's share is computed in; each gathers and scatters anew.

    A block is gathered twice (forward, backward) and the rest once; of each, a worker lacks (ways - 1) / ways.
    """
    if ways < 2:
        return Moved(0, 0, 0)
    whole = sum(blocks)
    lacking = (ways - 1) / ways
    calls = microbatches * (3 * sum(1 for size in blocks if size) + 2 * bool(rest))
    return Moved(
        math.ceil(microbatches * lacking * (2 * whole + rest)),
        math.ceil(microbatches * lacking * (whole + rest)),
        calls,
    )


@dataclass(frozen=True)
class Held:
    """Bytes that one worker holds: its shards for good, and what is gathered for a while."""

    weights: int
    gradients: int
    state: int
    gathered: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state + self.gathered


def held(blocks: Sequence[int], rest: int, ways: int, state_tensors: int) -> Held:
    """What ``zero=3`` holds at most, for weights of one dtype that are all trained.

    ``gathered`` has three terms at the worst moment, the backward pass of the largest block: its whole weights, its whole
    gradients and the buffer that they are scattered from, with the next block's gathered already beside them; and the
    rest's whole weights, with its gradients as they come.
    """
    share = -(-(sum(blocks) + rest) // ways)
    largest = max(blocks, default=0)
    in_blocks = (4 if len(blocks) > 1 else 3) * largest + 2 * rest
    at_the_end = 3 * rest
    gathered = max(in_blocks, at_the_end)
    return Held(share, share, state_tensors * share, gathered)


# -- zero=3 by FSDP2 --------------------------------------------------------------------------------------------------


class Sharded:
    """A model whose weights are sharded: what is done with it besides calling it. ``apply`` makes one."""

    def __init__(self, model: nn.Module, whole: Sequence[str], touched: dict[str, bool]) -> None:
        self.model = model
        self.kept_whole = tuple(whole)
        self._touched = touched

    def materialise(self, local: Callable[[str], torch.Tensor]) -> None:
        """Make the parameters *be* views: FSDP reads them where they lie, and no second copy is made.

        Args:
            local: name (the first one, where a parameter has several) -> a contiguous tensor of the local shape, which may
                be a view of shared memory; for a parameter in ``kept_whole``, of the whole shape. Whoever writes to that
                memory between two calls of the model changes the weights.

        Raises:
            PlanError: a tensor has another shape than the shard.
        """
        import torch
        from torch import nn

        groups = {id(p.sharded_param): p for p in _fsdp_parameters(self.model)}
        homes = _homes(self.model)
        with torch.no_grad():
            for name, parameter in list(self.model.named_parameters()):
                view = local(name).detach()
                shape = tuple(local_of(parameter).shape)
                if tuple(view.shape) != shape or not view.is_contiguous():
                    raise PlanError(
                        f"{name} was given a tensor of the shape {tuple(view.shape)}, and this worker's shard has the "
                        f"shape {shape}; give a contiguous tensor of that shape."
                    )
                if id(parameter) in groups:
                    _place(groups[id(parameter)], view)
                    continue
                new = nn.Parameter(_as_kind(parameter, view), requires_grad=parameter.requires_grad)
                for module, key in homes[id(parameter)]:
                    # Not into the dict: recurrent layers keep a second list of their weights.
                    setattr(module, key, new)

    def touched(self) -> dict[str, bool]:
        """Which sharded, trained parameters this worker's backward passes have reached since ``begin``, by name.

        The gradient of one that nobody reached is zeros, where a single worker would have none and leave it alone.
        """
        return dict(self._touched)

    def begin(self) -> None:
        """Forget what was touched, and drop gradients: a new step begins."""
        for name in self._touched:
            self._touched[name] = False
        for parameter in self.model.parameters():
            parameter.grad = None

    @contextlib.contextmanager
    def unnoticed(self) -> Iterator[None]:
        """For passes that are made only because all workers must call the model equally often: what they reach does not count."""
        before = dict(self._touched)
        whole = [p for name, p in self.model.named_parameters() if name in self.kept_whole and p.requires_grad]
        for parameter in whole:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            self._touched.update(before)
            for parameter in whole:
                parameter.requires_grad_(True)

    def abandon(self) -> None:
        """Give up a step in the middle, after an error in a collective; the model can be called again afterwards.

        Raises:
            PlanError: this torch cannot (2.13 can); start the worker anew.
        """
        reset: Any = getattr(self.model, "reset_iter_state", None)
        if reset is None:
            raise PlanError("This torch cannot give up a step with zero=3; use torch 2.13 or later.")
        if not _ever_called(self.model):
            self.begin()
            return
        reset()
        for sharded in _fsdp_parameters(self.model):
            # What the broken backward pass left on the whole parameters would be added to the next one's.
            sharded.unsharded_accumulated_grad = None
            if hasattr(sharded, "_unsharded_param"):
                sharded.unsharded_param.grad = None
        self.begin()


def apply(model: nn.Module, mesh: DeviceMesh, blocks: Iterable[nn.Module] | None = None) -> Sharded:
    """Shard the model's parameters over a 1-D mesh, in place; gradients become sums over its ranks, in local shards.

    Args:
        model: its parameters may be on the meta device (then ``materialise`` has to follow), or DTensors of the tensor
            axis on another axis of the mesh that ``mesh`` is part of. Shard last: after the pipeline and the tensor axis.
        mesh: the ranks that share the weights, such as ``world["dp"]``.
        blocks: what is gathered as one; ``find_blocks`` where it is None.

    Names in the state_dict stay as they are; its values become DTensors.
    """
    from torch.distributed.fsdp import FSDPModule

    from shoal.axes.blocks import find_blocks

    if mesh.ndim != 1:
        raise PlanError(f"zero=3 shards over one axis and was given {mesh.ndim}; give the data axis alone.")
    names = {id(p): name for name, p in model.named_parameters()}
    whole = _whole(model)
    ignored = {p for p in model.parameters() if names[id(p)] in whole}
    if blocks is None:
        # Small ones are not worth collectives of their own, and a shared weight must be there when others need it.
        blocks = find_blocks(model, SMALLEST_SHARE, shared=False).values()
    for block in list(blocks):
        if any(names[id(p)] not in whole for p in block.parameters()):
            # Not kept between forward and backward: that is what sharding the weights is for.
            _shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    # The rest is needed again as soon as the backward pass begins, so dropping it after the forward pass saves nothing.
    _shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
    model.register_forward_hook(_drop_after_evaluation)
    touched: dict[str, bool] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums: what a worker differentiates is its part of the global loss already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            for group in _groups(module):
                # FSDP2 would look for parameters that were replaced, by their attribute. Here only ``materialise`` does that,
                # and where the tensor axis has cut a weight, its attribute is not the parameter.
                group._reset_sharded_params = True
            _watch(module, names, touched)
    # A parameter that only some workers reach would otherwise make their collectives differ in size.
    fill_up: Any = getattr(model, "set_reduce_scatter_unused_params", None)
    if fill_up is not None:
        fill_up(True)
    return Sharded(model, sorted(whole), touched)


def leave(model: nn.Module, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """End a forward pass that was left by an exception; ``outputs`` are what its backward pass will begin with.

    Returns what to take in their place.
    """
    from shoal.axes.opened import closed, opened

    state: Any = model._get_fsdp_state()  # type: ignore[operator]
    found = closed(state._post_forward(model, (), _no_views(opened(tuple(outputs)))))
    _drop_after_evaluation(model, (), found)
    return tuple(found)


def local_of(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a parameter (or gradient) that this worker holds, without a copy."""
    from torch.distributed.tensor import DTensor

    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def local_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """This worker's part of the summed gradient, in the local shape; None where there is none."""
    return None if parameter.grad is None else local_of(parameter.grad)


def kept_whole(dtypes: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], trained: Mapping[str, int]) -> set[str]:
    """Which parameters are not sharded: scalars, and trained ones of another dtype than most trained bytes have.

    Args:
        dtypes, shapes: by name.
        trained: name -> bytes, of the trained parameters.

    FSDP2 reduces the gradients of a group in one buffer, so those must be of one dtype.
    """
    held: dict[Any, int] = {}
    for name, size in trained.items():
        held[dtypes[name]] = held.get(dtypes[name], 0) + size
    most = max(held, key=lambda dtype: held[dtype], default=None)
    return {name for name, shape in shapes.items() if not len(shape) or (name in trained and dtypes[name] != most)}


def _whole(model: nn.Module) -> set[str]:
    named = dict(model.named_parameters())
    trained = {name: p.numel() * p.element_size() for name, p in named.items() if p.requires_grad}
    return kept_whole({n: p.dtype for n, p in named.items()}, {n: tuple(p.shape) for n, p in named.items()}, trained)


def _shard(module: nn.Module, **options: Any) -> None:
    """``fully_shard``, with what the tensor axis has split opened to FSDP2's hooks and closed again behind them."""
    from torch.distributed.fsdp import fully_shard

    from shoal.axes.opened import closed, opened

    # FSDP2's hook on inputs goes to the front and its hook on outputs to the end.
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (closed(args), closed(kwargs)), prepend=True, with_kwargs=True
    )
    module.register_forward_hook(lambda _module, _inputs, output: _no_views(opened(output)))
    fully_shard(module, **options)
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (opened(args), opened(kwargs)), prepend=True, with_kwargs=True
    )
    module.register_forward_hook(lambda _module, _inputs, output: closed(output))


def _no_views(output: Any) -> Any:
    """A copy of what is only another view of a tensor: FSDP2's hook would be lost where somebody writes into it."""
    import torch
    from torch.utils import _pytree as pytree

    def own(value: Any) -> Any:
        is_view = type(value) is torch.Tensor and value.requires_grad and value._is_view()
        return value.clone() if is_view else value

    return pytree.tree_map(own, output)


def _drop_after_evaluation(model: Any, _inputs: Any, _output: Any) -> None:
    import torch

    # Without a backward pass nothing else would drop the rest, and the next step would see the weights before its update.
    if not torch.is_grad_enabled():
        model.reshard()


def _watch(module: Any, names: Mapping[int, str], touched: dict[str, bool]) -> None:
    """Note which of the module's own group a backward pass reaches; FSDP itself fills up the others with zeros."""
    watched: set[int] = set()
    group = [(p, names[id(p.sharded_param)]) for p in _own_parameters(module) if p.sharded_param.requires_grad]
    touched.update((name, False) for _, name in group)

    def mark(name: str) -> Callable[[torch.Tensor], None]:
        def reached(_: torch.Tensor) -> None:
            touched[name] = True

        return reached

    def watch(_module: Any, _inputs: Any) -> None:
        # The whole parameters that autograd sees are made when FSDP first gathers them, and kept.
        for parameter, name in group:
            whole = parameter.unsharded_param
            if id(whole) not in watched:
                watched.add(id(whole))
                whole.register_post_accumulate_grad_hook(mark(name))

    module.register_forward_pre_hook(watch)


# -- where FSDP2's own objects are touched ----------------------------------------------------------------------------


def _ever_called(model: Any) -> bool:
    """Whether FSDP2 has seen a forward pass: before, it knows no root, and there is nothing to give up."""
    return model._get_fsdp_state()._is_root is not None


def _groups(module: Any) -> list[Any]:
    """FSDP2's parameter groups that this very module stands for."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        # Older versions of torch have at most one.
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return list(groups)


def _own_parameters(module: Any) -> list[Any]:
    return [parameter for group in _groups(module) for parameter in group.fsdp_params]


def _fsdp_parameters(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [p for module in model.modules() if isinstance(module, FSDPModule) for p in _own_parameters(module)]


def _homes(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every module that holds a parameter, with the name it has there."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                homes.setdefault(id(parameter), []).append((module, key))
    return homes


def _as_kind(parameter: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """The view as what the parameter is: a DTensor of the tensor axis, or plain."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return view
    return DTensor.from_local(
        view,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _place(sharded: Any, view: torch.Tensor) -> None:
    """Let one of FSDP2's parameters lie in ``view``.

    FSDP2 gathers equal pieces, and would copy a short shard into a padded one of its own. Its extension point for tensors
    that are transformed before they are gathered lets a short one be padded for the moment of the gathering instead.
    """
    import torch
    from torch import nn

    padded = tuple(sharded.padded_sharded_param_size)
    if view.untyped_storage().data_ptr() == 0:
        # FSDP2 knows a tensor again by the address of its memory, so an empty shard needs one.
        view = torch.empty(1, dtype=view.dtype)[:0].view(view.shape)
    if tuple(view.shape) != padded:
        _pad_when_gathered(view, padded)
    new = nn.Parameter(sharded.to_sharded_dtensor(view), requires_grad=sharded.sharded_param.requires_grad)
    new._local_tensor = view  # type: ignore[attr-defined]
    for hook in (getattr(sharded.sharded_param, "_post_accumulate_grad_hooks", None) or {}).values():
        new.register_post_accumulate_grad_hook(hook)
    sharded._setattr_on_modules(new)
    sharded.sharded_param = new
    sharded._sharded_param_data = view.reshape(-1)
    sharded._sharding_spec = new._spec  # type: ignore[attr-defined]
    sharded._init_extensions()


def _pad_when_gathered(view: Any, padded: tuple[int, ...]) -> None:
    import torch

    def before(
        mesh: Any, outer_size: Any, outer_stride: Any, module: Any, policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], None]:
        whole = torch.zeros(padded, dtype=view.dtype)
        whole[: view.shape[0]].copy_(view)
        return (whole,), None

    def after(
        gathered: tuple[torch.Tensor, ...], metadata: None, dtype: torch.dtype, *, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        # Nothing to transform back: what was gathered is the whole parameter already, padding behind it.
        return None if out is not None else (gathered[0].reshape(-1), ())

    view.fsdp_pre_all_gather, view.fsdp_post_all_gather = before, after

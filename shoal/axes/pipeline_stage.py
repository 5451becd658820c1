"""One stage of a pipeline: the user's own model with everything hollowed out that other stages hold.

A stage runs the user's own forward, from its first line, so no code of theirs is rewritten and whatever follows from the
inputs alone (masks, positions, the labels of the loss) is computed by it again, from this rank's own copy of the batch.

    before its first module   modules that earlier stages have computed only *stand in*: they return tensors of the right
                              shape that cost nothing, and hold no weights
    at its first module       what the stage before sent takes the place of those empty tensors, in the very tensor
                              objects, so that every variable of the user's forward that refers to one has the real values
    between                   the user's code computes as ever
    at the next stage's first module   what that stage needs is taken, and the forward is left by an exception

The last stage runs to the end and so returns what the model returns. Names stay: ``stage.module`` has the parameters of
this stage under the model's own names.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from shoal.errors import JobError


@dataclass(frozen=True)
class Carried:
    """A tensor that travels from stage to stage: a leaf of the arguments of the next stage's first module (``path`` is
    "", for the call itself), or of what the module ``path`` returned."""

    path: str
    leaf: int


@dataclass(frozen=True)
class StandIn:
    """A module that only stands in, in a later stage.

    ``keeps_shape``: it returns one tensor of the shape and dtype of the first tensor that it gets. Otherwise it is asked
    once for each combination of shapes, with empty weights.
    """

    path: str
    keeps_shape: bool


@dataclass(frozen=True)
class Boundary:
    """Where a stage begins: ``before`` is the path of its first module; or, in a model whose modules are no help, the torch
    function ``function``, counted from the beginning of the forward pass (``pipeline_calls.py``)."""

    before: str
    carries: tuple[Carried, ...]
    stand_ins: tuple[StandIn, ...]
    copies: bool = False
    """Give the first module copies of what it gets, because it writes into it."""
    function: int | None = None
    depends: frozenset[int] = frozenset()
    """The torch functions before it whose results depend on parameters."""


@dataclass(frozen=True)
class Ran:
    """A forward pass: the leaves for what was received, in whose ``grad`` its gradient will be; what goes on to the next
    stage; and what the last stage's action returned."""

    leaves: Sequence[torch.Tensor]
    leaving: Sequence[torch.Tensor]
    result: Any


class Left(BaseException):
    """Thrown through the user's forward where a stage ends; no Exception, so that they do not catch it."""

    def __init__(self, taken: tuple[torch.Tensor, ...]) -> None:
        self.taken = taken


class Stage:
    """A stage ready to compute.

    Attributes:
        module: the model with this stage's parameters; what other stages hold is empty there.
        index: which stage this is, of ``count``.
        leaving: is given what goes on to the next stage, and may give something in its place: the end of a forward pass
            for whoever has hooks on the module's.
    """

    def __init__(
        self,
        model: nn.Module,
        index: int,
        boundaries: Sequence[Boundary],
        keeps: Iterable[str],
        share_buffers: bool = True,
        device: str | torch.device = "cpu",
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Make a stage of a model, which stays as it is.

        Args:
            boundaries: between all the stages, one less than there are.
            keeps: names of the parameters that this stage has: the very Parameter objects of the model.
            share_buffers: have the model's own buffers, instead of copies.
            prepare: changes the module before it is made a stage.
        """
        self.index, self.count = index, len(boundaries) + 1
        self.leaving: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]] = lambda taken: taken
        shared: list[torch.Tensor] = [*model.parameters(), *(model.buffers() if share_buffers else ())]
        self.module: nn.Module = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
        self._entry = boundaries[index - 1] if index else None
        self._exit = boundaries[index] if index < len(boundaries) else None
        self._arrived = True
        self._grad = True
        self._received: Sequence[torch.Tensor] = ()
        self._places: Sequence[torch.Tensor] = ()
        self._returned: dict[str, Any] = {}
        self._modes: Any = contextlib.nullcontext()
        named = dict(self.module.named_parameters())
        kept = {id(named[name]) for name in keeps}
        _hollow(self.module, kept, torch.device(device))
        if prepare is not None:
            prepare(self.module)
        self._install()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def run(self, received: Sequence[torch.Tensor], action: Callable[[nn.Module], Any]) -> Ran:
        """Let ``action`` call the stage's module on a microbatch.

        Args:
            received: what the stage before gave, requiring a gradient where they should get one.
            action: gets the module; what it returns is the result of the last stage. In others it never ends.
        """
        self._received, self._places = received, ()
        self._arrived = self._entry is None
        self._grad = torch.is_grad_enabled()
        try:
            with torch.set_grad_enabled(self._grad and self._arrived), self._modes:
                result = action(self.module)
        except Left as left:
            return Ran(self._places, self.leaving(left.taken), None)
        finally:
            places = self._places
            self.clear()
        if self._exit is not None:
            raise JobError(
                f'The model never called "{self._exit.before}", before which it was cut, on this batch; '
                "give other split_points, or use pp=1."
            )
        return Ran(places, (), result)

    def clear(self) -> None:
        """Forget what a forward pass, maybe one that was broken off, has left behind."""
        self._received = self._places = ()
        self._returned.clear()

    # -- the parts of a forward pass -----------------------------------------------------------------------------

    def _install(self) -> None:
        entry, leaving = self._entry, self._exit
        if any(boundary is not None and boundary.function is not None for boundary in (entry, leaving)):
            from shoal.axes.pipeline_calls import Replay

            self._modes = Replay(self.module, entry, leaving, self._fill, Left)
            return
        paths = {c.path for boundary in (entry, leaving) if boundary for c in boundary.carries if c.path}
        for path in paths:
            self.module.get_submodule(path).register_forward_hook(self._remembers(path))
        if entry is not None:
            for stand_in in entry.stand_ins:
                module = self.module.get_submodule(stand_in.path)
                module.forward = self._standing_in(module, stand_in.keeps_shape)
            self.module.get_submodule(entry.before).register_forward_pre_hook(
                self._arrives, prepend=True, with_kwargs=True
            )
        if leaving is not None:
            self.module.get_submodule(leaving.before).register_forward_pre_hook(
                self._leaves, prepend=True, with_kwargs=True
            )

    def _remembers(self, path: str) -> Callable[..., None]:
        def remember(_module: nn.Module, _args: Any, output: Any) -> None:
            self._returned[path] = output

        return remember

    def _find(self, boundary: Boundary, args: Any, kwargs: Any) -> list[torch.Tensor]:
        leaves: dict[str, list[Any]] = {"": pytree.tree_leaves((args, kwargs))}
        found = []
        for carried in boundary.carries:
            if carried.path not in leaves:
                leaves[carried.path] = pytree.tree_leaves(self._returned.get(carried.path))
            own = leaves[carried.path]
            leaf = own[carried.leaf] if carried.leaf < len(own) else None
            if not isinstance(leaf, torch.Tensor):
                where = f'"{carried.path}" returned' if carried.path else f'"{boundary.before}" was given'
                raise JobError(
                    f"What {where} is not built as it was on the example batch, so it cannot be sent to the next stage; "
                    "give other split_points, or use pp=1."
                )
            found.append(leaf)
        return found

    def _arrives(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._arrived or self._entry is None:
            return None
        places = self._find(self._entry, args, kwargs)
        self._fill(places)
        if not self._entry.copies:
            return None
        own = {id(place) for place in places}
        return pytree.tree_map(lambda leaf: leaf.clone() if id(leaf) in own else leaf, (args, kwargs))

    def _fill(self, places: Sequence[torch.Tensor]) -> None:
        """Put what was received in its places: from here on the forward pass is this stage's own."""
        self._arrived = True
        torch.set_grad_enabled(self._grad)
        if torch.is_autocast_enabled("cpu"):
            # What was cast so far was cast without a gradient; a tied weight must be cast anew.
            torch.clear_autocast_cache()
        for place, tensor in zip(places, self._received, strict=True):
            place.data = tensor.data
            if tensor.requires_grad:
                # The tensor object that the user's variables refer to becomes the leaf that gradients end in.
                place.requires_grad_()
        self._places = places

    def _leaves(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        assert self._exit is not None
        raise Left(tuple(self._find(self._exit, args, kwargs)))

    def _standing_in(self, module: nn.Module, keeps_shape: bool) -> Callable[..., Any]:
        real = module.forward
        known: dict[Any, Any] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._arrived:
                return real(*args, **kwargs)
            leaves = pytree.tree_leaves((args, kwargs))
            if keeps_shape:
                return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)).detach()
            key = (module.training, *(signature_of(leaf) for leaf in leaves))
            if key not in known:
                with torch.random.fork_rng(devices=[]), _only_asked(module):
                    known[key] = pytree.tree_map(form_of, real(*args, **kwargs))
            return pytree.tree_map(filled, known[key])

        return forward


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Without torch's fast path for evaluating nn.TransformerEncoder: it is taken or not by which weights a rank has, and its
    nested tensors cannot be sent."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@contextlib.contextmanager
def _only_asked(module: nn.Module) -> Iterator[None]:
    """Let a module that stands in leave no traces: it writes into copies of its buffers, and a BatchNorm neither counts what it
    is asked nor adds anything up with other workers, who are not asked at the same moment."""
    own = [(inner, name, b) for inner in module.modules() for name, b in inner._buffers.items() if b is not None]
    norms = [inner for inner in module.modules() if isinstance(inner, _BatchNorm) and inner.training]
    try:
        for inner, name, buffer in own:
            inner._buffers[name] = buffer.clone()
        for norm in norms:
            norm.training = False
        yield
    finally:
        for inner, name, buffer in own:
            inner._buffers[name] = buffer
        for norm in norms:
            norm.training = True


@dataclass(frozen=True)
class _Form:
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def signature_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf)


def form_of(leaf: Any) -> Any:
    return _Form(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def filled(leaf: Any) -> Any:
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, _Form) else leaf


def _hollow(model: nn.Module, kept: set[int], device: torch.device) -> None:
    """Let parameters that are not kept be zeros that take no memory, in all modules that hold them."""
    empty: dict[int, torch.Tensor] = {}
    for module in model.modules():
        gone = [name for name, p in module._parameters.items() if p is not None and id(p) not in kept]
        for name in gone:
            parameter = module._parameters.pop(name)
            assert parameter is not None
            if id(parameter) not in empty:
                empty[id(parameter)] = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            # A plain attribute: no parameter, and no buffer either that anybody would have to keep.
            module.__dict__[name] = empty[id(parameter)]
        if gone and isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]

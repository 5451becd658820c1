"""A replica: takes batches from its ring, runs the model, writes the answers where the gateway reads them.

The template (``shoal.process.template``) holds the loaded model; replicas are forked from it, and nobody writes to a weight, so
there is one copy of the weights however many replicas there are.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from shoal import bundle
from shoal.errors import TargetError
from shoal.process.channel import Channel
from shoal.process.failure import user_code
from shoal.process.gentle import gently
from shoal.rewrites import registry
from shoal.rewrites.install import install
from shoal.serve import hugging_face, precision
from shoal.serve.computing import AS_IT_IS, CHANNELS_LAST, FP32, Precision
from shoal.serve.latency import GAIN
from shoal.serve.messages import Attach, Attached, FollowRun
from shoal.serve.sample_rows import sample_rows
from shoal.serve.shelf import numbers_of
from shoal.serve.signature import UNIT, ModelSignature, TensorSignature
from shoal.serve.slots import Slots
from shoal.serve.source import ModelSource, can_be_served, describe
from shoal.serve.tolerance import Tolerance

if TYPE_CHECKING:
    # What follows a run speaks ZeroMQ, which most services need not load.
    from shoal.serve.live import Banks, Holder

_LEAST_RUNS, _MOST_RUNS = 2, 50
# Slow models may take so many times the time that is meant for measuring: a batch size that was not tried is never used.
_OVER_BUDGET = 3.0
_USUAL_LENGTH = 32
_LAYOUT_S = 0.1
_ROUNDING = 1e-4
# A batch that stands for the usual ones where cheaper ways of computing are compared.
_USUAL_ROWS = 8
_TORCH_TYPES = {"FP32": torch.float32, "FP64": torch.float64, "FP16": torch.float16, "BF16": torch.bfloat16}


class ReplicaHost:
    """What the template holds: the model, ready to answer."""

    def __init__(self, source: ModelSource) -> None:
        directory = source.path
        description = describe(directory)
        self._tokenizer = description.get("tokenizer")
        name = source.name or str(description.get("name", directory.name))
        self.signature = replace(ModelSignature.from_description(name, description), version=source.version)
        can_be_served(self.signature)
        with user_code("building the model"):
            self.model, self._first_update = _load(source)
        self._banks: Banks | None = None
        self._followed = source.live is not None or source.checkpoint is not None
        self._layout = AS_IT_IS
        self._exact = True
        self._tolerance = source.tolerance or Tolerance.of(description.get("tolerance"))
        self._samples = partial(sample_rows, directory, description, self.signature)
        gc.collect()
        gc.freeze()

    def describe(self) -> ModelSignature:
        """What goes in and out."""
        return self.signature

    def first_update(self) -> int | None:
        """How many updates of the run that the weights follow are in them; None where they are not what it has now."""
        return self._first_update

    def tokenizer(self) -> str | None:
        """Path of the tokenizer that turns texts into rows, where there is one."""
        return None if self._tokenizer is None else str(self._tokenizer)

    def try_out(self) -> None:
        """Run the model once on a sample; TargetError where the answer is not what the bundle says."""
        outputs = self._run(_sample(self.signature, 2))
        _fits(outputs, self.signature)
        if self._followed:
            self._must_be_numbers(outputs)

    def _must_be_numbers(self, outputs: Sequence[np.ndarray]) -> None:
        """Of a run in training nobody has said yet that its weights are any good. TargetError where some are no numbers."""
        from shoal.serve.live import not_a_number

        bad = not_a_number(self.model)
        if bad is not None:
            raise TargetError(f"{bad} is not a number in what the run of {self.signature.name} has now; see its losses.")
        for spec, values in zip(self.signature.outputs, outputs, strict=True):
            if values.dtype.kind == "f" and np.isnan(numbers_of(spec, values)).any():
                raise TargetError(f"{self.signature.name} answers with {spec.name} that is not a number; see the run's losses.")

    def make_banks(self) -> None:
        """Hold the model twice in shared memory, for weights that change while they are used. RequestError where that fails."""
        from shoal.serve.live import Banks

        self._banks = Banks(self.model, self._first_update or 0)
        gc.collect()
        gc.freeze()

    def choose_layout(self, given: str | None) -> str:
        """Lay pictures out as answers come quickest, as they are or channels last; ``given`` is taken without trying.

        Returns which it is.
        """
        if given is None:
            found = [self._seconds_alone()]
            if any(len(tensor.shape) == 4 for tensor in self.signature.inputs):
                self._lay_out(CHANNELS_LAST)
                found.append(self._seconds_alone())
            given = CHANNELS_LAST if min(found) == found[-1] < (1 - GAIN) * found[0] else AS_IT_IS
        self._lay_out(given)
        return given

    def choose_rewrites(self, given: Sequence[str] | None) -> tuple[str, ...]:
        """Rewrite the model where answers stay the same within rounding and come quicker; ``given`` is taken without trying.

        Returns the names of the rewrites.
        """
        if given is not None:
            return install(self.model, given, frozen=True).names
        names = registry.names(training=False)
        one, two = (_sample(self.signature, rows) for rows in (1, 2))
        changes = self._rewrite([name for name in names if not registry.exchanges(name)], two, one)
        # Single rows are too small to gain from another way to compute.
        usual = _sample(self.signature, _USUAL_ROWS, _USUAL_LENGTH)
        exchanges = self._rewrite([name for name in names if registry.exchanges(name)], usual, usual)
        return registry.in_order((*changes, *exchanges))

    def _rewrite(
        self, names: Sequence[str], checked: Sequence[np.ndarray], timed: Sequence[np.ndarray]
    ) -> tuple[str, ...]:
        """Apply rewrites if the answers to ``checked`` stay the same and those to ``timed`` come quicker; which were."""
        expected = self._run(checked)
        installed = install(self.model, names, frozen=True)
        try:
            found = self._run(checked)
            same = all(
                np.allclose(a, b, _ROUNDING, _ROUNDING * float(np.abs(a).max(initial=1e-3)))
                for a, b in zip(expected, found, strict=True)
            )
        except Exception:
            same = False
        installed.remove()
        if not same or not installed.applied.places:
            return ()
        before = self._seconds_of(timed)
        installed.resume()
        if self._seconds_of(timed) < (1 - GAIN) * before:
            return registry.in_order(installed.applied.places)
        installed.remove()
        return ()

    def choose_precision(self, given: str | None) -> Precision:
        """Find the quickest way to compute the model within its tolerance. ``given``: what an older version uses."""
        if self._tolerance.exact or given == FP32:
            return Precision(tolerance=str(self._tolerance))
        rows, what = self._samples()
        usual = _sample(self.signature, _USUAL_ROWS, _USUAL_LENGTH)

        def run(model: nn.Module, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [numbers_of(s, a) for s, a in zip(self.signature.outputs, self._run(inputs, model), strict=True)]

        # As long as it is not said to be exact, outputs are brought to the types that the signature says.
        self._exact = False
        self.model, found = precision.choose(self.model, run, self._tolerance, rows, what, usual, given)
        self._exact = found.name == FP32
        gc.collect()
        gc.freeze()
        return found

    def _lay_out(self, layout: str) -> None:
        last = layout == CHANNELS_LAST
        if last or self._layout != layout:
            self.model.to(memory_format=torch.channels_last if last else torch.contiguous_format)  # type: ignore[call-overload]
        self._layout = layout

    def _seconds_alone(self) -> float:
        """Seconds of one row."""
        return self._seconds_of(_sample(self.signature, 1))

    def _seconds_of(self, inputs: Sequence[np.ndarray]) -> float:
        """Seconds of an answer, the median of some runs after one that does not count."""
        self._run(inputs)
        times: list[float] = []
        until = time.monotonic() + _LAYOUT_S
        while len(times) < _LEAST_RUNS or (time.monotonic() < until and len(times) < _MOST_RUNS):
            start = time.perf_counter()
            self._run(inputs)
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    def sample(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """One row of each input, and of each output for it, as bytes."""
        inputs = _sample(self.signature, 1)
        return tuple(a.tobytes() for a in inputs), tuple(a.tobytes() for a in self._run(inputs))

    def run(self, role: Any, channel: Channel) -> None:
        """A replica's whole life."""
        message, fds = channel.receive()
        if isinstance(message, FollowRun):
            return self._follow(message, fds, channel)
        assert isinstance(message, Attach)
        # The template may run user code on one thread only; a replica may have more, none was started before the fork.
        torch.set_num_threads(message.threads)
        slots = Slots(fds[0], message.layout)
        measure = partial(self._measure, message.batches, message.budget_s)
        # Beside others the shortest time is the best guess of what a batch takes.
        measured = gently(partial(measure, np.min)) if message.gentle else measure(np.median)
        if message.gentle:
            # Some of what torch sets up at first it sets up for each thread: no request of a client's shall wait for that.
            self._run(_sample(self.signature, 1))
        channel.send(Attached(measured))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _Loop(self, slots, message.ring, work=fds[1], done=fds[2]).serve()

    def _follow(self, message: FollowRun, fds: Sequence[int], channel: Channel) -> None:
        """The life of the process that keeps the weights current."""
        from shoal.serve.live import follow

        assert self._banks is not None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        follow(self._banks, Slots(fds[0], message.layout), message, channel)

    def holder(self, slots: Slots, ring: int) -> Holder | None:
        """How a replica comes to the newest weights; None where they stay as they are."""
        if self._banks is None:
            return None
        from shoal.serve.live import Holder

        return Holder(self._banks, slots, ring)

    def _measure(self, batches: Sequence[int], budget_s: float, typical: Callable[[Any], Any]) -> dict[int, float]:
        """Typical seconds of a batch by its size; the largest are left out where the budget is long spent."""
        measured: dict[int, float] = {}
        began = time.monotonic()
        for size in sorted(batches):
            if measured and time.monotonic() - began > _OVER_BUDGET * budget_s:
                break
            rows, length = (size, 0) if self.signature.longest is None else _shape_of(size, self.signature.longest)
            inputs = _sample(self.signature, rows, length)
            self._run(inputs)
            times: list[float] = []
            until = time.monotonic() + budget_s / len(batches)
            while len(times) < _LEAST_RUNS or (time.monotonic() < until and len(times) < _MOST_RUNS):
                start = time.perf_counter()
                self._run(inputs)
                times.append(time.perf_counter() - start)
            measured[rows * self.signature.units(length)] = float(typical(times))
        return measured

    def _run(self, inputs: Sequence[np.ndarray], model: nn.Module | None = None) -> list[np.ndarray]:
        """Outputs of a batch, in the signature's order. ``model``: another way to compute it than the one that was chosen."""
        with torch.inference_mode():
            tensors = [_tensor(array, spec) for array, spec in zip(inputs, self.signature.inputs, strict=True)]
            if self._layout == CHANNELS_LAST:
                tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
            values = _flat(_call(model or self.model, tensors, self.signature.inputs))
            if not self._exact:
                specs = self.signature.outputs
                values = [v.to(_TORCH_TYPES.get(s.datatype, v.dtype)) for v, s in zip(values, specs, strict=True)]
            return [_array(value) for value in values]


def _load(source: ModelSource) -> tuple[nn.Module, int | None]:
    """The model, and for one that follows a run which update of it that is."""
    if hugging_face.is_folder(source.path):
        return hugging_face.load(source.path), None
    if source.live is not None:
        from shoal.serve.live import first_weights

        return first_weights(bundle.build(source.path), source.path, source.live)
    if source.checkpoint is None:
        return bundle.load(source.path), None
    return bundle.load_with(source.path, source.checkpoint), None


class _Loop:
    def __init__(self, host: ReplicaHost, slots: Slots, ring: int, work: int, done: int) -> None:
        self._host = host
        self._signature = host.signature
        self._fixed = host.signature.longest is None
        self._slots = slots
        self._ring = slots.rings[ring]
        self._work = work
        self._done = done
        self._holder = host.holder(slots, ring)

    def serve(self) -> None:
        while True:
            os.eventfd_read(self._work)
            if self._ring.done == self._ring.posted:
                continue
            start = time.perf_counter()
            failure, update, model = None, 0, None
            if self._holder is not None:
                model = self._holder.take()
                update = self._holder.update
            try:
                self._answer(self._ring.slots_of(self._ring.done), model)
            except Exception as error:
                failure = f"The model raised {type(error).__name__}."
            if self._holder is not None:
                self._holder.leave()
            self._ring.finish(time.perf_counter() - start, failure, update)
            os.eventfd_write(self._done, 1)

    def _answer(self, rows: list[int], model: nn.Module | None) -> None:
        # One row is a view of the slot, more are gathered.
        index: Any = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows
        if self._fixed:
            outputs = self._host._run([array[index] for array in self._slots.inputs], model)
            for place, values in zip(self._slots.outputs, outputs, strict=True):
                place[index] = values
            return
        lengths = self._slots.lengths[rows]
        longest = int(lengths.max())
        inputs = [
            _padded(array, rows, lengths, longest, spec.padding) if spec.free else array[index]
            for spec, array in zip(self._signature.inputs, self._slots.inputs, strict=True)
        ]
        outputs = self._host._run(inputs, model)
        for spec, place, values in zip(self._signature.outputs, self._slots.outputs, outputs, strict=True):
            if spec.free:
                place[rows, :longest] = values
            else:
                place[index] = values


def _fits(outputs: Sequence[np.ndarray], signature: ModelSignature) -> None:
    found = [tuple(array.shape[1:]) for array in outputs]
    said = [tensor.shape[1:] for tensor in signature.outputs]
    if len(found) != len(said) or any(
        len(one) != len(other) or any(b not in (-1, a) for a, b in zip(one, other, strict=True))
        for one, other in zip(found, said, strict=True)
    ):
        raise TargetError(
            f"{signature.name} answers with rows of shape {found} and its bundle says {said}; write the bundle again."
        )


def _sample(signature: ModelSignature, rows: int, length: int = UNIT) -> list[np.ndarray]:
    """Rows of ones: in range for pixels, and an index that the smallest of embeddings knows."""
    length = min(length, signature.longest or length)
    return [
        np.ones((rows, *([length, *t.shape[2:]] if t.free else t.shape[1:])), t.dtype) for t in signature.inputs
    ]


def _shape_of(units: int, longest: int) -> tuple[int, int]:
    """(rows, length) of a batch with so many units in all: one row up to the usual length, more rows beyond."""
    usual = min(_USUAL_LENGTH, longest)
    length = min(units * UNIT, usual)
    return max(1, units * UNIT // length), length


def _padded(array: np.ndarray, rows: list[int], lengths: np.ndarray, longest: int, padding: int) -> np.ndarray:
    """Rows of unequal lengths as one array, filled up at their ends."""
    if len(rows) == 1:
        return array[rows[0] : rows[0] + 1, :longest]
    found = array[rows, :longest]
    for k, length in enumerate(lengths):
        found[k, length:] = padding
    return found


def _tensor(array: np.ndarray, spec: TensorSignature) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if spec.datatype == "BF16" else tensor


def _array(value: torch.Tensor) -> np.ndarray:
    found: np.ndarray = (value.view(torch.uint16) if value.dtype is torch.bfloat16 else value).numpy()
    return found


def _call(model: nn.Module, tensors: Sequence[torch.Tensor], specs: Sequence[TensorSignature]) -> Any:
    """One tensor or numbered ones go in by position, named ones by name, as in training."""
    names = [spec.name for spec in specs]
    if names == ["input"] or all(name == f"input_{k}" for k, name in enumerate(names)):
        return model(*tensors)
    positional = [t for name, t in zip(names, tensors, strict=True) if _numbered(name)]
    named = {name: t for name, t in zip(names, tensors, strict=True) if not _numbered(name)}
    return model(*positional, **named)


def _numbered(name: str) -> bool:
    return name.startswith("input_") and name[6:].isdigit()


def _flat(output: Any) -> list[torch.Tensor]:
    """The tensors of an output, in the order in which a bundle names them."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in _flat(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in _flat(value)]
    return []

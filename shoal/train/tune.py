"""Finding out what rewrites and sub-batches gain on a job's own batch: checked first, then measured in turn.

All of it runs aside, in a child of the template that computes on one thread, and nothing of it is left. A rewrite is used only
where outputs, gradients and buffers are the author's within rounding, in float64 where the model can be run in it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shoal.plan import Plan
from shoal.planner.search import HOPELESS
from shoal.rewrites import registry
from shoal.rewrites.install import install
from shoal.train import objective, streams
from shoal.train.built import Built
from shoal.train.embedding import quicken_embeddings
from shoal.train.work import (
    PLACE,
    Tensors,
    close,
    further_batches,
    map_tensors,
    samples_of,
    tensors,
    unchanged,
    work_of,
)

GAIN = 1.02
"""A rewrite is taken where it is at least so many times as fast."""
SUB_BATCH_GAIN = 1.1
"""Pieces cost what is not measured here: more batches to gather, gradients to add up."""
_CLOSE_DOUBLE, _CLOSE_SINGLE = 1e-9, 1e-4
_CHECKED_SAMPLES = 8
_MOST_DOUBLED_BYTES = 128 << 20
_SLOW_S = 0.5
_LONG_PASS_S = 0.25
"""A worker's pass that takes longer is measured with a part of its samples."""
_LONGEST_WHOLE_S = 0.5
"""Sub-batches are looked for with all samples as long as a pass of these takes no more."""
_STEADY_S = 0.1
"""Passes that take so long are not measured more than twice each where there is no time for more."""
_ROUNDS, _LEAST_ROUNDS = 30, 4
_LEAST_CUT_S = 0.002
_CLEAR = 1.04
"""Pairs of passes that take a tenth of a second and more differ by less where both ways are equal."""


@dataclass(frozen=True)
class Question:
    """What is to be found out.

    Attributes:
        names: the rewrites to look at, all that there are where it is None.
        forced: they were asked for: only check them.
        sub_batches: sizes to try; none where the plan says one, or may not have any.
        layout, precision: the plan's.
        samples: in the batch that is measured: what a worker computes in a step.
        seconds: for measuring.
    """

    names: tuple[str, ...] | None
    forced: bool
    sub_batches: tuple[int, ...]
    layout: str
    precision: str
    samples: int
    seconds: float


@dataclass(frozen=True)
class Finding:
    """What became of a change: the seconds of a pass without it and with it, or why it cannot be used."""

    name: str
    before_s: float | None = None
    after_s: float | None = None
    trouble: str | None = None

    @property
    def gain(self) -> float:
        return self.before_s / self.after_s if self.before_s and self.after_s else 1.0


@dataclass(frozen=True)
class Tuned:
    """The rewrites and the sub-batch to use, and what was found of each that applies.

    Attributes:
        samples: what was measured with.
        pass_s: processor time of a forward and a backward pass over these, with the rewrites; None where it was not measured.
    """

    names: tuple[str, ...]
    sub_batch: int
    findings: tuple[Finding, ...]
    samples: int
    pass_s: float | None = None


def rewrites_of(plan: Plan) -> tuple[str, ...]:
    """The names of the rewrites that a complete plan uses."""
    return plan.rewrites if isinstance(plan.rewrites, tuple) else ()


def tune(built: Built, question: Question, beat_s: float | None = None) -> Tuned:
    """Check and measure. Whatever the author's own code raises here it will raise in training too, so nothing is found then.

    ``beat_s``: what a sample takes in the best of the layouts that were looked at before.
    """
    try:
        return _Tuning(built, question, beat_s).run()
    except Exception:
        return Tuned((), 0, (), question.samples)


def processes_gain() -> dict[str, float]:
    """How many times as fast this machine computes, on one thread, with each rewrite that changes no model."""
    return {name: one.gain() for name, one in registry.all_rewrites().items() if registry.exchanges(name)}


class _Tuning:
    def __init__(self, built: Built, question: Question, beat_s: float | None) -> None:
        self._beat_s, self._whole_s = beat_s, 0.0
        self._built, self._job, self._model, self._question = built, built.job, built.model, question
        self._batches: list[Any] | None = None
        self._kept = quicken_embeddings()
        self._work = work_of(built, question.samples, question.layout, question.precision)
        # What applies where nothing is trained is of use to evaluation.
        self._names = registry.names(True)
        if built.evaluation is not None:
            self._names = registry.in_order((*self._names, *registry.names(False)))

    def run(self) -> Tuned:
        question, model = self._question, self._model
        names = self._names if question.names is None else registry.in_order(question.names)
        few = min(_CHECKED_SAMPLES, question.samples)
        began = time.monotonic()
        if not question.forced:
            # Most models have nothing to rewrite, and most machines multiply well: both are soon done with.
            names = self._applicable(names, few)
        slow = time.monotonic() - began > _SLOW_S
        if not question.forced and self._shorten(few):
            slow = True
            bare_s = self._pass_s(()) if self._beat_s is not None else 0.0
            if self._beat_s is not None and bare_s > HOPELESS * self._beat_s * self._work.samples:
                return Tuned((), 0, (), self._work.samples, bare_s)
        few = min(few, 2) if slow else few
        if not question.forced:
            # Finding no place is told sooner than giving the same results.
            names = tuple(name for name in names if registry.exchanges(name) or self._finds_anything([name], few))
        findings: list[Finding] = []
        sound: list[str] = []
        checks: dict[bool, _Check] = {}
        for name in names:
            whole = registry.exchanges(name)
            if whole not in checks:
                # A few samples do not make an exchange worth while, and in float64 there is none.
                batch, count = (self._work.batch, self._work.samples) if whole else (samples_of(self._work.batch, 0, few), few)
                checks[whole] = _Check(self._job, model, batch, count, double=not whole)
            trouble = checks[whole].trouble((name,))
            if trouble != NOT_FOUND or question.forced:
                findings.append(Finding(name, trouble=trouble))
            if trouble is None:
                sound.append(name)
        checks.clear()
        if question.forced:
            return Tuned(tuple(sound), 0, tuple(findings), question.samples)
        chosen, measured = self._measure(sound)
        samples, pass_s = self._work.samples, self._pass_s(chosen)
        sub_batch = self._measure_sub_batches(chosen, measured) if question.sub_batches else 0
        unsound = [finding for finding in findings if finding.trouble is not None]
        return Tuned(tuple(chosen), sub_batch, (*measured, *unsound), samples, pass_s)

    def _shorten(self, few: int) -> bool:
        """Let passes that take long be measured with fewer samples; whether they are. ``few``: can be computed in no time."""
        question = self._question
        try:
            self._work.train(few=few)
            start = time.thread_time()
            self._work.train(few=few)
        except Exception:
            # A batch that cannot be cut.
            return False
        each_s = max(time.thread_time() - start, 1e-6) / few
        self._whole_s = each_s * question.samples
        samples = max(few, min(question.samples, int(_LONG_PASS_S / each_s)))
        if samples == question.samples:
            return False
        self._work = work_of(self._built, samples, question.layout, question.precision)
        return True

    def _pass_s(self, chosen: Sequence[str]) -> float:
        """Processor time of a pass with what was chosen."""
        installed = install(self._model, chosen)
        times: list[float] = []
        while len(times) < 2 or (len(times) < 3 and sum(times) < 2 * _LONG_PASS_S):
            start = time.thread_time()
            self._work.train()
            times.append(time.thread_time() - start)
        installed.remove()
        return min(times)

    def _applicable(self, names: Sequence[str], few: int) -> tuple[str, ...]:
        """These without what has no place: changes of the model, looked for all together. What changes how a process computes is
        left out where this machine gains nothing by it; whether it finds a place, its check says, which takes whole passes."""
        changes = [name for name in names if not registry.exchanges(name)]
        found = set(changes if changes and self._finds_anything(changes, few) else ())
        found |= {n for n in names if registry.exchanges(n) and registry.all_rewrites()[n].gain() >= GAIN}
        return registry.in_order(found)

    def _finds_anything(self, names: Sequence[str], few: int) -> bool:
        """Whether any of these rewrites finds a place, taken all together."""
        installed = install(self._model, names)
        try:
            with unchanged(self._model):
                self._work.train(few=few)
                self._work.evaluate(few)
                return bool(installed.applied.places)
        except Exception:
            # One of them fails: which one, the checks will say.
            return True
        finally:
            installed.remove()

    def _still_finds(self, name: str, names: tuple[str, ...]) -> bool:
        installed = install(self._model, names)
        try:
            self._work.train()
            if name not in installed.applied.places:
                self._work.evaluate()
            return name in installed.applied.places
        finally:
            installed.remove()

    def _measure(self, sound: Sequence[str]) -> tuple[list[str], list[Finding]]:
        """Take one after the other, each beside those that were taken before, where it is faster so."""
        chosen: list[str] = []
        findings: list[Finding] = []
        for name in sound:
            if chosen and not self._still_finds(name, (*chosen, name)):
                # Another one has taken its places.
                continue
            trains = registry.all_rewrites()[name].TRAINS
            work = self._work.train if trains else self._work.evaluate
            before, after = self._alternate(work, tuple(chosen), work, (*chosen, name), len(sound) + 1, GAIN)
            findings.append(Finding(name, before, after))
            if before > after * GAIN:
                chosen.append(name)
        return chosen, findings

    def _measure_sub_batches(self, chosen: Sequence[str], findings: list[Finding]) -> int:
        """The size that gains most. Passes that take very long are only tried in parts of what is measured of them."""
        best = 0
        names = tuple(chosen)
        question = self._question
        if self._work.samples < question.samples and self._whole_s <= _LONGEST_WHOLE_S:
            self._work = work_of(self._built, question.samples, question.layout, question.precision)
            self._batches = None
        sizes = [size for size in self._question.sub_batches if size < self._work.samples]
        if not sizes or not self._is_worth_cutting() or not self._sum_is_the_same(sizes[0]):
            return 0
        for size in sizes:
            before, after = self._alternate(
                functools.partial(self._work.train, best), names, functools.partial(self._work.train, size), names,
                2 * len(sizes), SUB_BATCH_GAIN,
            )  # fmt: skip
            if before > after * SUB_BATCH_GAIN:
                findings.append(Finding(f"sub_batch={size}", before, after))
                best = size
            else:
                break
        return best

    def _is_worth_cutting(self) -> bool:
        """Whether a pass takes long enough for several to be no slower."""
        self._work.train()
        start = time.thread_time()
        self._work.train()
        return time.thread_time() - start > _LEAST_CUT_S

    def _sum_is_the_same(self, size: int) -> bool:
        """Whether pieces add up to the whole: not where samples know of each other, or random numbers are drawn."""
        found = []
        for pieces in (0, size):
            self._work.train(pieces, keep=True)
            found.append([None if p.grad is None else p.grad.clone() for p in self._model.parameters()])
            self._work.forget()
        return all(close(a, b, _CLOSE_SINGLE) for a, b in zip(*found, strict=True))

    def _alternate(
        self, one: Callable[[], Any], names: tuple[str, ...], other: Callable[[], Any], others: tuple[str, ...], parts: int,
        bar: float,
    ) -> tuple[float, float]:  # fmt: skip
        """Seconds of two ways to compute, in turn, so that what else the machine does disturbs both.

        Processor time of this thread, which others cannot take, and only as much of a gain as both the shortest times and
        the typical pair of neighbours show. Slow ways are soon told apart: once all pairs are clearly on one side of ``bar``,
        the gain that is asked for.
        """
        if self._batches is None:
            further = further_batches(self._built, self._work.samples, self._question.layout)
            self._batches = [self._work.batch, *further]
        ways = [(install(self._model, names), one)]
        ways[0][0].remove()
        ways.append((install(self._model, others), other))
        ways[1][0].remove()
        times: list[list[float]] = [[], []]
        until = time.monotonic() + self._question.seconds / parts
        for number in range(_ROUNDS + 1):
            for k, (installed, compute) in enumerate(ways):
                # Each another one than the way before it, which would have brought it into the cache.
                self._work.batch = self._batches[(2 * number + k) % len(self._batches)]
                installed.resume()
                start = time.thread_time()
                compute()
                # The first of each traces, and warms caches up.
                if number:
                    times[k].append(time.thread_time() - start)
                installed.remove()
            if number >= 2 and sum(times[0]) > _SLOW_S and _is_clear([a / b for a, b in zip(*times, strict=True)], bar):
                break
            least = _LEAST_ROUNDS if not number or times[0][-1] < _STEADY_S else 2
            if number >= least and time.monotonic() > until:
                break
        self._work.batch = self._batches[0]
        best = min(times[0]), min(times[1])
        typical = statistics.median(a / b for a, b in zip(*times, strict=True))
        return best[0], max(best[1], best[0] / max(typical, 1e-9)) if best[0] > best[1] else best[1]


def _is_clear(ratios: Sequence[float], bar: float) -> bool:
    """Whether no pair of neighbours comes near a bar."""
    return min(ratios) > bar * _CLEAR or max(ratios) < bar / _CLEAR


NOT_FOUND = "finds nothing to change in this model"


class _Check:
    """Compares a rewritten model with the author's on some samples, in float64 where both is wanted and possible."""

    def __init__(self, job: Any, model: nn.Module, batch: Any, count: int, double: bool = True) -> None:
        self._job, self._count = job, count
        self._model, self._batch, self._close = model, batch, _CLOSE_SINGLE
        self._truth: Any = None
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if double and size <= _MOST_DOUBLED_BYTES and all(p.dtype in (torch.float32, torch.float64) for p in model.parameters()):
            # A copy in which every number is exact to nine digits; where it cannot be run, the model as it is decides.
            with contextlib.suppress(Exception):
                self._model, self._batch = copy.deepcopy(model).double(), _doubled(batch)
                self._truth = self._compute()
                self._close = _CLOSE_DOUBLE
        if self._truth is None:
            self._model, self._batch = model, batch
            self._truth = self._compute()

    def trouble(self, names: tuple[str, ...]) -> str | None:
        """Why rewrites cannot be used; None where they do the same."""
        installed = install(self._model, names)
        try:
            found = self._compute()
        except Exception as error:
            return f"fails in this model ({type(error).__name__})"
        finally:
            installed.remove()
        if not installed.applied.places:
            return NOT_FOUND
        same = len(found) == len(self._truth) and all(
            close(a, b, self._close) for a, b in zip(self._truth, found, strict=True)
        )
        return None if same else "does not give the same results in this model"

    def _compute(self) -> Tensors:
        """Loss, outputs, gradients, and buffers in training; outputs where nothing is trained; the model stays as it was."""
        model = self._model
        with unchanged(model):
            streams.reseed(*PLACE)
            outcome = objective.compute(self._job, model, self._batch, self._count)
            outcome.to_backward(self._count).backward()  # type: ignore[no-untyped-call]
            found: Tensors = [outcome.loss.detach(), *tensors(outcome.output)]
            found += [None if p.grad is None else _dense(p.grad) for p in model.parameters()]
            found += [buffer.clone() for buffer in model.buffers()]
            for parameter in model.parameters():
                parameter.grad = None
            model.eval()
            with torch.no_grad():
                outcome = objective.compute(self._job, model, self._batch, self._count)
                found += [outcome.loss, *tensors(outcome.output)]
            model.train()
        return found


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient.clone()


def _doubled(batch: Any) -> Any:
    return map_tensors(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

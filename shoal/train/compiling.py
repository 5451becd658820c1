"""torch.compile in a worker: the model's forward and backward passes as code that inductor writes for this processor.

Each worker compiles for itself, after it was forked and in this process alone, so nobody inherits a thread or a lock. What was
compiled is kept in the cache folder, and found there by other workers, by replacements and by the next run. Sizes are symbolic
from the beginning, and the first batch that is compiled for has the same size in every worker's life: so the code does not
depend on which batch a replacement begins with, and the full plan gives the same bits again.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shoal.cluster.cache import cache_dir
from shoal.plan import Plan
from shoal.ps.embedding import Embedding
from shoal.rewrites.install import install
from shoal.train.built import Built
from shoal.train.embedding import Embeddings, quicken_embeddings
from shoal.train.gradients import SparseRows
from shoal.train.tune import Finding, rewrites_of
from shoal.train.work import Tensors, Work, close, tensors, unchanged, work_of

GAIN = 1.05
"""Compiled code is taken where it is at least so many times as fast: every start takes seconds longer with it."""
_CLOSE = 5e-3
_ROUNDS, _LEAST_ROUNDS, _MEASURING_S = 30, 3, 2.0
_REMEDY = "leave compile out"
NAME = "compile"
"""What it is called among the changes that are tried."""


def compile_model(model: nn.Module, threads: int) -> None:
    """Let a model compute by compiled code from its next call on, in this process; its names and weights stay as they are."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    # No pool of processes and no thread beside this one.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import torch._inductor.config as inductor

    inductor.compile_threads = 1
    if threads > 1:
        # Threads that add to the same rows would do so in any order.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for module in model.modules():
        # Global sums and rows by key are looked up while the model computes: they are no part of a graph.
        if isinstance(module, Embedding) or (isinstance(module, _BatchNorm) and "forward" in vars(module)):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    model.compile(dynamic=True)


def give_up(model: nn.Module) -> None:
    """Let it compute by its author's code again."""
    model._compiled_call_impl = None


def warm_up(work: Work) -> None:
    """Compile for training and for evaluation; nothing else is left of it."""
    with unchanged(work.model):
        work.train()
        work.evaluate()


def compiler_trouble() -> str | None:
    """Why nothing can be compiled here; None where something can."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception:
        return "there is no C++ compiler here that torch.compile could use; install g++, or " + _REMEDY
    return None


class _Tables:
    """Embeddings' gradients on their way to a stripe, as a worker sends them: some ways to compute leave most rows alone."""

    def __init__(self, model: nn.Module, embeddings: Embeddings | None) -> None:
        weights = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) and not m.sparse and m.weight.requires_grad}
        self._places = [(weight, place := torch.zeros_like(weight.detach()), SparseRows(place, embeddings)) for weight in weights]

    def train(self, work: Work, size: int = 0) -> None:
        """A worker's pass, and what becomes of these gradients."""
        work.train(size, keep=True)
        for weight, place, rows in self._places:
            if weight.grad is not None and not rows.take(weight, weight.grad):
                place.copy_(weight.grad)
                rows.forget()
        work.forget()


def try_compiling(
    built: Built, work: Work, rewritten: Callable[[], Callable[[], Any]], plan: Plan, embeddings: Embeddings | None = None
) -> Finding:
    """Compile a model, hold it against the author's code, and measure it beside what the plan does without.

    Args:
        rewritten: lets the model compute as it would without being compiled, and returns what takes that back.
        embeddings: what makes the gradients of tables in this process.
    """
    threads = plan.threads or 1
    torch.set_num_threads(threads)
    trouble = compiler_trouble()
    if trouble is not None:
        return Finding(NAME, trouble=trouble)
    truth = _answers(work)
    tables = _Tables(built.model, embeddings)
    undo = rewritten()
    with unchanged(built.model):
        # Running statistics, which these passes move, are compared below.
        before = _time(functools.partial(tables.train, work, plan.sub_batch or 0), threads)
    undo()
    compile_model(built.model, threads)
    try:
        found = _answers(work)
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "")[:200]
        return Finding(NAME, trouble=f"torch.compile fails on this model ({type(error).__name__}: {said}); " + _REMEDY)
    if not _alike(truth, found):
        return Finding(NAME, trouble="compiled, this model does not give the same results; " + _REMEDY)
    return Finding(NAME, before, _time(functools.partial(tables.train, work), threads))


def compile_aside(built: Built, plan: Plan, samples: int) -> Finding:
    """What compiling gives under a plan for a worker that computes so many samples a step; for a process that ends afterwards."""
    kept = quicken_embeddings()
    work = work_of(built, samples, plan.layout, plan.precision)
    names = rewrites_of(plan) if not plan.compile else ()

    def rewritten() -> Callable[[], Any]:
        return install(built.model, names).remove

    found = try_compiling(built, work, rewritten, plan, kept)
    if kept is not None:
        kept.end()
    return found


def _answers(work: Work) -> Tensors:
    """The output where nothing is trained, the loss, and the gradients."""
    with unchanged(work.model):
        found: Tensors = [*tensors(work.evaluate()), *tensors(work.train(keep=True))]
        found += [None if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad for p in work.model.parameters()]
        work.forget()
    return found


def _alike(truth: Tensors, found: Tensors) -> bool:
    """Whether answers differ by rounding in another order only: what is nothing but that, by little of the largest value."""
    if len(truth) != len(found):
        return False
    largest = max((float(a.abs().max()) for a in truth if a is not None and a.is_floating_point() and a.numel()), default=0.0)
    for a, b in zip(truth, found, strict=True):
        near = a is not None and b is not None and a.shape == b.shape and a.is_floating_point() and a.numel() > 0
        if not close(a, b, _CLOSE) and not (near and float((a - b).abs().max()) <= _CLOSE * largest):  # type: ignore[operator]
            return False
    return True


def _time(compute: Callable[[], Any], threads: int) -> float:
    """Seconds of a pass: of processor time on one thread, which others cannot take."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    compute()
    times: list[float] = []
    until = time.monotonic() + _MEASURING_S / 2
    while len(times) < _LEAST_ROUNDS or (len(times) < _ROUNDS and time.monotonic() < until):
        start = clock()
        compute()
        times.append(clock() - start)
    return (min(times) + statistics.median(times)) / 2

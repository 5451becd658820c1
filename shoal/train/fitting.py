"""Fitting plans to the job's model: which rewrites and which sub-batch go with each memory layout, as the template measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from shoal.comm.grid import Grid
from shoal.errors import PlanError
from shoal.plan import Plan
from shoal.planner.candidates import sub_batches
from shoal.planner.search import HOPELESS
from shoal.process.supervisor import Supervisor
from shoal.rewrites import registry
from shoal.train.compiling import GAIN as COMPILE_GAIN
from shoal.train.compiling import NAME as COMPILE
from shoal.train.settings import JobFacts
from shoal.train.tune import GAIN, Finding, Question, Tuned, rewrites_of

_SECONDS = 3.0
_COMPILE_S = 6.0
"""What compiling may take where nobody asked for it."""
_LEAST_COMPILE_S, _STOP_S = 1.0, 0.3
"""With less time it would end in vain; and what ending it takes."""
_TIMEOUT_S = 600.0
_LONG_STEP_S = 0.2

Recall = Callable[[str], Any]
Remember = Callable[[str, Mapping[str, Any]], None]


class Fitting:
    """Asks the template what rewriting gains, once for each layout, and remembers the answers.

    Args:
        recall, remember: the memory of this job on this machine, by a key.
    """

    def __init__(
        self, wanted: Plan, facts: JobFacts, supervisor: Supervisor, recall: Recall, remember: Remember
    ) -> None:
        self._wanted, self._facts, self._supervisor = wanted, facts, supervisor
        self._recall, self._remember = recall, remember
        self._found: dict[str, Tuned] = {}
        self._compiled: Finding | None = None
        self._gains: Mapping[str, float] | None = None
        if isinstance(wanted.rewrites, tuple):
            registry.check_names(wanted.rewrites)

    def fit(self, candidates: Sequence[Plan]) -> list[Plan]:
        """The plans with their rewrites and sub-batch; PlanError where ones that were asked for cannot be used."""
        layouts = {plan.layout for plan in candidates}
        most = max(plan.data_ways for plan in candidates)
        # Channels last first: what gains most is made for it, and it tells early what is not worth looking at.
        fitted = {plan: self._fit(plan, most, len(layouts)) for plan in sorted(candidates, key=lambda plan: str(plan.layout))}
        return [fitted[plan] for plan in candidates]

    def promising(self, candidates: Sequence[Plan], cores: int) -> tuple[list[Plan], list[str]]:
        """The plans that are worth trying by what a pass took here, and what is said of those that are not.

        A memory layout is left out that is far behind another one, and where steps are long, plans that leave cores idle.
        """
        layouts = {str(plan.layout) for plan in candidates}
        passes = {name: t.pass_s / t.samples for name, t in self._found.items() if name in layouts and t.pass_s}
        if layouts - passes.keys():
            return list(candidates), []
        best = min(passes, key=lambda layout: passes[layout])
        step_s = passes[best] * self._facts.batch_size
        slow = {layout for layout, each_s in passes.items() if each_s > HOPELESS * passes[best]}
        said = [
            f"layout={layout} was not tried: a pass takes {passes[layout] / passes[best]:.1f} × as long as in {best}."
            for layout in sorted(slow)
        ]
        found = [plan for plan in candidates if str(plan.layout) not in slow]
        busy = [plan for plan in found if plan.world_size * (plan.threads or 1) >= cores]
        if step_s > _LONG_STEP_S and busy and len(busy) < len(found):
            said.append(f"Plans that leave cores idle were not tried: a step takes {step_s:.1f} s on one thread.")
            found = busy
        return found, said

    def why(self, plan: Plan) -> list[str]:
        """What each change gains, or why it was not made, in sentences."""
        hindrance = _hindrance(plan)
        if hindrance is not None:
            said = [_sentence_of_process(name, self._processes()[name]) for name in rewrites_of(plan)]
            return [*said, f"No {'other ' * bool(said)}rewrites: {hindrance}."] if self._wanted.rewrites == "auto" else said
        tuned = self._found.get(str(plan.layout))
        return [] if tuned is None else [_sentence(finding, tuned) for finding in tuned.findings]

    def compile(self, plan: Plan, thorough: bool, left_s: float = _COMPILE_S) -> Plan:
        """The plan with compiled code where it measures faster, if that is open; PlanError where it was asked for in vain.

        Args:
            thorough: find it out where it is not known yet; ``left_s``: the time that there is for that, where nobody asked.
        """
        asked = bool(self._wanted.compile)
        if not asked and (self._wanted.compile is not None or isinstance(self._wanted.rewrites, tuple)):
            return plan
        global_batchnorm = self._facts.batchnorm and plan.data_ways > 1 and plan.batchnorm == "global"
        if not asked and (uncompilable(plan) is not None or global_batchnorm):
            # Global sums cut the graph into many small ones, each compiled by itself.
            return plan
        found = self._compiled = self._ask_compiled(plan, thorough, asked, min(_COMPILE_S, left_s - _STOP_S))
        if asked and found is not None and found.trouble is not None:
            raise PlanError(f"compile=on cannot be used: {found.trouble}.")
        if not asked and (found is None or found.trouble is not None or found.gain < COMPILE_GAIN):
            return plan
        if plan.sub_batch and not self._wanted.sub_batch:
            plan = plan.replace(sub_batch=0, batchnorm=self._wanted.batchnorm or "global")
        return plan.replace(compile=True, rewrites="none")

    def _ask_compiled(self, plan: Plan, thorough: bool, asked: bool, left_s: float) -> Finding | None:
        """What is known of compiling, or is found out now; None where it is not known, and not to be found out."""
        samples = max(1, self._facts.batch_size // plan.data_ways)
        bare = plan.replace(compile=None, explanation=())
        key = f"compiled {bare} {samples}"
        known = self._recall(key)
        if known is not None and (known["trouble"] is None or not asked):
            return Finding(**known)
        if self._facts.tables or not (thorough or asked):
            return None
        if not asked and left_s < _LEAST_COMPILE_S:
            return Finding(COMPILE, trouble="there was no time left for trying it; shoal plan JOB --plan compile=on waits")
        limit_s = None if asked else left_s
        compiled: Finding = self._supervisor.call("try_compiling", plan, samples, limit_s, timeout_s=_TIMEOUT_S)
        self._remember(key, asdict(compiled))
        return compiled

    def why_compiled(self, plan: Plan) -> list[str]:
        """What compiling gains, or why it was not done, in a sentence."""
        found = self._compiled
        if found is None:
            return []
        if found.trouble is not None:
            return [f"Not compiled: {found.trouble.rstrip('.')}."]
        assert found.before_s is not None and found.after_s is not None
        times = f"{found.before_s * 1e3:.2f} → {found.after_s * 1e3:.2f} ms for a worker's pass"
        if plan.compile:
            return [f"compile=on (torch.compile): {found.gain:.2f} × as fast ({times})."]
        return [f"compile=on (torch.compile) is not used: not faster here ({times})."]

    def _fit(self, plan: Plan, most: int, layouts: int) -> Plan:
        wanted = self._wanted.rewrites
        hindrance = _hindrance(plan)
        if wanted == "none":
            return plan.replace(rewrites="none")
        if hindrance is not None:
            return plan.replace(rewrites=self._for_processes(plan, hindrance) or "none")
        if str(plan.layout) not in self._found:
            self._found[str(plan.layout)] = self._ask(plan, most, layouts)
        tuned = self._found[str(plan.layout)]
        fitted = plan.replace(rewrites=tuned.names or "none")
        if tuned.sub_batch and tuned.sub_batch < self._facts.batch_size // plan.data_ways:
            fitted = fitted.replace(sub_batch=tuned.sub_batch, batchnorm="micro")
        return fitted

    def _for_processes(self, plan: Plan, hindrance: str) -> tuple[str, ...]:
        """Of the rewrites those that change no model but how its processes compute: asked for, or found to gain."""
        wanted = self._wanted.rewrites
        allowed = not plan.compile and plan.device in (None, "cpu")
        if isinstance(wanted, tuple):
            refused = [name for name in wanted if not (allowed and registry.exchanges(name))]
            if refused:
                raise PlanError(f"rewrites={'+'.join(refused)} cannot be used: {hindrance}; write rewrites=none.")
            return wanted
        singles = any(spec.dtype == torch.float32 for spec in self._facts.table.parameters)
        if not allowed or not singles or plan.precision == "bf16":
            return ()
        return tuple(name for name, gain in self._processes().items() if gain >= GAIN)

    def _processes(self) -> Mapping[str, float]:
        """How many times as fast processes compute with each of those, on one thread."""
        if self._gains is None:
            self._gains = self._recall("processes")
        if self._gains is None:
            self._gains = self._supervisor.call("processes_gain", timeout_s=_TIMEOUT_S)
            self._remember("processes", dict(self._gains))
        return self._gains

    def _ask(self, plan: Plan, most: int, layouts: int) -> Tuned:
        wanted = self._wanted.rewrites
        names = wanted if isinstance(wanted, tuple) else None
        pieces = (plan.accumulate or 1) * (plan.microbatches or 1)
        samples = max(1, self._facts.batch_size // (max(most, plan.data_ways) * pieces))
        open_sizes = self._wanted.sub_batch is None and self._wanted.batchnorm in (None, "micro")
        sizes = sub_batches(samples) if open_sizes and not self._facts.batchnorm and names is None else ()
        question = Question(
            names=names, forced=names is not None, sub_batches=sizes, layout=str(plan.layout), precision=str(plan.precision),
            samples=samples, seconds=_SECONDS / layouts,
        )  # fmt: skip
        key = f"tuned {sorted(asdict(question).items())} {sorted(registry.all_rewrites())}"
        known = self._recall(key)
        if known is None:
            beat_s = min((found.pass_s / found.samples for found in self._found.values() if found.pass_s), default=None)
            tuned: Tuned = self._supervisor.call("tune", question, beat_s, timeout_s=_TIMEOUT_S)
            self._remember(key, asdict(tuned))
        else:
            findings = tuple(Finding(**entry) for entry in known["findings"])
            tuned = Tuned(tuple(known["names"]), known["sub_batch"], findings, known["samples"], known.get("pass_s"))
        for finding in tuned.findings if names is not None else ():
            if finding.trouble is not None:
                raise PlanError(f"The rewrite {finding.name} {finding.trouble}; leave it out of the plan.")
        return tuned


def uncompilable(plan: Plan) -> str | None:
    """Why no worker can compile its model under a plan."""
    if plan.names_axes and Grid.of(plan).splits_model:
        return "torch.compile takes whole models, and this plan cuts it"
    if plan.recompute not in (None, "none"):
        return f"recompute={plan.recompute} runs the author's blocks again as they are"
    if plan.device not in (None, "cpu"):
        return f"it is for processors, and the plan says device={plan.device}"
    if plan.waits_for_nobody:
        return f"workers with {plan.mode} are not compiled"
    return None


def _hindrance(plan: Plan) -> str | None:
    """Why a model cannot be rewritten under a plan."""
    if Grid.of(plan).splits_model:
        return "they change whole models, and this plan cuts it"
    if plan.compile:
        return "compile=on makes other code of the model already"
    if plan.recompute not in (None, "none"):
        return f"recompute={plan.recompute} runs the author's blocks again as they are"
    return None


def _sentence_of_process(name: str, gain: float) -> str:
    """What a change of how processes compute gains, by itself."""
    return f"{name} ({registry.describe(name)}): {gain:.2f} × as fast where it applies, on one thread."


def _sentence(finding: Finding, tuned: Tuned) -> str:
    """What a change gains, or why it was not made."""
    key, _, _ = finding.name.partition("=")
    what = "samples pass the network so many at a time" if key == "sub_batch" else registry.describe(key)
    said = f"{finding.name} ({what.rstrip('.')})"
    if finding.trouble is not None:
        return f"{said} is not used: it {finding.trouble}."
    if finding.before_s is None or finding.after_s is None:
        return f"{said} was given."
    trains = key not in registry.all_rewrites() or registry.all_rewrites()[key].TRAINS
    where = "" if trains else ", in evaluation"
    used = finding.name in tuned.names or finding.name == f"sub_batch={tuned.sub_batch}"
    times = f"{finding.before_s * 1e3:.2f} → {finding.after_s * 1e3:.2f} ms for {tuned.samples} samples on one thread{where}"
    return f"{said}: {finding.gain:.2f} × as fast ({times})." if used else f"{said} is not used: not faster here ({times})."

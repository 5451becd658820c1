"""One run under way: plan, arena, workers, epochs, checkpoints, and what is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoal.comm.arena import Arena, Note, Order, Signal
from shoal.comm.journal import Journal
from shoal.comm.store import Store
from shoal.errors import JobFailed, LossNotFiniteError
from shoal.job import Job
from shoal.observe.compare import weights_sha256
from shoal.plan import Plan
from shoal.process.interrupts import Interrupts
from shoal.process.supervisor import Supervisor
from shoal.ps.ledger import Ledger
from shoal.train import checkpoint as checkpoints
from shoal.train.api import TrainOptions
from shoal.train.backed_recorder import BackedRecorder
from shoal.train.bundles import Bundles
from shoal.train.carried import begin_at
from shoal.train.choose import choose, predicted_step, remember
from shoal.train.crew import Crew, bind
from shoal.train.driver import Emitter, versions
from shoal.train.evaluate import combine
from shoal.train.memory import MemoryWatch
from shoal.train.metric_state import write_pieces
from shoal.train.pacing import Pacer, PushRecorder, of_bad_loss, of_bad_push
from shoal.train.portions import PortionRecorder
from shoal.train.published import Publication, PushClocks, StepClocks
from shoal.train.push_log import RunLog, wants_log
from shoal.train.recorder import Goal, Recorder
from shoal.train.row_tables import RunTables
from shoal.train.run import SUMMARY, Run
from shoal.train.rundir import RunDirectory
from shoal.train.settings import (
    BadPush,
    CheckpointTrouble,
    EpochPart,
    JobFacts,
    MetricPieces,
    NotFinite,
    ValueNames,
    batch_line,
    portions_of,
    table_of,
)
from shoal.train.setup import job_page, refuse_another_job, run_settings, take_turns
from shoal.train.update_log import LogTrouble

# Writing may take one part in so many of the time.
_CHECKPOINT_COST = 50
_POLL_S = 0.05
# How long to wait until every worker has said which samples it had when the loss became no number.
_ALL_MEET_IT_S = 30.0


class Session:
    """Runs one job in one directory."""

    def __init__(
        self, job: Job, options: TrainOptions, directory: RunDirectory, supervisor: Supervisor, facts: JobFacts,
        emit: Emitter, interrupts: Interrupts,
    ) -> None:  # fmt: skip
        self._job = job
        self._options = options
        self._directory = directory
        self._supervisor = supervisor
        self._facts = facts
        self._emit = emit
        self._interrupts = interrupts
        self._history: list[dict[str, Any]] = []
        self._epochs_done = 0
        self._eval_s = 0.0
        self._stopped_by: str | None = None
        self._parts: dict[int, dict[int, EpochPart]] = {}
        self._not_finite: list[NotFinite] = []
        self._goal = Goal(job.until, job.patience)
        self._last_checkpoint: checkpoints.Checkpoint | None = None
        self._checkpoint_every_s = checkpoints.cadence()
        self._checkpointed_at = time.monotonic()
        self._checkpoint_s = 0.0
        self._checkpoint_bytes = 0
        self._checkpoint_wanted = 0
        self._checkpoint_settled = 0
        self._completing: threading.Thread | None = None
        self._completed: list[Any] = []
        self._memory = MemoryWatch()
        self._bundles = Bundles(job, options, facts, supervisor.call, emit)
        self._predicted_mb: float | None = None
        self._pacer: Pacer | None = None
        self._publication = Publication(job.name, directory.path)
        self._device_memory_mb: float | None = None

    # -- the course of a run -------------------------------------------------------------------------------------

    def run(self, plan: Plan, began: float) -> Run:
        """Choose what the plan leaves open, train, and return the Run."""
        job, facts = self._job, self._facts
        choice = choose(plan, job, facts, self._supervisor, self._options.cluster)
        self._plan, plan, split = choice.plan, choice.plan, choice.split
        self._predicted_s = predicted_step(plan, job, facts)
        self._predicted_mb = None if choice.need is None else round(choice.need.total / 1e6, 1)
        self._settings = run_settings(plan, job, facts, self._options, self._directory.checkpoints, split)
        self._keep_log()
        self._arena = Arena.create(self._settings.layout)
        self._tables = RunTables(facts.tables, self._settings.cold_dir)
        try:
            return self._run_in(began)
        finally:
            self._finish_completing()
            self._supervisor.close()
            self._log.close()
            self._arena.memory.close()
            self._tables.close()
            self._publication.close()
            with contextlib.suppress(OSError):
                self._directory.release([])

    def _run_in(self, began: float) -> Run:
        self._store = Store(self._arena, table_of(self._facts, self._settings.split))
        bind(self._supervisor, self._settings, self._fds, last=True)
        first = self._restore(self._store)
        self._store.spread()
        self._write_beginning(first)
        self._man(first)
        self._interrupts.armed = True
        self._crew.start()
        self._train()
        while self._goes_on():
            self._train()
        self._startup_s = (self._recorder.first_step_at or time.monotonic()) - began
        return self._end(began)

    @property
    def _fds(self) -> tuple[int, ...]:
        return (self._arena.memory.fd, *self._tables.fds)

    def _man(self, first: int) -> None:
        """Make those who work in the arena, and who looks after them and reads what they leave."""
        self._crew = Crew(self._supervisor, self._arena, self._settings, self._emit, self._fds)
        self._recorder: Recorder
        self._pacer = None
        if self._plan.waits_for_nobody:
            pushes = PushRecorder(self._store, self._emit, self._settings, first)
            self._recorder, self._pacer = pushes, Pacer(self._store, self._settings, pushes, first)
        else:
            count = portions_of(self._plan, self._facts)
            common = (self._store, self._emit, self._settings.steps_per_epoch, first)
            if count:
                self._recorder = PortionRecorder(*common, count)
            else:
                self._recorder = (BackedRecorder if self._plan.backup else Recorder)(*common)
        if self._log.kept and self._last_checkpoint is None:
            # What the log is about to say is said of this.
            self._last_one(first)
        self._log.begin(self._recorder, self._arena, first, self._emit)

    def _keep_log(self) -> None:
        """Keep a log of pushes under the plan that there is now, where that is wanted."""
        run = self._directory.path
        self._log = RunLog(run, self._plan, wants_log(self._options.push_log, self._plan, run))
        if self._log.kept:
            self._settings = dataclasses.replace(self._settings, log_dir=str(self._log.directory))

    def _goes_on(self) -> bool:
        """The crew has left: whether another one is there to go on. Not here: see ``shoal.train.elastic``."""
        return False

    def _train(self, goes_on: Callable[[], bool] = lambda: False) -> None:
        """See the crew through to the end, of the run or of its plan; ``goes_on``: says then whether it was the plan's alone."""
        clocks = PushClocks(Ledger(self._arena)) if self._plan.waits_for_nobody else StepClocks(self._arena)
        with self._publication.of(self._store, clocks, self._tables.tables, goes_on):
            self._loop()

    def _restore(self, store: Store) -> int:
        """Fill the arena from the newest checkpoint, if this is a resumed run that has one; the steps it had done."""
        checkpoints.discard_parts(self._directory.checkpoints)
        if not self._options.resume:
            return 0
        damaged: list[tuple[Path, str]] = []
        found = checkpoints.newest(self._directory.checkpoints, damaged, lambda found: self._look_behind(found, store))
        for path, reason in damaged:
            self._emit("checkpoint_damaged", path=str(path), reason=reason)
        if found is None:
            self._log.forget()
            return 0
        refuse_another_job(found, self._job)
        self._last_checkpoint = found
        restored = self._read_checkpoint(found, store)
        self._tables.restore(found.path, found.step)
        found, restored = self._log.roll_forward(found, restored, self._tables, self._settings)
        step = found.step
        self._history = list(found.meta["history"])
        self._epochs_done = int(found.meta["epochs_done"])
        self._tables.begin_at(step)
        begin_at(store, restored, step, self._epochs_done, float(found.meta.get("eval_loss") or 0.0))
        self._checkpoint_settled = step
        return step

    def _look_behind(self, found: checkpoints.Checkpoint, store: Store) -> bool:
        """Whether a log behind a checkpoint has all of its tensors, so that these need not be read."""
        return self._log.look_behind(found, store.table)

    def _read_checkpoint(self, found: checkpoints.Checkpoint, store: Store) -> checkpoints.Restored:
        return checkpoints.restore(found, store, self._log.tensors)

    def _write_beginning(self, first: int) -> None:
        job, plan, facts, directory = self._job, self._plan, self._facts, self._directory
        directory.write("plan.toml", plan.to_toml())
        directory.write_json("job.json", job_page(job, facts, self._options))
        self._emit(
            "run_start", run=str(directory.path), job=job.name, plan=str(plan), world_size=plan.world_size,
            steps_total=self._settings.total_steps, epochs_total=self._options.epochs or job.epochs,
            samples=facts.samples, batch_size=job.batch_size, steps_per_epoch=self._settings.steps_per_epoch,
            resumed_from=first or None, versions=versions(),
        )  # fmt: skip
        self._emit(
            "plan", plan=str(plan), why=list(plan.explanation), batch=batch_line(plan, job, facts),
            predicted_step_s=self._predicted_s,
        )  # fmt: skip
        if crowded := take_turns(plan):
            self._emit("warning", text=crowded)

    # -- while it runs -------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        lockstep = self._settings.wait_for_observer
        recorder, crew = self._recorder, self._crew
        changes = -1
        while not crew.finished:
            if self._supervisor.changes != changes:
                changes = self._supervisor.changes
                self._tell_processes()
            if lockstep and self._pacer is None:
                self._arena.wait_all(Signal.UPDATED, recorder.step + 1, 0.0, _POLL_S)
            longest = recorder.longest_step_s
            messages = crew.poll(0.0 if lockstep else _POLL_S, longest, self._name_last_checkpoint)
            for message in messages:
                self._take(message)
            self._attend()
        recorder.drain()

    def _attend(self) -> None:
        """Do whatever has become due since the last time."""
        self._recorder.drain()
        self._look_for_stop()
        if self._settings.wait_for_observer:
            self._arena.supervisor.post(Order.STEP_SEEN, self._recorder.step)
        self._end_epochs()
        if self._pacer is not None:
            due = time.monotonic() - self._checkpointed_at > self._checkpoint_pause_s()
            self._attend_completing()
            due = due and self._completing is None
            self._pacer.attend(self._rests, self._one_between if due and self._recorder.step else None)
        else:
            self._checkpoint()
        if self._not_finite:
            self._stop_for_loss()
        if self._arena.servers and self._recorder.step:
            self._describe_checkpoints()  # Whoever reads what the servers publish need not wait for a checkpoint.
        if self._recorder.first_step_at is not None:
            self._memory.look(self._processes_here)
        self._tell_troubles()
        self._emit.attend()

    def _tell_troubles(self) -> None:
        for text in self._publication.troubles():
            self._emit("warning", text=text)

    def _take(self, message: Any) -> None:
        if isinstance(message, EpochPart):
            self._parts.setdefault(message.epoch, {})[message.rank] = message
        elif isinstance(message, ValueNames):
            self._recorder.names = self._recorder.names or message.names
        elif isinstance(message, MetricPieces):
            write_pieces(Journal(self._arena, message.rank), message.step, message.pieces)
        elif isinstance(message, NotFinite):
            self._not_finite.append(message)
        elif isinstance(message, BadPush):
            self._reject(message)
        elif isinstance(message, LogTrouble):
            self._log.fail(message, self._emit)
        elif isinstance(message, CheckpointTrouble):
            self._emit("checkpoint_failed", step=message.step, reason=message.reason)

    def _look_for_stop(self) -> None:
        if self._stopped_by is None and (self._interrupts.wanted or self._emit.stop_wanted):
            self._stopped_by = "interrupt" if self._interrupts.wanted else "on_event"
            self._rest_after_step()

    @property
    def _rests(self) -> bool:
        """Whether those at work are to leave after the step."""
        return self._stopped_by is not None

    def _rest_after_step(self) -> None:
        supervisor, step = self._arena.supervisor, self._recorder.step
        # While all wait for the observer of this very step, it can be the last. Replicas must first be averaged.
        all_wait = self._settings.wait_for_observer and supervisor.signal(Order.STEP_SEEN) < step
        if all_wait and (self._settings.plan.local_steps or 1) == 1 and self._pacer is None:
            supervisor.write(Note.STOP_AT, step)
        else:
            supervisor.write(Note.STOP_WANTED, 1)

    def _end_epochs(self) -> None:
        """Close an epoch once every worker has sent its part of it."""
        epoch = self._epochs_done + 1
        parts = self._parts.get(epoch, {})
        if len(parts) < self._arena.world_size or not self._all_evaluated(epoch):
            return
        if not self._log.holds(self._recorder, epoch * self._settings.steps_per_epoch):
            return
        del self._parts[epoch]
        self._recorder.drain(epoch * self._settings.steps_per_epoch)
        ordered: list[Any] = [parts[rank] for rank in sorted(parts)]
        entry = self._recorder.epoch_entry(epoch)
        rate = entry.pop("samples_per_s")
        entry.update(combine([part.training for part in ordered]))
        evaluated = [part.evaluation for part in ordered if part.evaluation is not None]
        entry.update(combine(evaluated, "eval_"))
        entry["samples_per_s"] = rate
        eval_s = max(part.seconds for part in ordered) if evaluated else 0.0
        self._eval_s += eval_s
        beside = {"step": self._recorder.step, "train_s": self._recorder.epoch_train_s, "eval_s": eval_s}
        self._log.keep_epoch(entry, float(entry.get("eval_loss", entry["loss"])), beside)
        self._history.append(entry)
        self._epochs_done = epoch
        self._emit("epoch", **entry, **beside)
        supervisor = self._arena.supervisor
        supervisor.write(Note.EVAL_LOSS, float(entry.get("eval_loss", entry["loss"])))
        reason = self._goal.reached(self._history)
        self._look_for_stop()
        if reason is not None and self._stopped_by is None:
            self._stopped_by = reason
        if self._rests:
            supervisor.write(Note.STOP_EPOCH, epoch)
        elif self._pacer is None:
            self._want_checkpoint()
        elif self._completing is None and time.monotonic() - self._checkpointed_at > self._checkpoint_pause_s():
            self._one_between(self._recorder.step)
        supervisor.post(Order.EPOCH_DONE, epoch)
        if self._pacer is not None and self._rests:
            self._pacer.end(self._recorder.step)

    def _all_evaluated(self, epoch: int) -> bool:
        """Whether everybody knows that its part was sent; whoever dies in between evaluates again, together with its team."""
        return all(slot.signal(Signal.EVALUATED) >= epoch for slot in self._arena.slots)

    def _stop_for_loss(self) -> None:
        """All workers have met the loss that is no number: say where, and what is left."""
        deadline = time.monotonic() + _ALL_MEET_IT_S
        while len({m.rank for m in self._not_finite}) < self._arena.world_size and time.monotonic() < deadline:
            for message in self._crew.poll(_POLL_S, 0.0, self._name_last_checkpoint):
                self._take(message)
        raise LossNotFiniteError(f"{of_bad_loss(self._not_finite)}; {self._name_last_checkpoint()}")

    def _reject(self, push: BadPush) -> None:
        """A push whose gradient is no number was not made."""
        fields, sentence = of_bad_push(push, self._settings)
        for unit in fields:
            self._emit("push_rejected", **unit)
        if not self._settings.skip_bad_pushes:
            raise LossNotFiniteError(f"{sentence}; {self._name_last_checkpoint()}")

    def _processes_here(self) -> list[dict[str, Any]]:
        return self._supervisor.processes()

    def _tell_processes(self) -> None:
        # What only tells must not end a run when the disk is full.
        with contextlib.suppress(OSError):
            self._directory.write_json("processes.json", self._supervisor.processes())

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _want_checkpoint(self) -> None:
        """Ask the workers to write one at the next step, unless the last one is hardly over, or not over at all."""
        due = self._checkpoint_pause_s()
        if self._completing is None and not self._being_written() and time.monotonic() - self._checkpointed_at > due:
            checkpoints.discard_parts(self._directory.checkpoints)
            self._checkpoint_wanted += 1
            self._checkpointed_at = time.monotonic()
            self._arena.supervisor.write(Note.CHECKPOINT_WANTED, self._checkpoint_wanted)

    def _checkpoint_pause_s(self) -> float:
        """How long after the last one another may be made."""
        every_s = self._checkpoint_every_s
        if every_s and self._log.is_long(self._checkpoint_bytes):
            return 0.0
        return max(every_s if self._last_checkpoint else 0.0, _CHECKPOINT_COST * self._checkpoint_s if every_s else 0.0)

    def _checkpoint(self) -> None:
        """See to it that checkpoints are made and completed."""
        self._attend_completing()
        if self._completing is not None:
            return
        if not self._being_written() and time.monotonic() - self._checkpointed_at > self._checkpoint_every_s:
            self._want_checkpoint()

    def _being_written(self) -> bool:
        """Whether workers have yet to write the one that they were asked for; a whole one goes on to be completed."""
        leader = self._arena.leader
        if leader.note(Note.CHECKPOINT_SEEN) < self._checkpoint_wanted:
            return True
        step = int(leader.note(Note.CHECKPOINT_AT))
        if step <= self._checkpoint_settled:
            return False
        # Looked at first: who has finished that step has written its part or never will.
        over = self._recorder.committed() > step
        if all(int(slot.note(Note.CHECKPOINT_DONE)) == step for slot in self._arena.updaters):
            self._checkpoint_settled = step
            self._start_completing(step)
            return True
        if over:
            self._checkpoint_settled = step
            self._make_room()
        return not over

    def _make_room(self) -> None:
        """A checkpoint has failed, most likely because the disk is full: keep the last good one only."""
        checkpoints.discard_parts(self._directory.checkpoints)
        checkpoints.prune(self._directory.checkpoints, 1)

    def _meta(self) -> dict[str, Any]:
        return {
            "job": self._job.name, "plan": str(self._plan), "epochs_done": self._epochs_done,
            "history": list(self._history), "eval_loss": self._arena.supervisor.note(Note.EVAL_LOSS),
            "batch_size": self._job.batch_size, "seed": self._job.seed,
        }  # fmt: skip

    def _start_completing(self, step: int, began: float | None = None) -> None:
        meta = self._meta()
        began = time.monotonic() if began is None else began
        done = step // self._settings.steps_per_epoch
        meta["history"], meta["epochs_done"] = meta["history"][:done], min(done, meta["epochs_done"])
        if meta["history"]:
            # The run may have come to the end of another epoch since.
            last = meta["history"][-1]
            meta["eval_loss"] = float(last.get("eval_loss", last["loss"]))

        def work() -> None:
            try:
                self._completed.append(
                    (checkpoints.complete(self._directory.checkpoints, step, meta), time.monotonic() - began)
                )
            except OSError as error:
                self._completed.append((step, error.strerror or str(error)))

        self._completing = threading.Thread(target=work, name="shoal-checkpoint", daemon=True)
        self._completing.start()

    def _attend_completing(self) -> None:
        if self._completing is not None and not self._completing.is_alive():
            self._finish_completing()

    def _finish_completing(self) -> None:
        if self._completing is None:
            return
        self._completing.join()
        self._completing = None
        result, detail = self._completed.pop()
        if isinstance(result, checkpoints.Checkpoint):
            self._last_checkpoint = result
            self._checkpoint_s = detail
            self._tell_checkpoint(result)
            self._describe_checkpoints()
        else:
            self._checkpoint_failed(result, detail)

    def _checkpoint_failed(self, step: int, reason: str) -> None:
        self._make_room()
        self._emit("checkpoint_failed", step=step, reason=reason)

    def _tell_checkpoint(self, found: checkpoints.Checkpoint) -> None:
        self._checkpoint_bytes = sum(f.stat().st_size for f in found.path.iterdir())
        self._emit(
            "checkpoint", step=found.step, path=str(found.path), bytes=self._checkpoint_bytes, write_s=self._checkpoint_s,
        )  # fmt: skip
        self._log.checkpointed(found)

    def _describe_checkpoints(self) -> None:
        self._bundles.describe(self._directory.checkpoints)

    def _last_one(self, step: int) -> None:
        """The checkpoint of the run's end, the workers have gone; or one while they rest."""
        self._checkpointed_at = time.monotonic()
        self._finish_completing()
        if (step == 0 and not self._log.kept) or (self._last_checkpoint is not None and self._last_checkpoint.step == step):
            return
        self._publication.settle()
        began = time.monotonic()
        try:
            self._write_alone(step)
            found = checkpoints.complete(self._directory.checkpoints, step, self._meta())
        except OSError as error:
            self._checkpoint_failed(step, error.strerror or str(error))
            return
        self._last_checkpoint = found
        self._checkpoint_s = time.monotonic() - began
        self._tell_checkpoint(found)

    def _one_between(self, step: int) -> None:
        """A checkpoint of workers that wait for nobody: they rest while it is written, not while it is hashed and synced."""
        if self._log.kept:
            # What the log is about to say is said of a whole one.
            self._last_one(step)
            return
        self._checkpointed_at = time.monotonic()
        if self._last_checkpoint is not None and self._last_checkpoint.step == step:
            return
        self._publication.settle()
        began = time.monotonic()
        try:
            self._write_alone(step)
        except OSError as error:
            self._checkpoint_failed(step, error.strerror or str(error))
            return
        self._start_completing(step, began)

    def _write_alone(self, step: int) -> None:
        """Write all parts of a checkpoint; OSError where there is no room."""
        checkpoints.discard_parts(self._directory.checkpoints)
        self._write_last(step)
        self._tables.write(checkpoints.part_path(self._directory.checkpoints, step))

    def _write_last(self, step: int) -> None:
        marks = self._pacer.marks() if self._pacer is not None else None
        checkpoints.PartWriter(self._store, self._directory.checkpoints, step, marks=marks).write_all()

    def _final_state(self, step: int) -> dict[str, torch.Tensor]:
        """The whole state_dict that the run has come to."""
        return {**self._store.state_dict(step % 2), **self._tables.state()}

    def _name_last_checkpoint(self) -> str:
        # One that every worker has written, and that is only being synced or not even looked at, counts.
        if self._pacer is None:
            self._being_written()
        self._finish_completing()
        if self._last_checkpoint is None:
            return "there is no checkpoint yet."
        return f"the last good checkpoint is {self._last_checkpoint.path}."

    # -- the end -------------------------------------------------------------------------------------------------

    def _end(self, began: float) -> Run:
        recorder, directory = self._recorder, self._directory
        step = recorder.step
        complete = step >= self._settings.total_steps or self._stopped_by in ("until", "patience")
        reason = self._stopped_by
        if reason is None and self._options.steps is not None and step % self._settings.steps_per_epoch:
            reason = "steps"
        if reason is not None and (not complete or reason != "interrupt"):
            self._emit("stop", step=step, reason=reason)
        if step % self._settings.steps_per_epoch and step > self._epochs_done * self._settings.steps_per_epoch:
            self._history.append(recorder.epoch_entry(step // self._settings.steps_per_epoch + 1, partial=True))
        history = self._history
        self._history = [entry for entry in history if not entry.get("partial")]
        self._last_one(step)
        state = self._final_state(step)
        self._bundles.write(directory.model, state, step, history)
        digest = weights_sha256(state)
        if recorder.step_s is not None and len(recorder.step_times_s) >= 20:
            remember(self._plan, self._job, self._facts, {"step_s": recorder.step_s})
        summary = {
            "run": str(directory.path), "job": self._job.name, "plan": str(self._plan),
            "world_size": self._plan.world_size, "steps": step, "epochs": history,
            "final": history[-1] if history else None, "samples_per_s": recorder.samples_per_s,
            "step_s": recorder.step_s, "predicted_step_s": self._predicted_s,
            "peak_rss_mb": self._memory.peak_rss_mb, "pss_mb": self._memory.pss_mb,
            "device_memory_mb": self._device_memory_mb, "memory_mb": self._memory.largest_worker_mb,
            "predicted_memory_mb": self._predicted_mb,
            "startup_s": self._startup_s, "eval_s": self._eval_s, "wall_s": time.monotonic() - began,
            **recorder.told(),
            "weights_sha256": digest, "stopped_by": self._stopped_by if self._stopped_by != "interrupt" or not complete else None,
        }  # fmt: skip
        try:
            directory.write_json(SUMMARY, summary)
        except OSError as error:
            raise JobFailed(
                f"The summary could not be written to {directory.path} ({error.strerror}); make room and go on with --resume."
            ) from None
        self._emit(
            "run_end", status="done" if complete or reason == "steps" else "stopped", steps=step,
            epochs=self._epochs_done, samples_per_s=summary["samples_per_s"], step_s=summary["step_s"],
            predicted_step_s=self._predicted_s, memory_mb=summary["memory_mb"],
            predicted_memory_mb=self._predicted_mb, startup_s=self._startup_s, eval_s=self._eval_s,
            wall_s=summary["wall_s"], model=str(directory.model), weights_sha256=digest,
        )  # fmt: skip
        return Run(directory.path, summary, self._job)

"""A run whose plan can change while it runs: workers and servers come and go, the work stays.

At the end of a step everybody leaves, as when a run is stopped; what the run has come to is carried over in memory into an arena
that fits the new plan, and others go on behind that step, forked from the same template: data and job are there already. So a
change costs no more than a few forks and a copy of the weights, and computes what a resume under that plan would.

The memory for it is reserved while the old plan still runs. What makes no sense, or does not fit, is refused then, and the run
does not notice. ``ChangingSession`` is what of this has nothing to do with an arena: without shared memory
``shoal.train.remote.elastic`` makes the change.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.comm.arena import Arena, Note
from shoal.comm.store import Store
from shoal.errors import JobFailed, RequestError
from shoal.plan import Plan
from shoal.process.supervisor import TemplateLost
from shoal.train.carried import Carried, begin_at
from shoal.train.choose import predicted_step, split_of
from shoal.train.crew import MOST_TEMPLATES, bind
from shoal.train.orders import Inbox
from shoal.train.push_log import wants_log
from shoal.train.replan import TOO_LATE, Change, Replanner, complete
from shoal.train.run import Run
from shoal.train.session import Session
from shoal.train.settings import RunSettings, layout_of, table_of
from shoal.train.setup import run_settings
from shoal.train.split import Split


@dataclass
class Pause:
    """A change under way: from the end of the last step under the old plan until all processes of the new one are at work.

    ``refused``: why it could not be made; ``moved``: what the event says of keys that went from server to server.
    """

    change: Change
    before: Plan
    step: int
    since: float
    refused: str | None = None
    moved: Mapping[str, int] = field(default_factory=dict)


class ChangingSession(Session):
    """Hears which plan is wanted, lets everybody rest after a step, and says when the run has it: for sessions of any kind."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._replanner = Replanner(Inbox(self._directory.path), self._change_to)
        self._change: Change | None = None
        self._pause: Pause | None = None

    def _change_to(self, asked: Plan) -> tuple[Plan, Arena | None]:
        """The whole plan that is meant, and the memory for it. RequestError where it makes no sense, or there is none."""
        raise NotImplementedError

    def _all_there(self) -> bool:
        """Whether all who belong to the plan are at work."""
        raise NotImplementedError

    def _make(self, change: Change) -> None:
        """Go on under another plan, behind the step that the run is at."""
        raise NotImplementedError

    # -- hearing of it -------------------------------------------------------------------------------------------

    @property
    def _rests(self) -> bool:
        return super()._rests or self._change is not None

    @property
    def _may_change(self) -> bool:
        """Whether a change can be thought of now."""
        return not self._rests and self._pause is None

    def _attend(self) -> None:
        if self._pause is not None and self._all_there():
            self._tell()
        super()._attend()

    def _look_for_stop(self) -> None:
        super()._look_for_stop()
        if not self._may_change:
            return
        wished, self._emit.plan_wanted = self._emit.plan_wanted, None
        self._change = self._replanner.next(wished, self._warn)
        if self._change is not None:
            self._rest_after_step()

    def _warn(self, sentence: str) -> None:
        self._emit("warning", text=f"The plan was not changed: {sentence}")

    def _hear_no_more(self) -> None:
        """The run is over: whoever still wants another plan is told so."""
        if self._change is not None:
            self._change.give_up(TOO_LATE)
        self._replanner.inbox.close(TOO_LATE)

    # -- making it -----------------------------------------------------------------------------------------------

    def _train(self, goes_on: Callable[[], bool] | None = None) -> None:
        super()._train(goes_on or self._will_go_on)

    def _will_go_on(self) -> bool:
        return self._change is not None and self._stopped_by is None and self._recorder.step < self._settings.total_steps

    def _goes_on(self) -> bool:
        if self._pause is not None:
            self._tell()
        change = self._change
        if change is None or not self._will_go_on():
            return False
        self._change = None
        self._make(change)
        with contextlib.suppress(OSError):
            # On a full disk, a run that is resumed has the plan that it had before.
            self._directory.write("plan.toml", self._plan.to_toml())
        return True

    def _tell(self) -> None:
        """All are at work again: say so."""
        pause, self._pause = self._pause, None
        assert pause is not None
        if pause.refused is not None:
            self._warn(pause.refused)
            pause.change.answer(error=pause.refused)
            return
        plan = self._plan
        told = {
            "step": pause.step, "before": str(pause.before), "plan": str(plan), "pause_s": time.monotonic() - pause.since,
            **pause.moved,
        }  # fmt: skip
        self._emit("replan", **told, world_size=plan.world_size, by=pause.change.by, why=list(plan.explanation))
        pause.change.answer(run=str(self._directory.path), **told)


class ElasticSession(ChangingSession):
    """Runs one job in one directory, under one plan after the other."""

    def run(self, plan: Plan, began: float) -> Run:
        try:
            return super().run(plan, began)
        finally:
            self._hear_no_more()

    def _all_there(self) -> bool:
        return self._crew.begun

    def _change_to(self, asked: Plan) -> tuple[Plan, Arena | None]:
        cluster = self._options.cluster
        plan, split = complete(asked, self._plan, self._job, self._facts, self._supervisor, cluster)
        if self._log.kept:
            # It cannot be kept under every plan.
            wants_log(True, plan, self._directory.path)
        if self._settings.split is not None:
            # How it divides the model is found out when there is a template again that has the whole of it.
            return plan, None
        return plan, Arena.create(layout_of(plan, self._facts, split))

    def _make(self, change: Change) -> None:
        if self._pacer is None:
            # What they have written of a checkpoint is whole.
            self._being_written()
        self._finish_completing()
        step = self._recorder.step
        self._pause = Pause(change, self._plan, step, self._recorder.last_end or time.monotonic())
        carried = self._carry(step)
        try:
            self._supervisor.dismiss()
            if self._settings.split is not None:
                self._renew_template()
            self._hand_over(change, carried)
        finally:
            carried.release()
        self._crew.start()

    def _carry(self, step: int) -> Carried:
        try:
            return Carried(self._store, step, self._pacer.marks() if self._pacer is not None else None)
        except OSError as error:
            self._last_one(step)
            raise JobFailed(
                f"There is no memory to carry the model over to another plan ({error.strerror}); go on with --resume --plan "
                f"instead; {self._name_last_checkpoint()}"
            ) from None

    def _hand_over(self, change: Change, carried: Carried) -> None:
        """Take up another plan; the one that was where that turns out not to be possible."""
        pause, before = self._pause, self._plan
        assert pause is not None
        try:
            self._take_up(change.plan, carried, pause.step, change.arena)
        except RequestError as error:
            pause.refused = str(error)
            self._take_up(before, carried, pause.step, None)

    def _take_up(self, plan: Plan, carried: Carried, step: int, reserved: Arena | None) -> None:
        split = self._split(plan)
        settings = self._settings_of(plan, split)
        arena = reserved or Arena.create(settings.layout)
        # Nothing is asked of the machine from here on.
        left, recorder, eval_loss = self._arena, self._recorder, self._arena.supervisor.note(Note.EVAL_LOSS)
        self._plan, self._settings, self._arena = plan, settings, arena
        self._store = Store(arena, table_of(self._facts, split))
        left.memory.close()
        self._log.close()
        self._keep_log()
        bind(self._supervisor, self._settings, self._fds, last=True, write=False)
        begin_at(self._store, carried.restore(self._store), step, self._epochs_done, eval_loss)
        self._tables.begin_at(step)
        self._store.spread()
        self._checkpoint_wanted, self._checkpoint_settled = 0, step
        self._predicted_s, self._predicted_mb = predicted_step(plan, self._job, self._facts), None
        self._man(step)
        self._recorder.go_on_from(recorder)

    def _settings_of(self, plan: Plan, split: Split | None) -> RunSettings:
        return run_settings(plan, self._job, self._facts, self._options, self._directory.checkpoints, split)

    def _split(self, plan: Plan) -> Split | None:
        """How a plan divides the model; a killed template is made again."""
        for _ in range(MOST_TEMPLATES):
            try:
                return split_of(plan, self._supervisor)
            except TemplateLost:
                self._renew_template()
        return split_of(plan, self._supervisor)

    def _renew_template(self) -> None:
        for attempt in range(MOST_TEMPLATES):
            try:
                self._supervisor.restart(timeout_s=600.0)
                return
            except TemplateLost:
                if attempt == MOST_TEMPLATES - 1:
                    raise

"""``shoal train``: train a job and show it."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.answer import Answer
from shoal.cli.options import (
    ClusterOption,
    DataOption,
    JsonFlag,
    MemoryOption,
    PlanOption,
    SeedOption,
    SetOption,
    TargetArgument,
    at_least_one,
    find_cluster,
    find_target,
    parse_plan,
    settings,
)

if TYPE_CHECKING:
    from shoal.observe.progress import Display

PICTURE = "learning_curve.png"

_Epochs = Annotated[int | None, typer.Option("--epochs", metavar="N", help="Epochs in all, also after a resume.")]
_Steps = Annotated[int | None, typer.Option("--steps", metavar="N", help="Steps in all, also after a resume.")]
_Run = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The run directory; left out: runs/JOB-TIME.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")]
_TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write event files for TensorBoard.")]
_SkipBadPushes = Annotated[
    bool, typer.Option("--skip-bad-pushes", help="With servers (ps): go on without gradients that are no numbers.")
]
_PushLog = Annotated[
    bool | None,
    typer.Option("--push-log/--no-push-log", help="With servers (ps): acknowledge a push when it is in a log on disk."),
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Show nothing but warnings and errors; draw no picture.")]


def train(
    target: TargetArgument,
    plan: PlanOption = None,
    epochs: _Epochs = None,
    steps: _Steps = None,
    set: SetOption = None,
    seed: SeedOption = None,
    data: DataOption = None,
    cluster: ClusterOption = None,
    memory_limit: MemoryOption = None,
    run: _Run = None,
    resume: _Resume = False,
    tensorboard: _TensorBoard = False,
    skip_bad_pushes: _SkipBadPushes = False,
    push_log: _PushLog = None,
    json: JsonFlag = False,
    quiet: _Quiet = False,
) -> Answer:
    """Train a job.

    Ctrl-C finishes the step, saves, and says how to go on; a second Ctrl-C leaves at once.
    """
    at_least_one("--epochs", epochs)
    at_least_one("--steps", steps)
    wanted = parse_plan(plan)
    from shoal.comm.member import Member, shares_memory
    from shoal.observe.progress import Display
    from shoal.train.api import TrainOptions, start_supervisor, train_target

    # The supervisor's template imports torch while this process imports the job.
    # Where workers share no memory there is no template; of several processes that were started together, one shows.
    member = Member.of(os.environ)
    quiet = quiet or (member is not None and member.rank > 0)
    alone = member is None and shares_memory(os.environ)
    with contextlib.ExitStack() as stack:
        supervisor = stack.enter_context(contextlib.closing(start_supervisor())) if alone else None
        display = stack.enter_context(Display())
        job = find_target(target, set, seed, data)
        machines = find_cluster(cluster, memory_limit)
        options = TrainOptions(
            plan=wanted, run_dir=run, resume=resume, epochs=epochs, steps=steps, cluster=machines, tensorboard=tensorboard,
            skip_bad_pushes=skip_bad_pushes, push_log=push_log,
            changes=settings(set or (), seed),
        )  # fmt: skip
        observer = _Quieted(display) if quiet else _with_resume_command(display, target, set, seed, data)
        trained = train_target(job, options, [observer], supervisor)
        if not quiet:
            if not display.run_ended:
                _tell_finished(display, trained)
            _draw(display, trained)
        return Answer(trained.summary())


class _Quieted:
    """Shows only what a person must know."""

    KINDS = frozenset({"warning", "death", "recovered", "stall", "checkpoint_failed", "checkpoint_damaged"})

    def __init__(self, display: Display) -> None:
        self._display = display

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] in self.KINDS:
            self._display(event)


def _with_resume_command(
    display: Display, target: str, pairs: list[str] | None, seed: int | None, data: Path | None
) -> Callable[[dict[str, Any]], None]:
    """Tell the display, as soon as the run has a directory, which command goes on with it."""
    changes = [word for pair in pairs or () for word in ("--set", pair)]
    changes += ["--seed", str(seed)] if seed is not None else []
    changes += ["--data", str(data)] if data is not None else []

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "run_start":
            words = ["shoal", "train", target, *changes, "--run", str(event["run"]), "--resume"]
            display.resume_command = shlex.join(words)
        display(event)

    return observe


def _tell_finished(display: Display, trained: Any) -> None:
    """A resumed run that had nothing left to do has no events: its result is shown from what it left."""
    from shoal.observe.lines import epoch_values, number

    display.say(f"{trained.path} is finished already; raise --epochs or --steps to train it further.")
    final: Mapping[str, Any] = trained.history[-1] if trained.history else {}
    values = "  ".join(f"{name} {number(value)}" for name, value in epoch_values(final).items())
    if values:
        display.say(f"epoch {final.get('epoch')}  {values}")


def _draw(display: Display, trained: Any) -> None:
    from shoal.observe.figure import learning_curve, staleness_histogram

    if not trained.history:
        return
    picture = Path(trained.path) / PICTURE
    job = trained.summary().get("job") or Path(trained.path).name
    try:
        learning_curve(trained.history, picture, job=str(job), plan=str(trained.plan))
        if trained.summary().get("staleness"):
            beside = picture.with_name("staleness.png")
            staleness_histogram(trained.summary()["staleness"], beside, plan=str(trained.plan.brief()))
    except (OSError, ImportError) as error:
        # The run is done and saved: a picture that cannot be drawn must not make it look failed.
        display.say(f"warning: the learning curve was not drawn ({error})")
        return
    display.picture(picture)

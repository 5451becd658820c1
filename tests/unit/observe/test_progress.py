from __future__ import annotations

import io
from typing import Any

from shoal.observe.progress import Display


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """Counts how often something is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes += bool(text)
        return super().write(text)


START = {
    "kind": "run_start", "run": "runs/x", "job": "net", "world_size": 2, "steps_total": 1000, "epochs_total": 10,
    "samples": 10_000, "batch_size": 100, "steps_per_epoch": 100, "resumed_from": None,
}  # fmt: skip
PLAN = {"kind": "plan", "plan": "dp=2,threads=1", "why": ["two cores"], "batch": "global 100 = 2 × 50"}
END = {
    "kind": "run_end", "status": "done", "steps": 1000, "epochs": 10, "samples_per_s": 7000.0, "step_s": 0.014,
    "predicted_step_s": None, "startup_s": 2.0, "eval_s": 1.0, "wall_s": 17.0, "model": "runs/x/model",
}  # fmt: skip


def step(number: int, **more: Any) -> dict[str, Any]:
    values = {"kind": "step", "step": number, "epoch": (number - 1) // 100 + 1, "loss": 2.0, "loss_mean": 1.5}
    return {**values, "metrics": {"accuracy": 0.25, "auc": 0.75}, "samples": 100, "step_s": 0.01, **more}


def epoch(number: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "epoch",
        "epoch": number,
        "loss": 1.5,
        "eval_loss": 1.25,
        "step": number * 100,
        "eval_s": 2.0,
        **more,
    }


def test_without_a_terminal_there_are_plain_lines_and_no_bar() -> None:
    stream = io.StringIO()
    display = Display(stream, clock=Clock())
    for event in (START, PLAN, *(step(n) for n in range(1, 101)), epoch(1), END):
        display(event)
    display.picture("runs/x/learning_curve.png")
    assert stream.getvalue().splitlines() == [
        "net: 10,000 samples, global batch 100, 10 epochs of 100 steps, 2 workers",
        "run: runs/x",
        "plan: dp=2,threads=1",
        "  two cores",
        "batch: global 100 = 2 × 50",
        "epoch  1/10  loss 1.5000  eval_loss 1.2500",
        "done: 1,000 steps, 10 epochs in 17.0 s (start-up 2.0 s, evaluation 1.0 s), 7,000 samples/s",
        "step time: predicted — (nothing to predict from yet), measured 14 ms",
        "model: runs/x/model",
        "picture: runs/x/learning_curve.png",
    ]
    assert display.run_ended


def test_on_a_terminal_the_bar_shows_loss_first_metric_speed_and_time_left() -> None:
    stream, clock = Terminal(), Clock()
    with Display(stream, clock=clock, width=120) as display:
        display(START)
        for number in range(1, 51):
            clock.now += 0.02
            display(step(number, step_s=0.02 if number == 1 else 0.01))
    shown = stream.getvalue()
    assert "epoch 1/10" in shown and "loss 1.5000" in shown and "accuracy 0.2500" in shown and "auc" not in shown
    assert "5,000 samples/s" in shown  # 100 samples in 0.02 s by the clock, not by step_s
    assert "0:19 left" in shown  # 950 steps of 0.02 s


def test_time_left_counts_the_evaluations_to_come_and_speed_leaves_them_out() -> None:
    stream, clock = Terminal(), Clock()
    with Display(stream, clock=clock, width=120) as display:
        display(START)
        for number in range(1, 101):
            clock.now += 0.02
            display(step(number, step_s=0.02))
        clock.now += 2.0
        display(epoch(1))
        seen = len(stream.getvalue())
        for number in range(101, 112):
            clock.now += 0.02
            display(step(number, step_s=0.02))
    shown = stream.getvalue()[seen:]
    assert "5,000 samples/s" in shown
    assert "0:36 left" in shown  # some 890 steps of 0.02 s and nine evaluations of 2 s


def test_the_bar_is_drawn_at_most_ten_times_a_second() -> None:
    stream, clock = Terminal(), Clock()
    with Display(stream, clock=clock, width=100) as display:
        display(START)
        display(step(1))
        before, drawn = stream.writes, 0
        for number in range(2, 1002):
            clock.now += 0.001
            display(step(number % 100 + 1))
            drawn += stream.writes > before
            before = stream.writes
    assert 8 <= drawn <= 10


def test_a_stopped_run_says_how_to_go_on_and_a_metric_may_hold_brackets() -> None:
    stream = io.StringIO()
    display = Display(stream, resume_command="shoal train net --run runs/x --resume")
    display(START)
    display(epoch(1, **{"[bold]": 0.5}))
    display({**END, "status": "stopped", "model": None})
    assert "[bold] 0.5000" in stream.getvalue()
    assert stream.getvalue().splitlines()[-1] == "go on with: shoal train net --run runs/x --resume"


def test_a_long_line_is_not_cut() -> None:
    stream = io.StringIO()
    Display(stream, width=40)({"kind": "warning", "text": "word " * 50 + "end"})
    assert stream.getvalue() == "warning: " + "word " * 50 + "end\n"

from __future__ import annotations

import pytest

from shoal.observe.events import KINDS
from shoal.observe.lines import describe, duration, number, predicted_beside_measured, rate, step_time


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5000"),
        (1.23456, "1.2346"),
        (0.0, "0.0000"),
        (0.00001234, "1.234e-05"),
        (123456.0, "1.235e+05"),
        (None, "—"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_times_and_rates() -> None:
    assert [duration(s) for s in (0.4, 41, 61, 3723, -1)] == ["0:00", "0:41", "1:01", "1:02:03", "0:00"]
    assert [step_time(s) for s in (0.0142, 2.5, None)] == ["14.2 ms", "2.5 s", "—"]
    assert [rate(s) for s in (6912.3, 12.34, None)] == ["6,912", "12.3", "—"]


def test_predicted_stands_beside_measured_also_where_nothing_was_predicted() -> None:
    assert predicted_beside_measured(0.010, 0.0112) == "step time: predicted 10 ms, measured 11.2 ms (+12 %)"
    assert (
        predicted_beside_measured(None, 0.0112)
        == "step time: predicted — (nothing to predict from yet), measured 11.2 ms"
    )


def test_a_death_and_a_recovery_are_one_line_each() -> None:
    death = {"kind": "death", "rank": 1, "pid": 77, "step": 12, "phase": "backward", "cause": "SIGKILL"}
    assert describe(death) == ["worker 1 (pid 77) died in step 12 (backward): SIGKILL"]
    back = {"kind": "recovered", "rank": 1, "pid": 80, "step": 12, "after_s": 0.412, "action": "rolled_forward"}
    assert describe(back) == ["worker 1 is back (pid 80) in step 12 after 0.41 s: the step was rolled forward"]


def test_a_change_of_plan_is_one_line_and_says_how_many_keys_moved() -> None:
    change = {"kind": "replan", "step": 4, "before": "ps=1,workers=2", "plan": "ps=2,workers=3", "pause_s": 0.412}
    line = "plan changed after step 4: ps=1,workers=2 → ps=2,workers=3 (pause 0.41 s)"
    assert describe(change) == [line]
    assert describe({**change, "keys_moved": 38, "keys": 68}) == [line + "; 38 of 68 keys moved"]


def test_a_stall_names_the_worker_what_it_waits_for_and_where_it_stands() -> None:
    stall = {
        "kind": "stall", "rank": 0, "pid": 5, "step": 3, "phase": "data", "waited_s": 4.0, "waits_for": "its data set",
        "stack": "File a.py, line 1\n  read()", "replaced_after_s": 30.0,
    }  # fmt: skip
    first, *stack = describe(stall)
    assert first == (
        "worker 0 (pid 5) has not answered for 4.0 s in step 3 (data); it waits for its data set;"
        " it is replaced after 30 s"
    )
    assert stack == ["    File a.py, line 1", "      read()"]


def test_an_epoch_line_has_the_names_of_the_history() -> None:
    epoch = {
        "kind": "epoch", "t": 1.0, "epoch": 2, "loss": 1.25, "accuracy": 0.5, "eval_loss": 1.5, "eval_accuracy": 0.4,
        "samples_per_s": 7000.0, "step": 20, "train_s": 3.0, "eval_s": 1.0,
    }  # fmt: skip
    assert describe(epoch) == [
        "epoch 2  loss 1.2500  accuracy 0.5000  eval_loss 1.5000  eval_accuracy 0.4000  7,000 samples/s"
    ]
    assert describe({"kind": "epoch", "epoch": 3, "loss": 1.0, "partial": True}) == [
        "epoch 3 (part of it)  loss 1.0000"
    ]


def test_every_kind_can_be_described_with_all_its_fields_missing() -> None:
    for kind in KINDS:
        assert all(isinstance(line, str) for line in describe({"kind": kind}))
    assert describe({"kind": "error", "sentence": "said once, by whoever catches it"}) == []

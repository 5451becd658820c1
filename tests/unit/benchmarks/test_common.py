"""The benchmarks' runner: peers in turn, failures named, results kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import common
from benchmarks.common import Group, Peer, PeerFailed, Result


def quiet(_: str) -> None:
    pass


def test_peers_run_in_turn_every_second_round_in_reverse() -> None:
    calls: list[str] = []

    def peer(name: str) -> Peer:
        def measure() -> dict[str, float]:
            calls.append(name)
            return {"speed": len(calls)}

        return Peer(name=name, measure=measure)

    results = common.alternate([peer("a"), peer("b")], 3, "speed", quiet)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert results["a"].values == [1.0, 4.0, 5.0]
    assert results["a"].median == 4.0


def test_rounds_beyond_the_limit_are_left_out() -> None:
    said: list[str] = []
    peer = Peer(name="a", measure=lambda: {"speed": 1.0})
    assert common.alternate([peer], 3, "speed", said.append, limit_s=0.0)["a"].values == [1.0]
    assert said[-1].endswith("no time for round 2/3")
    assert len(common.alternate([peer], 3, "speed", quiet, limit_s=60.0)["a"].values) == 3


def test_command_answers_with_its_last_line() -> None:
    code = "print('warming up'); print('{\"speed\": 3}')"
    results = common.alternate([Peer(name="a", measure=[sys.executable, "-c", code])], 1, "speed", quiet)
    assert results["a"].values == [3.0]


def test_failed_peer_is_named_and_left_out_of_later_rounds() -> None:
    tries: list[int] = []

    def broken() -> dict[str, float]:
        tries.append(1)
        raise PeerFailed("no luck")

    peers = [
        Peer(name="broken", measure=broken),
        Peer(name="mute", measure=dict),
        Peer(name="well", measure=lambda: {"speed": 2}),
    ]
    results = common.alternate(peers, 3, "speed", quiet)
    assert len(tries) == 1
    assert (results["broken"].error, results["mute"].error) == ("no luck", "speed is missing")
    assert results["well"].values == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('all wrong')", "exit code 1: all wrong"),
        ("pass", "exit code 0"),
        ("print('not json')", "no JSON object"),
        ("print(3)", "no JSON object"),
    ],
)
def test_commands_that_fail(code: str, said: str) -> None:
    with pytest.raises(PeerFailed, match=said):
        common.run_json([sys.executable, "-c", code])


def test_command_that_takes_too_long() -> None:
    with pytest.raises(PeerFailed, match="timed out"):
        common.run_json([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.2)


def test_reference_is_the_best_of_those_named() -> None:
    results = {name: Result(name, [speed]) for name, speed in (("a", 1.0), ("b", 3.0), ("shoal", 9.0))}
    results["c"] = Result("c", error="failed")
    more = Group(title="t", results=results, references=["a", "b", "c"])
    less = Group(title="t", results=results, references=["a", "b", "c"], less_is_better=True)
    assert more.reference() is results["b"]
    assert less.reference() is results["a"]
    assert Group(title="t", results=results, references=["c"]).reference() is None


def test_report_writes_a_line_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    results = {"a": Result("a", [100.0, 300.0, 200.0]), "shoal": Result("shoal", [500.0])}
    group = Group(title="a job", results=results, references=["a"])
    machine = common.hardware()
    assert common.report("trial", [group], "samples/s", {"repeats": 3}, machine)
    line = json.loads((tmp_path / "trial.jsonl").read_text())
    assert line["groups"][0]["reference"] == "a"
    first = {key: line["groups"][0]["results"][0][key] for key in ("median", "min", "max")}
    assert first == {"median": 200.0, "min": 100.0, "max": 300.0}
    assert line["hardware"]["cores"] >= 1
    assert (tmp_path / "trial.png").read_bytes().startswith(b"\x89PNG")
    assert "2.50" in capsys.readouterr().out


def test_report_tells_of_a_failed_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    group = Group(title="a job", results={"a": Result("a", error="no luck")}, references=["a"])
    assert not common.report("trial", [group], "samples/s", {}, common.hardware())
    assert "a failed: no luck" in capsys.readouterr().out


_LEAVES_NOBODY = """
import subprocess, sys, time
from benchmarks import common

common.leave_on_sigterm()
# A server whose worker has a session of its own, and who is deaf to SIGTERM.
code = '''
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(worker.pid, flush=True)
time.sleep(600)
'''
server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
with common.ended(server, leave_s=0.1):
    print(server.pid, server.stdout.readline().strip(), flush=True)
    time.sleep(600)
"""


def test_a_benchmark_that_is_told_to_leave_leaves_nobody_behind() -> None:
    command = [sys.executable, "-c", _LEAVES_NOBODY]
    with subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        pids = [int(pid) for pid in benchmark.stdout.readline().split()]
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
        benchmark.terminate()
        assert benchmark.wait(60) == 128 + signal.SIGTERM
    _, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert not left


def test_the_interval_of_a_median_is_that_of_coins() -> None:
    # Of nine, 2 · (1 + 9) of 512 have the median outside of the second and the eighth; of ten 2 · (1 + 10) of 1024.
    assert common.median_interval([5, 1, 9, 3, 7, 2, 8, 4, 6]) == (2, 8)
    assert common.median_interval(list(range(10))) == (1, 8)
    assert common.median_interval(list(range(6))) == (0, 5)
    assert common.median_interval([3.0, 1.0]) == (1.0, 3.0)
    assert common.median_interval([2.0]) == (2.0, 2.0)

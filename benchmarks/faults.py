"""What a guard against kills costs an undisturbed run, and how long a kill holds a run up.

The cost: samples/s of ``cifar-cnn`` with the guard (each chunk of weights and optimizer state is copied to an undo log
before its update) and without it (``SHOAL_GUARD=0``), in turn. The delay: a worker is killed from outside with SIGKILL
in the middle of an epoch, again and again; counted is the time from the kill to the end of the step that it was at, as
the event of that step has it, which the supervisor writes up to 0.05 s late.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, PeerFailed, Result, run_json  # noqa: E402

ON, OFF = "shoal, guard on", "shoal, guard off"
OUTSIDE, INSIDE = "from the kill to the next finished step", "shoal's own after_s (from noticing it)"
_JOB = ["train", "cifar-cnn", "--plan", "dp=2,threads=1"]
_STEPS_AN_EPOCH = 500
_COST_LIMIT, _DELAY_LIMIT_S = 3.0, 1.5
_PATIENCE_S = 120.0


def undisturbed(guard: bool, steps: int) -> Mapping[str, Any]:
    """samples_per_s of a run that nobody kills."""
    folder = tempfile.mkdtemp(prefix="shoal-benchmark-")
    env = {"SHOAL_GUARD": "1" if guard else "0", "SHOAL_EXPORT": "0"}
    command = [*common.shoal_command(), *_JOB, "--steps", str(steps), "--run", str(Path(folder) / "run"), "--json"]
    try:
        return run_json(command, env=env)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Victim:
    """A run whose workers are killed."""

    def __init__(self, folder: Path) -> None:
        self._run = folder / "run"
        path = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
        self._running = subprocess.Popen(
            [*common.shoal_command(), *_JOB, "--run", str(self._run), "--json"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "SHOAL_EXPORT": "0"},
        )  # fmt: skip

    def events(self, kinds: list[str]) -> list[dict[str, Any]]:
        from shoal.observe.events import read_events

        path = self._run / "events.jsonl"
        return list(read_events(path, kinds)) if path.exists() else []

    def wait_for_step(self, after: int) -> int:
        """Wait until a step beyond ``after`` is done that lies well within an epoch; return its number."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and self._running.poll() is None:
            last = self._last_step()
            if last > after and _STEPS_AN_EPOCH // 10 < last % _STEPS_AN_EPOCH < _STEPS_AN_EPOCH * 6 // 10:
                return int(last)
            time.sleep(0.1)
        raise PeerFailed("the run ended, or did not go on, before all kills were done")

    def _last_step(self) -> int:
        # Only the file's end: to parse it all again and again would take time from the workers.
        try:
            with open(self._run / "events.jsonl", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().split(b"\n")[1:-1]
        except OSError:
            return 0
        steps = [json.loads(line)["step"] for line in lines if b'"kind": "step"' in line[:60]]
        return int(steps[-1]) if steps else 0

    def kill(self, rank: int) -> tuple[int, float]:
        """Kill the worker of this rank; its pid, and when."""
        rows = json.loads((self._run / "processes.json").read_text())
        pid = next(row["pid"] for row in rows if row["role"] == "worker" and row["rank"] == rank)
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        return pid, at

    def stop(self) -> None:
        """Ctrl-C, and no mercy for what does not heed it."""
        self._running.send_signal(signal.SIGINT)
        try:
            self._running.wait(timeout=60.0)
        except subprocess.TimeoutExpired:
            self._running.kill()
            self._running.wait()


def delays(kills: int) -> tuple[list[float], list[float]]:
    """Kill workers by turns; seconds until the step was done all the same: seen from outside, and by shoal itself."""
    chance = random.Random(0)
    done: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-", ignore_cleanup_errors=True) as folder:
        victim = Victim(Path(folder))
        try:
            step = 20
            for number in range(kills):
                step = victim.wait_for_step(step) + 30
                time.sleep(chance.uniform(0.0, 0.05))
                done.append(victim.kill(number % 2))
                print(f"killed worker {number % 2} ({number + 1}/{kills})", file=sys.stderr, flush=True)
            victim.wait_for_step(step)
        finally:
            victim.stop()
        deaths = {event["pid"]: event["step"] for event in victim.events(["death"])}
        finished = {event["step"]: event["t"] for event in victim.events(["step"])}
        inside = [event["after_s"] for event in victim.events(["recovered"])]
    missing = [pid for pid, _ in done if pid not in deaths]
    if missing:
        raise PeerFailed(f"{len(missing)} of {len(done)} kills are in no death event")
    return [finished[deaths[pid]] - at for pid, at in done], inside


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=None, help="steps of an undisturbed run")
    parser.add_argument("--kills", type=int, default=None, help="how many workers are killed")
    options = parser.parse_args()
    machine = common.hardware()
    steps = options.steps or (40 if options.quick else 1000)
    kills = options.kills or (2 if options.quick else 9)
    peers = [
        Peer(name=ON, measure=lambda: undisturbed(True, steps)),
        Peer(name=OFF, measure=lambda: undisturbed(False, steps)),
    ]
    guard = common.alternate(peers, 1 if options.quick else options.repeats, "samples_per_s")
    outside, inside = Result(OUTSIDE), Result(INSIDE)
    try:
        outside.values, inside.values = delays(kills)
    except (PeerFailed, OSError, KeyError) as error:
        outside.error = str(error)
    # Round by round: what makes the machine slower for a while then weighs on both.
    costs = [100 * (1 - on / off) for on, off in zip(guard[ON].values, guard[OFF].values, strict=False)]
    cost = median(costs) if costs else None
    bars = [
        Bar(claim="what the guard costs, median of the rounds", value=cost, limit=_COST_LIMIT, unit="%"),
        Bar(claim=f"{OUTSIDE}, median of {len(outside.values)}", value=outside.median, limit=_DELAY_LIMIT_S, unit="s"),
        Bar(claim=f"{OUTSIDE}, longest", value=max(outside.values, default=None), limit=_DELAY_LIMIT_S, unit="s"),
    ]
    note = f"cifar-cnn, dp=2, {steps} steps"
    killed = {result.name: result for result in (outside, inside)}
    groups = [
        Group(title="guard", note=note, results=guard, references=[OFF], unit="samples/s"),
        Group(title="kill", note=f"{kills} kills", results=killed, references=[], unit="s"),
    ]
    name = "faults_quick" if options.quick else "faults"
    return 0 if common.report(name, groups, "", {**vars(options), "cost_percent": costs}, machine, bars) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Starting: ``shoal train`` to the end of the first step, ``shoal serve`` until it is ready, ``shoal --help``, by the wall clock.

Beside it, the processor time of all processes of a command, from its beginning to its end.

The first round fills the caches (bytecode, the decoded data set, the compiled helpers) and does not count. The end of
the first step is the time in its event, which the supervisor writes when it sees the step: up to 0.05 s late.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, PeerFailed, run_json  # noqa: E402

TRAIN = "shoal train cifar-cnn --plan dp=2,threads=1 --steps 5"
SERVE = "shoal serve, ready"
HELP = "shoal --help"
TORCH = "python -c 'import torch'"
_STEP_LIMIT_S, _HELP_LIMIT_S = 6.0, 0.3


def train() -> Mapping[str, Any]:
    """Start the command in a fresh run directory and look up when its first step was done."""
    folder = tempfile.mkdtemp(prefix="shoal-benchmark-")
    run = Path(folder) / "run"
    try:
        began, spent = time.time(), processor_s()
        answer = run_json([*common.shoal_command(), *TRAIN.split()[1:], "--run", str(run), "--json"], limit_s=120.0)
        from shoal.observe.events import read_events

        first = next(read_events(run / "events.jsonl", ["step"]), None)
        if first is None:
            raise PeerFailed("no step was done")
        seconds = {"seconds": first["t"] - began, "whole_s": time.time() - began, "processor_s": processor_s() - spent}
        return {**seconds, "steps": answer["steps"]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def serve(bundle: Path) -> Mapping[str, Any]:
    """Start a service of one replica, wait until it says where it is, and end it."""
    command = [*common.shoal_command(), "serve", str(bundle), "--replicas", "1"]
    path = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
    began, spent = time.perf_counter(), processor_s()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
    if not ready or process.returncode != 0:
        raise PeerFailed(f"exit code {process.returncode}")
    return {"seconds": seconds, "processor_s": processor_s() - spent}


def processor_s() -> float:
    """Processor time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command: list[str]) -> Mapping[str, Any]:
    """Run a command to its end."""
    path = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
    began, spent = time.perf_counter(), processor_s()
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, env=env, timeout=60.0, check=False)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise PeerFailed(f"exit code {done.returncode}")
    return {"seconds": seconds, "processor_s": processor_s() - spent}


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    options = parser.parse_args()
    machine = common.hardware()
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        run = Path(folder) / "run"
        run_json([*common.shoal_command(), *TRAIN.split()[1:], "--run", str(run), "--json"], limit_s=120.0)
        peers = [
            Peer(name=TRAIN, measure=train),
            Peer(name=SERVE, measure=lambda: serve(run)),
            Peer(name=HELP, measure=lambda: timed([*common.shoal_command(), "--help"])),
            Peer(name=TORCH, measure=lambda: timed([sys.executable, "-c", "import torch"])),
        ]
        if not options.quick:
            print("filling the caches:", file=sys.stderr, flush=True)
            common.alternate(peers, 1, "seconds")
            print("measuring:", file=sys.stderr, flush=True)
        results = common.alternate(peers, 1 if options.quick else options.repeats, "seconds")
    spent = {
        name: replace(result, values=[detail["processor_s"] for detail in result.details]) for name, result in results.items()
    }
    groups = [
        Group(title="start", note="to the end of the first step, or of the command", results=results, references=[TORCH]),
        Group(title="processor time", note="of all processes of the command", results=spent, references=[TORCH]),
    ]
    bars = [
        Bar(claim=f"{TRAIN}: first step", value=results[TRAIN].median, limit=_STEP_LIMIT_S, unit="s"),
        Bar(claim=HELP, value=results[HELP].median, limit=_HELP_LIMIT_S, unit="s"),
    ]
    name = "start_quick" if options.quick else "start"
    return 0 if common.report(name, groups, "s", vars(options), machine, bars) else 1


if __name__ == "__main__":
    sys.exit(main())

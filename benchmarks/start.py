"""Starting: from the command ``shoal train`` to the end of the first step, and ``shoal --help``, by the wall clock.

The first round fills the caches (bytecode, the decoded data set, the compiled helpers) and does not count. The end of
the first step is the time in its event, which the supervisor writes when it sees the step: up to 0.05 s late.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, PeerFailed, run_json  # noqa: E402

TRAIN = "shoal train cifar-cnn --plan dp=2,threads=1 --steps 5"
HELP = "shoal --help"
TORCH = "python -c 'import torch'"
_STEP_LIMIT_S, _HELP_LIMIT_S = 6.0, 0.3


def train() -> Mapping[str, Any]:
    """Start the command in a fresh run directory and look up when its first step was done."""
    folder = tempfile.mkdtemp(prefix="shoal-benchmark-")
    run = Path(folder) / "run"
    try:
        began = time.time()
        answer = run_json([*common.shoal_command(), *TRAIN.split()[1:], "--run", str(run), "--json"], limit_s=120.0)
        from shoal.observe.events import read_events

        first = next(read_events(run / "events.jsonl", ["step"]), None)
        if first is None:
            raise PeerFailed("no step was done")
        return {"seconds": first["t"] - began, "whole_s": time.time() - began, "steps": answer["steps"]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def timed(command: list[str]) -> Mapping[str, Any]:
    """Run a command to its end."""
    path = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
    began = time.perf_counter()
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, env=env, timeout=60.0, check=False)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise PeerFailed(f"exit code {done.returncode}")
    return {"seconds": seconds}


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    options = parser.parse_args()
    machine = common.hardware()
    peers = [
        Peer(name=TRAIN, measure=train),
        Peer(name=HELP, measure=lambda: timed([*common.shoal_command(), "--help"])),
        Peer(name=TORCH, measure=lambda: timed([sys.executable, "-c", "import torch"])),
    ]
    if not options.quick:
        print("filling the caches:", file=sys.stderr, flush=True)
        common.alternate(peers, 1, "seconds")
        print("measuring:", file=sys.stderr, flush=True)
    results = common.alternate(peers, 1 if options.quick else options.repeats, "seconds")
    note = "to the end of the first step, or of the command"
    groups = [Group(title="start", note=note, results=results, references=[TORCH])]
    bars = [
        Bar(claim=f"{TRAIN}: first step", value=results[TRAIN].median, limit=_STEP_LIMIT_S, unit="s"),
        Bar(claim=HELP, value=results[HELP].median, limit=_HELP_LIMIT_S, unit="s"),
    ]
    name = "start_quick" if options.quick else "start"
    return 0 if common.report(name, groups, "s", vars(options), machine, bars) else 1


if __name__ == "__main__":
    sys.exit(main())

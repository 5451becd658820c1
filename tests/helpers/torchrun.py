"""Starting the processes of a job as torchrun does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import shoal


def torchrun(*arguments: str | Path, processes: int = 2, **environment: str) -> subprocess.Popen[str]:
    """Start processes of a script or a module on this machine; ``environment``: what is set there beside what is set here."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += map(str, arguments)
    own = [str(Path(shoal.__file__).parents[1]), str(Path(__file__).resolve().parent)]
    paths = os.pathsep.join(filter(None, [*own, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "SHOAL_EXPORT": "0", "PYTHONPATH": paths, **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

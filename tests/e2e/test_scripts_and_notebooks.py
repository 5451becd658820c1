"""Jobs that live in a script's ``__main__`` or in a notebook's cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]

JOB = """
import json
import torch
import shoal

torch.manual_seed(1)
x = torch.randn(96, 6)
y = (x.sum(1) > 0).long()
scale = 0.5


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 2)

    def forward(self, x):
        return self.linear(x) * scale


job = shoal.Job(
    name="here",
    model=lambda: Net(),
    train_data=lambda: (x, y),
    eval_data=(x[:32], y[:32]),
    loss=lambda output, target: torch.nn.functional.cross_entropy(output, target),
    optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
    metrics={"accuracy": lambda output, target: (output.argmax(1) == target).float().mean()},
    batch_size=16,
    epochs=2,
)
"""

TRAIN = """
print("at work")
run = shoal.train(job, plan="dp=2,threads=1", run_dir="run")
weights, loaded = run.weights(), run.model().state_dict()
same = list(loaded) == ["linear.weight", "linear.bias"] and all(torch.equal(loaded[k], weights[k]) for k in weights)
print(json.dumps({"steps": run.summary()["steps"], "sha": run.summary()["weights_sha256"], "same": same,
                  "evaluated": run.evaluate(), "last": run.history[-1]}))
"""


def _script(folder: Path, text: str) -> Any:
    """Run a script; what its last line says. Its lines before are returned beside it."""
    folder.mkdir()
    (folder / "script.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SHOAL_EXPORT": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]), lines


def test_a_script_trains_its_own_job_with_and_without_a_main_guard(tmp_path: Path) -> None:
    guarded = "\ndef main():\n" + "".join(f"    {line}\n" for line in TRAIN.strip().splitlines())
    guarded += '\n\nif __name__ == "__main__":\n    main()\n'
    told, lines = _script(tmp_path / "guarded", JOB + guarded)
    assert lines.count("at work") == 1
    assert told["steps"] == 12 and told["same"]
    assert set(told["evaluated"]) == {"eval_loss", "eval_accuracy"}
    assert all(told["last"][name] == pytest.approx(value, rel=1e-6) for name, value in told["evaluated"].items())
    bare, lines = _script(tmp_path / "bare", JOB + TRAIN)
    assert lines.count("at work") == 1, "no worker runs the script again"
    assert bare["sha"] == told["sha"]


def test_an_interrupted_cell_leaves_a_run_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes from the notebook's own server to the kernel, as its stop button sends it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    cells = [
        JOB,
        # The kernel's parent sees the file and interrupts; on_event only slows the run, so that there is time for it.
        "import pathlib, time\n"
        "def watch(event):\n"
        "    if event['kind'] == 'step' and event['step'] == 5:\n"
        "        pathlib.Path('interrupt-me').touch()\n"
        "        deadline = time.monotonic() + 80\n"
        "        while pathlib.Path('interrupt-me').exists() and time.monotonic() < deadline:\n"
        "            time.sleep(0.01)\n"
        "        time.sleep(0.2)\n"
        "run = shoal.train(job, plan='dp=2,threads=1', run_dir='run', on_event=watch)\n",
        "run = shoal.train(job, run_dir='run', resume=True)\n"
        "whole = shoal.train(job, plan='dp=2,threads=1', run_dir='whole')\n"
        "from shoal.observe.events import read_events\n"
        "print(json.dumps({'same': run.summary()['weights_sha256'] == whole.summary()['weights_sha256'],\n"
        "  'stops': [(e['step'], e['reason']) for e in read_events('run/events.jsonl', ['stop'])],\n"
        "  'resumed': [e['resumed_from'] for e in read_events('run/events.jsonl', ['run_start'])],\n"
        "  'steps': run.summary()['steps']}))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    client = NotebookClient(
        notebook, timeout=250, kernel_name="python3", allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )  # fmt: skip
    _execute(client, tmp_path / "interrupt-me")
    told = json.loads("".join(o["text"] for o in notebook.cells[-1].outputs if o.get("name") == "stdout"))
    assert told["steps"] == 12 and told["same"]
    ((step, reason),) = told["stops"]
    assert reason == "interrupt" and 5 <= step < 12
    assert told["resumed"] == [None, step]


def _execute(client: NotebookClient, sign: Path) -> None:
    """Run all cells; when the sign appears, interrupt the kernel once."""
    import asyncio

    async def interrupt_at_sign() -> None:
        while not sign.exists():
            await asyncio.sleep(0.02)
        kernel: Any = client.km
        await kernel.interrupt_kernel()
        sign.unlink()

    async def both() -> None:
        watcher = asyncio.ensure_future(interrupt_at_sign())
        try:
            await client.async_execute()
        finally:
            watcher.cancel()

    asyncio.run(both())

"""A whole data set through real replicas: every row once, in order, whatever dies meanwhile."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import shoal
from shoal import bundle
from shoal.cli.main import main
from shoal.cluster import Cluster
from shoal.errors import DataError, JobFailed, RequestError, UserCodeError
from shoal.serve.crew import Crew
from shoal.serve.offline import Conveyor, Pace, Window
from shoal.serve.predict import Filed, Kept, Sink
from shoal.serve.source import ModelSource
from shoal.serve.tables.answers import Answers, format_of
from shoal.serve.tables.opened import open_rows
from shoal.serve.tables.part import PartFile

_DEADLINE_S = 60.0
_TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.odd(tmp_path_factory.mktemp("odd") / "bundle")


@pytest.fixture(scope="module")
def crew(odd: Path) -> Iterator[Crew]:
    crew = Crew(ModelSource(odd), Cluster.local().cores, replicas=2)
    crew.start()
    try:
        crew.load()
        crew.choose()
        yield crew
    finally:
        crew.close()


def _rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, (count, 3, 4), dtype=np.uint8)


def _right(odd: Path, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        answer: np.ndarray = bundle.load(odd)(torch.from_numpy(rows)).numpy()
    return answer


def _write(path: Path, rows: np.ndarray) -> Path:
    """The rows as a file of the kind that the name says."""
    kind = path.suffix
    if kind == ".npy":
        np.save(path, rows)
    elif kind == ".npz":
        np.savez(path, input=rows)
    elif kind == ".safetensors":
        save_file({"input": rows}, path)
    elif kind == ".pt":
        torch.save({"input": torch.from_numpy(rows)}, path)
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps({"id": k, "input": row.tolist()}) + "\n" for k, row in enumerate(rows)))
    else:
        with path.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["id", *(f"input_{k}" for k in range(12))])
            table.writerows([k, *row.ravel().tolist()] for k, row in enumerate(rows))
    return path


def _read(path: Path) -> np.ndarray:
    """The answers in a file, whatever its kind."""
    if path.suffix == ".npz":
        with np.load(path) as found:
            return np.array(found["output"])
    if path.suffix == ".safetensors":
        return load_file(path)["output"]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return np.array([[float(row[f"output_{k}"]) for k in range(5)] for row in csv.DictReader(file)], "f4")
    return np.array([json.loads(line)["output"] for line in path.read_text().splitlines()], "f4")


def _pace(batch: int) -> Pace:
    return Pace(window=batch, batch=batch, units=batch)


def _into(sink: Sink) -> Any:
    return lambda window, outputs: sink.put(Answers(outputs, window.files, window.lengths), window.mark)


def _carry(crew: Crew, data: Any, batch: int, watch: Any = lambda: None, until: int | None = None) -> np.ndarray:
    kept = Kept(crew.signature)
    rows = open_rows(data, crew.signature.inputs, False, lambda line: None)
    Conveyor(crew, rows, _pace(batch), until, _into(kept)).run(watch)
    rows.close()
    return kept.arrays()["output"]


class TestConveyor:
    @pytest.mark.parametrize(
        ("source", "target"),
        [
            (".npy", ".jsonl"), (".npz", ".csv"), (".safetensors", ".npz"), (".pt", ".safetensors"), (".jsonl", ".jsonl"),
            (".csv", ".csv"),
        ],
    )
    def test_every_format_has_the_models_own_answers(
        self, crew: Crew, odd: Path, tmp_path: Path, source: str, target: str
    ) -> None:
        rows = _rows(301)
        data = open_rows(_write(tmp_path / f"x{source}", rows), crew.signature.inputs, True, lambda line: None)
        form, out = format_of(target, crew.signature, False), tmp_path / f"y{target}"
        part = PartFile(out, {}, fresh=False)
        Conveyor(crew, data, _pace(7), None, _into(Filed(part, form))).run(lambda: None)
        part.finish(form)
        data.close()
        np.testing.assert_allclose(_read(out), _right(odd, rows), **_TOLERANCE)

    def test_single_rows_have_the_same_bits_as_the_plain_model(self, crew: Crew, odd: Path) -> None:
        rows = _rows(100)
        assert np.array_equal(_carry(crew, rows, 1), np.concatenate([_right(odd, row[None]) for row in rows]))

    def test_more_rows_than_slots_and_a_limit(self, crew: Crew, odd: Path) -> None:
        rows = _rows(5 * crew.layout.slots + 3)
        np.testing.assert_allclose(_carry(crew, rows, 32), _right(odd, rows), **_TOLERANCE)
        np.testing.assert_allclose(_carry(crew, rows, 32, until=33), _right(odd, rows[:33]), **_TOLERANCE)

    def test_what_the_callers_data_set_raises_comes_behind_the_rows_before(self, crew: Crew) -> None:
        class Items(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return 40

            def __getitem__(self, index: int) -> Any:
                if index == 21:
                    raise KeyError("mine")
                return torch.zeros(3, 4, dtype=torch.uint8)

        delivered: list[int] = []
        with pytest.raises(UserCodeError, match="the data set raised KeyError"):
            self._run(crew, Items(), delivered)
        assert delivered == list(range(20))

    def test_nothing_to_answer(self, crew: Crew, tmp_path: Path) -> None:
        for name, text in (("a.jsonl", "\n"), ("a.csv", "input\n")):
            (tmp_path / name).write_text(text)
            with pytest.raises(DataError, match=f"{name} has no rows; add some"):
                _carry(crew, tmp_path / name, 4)

    def test_a_killed_replicas_batches_are_run_again(self, crew: Crew, odd: Path) -> None:
        rows = _rows(4_000, seed=1)
        killed: list[int] = []

        def kill() -> None:
            pids = [row["pid"] for row in crew.processes() if row["role"] == "replica"]
            if len(killed) < 3 and pids and pids[len(killed) % len(pids)] not in killed:
                killed.append(pids[len(killed) % len(pids)])
                os.kill(killed[-1], signal.SIGKILL)

        before = crew.deaths
        np.testing.assert_allclose(_carry(crew, rows, 2, kill), _right(odd, rows), **_TOLERANCE)
        _settled(crew, before + 3)
        assert len(killed) == 3

    def test_the_row_that_kills_every_time_ends_it_behind_the_rows_before(self, crew: Crew) -> None:
        rows = _rows(40)
        rows[21, 0, 0] = 254
        delivered: list[int] = []
        before = crew.deaths
        with pytest.raises(JobFailed, match="Rows 21 to 24 of data: the model's process died each of 3 times; leave"):
            self._run(crew, rows, delivered)
        assert delivered == list(range(20))
        _settled(crew, before + 3)

    def test_the_row_over_which_the_model_raises_is_named(self, crew: Crew) -> None:
        rows = _rows(40)
        rows[21, 0, 0] = 255
        delivered: list[int] = []
        with pytest.raises(JobFailed, match="^Row 22 of data: the model raised ValueError; leave that row out") as caught:
            self._run(crew, rows, delivered)
        assert delivered == list(range(21)) and "secret" not in str(caught.value)
        _settled(crew, crew.deaths)

    @staticmethod
    def _run(crew: Crew, rows: Any, delivered: list[int]) -> None:
        def note(window: Window, outputs: Sequence[np.ndarray]) -> None:
            delivered.extend(range(window.first, window.first + len(outputs[0])))

        data = open_rows(rows, crew.signature.inputs, False, lambda line: None)
        Conveyor(crew, data, _pace(4), None, note).run(lambda: None)


def _settled(crew: Crew, deaths: int) -> None:
    """Wait until every replica is up again and has nothing to do: the next test uses the same ones."""
    until = time.monotonic() + _DEADLINE_S
    while len(crew.ready()) < 2 or crew.deaths < deaths or any(ring.posted != ring.done for ring in crew.slots.rings):
        assert time.monotonic() < until
        crew.poll(0.02)
        crew.release_all()


def _command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "shoal", "predict", *map(str, arguments)]


class TestCommand:
    def test_killed_and_started_again_it_goes_on(
        self, odd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        rows = _rows(120)
        rows[::4, 0, 0] = 253  # half a second each: there is time to kill it
        data, out = _write(tmp_path / "x.csv", rows), tmp_path / "y.jsonl"
        part, note = tmp_path / "y.jsonl.part", tmp_path / ".y.jsonl.predict.json"
        arguments = (odd, data, "--out", out, "--replicas", 2, "--batch-size", 2)
        process = subprocess.Popen(_command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            until = time.monotonic() + _DEADLINE_S
            while not (note.exists() and json.loads(note.read_text())["rows"]):
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.02)
        finally:
            process.kill()
            process.communicate()
        answered = json.loads(note.read_text())["rows"]
        assert 0 < answered < 120 and not out.exists()
        with part.open("ab") as file:
            file.write(b'{"output":[1,2')  # half a row, as a writer that is killed leaves it
        # Other rows where it has been: refused, and nothing is lost. Other rows where it has not: they are answered.
        changed = rows.copy()
        changed[0, 0, 1] ^= 1
        _write(data, changed)
        assert main(["predict", *map(str, arguments)]) == 2
        assert "was begun with other data; give --fresh" in capfd.readouterr().err.splitlines()[-1]
        rows[::4, 0, 0] = 7
        rows[:answered:4, 0, 0] = 253
        _write(data, rows)
        assert main(["predict", *map(str, arguments), "--json"]) == 0
        result = json.loads(capfd.readouterr().out)
        assert (result["rows"], result["new"], result["answered_before"]) == (120, 120 - answered, answered)
        np.testing.assert_allclose(_read(out), _right(odd, rows), **_TOLERANCE)
        assert not part.exists()

    def test_answers_on_standard_output_and_what_is_wrong_on_the_other(
        self, odd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        rows = _rows(50)
        data = _write(tmp_path / "x.jsonl", rows)
        with data.open("a") as file:
            file.write('{"input": [1, 2]}\n')
        assert main(["predict", str(odd), str(data), "--replicas", "1"]) == 2
        told = capfd.readouterr()
        assert told.err.splitlines()[-1].startswith("x.jsonl, line 51: input has the shape [2] where the model takes")
        found = np.array([json.loads(line)["output"] for line in told.out.splitlines()], "f4")
        np.testing.assert_allclose(found, _right(odd, rows), **_TOLERANCE)

    def test_it_does_without_torch_itself(self, odd: Path, tmp_path: Path) -> None:
        """Its replicas have it; where the data is not in torch's own format, this process would import it for nothing."""
        rows = _rows(3)
        data, out = _write(tmp_path / "x.csv", rows), tmp_path / "y.csv"
        code = "import sys; from shoal.cli.main import main; sys.exit(main(sys.argv[1:]) or 2 * ('torch' in sys.modules))"
        words = ["predict", str(odd), str(data), "--out", str(out), "--replicas", "1"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(_read(out), _right(odd, rows), **_TOLERANCE)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["BUNDLE", "none.csv"], "There is no data at none.csv."),
            (["BUNDLE", "wrong.csv"], "wrong.csv has no column for the input input;"),
            (["BUNDLE", "x.npy", "--out", "y.txt"], "y.txt ends in .txt; give a file that ends in .jsonl, .csv"),
            (["BUNDLE", "x.npy", "--out", "there.csv"], "there.csv exists already; give --fresh"),
            (["BUNDLE", "x.npy", "--out", "none/y.csv"], "There is no directory none for the answers; make it first."),
            (["BUNDLE", "x.npz", "--out", "./x.npz", "--fresh"], "x.npz is the data itself; give another --out."),
            (["BUNDLE", "x.npy", "--limit", "0"], "--limit is 0; give a whole number of at least 1."),
        ],
    )
    def test_bad_input(
        self, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
        arguments: list[str], sentence: str,
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        _write(tmp_path / "x.npy", _rows(3))
        _write(tmp_path / "x.npz", _rows(3))
        (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
        (tmp_path / "there.csv").write_text("mine")
        assert main(["predict", *(str(odd) if word == "BUNDLE" else word for word in arguments)]) == 2
        told = capfd.readouterr()
        assert sentence in told.err.splitlines()[-1] and told.out == "" and "Traceback" not in told.err
        assert (tmp_path / "there.csv").read_text() == "mine" and not list(tmp_path.glob("*.part"))


_PICTURES = """\
import torch
from torch import nn


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        print("the model speaks")
        return self.scale * x.mean((2, 3))
"""


def test_from_python_with_pictures_and_labels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "code.py").write_text(_PICTURES)
    described = {
        "name": "mean", "factory": "code:Mean", "labels": ["red", "green", "blue"],
        "inputs": [{"name": "input", "dtype": "FP32", "shape": [-1, 3, 4, 6]}],
        "outputs": [{"name": "output", "dtype": "FP32", "shape": [-1, 3]}],
    }  # fmt: skip
    bundle.write(tmp_path / "bundle", {"scale": torch.tensor(1.0)}, described, tmp_path / "code.py")
    (tmp_path / "set").mkdir()
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
    for name, colour in colours.items():
        Image.new("RGB", (6, 4), colour).save(tmp_path / "set" / f"{name}.png")
    out = shoal.predict(tmp_path / "bundle", tmp_path / "set", tmp_path / "y.jsonl", replicas=1)
    assert out == tmp_path / "y.jsonl"
    lines = [json.loads(line) for line in (tmp_path / "y.jsonl").read_text().splitlines()]
    assert [(line["file"], line["label"], line["output"], line["score"]) for line in lines] == [
        ("a.png", "red", [1, 0, 0], 1.0), ("b.png", "green", [0, 1, 0], 1.0), ("c.png", "blue", [0, 0, 1], 1.0),
    ]  # fmt: skip
    assert shoal.predict(tmp_path / "bundle", tmp_path / "set", out) == out  # found finished: no model is loaded
    with pytest.raises(RequestError, match="exists already"):
        shoal.predict(tmp_path / "bundle", tmp_path / "set", out, limit=2)
    capfd.readouterr()
    assert main(["predict", str(tmp_path / "bundle"), str(tmp_path / "set"), "--replicas", "1"]) == 0
    told = capfd.readouterr()
    assert [json.loads(line) for line in told.out.splitlines()] == lines and "the model speaks" in told.err


def test_from_python_without_a_file(tmp_path: Path) -> None:
    two = bundles.two(tmp_path / "two" / "bundle")
    left, right = np.random.default_rng(0).standard_normal((2, 70, 2)).astype("f4")
    told: list[Any] = []
    found = shoal.predict(two, {"left": left, "right": right}, replicas=1, batch_size=8, on_progress=told.append)
    assert isinstance(found, dict) and np.array_equal(found["sum"], 2 * (left + right))
    assert found["count"].tolist() == [7] * 70 and found["count"].dtype == np.int64
    with pytest.raises(DataError, match='no array "right"'):
        shoal.predict(two, {"left": left})
    assert told == sorted(told, key=lambda progress: progress.rows)

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from small_service import METADATA, Service, refuse, serving

from shoal.cli import load as load_command
from shoal.cli.main import main
from shoal.serve.load import Progress
from shoal.serve.load_report import Ledger


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as found:
        yield found


def test_the_contract_s_fields_and_the_picture(
    service: Service, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "latency.png"
    options = ["--requests", "40", "--concurrency", "2", "--slo-ms", "60000", "--timeout-ms", "60000", "--picture", str(picture)]
    assert main(["load", service.url, *options, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["requests"] == told["answered"] == 40 and told["errors"] == 0 and told["within_slo"] == 1.0
    assert told["throughput"] > 0 and 0 < told["p50_ms"] <= told["p95_ms"] <= told["p99_ms"] <= told["max_ms"]
    assert sum(count for *_, count in told["histogram"]) == 40 and told["picture"] == str(picture)
    assert Image.open(picture).format == "PNG" and [found.name for found in tmp_path.iterdir()] == ["latency.png"]
    assert service.inferences[0].header["parameters"]["timeout"] == 60_000_000


def test_a_person_gets_a_small_table(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    service.script.append(refuse(429, "Too much at once."))
    options = ["--model", "double", "--rate", "500", "--requests", "20", "--as-json", "--slo-ms", "9e4"]
    assert main(["load", service.url, *options]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == "" and lines[0].startswith("Poisson, 500/s: 20 requests in ")
    assert lines[0].endswith("(19 answered, 1 refused, 0 expired, 0 failed)") and "(95.0% of all requests)" in lines[1]
    assert lines[2].split() == ["p50", "p90", "p95", "p99", "p999", "mean", "max"] and len(lines[3].split()) == 9
    assert lines[4] == "  429: Too much at once." and lines[5].startswith("the generator took ")
    assert "data" in service.inferences[0].header["inputs"][0]


def test_a_trace_and_a_sweep(service: Service, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("0\n0.001\n0.002\n")
    assert main(["load", service.url, "--trace", str(trace), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["requests"] == 3
    service.otherwise = refuse(503, "Nobody there.")
    options = ["--sweep", "--rate", "4000", "--duration", "0.01", "--seed", "1"]
    assert main(["load", service.url, *options]) == 1
    assert capfd.readouterr().err.splitlines()[-1].endswith("requests was answered: Nobody there.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ftp://a"], "only http:// and https:// are spoken here"),
        (["--rate", "5"], "Missing argument 'URL'"),
        (["URL", "--rate", "0"], "--rate is 0; give a number above 0."),
        (["URL", "--rate", "many"], "--rate"),
        (["URL", "--rate", "5", "--concurrency", "2"], "--concurrency and --rate contradict each other"),
        (["URL", "--sweep", "--requests", "2"], "--requests and --sweep contradict each other"),
        (["URL", "--requests", "0"], "--requests is 0; give a whole number of at least 1."),
        (["URL", "--seed", "-1"], "--seed is -1"),
        (["URL", "--trace", "missing.txt"], "The trace missing.txt cannot be read"),
        (["URL", "--input", "missing.npy"], "There is no file missing.npy"),
        (["URL", "--picture", "no/where.png"], "There is no directory no"),
        (["URL", "--model", "nothing"], "There is no such model here."),
        (["NOBODY"], "Nobody answers at http://127.0.0.1"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_sentence_and_exit_2(
    service: Service, arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        places = {"URL": service.url, "NOBODY": f"http://127.0.0.1:{taken.getsockname()[1]}"}
        assert main(["load", *(places.get(word, word) for word in arguments)]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and sentence in said, said
    assert service.inferences == []


def test_several_models_want_a_name(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    service.models["other"] = METADATA
    assert main(["load", service.url]) == 2
    assert capfd.readouterr().err.endswith("serves double, other; name one with --model.\n")


def test_a_service_that_answers_nothing_is_a_failure(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    service.otherwise = refuse(400, "Wrong shape.")
    assert main(["load", service.url, "--requests", "3", "--concurrency", "3"]) == 1
    assert capfd.readouterr().err == "Not one of 3 requests was answered: Wrong shape.\n"


def test_the_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger()
    for status in (200, 200, 429):
        ledger.record(status, 0.0, 0.0, 0.0125)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with load_command._Line() as line:
        line.show(Progress(1.5, 7, ledger))
        said = capsys.readouterr().err
    assert "1.5 s  2 answered  1 refused  0 expired  0 failed  p50 12.50 ms  p99 12.50 ms  7 waiting" in said
    assert capsys.readouterr().err == "\r\x1b[2K"

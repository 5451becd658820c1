from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_service import METADATA, Request, Service, double, refuse, serving

from shoal.errors import DataError, RequestError
from shoal.serve import alarm as alarm_module
from shoal.serve import load as load_module
from shoal.serve import wire
from shoal.serve.alarm import Alarm
from shoal.serve.load import LoadSettings, drive, poisson, prober, read_trace, sweep
from shoal.serve.load_inputs import payloads, random_inputs, read_input
from shoal.serve.load_report import Ledger, Report, histogram, percentiles

_SAID = [
    b"", b"ftp\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", b"HTTP/1.1 204 No\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n",
]  # fmt: skip
latencies = st.lists(st.floats(1e-5, 900.0), min_size=1, max_size=200)


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as found:
        yield found


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def requests_to(service: Service, **how: object) -> tuple[wire.Address, list[bytes]]:
    address = wire.parse_url(service.url)
    return address, payloads(address, METADATA, **how)  # type: ignore[arg-type]


# -- the report --------------------------------------------------------------------------------------------------


@given(latencies)
def test_percentiles_are_the_smallest_value_that_so_many_do_not_exceed(values: list[float]) -> None:
    ordered, levels = sorted(values), (1.0, 50.0, 90.0, 95.0, 99.0, 100.0)
    expected = [ordered[math.ceil(len(ordered) * level / 100) - 1] for level in levels]
    assert percentiles(values, levels) == expected
    assert percentiles(values, levels) == list(np.percentile(values, levels, method="inverted_cdf"))


@given(latencies)
def test_a_histogram_counts_everything_once(values: list[float]) -> None:
    bins = histogram(values)
    assert sum(count for *_, count in bins) == len(values)
    assert all(math.isclose(a[1], b[0]) for a, b in zip(bins, bins[1:], strict=False)) and bins[0][2] and bins[-1][2]
    assert bins[0][0] * (1 - 1e-9) <= min(values) and max(values) <= bins[-1][1] * (1 + 1e-9)


def test_percentiles_on_known_numbers_and_outcomes_by_kind() -> None:
    ledger = Ledger(slo_s=0.9)
    for i in range(1, 1001):
        ledger.record(200, 50.0, 50.0, 50.0 + i / 1000)
    for status in (429, 429, 503, 504, 0, 400):
        ledger.record(status, 50.0, 51.0, 51.5)
    report = ledger.report("test", 10.0, cpu_s=0.02)
    assert [report.p50_ms, report.p90_ms, report.p95_ms, report.p99_ms, report.p999_ms, report.max_ms] == pytest.approx(
        [500, 900, 950, 990, 999, 1000]
    )
    assert (report.requests, report.answered, report.refused, report.expired, report.failed) == (1006, 1000, 3, 1, 2)
    assert report.statuses == {"none": 1, "200": 1000, "400": 1, "429": 2, "503": 1, "504": 1}
    assert report.errors == 6 and report.throughput == 100.0 and report.refused_p99_ms == pytest.approx(500)
    assert report.goodput == pytest.approx(90, abs=0.2) and report.client_us == pytest.approx(0.02 / 1006 * 1e6)
    told = report.as_dict()
    assert {"requests", "errors", "throughput", "p50_ms", "p95_ms", "p99_ms"} <= set(told) and json.dumps(told)


def test_what_is_not_answered_breaks_the_slo_too() -> None:
    def report(fast: int, slow: int, refused: int) -> Report:
        ledger = Ledger(slo_s=0.05)
        for status, took, count in ((200, 0.01, fast), (200, 0.06, slow), (429, 0.001, refused)):
            for _ in range(count):
                ledger.record(status, 0.0, 0.0, took)
        return ledger.report("test", 1.0)

    assert report(99, 1, 0).holds and report(99, 0, 1).holds
    assert not report(98, 2, 0).holds and not report(98, 0, 2).holds and not report(0, 0, 0).holds


def test_nothing_answered_has_no_latency() -> None:
    report = Ledger().report("test", 1.0)
    assert report.p99_ms is None and report.histogram == [] and report.throughput == 0 and report.goodput is None


# -- when to send ------------------------------------------------------------------------------------------------


def test_a_poisson_stream_has_its_rate_and_is_the_same_for_the_same_seed() -> None:
    times = poisson(1000.0, 20.0, None, seed=1)
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.05) and times[0] > 0 and times[-1] <= 20.0
    assert gaps.mean() == pytest.approx(0.001, rel=0.05) and gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert poisson(1000.0, 5.0, None, seed=1) == [t for t in times if t <= 5.0]
    assert poisson(1000.0, None, 10, seed=1) == times[:10] and poisson(1000.0, 20.0, None, seed=2)[0] != times[0]
    with pytest.raises(RequestError, match="no end of its own"):
        poisson(1.0, None, None, seed=0)


def test_a_trace_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    file = tmp_path / "trace.txt"
    file.write_text("0.5\n0\n\n1e-3\n")
    assert read_trace(file) == (0.0, 0.001, 0.5)
    for text, words in (("0\nsoon\n", "line 2: 'soon'"), ("-1", "line 1"), ("nan", "line 1"), ("\n", "holds no times")):
        file.write_text(text)
        with pytest.raises(RequestError, match=words):
            read_trace(file)
    with pytest.raises(RequestError, match="cannot be read"):
        read_trace(tmp_path / "missing")


@given(st.sampled_from(_SAID), st.integers(0, 60), st.binary(max_size=4))
def test_a_head_that_is_known_is_read_as_at_first(said: bytes, cut: int, more: bytes) -> None:
    def found(read: Callable[[bytes], object]) -> object:
        try:
            return read(said[:cut] + more)
        except wire.BadResponse as error:
            return str(error)

    assert found(load_module._head_of) == found(load_module._head_of) == found(wire.read_head)


@pytest.mark.parametrize("fine", [True, False])
def test_an_alarm_rings_once_for_the_latest_setting(fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fine:
        monkeypatch.setattr(alarm_module, "sys", types.SimpleNamespace(platform="other"))

    async def wait() -> int:
        rung = []
        first = asyncio.Event()
        alarm = Alarm(asyncio.get_running_loop(), lambda: (rung.append(1), first.set()))
        alarm.set(3600.0)
        alarm.set(0.0)
        await first.wait()
        alarm.set(3600.0)
        alarm.close()
        return len(rung)

    assert asyncio.run(wait()) == 1


# -- sending -----------------------------------------------------------------------------------------------------


def test_a_stall_counts_for_every_request_that_had_to_wait_behind_it(service: Service) -> None:
    clock = Clock()

    def stall(request: Request) -> bytes:
        clock.now += 10.0
        return double(request)

    service.script.append(stall)
    address, sent = requests_to(service)
    settings = LoadSettings(arrivals_s=(0.0, 1.0, 2.0, 3.0, 10.0), connections=1, slo_s=0.5)
    report = drive(address, sent, settings, clock=clock)
    # Counted from when they were sent, four of these five would have taken no time at all.
    assert report.answered == 5 and len(service.inferences) == 5
    assert (report.max_ms, report.p50_ms, report.mean_ms) == pytest.approx((10_000, 8_000, 6_800))
    assert report.late_p99_ms == pytest.approx(9_000) and report.within_slo == pytest.approx(0.2)


def test_a_closed_loop_sends_as_many_as_asked_with_so_many_clients(service: Service) -> None:
    address, sent = requests_to(service)
    report = drive(address, sent, LoadSettings(concurrency=3, requests=50))
    assert (report.requests, report.answered, report.errors) == (50, 50, 0)
    assert service.connections == 3 and report.mode == "closed loop, 3 at a time"
    # The payloads go out in turn, and are not all alike.
    assert len({request.body for request in service.inferences}) == 50
    with pytest.raises(RequestError, match="no end of its own"):
        drive(address, sent, LoadSettings(concurrency=3))


def test_a_closed_loop_ends_after_its_duration_and_does_not_count_the_warm_up(service: Service) -> None:
    clock = Clock()

    def second(request: Request) -> bytes:
        clock.now += 1.0
        return double(request)

    service.otherwise = second
    address, sent = requests_to(service)
    report = drive(address, sent, LoadSettings(concurrency=1, duration_s=5.0, warmup_s=2.0), clock=clock)
    assert len(service.inferences) == 5 and report.requests == 3
    assert report.elapsed_s == 3.0 and report.throughput == 1.0 and report.p50_ms == 1000.0


def test_outcomes_are_counted_by_kind(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "_PAUSE_S", 0.0)
    service.script.extend(
        [refuse(429, "Too much."), refuse(503, "Nobody there."), refuse(504, "Late."), refuse(400, "Wrong shape."),
         refuse(429, "Still too much."), lambda _: None, lambda _: b"nonsense\r\n\r\n"]
    )  # fmt: skip
    address, sent = requests_to(service)
    report = drive(address, sent, LoadSettings(concurrency=1, requests=10))
    assert (report.requests, report.answered, report.refused, report.expired, report.failed) == (10, 3, 3, 1, 3)
    assert report.statuses == {"none": 2, "200": 3, "400": 1, "429": 2, "503": 1, "504": 1}
    assert report.reasons["429"] == "Too much." and report.reasons["400"] == "Wrong shape."
    assert "broke" in report.reasons["none"] and len(service.inferences) == 10


def test_a_stream_sends_each_request_once_also_over_connections_that_end(service: Service) -> None:
    def last(request: Request) -> bytes:
        return double(request).replace(b"Said\r\n", b"Said\r\nconnection: close\r\n")

    service.otherwise = last
    address, sent = requests_to(service, binary=False)
    report = drive(address, sent, LoadSettings(arrivals_s=(0.0,) * 40, connections=4))
    assert report.answered == 40 and len(service.inferences) == 40 and service.connections >= 40


def test_answers_in_pieces_are_put_together(service: Service) -> None:
    big = b"x" * 300_000
    service.otherwise = lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + big
    address, sent = requests_to(service)
    assert drive(address, sent, LoadSettings(concurrency=2, requests=6)).answered == 6
    service.otherwise = lambda _: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert drive(address, sent, LoadSettings(concurrency=2, requests=6)).answered == 6
    service.script.extend([lambda _: b"HTTP/1.1 200 OK\r\n\r\nuntil the end"])
    assert drive(address, sent, LoadSettings(concurrency=1, requests=1, give_up_s=0.5)).failed == 1


def test_no_answer_is_given_up_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "_WATCH_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = wire.Address("127.0.0.1", silent.getsockname()[1])
        told: list[load_module.Progress] = []
        clock = Clock()

        def pass_time(progress: load_module.Progress) -> None:
            told.append(progress)
            clock.now += 20.0

        settings = LoadSettings(arrivals_s=(0.0, 0.0, 0.0), connections=1, give_up_s=30.0)
        report = drive(address, [wire.render(address, "GET", "/")], settings, progress=pass_time, clock=clock)
    assert report.requests == report.failed == 3 and report.answered == 0
    assert "within 30 s" in report.reasons["none"] and told and told[0].waiting == 3


def test_nobody_listens_is_one_sentence() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = wire.Address("127.0.0.1", probe.getsockname()[1])
        with pytest.raises(RequestError, match="Nobody answers at http://127.0.0.1:.*refused"):
            drive(address, [b"x"], LoadSettings(concurrency=2, requests=5))


def test_it_runs_beside_another_thread(service: Service) -> None:
    address, sent = requests_to(service)
    found: list[Report] = []
    threads = [
        threading.Thread(target=lambda: found.append(drive(address, sent, LoadSettings(concurrency=1, requests=5)))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.answered for report in found] == [5, 5]


# -- the sweep ---------------------------------------------------------------------------------------------------


@dataclass
class Cliff:
    """Holds up to a rate, and not above."""

    limit: float
    holds: bool = False

    def __call__(self, rate: float) -> Report:
        ledger = Ledger(slo_s=0.05)
        ledger.record(200, 0.0, 0.0, 0.01 if rate <= self.limit else 1.0)
        return ledger.report(f"{rate}", 1.0)


@given(st.floats(1.0, 50_000.0), st.floats(1.0, 5_000.0))
def test_a_sweep_finds_the_cliff_from_either_side(limit: float, start: float) -> None:
    found = sweep(Cliff(limit), start)
    assert found.rate is not None and found.rate <= limit <= found.rate * 1.05
    assert found.report is not None and found.report.holds and found.report.mode == f"{found.rate}"
    assert len(found.tried) < 25


def test_a_sweep_that_finds_nothing_or_no_end_says_so() -> None:
    nothing = sweep(Cliff(0.1), 50.0)
    assert nothing.rate is None and nothing.report is None and nothing.tried[-1][0] < 1.0
    assert sweep(Cliff(1e9), 50.0, most=1000.0).rate == 800.0
    refused = sweep(lambda _: Ledger(slo_s=0.05).report("", 1.0), 50.0)
    assert refused.rate is None and len(refused.tried) == 1


def test_a_probe_is_a_stream_that_is_long_enough_for_200_requests(service: Service) -> None:
    address, sent = requests_to(service)
    with pytest.raises(RequestError, match="--slo-ms"):
        prober(address, sent, LoadSettings())
    probe = prober(address, sent, LoadSettings(duration_s=0.05, slo_s=60.0, seed=3))
    first, second = probe(2000.0), probe(2000.0)
    assert first.holds and second.holds and first.mode == "Poisson, 2000/s"
    assert first.requests == len(poisson(2000.0, 0.1, None, 3)) and second.requests == len(poisson(2000.0, 0.1, None, 4))
    assert len(service.inferences) == first.requests + second.requests


# -- what is sent ------------------------------------------------------------------------------------------------


def entry(name: str, datatype: str, *shape: int) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def test_random_inputs_fit_the_metadata() -> None:
    metadata = {"name": "m", "inputs": [entry("ids", "INT64", -1, -1), entry("attention_mask", "INT64", -1, -1),
                                        entry("token_type_ids", "INT32", -1, -1), entry("image", "UINT8", -1, 3, 4, 4),
                                        entry("x", "FP16", -1, 2), entry("b", "BF16", -1, 2),
                                        entry("f", "BOOL", -1, 64)]}  # fmt: skip
    found = {name: (datatype, array) for name, datatype, array in random_inputs(metadata, np.random.default_rng(0))}
    ids, mask, types = (found[name][1] for name in ("ids", "attention_mask", "token_type_ids"))
    assert ids.shape == mask.shape == types.shape and 5 <= ids.shape[1] <= 60 and ids.dtype == np.int64
    assert mask.all() and not types.any() and types.dtype == np.int32 and ids.min() >= 1
    assert found["image"][1].shape == (1, 3, 4, 4) and found["image"][1].dtype == np.uint8
    assert found["x"][1].dtype == np.float16 and found["b"][1].dtype == np.uint16 and set(found["f"][1].ravel()) == {False, True}
    address = wire.Address("a", 1)
    assert payloads(address, metadata, seed=1) == payloads(address, metadata, seed=1) != payloads(address, metadata, seed=2)
    with pytest.raises(RequestError, match="FP16 in JSON"):
        payloads(address, metadata, binary=False)
    with pytest.raises(RequestError, match="t is BYTES"):
        payloads(address, {"name": "m", "inputs": [entry("t", "BYTES", -1)]})


def test_the_deadline_goes_along() -> None:
    for binary in (True, False):
        (one, *_) = payloads(wire.Address("a", 1), METADATA, binary=binary, timeout_s=0.25)
        assert b'"timeout":250000' in one


def shapes(found: Sequence[tuple[str, str, np.ndarray]]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, datatype, array.shape) for name, datatype, array in found]


def test_a_file_is_the_input(tmp_path: Path) -> None:
    array = tmp_path / "a.npy"
    np.save(array, np.ones(3, np.float32))
    assert shapes(read_input(array, METADATA)) == [("input", "FP32", (1, 3))]
    np.save(array, np.ones((5, 3), np.float16))
    assert shapes(read_input(array, METADATA)) == [("input", "FP32", (5, 3))]
    picture = tmp_path / "cat.png"
    Image.new("RGB", (40, 30), (255, 0, 0)).save(picture)
    (found,) = read_input(picture, {"inputs": [entry("input", "UINT8", -1, 3, 8, 6)]})
    assert found[2].shape == (1, 3, 8, 6) and found[2][0, 0].min() == 255 and not found[2][0, 1:].any()
    (found,) = read_input(picture, {"inputs": [entry("input", "FP32", -1, 8, 6, 3)]})
    assert found[2].shape == (1, 8, 6, 3) and found[2].max() == 1.0
    request = tmp_path / "r.json"
    request.write_text('{"inputs": []}')
    (sent,) = payloads(wire.Address("a", 1), METADATA, file=request)
    assert sent.endswith(b'\r\n\r\n{"inputs": []}') and sent.startswith(b"POST /v2/models/double/infer HTTP/1.1\r\n")
    (sent,) = payloads(wire.Address("a", 1), METADATA, file=array)
    assert sent.endswith(np.ones((5, 3), np.float32).tobytes())


def test_a_file_that_is_no_input_is_said(tmp_path: Path) -> None:
    bad = {name: tmp_path / name for name in ("a.npy", "a.png", "a.json", "a.txt")}
    for path in bad.values():
        path.write_text("{nothing")
    pictures = {"inputs": [entry("input", "UINT8", -1, 3, 8, 6)]}
    for name, metadata, kind in (("a.npy", METADATA, DataError), ("a.png", pictures, DataError),
                                 ("a.txt", METADATA, RequestError), ("a.png", METADATA, RequestError)):  # fmt: skip
        with pytest.raises(kind, match=f"{name}"):
            read_input(bad[name], metadata)
    with pytest.raises(DataError, match="JSON request"):
        payloads(wire.Address("a", 1), METADATA, file=bad["a.json"])
    with pytest.raises(RequestError, match="with all of them"):
        read_input(bad["a.npy"], {"inputs": METADATA["inputs"] * 2})

"""Serving under load, beside what people would use instead: FastAPI, LitServe, BentoML, Ray Serve.

Each server answers the same model and is driven by the same client (``shoal.serve.load``), on the same cores. First each peer's
settings are searched: workers, threads, batch size. Then the peers take turns. ``--cases`` and ``--parts`` measure some of it:
each part of a case takes less than ten minutes; what was searched is remembered beside the peers' environment.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, PeerFailed, Result, run_json  # noqa: E402
from benchmarks.serve_cases import BY_HAND, CASES, COMMANDS, PEERS, SETTINGS, SHOAL, Case, Inputs, Setting  # noqa: E402
from benchmarks.venvs import peer_python  # noqa: E402
from shoal.errors import ShoalError  # noqa: E402
from shoal.serve import wire  # noqa: E402
from shoal.serve.load import LoadSettings, drive, sweep  # noqa: E402
from shoal.serve.load_report import Report  # noqa: E402

_CONCURRENCY = 128
_FOUND = Path(__file__).resolve().parent / ".venv-serving" / "settings.json"
_PARTS = ("throughput", "rates", "overload", "alone", "memory", "swap")
# While a version is swapped the load is this part of what it can do: who has no room to spare feels every neighbour.
_SWAP_LOAD, _SWAP_WARM_S, _SWAP_AFTER_S = 0.4, 0.5, 1.0
# How long the first load may take, from which is known how long they take; and how many are measured then.
_SWAP_FIRST_S, _SWAP_ROUNDS = 6.0, 7
_START_S = 120.0
_LEAVE_S = 20.0


# -- servers -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def peer_server(inputs: Inputs, case: Case, peer: str, setting: Setting) -> Iterator[wire.Address]:
    """A peer, started, ready and ended again."""
    port = _free_port()
    command = [str(inputs.python), *(str(port) if word == "PORT" else word for word in COMMANDS[peer])]
    process = subprocess.Popen(
        command, cwd=PEERS, env=inputs.environment(case, setting, port), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=common.end_with_parent,
    )  # fmt: skip
    address = wire.parse_url(f"http://127.0.0.1:{port}")
    with common.ended(process, _LEAVE_S), _failures():
        payload = inputs.payloads(case, peer, setting, address)[0]
        until = time.monotonic() + _START_S
        while not _answers(port, payload):
            if process.poll() is not None or time.monotonic() > until:
                raise PeerFailed(f"{peer} ({setting}) does not start")
            time.sleep(0.2)
        yield address


@contextlib.contextmanager
def shoal_server(inputs: Inputs, case: Case, slo_ms: float, *options: str) -> Iterator[tuple[wire.Address, int]]:
    """``shoal serve`` as it comes; gives its address and the supervisor's pid."""
    target = f"cifar={inputs.bundle}" if case.model == "cifar" else f"minilm={inputs.minilm}"
    path = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*common.shoal_command(), "serve", target, "--slo-ms", str(slo_ms), *options],
            stdout=subprocess.PIPE, stderr=said, text=True, env={**os.environ, "PYTHONPATH": path},
            preexec_fn=common.end_with_parent,
        )  # fmt: skip
        with common.ended(process, _LEAVE_S), _failures():
            assert process.stdout is not None
            late = threading.Timer(_START_S, process.kill)
            late.daemon = True
            late.start()
            line = process.stdout.readline()
            late.cancel()
            if not line:
                process.wait(_LEAVE_S)
                said.seek(0)
                raise PeerFailed(f"shoal does not start: {said.read().strip().splitlines()[-1:]}")
            where = json.loads(line)
            yield wire.parse_url(where["url"]), where["pid"]


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """What goes wrong with one server is that server's, and ends no other measurement."""
    import psutil

    try:
        yield
    except (ShoalError, OSError, http.client.HTTPException, psutil.Error) as error:
        raise PeerFailed(f"{type(error).__name__}: {error}") from None


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _answers(port: int, payload: bytes) -> bool:
    import socket

    try:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(payload)
            return connection.recv(64).startswith((b"HTTP/1.1 200", b"HTTP/1.0 200"))
    except OSError:
        return False


@contextlib.contextmanager
def server(
    inputs: Inputs, case: Case, peer: str, setting: Setting | None, slo_ms: float
) -> Iterator[tuple[wire.Address, list[bytes]]]:
    """A server and the requests for it."""
    if peer == SHOAL:
        with shoal_server(inputs, case, slo_ms, *case.options) as (address, _):
            yield address, inputs.payloads(case, peer, None, address)
    else:
        assert setting is not None
        with peer_server(inputs, case, peer, setting) as address:
            yield address, inputs.payloads(case, peer, setting, address)


# -- what is measured --------------------------------------------------------------------------------------------------


class Measuring:
    """One case: its peers' best settings, and everything that is measured of them."""

    def __init__(self, inputs: Inputs, case: Case, options: Any, found: dict[str, Any]) -> None:
        """``found``: what other cases with the same peers have found of them, to be added to."""
        self.inputs = inputs
        self._found = found.setdefault(case.like or case.name, {"settings": {}, "rates": {}})
        self.case = case
        self.quick = options.quick
        self.seconds = 1.0 if options.quick else options.seconds
        self.repeats = 1 if options.quick else options.repeats
        self.peers = [peer for peer in case.peers if peer in options.peers]
        self.settings: dict[str, Setting] = {}
        self._again = options.search or options.quick

    def search(self) -> None:
        """Try each peer's settings briefly and keep the best; what was found before is taken again."""
        known = json.loads(_FOUND.read_text()) if _FOUND.exists() and not self._again else {}
        mine = known.setdefault(self.case.like or self.case.name, {})
        mine.update(self._found["settings"])
        self.settings = {peer: Setting(**mine[peer]) for peer in self.peers if peer in mine}
        self._try_all([peer for peer in self.peers if peer not in mine])
        mine.update({peer: asdict(setting) for peer, setting in self.settings.items()})
        self._found["settings"].update(mine)
        if not self.quick:
            _FOUND.write_text(json.dumps(known))

    def _try_all(self, peers: Sequence[str]) -> None:
        for peer in peers:
            found: list[tuple[float, Setting]] = []
            for setting in SETTINGS[peer][: 1 if self.quick else None]:
                try:
                    report = self.closed(peer, setting, min(3.0, self.seconds))
                    found.append((report.throughput, setting))
                    say(
                        f"  {self.case.name}: {peer}, {setting}: {report.throughput:,.0f}/s, p99 {report.p99_ms or 0:.0f} ms"
                    )
                except PeerFailed as error:
                    say(f"  {self.case.name}: {error}")
            if found:
                self.settings[peer] = max(found, key=lambda one: one[0])[1]

    def closed(self, peer: str, setting: Setting | None, seconds: float) -> Report:
        with server(self.inputs, self.case, peer, setting, 60_000.0) as (address, payloads):
            return drive(
                address,
                payloads,
                LoadSettings(concurrency=_CONCURRENCY, duration_s=seconds, warmup_s=min(1.0, seconds / 3)),
            )

    def throughput(self) -> dict[str, Result]:
        """Closed loop at concurrency 128, the peers in turn."""

        def measure(peer: str) -> Mapping[str, Any]:
            report = self.closed(peer, self.settings.get(peer), self.seconds)
            return {
                "per_s": report.throughput,
                "p99_ms": report.p99_ms,
                "client_us": report.client_us,
                "failed": report.failed,
            }

        peers = [Peer(name=peer, measure=lambda peer=peer: measure(peer)) for peer in [SHOAL, *self.settings]]  # type: ignore[misc]
        return common.alternate(peers, self.repeats, "per_s")

    def highest_rate(self, peer: str) -> tuple[float, Report | None]:
        """The highest Poisson rate at which 99 % of all requests come within the SLO."""
        case = self.case
        with server(self.inputs, case, peer, self.settings.get(peer), case.slo_ms) as (address, payloads):

            def probe(rate: float) -> Report:
                settings = LoadSettings(
                    rate=rate, duration_s=self.seconds, warmup_s=min(1.0, self.seconds / 3), slo_s=case.slo_ms / 1e3
                )
                return drive(address, payloads, settings)

            found = sweep(probe, case.start_rate, precision=0.5 if self.quick else 0.07)
        return found.rate or 0.0, found.report

    def best_rate(self) -> tuple[str | None, float]:
        """The peer that holds the SLO at the highest rate, and that rate."""
        rates = self._found["rates"]
        for peer in [peer for peer in self.settings if peer not in (BY_HAND, *rates)]:
            try:
                rates[peer] = self.highest_rate(peer)[0]
            except PeerFailed as error:
                say(f"  {self.case.name}: {error}")
                continue
            say(f"  {self.case.name}: p99 within {self.case.slo_ms:g} ms: {peer} {rates[peer]:,.0f}/s")
        best = max((peer for peer in self.settings if rates.get(peer)), key=lambda peer: rates[peer], default=None)
        return best, rates[best] if best else 0.0

    def overload(self, peer: str, rate: float) -> tuple[Report, dict[str, float]]:
        """A Poisson stream of more than it can answer; and of shoal, what it sees of it itself.

        ``refused_p99_ms`` and ``gateway_us``, the processor time of its gateway for each request that was sent.
        """
        case = self.case
        with server(self.inputs, case, peer, self.settings.get(peer), case.slo_ms) as (address, payloads):
            settings = LoadSettings(
                rate=rate, duration_s=2 * self.seconds, warmup_s=min(1.0, self.seconds / 3), slo_s=case.slo_ms / 1e3
            )
            if peer != SHOAL:
                return drive(address, payloads, settings), {}
            pid = next(row["pid"] for row in _get(address, "/processes") if row["role"] == "gateway")
            before_s = _processor_s(pid)
            report = drive(address, payloads, settings)
            spent_s, sent = _processor_s(pid) - before_s, settings.rate * (settings.duration_s or 0.0)
            said = _get(address, f"/v2/models/{case.model}/stats")["model_stats"][0]["shoal"]
            return report, {"refused_p99_ms": said["refused_p99_ms"] or 0.0, "gateway_us": spent_s / sent * 1e6}


def _processor_s(pid: int) -> float:
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _get(address: wire.Address, path: str) -> Any:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=60)
    connection.request("GET", path)
    return json.loads(connection.getresponse().read())


def alone(inputs: Inputs, case: Case, seconds: float) -> float:
    """Milliseconds that one client waits for an answer, the median."""
    with server(inputs, case, SHOAL, None, 1000.0) as (address, payloads):
        report = drive(address, payloads, LoadSettings(concurrency=1, duration_s=seconds, warmup_s=1.0))
    return report.p50_ms or 0.0


def precision(inputs: Inputs, case: Case) -> str:
    """How shoal computes the case's model, and what else it tried."""
    with shoal_server(inputs, case, case.slo_ms, *case.options) as (address, _):
        found = _get(address, f"/v2/models/{case.model}")["precision"]
    tried = [f"{t['name']}: {t['speedup']:.2f} × as fast, cosine ≥ {t['cosine']:.4f}" for t in found["tried"] if t["cosine"]]
    return f"{found['name']} of {'; '.join(tried)}"


def swap(inputs: Inputs, case: Case, rounds: int) -> list[Bar]:
    """p99 while a new version is loaded and takes over, by p99 without, at the same Poisson rate for as long, in turn.

    What is counted begins when the new version is asked for and ends a second after it has taken over, when the old one is gone.
    """
    with shoal_server(inputs, case, 1000.0) as (address, _):
        payloads = inputs.payloads(case, SHOAL, None, address)
        full = drive(address, payloads, LoadSettings(concurrency=16, duration_s=2.0, warmup_s=0.5)).throughput
        settings = LoadSettings(rate=_SWAP_LOAD * full, duration_s=_SWAP_FIRST_S, warmup_s=_SWAP_WARM_S)
        _, took_s = _while_loading(address, case.model, payloads, settings)
        settings = replace(settings, duration_s=took_s + _SWAP_WARM_S + _SWAP_AFTER_S)
        steady, during = list[Report](), list[Report]()
        for number in range(rounds):
            asked = replace(settings, seed=number)
            steady.append(drive(address, payloads, asked))
            report, took_s = _while_loading(address, case.model, payloads, asked)
            during.append(report)
            say(f"  {case.name} at {asked.rate:,.0f}/s: p99 {steady[-1].p99_ms or 0:.2f} ms, while a version is swapped "
                f"{report.p99_ms or 0:.2f} ms (p50 {steady[-1].p50_ms or 0:.2f}, {report.p50_ms or 0:.2f}; "
                f"in {took_s:.1f} s of {asked.duration_s or 0:.1f})")  # fmt: skip
    before_ms, ms = (statistics.median(one.p99_ms or float("nan") for one in reports) for reports in (steady, during))
    title = f"{case.name}: {rounds} swaps at {settings.rate:,.0f}/s"
    return [
        Bar(claim=f"{title}: median p99 ({ms:.2f} ms) by the median without ({before_ms:.2f} ms)",
            value=ms / before_ms, limit=1.5, unit="×"),
        Bar(claim=f"{title}: requests without an answer", value=float(sum(one.errors for one in during)), limit=0.0),
    ]  # fmt: skip


def _while_loading(
    address: wire.Address, model: str, payloads: list[bytes], settings: LoadSettings
) -> tuple[Report, float]:
    """What a stream met with while a model was loaded anew, and how many seconds that took from its being asked."""
    answers: list[tuple[int, float]] = []

    def load() -> None:
        time.sleep(settings.warmup_s)
        began_s = time.monotonic()
        connection = http.client.HTTPConnection(address.host, address.port, timeout=120)
        connection.request("POST", f"/v2/repository/models/{model}/load", b"{}")
        answers.append((connection.getresponse().status, time.monotonic() - began_s))

    loading = threading.Thread(target=load)
    loading.start()
    report = drive(address, payloads, settings)
    loading.join()
    if [status for status, _ in answers] != [200]:
        raise PeerFailed(f"the new version was not loaded: {answers}")
    return report, answers[0][1]


def memory_mb(inputs: Inputs, case: Case, replicas: int) -> float:
    """PSS of all processes of a service, in 10⁶ bytes, after it has answered for a while."""
    import psutil

    with shoal_server(inputs, case, 1000.0, "--replicas", str(replicas)) as (address, pid):
        drive(address, inputs.payloads(case, SHOAL, None, address), LoadSettings(concurrency=8, duration_s=2.0))
        pids = {row["pid"] for row in _get(address, "/processes")} | {pid}
        return sum(psutil.Process(one).memory_full_info().pss for one in pids) / 1e6


def bare(inputs: Inputs, case: Case, setting: Setting, seconds: float) -> Mapping[str, Any]:
    """The model with no server."""
    command = [str(inputs.python), str(PEERS / "bare.py"), str(inputs.text_file), str(seconds)]
    return run_json(command, limit_s=120.0, env=inputs.environment(case, setting, 0))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _throughput_of(measuring: Measuring) -> tuple[Group, list[Bar]]:
    """The table of a case, and what is held against the peers and against the bare model."""
    case, bars = measuring.case, []
    results = measuring.throughput()
    note = f"concurrency {_CONCURRENCY}; " + ", ".join(f"{peer}: {setting}" for peer, setting in measuring.settings.items())
    if case.options:
        note += f"; shoal: {precision(measuring.inputs, case)}"
    references = [peer for peer in measuring.settings if peer != BY_HAND]
    group = Group(title=case.name, note=note, results=results, references=references)
    reference, ours = group.reference(), results[SHOAL]
    if reference is not None and reference.median and ours.median:
        claim, ratio = f"{case.name}: shoal by {reference.name}", ours.median / reference.median
        bars.append(Bar(claim=claim, value=ratio, limit=case.bar, unit="×", at_least=True))
    if ours.details and case.model != "minilm":
        # Where answers take long, what the client does while it waits counts more than what it does for a request.
        client_us = ours.details[-1]["client_us"]
        bars.append(Bar(claim=f"{case.name}: client", value=client_us, limit=40.0, unit="µs a request"))
    if case.model == "minilm" and not case.options and ours.median:
        settings = [Setting(1, threads) for threads in (1, 2)]
        free = max(bare(measuring.inputs, case, setting, measuring.seconds)["per_s"] for setting in settings)
        claim = f"{case.name}: by the bare model, sorted ({free:.0f}/s)"
        bars.append(Bar(claim=claim, value=ours.median / free, limit=0.85, unit="×", at_least=True))
    return group, bars


def measure_case(measuring: Measuring, parts: Sequence[str]) -> tuple[list[Group], list[Bar]]:
    """All that is asked for of one case."""
    case, groups, bars = measuring.case, list[Group](), list[Bar]()
    measuring.search()
    if "throughput" in parts:
        group, bars = _throughput_of(measuring)
        groups.append(group)
    if "rates" in parts or "overload" in parts:
        rate, report = measuring.highest_rate(SHOAL)
        say(f"  {case.name}: p99 within {case.slo_ms:g} ms: shoal {rate:,.0f}/s")
        other, theirs = measuring.best_rate() if "rates" in parts else (None, 0.0)
        if theirs:
            claim = f"{case.name}: Poisson rate, p99 ≤ {case.slo_ms:g} ms ({rate:,.0f}/s), by {other} ({theirs:,.0f}/s)"
            bars.append(Bar(claim=claim, value=rate / theirs, limit=1.5, unit="×", at_least=True))
        if report is not None and rate and "overload" in parts:
            bars += _overloaded(measuring, rate, report, other, theirs)
        elif not rate:
            claim = f"{case.name}: no rate held p99 ≤ {case.slo_ms:g} ms"
            bars.append(Bar(claim=claim, value=None, limit=1.0, unit="/s", at_least=True))
    return groups, bars


def _overloaded(measuring: Measuring, rate: float, peak: Report, other: str | None, theirs: float) -> list[Bar]:
    case = measuring.case
    over, seen = measuring.overload(SHOAL, case.over * rate)
    goodput, best = over.goodput or 0.0, peak.goodput or 0.0
    if other and theirs:
        beside, _ = measuring.overload(other, case.over * theirs)
        say(
            f"  {case.name} at {case.over:g} ×: {other}: goodput {beside.goodput or 0:,.0f}/s of {theirs:,.0f}, "
            f"p99 {beside.p99_ms or 0:,.0f} ms"
        )
    say(f"  {case.name} at {case.over:g} ×: shoal: goodput {goodput:,.0f}/s of {best:,.0f}, p99 {over.p99_ms or 0:.0f} ms, "
        f"refused {over.refused:,}, expired {over.expired:,}, failed {over.failed:,}")  # fmt: skip
    say(f"  processor time for each request that was sent: gateway {seen['gateway_us']:.0f} µs, "
        f"sender {over.client_us or 0:.0f} µs; 99 % were sent no more than {over.late_p99_ms or 0:.0f} ms late")  # fmt: skip
    title = f"{case.name} at {case.over:g} × {rate:,.0f}/s = {case.over * rate:,.0f}/s"
    return [
        Bar(claim=f"{title}: p99 of what was admitted", value=over.p99_ms, limit=case.slo_ms, unit="ms"),
        Bar(
            claim=f"{title}: goodput ({goodput:,.0f}/s) by peak ({best:,.0f}/s)",
            value=goodput / best if best else None,
            limit=0.9,
            unit="×",
            at_least=True,
        ),
        Bar(claim=f"{title}: refusals, p99 ({seen['refused_p99_ms']:.1f} ms in the service)",
            value=over.refused_p99_ms if over.refused else 0.0, limit=10.0, unit="ms"),
    ]


def _others(inputs: Inputs, part: str, quick: bool) -> list[Bar]:
    """What has no peers: one client alone, a swap, memory."""
    cifar = CASES[1]
    if part == "alone":
        free_ms = bare(inputs, cifar, Setting(1, 1), 2.0)["seconds"] * 1e3
        claim = f"one client alone: added to the bare model ({free_ms:.2f} ms)"
        return [Bar(claim=claim, value=alone(inputs, cifar, 4.0) - free_ms, limit=1.0, unit="ms")]
    if part == "swap":
        return swap(inputs, cifar, 1 if quick else _SWAP_ROUNDS)
    bars = []
    for case in (cifar, CASES[2]):
        one, two = (memory_mb(inputs, case, replicas) for replicas in (1, 2))
        claim = f"{case.model}: memory of 2 replicas ({two:.0f} MB) by 1"
        bars.append(Bar(claim=claim, value=two / one, limit=1.5, unit="×"))
    return bars


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="which models and protocols")
    parser.add_argument("--peers", nargs="*", choices=list(SETTINGS), default=list(SETTINGS), help="which peers")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="what to measure")
    parser.add_argument("--search", action="store_true", help="search the peers' settings anew")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    options = parser.parse_args()
    common.leave_on_sigterm()
    machine = common.hardware()
    groups: list[Group] = []
    bars: list[Bar] = []
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        inputs = Inputs(Path(folder), peer_python("serving"))
        by_case = {"throughput", "rates", "overload"} & set(options.parts)
        for case in [case for case in CASES if case.name in options.cases and by_case]:
            try:
                tables, more = measure_case(Measuring(inputs, case, options, found), options.parts)
            except PeerFailed as error:
                say(f"  {case.name}: {error}")
                continue
            groups += tables
            bars += more
        for part in [part for part in ("alone", "swap", "memory") if part in options.parts]:
            say(f"  {part}")
            try:
                bars += _others(inputs, part, options.quick)
            except PeerFailed as error:
                bars.append(Bar(claim=f"{part}: {error}", value=None, limit=0.0))
    name = "serve_quick" if options.quick else "serve"
    return 0 if common.report(name, groups, "requests/s", vars(options), machine, bars) else 1


if __name__ == "__main__":
    sys.exit(main())

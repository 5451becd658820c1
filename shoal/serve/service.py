"""A service: models being served by replicas behind one gateway. The supervisor's part.

It owns what must outlive everybody else, the listening socket and the memory of requests, and puts back whoever dies: a replica's
batches go to another, a gateway's open requests are counted as lost and a new gateway listens on the same socket.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from shoal import bundle
from shoal.cluster.local import find_cores
from shoal.errors import DeadlineError, JobFailed, RequestError, TargetError
from shoal.serve import hugging_face
from shoal.serve.credentials import TlsFiles, read_keys, read_tls
from shoal.serve.fleet import Fleet
from shoal.serve.follow import job_of
from shoal.serve.gate import GateProcess
from shoal.serve.guard import Access, is_loopback
from shoal.serve.listening import address_of, check_grpc, hold, listen
from shoal.serve.messages import (
    AddModel,
    Drain,
    Drained,
    Limits,
    Numbers,
    Open,
    Opened,
    Processes,
)
from shoal.serve.rollout import Trial
from shoal.serve.scaling import ReplicaRange
from shoal.serve.source import describe
from shoal.serve.tolerance import Tolerance
from shoal.serve.tracing import exporters

_POLL_S = 0.05
_OPEN_S = 120.0
_SILENT_S = 10.0
_MOST_DEATHS, _DEATHS_WITHIN_S = 5, 10.0


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """How to serve.

    Attributes:
        slo_ms: the deadline of a request that brings none of its own.
        replicas: how many for each model, or from how many to how many ("1-4"); None: as many as there are cores for.
        host, port: where to listen; port 0 takes a free one.
        grpc_port: where to speak gRPC too; None: nowhere.
        drain_s: how long accepted requests may take at the end.
        cache_mb: by the model's name, how much of its answers to remember, in 10⁶ bytes; "" stands for every other model.
        cache_ttl_s: for how long.
        api_key_file: who may ask: a key a line, ``key`` or ``name:key``; None: everybody.
        rate_limit: requests a second for each key, or without keys for each address; None: any number.
        tls_cert, tls_key: PEM files to speak TLS with; both, or none for plain HTTP.
        tolerance: how far answers may be off; None for what each bundle says.
    """

    slo_ms: float = 50.0
    replicas: int | str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    grpc_port: int | None = None
    drain_s: float = 30.0
    cache_mb: Mapping[str, float] = field(default_factory=dict)
    cache_ttl_s: float = 300.0
    api_key_file: Path | None = None
    rate_limit: float | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tolerance: Tolerance | None = None

    def check(self) -> None:
        """RequestError where a value makes no sense."""
        if not self.slo_ms > 0:
            raise RequestError(f"The SLO is {self.slo_ms:g} ms; give a time above 0, such as 50.")
        ReplicaRange.of(self.replicas)
        for port in (self.port, self.grpc_port or 0):
            if not 0 <= port <= 65535:
                raise RequestError(f"There is no port {port}; give 0 for a free one, or 1 to 65535.")
        if self.grpc_port is not None:
            check_grpc()
        if not self.drain_s >= 0:
            raise RequestError(f"The time to drain is {self.drain_s:g} s; give 0 or more.")
        for size in self.cache_mb.values():
            if not 0 <= size < 1e9:
                raise RequestError(f"A cache of {size:g} MB cannot be made; give 0 or more.")
        if not self.cache_ttl_s > 0:
            raise RequestError(f"Answers are remembered for {self.cache_ttl_s:g} s; give a time above 0.")
        if self.rate_limit is not None and not 0 < self.rate_limit < 1e9:
            raise RequestError(f"A limit of {self.rate_limit:g} requests a second makes no sense; give a number above 0.")

    def access(self) -> Access:
        """Who may ask. RequestError where the file of keys is of no use."""
        keys = () if self.api_key_file is None else read_keys(self.api_key_file)
        return Access(keys=tuple((key.name, key.digest) for key in keys), rate_limit=self.rate_limit)

    def tls(self) -> TlsFiles | None:
        """What to speak TLS with. RequestError where the files are of no use."""
        if self.tls_cert is None and self.tls_key is None:
            return None
        if self.tls_cert is None or self.tls_key is None:
            raise RequestError("TLS needs a certificate and its key; give --tls-cert and --tls-key, or neither.")
        return read_tls(self.tls_cert, self.tls_key)

    @property
    def warning(self) -> str | None:
        """What somebody who serves like this should know."""
        if self.api_key_file is not None or is_loopback(self.host):
            return None
        return f"Whoever reaches {self.host} can use this service; --api-key-file FILE lets in only those with a key."

    def cache_bytes(self, model: str) -> int:
        """How much of a model's answers to remember."""
        return int(1e6 * self.cache_mb.get(model, self.cache_mb.get("", 0.0)))


class Service:
    """What ``serve`` returns. ``url``: where it answers; ``grpc_url``: where it speaks gRPC;
    ``numbers()``: what it has done; ``close()``: drain and end.

    Works as a context manager. The work is done by ``step``, which ``serve`` calls from a thread of its own.
    """

    def __init__(self, models: Mapping[str, Path], options: ServiceOptions) -> None:
        options.check()
        exporters(os.environ)
        strange = sorted(set(options.cache_mb) - {"", *models})
        if strange:
            raise RequestError(f"A cache is asked for {strange[0]}, which is not served; there is {', '.join(models)}.")
        self._options = options
        self._access, self._tls = options.access(), options.tls()
        self.fleet = Fleet(
            models, find_cores(), ReplicaRange.of(options.replicas), self._tell, self._adapt, options.tolerance,
            options.slo_ms / 1e3,
        )  # fmt: skip
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.grpc_url: str | None = None
        # Keeps gRPC's address while no gateway has it.
        self._held: socket.socket | None = None
        self._gate: GateProcess | None = None
        self._reserve: GateProcess | None = None
        self._told: tuple[Any, ...] = ()
        self._drained = False
        self._opened = False
        self._heard = 0.0
        self.gateway_deaths = 0
        self._deaths_s: list[float] = []

    # -- starting ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, load, choose, open. RequestError where the request makes no sense, UserCodeError where the model fails."""
        host, grpc_port = self._options.host, self._options.grpc_port
        self._listening = listen(host, self._options.port)
        self.url = f"{'http' if self._tls is None else 'https'}://{address_of(self._listening)}"
        try:
            if grpc_port is not None:
                self._held = hold(host, grpc_port, "--grpc-port")
                self.grpc_url = address_of(self._held)
            self.fleet.start()
            self._gate = GateProcess()
            self.fleet.load_all()
            self._open(self._gate)
            self._await_opened()
            self._reserve = GateProcess()
        except BaseException:
            self.close()
            raise

    def _open(self, gate: GateProcess) -> None:
        limits = Limits(slo_s=self._options.slo_ms / 1e3, access=self._access)
        gate.send(Open(limits, self.url, self._tls, self.grpc_url), (self._listening.fileno(),))
        self.fleet.open(gate.send)
        self._told = ()
        self._opened = False
        self._heard = time.monotonic()

    def _adapt(self, model: AddModel) -> AddModel:
        """A model's introduction with what the options say of it."""
        # An answer is worth nothing any more when the weights have changed.
        size = 0 if model.live else self._options.cache_bytes(model.signature.name)
        return replace(model, cache_bytes=size, cache_ttl_s=self._options.cache_ttl_s)

    def _await_opened(self) -> None:
        until = time.monotonic() + _OPEN_S
        while not self._opened:
            assert self._gate is not None
            if not self._gate.alive():
                raise JobFailed("The gateway ended while it started; its message is above.")
            if time.monotonic() > until:
                raise DeadlineError(f"The gateway did not open within {_OPEN_S:g} s.")
            self.step(0.02)

    # -- watching ------------------------------------------------------------------------------------------------

    def step(self, timeout_s: float = _POLL_S) -> None:
        """Look once at everybody, waiting ``timeout_s`` at the most for something to happen."""
        self.fleet.step(timeout_s)
        while not self._commands.empty():
            self._commands.get()()
        gate = self._gate
        assert gate is not None
        # Looked at before it is listened to: its last words may come just before its end.
        alive = gate.alive()
        for message in gate.received():
            self._take_in(message)
        if not alive and not self._drained:
            self._replace_gate(gate)
        elif time.monotonic() - self._heard > (_SILENT_S if self._opened else _OPEN_S):
            gate.kill()
        self._tell_processes()

    def _take_in(self, message: Any) -> None:
        self._heard = time.monotonic()
        if isinstance(message, Numbers):
            self.fleet.hear(message.models, self._heard)
        elif isinstance(message, Drained):
            self._drained = True
        elif isinstance(message, Opened):
            self._opened = True
        else:
            self.fleet.take_in(message)

    def _replace_gate(self, dead: GateProcess) -> None:
        self.gateway_deaths += 1
        now = time.monotonic()
        self._deaths_s = [*(at for at in self._deaths_s if now - at < _DEATHS_WITHIN_S), now]
        if len(self._deaths_s) >= _MOST_DEATHS:
            raise JobFailed(
                f"The gateway died {_MOST_DEATHS} times within {_DEATHS_WITHIN_S:g} s; its messages are above."
            )
        dead.close()
        self.fleet.gateway_died()
        self._gate = self._reserve if self._reserve is not None and self._reserve.alive() else GateProcess()
        self._open(self._gate)
        self._reserve = GateProcess()

    def _tell(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        if self._gate is not None:
            self._gate.send(message, fds)

    def _tell_processes(self) -> None:
        gate = self._gate
        assert gate is not None
        state = (gate.pid, *self.fleet.state)
        if state != self._told:
            self._told = state
            self._tell(Processes(tuple(self.processes())))

    def processes(self) -> list[dict[str, Any]]:
        """{role, rank, pid, host} of everybody."""
        host = socket.gethostname()
        rows = [{"role": "supervisor", "rank": 0, "pid": os.getpid(), "host": host}]
        # Any thread may ask, while the one that steps exchanges them.
        for role, gate in (("gateway", self._gate), ("standby", self._reserve)):
            if gate is not None:
                rows.append({"role": role, "rank": 0, "pid": gate.pid, "host": host})
        return rows + self.fleet.processes()

    def numbers(self) -> dict[str, dict[str, Any]]:
        """For each model, the counts of outcomes and what its gateway said last (see ``Desk.numbers``)."""
        return self.fleet.numbers()

    def command(self, work: Callable[[], None]) -> None:
        """Have something done by the thread that steps; from any thread."""
        self._commands.put(work)

    # -- ending --------------------------------------------------------------------------------------------------

    def drain(self) -> bool:
        """Take nothing more in, finish what was accepted; False where that took longer than it may."""
        self._tell(Drain(self._options.drain_s))
        until = time.monotonic() + self._options.drain_s + 2.0
        while not self._drained and time.monotonic() < until:
            self.step()
        return self._drained and not self.fleet.open_requests()

    def close(self) -> None:
        """End everybody at once; safe to call twice."""
        for gate in (self._gate, self._reserve):
            if gate is not None:
                gate.close()
        self._gate = self._reserve = None
        self.fleet.close()
        self._listening.close()
        if self._held is not None:
            self._held.close()


class RunningService:
    """A service that a thread of its own keeps going; what ``shoal.serve`` returns.

    Attributes:
        url: where it answers.
        grpc_url: host:port at which it speaks gRPC, or None.
        models: the names of what it serves.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stop = threading.Event()
        self._started = threading.Event()
        self._error: BaseException | None = None
        # The thread starts the processes: they end when it does, whatever becomes of the one that called.
        self._thread = threading.Thread(target=self._run, name="shoal-service", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error
        self.url, self.grpc_url = service.url, service.grpc_url
        self.models = list(service.fleet.models)

    def _run(self) -> None:
        try:
            self._service.start()
        except BaseException as error:
            self._error = error
            self._started.set()
            return
        self._started.set()
        try:
            while not self._stop.is_set():
                self._service.step()
            self._service.drain()
            self._final = self._service.numbers()
        finally:
            self._service.close()

    def numbers(self) -> dict[str, dict[str, Any]]:
        """For each model, the counts of outcomes, the queue, the latencies."""
        return self._final if hasattr(self, "_final") else self._service.numbers()

    def processes(self) -> list[dict[str, Any]]:
        """{role, rank, pid, host} of everybody."""
        return self._service.processes()

    def load(
        self, name: str, source: str | Path | None = None, *, canary: float | None = None, shadow: bool = False,
        requests: int = 200, tolerance: float | None = None, slower: float = 1.5, within_s: float = 300.0,
    ) -> None:  # fmt: skip
        """Load a new version of a model (or another model) beside what answers, and return when it has the requests.

        Args:
            name: the model's name.
            source: its bundle; None for where it came from.
            canary, shadow, requests, tolerance, slower: how it is tried first, see ``shoal.serve.rollout.Trial``.
            within_s: seconds after which to stop waiting for it; it goes on all the same.

        Raises:
            RequestError: it cannot be loaded, was not right, or was rolled back; the old version goes on answering.
            DeadlineError: it took longer than ``within_s``.
        """
        trial = Trial(canary=canary, shadow=shadow, requests=requests, tolerance=tolerance, slower=slower)
        trial.check()
        path = None if source is None else _bundle_at(str(source), Path("runs"))
        self._do(lambda done: self._service.fleet.load(name, path, trial, done), within_s, f"{name} to be loaded")

    def follow(self, name: str, run: str | Path, say: Callable[[str], None] = lambda sentence: None) -> None:
        """Take each new checkpoint of a run in training, and at last its finished model, as the next version of a model.

        ``say`` is told, from the service's thread, what became of each. TargetError where that cannot be.
        """

        def begin(done: Callable[[str | None], None]) -> None:
            self._service.fleet.follow(name, Path(run), say)
            done(None)

        self._do(begin, 10.0, f"{name} to be followed")

    def unload(self, name: str, within_s: float = 60.0) -> None:
        """Stop serving a model, after what was accepted; the others go on."""
        self._do(lambda done: self._service.fleet.unload(name, done), within_s, f"{name} to be unloaded")

    def _do(self, work: Callable[[Callable[[str | None], None]], None], within_s: float, what: str) -> None:
        """Have the service's thread begin something, and wait until it has ended."""
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def begin() -> None:
            try:
                work(lambda trouble: ended.put(None if trouble is None else RequestError(trouble)))
            except RequestError as error:
                ended.put(error)

        self._service.command(begin)
        try:
            error = ended.get(timeout=within_s)
        except queue.Empty:
            raise DeadlineError(f"Waited {within_s:g} s for {what}.") from None
        if error is not None:
            raise error

    def close(self) -> None:
        """Finish what was accepted and end; safe to call twice."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> RunningService:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def serve(
    *bundles: str | Path, slo_ms: float = 50.0, replicas: int | str | None = None, host: str = "127.0.0.1", port: int = 0,
    grpc_port: int | None = None, drain_s: float = 30.0, cache_mb: float | Mapping[str, float] = 0.0, cache_ttl_s: float = 300.0,
    api_key_file: str | Path | None = None, rate_limit: float | None = None, tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None, tolerance: str | None = None, follow: str | Path | None = None,
) -> RunningService:  # fmt: skip
    """Serve bundles (or run directories) from this process's children; returns when they answer.

    Args:
        bundles: directories; "name=path" serves one under another name than its job's.
        slo_ms: the deadline of a request that brings none of its own, in milliseconds.
        replicas: processes for each model: a number, a range such as "1-4", or None for as many as there are cores for. How
            many of a range is measured at the start, and changes with the load.
        follow: a run in training: each of its checkpoints becomes the next version; without a bundle the first one is waited for.
        host, port: where to listen; port 0 takes a free one.
        grpc_port: where to speak gRPC too; 0 takes a free one, None: nowhere.
        drain_s: how long accepted requests may take when the service is closed.
        cache_mb: how many 10⁶ bytes of each model's answers to remember, or that by the model's name.
        cache_ttl_s: for how long.
        api_key_file: who may ask: a key a line, ``key`` or ``name:key``; None: everybody who reaches the host.
        rate_limit: requests a second for each key, or without keys for each address; None: any number.
        tls_cert, tls_key: PEM files to speak TLS with; both, or none for plain HTTP.
        tolerance: how far answers may be off, such as "cosine=0.99" or "max_error=0.01"; None for what each bundle says.

    Raises:
        TargetError: a directory that is no bundle, or a bundle that cannot be served.
        RequestError: another argument that makes no sense.
        UserCodeError: the model's own code raised.
    """
    caches = cache_mb if isinstance(cache_mb, Mapping) else {"": cache_mb}
    options = ServiceOptions(
        slo_ms=slo_ms, replicas=replicas, host=host, port=port, grpc_port=grpc_port,
        drain_s=drain_s, cache_mb=caches, cache_ttl_s=cache_ttl_s,
        api_key_file=_path(api_key_file), rate_limit=rate_limit, tls_cert=_path(tls_cert), tls_key=_path(tls_key),
        tolerance=None if tolerance is None else Tolerance.parse(tolerance),
    )  # fmt: skip
    if options.warning is not None:
        warnings.warn(options.warning, stacklevel=2)
    models, following = followed([str(b) for b in bundles], _path(follow))
    service = Service(models, options)
    if follow is not None and following is not None:
        service.fleet.follow(following, Path(follow))
    return RunningService(service)


def followed(bundles: list[str], run: Path | None) -> tuple[dict[str, Path], str | None]:
    """(the models to begin with, the one that follows ``run``); without a bundle it is the run's own, when that has one.

    Raises:
        TargetError: nothing of the kind is there.
        RequestError: several models, of which one would follow.
    """
    if run is None:
        return locate(bundles), None
    if not bundles:
        name = job_of(run)
        return ({name: (run / "model").resolve()} if (run / "model" / bundle.DESCRIPTION).is_file() else {}), name
    models = locate(bundles)
    if len(models) > 1:
        raise RequestError("--follow keeps one model current; serve the others by another shoal serve.")
    return models, next(iter(models))


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def locate(targets: list[str], runs: Path = Path("runs")) -> dict[str, Path]:
    """The bundles that targets name: a bundle, a run directory, or a job's name for its latest finished run under ``runs``.

    Raises:
        TargetError: nothing of the kind is there.
    """
    if not targets:
        raise TargetError("There is nothing to serve; give a run directory or a bundle.")
    found: dict[str, Path] = {}
    for target in targets:
        name, equals, place = target.partition("=")
        path = _bundle_at(place if equals else target, runs)
        found[name if equals else str(describe(path).get("name", path.name))] = path
    if len(found) < len(targets):
        raise RequestError("Two models have the same name; give them names, as in NAME=PATH.")
    return found


def _bundle_at(text: str, runs: Path) -> Path:
    path = Path(text)
    if hugging_face.is_folder(path):
        return path.resolve()
    for directory in (path, path / "model"):
        if (directory / bundle.DESCRIPTION).is_file():
            return directory.resolve()
    if path.exists():
        raise TargetError(f"{text} holds no finished model; give a bundle, or a run that has ended.")
    from shoal.observe.runs import list_runs

    rows = [
        row for row in list_runs(runs) if row.job == text and (Path(row.path) / "model" / bundle.DESCRIPTION).is_file()
    ]
    if not rows:
        raise TargetError(f"There is no bundle at {text}, and no finished run of a job of that name; train it first.")
    return (Path(rows[-1].path) / "model").resolve()

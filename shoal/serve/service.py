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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from shoal import bundle
from shoal.cluster import Cluster
from shoal.errors import DeadlineError, JobFailed, RequestError, TargetError
from shoal.serve import hugging_face
from shoal.serve.crew import Crew
from shoal.serve.follow import Follower
from shoal.serve.gate import GateProcess
from shoal.serve.messages import (
    Asked,
    Drain,
    Drained,
    Edition,
    Known,
    Limits,
    Numbers,
    Open,
    Opened,
    Probe,
    Probed,
    Processes,
    Released,
    ReplicaDown,
    ReplicaUp,
    Retire,
    Retired,
    Take,
    Told,
)
from shoal.serve.replica import ModelSource, describe
from shoal.serve.rollout import Rollout, Stage, Trial
from shoal.serve.slots import Outcome

_POLL_S = 0.05
_OPEN_S = 30.0
_BACKLOG = 2048
_SILENT_S = 10.0
_MOST_DEATHS, _DEATHS_WITHIN_S = 5, 10.0


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """How to serve.

    Attributes:
        slo_ms: the deadline of a request that brings none of its own.
        replicas: how many for each model; None to find out by measurement.
        host, port: where to listen; port 0 takes a free one.
        drain_s: how long accepted requests may take at the end.
        cache_mb: by the model's name, how much of its answers to remember, in 10⁶ bytes; "" stands for every other model.
        cache_ttl_s: for how long.
    """

    slo_ms: float = 50.0
    replicas: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    drain_s: float = 30.0
    cache_mb: Mapping[str, float] = field(default_factory=dict)
    cache_ttl_s: float = 300.0

    def check(self) -> None:
        """RequestError where a value makes no sense."""
        if not self.slo_ms > 0:
            raise RequestError(f"The SLO is {self.slo_ms:g} ms; give a time above 0, such as 50.")
        if self.replicas is not None and self.replicas < 1:
            raise RequestError(f"{self.replicas} replicas cannot answer anything; give at least 1, or auto.")
        if not 0 <= self.port <= 65535:
            raise RequestError(f"There is no port {self.port}; give 0 for a free one, or 1 to 65535.")
        if not self.drain_s >= 0:
            raise RequestError(f"The time to drain is {self.drain_s:g} s; give 0 or more.")
        for size in self.cache_mb.values():
            if not 0 <= size < 1e9:
                raise RequestError(f"A cache of {size:g} MB cannot be made; give 0 or more.")
        if not self.cache_ttl_s > 0:
            raise RequestError(f"Answers are remembered for {self.cache_ttl_s:g} s; give a time above 0.")

    def cache_bytes(self, model: str) -> int:
        """How much of a model's answers to remember."""
        return int(1e6 * self.cache_mb.get(model, self.cache_mb.get("", 0.0)))


class Service:
    """What ``serve`` returns. ``url``: where it answers; ``numbers()``: what it has done; ``close()``: drain and end.

    Works as a context manager. The work is done by ``step``, which ``serve`` calls from a thread of its own.
    """

    def __init__(self, models: Mapping[str, Path], options: ServiceOptions) -> None:
        options.check()
        strange = sorted(set(options.cache_mb) - {"", *models})
        if strange:
            raise RequestError(f"A cache is asked for {strange[0]}, which is not served; there is {', '.join(models)}.")
        self._options = options
        self._cores = Cluster.local().cores
        self._sources = dict(models)
        self._crews = [Crew(ModelSource(path, name), self._cores, options.replicas) for name, path in models.items()]
        self._active: dict[str, Crew] = {}
        self._rollouts: dict[str, Rollout] = {}
        self._leaving: list[Crew] = []
        self._followers: list[Follower] = []
        self._unloading: dict[Edition, Callable[[str | None], None]] = {}
        self._versions = dict.fromkeys(models, 1)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate: GateProcess | None = None
        self._reserve: GateProcess | None = None
        self._numbers: dict[str, dict[str, Any]] = {}
        self._told: tuple[Any, ...] = ()
        self._drained = False
        self._opened = False
        self._heard = 0.0
        self.gateway_deaths = 0
        self._deaths_s: list[float] = []

    # -- starting ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, load, choose, open. RequestError where the request makes no sense, UserCodeError where the model fails."""
        self._listening = self._listen()
        host, port = self._listening.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        try:
            for crew in self._crews:
                crew.start()
            self._gate = GateProcess()
            for crew in self._crews:
                crew.load()
            for crew in self._crews:
                crew.choose()
                self._connect(crew)
                self._active[crew.signature.name] = crew
            self._open(self._gate)
            self._await_opened()
            self._reserve = GateProcess()
        except BaseException:
            self.close()
            raise

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._options.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self._options.host, self._options.port))
        except (OSError, UnicodeError) as error:
            listening.close()
            reason = getattr(error, "strerror", None) or "not an address"
            raise RequestError(
                f"Cannot listen on {self._options.host}:{self._options.port} ({reason}); give another --host or --port."
            ) from None
        listening.listen(_BACKLOG)
        return listening

    def _connect(self, crew: Crew) -> None:
        """Tell the gateway what happens to this crew's replicas."""
        edition = crew.edition
        crew.on_up = lambda rank, wake: self._tell(ReplicaUp(edition, rank), (wake,))
        crew.on_down = lambda rank: self._tell(ReplicaDown(edition, rank))

    def _open(self, gate: GateProcess) -> None:
        limits = Limits(slo_s=self._options.slo_ms / 1e3)
        gate.send(Open(limits, self.url), (self._listening.fileno(),))
        for crew in self._crews:
            self._introduce(gate, crew)
        for crew in self._active.values():
            gate.send(Take(crew.edition))
        for rollout in self._rollouts.values():
            self._say_again(gate, rollout)
        gate.send(Known(self._unavailable()))
        self._told = ()
        self._opened = False
        self._heard = time.monotonic()

    def _introduce(self, gate: GateProcess, crew: Crew) -> None:
        options = self._options
        gate.send(
            replace(
                crew.introduction(),
                cache_bytes=options.cache_bytes(crew.signature.name),
                cache_ttl_s=options.cache_ttl_s,
            ),
            (crew.slots.fd, crew.done_fd),
        )
        for rank, wake in crew.ready():
            gate.send(ReplicaUp(crew.edition, rank), (wake,))

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
        if not self._crews:
            time.sleep(timeout_s)
        for crew in list(self._crews):
            crew.poll(timeout_s / len(self._crews))
        while not self._commands.empty():
            self._commands.get()()
        for follower in self._followers:
            follower.look(time.monotonic())
        for rollout in list(self._rollouts.values()):
            self._move_on(rollout)
        gate = self._gate
        assert gate is not None
        for message in gate.received():
            self._take_in(message)
        if not gate.alive() and not self._drained:
            self._replace_gate(gate)
        elif time.monotonic() - self._heard > _SILENT_S:
            gate.kill()
        self._tell_processes()

    def _take_in(self, message: Any) -> None:
        self._heard = time.monotonic()
        if isinstance(message, Released):
            for crew in self._crews:
                if crew.edition == message.edition:
                    crew.release(message.rank)
        elif isinstance(message, Probed):
            self._probed(message)
        elif isinstance(message, Retired):
            self._retired(message.edition)
        elif isinstance(message, Asked):
            self._asked(message)
        elif isinstance(message, Numbers):
            self._numbers = message.models
        elif isinstance(message, Drained):
            self._drained = True
        elif isinstance(message, Opened):
            self._opened = True

    def _replace_gate(self, dead: GateProcess) -> None:
        self.gateway_deaths += 1
        now = time.monotonic()
        self._deaths_s = [*(at for at in self._deaths_s if now - at < _DEATHS_WITHIN_S), now]
        if len(self._deaths_s) >= _MOST_DEATHS:
            raise JobFailed(
                f"The gateway died {_MOST_DEATHS} times within {_DEATHS_WITHIN_S:g} s; its messages are above."
            )
        dead.close()
        for crew in self._crews:
            crew.slots.count(Outcome.LOST, crew.slots.open_requests())
            crew.release_all()
        # Nobody has requests at these any more.
        for crew in list(self._leaving):
            self._move_counts(crew)
            self._retired(crew.edition)
        self._gate = self._reserve if self._reserve is not None and self._reserve.alive() else GateProcess()
        self._open(self._gate)
        self._reserve = GateProcess()

    def _tell(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        if self._gate is not None:
            self._gate.send(message, fds)

    def _tell_processes(self) -> None:
        gate = self._gate
        assert gate is not None
        state = (gate.pid, *(crew.changes for crew in self._crews))
        if state != self._told:
            self._told = state
            self._tell(Processes(tuple(self.processes())))

    def processes(self) -> list[dict[str, Any]]:
        """{role, rank, pid, host} of everybody."""
        host = socket.gethostname()
        rows = [{"role": "supervisor", "rank": 0, "pid": os.getpid(), "host": host}]
        if self._gate is not None:
            rows.append({"role": "gateway", "rank": 0, "pid": self._gate.pid, "host": host})
        if self._reserve is not None:
            rows.append({"role": "standby", "rank": 0, "pid": self._reserve.pid, "host": host})
        return rows + [row for crew in self._crews for row in crew.processes()]

    def numbers(self) -> dict[str, dict[str, Any]]:
        """For each model, the counts of outcomes and what its gateway said last (see ``Desk.numbers``)."""
        found: dict[str, dict[str, Any]] = {}
        for name, crew in self._active.items():
            sharing = [crew, *(old for old in self._leaving if old.signature.name == name)]
            rollout = self._rollouts.get(name)
            if rollout is not None and rollout.stage is Stage.TRYING and not rollout.trial.shadow:
                sharing.append(rollout.crew)
            counts = {o.name.lower(): sum(int(one.slots.counts[o]) for one in sharing) for o in Outcome}
            found[name] = {**self._numbers.get(name, {}), **counts, "replica_deaths": crew.deaths}
            if rollout is not None:
                found[name]["rollout"] = rollout.stage.value
        return found

    @property
    def models(self) -> list[str]:
        return list(self._active)

    @property
    def chosen(self) -> dict[str, str]:
        """For each model, what was tried at the start and what was taken."""
        return {name: crew.why for name, crew in self._active.items()}

    # -- versions ------------------------------------------------------------------------------------------------

    def command(self, work: Callable[[], None]) -> None:
        """Have something done by the thread that steps; from any thread."""
        self._commands.put(work)

    def load(
        self, name: str, source: Path | None = None, trial: Trial | None = None,
        done: Callable[[str | None], None] = lambda trouble: None, checkpoint: Path | None = None,
    ) -> None:  # fmt: skip
        """Load a model anew, or a new one, beside what answers; ``done`` is called with None, or with why it did not come in.

        ``source``: the bundle; None for where it came from last time. ``checkpoint``: whose weights to take instead of the
        bundle's. RequestError where that cannot be begun.
        """
        if name in self._rollouts:
            raise RequestError(f"A new version of {name} is on its way already; wait for it.")
        source = source or self._sources.get(name)
        if source is None:
            raise TargetError(f'There is no model "{name[:80]}" that could be loaded; shoal serve NAME=PATH names one.')
        self._versions[name] = self._versions.get(name, 0) + 1
        self._sources[name] = source
        old = self._active.get(name)
        asked = ModelSource(source, name, str(self._versions[name]), checkpoint)
        crew = Crew(asked, self._cores, self._options.replicas, gentle=True)
        rollout = Rollout(crew, old, trial or Trial(), done)
        rollout.start()
        self._rollouts[name] = rollout

    def follow(self, name: str, run: Path, say: Callable[[str], None] = lambda sentence: None) -> None:
        """Take each new checkpoint of a run, and at last its finished model, as the next version of a model.

        ``say`` is told what became of each. TargetError where there is no such model, or ``run`` is no run's directory.
        """
        if name not in self._sources:
            raise TargetError(f'There is no model "{name[:80]}" to keep current.')

        def load(path: Path, done: Callable[[str | None], None]) -> None:
            if (path / bundle.DESCRIPTION).is_file():
                self.load(name, path, done=done)
            else:
                self.load(name, checkpoint=path, done=done)

        self._followers.append(Follower(run, load, say, self._sources[name]))

    def unload(self, name: str, done: Callable[[str | None], None] = lambda trouble: None) -> None:
        """Give a model no more requests, and end it when it has finished what it had."""
        crew = self._active.get(name)
        if crew is None:
            raise TargetError(f'There is no model "{name[:80]}" to unload.')
        if name in self._rollouts:
            raise RequestError(f"A new version of {name} is on its way; wait for it.")
        self._unloading[crew.edition] = done
        del self._active[name]
        self._retire(crew)
        self._tell(Known(self._unavailable()))

    def _move_on(self, rollout: Rollout) -> None:
        """See whether a new version can take its next step."""
        crew = rollout.crew
        if rollout.stage is Stage.LOADING:
            try:
                if not rollout.loaded():
                    return
            except RequestError as error:
                crew.close()
                return self._finish(rollout, str(error))
            self._connect(crew)
            self._crews.append(crew)
            assert self._gate is not None
            self._introduce(self._gate, crew)
            rollout.stage = Stage.PROBING
            self._tell(Probe(crew.edition))
        elif rollout.stage is Stage.TRYING:
            numbers = self._numbers.get(crew.signature.name, {})
            seen = numbers.get("trial")
            verdict = rollout.trial.verdict(seen, numbers) if seen and seen["version"] == crew.signature.version else None
            if verdict == "":
                self._promote(rollout)
            elif verdict is not None:
                self._give_up(rollout, f"Version {crew.signature.version} of {crew.signature.name} was rolled back: {verdict}.")

    def _probed(self, message: Probed) -> None:
        rollout = self._rollouts.get(message.edition.model)
        if rollout is None or rollout.stage is not Stage.PROBING or rollout.crew.edition != message.edition:
            return
        if message.trouble is not None:
            self._give_up(rollout, f"The new version of {message.edition.model} was not right: {message.trouble}")
        elif rollout.trial.canary is None and not rollout.trial.shadow or message.edition.model not in self._active:
            self._promote(rollout)
        else:
            rollout.stage = Stage.TRYING
            assert self._gate is not None
            self._say_again(self._gate, rollout)

    def _say_again(self, gate: GateProcess, rollout: Rollout) -> None:
        """Tell a gateway where a rollout is."""
        if rollout.stage is Stage.PROBING:
            gate.send(Probe(rollout.crew.edition))
        elif rollout.stage is Stage.TRYING:
            gate.send(Take(rollout.crew.edition, rollout.trial.canary or 1.0, rollout.trial.shadow))

    def _promote(self, rollout: Rollout) -> None:
        crew = rollout.crew
        old = self._active.get(crew.signature.name)
        self._active[crew.signature.name] = crew
        self._tell(Take(crew.edition))
        if old is not None:
            self._retire(old)
        self._finish(rollout, None)

    def _give_up(self, rollout: Rollout, trouble: str) -> None:
        self._retire(rollout.crew)
        self._finish(rollout, trouble)

    def _finish(self, rollout: Rollout, trouble: str | None) -> None:
        del self._rollouts[rollout.crew.source.name or ""]
        self._tell(Known(self._unavailable()))
        rollout.end(trouble)

    def _retire(self, crew: Crew) -> None:
        self._leaving.append(crew)
        self._tell(Retire(crew.edition))

    def _retired(self, edition: Edition) -> None:
        for crew in [crew for crew in self._leaving if crew.edition == edition]:
            self._leaving.remove(crew)
            self._crews.remove(crew)
            crew.close()
        done = self._unloading.pop(edition, None)
        if done is not None:
            done(None)

    def _move_counts(self, crew: Crew) -> None:
        """While there is no gateway: what a version counted is added to what its model's other version counts."""
        heir = self._active.get(crew.signature.name)
        if heir is not None:
            heir.slots.counts[:] += crew.slots.counts
            crew.slots.counts[:] = 0

    def _asked(self, message: Asked) -> None:
        """A client wants a model loaded anew, from where it came from, or unloaded."""

        def tell(trouble: str | None) -> None:
            self._tell(Told(message.number, trouble, 400))

        try:
            if message.load:
                self.load(message.model, None, Trial.from_parameters(message.parameters), tell)
            else:
                self.unload(message.model, tell)
        except TargetError as error:
            self._tell(Told(message.number, str(error), 404))
        except RequestError as error:
            self._tell(Told(message.number, str(error), 400))

    def _unavailable(self) -> dict[str, str]:
        """Models that have a place to be loaded from and do not answer now."""
        return {
            name: "loading" if name in self._rollouts else "unloaded"
            for name in self._sources
            if name not in self._active
        }

    # -- ending --------------------------------------------------------------------------------------------------

    def drain(self) -> bool:
        """Take nothing more in, finish what was accepted; False where that took longer than it may."""
        self._tell(Drain(self._options.drain_s))
        until = time.monotonic() + self._options.drain_s + 2.0
        while not self._drained and time.monotonic() < until:
            self.step()
        return self._drained and not any(crew.slots.open_requests() for crew in self._crews)

    def close(self) -> None:
        """End everybody at once; safe to call twice."""
        for gate in (self._gate, self._reserve):
            if gate is not None:
                gate.close()
        self._gate = self._reserve = None
        for rollout in self._rollouts.values():
            if rollout.crew not in self._crews:
                # Ends what it may be waiting for.
                rollout.crew.close()
            rollout.join()
        for crew in self._crews:
            crew.close()
        self._crews, self._rollouts = [], {}
        self._listening.close()


class RunningService:
    """A service that a thread of its own keeps going; what ``shoal.serve`` returns.

    Attributes:
        url: where it answers.
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
        self.url = service.url
        self.models = service.models

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
        self._do(lambda done: self._service.load(name, path, trial, done), within_s, f"{name} to be loaded")

    def follow(self, name: str, run: str | Path, say: Callable[[str], None] = lambda sentence: None) -> None:
        """Take each new checkpoint of a run in training, and at last its finished model, as the next version of a model.

        ``say`` is told, from the service's thread, what became of each. TargetError where that cannot be.
        """

        def begin(done: Callable[[str | None], None]) -> None:
            self._service.follow(name, Path(run), say)
            done(None)

        self._do(begin, 10.0, f"{name} to be followed")

    def unload(self, name: str, within_s: float = 60.0) -> None:
        """Stop serving a model, after what was accepted; the others go on."""
        self._do(lambda done: self._service.unload(name, done), within_s, f"{name} to be unloaded")

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
    *bundles: str | Path, slo_ms: float = 50.0, replicas: int | None = None, host: str = "127.0.0.1", port: int = 0,
    drain_s: float = 30.0, cache_mb: float | Mapping[str, float] = 0.0, cache_ttl_s: float = 300.0,
) -> RunningService:  # fmt: skip
    """Serve bundles (or run directories) from this process's children; returns when they answer.

    Args:
        bundles: directories; "name=path" serves one under another name than its job's.
        slo_ms: the deadline of a request that brings none of its own, in milliseconds.
        replicas: processes for each model; None finds out by measurement.
        host, port: where to listen; port 0 takes a free one.
        drain_s: how long accepted requests may take when the service is closed.
        cache_mb: how many 10⁶ bytes of each model's answers to remember, or that by the model's name.
        cache_ttl_s: for how long.

    Raises:
        TargetError: a directory that is no bundle, or a bundle that cannot be served.
        RequestError: another argument that makes no sense.
        UserCodeError: the model's own code raised.
    """
    caches = cache_mb if isinstance(cache_mb, Mapping) else {"": cache_mb}
    options = ServiceOptions(
        slo_ms=slo_ms, replicas=replicas, host=host, port=port, drain_s=drain_s, cache_mb=caches, cache_ttl_s=cache_ttl_s
    )
    return RunningService(Service(locate([str(b) for b in bundles]), options))


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

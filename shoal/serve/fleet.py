"""The crews of a service: who answers for each model, who is on the way in, who on the way out. The supervisor's part.

A version of a model is a crew. It comes in by a rollout, gets the requests, and leaves when a newer one has them; whatever
happens here, the gateway is told by messages, and nothing here ever waits.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal import bundle
from shoal.errors import RequestError, TargetError
from shoal.process.templates import Ground
from shoal.ps.keys import READ_KEY
from shoal.serve.crew import PRELOAD, Crew
from shoal.serve.follow import Follower, checkpoints_of
from shoal.serve.messages import (
    AddModel,
    Asked,
    Edition,
    Known,
    Probe,
    Probed,
    Released,
    ReplicaDown,
    ReplicaLeave,
    ReplicaLeft,
    ReplicaUp,
    Retire,
    Retired,
    Take,
    Told,
)
from shoal.serve.rollout import Rollout, Stage, Trial
from shoal.serve.scaling import Change, Load, ReplicaRange, Scaler
from shoal.serve.slots import LIVE, Outcome
from shoal.serve.source import ModelSource
from shoal.serve.tolerance import Tolerance

_CHANGES_KEPT = 32
_AWAITED = "its run has no checkpoint yet that could be taken"

Send = Callable[[Any, tuple[int, ...]], None]


class Fleet:
    """All crews. ``step`` is the heart; ``take_in`` is for what the gateway says."""

    def __init__(
        self, models: Mapping[str, Path], cores: int, replicas: ReplicaRange, send: Send,
        adapt: Callable[[AddModel], AddModel], tolerance: Tolerance | None = None, slo_s: float = 0.05,
    ) -> None:  # fmt: skip
        """``send``: to the gateway that answers, if there is one. ``adapt``: puts the service's options into an introduction."""
        self._send = send
        self._adapt = adapt
        self._cores = cores
        self._replicas = replicas
        self._sources = dict(models)
        self._tolerance = tolerance
        sources = [ModelSource(path, name, tolerance=tolerance) for name, path in models.items()]
        self._ground = Ground(PRELOAD)
        self._crews = [Crew(source, cores, replicas, ground=self._ground) for source in sources]
        self._active: dict[str, Crew] = {}
        self._rollouts: dict[str, Rollout] = {}
        self._leaving: list[Crew] = []
        self._ending: list[threading.Thread] = []
        self._followers: dict[str, Follower] = {}
        # Models whose run had no checkpoint yet when it began to be followed.
        self._awaited: set[str] = set()
        self._unloading: dict[Edition, Callable[[str | None], None]] = {}
        self._versions = dict.fromkeys(models, 1)
        self._slo_s = slo_s
        self._scalers: dict[Edition, Scaler] = {}
        # By the model's name, the latest changes of how many replicas it has: when (seconds since 1970), how many, why.
        self._changes: dict[str, deque[dict[str, Any]]] = {}
        # Told of each of them, in a sentence.
        self.say: Callable[[str], None] = lambda sentence: None
        # What the gateway said last, by the model's name.
        self.gateway_numbers: dict[str, dict[str, Any]] = {}
        # How many gateways there have been: each counts its questions from 1.
        self._gateways = 1

    # -- starting and ending -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the templates; what they are forked from imports torch while the caller goes on."""
        for crew in self._crews:
            crew.start()

    def load_all(self) -> None:
        """Load every model and choose its replicas. UserCodeError where a model fails, TargetError where it cannot be served."""
        for crew in self._crews:
            crew.load()
        for crew in self._crews:
            crew.choose()
            self._connect(crew)
            self._active[crew.signature.name] = crew

    def open(self, send: Send) -> None:
        """Tell a new gateway everything there is."""
        for crew in self._crews:
            self._introduce(send, crew)
        for crew in self._active.values():
            send(Take(crew.edition), ())
        for rollout in self._rollouts.values():
            self._say_again(send, rollout)
        send(Known(self._unavailable()), ())

    def close(self) -> None:
        """End everybody at once."""
        for rollout in self._rollouts.values():
            if rollout.crew not in self._crews:
                # Ends what it may be waiting for.
                rollout.crew.close()
            rollout.join()
            if rollout.crew not in self._crews:
                # It may have begun again meanwhile.
                rollout.crew.end_processes()
        for crew in self._crews:
            crew.close()
        for thread in self._ending:
            thread.join()
        self._ground.close()
        self._crews, self._rollouts, self._ending = [], {}, []

    # -- watching ------------------------------------------------------------------------------------------------

    def step(self, timeout_s: float) -> None:
        """Look once at everybody, waiting ``timeout_s`` at the most for something to happen."""
        self._ground.keep()
        if not self._crews:
            time.sleep(timeout_s)
        for crew in list(self._crews):
            crew.poll(timeout_s / len(self._crews))
        for name, follower in self._followers.items():
            follower.look(time.monotonic())
            if name in self._active:
                live = self._active[name].slots.live
                live[LIVE.LOST], live[LIVE.TRIES] = follower.losses, follower.tries
        for rollout in list(self._rollouts.values()):
            self._move_on(rollout)

    def take_in(self, message: Any) -> None:
        """What the gateway says of crews; the rest is ignored."""
        if isinstance(message, Released):
            for crew in self._crews:
                if crew.edition == message.edition:
                    crew.release(message.rank)
        elif isinstance(message, ReplicaLeft):
            for crew in self._crews:
                if crew.edition == message.edition:
                    crew.end(message.rank)
        elif isinstance(message, Probed):
            self._probed(message)
        elif isinstance(message, Retired):
            self._retired(message.edition)
        elif isinstance(message, Asked):
            self._asked(message)

    def gateway_died(self) -> None:
        """While there is no gateway: its open requests are lost, dead replicas' rings are free, who was leaving has left."""
        self._gateways += 1
        for crew in self._crews:
            crew.slots.count(Outcome.LOST, crew.slots.open_requests())
            crew.stay()
            crew.release_all()
        for crew in list(self._leaving):
            self._move_counts(crew)
            self._retired(crew.edition)

    def processes(self) -> list[dict[str, Any]]:
        """{role, rank, pid, host} of every template, replica and standby, and of what templates are forked from."""
        rows = [row for crew in list(self._crews) for row in crew.processes()]
        pid = self._ground.pid
        return rows if pid is None else [*rows, {"role": "standby", "rank": 0, "pid": pid, "host": socket.gethostname()}]

    @property
    def state(self) -> tuple[int, ...]:
        """Differs when what ``processes`` returns does."""
        return (len(self._crews), self._ground.pid or 0, *(crew.changes for crew in self._crews))

    def open_requests(self) -> int:
        """Accepted requests that have no outcome yet."""
        return sum(crew.slots.open_requests() for crew in self._crews)

    @property
    def models(self) -> Sequence[str]:
        """The names of what answers, or will."""
        return [*self._active, *(name for name in sorted(self._awaited) if name not in self._active)]

    @property
    def chosen(self) -> dict[str, str]:
        """For each model, what was tried at the start and what was taken."""
        return {name: crew.why for name, crew in self._active.items()}

    def numbers(self) -> dict[str, dict[str, Any]]:
        """For each model, the counts of outcomes and what its gateway said last (see ``Desk.numbers``)."""
        found: dict[str, dict[str, Any]] = {}
        for name, crew in list(self._active.items()):
            sharing = [crew, *(old for old in list(self._leaving) if old.signature.name == name)]
            rollout = self._rollouts.get(name)
            if rollout is not None and rollout.stage is Stage.TRYING and not rollout.trial.shadow:
                sharing.append(rollout.crew)
            counts = {o.name.lower(): sum(int(one.slots.counts[o]) for one in sharing) for o in Outcome}
            found[name] = {**self.gateway_numbers.get(name, {}), **counts, "replica_deaths": crew.deaths}
            found[name]["scaling"] = {
                "least": crew.range.least, "most": crew.most_replicas, "changes": list(self._changes.get(name, ())),
            }  # fmt: skip
            if name in self._followers:
                found[name]["follows"] = self._followers[name].numbers()
            if rollout is not None:
                found[name]["rollout"] = rollout.stage.value
        return found

    # -- more and fewer replicas ---------------------------------------------------------------------------------

    def hear(self, numbers: dict[str, dict[str, Any]], now: float) -> None:
        """What the gateway says of each model, twice a second: where it says so, there is one replica more or less."""
        self.gateway_numbers = numbers
        for name, crew in self._active.items():
            # While a version comes or goes, two of them share the cores. Of a model that has just come there are no numbers yet.
            if numbers.get(name) and not crew.range.fixed and name not in self._rollouts and not self._leaving:
                self._scale(name, crew, numbers[name], now)

    def _scale(self, name: str, crew: Crew, said: Mapping[str, Any], now: float) -> None:
        scaler = self._scalers.get(crew.edition)
        if scaler is None:
            scaler = self._scalers[crew.edition] = Scaler(crew.range.least, crew.most_replicas)
        load = Load(said["refused"], said["busy_s"], said["wait_ms"] / 1e3 / self._slo_s)
        change = scaler.decide(now, load, crew.replicas) if crew.settled else None
        if change is not None:
            self.resize(name, change)

    def resize(self, name: str, change: Change) -> None:
        """Give a model one replica more, or have one leave when it has finished what it has; the last one stays."""
        crew = self._active[name]
        if change.by > 0:
            crew.add()
        elif crew.replicas > 1:
            self._tell(ReplicaLeave(crew.edition, crew.remove()))
        count = crew.replicas
        changes = self._changes.setdefault(name, deque(maxlen=_CHANGES_KEPT))
        changes.append({"t": time.time(), "replicas": count, "why": change.why})
        self.say(f"{name}: {count} replica{'s' * (count > 1)} now: {change.why}")

    # -- versions ------------------------------------------------------------------------------------------------

    def load(
        self, name: str, source: Path | None = None, trial: Trial | None = None,
        done: Callable[[str | None], None] = lambda trouble: None, checkpoint: Path | None = None, live: Path | None = None,
    ) -> None:  # fmt: skip
        """Load a model anew, or a new one, beside what answers; ``done`` is called with None, or with why it did not come in.

        ``source``: the bundle; None for where it came from last time. ``checkpoint``: whose weights to take instead of the
        bundle's; ``live``: the run whose weights are taken, and whose updates they follow. RequestError where that cannot begin.
        """
        if name in self._rollouts:
            raise RequestError(f"A new version of {name} is on its way already; wait for it.")
        named, source = source is not None, source or self._sources.get(name)
        if source is None:
            raise TargetError(f'There is no model "{name[:80]}" that could be loaded; shoal serve NAME=PATH names one.')
        if checkpoint is None and live is None and name in self._followers:
            checkpoint, live = self._followers[name].weights_for(source, named)
        self._versions[name] = self._versions.get(name, 0) + 1
        self._sources.setdefault(name, source)
        old = self._active.get(name)
        asked = ModelSource(source, name, str(self._versions[name]), checkpoint, self._tolerance, live)
        crew = Crew(asked, self._cores, self._replicas, gentle=True, ground=self._ground)
        rollout = Rollout(crew, old, trial or Trial(), done)
        rollout.start()
        self._rollouts[name] = rollout

    def follow(self, name: str, run: Path, say: Callable[[str], None] = lambda sentence: None) -> None:
        """Take each new checkpoint of a run, and at last its finished model, as the next version of a model.

        Where there is no such model yet, the run's first checkpoint becomes one. A run that publishes its weights (``ps=…``) is
        followed by its updates instead, as one version. ``say`` is told what became of each. TargetError where ``run`` is no
        run's directory.
        """
        run = run.resolve()

        def load(path: Path, done: Callable[[str | None], None]) -> None:
            if path.name == READ_KEY:
                self.load(name, self._sources.get(name) or checkpoints_of(run), done=done, live=run)
            elif (path / bundle.DESCRIPTION).is_file():
                self.load(name, path, done=done)
            else:
                self.load(name, self._sources.get(name) or checkpoints_of(run), done=done, checkpoint=path)

        self._followers[name] = Follower(run, load, say, self._sources.get(name))
        if name not in self._sources:
            self._awaited.add(name)
            self._tell(Known(self._unavailable()))

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
            self._introduce(self._send, crew)
            rollout.stage = Stage.PROBING
            self._tell(Probe(crew.edition))
        elif rollout.stage is Stage.TRYING:
            numbers = self.gateway_numbers.get(crew.signature.name, {})
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
            self._say_again(self._send, rollout)

    def _say_again(self, send: Send, rollout: Rollout) -> None:
        """Tell a gateway where a rollout is."""
        if rollout.stage is Stage.PROBING:
            send(Probe(rollout.crew.edition), ())
        elif rollout.stage is Stage.TRYING:
            send(Take(rollout.crew.edition, rollout.trial.canary or 1.0, rollout.trial.shadow), ())

    def _promote(self, rollout: Rollout) -> None:
        crew = rollout.crew
        old = self._active.get(crew.signature.name)
        self._active[crew.signature.name] = crew
        self._sources[crew.signature.name] = crew.source.path
        self._awaited.discard(crew.signature.name)
        self._tell(Take(crew.edition))
        if old is not None:
            old.on_lost, old.on_skipped = (lambda reason, ended: None), (lambda sentence: None)
            self._retire(old)
        self._finish(rollout, None)
        follower = self._followers.get(crew.signature.name)
        if follower is not None:
            crew.on_lost, crew.on_skipped = follower.lost, follower.say
        crew.follow()

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
            self._scalers.pop(edition, None)
            self._end(crew)
        done = self._unloading.pop(edition, None)
        if done is not None:
            done(None)

    def _end(self, crew: Crew) -> None:
        """End a crew that has finished. Beside others who answer that takes longer than anybody here may wait."""
        if crew.signature.name not in self._active:
            return crew.close()
        thread = threading.Thread(target=crew.retire, name="shoal-retire", daemon=True)
        thread.start()
        self._ending = [one for one in self._ending if one.is_alive()] + [thread]

    def _move_counts(self, crew: Crew) -> None:
        """While there is no gateway: what a version counted is added to what its model's other version counts."""
        heir = self._active.get(crew.signature.name)
        if heir is not None:
            heir.slots.counts[:] += crew.slots.counts
            crew.slots.counts[:] = 0

    def _asked(self, message: Asked) -> None:
        """A client wants a model loaded anew, from where it came from, or unloaded."""
        asked_by = self._gateways

        def tell(trouble: str | None) -> None:
            # Whoever asked a gateway that is gone was cut off with it; to another gateway the number is another question's.
            if self._gateways == asked_by:
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
        reasons = {name: "unloaded" for name in self._sources} | {name: _AWAITED for name in self._awaited}
        return {
            name: "loading" if name in self._rollouts else reason
            for name, reason in reasons.items()
            if name not in self._active
        }

    def _connect(self, crew: Crew) -> None:
        """Tell the gateway what happens to this crew's replicas."""
        edition = crew.edition
        crew.on_up = lambda rank, wake: self._send(ReplicaUp(edition, rank), (wake,))
        crew.on_down = lambda rank: self._tell(ReplicaDown(edition, rank))

    def _introduce(self, send: Send, crew: Crew) -> None:
        send(self._adapt(crew.introduction()), (crew.slots.fd, crew.done_fd))
        for rank, wake in crew.ready():
            send(ReplicaUp(crew.edition, rank), (wake,))

    def _tell(self, message: Any) -> None:
        self._send(message, ())

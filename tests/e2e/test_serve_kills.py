"""Anybody is killed with -9 at any time under load, and a ledger outside says what became of every request.

``python tests/e2e/test_serve_kills.py --minutes 5`` is the long form.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import bundles

import shoal
from shoal import bundle

_CLIENTS = 6
_SLO_MS = 60_000.0
# A service gives up where its gateway dies five times within ten seconds: that is no accident.
_GATEWAY_EVERY_S, _TEMPLATE_EVERY_S = 4.0, 20.0
_WAIT_S = 120.0


@dataclass
class Ledger:
    """What clients saw. ``outcomes``: by word, each request once; ``twice``: answers to requests that had one."""

    asked: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    twice: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Client(threading.Thread):
    """A closed loop on a connection that is made anew when it is cut. Every request has a number of its own."""

    def __init__(self, url: str, ledger: Ledger, right: Callable[[np.ndarray], np.ndarray], seed: int) -> None:
        super().__init__()
        self._host = url.removeprefix("http://")
        self._ledger, self._right = ledger, right
        self._random = np.random.default_rng(seed)
        self._seed = seed
        self._connection: http.client.HTTPConnection | None = None
        self.stop = threading.Event()
        # How many requests it has begun.
        self.begun = 0

    def run(self) -> None:
        while not self.stop.is_set():
            self.begun += 1
            name = f"{self._seed}-{self.begun}"
            word = self._ask(name)
            with self._ledger.lock:
                self._ledger.asked += 1
                self._ledger.outcomes[word] += 1
            if word != "answered":
                time.sleep(0.05)

    def _ask(self, name: str) -> str:
        rows = self._random.integers(0, 250, (1, 3, 4), dtype=np.uint8)
        body = {"id": name, "inputs": [{"name": "input", "datatype": "UINT8", "shape": [1, 3, 4], "data": rows.ravel().tolist()}]}
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection(self._host, timeout=_WAIT_S)
                self._connection.connect()
        except OSError:
            self._connection = None
            return "not connected"
        try:
            self._connection.request("POST", "/v2/models/odd/infer", json.dumps(body))
            answer = self._connection.getresponse()
            said = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError):
            self._connection.close()
            self._connection = None
            return "cut"
        if answer.status != 200:
            return {429: "refused", 503: "refused", 504: "expired"}.get(answer.status, f"failed {answer.status}: {said}")
        if said["id"] != name:
            self._ledger.twice += 1
        elif not np.allclose(said["outputs"][0]["data"], self._right(rows).ravel(), rtol=1e-5, atol=1e-5):
            self._ledger.wrong.append(name)
        return "answered"


def kills(directory: Path, seconds: float, seed: int) -> tuple[Ledger, Counter[str], dict[str, Any]]:
    """(what clients saw, who was killed how often, what the service counted)."""
    odd = bundles.odd(directory / "odd")
    model, lock = bundle.load(odd), threading.Lock()

    def right(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad(), lock:
            found: np.ndarray = model(torch.from_numpy(rows)).numpy()
        return found

    ledger, killed = Ledger(), Counter[str]()
    with shoal.serve(odd, slo_ms=_SLO_MS, replicas=2) as service:
        clients = [_Client(service.url, ledger, right, seed=100 * seed + k) for k in range(_CLIENTS)]
        for client in clients:
            client.start()
        _kill_at_random(service, clients, random.Random(seed), seconds, killed)
        _until_answers(ledger)
        for client in clients:
            client.stop.set()
        for client in clients:
            client.join()
        time.sleep(1.2)
    numbers = service.numbers()["odd"]
    # Connections are cut by a gateway's death, of each client one, and by nothing else.
    numbers["cut_without_a_death"] = max(0, ledger.outcomes["cut"] - _CLIENTS * killed["gateway"])
    return ledger, killed, numbers


def _kill_at_random(
    service: Any, clients: list[_Client], chance: random.Random, seconds: float, killed: Counter[str]
) -> None:
    until, gateway_s = time.monotonic() + seconds, float("-inf")
    # The template is killed once in each run, however short, and however slow the machine; so is a replica.
    template_s = time.monotonic() - _TEMPLATE_EVERY_S + seconds / 2
    begun = [0] * len(clients)
    while time.monotonic() < until or not killed.keys() >= {"replica", "template"}:
        time.sleep(chance.uniform(0.1, 1.0))
        now = time.monotonic()
        # Over whichever requests somebody has died, they have ended: one over which three replicas have died is given up.
        if any(client.begun <= number for client, number in zip(clients, begun, strict=True)) and now < until + _WAIT_S:
            continue
        role = chance.choices(["replica", "gateway"], [4, 1])[0]
        if now - template_s > _TEMPLATE_EVERY_S:
            role, template_s = "template", now
        elif role == "gateway" and now - gateway_s < _GATEWAY_EVERY_S:
            continue
        pids = [row["pid"] for row in service.processes() if row["role"] == role]
        if pids:
            try:
                os.kill(chance.choice(pids), signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed[role] += 1
            begun = [client.begun for client in clients]
            if role == "gateway":
                gateway_s = now


def _until_answers(ledger: Ledger) -> None:
    """Wait until the last one who was killed has been replaced, and until there is something to check."""
    seen, until = ledger.outcomes["answered"], time.monotonic() + _WAIT_S
    while ledger.outcomes["answered"] < max(seen + 20, 101):
        assert time.monotonic() < until, ledger.outcomes
        time.sleep(0.05)


def _check(ledger: Ledger, killed: Counter[str], numbers: dict[str, Any]) -> None:
    assert set(killed) >= {"replica", "template"}, killed
    assert sum(ledger.outcomes.values()) == ledger.asked
    assert set(ledger.outcomes) <= {"answered", "refused", "cut", "not connected"}, ledger.outcomes
    assert ledger.outcomes["answered"] > 100
    assert not ledger.wrong and ledger.twice == 0
    assert numbers["cut_without_a_death"] == 0, (ledger.outcomes, killed)
    # Whatever was accepted has exactly one outcome; what had none when a gateway died, its client saw cut.
    ended = sum(numbers[word] for word in ("answered", "expired", "failed", "cancelled", "lost"))
    assert numbers["accepted"] == ended, numbers
    assert numbers["failed"] == numbers["expired"] == 0
    cut, unseen = ledger.outcomes["cut"], numbers["answered"] - ledger.outcomes["answered"]
    assert 0 <= unseen <= cut and numbers["lost"] <= cut, (numbers, ledger.outcomes)


def test_every_request_has_one_outcome_whoever_is_killed(tmp_path: Path) -> None:
    _check(*kills(tmp_path, seconds=10.0, seed=3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        ledger, killed, numbers = kills(Path(directory), 60 * arguments.minutes, arguments.seed)
    kinds = ("accepted", "answered", "refused", "expired", "failed", "cancelled", "lost", "cut_without_a_death")
    lost = ledger.asked - sum(ledger.outcomes.values()) + numbers["cut_without_a_death"]
    print(json.dumps({
        "asked": ledger.asked, "outcomes": ledger.outcomes, "killed": killed, "lost": lost, "duplicated": ledger.twice,
        "wrong": len(ledger.wrong), "numbers": {kind: numbers[kind] for kind in kinds},
    }))  # fmt: skip
    _check(ledger, killed, numbers)


if __name__ == "__main__":
    main()

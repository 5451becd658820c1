"""Thousands of bad requests over raw sockets, while a good client keeps asking.

The long form: ``python tests/e2e/test_serve_fuzz.py --requests 20000 [--seed 1]``. It prints what it did as a line of JSON, and
writes a request that was not treated as it should be to tests/corpus/serve/, from where it is sent each time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import bad_requests
import bundles
from bad_requests import Bad

import shoal
from shoal import bundle

_AT_ONCE = 16
_PATIENCE_S = 60.0
# Where nobody knows whether a request is whole, it is ended after this: either outcome is right.
_DOUBT_S = 0.05
_MOST_GROWTH_BYTES = 64 << 20


@dataclass
class Found:
    """What came of it."""

    statuses: Counter[str] = field(default_factory=Counter)
    fine: int = 0
    counted: int = 0
    wrong: list[str] = field(default_factory=list)
    growth_bytes: dict[str, int] = field(default_factory=dict)
    good: int = 0
    good_trouble: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def served(directory: Path) -> Iterator[tuple[str, psutil.Process, list[str]]]:
    """``shoal serve`` of the odd model: (url, process, what it said on standard error, filled in at the end)."""
    command = [sys.executable, "-m", "shoal", "serve", str(bundles.odd(directory / "bundle")), "--replicas", "1",
               "--slo-ms", "60000"]  # fmt: skip
    said: list[str] = []
    with (directory / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"], psutil.Process(process.pid), said
            process.terminate()
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()
    said += (directory / "stderr").read_text().splitlines()


class GoodClient(threading.Thread):
    """Asks one thing after another until it is stopped, and looks whether the answers are right."""

    def __init__(self, url: str, directory: Path, found: Found) -> None:
        super().__init__()
        self._client, self._found = shoal.Client(url, timeout_s=60, retries=0), found
        self._rows = np.random.default_rng(0).integers(0, 250, (64, 3, 4), dtype=np.uint8)
        with torch.no_grad():
            self._right = bundle.load(directory / "bundle")(torch.from_numpy(self._rows)).numpy()
        self.stopped = threading.Event()

    def run(self) -> None:
        for k in itertools.cycle(range(len(self._rows))):
            if self.stopped.is_set():
                break
            try:
                answer = self._client.infer(self._rows[k][None])["output"]
                if not np.allclose(answer[0], self._right[k], rtol=1e-5, atol=1e-5):
                    self._found.good_trouble.append(f"row {k} was answered wrongly")
            except Exception as error:
                self._found.good_trouble.append(repr(error))
            self._found.good += 1
            time.sleep(0.001)
        self._client.close()


async def _send(port: int, bad: Bad) -> list[tuple[int, bytes]]:
    """Send a request and return the (status, body) of each answer to it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    answers: list[tuple[int, bytes]] = []
    sending = asyncio.ensure_future(_write(writer, bad))
    try:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while not bad.answers or len(answers) < bad.answers:
                status, body = await _answer(reader, writer, doubtful=bad.cut or bad.maybe_good)
                if status >= 200:
                    answers.append((status, body))
        return answers
    finally:
        sending.cancel()
        writer.transport.abort()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await sending


async def _write(writer: asyncio.StreamWriter, bad: Bad) -> None:
    with contextlib.suppress(ConnectionError):
        writer.write(bad.raw)
        for _ in range(bad.times):
            await writer.drain()
            writer.write(bad.tail)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, doubtful: bool) -> tuple[int, bytes]:
    waiting = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
    if doubtful:
        await asyncio.wait([waiting], timeout=_DOUBT_S)
        if not waiting.done() and not writer.transport.get_write_buffer_size():
            with contextlib.suppress(OSError):
                writer.write_eof()
    head = (await asyncio.wait_for(waiting, _PATIENCE_S)).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    return int(head[9:12]), await asyncio.wait_for(reader.readexactly(length), _PATIENCE_S)


def _judge(bad: Bad, answers: list[tuple[int, bytes]], found: Found) -> str | None:
    """What was not as it should be."""
    if not answers:
        found.statuses["cut"] += 1
        return None if bad.cut else "the connection was cut"
    if len(answers) < bad.answers and not bad.maybe_good:
        return f"{len(answers)} answers came and not {bad.answers}"
    for status, body in answers:
        found.statuses[str(status)] += 1
        if status == 200 and bad.maybe_good:
            found.fine += b'"outputs":[{"name":"output"' in body
            continue
        if bad.counted:
            found.counted += 1
        if not 400 <= status < 500:
            return f"{status} came"
        trouble = _not_one_sentence(body)
        if trouble is not None:
            return trouble
    return None


def _not_one_sentence(body: bytes) -> str | None:
    try:
        said = json.loads(body)["error"]
        sentence = said["message"] if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError):
        return f"the body is no error: {body[:100]!r}"
    if not sentence.endswith((".", "?")) or "Traceback" in sentence or ".py" in sentence or len(sentence) > 1000:
        return f"this is no sentence: {sentence[:300]!r}"
    return None


async def _send_all(port: int, requests: Iterator[Bad], found: Found) -> None:
    async def work() -> None:
        for bad in requests:
            try:
                trouble = _judge(bad, await _send(port, bad), found)
            except asyncio.TimeoutError:
                trouble = f"nothing came within {_PATIENCE_S:g} s"
            if trouble is not None:
                found.wrong.append(f"{bad.name}: {trouble}: {bad.raw[:400]!r}")
                _record(bad)

    await asyncio.gather(*(work() for _ in range(_AT_ONCE)))


def _record(bad: Bad) -> None:
    if __name__ == "__main__" and not bad.times:
        bad_requests.RECORDED.mkdir(parents=True, exist_ok=True)
        (bad_requests.RECORDED / f"{hashlib.sha256(bad.raw).hexdigest()[:12]}.bin").write_bytes(bad.raw)


def fuzz(directory: Path, requests: int, seed: int) -> tuple[Found, list[str]]:
    """Send the corpus and as many more as asked for; return what came of it, and what the service said."""
    found, corpus = Found(), bad_requests.corpus()
    left = max(0, requests - 2 * len(corpus))
    with served(directory) as (url, supervisor, said):
        port = int(url.rpartition(":")[2])
        client = GoodClient(url, directory, found)
        client.start()
        try:
            # First the corpus, so that what is made once and kept is there; then everything, and no more memory than before.
            asyncio.run(_send_all(port, iter(corpus), found))
            watched = {"supervisor": supervisor, "gateway": _gateway(supervisor)}
            before = {name: process.memory_info().rss for name, process in watched.items()}
            more = itertools.chain(
                corpus, bad_requests.generated(left // 4), bad_requests.mutated(left - left // 4, seed)
            )  # fmt: skip
            asyncio.run(_send_all(port, iter(more), found))
        finally:
            client.stopped.set()
            client.join()
        for name, process in watched.items():
            found.growth_bytes[name] = process.memory_info().rss - before[name]
        found.numbers = _numbers(url, found)
    return found, said


def _gateway(supervisor: psutil.Process) -> psutil.Process:
    """The gateway that answers: of the two, the one that the supervisor started first."""
    gateways = [child for child in supervisor.children() if "shoal.serve.gateway" in child.cmdline()]
    return min(gateways, key=lambda process: (process.create_time(), process.pid))


def _numbers(url: str, found: Found) -> dict[str, Any]:
    """What the service has counted, as soon as that is all: a request that was cut may be open still, or be counted last."""
    import urllib.request

    deadline = time.monotonic() + _PATIENCE_S
    while True:
        with urllib.request.urlopen(url + "/v2/models/odd/stats", timeout=60) as answer:
            counts: dict[str, Any] = json.load(answer)["model_stats"][0]["shoal"]
        is_all = counts["accepted"] >= found.good + found.fine and counts["invalid"] >= found.counted
        if (is_all and not counts["open"]) or time.monotonic() > deadline:
            return counts
        time.sleep(0.02)


def _check(found: Found, said: list[str]) -> None:
    numbers = found.numbers
    assert not found.wrong, "\n".join(found.wrong[:20])
    assert not found.good_trouble, found.good_trouble[:5]
    assert found.good > 10
    # Nothing bad was taken in, and everything that came to the model was counted.
    assert numbers["open"] == numbers["failed"] == numbers["lost"] == numbers["expired"] == 0
    assert found.good + found.fine <= numbers["accepted"] <= found.good + found.statuses["200"] + found.statuses["cut"]
    assert numbers["invalid"] >= found.counted
    assert max(found.growth_bytes.values()) < _MOST_GROWTH_BYTES, found.growth_bytes
    assert not any("Traceback" in line for line in said), "\n".join(said[-40:])


def test_bad_requests_cost_nobody_else_anything(tmp_path: Path) -> None:
    _check(*fuzz(tmp_path, 2000, seed=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        began = time.monotonic()
        found, said = fuzz(Path(directory), arguments.requests, arguments.seed)
    kinds = ("accepted", "answered", "invalid", "refused", "cancelled", "failed", "lost")
    print(json.dumps({
        "requests": sum(found.statuses.values()), "statuses": dict(sorted(found.statuses.items())), "good": found.good,
        "good_failed": len(found.good_trouble), "wrong": len(found.wrong), "took_s": round(time.monotonic() - began, 1),
        "growth_mb": {name: round(size / 1e6, 1) for name, size in found.growth_bytes.items()},
        "numbers": {key: found.numbers[key] for key in kinds},
    }))  # fmt: skip
    _check(found, said)


if __name__ == "__main__":
    main()

"""A run whose processes share no memory goes on, with the same weights, whatever malformed is said to it by who has its keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zmq
from plain_torch import assert_equal
from torch import nn
from torch.nn import functional
from torchmetrics.classification import BinaryAUROC

import shoal
from shoal.observe.events import read_events
from shoal.ps import messages, wire
from shoal.ps.endpoint import RunKeys
from shoal.ps.keys import Pair, ReadKey
from shoal.ps.replication import Adopt, Follow, Forward, Together
from shoal.ps.shard import Kept, Push, RowGradients, Snapshot
from shoal.ps.watch import ReadPiece, Watch
from shoal.ps.wire import encode
from shoal.train.remote import words
from shoal.train.remote.lead import RemoteLead

Parts = list[Any]
NOTHING: Any = {"no": [[]]}
"""What no field of any message can be."""


class Clicks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = shoal.ps.Embedding(4, optimizer=shoal.ps.Adagrad(lr=0.1), mode="sum")
        self.out = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        return self.out(self.rows(keys)).squeeze(-1)


def clicks() -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randint(0, 40, (120, 5), generator=torch.Generator().manual_seed(1))
    return keys * 10**12 - 7, (keys[:, 0] > 20).double()


def job() -> shoal.Job:
    return shoal.Job(
        name="clicks", model=lambda: Clicks().double(), train_data=clicks, eval_data=clicks, batch_size=30, epochs=2,
        loss=functional.binary_cross_entropy_with_logits, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
        metrics={"auc": BinaryAUROC()},
    )  # fmt: skip


def broken(head: msgspec.Struct, frames: Sequence[Any] = ()) -> Iterator[Parts]:
    """Ways in which a right message is none."""
    raw, own = encode(head), [bytes(frame) for frame in frames]
    tree = msgspec.msgpack.decode(raw)
    for name in tree:
        yield [msgspec.msgpack.encode({**tree, name: NOTHING}), *own]
    yield [raw[:-1], *own]
    yield [raw, *own, b"more"]
    yield [raw + b"\xdd\xff\xff\xff\xff", *own]
    if own:
        yield [raw, *own[:-1]]
        yield [raw, *own[:-1], own[-1][:-1]]


def noise() -> list[Parts]:
    """What is no message at all, or says that it is longer than it is."""
    return [
        [b""], [b"\xc1"], [b"\xdd\xff\xff\xff\xff"], [b"\xdf\xff\xff\xff\xff"], [b"\x91" * 100_000], [b"\x81\xa4type\xa6pickle"],
        [b"\x82\xa4type\xa4push\xa6number\xdd\xff\xff\xff\xff"], [b"x", *[b""] * 3000], [bytes(17 << 20)],
    ]  # fmt: skip


def a_push(**changes: Any) -> tuple[messages.PushHead, list[Any]]:
    rows = RowGradients(np.arange(2), np.ones(2, np.uint32), torch.zeros(2, 4, dtype=torch.float64))
    head, frames = messages.pack_push(Push(ids=((0, 0, 1 << 20),), rows={0: rows}), 1, staged=True)
    return msgspec.structs.replace(head, **changes), [bytes(frame) for frame in frames]


def to_servers() -> list[Parts]:
    kept = Kept(version=0, settled=(0, 0, 0), ids=(), groups=(), numbers={}, row_shards={})
    snapshot = Snapshot(kept, {"weights/0": torch.zeros(3, dtype=torch.float64)})
    push, frames = a_push()
    _, heads, tensors = messages.pack_snapshot(snapshot)
    right: list[tuple[msgspec.Struct, Sequence[Any]]] = [
        (push, frames), (messages.Put(number=2, kept=kept, tensors=heads, whole=False), tensors),
        (messages.Norm(number=3, ids=((0, 0, 7),)), ()), (messages.Commit(number=4, ids=((0, 0, 7),)), ()),
        (messages.Multiply(number=4, ids=((0, 0, 7),), scale=1.0), ()),
        (messages.Take(5, (0,), {"0": (1,)}), ()), (Watch(6, 0), ()), (ReadPiece(7, 0, 0, False, 0), ()),
        (messages.Hold(number=8, pieces=(0,), row_shards={"0": (1,)}, version=2, settled=(0, 1, 0)), ()),
        (Forward(number=1, push=push), frames), (Follow(8, "tcp://127.0.0.1:1"), ()),
        (Together(number=1, ids=((0, 0, 7),), settled=(0, 0, 0), scale=1.0, groups=None), ()),
        (Adopt(number=1, kept=kept, tensors=heads, waiting=()), tensors),
    ]  # fmt: skip
    none, far = float("nan"), 1 << 61
    sizes: list[Any] = [
        ((-1,), ()), ((0, far, far), (b"",)), ((far, far), (b"",)), ((2,), (bytes(3),)), ((1,), (b"\xff",)),
    ]  # fmt: skip
    changed: list[dict[str, Any]] = [
        {"ids": ()}, {"ids": ((0, 0, 9), (0, 0, 9))}, {"ids": ((-1, 0, 0),)}, {"settled": (9, 0, 0)}, {"settled": (0, -1, 0)},
        {"scale": none}, {"scale": 1e300}, {"step": -1}, {"step": far * 2}, {"groups": ({"lr": none},)}, {"groups": ({},) * 99},
        {"groups": ({"params": 1},)}, {"dense": (messages.Block(0),)}, {"dense": (messages.Block(-1),)}, {"rows": ()},
        {"rows": (messages.RowBlock(0, -2),)}, {"rows": (messages.RowBlock(0, far),)}, {"rows": (messages.RowBlock(7, 2),)},
        {"rows": (messages.RowBlock(0, 2, "zip"),)}, {"rows": (messages.RowBlock(0, 2, "bf16"),)},
    ]  # fmt: skip
    wrong = [[encode(a_push(**change)[0]), *frames] for change in changed]
    # A key twice, and gradients that are no numbers.
    wrong += [[encode(push), bytes(16), *frames[1:]], [encode(push), *frames[:2], np.full(8, np.nan).tobytes()]]
    for shape, data in sizes:
        head = messages.Put(number=2, kept=kept, tensors=(messages.Tensor("weights/0", "float64", shape),), whole=True)
        wrong.append([encode(head), *data])
    for name in ("weights/-1", "rows/0/keys", "state.step/0", "rows/9/keys", "weights/²", "x"):
        head = messages.Put(number=2, kept=kept, tensors=(messages.Tensor(name, "float64", (1,)),), whole=False)
        wrong.append([encode(head), bytes(8)])
    wrong += [[encode(messages.PullRows(6, 0, -1)), b""], [encode(messages.PullRows(6, 0, 2)), bytes(15)]]
    wrong += [[encode(messages.PullRows(6, 5, 2)), bytes(16)], [encode(messages.PullRows(6, 0, 2, -5)), bytes(16)]]
    # What else is in a message that has no frames is not looked at by whom it is for: only its fields can be wrong.
    return [*wrong, *noise(), *(parts for head, own in right for parts in broken(head, own) if own or len(parts) == 1)]


def to_lead(lead: RemoteLead) -> list[Parts]:
    row = words.Row(0, (0.0,) * 99, (0, 0))
    sums: Any = {"loss": (1.0, 1.0)}
    right = [
        words.Join(number=1, role="worker", rank=0, pid=1, host="", built=""), words.Claim(1, 0, 1), words.Names(1, ("a",)),
        words.Look(1, "worker", 0), words.Bad(1, 0, (9,), None, ()), words.Leave(1, "worker", 1),
        words.Gone(1, "worker", 0, 1, "", ""), words.Failed(number=1, rank=0, kind="", sentence="", traceback=""),
        words.LogFailed(1, 0, ""),
    ]  # fmt: skip
    wrong: list[tuple[msgspec.Struct, Parts]] = [
        (words.Claim(0, 0, 0), []), (words.Claim(1, 9, 0), []), (words.Claim(1 << 63, 0, 0), []),
        (words.Look(1, "nobody", 0), []), (words.Report(number=1, rank=0, rows=(row,), made=(), buffers=()), []),
        (words.Report(number=1, rank=0, rows=(), made=(1 << 60,) * 2, buffers=()), []),
        (words.Evaluated(number=1, rank=0, epoch=1, sums=sums, seconds=0.0), [b"junk", b""]),
        (words.Evaluated(number=1, rank=0, epoch=1, sums=sums, seconds=float("nan")), [b"", b""]),
        (words.Failed(number=1, rank=0, kind="annotations", sentence="", traceback=""), []), (words.Names(1, ("a", "a")), []),
        # These have the form of words, and nobody may say them: of somebody who is there, and of units that it does not have.
        (words.Join(number=1 << 32, role="worker", rank=0, pid=1, host="", built=lead._built), []),
        (words.Join(number=2 << 32, role="server", rank=0, pid=1, host="", built="", address="tcp://10.0.0.1:1"), []),
        (words.Failed(number=3 << 32, rank=0, kind="JobFailed", sentence="It was turned away.", traceback=""), []),
        (words.Bad(4 << 32, 0, (1 << 40,), None, ()), []), (words.Gone(5 << 32, "server", 0, 1, "", "SIGKILL"), []),
    ]  # fmt: skip
    said = [[encode(head), *frames] for head, frames in wrong]
    return [*noise(), *(parts for head in right for parts in broken(head)), *said]


def say(socket: Any, said: Sequence[Parts], last: bytes) -> None:
    """Say it all, and wait until it has been heard: what comes last is answered."""
    for parts in said:
        socket.send_multipart(parts)
    socket.send(last)
    while b"done" not in (answer := socket.recv()) and b"welcome" not in answer:
        pass


def test_a_run_goes_on_whatever_malformed_is_said_to_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    plain = shoal.train(job(), plan="dp=1,threads=1", run_dir=tmp_path / "one")
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    leads, context = list[RemoteLead](), zmq.Context()
    begin = RemoteLead.begin

    def noted(lead: RemoteLead, *arguments: Any) -> None:
        leads.append(lead)
        begin(lead, *arguments)

    monkeypatch.setattr(RemoteLead, "begin", noted)
    sockets: list[Any] = []

    def reach(keys: RunKeys, address: str) -> Any:
        sockets.append(keys.dealer(context, 0))
        sockets[-1].connect(address)
        sockets[-1].rcvtimeo = 100_000
        return sockets[-1]

    def attack(event: dict[str, Any]) -> None:
        if event["kind"] != "step" or event["step"] != 2:
            return
        (lead,) = leads
        keys = lead._meeting.keys
        for address in lead._chains.heads.values():
            said = [*to_servers()]
            say(reach(keys, address), said, encode(messages.Ping(1 << 40)))
        # Its thread is this one: it hears them when this is over.
        to = reach(keys, lead._meeting.address)
        for parts in to_lead(lead):
            to.send_multipart(parts)
        key = ReadKey.read(lead._directory.path)
        reader = context.socket(zmq.DEALER)
        sockets.append(reader)
        Pair(key.public, key.secret).speak_by(reader, key.publisher)
        reader.rcvtimeo = 100_000
        reader.connect(key.address)
        asked = [wire.Hello(), wire.Next(0), wire.Rows(0, 0, 0, False, 0), wire.Bye()]
        said = [parts for head in asked for parts in broken(head)]
        said += [[encode(wire.Rows(0, table, shard, False, at))] for table, shard, at in ((9, 0, 0), (0, 99, 0), (0, 0, -1))]
        said += [[encode(wire.Next(-5))], [encode(wire.Next(1 << 63, True))], *noise()[:-1]]
        say(reader, said, encode(wire.Hello()))

    run = tmp_path / "run"
    found = shoal.train(job(), plan="ps=2,workers=2,sync,threads=1", run_dir=run, on_event=attack)
    (lead,) = leads
    assert_equal(found.weights(), plain.weights(), within=1e-9)
    assert len(list(read_events(run / "events.jsonl", {"step"}))) == 8
    assert not list(read_events(run / "events.jsonl", {"death", "error", "recovered", "push_rejected"}))
    assert lead._desk.endpoint.dropped > 60
    for socket in sockets:
        socket.close(linger=0)
    context.term()

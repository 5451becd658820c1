"""What is said to a lead and cannot be meant is not taken up, whatever it is; what is right is."""

from __future__ import annotations

import dataclasses
import io
import random
import zipfile
from typing import Any

import pytest
import torch
from mutations import mutated
from torchmetrics.classification import BinaryAUROC, BinaryConfusionMatrix

from shoal.ps import messages
from shoal.ps.ledger import DROPPED, EMPTY, UnitColumns
from shoal.ps.wire import Malformed, encode
from shoal.train import notes
from shoal.train.evaluate import own_copy
from shoal.train.metric_state import metrics_of, pieces_of
from shoal.train.remote import words
from shoal.train.remote.checks import _WIDTH, SaidCheck

METRICS = {"auc": BinaryAUROC(), "confusion": BinaryConfusionMatrix()}
BUFFERS = {"mean": torch.zeros(3), "count": torch.tensor(0)}
CHECK = SaidCheck(workers=2, servers=2, shards=2, sync=False, buffers=BUFFERS, metrics=METRICS, versions=1000)
TOGETHER = SaidCheck(workers=2, servers=2, shards=2, sync=True, buffers=BUFFERS, metrics=METRICS, versions=1000)


def columns(**changes: float) -> tuple[float, ...]:
    found = [0.0] * _WIDTH
    found[UnitColumns.PUSH] = 1.0
    for name, value in changes.items():
        found[getattr(UnitColumns, name)] = value
    return tuple(found)


def report(*rows: words.Row, made: tuple[int, ...] = (5, 5), buffers: dict[str, torch.Tensor] = BUFFERS, rank: int = 0) -> Any:
    heads, frames = messages.pack_tensors(buffers)
    return words.Report(number=1, rank=rank, rows=rows, made=made, buffers=heads), frames


def evaluated(**changes: Any) -> Any:
    metrics = {name: own_copy(metric) for name, metric in METRICS.items()}
    for metric in metrics.values():
        metric.update(torch.tensor([0.2, 0.7, 0.9]), torch.tensor([0, 1, 0]))
    frames = [bytes(notes.to_bytes(pieces_of(metrics))) for _ in range(2)]
    fields = {"number": 1, "rank": 0, "epoch": 1, "sums": {"loss": (1.0, 2.0)}, "seconds": 0.5, **changes}
    return words.Evaluated(**fields), frames


def gives(values: torch.Tensor | None = None, name: str = "sums", **changes: Any) -> Any:
    heads, frames = messages.pack_tensors({name: torch.ones(5) if values is None else values})
    return words.Gives(**{"number": 1, "rank": 0, "unit": 6, "index": 3, "shards": (0, 1), "values": heads, **changes}), frames


ROW = words.Row(3, columns(), (1, 1))
RIGHT = [
    report(ROW, words.Row(4, columns(PUSH=EMPTY, LOSS=float("nan")), ())), evaluated(), report(rank=1, made=(), buffers={}),
    (words.Join(number=1, role="server", rank=1, pid=5, host="here", built="x", address="tcp://10.0.0.1:999"), []),
    (words.Claim(2, 1, 0), []), (words.Look(3, "worker", 1), []), (words.Names(4, ("a",)), []),
    (words.Bad(5, 1, (7,), "w", (1, 2)), []), (words.Failed(number=6, rank=-1, kind="", sentence="no", traceback=""), []),
    (words.LogFailed(7, 1, "full"), []), (words.Gone(8, "worker", 1, 77, "x", "SIGKILL"), []), (words.Leave(9, "server", 0), []),
    (words.Look(10, "keeper", 3), []),
]  # fmt: skip


def test_what_is_right_is_taken() -> None:
    for said, frames in RIGHT:
        CHECK(said, frames)


@pytest.mark.parametrize(
    "said",
    [
        report(words.Row(3, (1.0,), (0,))), report(words.Row(3, columns(PUSH=float("nan")), (1, 1))),
        report(words.Row(3, columns(PUSH=DROPPED), (1, 1))), report(ROW, ROW),
        report(words.Row(3, columns(WEIGHT=float("nan")), (1, 1))), report(ROW, made=()), report(ROW, made=(1, 2, 3)),
        report(ROW, buffers={"mean": torch.zeros(3)}), report(ROW, buffers={**BUFFERS, "mean": torch.zeros(4)}),
        report(ROW, rank=2),
        (words.Claim(1, -1, 0), []), (words.Look(1, "nobody", 0), []), (words.Leave(0, "worker", 0), []),
        (words.Join(number=1, role="server", rank=1, pid=5, host="here", built="x", address="nowhere"), []),
        (words.Names(1, ("a",) * 99), []), (words.Bad(1, 0, (), None, ()), []), (words.Claim(1, 0, 0), [b"x"]),
        evaluated(epoch=0), (evaluated()[0], [b"junk", b""]), (evaluated()[0], [notes.to_bytes([{"auc": 3}])] * 2),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_not(said: Any) -> None:
    with pytest.raises(Malformed):
        CHECK(*said)


def test_of_a_batch_only_what_can_be_added_up_is_taken() -> None:
    TOGETHER(*gives())
    wrong = [
        gives(unit=-1), gives(index=1 << 16), gives(shards=(1,)), gives(shards=(0, 0)), gives(shards=(1, 0)),
        gives(shards=(0, 2)), gives(torch.ones(2, 2)), gives(torch.ones(3, dtype=torch.int64)), gives(name="others"),
        (gives()[0], []),
    ]  # fmt: skip
    for said in wrong:
        with pytest.raises(Malformed):
            TOGETHER(*said)
    with pytest.raises(Malformed, match="no shards of a step"):
        CHECK(*gives())


def test_whoever_is_a_part_of_a_worker_is_one_that_there_is() -> None:
    check = dataclasses.replace(CHECK, partners=2)

    def join(role: str, rank: int, address: str = "") -> words.Join:
        return words.Join(number=1, role=role, rank=rank, pid=5, host="here", built="x", address=address)

    for said in (join("partner", 3), join("worker", 1, "tcp://10.0.0.1:999"), words.Look(1, "keeper", 7)):
        check(said, [])
    wrong = [(check, join("partner", 4)), (check, join("worker", 1)), (CHECK, join("partner", 0)), (check, words.Claim(1, 2, 0))]
    for refusing, said in wrong:
        with pytest.raises(Malformed):
            refusing(said, [])


def packed() -> Any:
    """The same state, in an archive that takes more memory than it has bytes."""
    said, frames = evaluated()
    packed, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(frames[0]))
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return said, [packed.getvalue(), frames[1]]


def wide() -> Any:
    """A tensor that is larger than its bytes."""
    said, frames = evaluated()
    return said, [notes.to_bytes([{"auc": {"tensors": {"x": torch.zeros(1).expand(1 << 40)}}}]), frames[1]]


@pytest.mark.parametrize(
    "said",
    [
        (words.Failed(number=1, rank=0, kind="annotations", sentence="", traceback=""), []),
        (words.Failed(number=1, rank=99, kind="", sentence="", traceback=""), []), (words.Names(1, ("a", "a")), []),
        report(words.Row(3, columns(BEGAN=float("nan")), (1, 1))), report(ROW, made=(1 << 40, 5)), packed(), wide(),
    ],
)  # fmt: skip
def test_what_would_harm_the_lead_later_is_not_taken(said: Any) -> None:
    with pytest.raises(Malformed):
        CHECK(*said)


def test_of_what_is_nearly_right_only_malformed_is_raised() -> None:
    """And what is let through can be taken up."""
    dice, refused = random.Random(1), 0
    right = [(encode(said), [bytes(frame) for frame in frames]) for said, frames in RIGHT]
    for _ in range(3000):
        head, *frames = mutated(dice, *dice.choice(right))
        try:
            said = words.decode_said([head])
            CHECK(said, frames)
        except Malformed:
            refused += 1
            continue
        if isinstance(said, words.Evaluated):
            for frame in frames:
                metrics_of(notes.from_bytes(frame), METRICS)
    assert refused > 1000

"""Readers of a run: what they have is what the servers had, whole, at every moment; strangers and nonsense get nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq

from shoal.errors import DeadlineError, JobFailed, RequestError, TargetError
from shoal.ps import wire
from shoal.ps.keys import Pair, ReadKey
from shoal.ps.publish import Copied, Publisher
from shoal.ps.reader import Reader, _dial, answers

WIDTH = 5000


class Servers:
    """Two servers with a float32 vector each, all of whose numbers are their version: a torn copy would show."""

    def __init__(self) -> None:
        self.values = np.zeros((2, WIDTH), np.float32)
        self.made = [0, 0]
        self.lock = threading.Lock()

    @property
    def tensors(self) -> list[wire.Tensor]:
        return [
            wire.Tensor((f"part.{k}", f"tied.{k}"), "float32", (WIDTH // 2, 2), k * WIDTH * 4) for k in range(len(self.made))
        ]

    @property
    def size(self) -> int:
        return self.values.nbytes

    def versions(self) -> tuple[int, ...]:
        return tuple(self.made)

    tables = ()
    groups = ((0,), (1,))

    def places(self, servers: Sequence[int]) -> list[tuple[int, int]]:
        return [(server * WIDTH * 4, (server + 1) * WIDTH * 4) for server in servers]

    def listen(self) -> None:
        pass

    def copy(self, servers: Sequence[int], out: np.ndarray) -> Copied:
        (server,) = servers
        with self.lock:
            start = server * WIDTH * 4
            out[start : start + WIDTH * 4] = self.values[server].view(np.uint8)
            return Copied((self.made[server],))

    def push(self, server: int) -> None:
        with self.lock:
            self.made[server] += 1
            self.values[server] = self.made[server]


@pytest.fixture(params=["shared memory", "sockets"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if request.param == "sockets":
        # As for a reader on another machine.
        boots = iter(range(1 << 30))
        monkeypatch.setattr("shoal.ps.banks._boot", lambda: str(next(boots)))
    servers = Servers()
    publisher = Publisher(servers, "a-run")
    publisher.read_key.write(tmp_path)
    yield servers, publisher, tmp_path
    if publisher._thread.is_alive():
        publisher.close()


def assert_whole(state: dict[str, torch.Tensor]) -> None:
    for value in state.values():
        assert value.shape == (WIDTH // 2, 2) and (value == value[0, 0]).all()


def test_a_reader_follows_and_never_sees_half_a_push(run):
    servers, _, path = run
    servers.push(0)
    with Reader(path) as reader:
        assert list(reader.state_dict()) == ["part.0", "tied.0", "part.1", "tied.1"]
        assert reader.state_dict()["part.0"][0, 0] == 1
        done = threading.Event()

        def train() -> None:
            while not done.is_set():
                servers.push(0)
                servers.push(1)
                time.sleep(0.001)

        trainer = threading.Thread(target=train)
        trainer.start()
        try:
            number = reader.number
            for _ in range(20):
                number = reader.wait(number + 1)
                state, versions = reader.state_dict(), reader.versions
                assert_whole(state)
                # Between the two looks a newer publication may have come, never an older one.
                assert state["part.0"][0, 0] <= versions[0]
        finally:
            done.set()
            trainer.join()
        reader.wait(reader.number)
        deadline = time.monotonic() + 60
        while reader.versions != servers.versions():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert reader.state_dict()["part.1"][0, 0] == servers.made[1]


def test_only_what_has_changed_is_sent_and_a_slow_reader_skips(run):
    servers, publisher, path = run
    with Reader(path) as reader:
        if reader._copy.shared:
            assert publisher._edition.since(0, shares=True)[0].runs == ()
            return
        first = reader.number
        before = publisher._edition.since(first)
        assert before[0].runs == () and before[1] == b""
        servers.push(1)
        reader.wait(first + 1)
        update, data = publisher._edition.since(first)
        # The blocks of the second vector only: it begins within one that the first one ends in.
        begins, ends = WIDTH * 4 // wire.BLOCK_BYTES, -(-servers.size // wire.BLOCK_BYTES)
        assert update.base == first and update.runs == ((begins, ends - begins),)
        assert publisher._edition.since(0)[0].base == 0 and len(publisher._edition.since(0)[1]) == servers.size
        assert len(data) < servers.size


def test_a_reader_that_was_overtaken_takes_what_is_newer(run):
    servers, publisher, path = run
    with Reader(path) as slow, Reader(path) as quick:
        if not slow._copy.shared:
            return
        # It holds its lock, as while it copies, and so does not hear of newer ones.
        with slow._lock:
            kept = slow._copy
            for _ in range(3):
                servers.push(0)
                quick.wait(quick.number + 1)
            assert not kept.there and slow._copy is kept and quick._copy.there
        assert slow.state_dict()["part.0"][0, 0] == 3 and slow.number > 3
        # What is there stays readable when the run has gone.
        publisher.close()
    assert_whole(slow.state_dict())


def test_load_into_a_model(run):
    servers, _, path = run
    servers.push(0)
    model = torch.nn.Module()
    for k in range(2):
        model.register_parameter(f"p{k}", torch.nn.Parameter(torch.zeros(WIDTH // 2, 2)))
    with Reader(path) as reader:
        with pytest.raises(RequestError, match=r"has no part\.0 .* build it as the job does"):
            reader.load_into(model)
        model.part = torch.nn.ParameterList([torch.zeros(WIDTH // 2, 2), torch.zeros(WIDTH // 2, 2)])
        assert reader.load_into(model) == reader.number
        assert (model.part[0] == 1).all() and (model.part[1] == 0).all()


def test_the_end_of_a_run_is_told_with_the_last_weights(run):
    servers, publisher, path = run
    with Reader(path) as reader:
        servers.push(0)
        publisher.close("It is over.")
        with pytest.raises(DeadlineError, match="It is over"):
            reader.wait(1 << 40)
        assert reader.ended == "It is over." and reader.state_dict()["part.0"][0, 0] == 1


def test_a_stranger_gets_nothing(run, tmp_path):
    _, publisher, path = run
    assert os.stat(path / "read.key").st_mode & 0o77 == 0
    key, stranger = publisher.read_key, Pair.new()
    forged = tmp_path / "forged"
    forged.mkdir()
    ReadKey(key.address, key.publisher, stranger.public, stranger.secret).write(forged)
    with pytest.raises(DeadlineError, match="Nobody has answered .* whether this is the read key that it has now"):
        Reader(forged, deadline_s=1.0)
    deadline = time.monotonic() + 60
    while not publisher._door.refused:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    plain = zmq.Context.instance().socket(zmq.DEALER)
    plain.linger = 0
    plain.connect(key.address)
    plain.send(wire.encode(wire.Hello()))
    assert not plain.poll(500)
    plain.close()
    Reader(path).close()


@pytest.mark.parametrize(
    "frames",
    [
        [], [b""], [b"\xc1"], [b"\x80"], [wire.encode(wire.Hello()), b"more"], [b"\x93" * 1000],
        [b"\x82\xa4type\xa4next\xa4have\xa1x"], [b"\x81\xa4type\xa6pickle"],
    ],
)  # fmt: skip
def test_nonsense_is_dropped_and_harms_nobody(run, frames, caplog):
    servers, publisher, path = run
    key = publisher.read_key
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.curve_serverkey = key.publisher.encode()
    socket.curve_publickey, socket.curve_secretkey = key.public.encode(), key.secret.encode()
    socket.connect(key.address)
    if frames:
        socket.send_multipart(frames)
    socket.send(wire.encode(wire.Hello()))
    assert socket.poll(60_000)
    message, _ = wire.decode_answer(socket.recv_multipart(), None)
    assert isinstance(message, wire.Welcome) and message.size == servers.size
    socket.linger = 1000
    socket.send(wire.encode(wire.Bye()))
    socket.close()
    assert len(caplog.records) == bool(frames)


def test_answers_that_do_not_fit_are_refused():
    def update(runs):
        return wire.encode(wire.Update(1, 0, (1,), 0.0, runs))

    assert wire.decode_answer([update(((0, 1),)), b"x" * 100], 100)[1].nbytes == 100
    for frames in (
        [update(((0, 1),)), b"x" * 99], [update(((0, 1),))], [update(((1, 1),)), b"x"], [update(((-1, 1),)), b"x"],
        [update(((0, 0),))], [update(()), b"x"],
    ):  # fmt: skip
        with pytest.raises(wire.Malformed):
            wire.decode_answer(frames, 100)


def test_bad_keys_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(TargetError, match="give the directory of a run"):
        Reader(tmp_path)
    (tmp_path / "read.key").write_text("{}")
    with pytest.raises(RequestError, match="not a read key"):
        Reader(tmp_path)
    good, publisher = Pair.new(), Pair.new().public
    for address, secret in (("nowhere", good.secret), ("tcp://127.0.0.1:1", "é" * 40), ("tcp://127.0.0.1:1", "x")):
        ReadKey(address, publisher, good.public, secret).write(tmp_path)
        with pytest.raises(RequestError, match="an address or keys that are none; take the one that the run wrote"):
            Reader(tmp_path)
        assert not answers(tmp_path)


def test_readers_have_what_is_newest_before_the_run_is_busy(run, monkeypatch):
    servers, publisher, path = run
    assert publisher.settle(0.0)
    with Reader(path) as reader:
        # Long after this nothing would be looked at by itself.
        monkeypatch.setattr("shoal.ps.publish.PERIOD_S", 3600.0)
        monkeypatch.setattr("shoal.ps.publish.HEARTBEAT_S", 3600.0)
        for made in (1, 2):
            servers.push(0)
            assert publisher.settle(60.0)
            if made == 1:
                reader.wait(2, 60.0)
        assert reader.wait(3, 60.0) == 3 and reader.versions == (2, 0)
        # Somebody who has not asked for weights yet is not waited for longer than that.
        socket = _dial(zmq.Context.instance(), publisher.read_key)
        socket.send(wire.encode(wire.Hello()))
        assert socket.poll(60_000)
        assert not publisher.settle(0.01)
        socket.send(wire.encode(wire.Bye()))
        socket.close()


def test_what_goes_wrong_in_publishing_is_told_and_published_anew(run, monkeypatch, caplog):
    servers, publisher, path = run
    monkeypatch.setattr("shoal.ps.publish._PAUSE_S", 0.0)
    servers.push(0)
    copy, errors = servers.copy, [ValueError("torn"), RuntimeError()]
    with Reader(path) as reader:
        monkeypatch.setattr(servers, "copy", lambda *args: (_ for _ in ()).throw(errors.pop()) if errors else copy(*args))
        number = reader.number
        servers.push(1)
        assert reader.wait(number + 1, 60.0) > number and reader.versions == (1, 1)
        assert_whole(reader.state_dict())
        servers.push(1)
        reader.wait(reader.number + 1, 60.0)
        assert_whole(reader.state_dict())
        with Reader(path) as another:
            assert another.versions == reader.versions == (1, 2)
    told = [publisher.troubles.get(timeout=60) for _ in range(2)]
    assert [": torn)" in sentence for sentence in told] == [False, True] and "RuntimeError" in told[0]
    assert [record.getMessage() for record in caplog.records] == told and caplog.records[0].exc_info


def test_readers_are_told_where_publishing_goes_wrong_again_and_again(run, monkeypatch):
    servers, publisher, path = run
    monkeypatch.setattr("shoal.ps.publish._PAUSE_S", 0.0)
    servers.push(0)
    with Reader(path) as reader:
        monkeypatch.setattr(servers, "copy", lambda *args: [][1])
        number = reader.number
        servers.push(0)
        with pytest.raises(DeadlineError, match=r"went wrong again and again \(IndexError: .*\); it goes on"):
            reader.wait(number + 1, 60.0)
        assert_whole(reader.state_dict())
    with pytest.raises(DeadlineError, match="again and again"):
        Reader(path, 60.0)
    assert publisher.troubles.qsize() == 4


def test_a_reader_says_what_has_gone_wrong_in_its_own_thread(run, monkeypatch, caplog):
    servers, _, path = run
    servers.push(0)
    with Reader(path) as reader:
        monkeypatch.setattr(Reader, "_update", lambda *args: [][1])
        servers.push(0)
        with pytest.raises(JobFailed, match=r"went wrong \(IndexError: .*\); open it anew"):
            reader.wait(reader.number + 1, 60.0)

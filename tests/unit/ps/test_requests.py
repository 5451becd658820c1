"""An answer that is none is dropped, nothing of it is taken over, and what was asked is asked again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch

from shoal.ps import messages
from shoal.ps.client import Client, Patience
from shoal.ps.endpoint import Endpoint, RunKeys
from shoal.ps.messages import Block, Done, Normed, Ping, Pulled, PulledRows, Taken, Tensor
from shoal.ps.shard import Kept
from shoal.ps.wire import encode

KEPT = Kept(version=3, settled=(0, 0, 0), ids=(), groups=(), numbers={}, row_shards={})
WEIGHTS = np.arange(4, dtype=np.float32).tobytes()
Answer = tuple[Callable[[int], Any], list[bytes]]


def pulled(*blocks: int) -> Callable[[int], Any]:
    return lambda n: Pulled(n, 3, tuple(map(Block, blocks)))


def answered(client: Client, endpoint: Endpoint, wrong: list[Answer], right: Answer, ask: Callable[[], Any]) -> Any:
    """What comes of a question that is answered wrongly in all these ways, and then rightly."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    heard = False
    while not heard:
        for identity, frames in endpoint.receive(0.1):
            number = msgspec.msgpack.decode(frames[0])["number"]
            endpoint.send(identity, b"\xdd\xff\xff\xff\xff")
            for make, further in [*wrong, right]:
                endpoint.send(identity, encode(make(number)), further)
            heard = True
    thread.join(60.0)
    return found[0]


def test_what_a_server_answers_is_looked_at_before_it_is_taken_over() -> None:
    keys = RunKeys.new()
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(contextlib.closing(Endpoint(keys)))
        client = stack.enter_context(contextlib.closing(Client({0: endpoint.address}, keys, Patience(60.0, 30.0))))
        done: Answer = (lambda n: Done(n, 3), [])
        written: dict[int, bytes] = {}
        sizes = {0: {0: 16, 1: 8}}

        def pull() -> Any:
            return client.pull(lambda piece, data: written.update({piece: bytes(data)}), sizes=sizes)

        wrong: list[Answer] = [
            done, (pulled(0), [WEIGHTS]), (pulled(0, 1), [WEIGHTS, WEIGHTS]), (pulled(0, 7), [WEIGHTS, bytes(8)]),
            (pulled(0, 1), [WEIGHTS]), (pulled(0, 0), [WEIGHTS, WEIGHTS]), (pulled(), []),
        ]  # fmt: skip
        assert answered(client, endpoint, wrong, (pulled(0, 1), [WEIGHTS, bytes(8)]), pull) == {0: 3}
        assert written == {0: WEIGHTS, 1: bytes(8)}

        rows = (lambda n: PulledRows(n, 3, Tensor("", "float32", (2, 2))), [WEIGHTS])
        wrong = [done, (rows[0], [WEIGHTS[:-1]]), (rows[0], []), (rows[0], [WEIGHTS, b""])]
        found = answered(
            client, endpoint, wrong, rows, lambda: client.pull_rows(0, {0: np.array([5, 9])}, 0, 2, torch.float32)
        )
        assert found[0].tolist() == [[0.0, 1.0], [2.0, 3.0]]

        wrong = [done, *((lambda n, x=x: Normed(n, x), []) for x in (float("nan"), -1.0)), (lambda n: Normed(n, 4.0), [b""])]
        right: Answer = (lambda n: Normed(n, 4.0), [])
        assert answered(client, endpoint, wrong, right, lambda: client.norm_squared([(0, 0, 0)])) == 4.0

        head = Tensor("weights/0", "float32", (4,))
        wrong = [done, (lambda n: Taken(n, KEPT, (head,)), []), (lambda n: Taken(n, KEPT, (head,)), [WEIGHTS[:-1]])]
        taken = answered(client, endpoint, wrong, (lambda n: Taken(n, KEPT, (head,)), [WEIGHTS]), lambda: client.take(0))
        assert taken.tensors["weights/0"].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert answered(client, endpoint, [right, (pulled(), [])], done, lambda: client.ping(0)) == 3
        assert isinstance(messages.decode_answer([encode(Done(1, 2))]), Done)


def test_what_is_large_or_was_sent_again_has_longer_before_it_is_sent_again() -> None:
    patience = Patience(deadline_s=600.0, retry_s=2.0)
    assert [patience.again_s(times, 0) for times in (0, 1, 2, 3, 4, 50)] == [2.0, 2.0, 4.0, 8.0, 16.0, 16.0]
    # Else what a slow server has not read yet fills its memory again and again.
    assert patience.again_s(1, 1_000_000_000) == 52.0
    keys = RunKeys.new()
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(contextlib.closing(Endpoint(keys)))
        client = stack.enter_context(contextlib.closing(Client({0: endpoint.address}, keys, Patience(60.0, 1e6))))
        ticket = client.send(0, Ping, [bytes(1000)])
        client.again(ticket)
        assert (ticket.times, ticket.nbytes) == (1, 1000)
        ticket.sent_at -= 1e6 + 1
        client.again(ticket)
        client.again(ticket)
        assert ticket.times == 2
        # To another one at once.
        client.connect(0, endpoint.address)
        client.again(ticket)
        assert ticket.times == 1

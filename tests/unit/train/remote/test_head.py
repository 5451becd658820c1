"""The head of a worker of several processes, and what its partners hear of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from shoal.train.remote.exchange import Exchange, Order, Told
from shoal.train.remote.head import HeadPasses, _awake


def test_partners_hear_of_a_head_that_waits_for_whomever_but_not_in_the_midst_of_what_they_were_told() -> None:
    orders = list[Order]()
    group = SimpleNamespace(
        rank=0, world_size=1, deadline_s=0.0, prepare=lambda pairs: None,
        broadcast=lambda words, source, what: orders.append(Order(int(words[0]))),
    )  # fmt: skip
    table: Any = SimpleNamespace(buffers=())
    exchange = Exchange(group, 0, SimpleNamespace(), nn.Identity(), table, [[]])  # type: ignore[arg-type]
    asked, server = list[str](), SimpleNamespace(while_waiting=lambda: asked.append("server"))
    lead = SimpleNamespace(while_waiting=lambda: asked.append("lead"))

    def train(step: int, batches: Any, total: int) -> Any:
        # As where the lead is told the names of what the user logs.
        lead.while_waiting()
        yield None, 1

    with _awake(exchange, lead, server):  # type: ignore[arg-type]
        server.while_waiting()
        assert orders == [Order.IDLE]
        passes = HeadPasses(SimpleNamespace(train=train), SimpleNamespace(replica=0), exchange)  # type: ignore[arg-type]
        assert len(list(passes.train(3, [], 8))) == 1
        assert orders == [Order.IDLE, Order.COMPUTE]
        lead.while_waiting()
        server.while_waiting()
        assert orders == [Order.IDLE, Order.COMPUTE, Order.IDLE, Order.IDLE]
        exchange.tell(Told(Order.END))
        lead.while_waiting()
    # Nobody is there any more when the lead is told that this worker is done, or has failed.
    lead.while_waiting()
    server.while_waiting()
    assert orders[4:] == [Order.END]
    assert asked == ["server", "lead", "lead", "server", "lead", "lead", "server"]

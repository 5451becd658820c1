"""A process of a worker that is told what to compute."""

from types import SimpleNamespace
from typing import Any

from shoal.train.remote.exchange import Order, Told
from shoal.train.remote.partner import Partner


def test_a_partner_is_heard_of_with_every_order_also_where_it_waits_for_none() -> None:
    orders, done = iter([Order.WEIGHTS, Order.IDLE, Order.GRADIENTS, Order.END]), list[str]()
    exchange = SimpleNamespace(
        hear=lambda: Told(next(orders)), take_weights=lambda: done.append("took"), give_gradients=lambda: done.append("gave")
    )
    gradients = SimpleNamespace(collect=lambda: done.append("collected"))
    share = SimpleNamespace(exchange=exchange, parts=SimpleNamespace(gradients=gradients))
    Partner(share, 0, lambda: done.append("beat")).serve()  # type: ignore[arg-type]
    assert done == ["beat", "took", "beat", "beat", "collected", "gave"]


def test_a_partner_fetches_when_it_is_told_and_computes_with_that() -> None:
    said = [
        Told(Order.FETCH, 4, 2), Told(Order.IDLE), Told(Order.FETCH, 4, 1), Told(Order.WEIGHTS), Told(Order.COMPUTE, 4, 1, 9),
        Told(Order.END),
    ]  # fmt: skip
    orders, done, feed = iter(said), list[Any](), SimpleNamespace(replica=0)

    def batches(step: int) -> list[tuple[int, int]]:
        done.append(("fetched", step, feed.replica))
        return [(step, feed.replica)]

    def train(*computed: Any) -> list[Any]:
        done.append(computed)
        return []

    feed.batches, passes = batches, SimpleNamespace(train=train)
    exchange = SimpleNamespace(
        hear=lambda: next(orders), take_weights=lambda: done.append("took"),
        share_buffers=lambda: None, return_buffers=lambda: None,
    )  # fmt: skip
    around = SimpleNamespace(replica=0)
    share = SimpleNamespace(exchange=exchange, around=around, parts=SimpleNamespace(feed=feed, passes=passes))
    Partner(share, 0, lambda: None).serve()  # type: ignore[arg-type]
    # Of a shard without samples nothing is computed.
    assert done == [("fetched", 4, 2), ("fetched", 4, 1), "took", (4, [(4, 1)], 9)] and around.replica == 1

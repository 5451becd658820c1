"""A process of a worker that is told what to compute."""

from types import SimpleNamespace

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

"""Who is let in."""

from __future__ import annotations

import zmq

from shoal.ps.keys import Doorkeeper, Pair


def test_a_question_that_is_gone_is_not_waited_for() -> None:
    """Whoever asks may be killed between the poll that told of the question and the look at it."""
    with zmq.Context() as context:
        door = Doorkeeper(context, {Pair.new().public})
        door.attend()
        assert door.refused == 0
        door.close()

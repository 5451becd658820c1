"""What a service makes of its gateway's last words."""

from __future__ import annotations

from typing import Any

from shoal.serve.messages import Drained
from shoal.serve.service import Service, ServiceOptions


class _Leaving:
    """A gateway that says that it is done, and ends, just after somebody has listened to it."""

    pid = 1

    def __init__(self) -> None:
        self._said: list[Any] = []
        self._alive = True

    def alive(self) -> bool:
        return self._alive

    def received(self) -> list[Any]:
        found, self._said = self._said, [Drained()] if self._alive else []
        self._alive = False
        return found

    def send(self, message: Any, fds: tuple[int, ...] = ()) -> None: ...


def test_a_gateway_that_has_finished_is_not_taken_for_one_that_died() -> None:
    service = Service({}, ServiceOptions())
    service._gate = _Leaving()  # type: ignore[assignment]
    service._heard = float("inf")
    for _ in range(2):
        service.step(0.0)
    assert service._drained and service.gateway_deaths == 0

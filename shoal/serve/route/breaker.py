"""A circuit breaker: whoever keeps failing is left alone for a while, then asked once. Pure: time is handed in."""

from __future__ import annotations

_IN_A_ROW = 5
_GAIN = 0.1
_ENOUGH = 10
_SHARE = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
# A trial of which nobody heard again does not keep a service out for ever.
_TRIAL_S = 60.0


class Breaker:
    """Closed: requests go through. Open: none do. Half open: one does, and decides.

    It opens after five faults in a row, or where more than half of the latest requests ended in one. A fault is a connection
    that fails, an answer that breaks off, no answer in time, or 500 and the like: never 4xx, and no refusal (429, 503).
    """

    def __init__(self) -> None:
        self._close()

    def _close(self) -> None:
        self._row = self._seen = 0
        self._share = 0.0
        self._until_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._trial_s: float | None = None

    def state(self, now_s: float) -> str:
        """closed, open or half-open."""
        if self._until_s is None:
            return "closed"
        return "open" if now_s < self._until_s else "half-open"

    def allows(self, now_s: float) -> bool:
        """Whether a request may go through now."""
        state = self.state(now_s)
        if state == "half-open":
            return self._trial_s is None or now_s - self._trial_s > _TRIAL_S
        return state == "closed"

    def begin(self, now_s: float) -> None:
        """A request goes through."""
        if self.state(now_s) == "half-open":
            self._trial_s = now_s

    def fine(self) -> None:
        """One ended well: an answer, a refusal, a 4xx."""
        self._row = 0
        if self._until_s is not None:
            self._close()
            return
        self._seen += 1
        self._share -= _GAIN * self._share

    def fault(self, now_s: float) -> None:
        """One ended in a fault."""
        self._row += 1
        self._seen += 1
        self._share += _GAIN * (1 - self._share)
        if self._until_s is not None:
            # Those that were on their way when it opened say nothing new; the trial does.
            if self._trial_s is not None:
                self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s)
                self._open(now_s)
        elif self._row >= _IN_A_ROW or (self._seen >= _ENOUGH and self._share > _SHARE):
            self._open(now_s)

    def dropped(self) -> None:
        """One ended without saying anything about the service: its client left."""
        self._trial_s = None

    def _open(self, now_s: float) -> None:
        self._until_s, self._trial_s = now_s + self._pause_s, None

"""What a client gets instead of an answer."""

from __future__ import annotations


class Refusal(Exception):
    """An HTTP status of 4xx or 5xx with one sentence for the client; no paths, no tracebacks.

    ``retry_after_s``: after how many seconds it may be worth trying again; None where trying again is of no use.
    """

    def __init__(self, status: int, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.retry_after_s = retry_after_s

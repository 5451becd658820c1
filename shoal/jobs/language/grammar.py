"""Sentences from a small English-like grammar, so that a language model has text without a download.

The grammar is a probabilistic context-free one over made-up word numbers::

    sentence  -> clause STOP                 clause  -> subject verb-phrase
    subject   -> noun-phrase                 noun-phrase -> determiner adjective* noun [relative]
    relative  -> WHO verb-phrase             verb-phrase -> verb [noun-phrase] [adverb] [preposition noun-phrase]

A subject is singular or plural, and its determiner, noun and verb agree, also across a relative clause:
that is what attention has to learn. Words of a class follow Zipf's law. Every choice is made with a known
probability, so the text's entropy is known: no model's mean loss can be below it, and a good one comes near.

Only ``random.Random.random`` is used, whose stream Python promises to keep: the same text on every machine.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random

PAD, START, STOP, WHO = 0, 1, 2, 3
LONGEST = 32  # words in a sentence, START and STOP included

_SIZES = {
    "determiner": 8,
    "noun": 800,
    "verb": 400,
    "adjective": 300,
    "adverb": 100,
    "preposition": 20,
}
_HAS_NUMBER = ("determiner", "noun", "verb")  # one set of words for the singular and one for the plural


def _first_words() -> tuple[dict[tuple[str, int], int], int]:
    first, at = {}, WHO + 1
    for kind, size in _SIZES.items():
        for number in (0, 1) if kind in _HAS_NUMBER else (0,):
            first[kind, number] = at
            at += size
    return first, at


_FIRST, VOCABULARY = _first_words()


def sentences(count: int, seed: int) -> tuple[list[list[int]], float]:
    """Return ``count`` sentences and the text's entropy.

    Each sentence is a list of 5 to ``LONGEST`` word numbers below ``VOCABULARY``, from START to STOP. The entropy
    is in nats per predicted word (all words but START), as the mean of the choices made in these sentences;
    longer sentences are thrown away, which makes it too high by less than a hundredth.
    """
    writer = _Writer(seed)
    made: list[list[int]] = []
    nats = 0.0
    while len(made) < count:
        words, cost = writer.sentence()
        if len(words) <= LONGEST:
            made.append(words)
            nats += cost
    return made, nats / sum(len(words) - 1 for words in made)


class _Writer:
    """Writes one sentence after the other, and counts what each choice cost in nats."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._words: list[int] = []
        self._nats = 0.0
        self._cumulative = {}
        for kind, size in _SIZES.items():
            weights = [1.0 / rank for rank in range(1, size + 1)]
            total = sum(weights)
            self._cumulative[kind] = list(itertools.accumulate(weight / total for weight in weights))

    def sentence(self) -> tuple[list[int], float]:
        self._words, self._nats = [START], 0.0
        number = self._noun_phrase(depth=0)
        self._verb_phrase(number, depth=0)
        self._words.append(STOP)
        return self._words, self._nats

    def _noun_phrase(self, depth: int) -> int:
        number = int(self._chance(0.4))
        self._word("determiner", number)
        while self._chance(0.35):
            self._word("adjective")
        self._word("noun", number)
        if self._chance(0.3 / (depth + 1)):
            self._words.append(WHO)
            self._verb_phrase(number, depth + 1)
        return number

    def _verb_phrase(self, number: int, depth: int) -> None:
        self._word("verb", number)
        if self._chance(0.75):
            self._noun_phrase(depth + 1)
        if self._chance(0.2):
            self._word("adverb")
        if self._chance(0.35):
            self._word("preposition")
            self._noun_phrase(depth + 1)

    def _chance(self, probability: float) -> bool:
        happened = self._random.random() < probability
        self._nats -= math.log(probability if happened else 1.0 - probability)
        return happened

    def _word(self, kind: str, number: int = 0) -> None:
        cumulative = self._cumulative[kind]
        rank = min(bisect.bisect_right(cumulative, self._random.random()), len(cumulative) - 1)
        self._nats -= math.log(cumulative[rank] - (cumulative[rank - 1] if rank else 0.0))
        self._words.append(_FIRST[kind, number] + rank)

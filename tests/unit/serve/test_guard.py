"""Keys and buckets: who is let in, and how often."""

from __future__ import annotations

import hashlib

import pytest

from shoal.serve.guard import Access, Buckets, Guard, is_loopback, network_of
from shoal.serve.refusals import Refusal


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _access(**keys: str) -> Access:
    return Access(keys=tuple((name, hashlib.sha256(key.encode()).digest()) for name, key in keys.items()))


class TestKeys:
    def test_whose_key_it_is(self) -> None:
        guard = Guard(_access(anna="a" * 16, otto="o" * 16))
        assert guard.admit(b"o" * 16, "10.0.0.1") == "otto"
        assert guard.admit(b"a" * 16, None) == "anna"

    @pytest.mark.parametrize("key", [None, b"", b"a" * 15, b"a" * 17, b"\xff" * 16])
    def test_no_other_key(self, key: bytes | None) -> None:
        with pytest.raises(Refusal) as refused:
            Guard(_access(anna="a" * 16)).admit(key, "127.0.0.1")
        assert refused.value.status == 401 and refused.value.sentence.endswith(".")

    def test_an_empty_key_is_never_one(self) -> None:
        with pytest.raises(Refusal):
            Guard(Access(keys=(("empty", hashlib.sha256(b"").digest()),))).admit(b"", None)

    def test_open(self) -> None:
        assert Access().open and not Access(rate_limit=1).open and not _access(a="a" * 16).open


class TestBuckets:
    def test_so_many_a_second(self) -> None:
        clock = _Clock()
        buckets = Buckets(4, clock)
        assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0]
        assert buckets.take("a") == pytest.approx(0.25)
        assert buckets.take("b") == 0
        clock.now += 0.25
        assert buckets.take("a") == 0 and buckets.take("a") > 0
        clock.now += 1000
        assert [bool(buckets.take("a")) for _ in range(5)] == [False] * 4 + [True]

    def test_less_than_one_a_second(self) -> None:
        clock = _Clock()
        buckets = Buckets(0.1, clock)
        assert buckets.take("a") == 0 and buckets.take("a") == pytest.approx(10)
        clock.now += 10
        assert buckets.take("a") == 0

    def test_the_table_is_bounded(self) -> None:
        buckets = Buckets(1, _Clock(), most=3)
        for name in "abcda":
            assert buckets.take(name) == 0  # a was forgotten by the time it comes again
        assert len(buckets) == 3 and buckets.take("d") > 0

    def test_the_guard_counts_by_key_or_by_address(self) -> None:
        guard = Guard(Access(rate_limit=1), _Clock())
        guard.admit(None, "10.0.0.1")
        guard.admit(None, "10.0.0.2")
        with pytest.raises(Refusal) as refused:
            guard.admit(b"some key", "10.0.0.1")
        assert refused.value.status == 429 and refused.value.retry_after_s == pytest.approx(1)
        keyed = Guard(Access(keys=_access(a="a" * 16).keys, rate_limit=1), _Clock())
        keyed.admit(b"a" * 16, "10.0.0.1")
        with pytest.raises(Refusal):
            keyed.admit(b"a" * 16, "10.0.0.2")

    def test_wrong_keys_use_up_what_their_address_may_ask(self) -> None:
        turned: list[str] = []
        guard = Guard(Access(keys=_access(a="a" * 16).keys, rate_limit=2), _Clock(), turned.append)
        statuses = []
        for key in (b"b" * 16, None, b"c" * 16):
            with pytest.raises(Refusal) as refused:
                guard.admit(key, "10.0.0.1")
            statuses.append(refused.value.status)
        assert statuses == [401, 401, 429] and turned == ["key", "key", "rate"]
        assert guard.admit(b"a" * 16, "10.0.0.1") == "a"


def test_addresses() -> None:
    assert network_of("10.1.2.3") == network_of("::ffff:10.1.2.3") == "10.1.2.3"
    assert network_of("2001:db8::1") == network_of("2001:db8::2:1") != network_of("2001:db8:0:1::1")
    assert network_of(None) == network_of("what") == "unknown"
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("myhost")

"""Heads that were read before."""

from __future__ import annotations

from shoal.serve.heads import Heads

_HEAD = b"POST /a HTTP/1.1\r\nContent-Length: 4\r\n\r\n"


def test_only_a_whole_request_with_the_same_head_is_known() -> None:
    heads = Heads()
    assert heads.find(_HEAD + b"body") is None
    heads.keep(_HEAD + b"body", 4, "a")
    assert heads.find(_HEAD + b"next") == ("a", b"next")
    assert heads.find(_HEAD + b"\r\n\r\n") == ("a", b"\r\n\r\n")
    for other in (_HEAD + b"bod", _HEAD + b"bodies", _HEAD.lower() + b"body", b"\r\n" + _HEAD + b"body", b"", _HEAD[:-4]):
        assert heads.find(other) is None


def test_what_a_parser_reads_in_another_way_is_not_kept() -> None:
    heads = Heads()
    # Ended by two line feeds, as some parsers allow: the blank line that stands in the body is not its end.
    piece = b"POST /a HTTP/1.1\nContent-Length: 6\n\n..\r\n\r\n"
    heads.keep(piece, 6, "a")
    assert heads.find(piece) is None
    long = b"POST /a HTTP/1.1\r\nA: " + b"a" * 2000 + b"\r\nContent-Length: 4\r\n\r\nbody"
    heads.keep(long, 4, "a")
    assert heads.find(long) is None


def test_they_are_bounded() -> None:
    heads = Heads()
    for number in range(1000):
        heads.keep(b"POST /%d HTTP/1.1\r\n\r\n" % number, 0, number)
    assert heads.find(b"POST /999 HTTP/1.1\r\n\r\n") == (999, b"") and heads.find(b"POST /0 HTTP/1.1\r\n\r\n") is None

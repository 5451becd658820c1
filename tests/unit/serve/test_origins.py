"""Web pages of other places may not load or unload models."""

from __future__ import annotations

import pytest

from shoal.serve.origins import check_origin
from shoal.serve.refusals import Refusal


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"host": b"myhost:8000"},
        {b"host": b"127.0.0.1:8000", b"origin": b"http://127.0.0.1:8000", b"sec-fetch-site": b"same-origin"},
        {b"host": b"localhost:8000", b"origin": b"http://localhost:8000"},
        {b"host": b"[::1]:8000", b"origin": b"http://[::1]:8000"},
    ],
)
def test_our_own_page_and_what_is_no_browser(headers: dict[bytes, bytes]) -> None:
    check_origin(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {b"host": b"127.0.0.1:8000", b"origin": b"https://evil.example"},
        {b"host": b"127.0.0.1:8000", b"origin": b"http://127.0.0.1:8001"},
        {b"host": b"127.0.0.1:8000", b"origin": b"null"},
        {b"host": b"127.0.0.1:8000", b"origin": b"http://[::1"},
        {b"host": b"evil.example:8000", b"origin": b"http://evil.example:8000"},
        {b"host": b"127.0.0.1:8000", b"sec-fetch-site": b"cross-site"},
    ],
)
def test_other_pages(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(Refusal) as refused:
        check_origin(headers)
    assert refused.value.status == 403

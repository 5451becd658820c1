"""Whether a request comes from a web page that is not ours. A browser sends requests for any page, from inside this machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from shoal.serve.refusals import Refusal


def check_origin(headers: Mapping[bytes, bytes]) -> None:
    """Refusal (403) where a page of another place asks; who is no browser sends none of these headers and may go on.

    A page's own host may be a name that somebody made to point here (DNS rebinding): so only addresses and localhost are us.
    """
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site", b"none")
    ours = origin is None or _is_ours(origin.decode("latin-1"), headers.get(b"host", b"").decode("latin-1"))
    if not ours or site in (b"cross-site", b"same-site"):
        raise Refusal(403, "A page of another place may not do this; ask without a browser, or serve with --api-key-file.")


def _is_ours(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
        name, same = parts.hostname or "", parts.netloc.lower() == host.lower()
    except ValueError:
        return False
    if name == "localhost":
        return same
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return same

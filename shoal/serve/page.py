"""The web page at ``/``: one file without anything from elsewhere, and the JSON that it asks for once a second."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.serve.desk import Desk
from shoal.serve.signature import layout_of

_FILE = Path(__file__).with_name("page.html")
_MOST_LABELS = 100
_SHOWN = ("answered", "refused", "expired", "failed", "cancelled", "open", "queued", "replicas", "batches", "rows",
          "p50_ms", "p95_ms", "p99_ms")  # fmt: skip


@functools.cache
def page() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """(the page, its headers): its own script runs and no other, and nobody may put it into a frame."""
    content = _FILE.read_bytes()
    found = re.search(rb"<script>(.*?)</script>", content, re.DOTALL)
    assert found is not None
    digest = base64.b64encode(hashlib.sha256(found[1]).digest())
    policy = (
        b"default-src 'none'; connect-src 'self'; img-src blob:; style-src 'unsafe-inline'; script-src 'sha256-%s'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'" % digest
    )
    return content, [
        (b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", policy), (b"cache-control", b"no-cache"),
        (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
    ]  # fmt: skip


def live(desks: Mapping[str, Desk]) -> dict[str, Any]:
    """What the page shows of each model, and what can be sent to it."""
    return {"models": [_about(desk) for desk in desks.values()]}


def _about(desk: Desk) -> dict[str, Any]:
    signature, numbers = desk.signature, desk.numbers()
    return {
        "name": signature.name, "version": signature.version, "takes": takes(desk),
        "labels": (signature.labels or ())[:_MOST_LABELS], "inputs": [tensor.metadata() for tensor in signature.inputs],
        "numbers": {name: numbers[name] for name in _SHOWN},
    }  # fmt: skip


def takes(desk: Desk) -> list[str]:
    """What a model can be asked with: picture, text, tensors; what is easiest comes first."""
    signature = desk.signature
    inputs, outputs = signature.inputs, signature.outputs
    scores = len(outputs) == 1 and len(outputs[0].shape) == 2 and not outputs[0].free
    found = []
    if scores and len(inputs) == 1 and layout_of(inputs[0]) is not None:
        found.append("picture")
    if desk.text is not None and len(outputs) == 1 and not outputs[0].free:
        found.append("text")
    return [*found, "tensors"]

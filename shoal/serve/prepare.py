"""Texts and pictures that clients send, made into rows of the model's inputs. In the gateway, without torch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shoal.serve import pictures
from shoal.serve.desk import Desk
from shoal.serve.protocols.embeddings import MOST_CHARACTERS, TextEncoder
from shoal.serve.protocols.v2 import InferRequest
from shoal.serve.refusals import Refusal
from shoal.serve.signature import ModelSignature

# So many take a few milliseconds.
_LONG_CHARACTERS = 8192


async def prepared(desk: Desk, request: InferRequest) -> InferRequest:
    """The request with its inputs, made of the texts or pictures that it holds; Refusal where they cannot be."""
    if desk.signature.takes_texts:
        return await _of_texts(desk, request)
    # Decoding takes milliseconds, in which the event loop answers others.
    rows = await asyncio.to_thread(_rows, request.encoded, desk.signature)
    return replace(request, inputs=(rows,), encoded=())


def _rows(encoded: Sequence[bytes], signature: ModelSignature) -> np.ndarray:
    return pictures.decode([pictures.of_base64(raw) for raw in encoded], signature)


async def tokens_of(encoder: TextEncoder, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text. Those of long ones take long to find, all of them, however few the model wants."""
    if sum(map(len, texts)) > _LONG_CHARACTERS:
        return await asyncio.to_thread(encoder.tokens, texts)
    return encoder.tokens(texts)


async def _of_texts(desk: Desk, request: InferRequest) -> InferRequest:
    signature = desk.signature
    if desk.text is None:
        raise Refusal(400, f"{signature.name} takes no texts here; send its inputs.")
    try:
        texts = [raw.decode() for raw in request.encoded]
    except UnicodeDecodeError:
        raise Refusal(400, "The texts are not UTF-8.") from None
    if any(not text or len(text) > MOST_CHARACTERS for text in texts):
        raise Refusal(400, f"A text has 1 to {MOST_CHARACTERS} characters.")
    parts = tuple(
        replace(desk.text.request(tokens), timeout_s=request.timeout_s, priority=request.priority)
        for tokens in await tokens_of(desk.text, texts)
    )
    if len({part.length for part in parts}) > 1 and any(spec.free for spec in signature.outputs):
        raise Refusal(400, f"{signature.name} answers as long as the text is; send texts of unequal lengths one by one.")
    return replace(request, encoded=(), parts=parts)

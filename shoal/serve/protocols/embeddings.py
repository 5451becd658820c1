"""OpenAI's ``/v1/embeddings`` for models of text that give one vector for each.

Protocol: https://platform.openai.com/docs/api-reference/embeddings. Texts are cut into tokens here, in the gateway, by the
tokenizer that came with the model, and cut off where the model ends.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from shoal.serve.protocols.v2 import USUAL_PRIORITY, InferRequest
from shoal.serve.refusals import Refusal
from shoal.serve.signature import ModelSignature

_MOST_TEXTS = 2048
MOST_CHARACTERS = 1 << 20


class _Request(msgspec.Struct):
    input: Any
    model: str
    encoding_format: str = "float"
    dimensions: int | None = None
    user: str = ""


_DECODER = msgspec.json.Decoder(_Request)


class TextEncoder:
    """Texts to rows of a model's inputs."""

    def __init__(self, tokenizer: str, signature: ModelSignature) -> None:
        """``tokenizer``: path of a tokenizer.json. Raises ImportError without the library, what that raises for a bad file."""
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(tokenizer)
        self._tokenizer.no_padding()
        self._signature = signature
        assert signature.longest is not None
        self._longest = signature.longest
        self._tokenizer.enable_truncation(self._longest)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, with those that the model wants before and after, no more than it takes."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def request(self, tokens: Sequence[int]) -> InferRequest:
        """One row."""
        ids = np.array([tokens[: self._longest]], np.int64)
        return InferRequest("", (ids, np.ones_like(ids)), 1, (), None, USUAL_PRIORITY, length=ids.shape[1])


def decode(body: bytes) -> tuple[str, list[str] | list[list[int]], bool]:
    """(model, texts or tokens, whether the answer is wanted in base64). Refusal where the request makes no sense."""
    try:
        request = _DECODER.decode(body)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"The request is not one for embeddings: {str(error).rstrip('.')}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refusal(400, "The request is not valid JSON.") from None
    if request.encoding_format not in ("float", "base64"):
        raise Refusal(400, "The encoding_format is float or base64.")
    if request.dimensions is not None:
        raise Refusal(400, "The model gives vectors of one size; leave dimensions out.")
    return request.model, _inputs(request.input), request.encoding_format == "base64"


def _inputs(given: Any) -> list[str] | list[list[int]]:
    if isinstance(given, str) or (isinstance(given, list) and given and _are(given, int)):
        given = [given]
    if not isinstance(given, list) or not given or len(given) > _MOST_TEXTS:
        raise Refusal(400, f"The input is a text, or a list of 1 to {_MOST_TEXTS} texts or lists of tokens.")
    if _are(given, str):
        if any(not text or len(text) > MOST_CHARACTERS for text in given):
            raise Refusal(400, f"A text has 1 to {MOST_CHARACTERS} characters.")
        return given
    if all(isinstance(tokens, list) and tokens and _are(tokens, int) for tokens in given):
        if any(not 0 <= token < 1 << 31 for tokens in given for token in tokens):
            raise Refusal(400, "A token is a whole number from 0.")
        return given
    raise Refusal(400, "The input is a text, or a list of texts or lists of tokens, all of one kind.")


def _are(values: list[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


def encode(model: str, vectors: np.ndarray, tokens: int, as_base64: bool) -> bytes:
    """The body of the answer; ``vectors``: ``[texts, width]``."""
    data = [
        {"object": "embedding", "index": k, "embedding": _vector(vector, as_base64)} for k, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})


def _vector(vector: np.ndarray, as_base64: bool) -> Any:
    values = vector.astype("<f4")
    return base64.b64encode(values.tobytes()).decode() if as_base64 else values.tolist()


def error_body(refusal: Refusal) -> bytes:
    """An answer that is none, as OpenAI's clients expect it."""
    kind = "invalid_request_error" if refusal.status < 429 else "server_error"
    return msgspec.json.encode({"error": {"message": refusal.sentence, "type": kind, "param": None, "code": None}})

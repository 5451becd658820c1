"""Pictures as clients send them: PNG, JPEG or WebP to the row that a model takes. No torch here: the gateway uses it."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Callable, Sequence
from email.message import Message
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from shoal.data.pictures import upright
from shoal.serve.preprocess import Preprocess
from shoal.serve.refusals import Refusal
from shoal.serve.signature import CHANNELS, ModelSignature, TensorSignature, layout_of
from shoal.serve.tables.rows import bfloat16_bits

if TYPE_CHECKING:
    from PIL import Image

_Made = TypeVar("_Made")
_FORMATS = ("PNG", "JPEG", "WEBP")
TYPES = ("image/png", "image/jpeg", "image/webp")
_MOST_PIXELS = 64_000_000
_MOST_BOUNDARY, _MOST_PARTS, _MOST_HEAD = 200, 18, 4096


def as_input(values: np.ndarray, spec: TensorSignature) -> np.ndarray:
    """Bytes of pictures ``[..., height, width, channels]`` as rows of the model's input.

    Floats from 0 to 1, as ``shoal.data.Images`` gives them, where the bundle says nothing else; bytes as they are.
    """
    layout = layout_of(spec)
    if layout is not None and layout[3]:
        values = np.moveaxis(values, -1, -3)
    if spec.datatype == "UINT8":
        return values
    scaled = _scaled(values, spec, layout is not None and layout[3])
    return bfloat16_bits(scaled) if spec.datatype == "BF16" else scaled.astype(spec.dtype, copy=False)


def _scaled(values: np.ndarray, spec: TensorSignature, first: bool) -> np.ndarray:
    how, kind = spec.pictures or Preprocess(), np.dtype("f8" if spec.datatype == "FP64" else "f4").type
    numbers: np.ndarray = values.astype(kind)
    # Divided and not multiplied: the same bits as in training.
    numbers = numbers / kind(255) if math.isclose(how.scale, 1 / 255, rel_tol=1e-6) else numbers * kind(how.scale)
    if how.mean or how.std:
        shape = (-1, 1, 1) if first else (-1,)
        mean, std = (np.array(given or (usual,), kind).reshape(shape) for given, usual in ((how.mean, 0), (how.std, 1)))
        numbers = (numbers - mean) / std
    return numbers


def fitted(image: Image.Image, spec: TensorSignature) -> np.ndarray:
    """One row ``[*shape]`` from an opened picture: turned as its EXIF says, resized, cut, scaled, as the bundle says.

    What Pillow raises for damaged pictures goes through.
    """
    from PIL.Image import DecompressionBombError, Resampling
    from PIL.ImageOps import fit

    layout = layout_of(spec)
    assert layout is not None
    channels, height, width, _ = layout
    how = spec.pictures or Preprocess()
    size, mode = how.size, how.mode or CHANNELS[channels]
    large = (size, size) if isinstance(size, int) else size or (height, width)
    image.draft(mode, (4 * large[1], 4 * large[0]))
    image = upright(image, mode)
    if size is None:
        image = fit(image, (width, height), Resampling.BILINEAR)
    else:
        if isinstance(size, int):
            shorter = min(image.size)
            large = (max(size, round(image.height * size / shorter)), max(size, round(image.width * size / shorter)))
            if large[0] * large[1] > _MOST_PIXELS:
                # Thin ones of a few kilobytes grow to gigabytes.
                raise DecompressionBombError("it is too long and thin")
        if image.size != (large[1], large[0]):
            image = image.resize((large[1], large[0]), Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values = np.asarray(image if channels == 1 or mode == "RGB" else image.convert("RGB")).reshape(height, width, channels)
    return np.ascontiguousarray(as_input(values, spec))


def decode(raws: Sequence[bytes], signature: ModelSignature) -> np.ndarray:
    """Rows ``[n, *shape]`` from encoded pictures.

    Raises:
        Refusal: 400 for what is no picture, 413 for too many pixels in all of them, found out before any is decoded.
    """
    if not signature.takes_pictures:
        raise Refusal(400, f"{signature.name} takes no pictures; send its inputs to /v2/models/{signature.name}/infer.")
    spec, total = signature.inputs[0], 0
    for raw in raws:
        across, down = _opened(raw, lambda image: image.size)
        total += across * down
        if total > _MOST_PIXELS:
            words = f"The picture has {across} × {down}" if len(raws) == 1 else "The pictures have too many"
            raise Refusal(413, f"{words} pixels; at most {_MOST_PIXELS:,} are read for a request.")
    return np.stack([_opened(raw, lambda image: fitted(image, spec)) for raw in raws])


def _opened(raw: bytes, work: Callable[[Image.Image], _Made]) -> _Made:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(raw), formats=_FORMATS) as image:
            return work(image)
    except Image.DecompressionBombError:
        raise Refusal(413, "The picture is too large, or too long and thin.") from None
    # Pillow's decoders raise a dozen unrelated types for damaged pictures.
    except Exception:
        raise Refusal(400, "The picture cannot be decoded; send a whole PNG, JPEG or WebP.") from None


def of_base64(raw: bytes) -> bytes:
    """A picture as it is, decoded where it is in base64, as JSON has to have it. What is neither is returned as it is."""
    if not raw[:4].isalnum():
        return raw
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error:
        return raw


def of_body(content_type: str, body: bytes) -> bytes:
    """The picture in a request: the body itself, or the first file of a form. Refusal where there is none."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind in TYPES or kind in ("application/octet-stream", ""):
        found: bytes | None = body
    elif kind == "multipart/form-data":
        found = _file_of_form(content_type, body)
    else:
        raise Refusal(415, f"Send the picture as {', '.join(TYPES)} or as a form: curl -F image=@FILE.")
    if not found:
        raise Refusal(400, "The request holds no picture; try: curl -F image=@FILE.")
    return found


def _file_of_form(content_type: str, body: bytes) -> bytes | None:
    """The part called image, else the first that is a file. Only boundaries are looked for: what lies between is not read."""
    said = Message()
    said["content-type"] = content_type
    boundary = said.get_param("boundary")
    if not isinstance(boundary, str) or not 0 < len(boundary) <= _MOST_BOUNDARY:
        raise Refusal(400, "The form cannot be read; try: curl -F image=@FILE.")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"), _MOST_PARTS + 1)
    if len(parts) > _MOST_PARTS:
        raise Refusal(400, f"The form has more than {_MOST_PARTS - 2} parts; send one picture.")
    found: bytes | None = None
    for part in parts[1:-1]:
        head, _, content = part[:_MOST_HEAD].partition(b"\r\n\r\n")
        disposition = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-disposition:")), b"")
        if b'name="image"' in disposition or b"name=image" in disposition:
            return part[len(head) + 4 :]
        if b"filename" in disposition and found is None:
            found = part[len(head) + 4 :]
    return found

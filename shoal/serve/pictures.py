"""Pictures as clients send them: PNG, JPEG or WebP to the row that a model takes. No torch here: the gateway uses it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from email.message import Message
from typing import Any

import numpy as np

from shoal.serve.refusals import Refusal
from shoal.serve.signature import ModelSignature, TensorSignature
from shoal.serve.tables.rows import bfloat16_bits

CHANNELS = {1: "L", 3: "RGB"}
_FORMATS = ("PNG", "JPEG", "WEBP")
TYPES = ("image/png", "image/jpeg", "image/webp")
_MOST_PIXELS = 64_000_000
_MOST_BOUNDARY, _MOST_PARTS, _MOST_HEAD = 200, 18, 4096


def layout_of(spec: TensorSignature) -> tuple[int, int, int, bool] | None:
    """(channels, height, width, channels first) of an input that is pictures, as floats or as bytes; None for any other."""
    shape = spec.shape[1:]
    if len(shape) != 3 or min(shape) < 1 or not (spec.dtype.kind == "f" or spec.datatype in ("BF16", "UINT8")):
        return None
    if shape[0] in CHANNELS:
        return shape[0], shape[1], shape[2], True
    return (shape[2], shape[0], shape[1], False) if shape[2] in CHANNELS else None


def as_input(values: np.ndarray, spec: TensorSignature) -> np.ndarray:
    """Bytes of pictures as the model's datatype, floats from 0 to 1 as ``shoal.data.Images`` gives them."""
    if spec.datatype == "UINT8":
        return values
    if spec.datatype == "FP64":
        return values.astype(np.float64) / 255
    scaled: np.ndarray = values.astype(np.float32) / np.float32(255)
    return bfloat16_bits(scaled) if spec.datatype == "BF16" else scaled.astype(spec.dtype, copy=False)


def normalize(values: np.ndarray, preprocess: Mapping[str, Any] | None) -> np.ndarray:
    """Floats of one picture ``[height, width, channels]``, ``mean`` taken off and divided by ``std`` where a bundle has them."""
    if not preprocess:
        return values
    mean, std = np.float32(preprocess.get("mean", 0.0)), np.float32(preprocess.get("std", 1.0))
    found: np.ndarray = (values - mean) / std
    return found


def decode(raw: bytes, signature: ModelSignature, preprocess: Mapping[str, Any] | None) -> np.ndarray:
    """One row ``[1, *shape]`` from an encoded picture: cut to the model's aspect around its middle, resized, scaled.

    Raises:
        Refusal: 400 for what is no picture, 413 for one of too many pixels, found out before it is decoded.
    """
    from PIL import Image, ImageOps

    spec = signature.inputs[0]
    layout = layout_of(spec) if len(signature.inputs) == 1 else None
    if layout is None:
        raise Refusal(400, f"{signature.name} takes no pictures; send its inputs to /v2/models/{signature.name}/infer.")
    channels, height, width, first = layout
    try:
        with Image.open(io.BytesIO(raw), formats=_FORMATS) as image:
            across, down = image.size
            if across * down > _MOST_PIXELS:
                raise Refusal(413, f"The picture has {across} × {down} pixels; at most {_MOST_PIXELS:,} are read.")
            image.draft(CHANNELS[channels], (4 * width, 4 * height))
            fitted = ImageOps.fit(
                ImageOps.exif_transpose(image).convert(CHANNELS[channels]), (width, height), Image.Resampling.BILINEAR
            )
    except Refusal:
        raise
    # Pillow's decoders raise a dozen unrelated types for damaged pictures.
    except Exception:
        raise Refusal(400, "The picture cannot be decoded; send a whole PNG, JPEG or WebP.") from None
    values = np.asarray(fitted).reshape(height, width, channels)
    if spec.datatype != "UINT8" and preprocess:
        scaled = normalize(values.astype(np.float32) / np.float32(255), preprocess)
        values = bfloat16_bits(scaled) if spec.datatype == "BF16" else scaled.astype(spec.dtype)
    else:
        values = as_input(values, spec)
    return np.ascontiguousarray(values.transpose(2, 0, 1) if first else values)[None]


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


def check_preprocess(preprocess: Any) -> None:
    """ValueError, with one sentence, where a bundle's ``preprocess`` cannot be followed."""
    if preprocess is None:
        return
    if not isinstance(preprocess, Mapping):
        raise ValueError("preprocess is no mapping.")
    for name in ("mean", "std"):
        value = preprocess.get(name, 1.0)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values) or len(values) not in CHANNELS:
            raise ValueError(f"{name} in preprocess is a number, or one for each channel.")
        if name == "std" and not all(v > 0 for v in values):
            raise ValueError("std in preprocess is above 0.")

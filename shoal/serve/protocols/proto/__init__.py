"""The messages of the gRPC protocol, made from ``messages.binpb``, which protoc has made of the ``.proto`` files beside it.

A descriptor set instead of generated modules: it fits every version of protobuf, and in a pool of its own its names do not get
into the way of a client's that is imported into the same process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"


def _pool() -> descriptor_pool.DescriptorPool:
    files = descriptor_pb2.FileDescriptorSet.FromString((Path(__file__).parent / "messages.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _pool()


def message(name: str) -> Any:
    """The class of a message by its full name, such as inference.ModelInferRequest."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


def methods() -> dict[str, tuple[Any, Any]]:
    """The methods of the service: name -> (class of requests, class of responses)."""
    found = POOL.FindServiceByName(SERVICE).methods
    return {m.name: (message(m.input_type.full_name), message(m.output_type.full_name)) for m in found}

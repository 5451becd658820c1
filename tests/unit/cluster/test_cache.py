"""Where the cache is, and JSON that is whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cluster.cache import cache_dir, read_json, write_json


def test_the_cache_is_where_the_environment_says(tmp_path: Path) -> None:
    home = {"HOME": "/home/someone"}
    assert cache_dir(home) == Path("/home/someone/.cache/shoal")
    assert cache_dir({**home, "XDG_CACHE_HOME": "/caches"}) == Path("/caches/shoal")
    assert cache_dir({**home, "XDG_CACHE_HOME": "/caches", "SHOAL_CACHE": str(tmp_path)}) == tmp_path
    assert cache_dir({**home, "SHOAL_CACHE": "", "XDG_CACHE_HOME": ""}) == Path("/home/someone/.cache/shoal")
    assert cache_dir({**home, "XDG_CACHE_HOME": "relative"}) == Path("/home/someone/.cache/shoal")
    assert cache_dir({"SHOAL_CACHE": "here"}) == Path.cwd() / "here"


def test_the_cache_follows_the_real_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    assert not cache_dir().exists()


def test_json_comes_back_and_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "value.json"
    write_json(path, {"a": [1, 2.5, None], "ü": "é"})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError):
        write_json(tmp_path / "folder.json", {"a": 1})
    assert read_json(path) == {"a": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.json", "value.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff\xfe", b"3"])
def test_damaged_json_counts_as_missing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "value.json").write_bytes(content)
    assert read_json(tmp_path / "value.json") is None
    assert read_json(tmp_path / "nothing.json") is None
    assert read_json(tmp_path) is None

"""Text becomes a path in one place."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import pytest
from npeff.storage.errors import StoreError
from npeff.storage.location import is_remote, location


@pytest.mark.parametrize("text", ["runs/a", "/runs/a", "~/a", "a:b", "s3:/bucket/a"])
def test_a_local_path_is_a_plain_one(text: str) -> None:
    path = location(text)
    assert type(path) is type(Path())
    assert str(path) == text
    assert not is_remote(path)


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
@pytest.mark.parametrize("rest", ["bucket/a/b", "bucket//a/./b/"])
def test_a_uri_keeps_its_slashes_and_can_be_sent_to_a_worker(scheme: str, rest: str) -> None:
    path = location(f"{scheme}://{rest}")
    assert is_remote(path)
    assert str(path) == f"{scheme}://bucket/a/b"
    assert str(path / "c.json") == f"{scheme}://bucket/a/b/c.json"
    assert str(path.joinpath("c", "d.json").parent) == f"{scheme}://bucket/a/b/c"
    assert path.with_name("c.zarr").suffix == ".zarr"
    assert (path / "c.json").relative_to(path).as_posix() == "c.json"
    assert [each.stem for each in sorted([path / "d.json", path / "c.json"])] == ["c", "d"]
    assert (path / "c.json").name == "c.json"
    assert path.expanduser().absolute() == path
    assert pickle.loads(pickle.dumps(path)) == path
    assert type(pickle.loads(pickle.dumps(path / "c")).parent) is type(path)
    assert location(path) is path
    assert hash(path) == hash(location(str(path)))


@pytest.mark.parametrize(
    "text", ["gcs://bucket/a", "http://host/a", "file:///a", "s3://", "s3://bucket", "s3://b/../a"]
)
def test_other_uris_are_refused_in_one_line_that_says_what_to_give(text: str) -> None:
    with pytest.raises(StoreError, match=r"give .*s3://bucket/prefix"):
        location(text)


def test_without_obstore_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r"pip install 'npeff-pipeline\[cloud\]'"):
        location("s3://bucket/a")

"""The cache: no stale entry, no half entry, no unnoticed damage."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from tests import damage
from train.encoding import cache
from train.encoding.cache import Cache, FileDigests
from train.errors import CheckpointError

FACTS = {"kind": "picture", "vae": "v", "width": 64, "layers": (1, 2), "flip": False}
KEY = cache.key(**FACTS)


@pytest.fixture
def filled(tmp_path: Path) -> Cache:
    """A cache with one entry, KEY."""
    made = Cache(tmp_path)
    made.put(KEY, {"latents": torch.arange(600.0).view(2, 300)}, notes={"path": "a.png"})
    return made


@pytest.mark.parametrize("changed", [*({k: "other"} for k in FACTS), {"more": 1}])
def test_every_fact_changes_the_key(changed):
    assert cache.key(**{**FACTS, **changed}) != KEY


def test_the_order_of_facts_does_not_change_the_key():
    assert cache.key(**dict(reversed(FACTS.items()))) == KEY


def test_another_format_has_other_keys(monkeypatch):
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert cache.key(**FACTS) != KEY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_entry_comes_back_equal(tmp_path, dtype):
    tensors = {"text": torch.randn(3, 5).to(dtype), "more": torch.zeros(2, dtype=torch.int64)}
    made = Cache(tmp_path)
    assert KEY not in made
    made.put(KEY, tensors, notes={"tokens": "5"})
    assert KEY in made
    assert made.notes(KEY)["tokens"] == "5"
    back = made.get(KEY)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert all(back[name].dtype == tensors[name].dtype for name in tensors)


@pytest.mark.parametrize("harm", [damage.truncate, damage.flip_bit, Path.unlink, damage.empty])
def test_a_damaged_entry_is_named_with_its_remedy(filled, harm):
    harm(filled.path(KEY))
    with pytest.raises(CheckpointError) as caught:
        filled.get(KEY)
    assert str(filled.path(KEY)) in str(caught.value)
    assert "Delete that cache file and start again" in str(caught.value)


@pytest.mark.parametrize("harm", [damage.truncate, damage.empty])
def test_a_cut_off_entry_is_made_anew_unasked(filled, harm):
    harm(filled.path(KEY))
    assert KEY not in filled


@pytest.mark.parametrize("crash", ["while writing", "before the rename"])
def test_a_crashed_write_leaves_nothing(tmp_path, monkeypatch, crash):
    def half_a_file(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    def no_rename(source, target):
        raise KeyboardInterrupt

    if crash == "while writing":
        monkeypatch.setattr(cache, "save_file", half_a_file)
    else:
        monkeypatch.setattr(os, "replace", no_rename)
    made = Cache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made.put(KEY, {"x": torch.zeros(3)}, notes={})
    assert KEY not in made
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_digest_is_sha256_and_is_remembered(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    memo = tmp_path / "digests.json"
    expected = hashlib.sha256(b"weights").hexdigest()
    assert FileDigests(memo).file(file) == expected
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert FileDigests(memo).file(file) == expected


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"before")
    digests = FileDigests(tmp_path / "digests.json")
    before = digests.file(file)
    file.write_bytes(b"after!")
    os.utime(file, ns=(1, 1))
    assert digests.file(file) != before


def test_a_broken_memo_is_no_memo(tmp_path):
    (tmp_path / "digests.json").write_text("{broken", encoding="utf-8")
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    assert FileDigests(tmp_path / "digests.json").file(file) == hashlib.sha256(b"x").hexdigest()


def test_in_a_hub_cache_the_blobs_name_is_its_digest(tmp_path):
    """A 60 GB model isn't read for it; small blobs are named by git, which is no sha256."""
    large, small = tmp_path / "blobs" / ("a" * 64), tmp_path / "blobs" / ("b" * 40)
    large.parent.mkdir()
    (tmp_path / "snapshot").mkdir()
    for blob in (large, small):
        blob.write_bytes(b"x")
        (tmp_path / "snapshot" / blob.name[0]).symlink_to(blob)
    digests = FileDigests(tmp_path / "digests.json")
    assert digests.file(tmp_path / "snapshot" / "a") == "a" * 64
    assert digests.file(tmp_path / "snapshot" / "b") == hashlib.sha256(b"x").hexdigest()


def test_a_folders_digest_covers_names_and_contents_but_nothing_hidden(tmp_path):
    def digest(**files: str) -> str:
        folder = tmp_path / "_".join([*files, *files.values()])
        for name, text in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        (folder / ".cache").mkdir()
        (folder / ".cache" / "lock").write_text(str(folder), encoding="utf-8")
        return FileDigests(tmp_path / "digests.json").folder(folder)

    same = digest(a="1", b="2")
    others = [digest(a="1", b="3"), digest(a="1", c="2"), digest(a="1"), digest(a="1", d__b="2")]
    assert len({same, *others}) == 5

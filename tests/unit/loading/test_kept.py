"""Kept copies: what was written comes back, or it is said why not."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import damage
from train.errors import CheckpointError
from train.loading import kept

CPU = torch.device("cpu")


def tensors() -> list[tuple[str, Tensor]]:
    """Of the types that a copy has; one's bytes aren't a multiple of eight."""
    torch.manual_seed(0)
    return [
        ("a.weight", torch.randint(0, 256, (64, 32), dtype=torch.uint8)),
        ("a.scale", torch.rand(64)),
        ("b.weight", torch.randint(-127, 128, (9, 5), dtype=torch.int8)),
        ("norm.weight", torch.randn(3).bfloat16()),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a copy that isn't there yet."""
    return kept.place(tmp_path, digest="0")


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """So that four tensors make several."""
    monkeypatch.setattr(kept, "SHARD_BYTES", 200)


def write(folder: Path) -> None:
    """A copy of `tensors`, which pass through it."""
    passed = list(kept.writing(folder, tensors()))
    assert [name for name, _ in passed] == [name for name, _ in tensors()]
    assert all(torch.equal(p, t) for (_, p), (_, t) in zip(passed, tensors(), strict=True))


def complaint(folder: Path) -> str:
    """What reading it says."""
    with pytest.raises(CheckpointError) as caught:
        list(kept.read(folder, CPU))
    return str(caught.value)


def test_what_is_written_comes_back(folder, small_shards):
    write(folder)
    assert len(list(folder.glob("*.safetensors"))) == 3
    found = dict(kept.read(folder, CPU))
    assert found.keys() == dict(tensors()).keys()
    for name, tensor in tensors():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_other_facts_are_another_place(tmp_path, monkeypatch):
    place = kept.place(tmp_path, digest="0")
    assert place == kept.place(tmp_path, digest="0")
    assert place != kept.place(tmp_path, digest="1")
    monkeypatch.setattr(kept, "FORMAT", kept.FORMAT + 1)
    assert place != kept.place(tmp_path, digest="0")


def test_there_is_no_copy_before_all_has_passed(folder):
    stream = kept.writing(folder, tensors())
    next(stream)
    assert not folder.exists()
    stream.close()  # pyright: ignore
    assert not list(folder.parent.iterdir())


def test_a_source_that_fails_leaves_nothing(folder):
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from tensors()[:2]
        raise ValueError("source")

    with pytest.raises(ValueError, match="source"):
        list(kept.writing(folder, failing()))
    assert not list(folder.parent.iterdir())


DAMAGES = {
    "cut": (lambda folder: damage.truncate(folder / "00000.safetensors"), "00000.* is cut off"),
    "flipped": (
        lambda folder: damage.flip_bit(folder / "00000.safetensors"),
        "doesn't match its checksum",
    ),
    "gone": (lambda folder: (folder / "00000.safetensors").unlink(), "No such file"),
    "empty index": (lambda folder: damage.empty(folder / kept.INDEX), "Expecting value"),
    "other index": (lambda folder: (folder / kept.INDEX).write_text('{"sums": 1}'), "files"),
    "list": (lambda folder: (folder / kept.INDEX).write_text('{"sums":1,"files":[]}'), "items"),
    "no index": (lambda folder: (folder / kept.INDEX).unlink(), "No such file"),
}


@pytest.mark.parametrize(("harm", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_copy_is_refused(folder, harm, said):
    write(folder)
    harm(folder)
    with pytest.raises(CheckpointError, match=rf"^damaged \(.*{said}.*\)$"):
        list(kept.read(folder, CPU))


def test_a_copy_whose_index_lacks_a_tensor(folder):
    write(folder)
    path = folder / kept.INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["sums"]["a.scale"]
    path.write_text(json.dumps(index), encoding="utf-8")
    assert complaint(folder) == "damaged (its files hold other tensors than its index says)"


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64])
def test_any_flipped_bit_changes_the_checksum(size):
    torch.manual_seed(size)
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8)
    sums = {kept.checksum(tensor)}
    for bit in range(8 * size):
        tensor[bit // 8] ^= 1 << bit % 8
        sums.add(kept.checksum(tensor))
        tensor[bit // 8] ^= 1 << bit % 8
    assert len(sums) == 1 + min(8 * size, 64)
    assert kept.checksum(torch.zeros(0)) == 0


def test_a_full_disk_costs_the_copy_and_not_the_start(folder, small_shards, monkeypatch, capsys):
    """At the second shard; what was written before goes at once."""
    save, calls = kept.save_file, []

    def full(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(*arguments)  # pyright: ignore

    monkeypatch.setattr(kept, "save_file", full)
    stream = kept.writing(folder, tensors())
    seen = [next(stream) for _ in range(3)]
    assert len(calls) == 2
    assert not list(folder.parent.iterdir())
    seen += stream
    assert len(seen) == 4
    assert len(calls) == 2
    assert not folder.exists()
    assert capsys.readouterr().out == (
        f"{folder.parent}: the quantised copy can't be written ([Errno 28] No space left on "
        "device); each start has to quantise again\n"
    )


def test_room_is_a_little_more_than_the_size(folder, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: usage)
    assert kept.has_room(folder, 952)
    assert not kept.has_room(folder, 953)


def test_what_a_dead_process_left_is_swept(folder, tmp_path):
    write(folder)
    old, new = (folder.parent / f"{name}{kept.PARTIAL}" for name in ("old", "new"))
    for path in (old, new):
        path.mkdir()
        (path / "00000.safetensors").write_bytes(b"half")
    hours = time.time() - 2 * kept.ABANDONED_SECONDS
    os.utime(old, (hours, hours))
    os.utime(folder, (hours, hours))
    kept.sweep(tmp_path)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, new.name}
    kept.sweep(tmp_path / "nowhere")


def test_two_that_write_the_same_copy_at_once(folder, small_shards, capsys):
    """Both go on, one copy stays, nothing is said."""
    barrier = threading.Barrier(2)

    def meeting() -> Iterator[tuple[str, Tensor]]:
        barrier.wait()
        yield from tensors()
        barrier.wait()

    threads = [
        threading.Thread(target=lambda: list(kept.writing(folder, meeting()))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert len(dict(kept.read(folder, CPU))) == 4
    assert capsys.readouterr().out == ""


def test_half_a_removed_copy_isnt_one(folder, monkeypatch):
    write(folder)
    monkeypatch.setattr(kept.shutil, "rmtree", lambda *args, **kwargs: None)
    kept.remove(folder)
    assert "No such file" in complaint(folder)
    monkeypatch.undo()
    kept.remove(folder)
    assert not folder.exists()

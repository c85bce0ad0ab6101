"""The container: one tensor at a time in and out."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.adapters.state import random_lora, save
from train.adapters import files
from train.adapters.convert import convert
from train.adapters.files import File
from train.adapters.resize import resize
from train.adapters.write import LAYOUTS
from train.errors import CheckpointError


def test_writing_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 2).bfloat16(), "a": torch.tensor(2.5), "ü": torch.ones(0, 4)}
    path = tmp_path / "sub" / "a.safetensors"
    digest = files.write(path, iter(tensors.items()), describe=lambda digest: {"hash": digest})
    found = load_file(path)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    assert {key: tensor.dtype for key, tensor in found.items()} == {
        key: tensor.dtype for key, tensor in tensors.items()
    }
    assert File(path).metadata == {"hash": digest} == {"hash": files.body_hash(path)}
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_a_copy_has_the_same_bytes_under_other_metadata(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 2), "a": torch.tensor(2.5).bfloat16(), "ü": torch.ones(0, 4)}
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, source, metadata={"old": "1"})
    before = source.read_bytes()
    files.copy(source, target, metadata={"new": "新"})
    assert source.read_bytes() == before
    assert files.body_hash(target) == files.body_hash(source)
    found = load_file(target)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    assert File(target).metadata == {"new": "新"}
    with pytest.raises(AssertionError, match="never changed in place"):
        files.copy(source, source, metadata={})
    source.write_bytes(before[:-1])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        files.copy(source, tmp_path / "c.safetensors", metadata={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_what_fails_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def pieces():
        yield "a", torch.ones(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "a.safetensors", pieces(), describe=lambda digest: {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("operation", [*LAYOUTS, "resize"])
def test_memory_stays_near_one_group(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all tensors that were read, only one BFL weight's are alive at once."""
    path, output = save(random_lora(1), tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, read = 0, File.get

    def counted(self: File, key: str) -> Tensor:
        nonlocal most
        tensor = read(self, key).clone()
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(File, "get", counted)
    if operation == "resize":
        resize(path, output, rank=2)
    else:
        convert(path, output, to=operation)
    assert 0 < most <= 12  # q, k and v, up and down, and those of the group before
    assert len(File(path).tensors) > 40

"""Quantised copies on disk: the same tensors come back, or none."""

import pytest
import torch

from tests import damage
from train import kept
from train.errors import CheckpointError

CPU = torch.device("cpu")

TENSORS = {
    "a.weight": torch.randint(0, 256, (40, 33), dtype=torch.uint8),
    "a.scale": torch.rand(41),
    "b.weight": torch.randint(-127, 128, (64, 64), dtype=torch.int8),
    "c.weight": torch.randn(5, 7).bfloat16(),
    "c.offset": torch.tensor(0.5),
}


def keep(folder) -> None:
    """Write a copy in several shards."""
    passed = dict(kept.writing(folder, TENSORS.items()))
    assert passed.keys() == TENSORS.keys()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A whole copy."""
    monkeypatch.setattr(kept, "SHARD_BYTES", 2000)
    keep(tmp_path / "bases" / "x")
    return tmp_path / "bases" / "x"


def test_a_copy_gives_back_the_same_bits(folder):
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = dict(kept.read(folder, CPU))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert [path.name for path in folder.parent.iterdir()] == ["x"]


@pytest.mark.parametrize("harm", [damage.truncate, damage.empty, damage.flip_bit])
def test_a_damaged_shard_is_found(folder, harm):
    for shard in folder.glob("*.safetensors"):
        content = shard.read_bytes()
        harm(shard)
        with pytest.raises(CheckpointError, match="this quantised copy is damaged"):
            list(kept.read(folder, CPU))
        shard.write_bytes(content)
    assert len(list(kept.read(folder, CPU))) == len(TENSORS)


@pytest.mark.parametrize("harm", [damage.truncate, damage.empty, lambda path: path.unlink()])
def test_a_damaged_index_is_found(folder, harm):
    harm(folder / kept.INDEX)
    with pytest.raises(CheckpointError, match="this quantised copy is damaged"):
        list(kept.read(folder, CPU))


def test_a_missing_or_a_foreign_shard_is_found(folder):
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="other tensors than its index"):
        list(kept.read(folder, CPU))
    second.unlink()
    with pytest.raises(CheckpointError, match="there is no file"):
        list(kept.read(folder, CPU))


def test_a_copy_that_isnt_finished_isnt_there(tmp_path):
    def dies():
        yield "a", torch.zeros(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(kept.writing(tmp_path / "bases" / "x", dies()))
    assert list((tmp_path / "bases").iterdir()) == []


def test_of_two_writers_the_first_wins(folder):
    shard = next(folder.glob("*.safetensors"))
    before = shard.stat().st_ino
    keep(folder)
    assert shard.stat().st_ino == before
    assert [path.name for path in folder.parent.iterdir()] == ["x"]


def test_facts_make_the_place(tmp_path):
    places = [
        kept.place(tmp_path, digest="1", quantize="fp8"),
        kept.place(tmp_path, digest="2", quantize="fp8"),
        kept.place(tmp_path, digest="1", quantize="nf4"),
    ]
    assert len(set(places)) == 3
    assert places[0] == kept.place(tmp_path, digest="1", quantize="fp8")


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_the_checksum_sees_every_bit(count):
    content = torch.randint(0, 256, (count,), dtype=torch.uint8)
    sums = {kept.checksum(content)}
    for place in range(count):
        for bit in range(8):
            changed = content.clone()
            changed[place] ^= 1 << bit
            sums.add(kept.checksum(changed))
    assert len(sums) > 1
    assert kept.checksum(content) not in sums - {kept.checksum(content)}
    assert len(sums) >= 8 * min(count, 8) + 1


def test_no_room_is_known(tmp_path):
    assert kept.has_room(tmp_path / "bases" / "x", 1)
    assert not kept.has_room(tmp_path / "bases" / "x", 10**18)

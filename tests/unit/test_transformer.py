"""The transformer as it is loaded: quantised where it should be, placed, bounded, kept."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import bfl, damage, tiny
from train import frozen, kept, lora, transformer
from train.errors import ConfigError
from train.frozen import FrozenLinear
from train.stored import Stored
from train.weights import Files, Weight

CPU = torch.device("cpu")


@pytest.fixture(params=frozen.KINDS)
def kind(request) -> str:
    """Each format."""
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small transformer in diffusers' layout, in bf16."""
    path = tmp_path_factory.mktemp("transformer")
    tiny.transformer(guidance=True).to(torch.bfloat16).save_pretrained(path)
    return path


def files(folder: Path, quantize: str, dtype: torch.dtype = torch.bfloat16) -> Files:
    """That folder, to be loaded as a kind."""
    return Files(folder / "config.json", folder, None, dtype, quantize)


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Every file that tensors are read from."""
    seen = []
    read = Stored.read

    def note(self: Stored, rows: tuple[int, int] | None = None):
        seen.append(self.file)
        return read(self, rows)

    monkeypatch.setattr(Stored, "read", note)
    return seen


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """To the bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def test_block_linears_are_quantised_and_nothing_else(folder, kind):
    plain = transformer.load(files(folder, "none"), CPU)
    found = transformer.load(files(folder, kind), CPU)
    names = lora.block_linears(plain)
    assert lora.block_linears(found) == names
    for name, module in found.named_modules():
        assert isinstance(module, FrozenLinear) == (name in names)
    for name in names:
        original, layer = plain.get_submodule(name), found.get_submodule(name)
        assert isinstance(original, nn.Linear)
        for part, tensor in frozen.quantize(original.weight, kind).items():
            assert torch.equal(layer.get_parameter(part), tensor)
    rest = {k: v for k, v in plain.state_dict().items() if k.rpartition(".")[0] not in names}
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in rest.items())
    assert not found.training
    assert not any(p.requires_grad or p.is_meta for p in found.parameters())
    assert found.dtype == torch.bfloat16


def test_scaled_fp8_stays_as_it_is_in_the_file(tmp_path, folder):
    """Its bits, and its one scale for each row; bf16 would round it a second time."""
    made = bfl.scaled(bfl.tensors(transformer.load(files(folder, "none"), CPU)))
    path = bfl.save(made, tmp_path / "x.safetensors", prefix="model.diffusion_model.")
    given = Files(folder / "config.json", None, path, torch.bfloat16, "fp8")
    layer = transformer.load(given, CPU).get_submodule("transformer_blocks.0.attn.to_k")
    key = "double_blocks.0.img_attn.qkv.weight"
    assert torch.equal(layer.get_parameter("weight"), made[key].view(torch.uint8)[32:64])
    assert torch.equal(layer.get_parameter("scale"), made[f"{key}_scale"].expand(32))


def test_a_file_in_place_of_the_folder_gives_the_same(tmp_path, folder, kind):
    plain = transformer.load(files(folder, "none"), CPU)
    path = bfl.save(bfl.tensors(plain), tmp_path / "x.safetensors")
    given = Files(folder / "config.json", None, path, torch.bfloat16, kind)
    assert_same(transformer.load(given, CPU), transformer.load(files(folder, kind), CPU))


def test_the_second_start_reads_the_copy_only(tmp_path, folder, kind, reads):
    first = transformer.load(files(folder, kind), CPU, cache=tmp_path)
    assert {path.parent for path in reads} == {folder}
    reads.clear()
    second = transformer.load(files(folder, kind), CPU, cache=tmp_path)
    (copy,) = (tmp_path / kept.FOLDER).iterdir()
    assert {path.parent for path in reads} == {copy}
    assert_same(first, second)
    assert (second.training, second.dtype) == (False, torch.bfloat16)


@pytest.mark.parametrize("harm", [damage.truncate, damage.flip_bit])
def test_a_damaged_copy_is_made_anew_and_said(tmp_path, folder, harm, reads, capsys):
    first = transformer.load(files(folder, "int8"), CPU, cache=tmp_path)
    (copy,) = (tmp_path / kept.FOLDER).iterdir()
    harm(copy / "00000.safetensors")
    reads.clear()
    assert_same(first, transformer.load(files(folder, "int8"), CPU, cache=tmp_path))
    assert folder in {path.parent for path in reads}
    assert f"{copy}: this quantised copy is damaged" in capsys.readouterr().out
    reads.clear()
    transformer.load(files(folder, "int8"), CPU, cache=tmp_path)
    assert folder not in {path.parent for path in reads}


def test_changed_weights_another_kind_or_type_have_another_copy(tmp_path, folder):
    for given in (
        files(folder, "int8"),
        files(folder, "fp8"),
        files(folder, "int8", torch.float32),
    ):
        transformer.load(given, CPU, cache=tmp_path)
    other = tmp_path / "other"
    tiny.transformer(guidance=True, seed=9).save_pretrained(other)
    transformer.load(files(other, "int8"), CPU, cache=tmp_path)
    assert len(list((tmp_path / kept.FOLDER).iterdir())) == 4


def test_an_unquantised_base_has_no_copy(tmp_path, folder):
    transformer.load(files(folder, "none"), CPU, cache=tmp_path)
    assert not (tmp_path / kept.FOLDER).exists()


def test_without_room_it_loads_all_the_same_and_says_so(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(kept, "has_room", lambda folder, size: False)
    transformer.load(files(folder, "fp8"), CPU, cache=tmp_path)
    assert "no room for a quantised copy of the base" in capsys.readouterr().out
    assert not list(tmp_path.glob("bases/*"))


def test_place_is_asked_for_every_parameter(tmp_path, folder):
    asked = []

    def place(name: str) -> torch.device:
        asked.append(name)
        return torch.device("meta") if name.startswith("single_") else CPU

    for _ in range(2):  # from the source, then from the copy
        found = transformer.load(files(folder, "nf4"), CPU, place=place, cache=tmp_path)
        assert sorted(asked) == sorted(name for name, _ in found.named_parameters())
        assert {n for n, p in found.named_parameters() if p.is_meta} == {
            name for name in asked if name.startswith("single_")
        }
        asked.clear()


def test_numbers_that_arent_are_named(tmp_path, kind):
    model = tiny.transformer(guidance=True)
    with torch.no_grad():
        model.get_parameter("single_transformer_blocks.1.attn.to_out.weight")[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"single_transformer_blocks\.1\.attn\.to_out\.weight isn"
    ):
        transformer.load(files(tmp_path, kind), CPU)


def test_at_most_two_unpacked_weights_live_beside_the_one_in_work(folder, kind, monkeypatch):
    """The one read ahead, and the last one until its packed state has been taken.

    Loaded as fp32 from bf16, so that no tensor of the file can be part of the result.
    """
    alive: list[int] = []
    refs: list[weakref.ref[torch.Tensor]] = []
    read, pack = Stored.read, transformer._packed

    def watch(self: Stored, rows: tuple[int, int] | None = None) -> torch.Tensor:
        tensor = read(self, rows)
        refs.append(weakref.ref(tensor))
        return tensor

    def count(weight: Weight, kind: str) -> dict[str, torch.Tensor]:
        alive.append(sum(ref() is not None for ref in refs))
        return pack(weight, kind)

    monkeypatch.setattr(Stored, "read", watch)
    monkeypatch.setattr(transformer, "_packed", count)
    found = transformer.load(files(folder, kind, torch.float32), CPU)
    assert len(alive) == len(lora.block_linears(found))
    assert max(alive) <= 3

"""Loading the frozen transformer: the same weights as diffusers', packed, kept, and little RAM."""

import multiprocessing
import re
import shutil
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor

from tests import bfl, damage, tiny
from train import lora
from train.config import BaseConfig
from train.errors import ConfigError
from train.loading import frozen, kept, stored, transformer
from train.loading.base import Base, resolve
from train.loading.frozen import FrozenLinear
from train.loading.stored import Stored
from train.loading.weights import Files

CPU = torch.device("cpu")
LINEAR = "single_transformer_blocks.1.attn.to_out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer's folder in shards, bf16."""
    folder = tmp_path_factory.mktemp("folder") / "transformer"
    model = tiny.transformer(guidance=True).to(torch.bfloat16)  # pyright: ignore
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as one scaled fp8 file in BFL's names."""
    model = Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    place = tmp_path_factory.mktemp("single") / "fp8.safetensors"
    return bfl.save(bfl.newer(bfl.scaled(bfl.tensors(model))), place)


def files(folder: Path, quantize: str = "none", *, file: Path | None = None) -> Files:
    """From the folder, or a file instead."""
    home = None if file else folder
    return Files(folder / "config.json", home, file, torch.bfloat16, quantize)


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """All weights to the bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def inputs() -> dict[str, Tensor]:
    """Of a forward pass: 6 picture tokens and 3 of text."""
    torch.manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 6, 16).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 3, 144).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": torch.randint(0, 4, (6, 4)),
        "txt_ids": torch.randint(0, 4, (3, 4)),
        "guidance": torch.tensor([1.0]).bfloat16(),
    }


def test_unquantised_it_is_what_from_pretrained_loads(folder):
    theirs = Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    ours = transformer.load(files(folder), CPU)
    assert_same(ours, theirs)
    assert {**ours.config, "_name_or_path": folder} == dict(theirs.config)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert torch.equal(ours(**inputs()).sample, theirs.eval()(**inputs()).sample)


@pytest.mark.parametrize("kind", frozen.KINDS)
def test_quantised_it_is_the_same_with_frozen_linears(folder, kind):
    wanted = Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    names = lora.block_linears(wanted)
    for name in names:
        plain = wanted.get_submodule(name)
        assert isinstance(plain, torch.nn.Linear)
        wanted.set_submodule(name, FrozenLinear.like(plain, kind))
    ours = transformer.load(files(folder, kind), CPU)
    assert_same(ours, wanted)
    assert all(isinstance(ours.get_submodule(name), FrozenLinear) for name in names)
    assert ours.dtype == torch.bfloat16


def test_a_scaled_fp8_file_stays_as_it_is(folder, single):
    """In kind fp8, to the bit; other kinds are quantised from its numbers, not from their bf16."""
    found = files(folder, "fp8", file=single)
    weights = dict(found.source().read_all())
    for kind in ("fp8", "nf4"):
        model = transformer.load(files(folder, kind, file=single), CPU)
        for name in lora.block_linears(model):
            layer = model.get_submodule(name)
            assert isinstance(layer, FrozenLinear)
            weight = weights[f"{name}.weight"].dense(torch.float32)
            state = dict(layer.named_parameters())
            if kind == "fp8":
                assert torch.equal(frozen.dequantize(state, "fp8", shape=weight.shape), weight)  # pyright: ignore
            else:
                wanted = frozen.quantize(weight, kind)
                assert all(torch.equal(state[part], wanted[part]) for part in wanted)


def test_each_weight_goes_to_its_place(folder):
    placed: dict[str, torch.device] = {}

    def place(name: str) -> torch.device:
        placed[name] = torch.device("meta" if name.startswith("transformer_blocks.") else "cpu")
        return placed[name]

    model = transformer.load(files(folder, "int8"), CPU, place=place)
    parameters = dict(model.named_parameters())
    assert placed.keys() == parameters.keys()
    assert all(parameters[name].device == device for name, device in placed.items())


@pytest.mark.parametrize("kind", frozen.KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_arent_numbers_are_refused(folder, tmp_path, kind, bad):
    """Packed, a NaN would be an ordinary number."""
    model = Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_submodule(LINEAR).weight[3, 5] = bad  # pyright: ignore
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"{LINEAR}\.weight isn't all numbers"):
        transformer.load(files(tmp_path, kind), CPU)


def test_at_most_two_tensors_are_in_ram_beside_the_result(folder, tmp_path, monkeypatch):
    """While a copy is written, too. Norms are left out: they are the result as they are read."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts: list[int] = []
    read = Stored.read

    def counting(self: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = read(self, rows)
        if tensor.ndim == 2:
            alive.add(tensor)
        counts.append(len(alive))
        return tensor

    monkeypatch.setattr(Stored, "read", counting)
    monkeypatch.setattr(lora, "BLOCK_LINEAR", re.compile(""))  # so that every matrix is quantised
    for _ in kept.writing(tmp_path / "copy", transformer._from_source(files(folder, "int8"), CPU)):
        pass
    assert len(counts) > 40
    assert max(counts) == 2


# kept copies


@pytest.fixture
def load(folder, tmp_path):
    """Loads with a cache."""
    return partial(transformer.load, device=CPU, cache=tmp_path / "cache")


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Files that tensors were read from."""
    read, found = Stored.read, []

    def noting(self: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        found.append(self.file)
        return read(self, rows)

    monkeypatch.setattr(Stored, "read", noting)
    return found


@pytest.mark.parametrize("kind", frozen.KINDS)
def test_the_second_start_reads_the_copy_alone(folder, load, reads, capsys, kind):
    first = load(files(folder, kind))
    assert {path.parent for path in reads} == {folder}
    reads.clear()
    assert_same(load(files(folder, kind)), first)
    assert reads
    assert {path.parent.parent.name for path in reads} == {kept.FOLDER}
    assert capsys.readouterr().out == ""


def test_each_kind_and_source_has_its_own_copy(folder, single, load, tmp_path):
    for kind in frozen.KINDS:
        load(files(folder, kind))
    load(files(folder, "int8", file=single))
    copies = tmp_path / "cache" / kept.FOLDER
    assert len(list(copies.iterdir())) == 4


@pytest.mark.parametrize("kind", ["none", "fp8"])
def test_what_isnt_quantised_here_isnt_kept(folder, single, load, tmp_path, kind):
    """bf16, and fp8 that is fp8 in its file."""
    load(files(folder, kind, file=single))
    assert not (tmp_path / "cache" / kept.FOLDER).exists()


HARMS = {
    "cut": lambda copy: damage.truncate(copy / "00000.safetensors"),
    "flipped": lambda copy: damage.flip_bit(copy / "00000.safetensors"),
    "gone": lambda copy: (copy / "00000.safetensors").unlink(),
    "no index": lambda copy: (copy / kept.INDEX).unlink(),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_damaged_copy_is_made_anew_and_that_is_said(folder, load, tmp_path, capsys, reads, harm):
    first = load(files(folder, "fp8"))
    (copy,) = (tmp_path / "cache" / kept.FOLDER).iterdir()
    harm(copy)
    assert_same(load(files(folder, "fp8")), first)
    said = capsys.readouterr().out
    assert said.startswith(f"{copy}: this quantised copy of the base is damaged (")
    assert said.endswith("; it is made anew\n")
    reads.clear()
    assert_same(load(files(folder, "fp8")), first)
    assert {path.parent for path in reads} == {copy}


def test_a_copy_of_another_model_is_made_anew(folder, load, tmp_path, capsys):
    """As if its meaning had changed and nobody had raised the format."""
    first = load(files(folder, "int8"))
    (copy,) = (tmp_path / "cache" / kept.FOLDER).iterdir()
    for other in ("fp8", "nf4"):
        load(files(folder, other))
        (wrong,) = {*copy.parent.iterdir()} - {copy}
        shutil.rmtree(copy)
        wrong.rename(copy)
        assert_same(load(files(folder, "int8")), first)
        assert f"{copy}: this quantised copy of the base is another model's (" in (
            capsys.readouterr().out
        )


def test_a_changed_source_is_another_copy(folder, load, tmp_path, capsys):
    """No stale weights; the old copy stays, as another base's may."""
    changed = shutil.copytree(folder, tmp_path / "changed")
    load(files(changed, "int8"))
    model = Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_submodule(LINEAR).weight.mul_(2)  # pyright: ignore
    model.save_pretrained(changed, max_shard_size="40KB")
    again = load(files(changed, "int8"))
    assert_same(again, transformer.load(files(changed, "int8"), CPU))
    assert len(list((tmp_path / "cache" / kept.FOLDER).iterdir())) == 2
    assert capsys.readouterr().out == ""


def test_without_room_there_is_no_copy_and_that_is_said(
    folder, load, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(kept, "has_room", lambda folder, size: False)
    model = load(files(folder, "nf4"))
    assert_same(model, transformer.load(files(folder, "nf4"), CPU))
    assert capsys.readouterr().out == (
        f"{tmp_path / 'cache'}: no room for a quantised copy of the base (0.0 GB); "
        "each start has to quantise it again\n"
    )
    assert not list((tmp_path / "cache" / kept.FOLDER).glob("*"))


def test_a_copy_keeps_the_type_of_what_isnt_quantised(folder, load):
    model = load(files(folder, "int8"))
    fp32 = load(Files(folder / "config.json", folder, None, torch.float32, "int8"))
    assert (model.dtype, fp32.dtype) == (torch.bfloat16, torch.float32)


def test_two_processes_at_once(folder, tmp_path):
    """With one cache, as on two machines that share a disk: both load, one copy stays."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def start() -> None:
        model = transformer.load(files(folder, "nf4"), CPU, cache=tmp_path)
        results.put({name: kept.checksum(p) for name, p in model.named_parameters()})

    pair = [context.Process(target=start) for _ in range(2)]
    for process in pair:
        process.start()
    answers = [results.get(timeout=60) for _ in pair]
    for process in pair:
        process.join(timeout=60)
    model = transformer.load(files(folder, "nf4"), CPU)
    wanted = {name: kept.checksum(p) for name, p in model.named_parameters()}
    assert answers == [wanted, wanted]
    assert len(list((tmp_path / kept.FOLDER).iterdir())) == 1


# through a config


def resolved(dev_folder: Path, **config) -> Base:
    """As a run finds it."""
    return resolve(BaseConfig(model=str(dev_folder), **config))


def test_a_file_in_place_of_the_bases_own(dev_folder, tmp_path):
    other = tiny.transformer(guidance=True, seed=11).to(torch.bfloat16)  # pyright: ignore
    path = bfl.save(bfl.tensors(other), tmp_path / "other.safetensors")
    found = resolved(dev_folder, transformer=str(path))
    assert_same(found.load_transformer(CPU), other)


def test_a_file_that_doesnt_fit_is_refused_before_anything_is_loaded(dev_folder, tmp_path):
    klein = tiny.transformer(guidance=False)
    path = bfl.save(bfl.tensors(klein), tmp_path / "klein.safetensors")
    with pytest.raises(ConfigError, match=r"guidance_in\.in_layer\.weight isn't there"):
        resolved(dev_folder, transformer=str(path))
    with pytest.raises(ConfigError, match=r"there is no file nowhere\.safetensors"):
        resolved(dev_folder, transformer=str(tmp_path / "nowhere.safetensors"))


def test_a_local_base_that_is_cut_is_refused_before_anything_is_loaded(dev_folder, tmp_path):
    broken = shutil.copytree(dev_folder, tmp_path / "broken")
    damage.truncate(broken / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match="cut off or damaged"):
        resolved(broken)
    whole = dev_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert "proj_out.weight" in stored.read_header(whole, where="")[0]  # the fixture itself

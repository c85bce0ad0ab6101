"""Resize, merge and merging into a base: the change of every weight before against after."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file, save_file

from tests import bfl, tiny
from tests.unit.adapters import state as adapters
from tests.unit.adapters.state import deltas, random_lora, save
from train.adapters import bake, convert, merge, resize
from train.adapters.files import File, body_hash
from train.adapters.merge import open_part
from train.adapters.write import LAYOUTS
from train.errors import CheckpointError, ConfigError, MachineError


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_resize_to_a_rank(rank: int, to: str, tmp_path: Path) -> None:
    path, output = save(random_lora(1), tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    before = deltas(path)
    _, kept = resize.resize(path, output, rank=rank, to=to)
    after = deltas(output)
    assert after.keys() == before.keys()
    for module, delta in before.items():
        values = torch.linalg.svdvals(delta).square()
        best = (values[rank:].sum() / values.sum()).sqrt().item()
        assert relative(after[module], delta) == pytest.approx(best, abs=1e-5)
        energy = kept.energy[f"transformer.{module}"]
        assert energy == pytest.approx(1 - best**2, abs=1e-9)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_resize_to_an_energy(energy: float, tmp_path: Path) -> None:
    path, output = save(random_lora(1), tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    before = deltas(path)
    _, kept = resize.resize(path, output, energy=energy)
    after = deltas(output)
    for module, delta in before.items():
        assert relative(after[module], delta) ** 2 <= 1 - energy + 1e-6
        shares = torch.linalg.svdvals(delta).square().cumsum(0)
        enough = int((shares < energy * shares[-1]).sum()) + 1
        assert kept.rank[f"transformer.{module}"] == enough


def test_resize_cuts_fused_q_k_and_v_as_one(tmp_path: Path) -> None:
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    up, down = torch.randn(48, 4), torch.randn(4, 16)
    path = save(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "a.safetensors"
    )
    resize.resize(path, tmp_path / "b.safetensors", rank=2)
    tensors = load_file(tmp_path / "b.safetensors")
    found = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
    u, s, v = torch.linalg.svd(up @ down)
    torch.testing.assert_close(found[0] @ found[1], u[:, :2] * s[:2] @ v[:2], atol=1e-4, rtol=1e-4)
    assert found[1].shape == (2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "say --rank N"), ({"rank": 0}, "is no rank"), ({"energy": 1.5}, "is no share")],
)
def test_resize_says_what_it_needs(arguments: dict, message: str, tmp_path: Path) -> None:
    path = save(random_lora(1), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=message):
        resize.resize(path, tmp_path / "b.safetensors", **arguments)


@pytest.mark.parametrize("to", LAYOUTS)
def test_merge_is_the_weighted_sum(to: str, tmp_path: Path) -> None:
    one = save(random_lora(1), tmp_path / "a.safetensors")
    two = save(random_lora(2, rank=3), tmp_path / "b.safetensors")
    output = tmp_path / "c.safetensors"
    merge.merge([open_part(f"{one}:0.8"), open_part(f"{two}:-0.5")], output, to=to)
    first, second, found = deltas(one), deltas(two), deltas(output)
    for module in first:
        assert relative(found[module], 0.8 * first[module] - 0.5 * second[module]) < 1e-6


def test_merge_of_different_targets(tmp_path: Path) -> None:
    whole, half = random_lora(1), random_lora(2)
    half = {key: tensor for key, tensor in half.items() if ".attn." in key}
    one, two = save(whole, tmp_path / "a.safetensors"), save(half, tmp_path / "b.safetensors")
    output = tmp_path / "c.safetensors"
    merge.merge([open_part(str(two)), open_part(str(one))], output)
    first, second, found = deltas(one), deltas(two), deltas(output)
    for module in first:
        assert relative(found[module], first[module] + second.get(module, 0)) < 1e-6
    assert list(found) == list(first)


def test_merge_and_cut(tmp_path: Path) -> None:
    files = [save(random_lora(i), tmp_path / f"{i}.safetensors") for i in (1, 2)]
    output = tmp_path / "c.safetensors"
    _, kept = merge.merge([open_part(str(file)) for file in files], output, rank=3)
    first, second, found = (deltas(file) for file in (*files, output))
    for module, delta in found.items():
        whole = first[module] + second[module]
        values = torch.linalg.svdvals(whole).square()
        best = (values[3:].sum() / values.sum()).sqrt().item()
        assert relative(delta, whole) == pytest.approx(best, abs=1e-5)
        assert kept.energy[module] == pytest.approx(1 - best**2, abs=1e-9)


def test_merge_refuses_what_does_not_add_up(tmp_path: Path) -> None:
    one = save(random_lora(1), tmp_path / "a.safetensors")
    wide = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 32)}
    wide["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.ones(32, 2)
    two = save(wide, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"a base 32 wide.*one 16 wide"):
        merge.merge([open_part(str(one)), open_part(str(two))], tmp_path / "c.safetensors")
    name = "transformer.transformer_blocks.0.attn.to_q"
    lokr = {f"{name}.lokr_w1": torch.ones(4, 4), f"{name}.lokr_w2": torch.ones(4, 4)}
    three = save(lokr, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="LoKr doesn't add up"):
        merge.merge([open_part(str(one)), open_part(str(three))], tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match="'x' is no number"):
        open_part(f"{one}:x")


def tiny_adapter(folder: Path, path: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """For the tiny base, over some of its Linears."""
    draw, state = torch.Generator().manual_seed(4), {}
    for key, weight in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        if weight.ndim == 2 and ("attn.to_" in key or "norm_out" in key):
            stem = f"transformer.{key.removesuffix('.weight')}"
            state[f"{stem}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=draw)
            state[f"{stem}.lora_B.weight"] = torch.randn(len(weight), 2, generator=draw)
    return save({key: tensor.to(dtype) for key, tensor in state.items()}, path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny transformer's folder, bf16."""
    folder = tmp_path_factory.mktemp("base") / "transformer"
    tiny.transformer(guidance=True).bfloat16().save_pretrained(folder)
    return folder


def sharded(base: Path, folder: Path) -> Path:
    """The same in three files with an index."""
    tensors = load_file(base / "diffusion_pytorch_model.safetensors")
    folder.mkdir(parents=True)
    shutil.copy(base / "config.json", folder)
    weight_map = {}
    for i in range(3):
        name = f"diffusion_pytorch_model-{i + 1:05}-of-00003.safetensors"
        part = dict(list(tensors.items())[i::3])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder.parent


def expected(base: Path, adapter: Path, weight: float) -> dict[str, torch.Tensor]:
    """Every weight rounded once."""
    tensors = load_file(base / "diffusion_pytorch_model.safetensors")
    for module, delta in deltas(adapter).items():
        key = f"{module}.weight"
        tensors[key] = (tensors[key].double() + weight * delta).to(tensors[key].dtype)
    return tensors


def in_bfl_names(tensors: dict, config: dict) -> dict:
    """diffusers' tensors as a BFL file has them."""
    return bfl.tensors(SimpleNamespace(state_dict=lambda: tensors, config=config))


def assert_rounded_once(found: dict, wanted: dict) -> None:
    """Equal but for ties that fp32 rounds the other way than fp64: under 1 in 1000, by one step."""
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        differing = (found[key] != tensor).float().mean().item()
        assert differing < 1e-3, key
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=2**-7)


@pytest.mark.parametrize("shards", [False, True])
def test_into_a_folder(shards: bool, base: Path, tmp_path: Path) -> None:
    folder = sharded(base, tmp_path / "pipeline" / "transformer") if shards else base
    adapter = tiny_adapter(base, tmp_path / "a.safetensors")
    output = tmp_path / "merged"
    baked = bake.bake(merge.updates_of([open_part(f"{adapter}:0.5")]), folder, output)
    found = {k: t for path in output.glob("*.safetensors") for k, t in load_file(path).items()}
    assert_rounded_once(found, expected(base, adapter, 0.5))
    source = folder / "transformer" if shards else folder
    assert {p.name for p in output.iterdir()} == {p.name for p in source.iterdir()}
    loaded = Flux2Transformer2DModel.from_pretrained(output, dtype=torch.bfloat16).state_dict()
    assert_rounded_once(loaded, expected(base, adapter, 0.5))
    assert baked.changed == len(deltas(adapter))
    before = load_file(base / "diffusion_pytorch_model.safetensors")
    lost = norm = 0.0
    for module, delta in deltas(adapter).items():
        exact = before[f"{module}.weight"].double() + 0.5 * delta
        lost += (found[f"{module}.weight"].double() - exact).square().sum().item()
        norm += (0.5 * delta).square().sum().item()
    assert baked.loss == pytest.approx((lost / norm) ** 0.5, rel=1e-3)


def test_a_folder_into_one_file_of_bfl_names(base: Path, tmp_path: Path) -> None:
    adapter, output = tiny_adapter(base, tmp_path / "a.safetensors"), tmp_path / "m.safetensors"
    bake.bake(merge.updates_of([open_part(str(adapter))]), base, output)
    config = json.loads((base / "config.json").read_text())
    wanted = in_bfl_names(expected(base, adapter, 1.0), config)
    assert_rounded_once(load_file(output), wanted)


def test_a_bfl_file_into_one_of_its_names(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    before = in_bfl_names(load_file(base / "diffusion_pytorch_model.safetensors"), config)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in before.items()}
    save_file({k: t.contiguous() for k, t in prefixed.items()}, tmp_path / "base.safetensors")
    adapter, output = tiny_adapter(base, tmp_path / "a.safetensors"), tmp_path / "m.safetensors"
    bake.bake(merge.updates_of([open_part(str(adapter))]), tmp_path / "base.safetensors", output)
    wanted = in_bfl_names(expected(base, adapter, 1.0), config)
    found = {k.removeprefix("model.diffusion_model."): t for k, t in load_file(output).items()}
    assert_rounded_once(found, wanted)


def test_into_a_base_of_another_shape(base: Path, tmp_path: Path) -> None:
    adapter = save(random_lora(1), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="it was trained on another base"):
        bake.bake(merge.updates_of([open_part(str(adapter))]), base, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_into_a_folder_that_exists(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "a.safetensors")
    with pytest.raises(MachineError, match="exists already"):
        bake.bake(merge.updates_of([open_part(str(adapter))]), base, tmp_path)


def test_rows_are_changed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    update = bake.LowRank(torch.randn(10, 2), torch.randn(2, 5))
    weight = torch.randn(10, 5)
    whole, pieces = weight.clone(), weight.clone()
    bake.add_into(whole, update, bake.Baked())
    monkeypatch.setattr(bake, "CHUNK", 15)
    bake.add_into(pieces, update, bake.Baked())
    torch.testing.assert_close(whole, weight + update.up @ update.down)
    torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_error_of_a_conversion_is_the_one_there_is(dtype: str, tmp_path: Path) -> None:
    path, output = save(random_lora(1), tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    outcome, _ = convert.convert(path, output, to="comfyui", dtype=dtype)
    before, after = deltas(path), deltas(output)
    fused = ("to_q", "to_k", "to_v", "add_q", "add_k", "add_v")
    alone = [m for m in before if m.rpartition(".")[2].split("_proj")[0] not in fused]
    worst = max(relative(after[module], before[module]) for module in alone)
    assert (outcome.error == 0) is (dtype == "fp32")
    assert outcome.error >= worst * 0.99
    assert outcome.error < {"fp32": 1e-9, "bf16": 6e-3, "fp16": 8e-4}[dtype]


def test_metadata_are_kept_but_for_what_became_false(tmp_path: Path) -> None:
    given = {"ss_output_name": "mika", "sshs_model_hash": "old", "ss_network_dim": "8"}
    path = save(random_lora(1), tmp_path / "a.safetensors", given)
    output = tmp_path / "b.safetensors"
    convert.convert(path, output, to="diffusers")
    found = adapters.Source(output).file.metadata
    assert found["ss_output_name"] == "mika"
    assert found["ss_network_dim"] == "4"
    assert found["kindling.converted_from"].startswith("transformer. + diffusers names")
    assert found["sshs_model_hash"] == body_hash(output)


def test_a_merge_says_of_what_where_both_say_what_they_are(tmp_path: Path) -> None:
    spec = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Flux.2-custom/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.license": "MIT",
    }
    titled = spec | {"modelspec.title": "Mika", "modelspec.license": "Apache-2.0"}
    one = save(random_lora(1), tmp_path / "one.safetensors", spec)
    two = save(random_lora(2), tmp_path / "two.safetensors", titled)
    output = tmp_path / "both.safetensors"
    merge.merge([open_part(str(one)), open_part(str(two))], output)
    metadata = File(output).metadata
    assert metadata["modelspec.merged_from"] == "one, Mika"
    assert metadata["modelspec.title"] == "both"
    assert metadata["modelspec.architecture"] == "Flux.2-custom/lora"
    assert "modelspec.license" not in metadata, "they differ"
    save(random_lora(2), two)
    merge.merge([open_part(str(one)), open_part(str(two))], output)
    assert not any(k.startswith("modelspec.m") for k in File(output).metadata)

"""Where weights come from: what is read, and what is said of a file that it can't be read from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import bfl, damage, tiny
from train import weights
from train.errors import ConfigError


@pytest.fixture(scope="module")
def model():
    """A small transformer in bf16, as dev's file is."""
    return tiny.transformer(guidance=True).to(torch.bfloat16)


def dense(path: Path, model) -> dict[str, torch.Tensor]:
    """All weights of a file, fp32."""
    source = weights.open_file(path, dict(model.config))
    return {name: weight.dense(torch.float32) for name, weight in source.read_all()}


def complaint(path: Path, model) -> str:
    """What is said of a file."""
    with pytest.raises(ConfigError) as caught:
        weights.open_file(path, dict(model.config))
    assert str(caught.value).startswith(f"base.transformer: {path}: ")
    return str(caught.value).split(": ", 2)[2]


@pytest.mark.parametrize("ending", weights.SCALES)
def test_scaled_fp8_is_the_value_times_its_scale(tmp_path, model, ending):
    made = bfl.scaled(bfl.tensors(model), ending=ending)
    marked = made | {"scaled_fp8": torch.empty(0, dtype=bfl.FP8)}
    found = dense(bfl.save(marked, tmp_path / "x.safetensors", prefix=weights.PREFIX), model)
    wanted = dict(made)
    for key in made:
        if key.endswith(ending):
            name = key.removesuffix(ending) + ".weight"
            wanted[name] = made[name].float() * wanted.pop(key)
    plain = dense(bfl.save(wanted, tmp_path / "plain.safetensors"), model)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    name = "transformer_blocks.1.attn.to_k.weight"
    assert 0 < (found[name] - model.state_dict()[name]).norm() < 0.03 * found[name].norm()


def test_newer_files_notes_and_norms_are_understood(tmp_path, model):
    old = bfl.scaled(bfl.tensors(model))
    new = bfl.newer(old)
    new = {key.replace("_norm.scale", "_norm.weight"): weight for key, weight in new.items()}
    layers = {"double_blocks.0.img_attn.qkv": {"format": "float8_e4m3fn"}}
    notes = {"_quantization_metadata": json.dumps({"layers": layers})}
    found = dense(bfl.save(new, tmp_path / "new.safetensors", **notes), model)
    wanted = dense(bfl.save(old, tmp_path / "old.safetensors"), model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_scale_for_each_row_goes_with_its_rows(tmp_path, model):
    key = "double_blocks.0.txt_attn.qkv"
    made = bfl.tensors(model)
    rows = len(made[f"{key}.weight"])
    made[f"{key}.weight_scale"] = torch.arange(1.0, rows + 1)
    found = dense(bfl.save(made, tmp_path / "x.safetensors"), model)
    third = rows // 3
    name = "transformer_blocks.0.attn.add_v_proj.weight"
    scale = torch.arange(2 * third + 1.0, rows + 1)[:, None]
    assert torch.equal(found[name], model.state_dict()[name].float() * scale)


def test_a_file_in_diffusers_names_is_read_too(tmp_path, model):
    path = bfl.save(model.state_dict(), tmp_path / "x.safetensors")
    found = dense(path, model)
    assert all(torch.equal(found[k], v.float()) for k, v in model.state_dict().items())


def test_a_missing_key_an_unknown_one_and_a_wrong_shape_are_listed(tmp_path, model):
    made = bfl.tensors(model)
    del made["single_blocks.1.linear2.weight"]
    made["img_in.bias"] = torch.zeros(32)
    made["txt_in.weight"] = torch.zeros(32, 40)
    made["double_blocks.0.img_attn.qkv.weight"] = torch.zeros(90, 32)
    assert complaint(bfl.save(made, tmp_path / "x.safetensors"), model).splitlines() == [
        "not the weights of this base's transformer:",
        "  single_blocks.1.linear2.weight isn't there",
        "  img_in.bias has no place in the model",
        "  txt_in.weight is 32 x 40; context_embedder needs 32 x 144",
        *(
            "  double_blocks.0.img_attn.qkv.weight is 90 x 32; transformer_blocks.0."
            f"attn.{part} needs 96 x 32"
            for part in ("to_q", "to_k", "to_v")
        ),
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"img_in.weight_scale": torch.ones(5)}, "img_in.weight is 32 x 16 and its scale 5"),
        ({"nothing.weight_scale": torch.ones(())}, "nothing.weight_scale has no place"),
        ({"vae.decoder.weight": torch.ones(1)}, "vae.decoder.weight has no place"),
        (
            {"img_in.weight": torch.zeros(32, 16, dtype=torch.int8)},
            "img_in.weight is stored as I8, which isn't read",
        ),
        (
            {
                "img_in.weight": torch.zeros(32, 16, dtype=bfl.FP8),
                "txt_in.weight_scale": torch.ones(()),
            },
            "img_in.weight is in fp8 and has no scale, though others have",
        ),
        ({"vector_in.in_layer.weight": torch.ones(1)}, "this is FLUX.1"),
        (
            {"img_in.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
            "img_in.comfy_quant is in nvfp4, which isn't read. Take the bf16 or the scaled fp8",
        ),
        (
            {"img_in.comfy_quant": torch.tensor(list(b"{"), dtype=torch.uint8)},
            "its notes on quantisation are damaged",
        ),
    ],
)
def test_each_odd_key_is_named(tmp_path, model, change, says):
    path = bfl.save(bfl.tensors(model) | change, tmp_path / "x.safetensors")
    assert says in complaint(path, model)


def test_notes_in_the_metadata_count_too(tmp_path, model):
    notes = {"_quantization_metadata": '{"layers": {"img_in": {"format": "nvfp4"}}}'}
    path = bfl.save(bfl.tensors(model), tmp_path / "x.safetensors", **notes)
    assert "img_in is in nvfp4" in complaint(path, model)


def test_an_adapter_isnt_a_base(tmp_path, model):
    for key in ("transformer.x.lora_A.weight", "lora_unet_x.alpha", "diffusion_model.x.lokr_w1"):
        path = bfl.save({key: torch.zeros(4, 4)}, tmp_path / "x.safetensors")
        assert f"this is an adapter, not a base (it has {key})" in complaint(path, model)


def test_another_models_file_is_said_to_be_one(tmp_path, model):
    path = bfl.save({"decoder.conv.weight": torch.zeros(4)}, tmp_path / "x.safetensors")
    assert "this isn't a transformer of FLUX.2" in complaint(path, model)
    assert "but decoder.conv.weight" in complaint(path, model)


def test_files_of_other_kinds_are_named(tmp_path, model):
    path = tmp_path / "x.safetensors"
    torch.save({"img_in.weight": torch.zeros(4)}, path)
    assert "is a pickle, whatever its name says" in complaint(path, model)
    path.write_bytes(b"GGUF" + bytes(100))
    assert "is a GGUF file" in complaint(path, model)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "is a pointer of Git LFS" in complaint(path, model)
    for content in (b"", b"{}", bytes(8), (5).to_bytes(8, "little") + b"[1,2]"):
        path.write_bytes(content)
        assert "isn't a safetensors file, or its beginning is damaged" in complaint(path, model)
    path.unlink()
    assert "there is no file x.safetensors" in complaint(path, model)


def test_a_cut_file_is_found_before_anything_is_loaded(tmp_path, model):
    path = bfl.save(bfl.tensors(model), tmp_path / "x.safetensors")
    size = path.stat().st_size
    damage.truncate(path)
    assert f"has {size // 2} bytes and should have {size}. It is cut off" in complaint(path, model)


def test_a_header_that_lies_about_sizes_is_damage(tmp_path, model):
    path = bfl.save(bfl.tensors(model), tmp_path / "x.safetensors")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"shape":[32,16]', b'"shape":[16,16]'))
    assert "its beginning is damaged" in complaint(path, model)


def folder_complaint(folder: Path, model) -> str:
    """What is said of a folder."""
    with pytest.raises(ConfigError) as caught:
        weights.open_folder(folder, dict(model.config))
    assert str(caught.value).startswith(f"base.model: {folder}: ")
    return str(caught.value).split(": ", 2)[2]


def test_a_folder_lacking_a_shard_or_repeating_a_weight_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path / "whole", max_shard_size="60KB")
    for number, (name, _) in enumerate(sorted_shards(tmp_path / "whole")):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / f"lacks {number}")
        (folder / name).unlink()
        assert folder_complaint(folder, model) == f"there is no file {name}."
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "twice")
    (first, _), (second, tensors) = sorted_shards(folder)[:2]
    extra = load_file(folder / first)
    key = min(extra)
    save_file(tensors | {key: extra[key]}, folder / second)
    assert folder_complaint(folder, model) == f"{key} is in two of its files."
    (folder / weights.INDEX).write_text("[]")
    assert "index.json is damaged" in folder_complaint(folder, model)


def sorted_shards(folder: Path) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Names and contents of a folder's shards."""
    return [(path.name, load_file(path)) for path in sorted(folder.glob("*.safetensors"))]


def test_a_folder_with_pickles_only_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert "there is no file diffusion_pytorch_model.safetensors" in folder_complaint(
        tmp_path, model
    )

"""Where a transformer's weights are, in folders and in single files, and what isn't taken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import bfl, damage, tiny
from train.encoding.cache import FileDigests
from train.errors import ConfigError
from train.loading import names, weights
from train.loading.weights import Files, Source

CONFIG = names.DEFAULTS | dict(tiny.transformer(guidance=True).config)
QKV = "double_blocks.0.img_attn.qkv.weight"
Q, K = (f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_k"))
LINEAR = "single_transformer_blocks.1.attn.to_out.weight"
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def model() -> Flux2Transformer2DModel:
    """In bf16, as files are."""
    return tiny.transformer(guidance=True).to(torch.bfloat16)  # pyright: ignore


@pytest.fixture(scope="module")
def plain(model) -> dict[str, Tensor]:
    """Its weights in BFL's names."""
    return bfl.tensors(model)


def read(source: Source, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """All weights."""
    return {name: weight.dense(dtype) for name, weight in source.read_all()}


def opened(
    tensors: dict[str, Tensor], folder: Path, *, prefix: str = "", **metadata: str
) -> Source:
    """A single file of these."""
    return weights.open_file(
        bfl.save(tensors, folder / "one.safetensors", prefix=prefix, **metadata), CONFIG
    )


def complaint(tensors: dict[str, Tensor], folder: Path, **metadata: str) -> str:
    """What is said of a single file, without where it is."""
    with pytest.raises(ConfigError) as caught:
        opened(tensors, folder, **metadata)
    start = f"base.transformer: {folder / 'one.safetensors'}: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To the bit, types included."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shard", ["10GB", "40KB"])
def test_a_folder_holds_what_from_pretrained_reads(model, tmp_path, shard):
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / weights.INDEX).is_file() == (shard == "40KB")
    again = Flux2Transformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert_same(read(weights.open_folder(tmp_path, CONFIG)), again.state_dict())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_in_bfls_names(model, plain, tmp_path, prefix):
    assert_same(read(opened(plain, tmp_path, prefix=prefix)), model.state_dict())


def test_a_file_in_diffusers_names(model, tmp_path):
    assert_same(read(opened(model.state_dict(), tmp_path)), model.state_dict())


def test_norms_may_be_called_weight(model, plain, tmp_path):
    renamed = {key.replace("_norm.scale", "_norm.weight"): t for key, t in plain.items()}
    assert renamed.keys() != plain.keys()
    assert_same(read(opened(renamed, tmp_path)), model.state_dict())


def test_fp8_without_scales_is_plain_numbers(model, plain, tmp_path):
    cast = {key: t.to(FP8) if t.ndim == 2 else t for key, t in plain.items()}
    wanted = {
        key: t.to(FP8).to(torch.bfloat16) if t.ndim == 2 else t
        for key, t in model.state_dict().items()
    }
    assert_same(read(opened(cast, tmp_path)), wanted)


@pytest.mark.parametrize("version", ["older", "newer"])
def test_scaled_fp8_comes_back_multiplied(model, plain, tmp_path, version):
    """One scale a matrix, that of a fused one for each of its parts."""
    if version == "older":
        tensors = bfl.scaled(plain, ending=".scale_weight")
        tensors["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    else:
        tensors = bfl.newer(bfl.scaled(plain))
    found = read(opened(tensors, tmp_path, prefix=weights.PREFIX), torch.float32)
    ending = ".scale_weight" if version == "older" else ".weight_scale"
    stem = QKV.removesuffix(".weight")
    wanted = tensors[QKV].float() * tensors[stem + ending]
    assert torch.equal(torch.cat([found[Q], found[K]]), wanted[:64])
    truth = model.state_dict()
    for name, weight in found.items():
        error = (weight - truth[name].float()).norm() / truth[name].float().norm()
        assert error < 0.03 if name in (Q, K, LINEAR) else error < 0.05


def test_a_scale_for_each_row_goes_with_its_rows(plain, tmp_path):
    """Cut where the rows are cut, swapped where their halves are."""
    tensors = dict(plain)
    for key in (QKV, "final_layer.adaLN_modulation.1.weight"):
        rows = len(plain[key])
        tensors[key] = plain[key].float().mul(100).to(FP8)
        tensors[f"{key.removesuffix('.weight')}.weight_scale"] = torch.arange(1.0, rows + 1)[
            :, None
        ]
    found = read(opened(tensors, tmp_path), torch.float32)
    rows_1 = torch.arange(1.0, 97.0)[:, None]
    assert torch.equal(found[K], (tensors[QKV].float() * rows_1)[32:64])
    last = tensors["final_layer.adaLN_modulation.1.weight"].float() * rows_1[:64]
    assert torch.equal(found["norm_out.linear.weight"], torch.cat([last[32:], last[:32]]))


def test_a_scaled_norm_keeps_its_shape(model, tmp_path):
    norm, tensors = "transformer_blocks.0.attn.norm_q", dict(model.state_dict())
    tensors[f"{norm}.weight"] = stored = tensors[f"{norm}.weight"].to(FP8)
    tensors[f"{norm}.weight_scale"] = torch.tensor(2.0)
    found = read(opened(tensors, tmp_path), torch.float32)
    assert torch.equal(found[f"{norm}.weight"], 2 * stored.float())


WRONG = {
    "adapter": (
        {"transformer.single_transformer_blocks.0.attn.to_out.lora_A.weight": (4, 128)},
        "this is an adapter, not a base (it has transformer.single_transformer_blocks.0.attn."
        "to_out.lora_A.weight). Give the base here; an adapter is made by training.",
    ),
    "kohya adapter": (
        {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 32)},
        "this is an adapter, not a base",
    ),
    "FLUX.1": (
        {"img_in.weight": (32, 16), "vector_in.in_layer.weight": (32, 768)},
        "this is FLUX.1 (it has vector_in.in_layer.weight); give FLUX.2's file.",
    ),
    "FLUX.1 of diffusers": (
        {
            "x_embedder.weight": (32, 16),
            "time_text_embed.text_embedder.linear_1.weight": (32, 768),
        },
        "this is FLUX.1",
    ),
    "SDXL": (
        {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
        "this isn't a transformer of FLUX.2: it has neither img_in.weight (BFL's and ComfyUI's "
        "naming) nor x_embedder.weight (diffusers'), but input_blocks.0.0.weight.",
    ),
    "VAE": ({"encoder.conv_in.weight": (128, 3, 3, 3)}, "but encoder.conv_in.weight."),
}


@pytest.mark.parametrize(("shapes", "said"), WRONG.values(), ids=WRONG)
def test_what_people_give_by_mistake(tmp_path, shapes, said):
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    assert said in complaint(tensors, tmp_path)


def test_every_kind_of_fault_is_among_the_first(tmp_path):
    tensors = {"x_embedder.weight": torch.zeros(32, 64), "x_embedder.bias": torch.zeros(32)}
    said = complaint(tensors, tmp_path).splitlines()
    assert said[1:4] == [
        "  context_embedder.weight isn't there",
        "  x_embedder.bias has no place in the model",
        "  x_embedder.weight is 32 x 64; x_embedder needs 32 x 16",
    ]


def test_all_faults_are_said_at_once(plain, tmp_path):
    tensors = dict(plain)
    del tensors["single_blocks.1.linear2.weight"]
    tensors["extra.weight"] = torch.zeros(2, 2)
    tensors["txt_in.weight"] = torch.zeros(32, 100)
    tensors[QKV] = torch.zeros(95, 32)
    tensors["img_in.weight"] = torch.zeros(32, 16, dtype=torch.int8)
    said = complaint(tensors, tmp_path).splitlines()
    assert said[0] == "not the weights of this base's transformer:"
    assert said[1:] == [
        "  single_blocks.1.linear2.weight isn't there",
        "  extra.weight has no place in the model",
        "  img_in.weight is stored as I8, which isn't read",
        "  txt_in.weight is 32 x 100; context_embedder needs 32 x 144",
        *(
            f"  {QKV} is 95 x 32; transformer_blocks.0.attn.{name} needs 96 x 32"
            for name in ("to_q", "to_k", "to_v")
        ),
    ]


def test_a_file_of_another_size_is_cut_short_in_the_list(tmp_path):
    other = bfl.tensors(tiny.transformer(guidance=True, double=12))
    said = complaint(other, tmp_path).splitlines()
    assert len(said) == 10
    assert said[-1] == f"  … and {12 * 10 - 8} more"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{QKV[:-7]}.weight_scale": torch.ones(5)}, f"{QKV} is 96 x 32 and its scale 5"),
        (
            {f"{QKV[:-7]}.weight_scale": torch.tensor(1, dtype=torch.uint8)},
            f"the scale of {QKV} is stored as U8, which isn't read",
        ),
        ({"nothing.weight_scale": torch.ones(1)}, "nothing.weight_scale has no place in the model"),
    ],
)
def test_scales_that_dont_fit(plain, tmp_path, change, said):
    assert said in complaint(bfl.scaled(plain) | change, tmp_path)


def test_an_fp8_weight_that_lost_its_scale(plain, tmp_path):
    tensors = bfl.scaled(plain)
    del tensors[f"{QKV[:-7]}.weight_scale"]
    assert f"{QKV} is in fp8 and has no scale, though others have" in complaint(tensors, tmp_path)


@pytest.mark.parametrize("place", ["tensor", "metadata"])
def test_formats_that_arent_read(plain, tmp_path, place):
    layer = "double_blocks.0.img_mlp.0"
    note, metadata, tensors = {"format": "nvfp4"}, {}, dict(plain)
    if place == "tensor":
        content = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
        tensors[f"{layer}.comfy_quant"] = content
    else:
        metadata["_quantization_metadata"] = json.dumps({"layers": {layer: note}})
    said = complaint(tensors, tmp_path, **metadata)
    assert f"{layer}" in said
    assert "is in nvfp4, which isn't read. Take the bf16 or the scaled fp8 file" in said


def test_notes_that_are_damaged(plain, tmp_path):
    assert "its notes on quantisation are damaged" in complaint(
        plain, tmp_path, _quantization_metadata="{"
    )


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """diffusers' folder in shards."""
    model.save_pretrained(tmp_path / "transformer", max_shard_size="40KB")
    return tmp_path / "transformer"


def folder_complaint(folder: Path) -> str:
    """What is said of it."""
    with pytest.raises(ConfigError) as caught:
        weights.open_folder(folder, CONFIG)
    assert str(caught.value).startswith(f"base.model: {folder}: ")
    return str(caught.value).removeprefix(f"base.model: {folder}: ")


def test_a_folder_that_isnt_whole(folder):
    shards = sorted(folder.glob("*.safetensors"))
    content = shards[1].read_bytes()
    damage.truncate(shards[1])
    assert "It is cut off or damaged" in folder_complaint(folder)
    shards[1].unlink()
    assert folder_complaint(folder) == f"there is no file {shards[1].name}."
    shards[1].write_bytes(content)
    tensors = load_file(shards[0])
    gone = tensors.pop(min(tensors))
    save_file(tensors, shards[0])
    assert "isn't there" in folder_complaint(folder)
    save_file({**tensors, min(load_file(shards[1])): gone}, shards[0])
    assert "is in two of its files." in folder_complaint(folder)
    (folder / weights.INDEX).write_text("[]", encoding="utf-8")
    assert folder_complaint(folder).startswith(f"its {weights.INDEX} is damaged")
    (folder / weights.INDEX).unlink()
    assert folder_complaint(folder) == f"there is no file {weights.SINGLE}."


def files(folder: Path, *, file: Path | None = None, quantize: str = "none") -> Files:
    """From a folder, or a file instead."""
    home = None if file else folder
    return Files(folder / "config.json", home, file, torch.bfloat16, quantize)


def test_a_config_of_something_else(folder):
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for change, said in [
        ({"_class_name": "FluxTransformer2DModel"}, "is of FluxTransformer2DModel, not Flux2Tra"),
        ({"quantization_config": {"load_in_4bit": True}}, "is quantised already, in a format"),
    ]:
        path.write_text(json.dumps(settings | change), encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            _ = files(folder).settings
    for content in ("[1]", "{", '"x"'):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=str(path)):
            _ = files(folder).settings


def test_a_config_that_is_older_than_a_setting(folder):
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["out_channels"], settings["mlp_ratio"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert len(files(folder).source().pieces) == len(names.shapes(CONFIG))


def test_the_digest_is_of_all_that_the_weights_depend_on(folder, plain, tmp_path):
    file = bfl.save(plain, tmp_path / "one.safetensors")

    def digest(found: Files) -> str:
        return found.digest(FileDigests(tmp_path / "memo.json"))

    all_of = [files(folder), files(folder, quantize="fp8"), files(folder, quantize="nf4")]
    all_of += [files(folder, file=file), files(folder, file=file, quantize="fp8")]
    before = [digest(one) for one in all_of]
    assert len(set(before)) == 5
    assert [digest(one) for one in all_of] == before
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert digest(files(moved, quantize="fp8")) == before[1]
    damage.flip_bit(file)
    damage.flip_bit(sorted(folder.glob("*.safetensors"))[0])
    after = [digest(one) for one in all_of]
    assert not set(before) & set(after)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"eps": 1e-5}), encoding="utf-8")
    assert not set(after) & {digest(one) for one in all_of}

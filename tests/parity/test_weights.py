"""Names, shapes and contents of weights beside diffusers: its model, its loader, its converter."""

import inspect
import json

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

from tests import bfl, tiny
from train.loading import names, transformer, weights
from train.loading.base import TOY_FOLDER
from train.loading.shapes import SHAPES
from train.loading.weights import Files

CPU = torch.device("cpu")

TOY = json.loads((TOY_FOLDER / "transformer" / "config.json").read_text(encoding="utf-8"))

CONFIGS = {
    "toy": TOY,
    "no guidance": TOY | {"guidance_embeds": False, "out_channels": 20, "mlp_ratio": 2.0},
    **{name: shape.config() for name, shape in SHAPES.items()},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_the_models(name):
    config = {key: value for key, value in CONFIGS[name].items() if not key.startswith("_")}
    with torch.device("meta"):
        model = Flux2Transformer2DModel(**config)
    found = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    whole = {**names.DEFAULTS, **CONFIGS[name]}
    assert names.shapes(whole) == found
    assert names.bfl_homes(whole).keys() == found.keys()


def test_defaults_are_diffusers():
    parameters = inspect.signature(Flux2Transformer2DModel.__init__).parameters
    assert {name: parameters[name].default for name in names.DEFAULTS} == names.DEFAULTS


@pytest.mark.parametrize("guidance", [True, False])
def test_bfl_names_are_those_of_diffusers_converter(guidance):
    """The converter, written by others, turns our BFL file back into the very same weights."""
    model = tiny.transformer(guidance=guidance)
    stored = bfl.tensors(model)
    assert {weight.shape for key, weight in stored.items() if ".qkv." in key} == {(96, 32)}
    converted = convert_flux2_transformer_checkpoint_to_diffusers(stored)
    assert converted.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(converted[name], weight), name


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("prefix", ["", weights.PREFIX])
def test_a_bfl_file_is_read_as_the_converter_reads_it(tmp_path, guidance, prefix):
    model = tiny.transformer(guidance=guidance)
    path = bfl.save(bfl.tensors(model), tmp_path / "x.safetensors", prefix=prefix)
    converted = convert_flux2_transformer_checkpoint_to_diffusers(bfl.tensors(model))
    found = dict(weights.open_file(path, dict(model.config)).read_all())
    assert found.keys() == converted.keys()
    for name, weight in found.items():
        assert weight.scale is None
        assert torch.equal(weight.values, converted[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_an_unquantised_folder_is_from_pretrained(tmp_path, dtype, sharded):
    model = tiny.transformer(guidance=True)
    model.save_pretrained(tmp_path, max_shard_size="60KB" if sharded else "1GB")
    assert (tmp_path / weights.INDEX).is_file() == sharded
    theirs = Flux2Transformer2DModel.from_pretrained(str(tmp_path), dtype=dtype)
    files = Files(tmp_path / "config.json", tmp_path, None, dtype, "none")
    ours = transformer.load(files, CPU)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, weight in theirs.state_dict().items():
        found = ours.state_dict()[name]
        assert found.dtype == weight.dtype
        assert torch.equal(found, weight), name
    assert dict(ours.config) == dict(theirs.config)
    assert (ours.training, ours.dtype, ours.device) == (False, dtype, CPU)
    assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()

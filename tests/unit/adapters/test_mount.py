"""Anybody's file is loaded as it was meant, converted only where diffusers alone would not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop import common, layouts
from train.adapters import certify, mount
from train.errors import CheckpointError
from train.loading.names import Shape
from train.lora import Adapter

PIPELINE: Any = common.pipeline("dev")
TRANSFORMER = PIPELINE.transformer
SHAPE = Shape.of(TRANSFORMER)
SETTINGS = {key: value for key, value in TRANSFORMER.config.items() if not key.startswith("_")}


TWICE = "peft, folded, with alpha tensors"
"""Says its scale in lora_B and once more in alpha, as no trainer means it."""


def loaded_as_meant(path: Path, adapter: Adapter) -> None:
    """What diffusers itself makes of a file, against the adapter."""
    pipeline: Any = common.pipeline("dev")
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="x")
    for module in adapter.down:
        update: Any = certify.loaded_update(pipeline.transformer, module)
        up, down = update.factors()
        torch.testing.assert_close((up @ down).float(), adapter.delta(module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in layouts.LAYOUTS if name != TWICE])
def test_every_layout_is_loaded_at_the_strength_it_was_meant(name: str, tmp_path: Path) -> None:
    adapter = layouts.adapter_for(name, TRANSFORMER)
    path = layouts.write(name, adapter, SHAPE, tmp_path / "theirs.safetensors")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = mount.ready(path, SETTINGS, scratch=scratch)
    loaded_as_meant(found.path, adapter)
    converted = found.path != path
    assert converted == any("converted" in note for note in found.notes)
    if "beside a text encoder's" in name:
        assert "1 keys are no part of it" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "converted"),
    [
        ("peft, folded", False),
        ("kohya", False),
        ("bare, folded", True),
        ("peft, with alpha tensors", True),
    ],
)
def test_what_diffusers_loads_is_left_alone(name: str, converted: bool, tmp_path: Path) -> None:
    adapter = layouts.adapter_for(name, TRANSFORMER)
    path = layouts.write(name, adapter, SHAPE, tmp_path / "theirs.safetensors")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert (mount.ready(path, SETTINGS, scratch=scratch).path != path) == converted


def test_numbers_that_arent_finite(tmp_path: Path) -> None:
    state = common.peft_layout(common.random_adapter(TRANSFORMER))
    state["transformer.transformer_blocks.1.attn.to_k.lora_B.weight"][0, 0] = float("nan")
    path = common.save(state, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.attn\.to_k holds numbers"):
        mount.ready(path, SETTINGS, scratch=tmp_path)


def test_half_an_update(tmp_path: Path) -> None:
    state = common.peft_layout(common.random_adapter(TRANSFORMER))
    del state["transformer.transformer_blocks.1.attn.to_k.lora_B.weight"]
    path = common.save(state, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="has no lora_B"):
        mount.ready(path, SETTINGS, scratch=tmp_path)

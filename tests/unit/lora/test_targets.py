"""Which Linears get an adapter."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from tests import tiny
from train import lora
from train.config import LoraConfig
from train.errors import ConfigError

REAL: dict[str, dict[str, Any]] = {
    "dev": {"num_attention_heads": 48, "num_layers": 8, "num_single_layers": 48},
    "klein-4b": {"num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20},
    "klein-9b": {"num_attention_heads": 32, "num_layers": 8, "num_single_layers": 24},
}
JOINT_WIDTH = {"dev": 15360, "klein-4b": 7680, "klein-9b": 12288}


@cache
def real_shapes(name: str) -> Flux2Transformer2DModel:
    """A real transformer without any memory behind its weights. Don't change it."""
    with torch.device("meta"):
        return Flux2Transformer2DModel(
            **REAL[name], joint_attention_dim=JOINT_WIDTH[name], guidance_embeds=name == "dev"
        )


@pytest.mark.parametrize(
    ("name", "billions"), [("dev", 32.22), ("klein-4b", 3.88), ("klein-9b", 9.08)]
)
def test_the_real_transformers_are_as_large_as_we_say(name, billions):
    parameters = sum(weight.numel() for weight in real_shapes(name).parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    ("name", "targets", "modules", "millions"),
    [
        ("dev", "blocks", 192, 100.7),
        ("dev", "diffusers", 128, 77.1),
        ("dev", "attention", 160, None),
        ("klein-4b", "blocks", 100, None),
        ("klein-4b", "diffusers", 60, None),
        ("klein-9b", "blocks", 144, None),
    ],
)
def test_target_sets_have_the_documented_sizes_at_rank_16(name, targets, modules, millions):
    transformer = real_shapes(name)
    names = lora.select_targets(transformer, targets)
    assert len(names) == modules
    sizes = {name: weight.shape for name, weight in transformer.named_parameters()}
    parameters = sum(16 * sum(sizes[f"{name}.weight"]) for name in names)
    assert millions is None or parameters / 1e6 == pytest.approx(millions, abs=0.05)


def test_attaching_to_the_real_dev_trains_exactly_those():
    config = LoraConfig(rank=16)
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**REAL["dev"])
    assert len(lora.attach(transformer, config, seed=0)) == 192
    weights = lora.trainable(transformer)
    assert len(weights) == 2 * 192
    assert sum(weight.numel() for weight in weights) / 1e6 == pytest.approx(100.7, abs=0.05)


def test_diffusers_set_is_diffusers():
    """Its trainer's default: no text side, no feed-forward."""
    names = lora.select_targets(real_shapes("dev"), "diffusers")
    assert {n for n in names if n.startswith("transformer_blocks.0.")} == {
        f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert {n for n in names if n.startswith("single_transformer_blocks.0.")} == {
        f"single_transformer_blocks.0.attn.{part}" for part in ("to_qkv_mlp_proj", "to_out")
    }


def test_no_set_reaches_outside_of_the_blocks():
    linears = {n for n, m in real_shapes("dev").named_modules() if isinstance(m, torch.nn.Linear)}
    blocks = set(lora.block_linears(real_shapes("dev")))
    assert {"proj_out", "x_embedder", "context_embedder"} <= linears - blocks
    assert set(lora.select_targets(real_shapes("dev"), (".*",))) == blocks


def test_patterns_add_up_and_match_whole_names():
    transformer = tiny.transformer(guidance=True)
    names = lora.select_targets(transformer, (r".*\.to_q", r"single_transformer_blocks\.1\..*"))
    assert names == [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_q",
        "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.1.attn.to_out",
    ]


@pytest.mark.parametrize("pattern", ["to_q", "proj_out", r"transformer_blocks\.9\..*"])
def test_a_pattern_that_matches_nothing_is_an_error(pattern):
    with pytest.raises(ConfigError) as caught:
        lora.select_targets(tiny.transformer(guidance=True), (".*to_k", pattern))
    assert str(caught.value) == (
        f"lora.targets: {pattern!r} matches no Linear in a block. A pattern must match a whole "
        "name, such as 'transformer_blocks.0.attn.to_q' or "
        "'single_transformer_blocks.1.attn.to_out'."
    )

"""What is known of released bases before a download, against the real classes built on meta."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from train.loading.shapes import SHAPES, TEXT_ENCODERS, VAE_PARAMETERS, TextEncoder


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_transformer(name: str) -> None:
    with torch.device("meta"):
        model = Flux2Transformer2DModel(**SHAPES[name].config())
    assert count(model) == SHAPES[name].parameters


def test_vae() -> None:
    with torch.device("meta"):
        assert count(AutoencoderKLFlux2()) == VAE_PARAMETERS


def settings(encoder: TextEncoder, *, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": encoder.width,
        "intermediate_size": encoder.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": encoder.heads,
        "num_key_value_heads": encoder.groups,
        "head_dim": encoder.head_width,
        "vocab_size": encoder.vocabulary,
    }


@pytest.mark.parametrize("name", ["klein-4b", "klein-9b"])
def test_qwen(name: str) -> None:
    encoder = TEXT_ENCODERS[name]
    tied: dict[str, Any] = {"tie_word_embeddings": not encoder.beside}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**settings(encoder, layers=36), **tied))
        cut = Qwen3ForCausalLM(Qwen3Config(**settings(encoder, layers=encoder.used), **tied))
    assert count(model) == encoder.stored
    assert count(cut.model) == encoder.parameters(encoder.used)


def test_mistral() -> None:
    encoder = TEXT_ENCODERS["dev"]
    vision = PixtralVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
    )
    config = Mistral3Config(
        text_config=MistralConfig(**settings(encoder, layers=encoder.layers)),
        vision_config=vision,
        spatial_merge_size=2,
        multimodal_projector_bias=False,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(config)
    assert count(model) == encoder.stored
    linears = [
        m for m in model.model.language_model.layers[0].modules() if isinstance(m, nn.Linear)
    ]
    assert sum(linear.weight.numel() for linear in linears) == encoder.linears

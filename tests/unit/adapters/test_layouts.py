"""What names mean."""

import pytest

from train.adapters import layouts


@pytest.mark.parametrize(
    ("key", "weight", "modules", "part"),
    [
        (
            "transformer.transformer_blocks.7.attn.to_out.0.lora_A.weight",
            "double_blocks.7.img_attn.proj",
            ("transformer_blocks.7.attn.to_out.0",),
            "down",
        ),
        (
            "lora_unet_double_blocks_12_txt_attn_qkv.alpha",
            "double_blocks.12.txt_attn.qkv",
            tuple(f"transformer_blocks.12.attn.add_{x}_proj" for x in "qkv"),
            "alpha",
        ),
        (
            "lycoris_single_transformer_blocks_7_attn_to_qkv_mlp_proj.lokr_w2_b",
            "single_blocks.7.linear1",
            ("single_transformer_blocks.7.attn.to_qkv_mlp_proj",),
            "lokr_w2_b",
        ),
        (
            "base_model.model.final_layer.adaLN_modulation.1.lora_B.weight",
            "final_layer.adaLN_modulation.1",
            ("norm_out.linear",),
            "up",
        ),
        (
            "transformer.transformer_blocks.0.attn.to_qkv.lokr_w1",
            "double_blocks.0.img_attn.qkv",
            tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"),
            "lokr_w1",
        ),
    ],
)
def test_keys(key: str, weight: str, modules: tuple[str, ...], part: str) -> None:
    found = layouts.parse(key)
    assert found is not None
    assert (found.target.weight, found.target.modules, found.part) == (weight, modules, part)
    assert found.prefix + found.name + found.end == key


@pytest.mark.parametrize(
    "key",
    [
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.norm_q.lora_A.weight",
        "transformer.transformer_blocks.00.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.x.attn.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "transformer.transformer_blocks.0.attn.to_q.weight",
        "",
    ],
)
def test_what_means_nothing(key: str) -> None:
    assert layouts.parse(key) is None


@pytest.mark.parametrize(
    ("keys", "model"),
    [
        (["lora_unet_up_blocks_0_attentions_0_proj_in.alpha"], "SDXL or SD 1.5"),
        (["transformer.single_transformer_blocks.3.proj_mlp.lora_A.weight"], "FLUX.1"),
        (["diffusion_model.blocks.3.self_attn.q.lora_A.weight"], "Wan"),
        (["diffusion_model.layers.3.attention.to_q.lora_A.weight"], "Z-Image or Lumina"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"], None),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], None),
    ],
)
def test_other_models_are_named(keys: list[str], model: str | None) -> None:
    assert layouts.other_model(keys) == model


def test_order_is_the_model_s() -> None:
    weights = ["final_layer.linear", "single_blocks.0.linear1", "double_blocks.10.txt_mlp.2"]
    weights += ["double_blocks.2.img_attn.qkv", "single_blocks.0.linear2", "img_in"]
    assert sorted(weights, key=layouts.order) == [
        "double_blocks.2.img_attn.qkv",
        "double_blocks.10.txt_mlp.2",
        "single_blocks.0.linear1",
        "single_blocks.0.linear2",
        "img_in",
        "final_layer.linear",
    ]


def test_a_layout_in_words() -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    keys = [layouts.parse(name + end) for end in (".alpha", ".lora_up.weight", ".lora_down.weight")]
    words = layouts.describe([key for key in keys if key])
    assert words == "lora_unet_ + BFL names with _, lora_down/lora_up, alpha"

"""Our reading of ComfyUI against diffusers' own conversions between BFL's names and its own."""

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_flux2_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

from tests.interop import common
from train.adapters import comfyui
from train.adapters.updates import LowRank
from train.loading.names import Place, Shape, diffusers_places

UP, DOWN = torch.ones(8, 2), torch.ones(2, 8)
SHAPE = Shape(width=8, double=2, single=3)
DEV = Shape(width=6144, double=8, single=48)


def test_places_are_those_of_the_single_file_conversion() -> None:
    numbered = {
        weight: torch.arange(rows)[:, None].expand(rows, columns).clone()
        for weight, (rows, columns) in SHAPE.weights().items()
    }
    converted = convert_flux2_transformer_checkpoint_to_diffusers(dict(numbered))
    places = diffusers_places(SHAPE)
    assert {f"{module}.weight" for module in places} == set(converted)
    for module, place in places.items():
        rows = converted[f"{module}.weight"][:, 0].tolist()
        assert rows == list(range(place.start, place.stop))


def test_places_are_those_of_the_lora_conversion() -> None:
    places = diffusers_places(SHAPE)
    for number, (weight, (rows, columns)) in enumerate(SHAPE.weights().items()):
        name = f"diffusion_model.{weight.removesuffix('.weight')}"
        up = torch.arange(rows)[:, None] + 0.0
        state = {f"{name}.lora_A.weight": torch.full((1, columns), number)}
        state[f"{name}.lora_B.weight"] = up
        converted = _convert_non_diffusers_flux2_lora_to_diffusers(state)
        expected = {m: place for m, place in places.items() if place.weight == weight}
        assert {key.split(".lora_")[0] for key in converted} == {
            f"transformer.{m}" for m in expected
        }
        for module, place in expected.items():
            found = converted[f"transformer.{module}.lora_B.weight"]
            assert torch.equal(found, up[place.start : place.stop])


def test_shapes_are_those_of_the_real_transformer() -> None:
    transformer = common.pipeline("dev").transformer
    places = diffusers_places(Shape.of(transformer))
    for module, place in places.items():
        weight = transformer.get_submodule(module).weight
        assert tuple(weight.shape) == (place.stop - place.start, place.columns)


def test_dev_has_the_known_number_of_weights() -> None:
    sizes = DEV.weights()
    assert len(diffusers_places(DEV)) == 192
    assert sizes["single_blocks.47.linear1.weight"] == (55296, 6144)
    assert sum(16 * (rows + columns) for rows, columns in sizes.values()) < 100.7e6
    places = diffusers_places(DEV).values()
    parameters = sum(16 * (p.stop - p.start + p.columns) for p in places)
    assert round(parameters / 1e6, 1) == 100.7


def test_query_key_and_value_are_thirds_of_the_fused_weight() -> None:
    places = diffusers_places(DEV)
    fused = "double_blocks.3.txt_attn.qkv.weight"
    assert places["transformer_blocks.3.attn.add_k_proj"] == Place(fused, 6144, 12288, 6144)


def pair(name: str, rows: int, columns: int, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_A.weight": torch.ones(rank, columns),
        f"{name}.lora_B.weight": torch.ones(rows, rank),
    }


def test_unknown_names_are_ignored() -> None:
    state = pair("transformer.transformer_blocks.9.attn.to_q", 8, 8)
    state |= pair("transformer.text_encoder.layers.0", 8, 8)
    reading = comfyui.read(state, SHAPE)
    assert set(reading.ignored) == set(state)
    assert not reading.patches


def test_half_a_pair_and_a_wrong_shape_fail() -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    lonely = comfyui.read({f"{name}.lora_B.weight": torch.ones(8, 2)}, SHAPE)
    assert lonely.failed == [f"{name}.lora_B.weight"]
    misfit = comfyui.read(pair(name, 24, 8), SHAPE)
    assert len(misfit.failed) == 2
    assert not misfit.patches


def test_the_later_name_overrules_the_earlier_for_one_place() -> None:
    first = pair("diffusion_model.single_blocks.0.linear2", 8, 32)
    later = pair("transformer.single_transformer_blocks.0.attn.to_out", 8, 32)
    reading = comfyui.read(first | later, SHAPE)
    assert (set(reading.used), set(reading.ignored)) == (set(later), set(first))


def test_patches_on_overlapping_rows_add_up() -> None:
    state = pair("transformer.transformer_blocks.0.attn.to_k", 8, 8)
    state |= pair("diffusion_model.double_blocks.0.img_attn.qkv", 24, 8)
    delta = comfyui.read(state, SHAPE).delta("double_blocks.0.img_attn.qkv.weight", SHAPE)
    assert delta[:, 0].tolist() == [2.0] * 8 + [4.0] * 8 + [2.0] * 8


def test_what_it_does_not_compute_is_named() -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    state = pair(name, 8, 8) | {f"{name}.dora_scale": torch.ones(1, 8)}  # of columns
    state |= {"transformer.transformer_blocks.1.ff.linear_in.hada_w1_a": torch.ones(2, 2)}
    reading = comfyui.read(state, SHAPE)
    assert len(reading.not_computed) == 2
    assert not reading.ignored


def test_an_up_half_alone_stops_its_loader_and_a_down_half_alone_does_not() -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    up, down = ({f"{name}.lora_{h}.weight": t} for h, t in (("B", UP), ("A", DOWN)))
    assert "KeyError" in (comfyui.read(up, SHAPE).refusal or "")
    assert comfyui.read(down, SHAPE).refusal is None


@pytest.mark.parametrize("alpha", [None, 1.0, 3.0])
def test_lokr_is_scaled_by_the_rank_of_its_low_rank_side(alpha: float | None) -> None:
    name = "lycoris_transformer_blocks_0_attn_to_q"
    state = {"lokr_w1": 2 * torch.ones(2, 2), "lokr_w2_a": UP[:4], "lokr_w2_b": DOWN[:, :4]}
    state |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
    reading = comfyui.read({f"{name}.{key}": value for key, value in state.items()}, SHAPE)
    (place, update), *_ = reading.patches.items()
    assert (place.start, place.stop, update.size) == (0, 8, (8, 8))
    assert update.scale == (1.0 if alpha is None else alpha / 2)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("lora_unet_img_in", True),
        ("diffusion_model.time_in.in_layer", True),
        ("transformer.proj_out", True),
        ("transformer.time_guidance_embed.timestep_embedder.linear_1", False),
        ("transformer.double_stream_modulation_img.linear", False),
    ],
)
def test_outside_the_blocks(name: str, known: bool) -> None:
    reading = comfyui.read(pair(name, 6, 8), SHAPE)
    assert (len(reading.used), len(reading.ignored)) == ((2, 0) if known else (0, 2))


def test_the_final_modulation_is_swapped_by_diffusers_name_only() -> None:
    up, down = torch.arange(8.0)[:, None], torch.ones(1, 8)
    found = []
    for name in ("transformer.norm_out.linear", "diffusion_model.final_layer.adaLN_modulation.1"):
        state = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        (update,) = comfyui.read(state, SHAPE).patches.values()
        assert isinstance(update, LowRank)
        found.append(update.up[:, 0].tolist())
    assert found == [[4.0, 5, 6, 7, 0, 1, 2, 3], [0.0, 1, 2, 3, 4, 5, 6, 7]]

"""The weights of a FLUX.2 transformer: their names and shapes in diffusers, and in BFL's files.

Owns both lists, worked out from a transformer's config.json alone, so that a file can be checked
before anything heavy is imported. Reading files is `weights`'.
"""

from dataclasses import dataclass
from typing import Any

from train.comfyui import Shape, diffusers_places

OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
"""diffusers' Linears outside the blocks -> BFL's."""

SWAPPED = "norm_out.linear"
"""Its rows are (scale, shift) in diffusers and (shift, scale) in BFL's files."""

DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
"""diffusers' norms in a block -> BFL's, whose weights end with .scale, not .weight."""


DEFAULTS = {
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "mlp_ratio": 3.0,
    "timestep_guidance_channels": 256,
    "guidance_embeds": True,
}
"""What shapes depend on, as diffusers' class has it: for a config.json older than a setting."""


@dataclass(frozen=True)
class Home:
    """Where one of diffusers' weights is in a BFL file."""

    key: str
    rows: tuple[int, int] | None = None
    """First and one past the last; None means all."""
    swapped: bool = False
    """Whether its two halves change places."""


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """All weights of diffusers' transformer. config: its config.json, completed by DEFAULTS."""
    head, shape = config["attention_head_dim"], _shape(config)
    width, time = shape.width, config["timestep_guidance_channels"]
    outputs = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    sizes: dict[str, tuple[int, ...]] = {
        "x_embedder": (width, config["in_channels"]),
        "context_embedder": (width, config["joint_attention_dim"]),
        "double_stream_modulation_img.linear": (6 * width, width),
        "double_stream_modulation_txt.linear": (6 * width, width),
        "single_stream_modulation.linear": (3 * width, width),
        "norm_out.linear": (2 * width, width),
        "proj_out": (outputs, width),
    }
    for name in _embedders(config):
        sizes[f"{name}.linear_1"], sizes[f"{name}.linear_2"] = (width, time), (width, width)
    for module, place in diffusers_places(shape).items():
        sizes[module] = (place.stop - place.start, place.columns)
    for module in _norms(shape):
        sizes[module] = (head,)
    return {f"{module}.weight": size for module, size in sizes.items()}


def bfl_homes(config: dict[str, Any]) -> dict[str, Home]:
    """Where each of those weights is in a BFL file; together they are all of the file."""
    shape = _shape(config)
    whole = {place.weight: place.stop for place in diffusers_places(shape).values()}
    homes = {}
    for module, place in diffusers_places(shape).items():
        is_whole = place.start == 0 and place.stop == whole[place.weight]
        homes[module] = Home(place.weight, None if is_whole else (place.start, place.stop))
    for module, name in _norms(shape).items():
        homes[module] = Home(f"{name}.scale")
    for module, name in OUTSIDE.items():
        if ".guidance_embedder." not in module or config["guidance_embeds"]:
            homes[module] = Home(f"{name}.weight", swapped=module == SWAPPED)
    return {f"{module}.weight": home for module, home in homes.items()}


def _shape(config: dict[str, Any]) -> Shape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return Shape(width, config["num_layers"], config["num_single_layers"], config["mlp_ratio"])


def _embedders(config: dict[str, Any]) -> list[str]:
    names = ["timestep_embedder", *(["guidance_embedder"] if config["guidance_embeds"] else [])]
    return [f"time_guidance_embed.{name}" for name in names]


def _norms(shape: Shape) -> dict[str, str]:
    """diffusers' norms in the blocks -> BFL's."""
    norms = {}
    for i in range(shape.double):
        for ours, theirs in DOUBLE_NORMS.items():
            norms[f"transformer_blocks.{i}.{ours}"] = f"double_blocks.{i}.{theirs}"
    for i in range(shape.single):
        for ours, theirs in SINGLE_NORMS.items():
            norms[f"single_transformer_blocks.{i}.{ours}"] = f"single_blocks.{i}.{theirs}"
    return norms

"""The weights of a FLUX.2 transformer: their names and shapes in diffusers, and in BFL's files.

Owns both lists, worked out from a transformer's config.json alone, so that a file can be checked
before anything heavy is imported. Reading files is `weights`'.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
"""BFL's Linear -> diffusers' Linears, whose rows lie below each other in it."""

SINGLE_BLOCK = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}

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
class Shape:
    """What the mapping needs to know of a transformer."""

    width: int
    double: int
    single: int
    mlp_ratio: float = 3.0

    @classmethod
    def of(cls, transformer: "Flux2Transformer2DModel") -> "Shape":
        """The shape of a diffusers transformer."""
        config = transformer.config
        return cls(
            config["num_attention_heads"] * config["attention_head_dim"],
            config["num_layers"],
            config["num_single_layers"],
            config["mlp_ratio"],
        )

    def weights(self) -> dict[str, tuple[int, int]]:
        """All Linears in the blocks: BFL name -> (out, in)."""
        width, hidden = self.width, int(self.width * self.mlp_ratio)
        sizes = {
            "qkv": (3 * width, width),
            "proj": (width, width),
            "0": (2 * hidden, width),
            "2": (width, hidden),
            "linear1": (3 * width + 2 * hidden, width),
            "linear2": (width, width + hidden),
        }
        kinds = [("double_blocks", self.double, DOUBLE_BLOCK)]
        kinds += [("single_blocks", self.single, SINGLE_BLOCK)]
        return {
            f"{blocks}.{i}.{name}.weight": sizes[name.rpartition(".")[2]]
            for blocks, count, names in kinds
            for i in range(count)
            for name in names
        }


@dataclass(frozen=True)
class Place:
    """Rows of a BFL weight, and its number of columns."""

    weight: str
    start: int
    stop: int
    columns: int

    def overlap(self, other: "Place") -> tuple[int, int] | None:
        """First and one past the last row that both have."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return (start, stop) if self.weight == other.weight and start < stop else None


@dataclass(frozen=True)
class Home:
    """Where one of diffusers' weights is in a BFL file."""

    key: str
    rows: tuple[int, int] | None = None
    """First and one past the last; None means all."""
    swapped: bool = False
    """Whether its two halves change places."""


def diffusers_places(shape: Shape) -> dict[str, Place]:
    """diffusers module name -> where its weight is in BFL's naming."""
    places = {}
    for weight, (rows, columns) in shape.weights().items():
        blocks, index, name = weight.removesuffix(".weight").split(".", 2)
        single = blocks == "single_blocks"
        parts = (SINGLE_BLOCK if single else DOUBLE_BLOCK)[name]
        for i, part in enumerate(parts):
            module = f"{'single_' if single else ''}transformer_blocks.{index}.{part}"
            height = rows // len(parts)
            places[module] = Place(weight, i * height, (i + 1) * height, columns)
    return places


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """All weights of diffusers' transformer. config: its config.json, completed by DEFAULTS.

    In the order of reading: small ones first, then matrices block by block, so that a block is
    whole before the next one begins.
    """
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
    for module in _norms(shape):
        sizes[module] = (head,)
    for module, place in diffusers_places(shape).items():
        sizes[module] = (place.stop - place.start, place.columns)
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

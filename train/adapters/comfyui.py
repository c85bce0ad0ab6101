"""What ComfyUI does with an adapter file on FLUX.2, worked out without ComfyUI.

Written from its documented behaviour: it reads names and tensors, never safetensors metadata; a
name it knows leads to a weight, or to some rows of one, in BFL's naming; the update is
up @ down * alpha / rank with an `.alpha` tensor and up @ down without; other keys are ignored with
a warning in its log.

Owns that mapping for the Linears inside the blocks, and with it the correspondence between BFL's
and diffusers' names. Weights outside the blocks, which Kindling never trains, count as ignored
here though ComfyUI knows most of them. DoRA, LoKr and the like are named, not computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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

HALVES = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)
"""What may follow a name, (out, rank) half first; of several, ComfyUI takes the first."""

NOT_COMPUTED = (
    *(".dora_scale", ".reshape_weight", ".lora_mid.weight", ".diff", ".diff_b", ".set_weight"),
    *(".w_norm", ".b_norm", ".hada_", ".lokr_", ".oft_", ".a1.weight", ".a2.weight"),
    *(".b1.weight", ".b2.weight"),
)
"""Beginnings of what else ComfyUI applies when it follows a known name."""


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
class Patch:
    """An update that ComfyUI adds at one place: scale * up @ down."""

    up: Tensor
    down: Tensor
    scale: float


@dataclass(frozen=True)
class Reading:
    """What becomes of a file's keys. Every key is in one of the last four."""

    patches: dict[Place, Patch]
    used: list[str]
    ignored: list[str]
    """No name that ComfyUI knows, or overruled by another name for the same place."""
    failed: list[str]
    """Known, but of a shape that ComfyUI refuses, or without its other half."""
    not_computed: list[str]
    """Used by ComfyUI in ways that this reading doesn't cover; its deltas are then not the whole
    story."""

    def factors(self, place: Place) -> tuple[Tensor, Tensor]:
        """The update at strength 1 of some rows of a weight as up @ down, fp64.

        (rows, k) and (k, columns), k the ranks of all patches there; 0 where there is none.
        """
        ups = [torch.zeros(place.stop - place.start, 0, dtype=torch.float64)]
        downs = [torch.zeros(0, place.columns, dtype=torch.float64)]
        for at, patch in self.patches.items():
            if overlap := at.overlap(place):
                start, stop = overlap
                up = torch.zeros(place.stop - place.start, patch.up.shape[1], dtype=torch.float64)
                rows = patch.up[start - at.start : stop - at.start].double()
                up[start - place.start : stop - place.start] = patch.scale * rows
                ups.append(up)
                downs.append(patch.down.double())
        return torch.cat(ups, dim=1), torch.cat(downs)

    def delta(self, weight: str, shape: Shape) -> Tensor:
        """The update of a whole BFL weight at strength 1, fp64, (out, in)."""
        rows, columns = shape.weights()[weight]
        up, down = self.factors(Place(weight, 0, rows, columns))
        return up @ down


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


def known_names(shape: Shape) -> Iterator[tuple[str, Place]]:
    """Every name that ComfyUI looks for, in its order: a later one overrules an earlier one."""
    for weight, (rows, columns) in shape.weights().items():
        stem = weight.removesuffix(".weight")
        whole = Place(weight, 0, rows, columns)
        yield f"lora_unet_{stem.replace('.', '_')}", whole
        yield f"diffusion_model.{stem}", whole
    for module, place in diffusers_places(shape).items():
        yield f"transformer.{module}", place
        yield f"lycoris_{module.replace('.', '_')}", place
        yield f"lora_transformer_{module.replace('.', '_')}", place
        yield module, place
    for weight, (_, columns) in shape.weights().items():
        if weight.endswith(".linear1.weight"):
            stem = weight.removesuffix(".weight")
            yield f"diffusion_model.{stem}_qkv", Place(weight, 0, 3 * shape.width, columns)


def read(tensors: dict[str, Tensor], shape: Shape) -> Reading:
    """What ComfyUI would do with a file of these tensors."""
    patches: dict[Place, Patch] = {}
    keys_at: dict[Place, list[str]] = {}
    failed: list[str] = []
    names = dict(known_names(shape))
    for name, place in names.items():
        halves = next((h for h in HALVES if name + h[0] in tensors), None)
        if halves is None:
            continue
        keys = [name + half for half in halves] + [f"{name}.alpha"]
        up, down, alpha = (tensors.get(key) for key in keys)
        present = [key for key in keys if key in tensors]
        if up is None or down is None or not _fits(up, down, place):
            failed += present
            continue
        scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
        patches[place] = Patch(up, down, scale)
        keys_at[place] = present
    used = [key for keys in keys_at.values() for key in keys]
    rest = [key for key in tensors if key not in {*used, *failed}]
    beyond = [key for key in rest if _is_beyond(key, names)]
    return Reading(patches, used, [key for key in rest if key not in beyond], failed, beyond)


def _fits(up: Tensor, down: Tensor, place: Place) -> bool:
    if up.ndim != 2 or down.ndim != 2:
        return False
    size = (place.stop - place.start, place.columns)
    return up.shape[1] == down.shape[0] and (up.shape[0], down.shape[1]) == size


def _is_beyond(key: str, names: dict[str, Place]) -> bool:
    return any(mark in key and key[: key.rindex(mark)] in names for mark in NOT_COMPUTED)

"""What ComfyUI does with an adapter file on FLUX.2, worked out without ComfyUI.

Written from its documented behaviour: it reads names and tensors, never safetensors metadata; a
name it knows leads to a weight, or to some rows of one, in BFL's naming; the update is
up @ down * alpha / rank with an `.alpha` tensor and up @ down without; other keys are ignored with
a warning in its log.

DoRA, whose magnitude is a `.dora_scale` of (rows, 1) and goes with the rows of its name: the
changed rows times dora_scale, over the norms of the rows *before* the change plus fp32's epsilon.
The definition divides by the norms after it (ComfyUI's pull request 15458, open in August 2026).
`dora_scale` makes up for that at strength 1.

Owns that mapping; which of diffusers' Linears is where in BFL's naming is `train.loading.names`'.
LoRA, DoRA and LoKr are computed; LoHa and the like are named, not computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from train.adapters.updates import (
    Kronecker,
    LowRank,
    Update,
    changed_squares,
    halves_swapped,
    row_squares,
)
from train.loading.names import OUTSIDE, SWAPPED, Place, Shape, diffusers_places

KNOWN_OUTSIDE = ("x_embedder", "context_embedder", SWAPPED, "proj_out")
"""The ones that ComfyUI knows by diffusers' name too."""

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

LOKR = tuple(f".lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"))

EPSILON = torch.finfo(torch.float32).eps
"""Added to the norms that magnitudes are divided by; ComfyUI changes weights in fp32."""

NOT_COMPUTED = (
    *(".dora_scale", ".reshape_weight", ".lora_mid.weight", ".diff", ".diff_b", ".set_weight"),
    *(".w_norm", ".b_norm", ".hada_", ".lokr_t2", ".oft_", ".a1.weight", ".a2.weight"),
    *(".b1.weight", ".b2.weight"),
)
"""Beginnings of what else ComfyUI applies when it follows a known name."""


@dataclass(frozen=True)
class Reading:
    """What becomes of a file's keys. Every key is in one of the last four."""

    patches: dict[Place, Update]
    used: list[str]
    ignored: list[str]
    """No name that ComfyUI knows, or overruled by another name for the same place."""
    failed: list[str]
    """Known, but of a shape that ComfyUI refuses, or without its other half."""
    not_computed: list[str]
    """Used by ComfyUI in ways that this reading doesn't cover; its deltas are then not the whole
    story."""
    refusal: str | None = None
    """Why ComfyUI stops with an error instead of loading anything; None if it doesn't."""

    def factors(self, place: Place, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """The update at strength 1 of some rows of a weight as up @ down.

        (rows, k) and (k, columns), k the ranks of all LoRA patches there; 0 where there is none.
        """
        height = place.stop - place.start
        ups = [torch.zeros(height, 0, dtype=dtype)]
        downs = [torch.zeros(0, place.columns, dtype=dtype)]
        for at, patch in self.patches.items():
            overlap = at.overlap(place)
            if overlap and isinstance(patch, LowRank):
                start, stop = overlap
                rows = patch.scale * patch.up[start - at.start : stop - at.start].to(dtype)
                ups.append(pad(rows, (0, 0, start - place.start, place.stop - stop)))
                downs.append(patch.down.to(dtype))
        return torch.cat(ups, dim=1), torch.cat(downs)

    def magnitude(self, place: Place) -> Tensor | None:
        """dora_scale of some rows of a weight, (rows,), of the patch that has them all."""
        for at, patch in self.patches.items():
            overlap = at.overlap(place)
            if overlap and isinstance(patch, LowRank) and patch.magnitude is not None:
                start, stop = overlap
                return patch.magnitude[start - at.start : stop - at.start]
        return None

    def delta(self, weight: str, shape: Shape) -> Tensor:
        """The update of a whole BFL weight at strength 1, fp64, (out, in)."""
        rows, columns = shape.weights()[weight]
        up, down = self.factors(Place(weight, 0, rows, columns))
        return up @ down


def known_names(shape: Shape) -> Iterator[tuple[str, Place]]:
    """Every name in the blocks that ComfyUI looks for, in its order: a later one overrules."""
    for weight, (rows, columns) in shape.weights().items():
        stem = weight.removesuffix(".weight")
        whole = Place(weight, 0, rows, columns)
        yield f"lora_unet_{stem.replace('.', '_')}", whole
        yield f"diffusion_model.{stem}", whole
    for module, place in diffusers_places(shape).items():
        for name in _spellings(module):
            yield name, place
    for weight, (_, columns) in shape.weights().items():
        if weight.endswith(".linear1.weight"):
            stem = weight.removesuffix(".weight")
            yield f"diffusion_model.{stem}_qkv", Place(weight, 0, 3 * shape.width, columns)


def outside_names() -> Iterator[tuple[str, str]]:
    """Names outside the blocks that ComfyUI looks for, and BFL's name of the weight."""
    for bfl in OUTSIDE.values():
        yield f"lora_unet_{bfl.replace('.', '_')}", bfl
        yield f"diffusion_model.{bfl}", bfl
    for module in KNOWN_OUTSIDE:
        yield from ((name, OUTSIDE[module]) for name in _spellings(module))


def read(tensors: dict[str, Tensor], shape: Shape) -> Reading:
    """What ComfyUI would do with a file of these tensors.

    Outside the blocks, where the shape says no sizes, tensors are taken to fit.
    """
    patches: dict[Place, Update] = {}
    keys_at: dict[Place, list[str]] = {}
    failed: list[str] = []
    refusal = None
    names: dict[str, Place | str] = {**dict(known_names(shape)), **dict(outside_names())}
    for name, known in names.items():
        present, update = _update_at(tensors, name)
        if not present:
            continue
        if update is None and any(f"{name}{up}" in tensors for up, _ in HALVES):
            refusal = refusal or f"{name} has no down half, which stops its loader (KeyError)"
        place = known if isinstance(known, Place) else None
        if update is not None and not isinstance(known, Place):
            place = Place(f"{known}.weight", 0, *update.size)
        if update is None or place is None or not _fits(update, place):
            failed += present
            continue
        if name.endswith((SWAPPED, SWAPPED.replace(".", "_"))):
            update = halves_swapped(update)
        patches[place] = update
        keys_at[place] = present
    used = [key for keys in keys_at.values() for key in keys]
    rest = [key for key in tensors if key not in {*used, *failed}]
    beyond = [key for key in rest if _is_beyond(key, names)]
    ignored = [key for key in rest if key not in beyond]
    return Reading(patches, used, ignored, failed, beyond, refusal)


def dora_scale(update: LowRank, weight: Tensor) -> Tensor:
    """What ComfyUI must be given, (out,) fp32, to make DoRA of it: m (|W| + eps) / |W + s B A|.

    weight: (out, in), the base's. Exact at strength 1; at others ComfyUI goes that part of the way
    from the base's weight to the changed one.
    """
    assert update.magnitude is not None
    up, down = update.factors()
    device = weight.device
    squares = row_squares(weight, torch.float64)
    changed = changed_squares(weight, up.to(device), down.to(device), squares=squares)
    ratio = (squares.sqrt() + EPSILON) / changed.sqrt()
    return (update.magnitude.double() * ratio.cpu()).float()


def _spellings(module: str) -> list[str]:
    """How diffusers' name of a Linear may be written."""
    flat = module.replace(".", "_")
    return [f"transformer.{module}", f"lycoris_{flat}", f"lora_transformer_{flat}", module]


def _update_at(tensors: dict[str, Tensor], name: str) -> tuple[list[str], Update | None]:
    """The keys of a name, and its update if they are whole. LoKr overrules LoRA."""
    alpha = [f"{name}.alpha"] if f"{name}.alpha" in tensors else []
    value = tensors[alpha[0]].item() if alpha and tensors[alpha[0]].numel() == 1 else None
    lokr = {mark: tensors[name + mark] for mark in LOKR if name + mark in tensors}
    if lokr:
        return [*(name + mark for mark in lokr), *alpha], _kronecker(lokr, value)
    for halves in HALVES:
        present = [name + half for half in halves if name + half in tensors]
        if present:
            if len(present) < len(halves):
                return present + alpha, None
            up, down = (tensors[key] for key in present)
            if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or not len(down):
                return present + alpha, None
            update = LowRank(up, down, _scale(value, down.shape[0]))
            dora = tensors.get(f"{name}.dora_scale")
            if dora is not None and dora.shape == (len(up), 1):  # another one is for columns
                present.append(f"{name}.dora_scale")
                update = replace(update, magnitude=dora.flatten())
            return present + alpha, update
    return [], None


def _kronecker(lokr: dict[str, Tensor], alpha: float | None) -> Kronecker | None:
    """scale is alpha / rank of the factor that is low-rank, the right one's first; else 1."""
    if any(factor.ndim != 2 for factor in lokr.values()):
        return None
    sides, rank = [], None
    for side in (".lokr_w1", ".lokr_w2"):
        a, b = lokr.get(f"{side}_a"), lokr.get(f"{side}_b")
        if side in lokr:
            sides.append(lokr[side])
        elif a is None or b is None or a.shape[1] != b.shape[0]:
            return None
        else:
            rank = b.shape[0]
            sides.append(a.float() @ b.float())
    left, right = sides
    return Kronecker(left, right, 1.0 if rank is None else _scale(alpha, rank))


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _fits(update: Update, place: Place) -> bool:
    return update.size == (place.stop - place.start, place.columns)


def _is_beyond(key: str, names: dict[str, Place | str]) -> bool:
    return any(mark in key and key[: key.rindex(mark)] in names for mark in NOT_COMPUTED)

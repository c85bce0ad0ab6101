"""What the names in adapter files mean: every layout that is known, read into one form.

A key is prefix + name of a Linear + what of its update it holds. The names are diffusers' or BFL's,
dotted or with underscores; a BFL name can mean several of diffusers' Linears, whose rows lie below
each other. Owns these names. Numbers are `source`'s, loaders are `comfyui`'s and diffusers' own.

The layouts of other programs, as their public code writes them:
  diffusers, peft trainers     transformer. + diffusers, lora_A/lora_B, alpha in the metadata
  ai-toolkit, diffusion-pipe   diffusion_model. + BFL, lora_A/lora_B (LoKr: lokr_w1 ..., alpha)
  musubi-tuner, kohya          lora_unet_ + BFL with _, lora_down/lora_up, alpha
  SimpleTuner                  as diffusers, or diffusion_model. + BFL with alpha; lycoris_ for LoKr
  OneTrainer                   any of these, bare BFL, or transformer. with lora_down/lora_up, alpha
  fal                          base_model.model. + BFL or diffusers, lora_A/lora_B
"""

import re
from dataclasses import dataclass

from train.loading.names import DOUBLE_BLOCK, OUTSIDE, SINGLE_BLOCK, Shape, diffusers_places

FUSED = {"attn.to_qkv": "img_attn.qkv", "attn.to_added_qkv": "txt_attn.qkv"}
"""diffusers' names for what its fuse_qkv_projections makes -> BFL's."""

OUTSIDE_WEIGHTS = tuple(OUTSIDE.values())

PREFIXES = (
    *("base_model.model.transformer.", "base_model.model.diffusion_model.", "base_model.model."),
    *("model.diffusion_model.", "diffusion_model.", "transformer.", "unet."),
    *("lora_unet_", "lora_transformer_", "lycoris_", ""),
)
"""Longest first where one begins another."""

PARTS = {
    **dict.fromkeys((".lora_A.weight", ".lora_A.default.weight", ".lora_A"), "down"),
    **dict.fromkeys((".lora_B.weight", ".lora_B.default.weight", ".lora_B"), "up"),
    **dict.fromkeys((".lora_down.weight", ".lora.down.weight", "_lora.down.weight"), "down"),
    **dict.fromkeys((".lora_up.weight", ".lora.up.weight", "_lora.up.weight"), "up"),
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    **dict.fromkeys((".alpha", ".lora_alpha"), "alpha"),
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
"""Ends of keys -> what of an update they hold."""

FACTORS = {part for part in PARTS.values() if part in ("up", "down") or part.startswith("lokr_")}

FOREIGN = {
    "LoHa": (".hada_",),
    "OFT or BOFT": (".oft_", "_oft."),
    "LoKr in Tucker form": (".lokr_t",),
    "GLoRA": (".a1.weight", ".b1.weight"),
    "full differences": (".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm"),
    "LoCon": (".lora_mid.",),
    "biases": (".lora_B.bias", ".lora_up.bias"),
}
"""Kinds of updates that are named, not read."""

OTHER_MODELS = {
    "a text encoder's part": r"lora_te|text_encoder|te\d?_|clip_|t5xxl",
    "SDXL or SD 1.5": r"(lora_unet_|unet\.)(input_blocks|output_blocks|middle_block|down_blocks"
    r"|up_blocks|mid_block)|.*attn[12][._](to|processor)",
    "FLUX.1": r".*(single_transformer_blocks[._]\d+[._](proj_mlp|attn[._]to_q|proj_out|norm)"
    r"|ff(_context)?[._]net[._]|(img|txt)_mod[._]lin|single_blocks[._]\d+[._]modulation"
    r"|time_text_embed|vector_in|guidance_embedder)",
    "Stable Diffusion 3": r".*joint_blocks",
    "Qwen-Image": r".*transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)",
    "Wan": r".*blocks[._]\d+[._](self_attn|cross_attn|ffn)",
    "Z-Image or Lumina": r".*layers[._]\d+[._](attention|feed_forward|adaLN)",
    "HunyuanVideo": r".*(img|txt)_attn_qkv|.*individual_token_refiner",
}
"""Names of other models' Linears, for the message alone. In order; the first that fits a key."""

_BLOCK = re.compile(
    r"(?P<blocks>double_blocks|single_blocks|(single_)?transformer_blocks|sformer_blocks)"
    r"_(?P<index>\d+)_(?P<part>.+)"
)


@dataclass(frozen=True)
class Target:
    """The Linear that a name means: some rows of a BFL weight, and diffusers' name for them."""

    weight: str
    """BFL's, without `.weight`: what is fused with what."""
    modules: tuple[str, ...]
    """diffusers', whose rows lie below each other in what the key holds."""
    bfl: bool
    """Whether the name is BFL's."""
    partial: bool = False
    """linear1_qkv: the first rows of single_blocks.N.linear1 only, as ComfyUI knows it."""


@dataclass(frozen=True)
class Key:
    """One key, read."""

    prefix: str
    name: str
    """Of the Linear, as in the file."""
    end: str
    part: str
    """A value of PARTS."""
    target: Target


def _tables() -> tuple[dict[str, Target], dict[tuple[str, str, bool], tuple]]:
    """Names with _ for dots: outside the blocks; and inside by (kind of block, rest, BFL's?)."""
    outside: dict[str, Target] = {}
    inside: dict[tuple[str, str, bool], tuple] = {}
    for module, bfl in OUTSIDE.items():
        outside[bfl.replace(".", "_")] = Target(bfl, (module,), bfl=True)
        outside[module.replace(".", "_")] = Target(bfl, (module,), bfl=False)
    for kind, table in (("double", DOUBLE_BLOCK), ("single", SINGLE_BLOCK)):
        for bfl, modules in table.items():
            inside[kind, bfl.replace(".", "_"), True] = (bfl, modules)
            for module in modules:
                inside[kind, module.replace(".", "_"), False] = (bfl, (module,))
    for fused, bfl in FUSED.items():
        inside["double", fused.replace(".", "_"), False] = (bfl, DOUBLE_BLOCK[bfl])
    return outside, inside


_OUTSIDE, _INSIDE = _tables()
_ENDS = sorted(PARTS, key=len, reverse=True)


def parse(key: str) -> Key | None:
    """What a key means; None if it isn't one of a FLUX.2 adapter."""
    end = next((end for end in _ENDS if key.endswith(end)), None)
    if end is None:
        return None
    stem = key.removesuffix(end)
    prefix = next(prefix for prefix in PREFIXES if stem.startswith(prefix))
    name = stem.removeprefix(prefix)
    target = find(name)
    return target and Key(prefix, name, end, PARTS[end], target)


def find(name: str) -> Target | None:
    """The Linear of a name without prefix, BFL's or diffusers', dotted or with underscores."""
    flat = name.replace(".", "_")
    match = _BLOCK.fullmatch(flat)
    if match is None:
        return _OUTSIDE.get(flat)
    blocks, index, part = match["blocks"], int(match["index"]), match["part"]
    if str(index) != match["index"]:
        return None
    kind = "single" if blocks.startswith("single") else "double"
    is_bfl = blocks in ("double_blocks", "single_blocks")
    partial = blocks == "single_blocks" and part == "linear1_qkv"
    found = _INSIDE.get((kind, "linear1" if partial else part, is_bfl))
    if found is None:
        return None
    bfl, parts = found
    ours = "single_transformer_blocks" if kind == "single" else "transformer_blocks"
    modules = tuple(f"{ours}.{index}.{part}" for part in parts)
    return Target(f"{kind}_blocks.{index}.{bfl}", modules, is_bfl, partial)


def group_of(weight: str) -> tuple[str, ...]:
    """diffusers' modules whose rows lie below each other in a BFL weight."""
    target = find(weight)
    assert target is not None, f"{weight} isn't a weight of FLUX.2"
    return target.modules


def fused_name(target: Target) -> str | None:
    """diffusers' name of fused q, k and v, as it has it for LoKr; None of other Linears."""
    blocks, _, rest = target.weight.partition(".")
    index, _, part = rest.partition(".")
    name = next((ours for ours, theirs in FUSED.items() if theirs == part), None)
    return f"transformer_blocks.{index}.{name}" if blocks == "double_blocks" and name else None


def order(weight: str) -> tuple[int, int, int]:
    """Sorts BFL weights as in the model: double blocks, single blocks, the rest."""
    if weight in OUTSIDE_WEIGHTS:
        return 2, OUTSIDE_WEIGHTS.index(weight), 0
    blocks, index, part = weight.split(".", 2)
    table = DOUBLE_BLOCK if blocks == "double_blocks" else SINGLE_BLOCK
    return int(blocks != "double_blocks"), int(index), list(table).index(part)


def foreign_kind(key: str) -> str | None:
    """The kind of update that a key holds, if it is one that is named only."""
    return next((kind for kind, marks in FOREIGN.items() if any(m in key for m in marks)), None)


def other_model(keys: list[str]) -> str | None:
    """The model that an adapter with these keys is of, if it isn't FLUX.2 and is recognised."""
    for name, pattern in OTHER_MODELS.items():
        if name != "a text encoder's part" and any(re.match(pattern, key) for key in keys):
            return name
    return None


def describe(keys: list[Key]) -> str:
    """A layout in a few words, such as `diffusion_model. + BFL names, lora_A/lora_B`."""
    prefixes = sorted({key.prefix or "no prefix" for key in keys})
    kinds = {True: "BFL", False: "diffusers"}
    names = " and ".join(sorted({kinds[key.target.bfl] for key in keys}))
    style = " with _" if all("." not in key.name for key in keys) else ""
    ends = {key.end.removeprefix(".").removesuffix(".weight") for key in keys}
    halves = "/".join(sorted(e for e in ends if e.startswith(("lora", "_lora", "lokr"))))
    extra = [word for word in ("alpha", "dora_scale") if word in ends]
    return ", ".join([f"{' and '.join(prefixes)} + {names} names{style}", halves, *extra])


def sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of every Linear in the blocks, by diffusers' name."""
    places = diffusers_places(shape)
    return {m: (place.stop - place.start, place.columns) for m, place in places.items()}

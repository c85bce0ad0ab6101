"""Layouts of adapter files as programs write them, built of a random adapter, for the table.

A layout is a function from an adapter and a shape to tensors and metadata. All mean the adapter's
update, alpha / rank * up @ down, unless their name says otherwise.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from tests.interop import common
from tests.interop.common import State
from train.loading.names import Shape
from train.lora import Adapter

Built = tuple[State, dict[str, str] | None]
Builder = Callable[[Adapter, Shape], Built]


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    """Every text in every key replaced by the one after it."""
    result = {}
    for key, tensor in state.items():
        for old, new in pairs:
            key = key.replace(old, new)
        result[key] = tensor
    return result


def peft(prefix: str = "transformer.", *, fold: bool = True, alpha: bool = False) -> Builder:
    """diffusers' names, lora_A and lora_B."""

    def build(adapter: Adapter, shape: Shape) -> Built:
        state = common.peft_layout(adapter, prefix=prefix, fold=fold)
        return state | (common.alphas(adapter, lambda m: prefix + m) if alpha else {}), None

    return build


def stated(alpha: float | None = None, **settings: object) -> Builder:
    """diffusers' names with the strength in the metadata."""

    def build(adapter: Adapter, shape: Shape) -> Built:
        metadata = common.peft_metadata(adapter, alpha=alpha or adapter.alpha)
        values = json.loads(metadata["lora_adapter_metadata"])
        values |= {f"transformer.{key}": value for key, value in settings.items()}
        metadata["lora_adapter_metadata"] = json.dumps(values)
        return common.peft_layout(adapter, fold=False), metadata

    return build


def rslora(adapter: Adapter, shape: Shape) -> Built:
    """The same strength as alpha / sqrt(rank)."""
    return stated(adapter.scale * math.sqrt(adapter.rank), use_rslora=True)(adapter, shape)


def halved(adapter: Adapter, shape: Shape) -> Built:
    """Every other module at half the rank, the other half of it zero."""
    state = common.peft_layout(adapter)
    for module in list(adapter.down)[::2]:
        for half, axis in (("A", 0), ("B", 1)):
            key = f"transformer.{module}.lora_{half}.weight"
            state[key] = state[key].narrow(axis, 0, adapter.rank // 2)
    return state, None


def bfl(prefix: str = "diffusion_model.", *, halves: str = "AB", alpha: bool = False) -> Builder:
    """BFL's names; q, k and v fused, each with its ranks."""

    def build(adapter: Adapter, shape: Shape) -> Built:
        names = ("lora_A", "lora_B") if halves == "AB" else ("lora_down", "lora_up")
        kohya = prefix == "lora_unet_"
        state = common.bfl_layout(
            adapter, shape, kohya=kohya, down=names[0], up=names[1], alpha=alpha
        )
        return renamed(state, ("diffusion_model.", prefix)), None

    return build


def one_down(build: Builder) -> Builder:
    """As trainers of fused Linears write it: q, k and v with one down. Needs such an adapter."""

    def fused(adapter: Adapter, shape: Shape) -> Built:
        state, metadata = build(adapter, shape)
        for key in [key for key in state if "qkv" in key]:
            if key.endswith(("lora_A.weight", "lora_down.weight")):
                state[key] = state[key][: adapter.rank]
            elif key.endswith(("lora_B.weight", "lora_up.weight")):
                thirds = state[key].chunk(3, 1)
                state[key] = sum(thirds[1:], thirds[0])
            else:
                state[key] = torch.tensor(adapter.alpha)
        return state, metadata

    return fused


def then(build: Builder, *pairs: tuple[str, str]) -> Builder:
    """Another layout with some texts of its keys replaced."""

    def change(adapter: Adapter, shape: Shape) -> Built:
        state, metadata = build(adapter, shape)
        return renamed(state, *pairs), metadata

    return change


def underscored(prefix: str) -> Builder:
    """diffusers' names with _ for dots, lora_down and lora_up, alpha."""

    def build(adapter: Adapter, shape: Shape) -> Built:
        def name(module: str) -> str:
            return prefix + module.replace(".", "_")

        state = common.alphas(adapter, name)
        state |= {f"{name(m)}.lora_down.weight": a for m, a in adapter.down.items()}
        return state | {f"{name(m)}.lora_up.weight": b for m, b in adapter.up.items()}, None

    return build


def beside(build: Builder, key: str) -> Builder:
    """With a key of something else in it."""

    def add(adapter: Adapter, shape: Shape) -> Built:
        state, metadata = build(adapter, shape)
        return state | {key: torch.ones(4, 4)}, metadata

    return add


FOLDED, TENSORS, RAW = peft(), peft(fold=False, alpha=True), stated()
DOWN_UP = ((".lora_A.", ".lora_down."), (".lora_B.", ".lora_up."))

LAYOUTS: dict[str, Builder] = {
    "peft, folded": FOLDED,
    "peft, alpha only in metadata": RAW,
    "peft, rsLoRA in metadata": rslora,
    "peft, alpha_pattern in metadata": stated(4.0, alpha_pattern={"to_.": 2.0, ".*": 2.0}),
    "peft, two ranks": halved,
    "peft, folded, with alpha tensors": peft(alpha=True),
    "peft, with alpha tensors": TENSORS,
    "peft, .default.weight": then(FOLDED, (".weight", ".default.weight")),
    "transformer., lora_down with alpha": then(TENSORS, *DOWN_UP),
    "transformer., lora.down, folded": then(
        FOLDED, (".lora_A.", ".lora.down."), (".lora_B.", ".lora.up.")
    ),
    "transformer., lora_linear_layer, folded": then(
        FOLDED, ("lora_A", "lora_linear_layer.down"), ("lora_B", "lora_linear_layer.up")
    ),
    "bare, folded": peft(""),
    "unet. before diffusers names": peft("unet."),
    "diffusion_model. before diffusers names": peft("diffusion_model."),
    "diffusion_model.sformer_blocks": then(
        peft("diffusion_model."), ("model.transformer_blocks", "model.sformer_blocks")
    ),
    "base_model.model. before diffusers names": peft("base_model.model."),
    "base_model.model. before BFL names": bfl("base_model.model."),
    "base_model.model.transformer.": peft("base_model.model.transformer."),
    "lora_transformer_ with alpha": underscored("lora_transformer_"),
    "lycoris_ with alpha": underscored("lycoris_"),
    "lora_unet_ before diffusers names": underscored("lora_unet_"),
    "BFL, lora_A": bfl(),
    "BFL, lora_A, one down": one_down(bfl()),
    "BFL, lora_A with alpha": bfl(alpha=True),
    "BFL, lora_down with alpha": bfl(halves="down/up", alpha=True),
    "BFL, attn_qkv for attn.qkv": then(bfl(), ("attn.qkv", "attn_qkv"), ("attn.proj", "attn_proj")),
    "BFL, bare": bfl(""),
    "BFL, bare, with alpha": bfl("", alpha=True),
    "BFL, model.diffusion_model.": bfl("model.diffusion_model."),
    "kohya": bfl("lora_unet_", halves="down/up", alpha=True),
    "kohya, one down": one_down(bfl("lora_unet_", halves="down/up", alpha=True)),
    "kohya without alpha": bfl("lora_unet_", halves="down/up"),
    "kohya with lora_A": bfl("lora_unet_"),
    "peft beside a text encoder's": beside(FOLDED, "text_encoder.q.lora_A.weight"),
    "kohya beside a text encoder's": beside(
        bfl("lora_unet_", halves="down/up", alpha=True), "lora_te1_layers_0_q.lora_up.weight"
    ),
    "BFL beside a text encoder's": beside(bfl(), "text_encoders.q.lora_A.weight"),
}

SHARING = {"to_q": ("to_k", "to_v"), "add_q_proj": ("add_k_proj", "add_v_proj")}
NEEDS_ONE_DOWN = tuple(name for name in LAYOUTS if name.endswith("one down"))


def adapter_for(name: str, transformer: torch.nn.Module) -> Adapter:
    """A random adapter that a layout can hold."""
    adapter = common.random_adapter(transformer)
    down = dict(adapter.down)
    if name in NEEDS_ONE_DOWN:
        for module in down:
            for first, others in SHARING.items():
                if module.endswith(others):
                    down[module] = down[f"{module.rsplit('.', 1)[0]}.{first}"]
    up = dict(adapter.up)
    if name == "peft, two ranks":
        for module in list(up)[::2]:
            up[module] = up[module].clone()
            up[module][:, adapter.rank // 2 :] = 0
    return dataclasses.replace(adapter, down=down, up=up)


def write(name: str, adapter: Adapter, shape: Shape, path: Path) -> Path:
    """A file of a layout."""
    return common.save(*_saved(LAYOUTS[name](adapter, shape), path))


def _saved(built: Built, path: Path) -> tuple[State, Path, dict[str, str] | None]:
    return built[0], path, built[1]

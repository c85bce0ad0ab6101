"""A tiny base, random adapters, and the layouts that other programs write, for interop tests."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from train import lora
from train.loading.names import Shape, diffusers_places
from train.lora import Adapter

State = dict[str, Tensor]
BARE_PARTS = {"scheduler": None, "vae": None, "text_encoder": None, "tokenizer": None}


def pipeline(kind: str) -> Flux2Pipeline | Flux2KleinPipeline:
    """A real pipeline with nothing but a tiny transformer."""
    transformer = tiny.transformer(guidance=kind == "dev")
    if kind == "dev":
        return Flux2Pipeline(**BARE_PARTS, transformer=transformer)  # pyright: ignore[reportArgumentType]
    return Flux2KleinPipeline(**BARE_PARTS, transformer=transformer)  # pyright: ignore[reportArgumentType]


def random_adapter(transformer: torch.nn.Module, *, rank: int = 4, alpha: float = 2.0) -> Adapter:
    """All block Linears, with updates large enough to see."""
    generator = torch.Generator().manual_seed(7)
    down, up = {}, {}
    for module in lora.block_linears(transformer):
        out_features, in_features = transformer.get_parameter(f"{module}.weight").shape
        down[module] = 0.2 * torch.randn(rank, in_features, generator=generator)
        up[module] = 0.3 * torch.randn(out_features, rank, generator=generator)
    return Adapter(down, up, rank, alpha)


def peft_layout(adapter: Adapter, *, prefix: str = "transformer.", fold: bool = True) -> State:
    """lora_A and lora_B under diffusers' names."""
    scale = adapter.scale if fold else 1.0
    state = {f"{prefix}{m}.lora_A.weight": a.clone() for m, a in adapter.down.items()}
    return state | {f"{prefix}{m}.lora_B.weight": scale * b for m, b in adapter.up.items()}


def alphas(adapter: Adapter, names: Callable[[str], str]) -> State:
    return {f"{names(m)}.alpha": torch.tensor(adapter.alpha) for m in adapter.down}


def bfl_layout(
    adapter: Adapter, shape: Shape, *, kohya: bool, down: str, up: str, alpha: bool
) -> State:
    """BFL names, q, k and v fused into one: rank 3r, block-diagonal up."""
    state: State = {}
    places = diffusers_places(shape)
    for weight in shape.weights():
        modules = [m for m, place in places.items() if place.weight == weight]
        stem = weight.removesuffix(".weight")
        name = f"lora_unet_{stem.replace('.', '_')}" if kohya else f"diffusion_model.{stem}"
        scale = 1.0 if alpha else adapter.scale
        state[f"{name}.{down}.weight"] = torch.cat([adapter.down[m] for m in modules])
        state[f"{name}.{up}.weight"] = torch.block_diag(*(scale * adapter.up[m] for m in modules))
        if alpha:
            state[f"{name}.alpha"] = torch.tensor(adapter.alpha * len(modules))
    return state


def peft_metadata(adapter: Adapter, *, alpha: float) -> dict[str, str]:
    """As diffusers' save_lora_weights writes it."""
    settings = {
        "transformer.r": adapter.rank,
        "transformer.lora_alpha": alpha,
        "transformer.target_modules": list(adapter.down),
    }
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}


def save(state: State, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata=metadata)
    return path

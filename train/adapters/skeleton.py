"""Pipelines without weights: diffusers' real classes in a base's real shape, in no memory.

Every weight is one number, expanded. Unlike on the meta device, what a loader puts in beside them
is really there and can be read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.errors import ConfigError
from train.loading.base import NAMED_BASES
from train.loading.shapes import SHAPES


def pipeline(base: str, *, meta: bool = False) -> Any:
    """A Flux2Pipeline or Flux2KleinPipeline of a released base, or of a folder's config.json.

    base: dev, klein-4b, klein-9b, toy, or a folder in diffusers' layout (its weights aren't read).
    meta: leave everything on the meta device, for loaders that copy weights. Raises ConfigError.
    """
    folder = Path(NAMED_BASES["toy"] if base == "toy" else base)
    return of_settings(SHAPES[base].config() if base in SHAPES else settings_of(folder), meta=meta)


def of_settings(config: Mapping[str, Any], *, meta: bool = False) -> Any:
    """The same, from the arguments of a Flux2Transformer2DModel."""
    import diffusers

    with torch.device("meta"):
        transformer = diffusers.Flux2Transformer2DModel(**config)
    if not meta:
        _hollow(transformer)
    kind = "Flux2Pipeline" if transformer.config["guidance_embeds"] else "Flux2KleinPipeline"
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    return getattr(diffusers, kind)(**parts, transformer=transformer.eval())


def settings_of(folder: Path) -> dict[str, Any]:
    """The transformer's config.json in a base's folder, or in the transformer's own.

    Raises ConfigError.
    """
    known = ", ".join(SHAPES)
    for path in (folder / "transformer" / "config.json", folder / "config.json"):
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            if settings.get("_class_name") != "Flux2Transformer2DModel":
                raise ConfigError(f"--base: {path} isn't of a FLUX.2 transformer.")
            return {key: value for key, value in settings.items() if not key.startswith("_")}
    raise ConfigError(
        f"--base: {folder} isn't one of {known}, nor a diffusers folder with a transformer."
    )


def _hollow(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zero, requires_grad=False))

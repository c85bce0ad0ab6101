"""Pictures from a base with whatever adapter it carries, by diffusers' own pipeline.

The prompts come from the cache, so no text encoder is needed beside the transformer.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_tools import buckets, pictures
from data_tools.buckets import Geometry
from data_tools.pictures import PictureError
from train.config import DataConfig, PreviewConfig
from train.errors import ConfigError
from train.files import writing
from train.loading.base import Base


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    text: Tensor
    """Embedding of the prompt, (L, J)."""
    seed: int
    width: int
    height: int
    references: tuple[Path, ...] = ()
    """Pictures that an edit starts from."""


def requests(
    texts: Sequence[Tensor],
    references: Sequence[Sequence[str]],
    *,
    preview: PreviewConfig,
    data: DataConfig,
    seeds: Sequence[int],
) -> list[Request]:
    """One for each text, its references and its seed, counted from the config's.

    The size is the previews'; where the config sets none, the data's resolution as a square, or in
    the shape of the first reference. Raises ConfigError for a reference that can't be used.
    """
    made = []
    for text, names, seed in zip(texts, references, seeds, strict=True):
        size = size_of(names, data=data)
        width, height = preview.width or size.width, preview.height or size.height
        paths = tuple(map(Path, names))
        made.append(Request(text, preview.seed + seed, width, height, paths))
    return made


def size_of(references: Sequence[str], *, data: DataConfig) -> Geometry:
    """Of a picture for which none is set. Raises ConfigError for references that can't be used."""
    side = max(data.resolutions)
    sizes = [_reference_size(Path(name)) for name in references]
    if not sizes:
        return Geometry(side, side)
    placed = buckets.place(
        *sizes[0], resolution=side, max_upscale=math.inf, max_aspect=data.max_aspect
    )
    return placed.geometry


def _reference_size(path: Path) -> tuple[int, int]:
    try:
        probe = pictures.probe(path)
    except PictureError as error:
        raise ConfigError(f"preview.edits: the reference {error}") from None
    if fault := buckets.reference_fault(probe.width, probe.height):
        raise ConfigError(f"preview.edits: the reference {path} {fault}")
    return probe.width, probe.height


def draw(
    base: Base,
    transformer: Any,
    requests: Sequence[Request],
    *,
    empty_text: Tensor | None,
    steps: int,
    guidance: float,
) -> list[Image.Image]:
    """All the pictures of `draw_each`."""
    settings = {"empty_text": empty_text, "steps": steps, "guidance": guidance}
    return list(draw_each(base, transformer, requests, **settings))


@torch.no_grad()
def draw_each(
    base: Base,
    transformer: Any,
    requests: Sequence[Request],
    *,
    empty_text: Tensor | None,
    steps: int,
    guidance: float,
) -> Iterator[Image.Image]:
    """Make the pictures one by one; the noise of each depends on its seed and size alone.

    empty_text: embedding of the empty prompt, which true guidance needs.
    """
    device = transformer.device
    training = transformer.training
    transformer.eval()
    pipeline = base.pipeline(
        scheduler=base.load_scheduler(),
        vae=base.load_vae(device, base.dtype),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    if needs_empty_text(base, guidance):
        assert empty_text is not None
        settings["negative_prompt_embeds"] = empty_text[None].to(device, base.dtype)
    try:
        for request in requests:
            yield pipeline(  # pyright: ignore[reportCallIssue]
                image=[pictures.load_rgb(path) for path in request.references] or None,
                prompt_embeds=request.text[None].to(device, base.dtype),
                width=request.width,
                height=request.height,
                generator=torch.Generator().manual_seed(request.seed),
                **settings,
            ).images[0]
    finally:
        transformer.train(training)


def needs_empty_text(base: Base, guidance: float) -> bool:
    """Whether pictures are guided away from the empty prompt's: on klein's base checkpoints."""
    return base.family.true_cfg and not base.distilled and guidance > 1


def put_on(base: Base, transformer: Any, adapters: Sequence[tuple[Path, float]]) -> None:
    """Give a transformer these adapter files at these strengths and no others, by diffusers' own
    loader.
    """
    transformer.unload_lora()
    pipeline: Any = base.pipeline(transformer=transformer)
    names = [f"adapter{number}" for number in range(len(adapters))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        warnings.filterwarnings("ignore", "While injecting the PEFT adapters")  # lists all modules
        for name, (path, _) in zip(names, adapters, strict=True):
            pipeline.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=name, use_safetensors=True
            )
    for name, parameter in transformer.named_parameters():
        if ".adapter" in name:  # else it may be the mapped file, which Windows can't replace
            parameter.data = parameter.data.clone()
    if names:
        transformer.set_adapters(names, [strength for _, strength in adapters])


def save_all(
    drawn: Sequence[Image.Image], folder: Path, *, step: int, label: str = ""
) -> list[Path]:
    """Write previews as step-000100-0.png, step-000100-1.png, ...; the label follows the number."""
    paths = [folder / f"step-{step:06d}-{number}{label}.png" for number in range(len(drawn))]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for picture, path in zip(drawn, paths, strict=True):
            picture.save(path)
    return paths

"""Pictures from a base with whatever adapter it carries, by diffusers' own pipeline.

The prompts come from the cache, so no text encoder is needed beside the transformer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from train.config import PreviewConfig
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


def requests(
    texts: Sequence[Tensor], *, preview: PreviewConfig, resolution: int, seeds: Sequence[int]
) -> list[Request]:
    """One for each text and its seed, counted from the config's, at the previews' size.

    resolution: side of the square where the config sets no size.
    """
    return [
        Request(
            text,
            seed=preview.seed + seed,
            width=preview.width or resolution,
            height=preview.height or resolution,
        )
        for text, seed in zip(texts, seeds, strict=True)
    ]


@torch.no_grad()
def draw(
    base: Base,
    transformer: Any,
    requests: Sequence[Request],
    *,
    empty_text: Tensor | None,
    steps: int,
    guidance: float,
) -> list[Image.Image]:
    """Make the pictures one by one; the noise of each depends on its seed and size alone.

    empty_text: embedding of the empty prompt, which klein's true guidance needs.
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
    if base.family.true_cfg:
        assert empty_text is not None
        settings["negative_prompt_embeds"] = empty_text[None].to(device, base.dtype)
    pictures = [
        pipeline(  # pyright: ignore[reportCallIssue]
            prompt_embeds=request.text[None].to(device, base.dtype),
            width=request.width,
            height=request.height,
            generator=torch.Generator().manual_seed(request.seed),
            **settings,
        ).images[0]
        for request in requests
    ]
    transformer.train(training)
    return pictures


def save_all(
    pictures: Sequence[Image.Image], folder: Path, *, step: int, label: str = ""
) -> list[Path]:
    """Write previews as step-000100-0.png, step-000100-1.png, ...; the label follows the number."""
    paths = [folder / f"step-{step:06d}-{number}{label}.png" for number in range(len(pictures))]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for picture, path in zip(pictures, paths, strict=True):
            picture.save(path)
    return paths

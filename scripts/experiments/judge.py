"""What an adapter is worth: loss on portraits that were never trained, drift, and its pictures.

One pipeline for all adapters, and the same pictures, prompts, noise and noise levels for all, those
of the default density whatever an arm trained at. Adapters come as exported files.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from scripts.toy.character import (
    character_score,
    draw_portrait,
    portrait_caption,
    sample_portrait,
)
from scripts.toy.dataset import SQUARE, save
from scripts.toy.draw import caption, sample_scene
from scripts.toy.measure import BASE, HELD_OUT_SEED, obeys
from scripts.toy.score import THERE
from train.config import Config, FlowConfig
from train.encoding.prepare import prepare
from train.loading.base import resolve
from train.validation.validate import Model, Validator

PORTRAITS = 24
"""Held out: places and sizes that the twelve trained ones haven't got, seeds that neither training
nor the scores have."""
LEVELS = 8
NEUTRAL = ("a purple square on a yellow background", "a red star on a white background")
DRAWING = {"steps": 12, "guidance": 4.0, "size": 64}
BATCH = 32


def portraits(folder: Path) -> Path:
    """The held-out pictures with their captions, made the first time."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for number in range(PORTRAITS):
            portrait = sample_portrait(random.Random(f"held out {number}"))
            save(draw_portrait(portrait, *SQUARE), portrait_caption(portrait), folder / f"{number}")
    return folder


def make_validator(config: Config) -> Validator:
    """Of the pictures that a config checks; encodes them where the cache lacks them."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    prepared = prepare(config, resolve(config.base), accelerator=accelerator)
    assert prepared.trial is not None
    return Validator(
        prepared.trial,
        cache=prepared.cache,
        flow=FlowConfig(),
        levels=LEVELS,
        batch_size=LEVELS,
        accelerator=accelerator,
    )


class Judge:
    """Keeps the pipeline and the encoded portraits from one adapter to the next."""

    def __init__(self, config: Config, *, count: int) -> None:
        """config: with `validation.path` and the cache; its training doesn't matter. count: of
        prompts with the trigger, and of those without."""
        from diffusers import Flux2Pipeline

        self._validator = make_validator(config)
        assert len(self._validator.trial.examples) == PORTRAITS
        self._pipeline: Any = Flux2Pipeline.from_pretrained(BASE, dtype=torch.float32)
        self._pipeline.set_progress_bar_config(disable=True)
        rngs = [random.Random(HELD_OUT_SEED + number) for number in range(count)]
        self._called = [portrait_caption(sample_portrait(rng)) for rng in rngs]
        self._scenes = [sample_scene(random.Random(HELD_OUT_SEED + n)) for n in range(count)]

    def judge(self, adapter: Path | None) -> dict[str, Any]:
        """The figures of an exported file; None for the base alone."""
        with self._wearing(adapter):
            figures = self._losses() | self._pictures()
            if adapter is not None:
                figures["drift"] = self._validator.drift(self._model(1.0))
        return figures

    def loss(self, adapter: Path, validator: Validator) -> float:
        """On other pictures than the portraits, told guidance 1."""
        with self._wearing(adapter):
            return validator.losses(self._model(1.0)).double().mean().item()

    @contextmanager
    def _wearing(self, adapter: Path | None) -> Iterator[None]:
        pipeline = self._pipeline
        if adapter is not None:
            pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
        with torch.no_grad():
            yield
        if adapter is not None:
            pipeline.unload_lora_weights()

    def _model(self, guidance: float) -> Model:
        return Model(self._pipeline.transformer, torch.float32, guidance)

    def _losses(self) -> dict[str, Any]:
        """Told guidance 1, at which arms train, and 4, at which the pictures are drawn."""
        losses_PS = self._validator.losses(self._model(1.0)).double()
        names = [f"{sigma:.3f}" for sigma in self._validator.sigmas]
        return {
            "held_out": losses_PS.mean().item(),
            "by_sigma": dict(zip(names, losses_PS.mean(0).tolist(), strict=True)),
            "held_out_told_4": self._validator.losses(self._model(4.0)).double().mean().item(),
        }

    def _pictures(self) -> dict[str, float]:
        count = len(self._called)
        pictures = self._draw([*self._called, *map(caption, self._scenes)])
        likeness = [character_score(picture) for picture in pictures]
        obeyed = [
            obeys(picture, scene).things
            for picture, scene in zip(pictures[count:], self._scenes, strict=True)
        ]
        return {
            "likeness": fmean(likeness[:count]),
            "character": fmean(one >= THERE for one in likeness[:count]),
            "obeyed": fmean(obeyed),
            "intruded": fmean(one >= THERE for one in likeness[count:]),
        }

    def _draw(self, prompts: Sequence[str]) -> list[Image.Image]:
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), BATCH):
            some = list(prompts[start : start + BATCH])
            seeds = range(start, start + len(some))
            pictures += self._pipeline(
                prompt=some,
                height=DRAWING["size"],
                width=DRAWING["size"],
                num_inference_steps=DRAWING["steps"],
                guidance_scale=DRAWING["guidance"],
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                max_sequence_length=self._pipeline.tokenizer.model_max_length,
            ).images
        return pictures

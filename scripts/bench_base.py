"""A base of a released shape whose weights are random numbers: nothing is downloaded.

The weights are drawn on the device, one tensor at a time, and pass through the loader of real ones,
which quantises each before the next one comes. So the model is never whole in bf16 if it is
quantised, nor ever in RAM but for what is streamed. Owns the numbers, not the loading.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scripts.bench_options import SMALL
from train.loading import names, transformer
from train.loading.shapes import SHAPES, Shape
from train.loading.transformer import Place
from train.loading.weights import Files, Source, Weight

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel

ALL = {**SHAPES, SMALL: Shape(double=2, single=4, heads=2, text_width=192, guidance=True)}
"""The released shapes, and the small one."""

SPREAD = 0.02
"""Standard deviation of the weights of matrices; norms are 1, so losses are finite."""


def build(
    shape: Shape,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str,
    place: Place,
) -> "Flux2Transformer2DModel":
    """A frozen transformer. folder: for its config.json."""
    config = folder / "config.json"
    settings = {"_class_name": "Flux2Transformer2DModel", **shape.config()}
    config.write_text(json.dumps(settings), encoding="utf-8")
    return transformer.load(Drawn(config, None, None, dtype, quantize, device), device, place=place)


@dataclass(frozen=True)
class Drawn(Files):
    """In place of a base's files."""

    device: torch.device

    def source(self) -> "DrawnSource":
        shapes = names.shapes({**names.DEFAULTS, **self.settings})
        return DrawnSource({}, shapes, self.dtype, self.device)  # pyright: ignore


@dataclass(frozen=True)
class DrawnSource(Source):
    """In place of what is in a base's files."""

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    def read_all(self) -> Iterator[tuple[str, Weight]]:
        """Each weight on the device, the same ones every time."""
        generator = torch.Generator(self.device).manual_seed(0)
        for name, shape in self.shapes.items():
            values = torch.ones(shape, dtype=self.dtype, device=self.device)
            if values.ndim == 2:
                values.normal_(0, SPREAD, generator=generator)
            yield name, Weight(values, None)

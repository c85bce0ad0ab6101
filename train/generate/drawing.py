"""Pictures of a base with adapters: what all of a call have in common, and drawing them.

The text encoder is loaded first, for the prompts that the cache lacks, and freed before the
transformer comes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from train import sample, usage
from train.adapters import files, mount
from train.assemble import Memory
from train.config import EncodeConfig, MemoryConfig
from train.encoding import encode_text, texts
from train.encoding.cache import DIGESTS, Cache, FileDigests
from train.encoding.encode import Keys
from train.errors import MachineError
from train.generate.wishes import Wish
from train.loading.base import Base
from train.memory import offload


@dataclass(frozen=True)
class Settings:
    """How all pictures of a call are made."""

    base: Base
    adapters: tuple[tuple[Path, float], ...]
    steps: int
    guidance: float
    resident: int | None
    """Blocks whose weights stay on the GPU; None is all."""
    text_quantize: str
    cache: Path

    def facts(self) -> dict[str, Any]:
        """For the pictures, JSON-able."""
        base = self.base
        return {
            "base": base.source if base.revision else base.name,
            "revision": base.revision,
            "transformer": base.transformer and base.transformer.name,
            "dtype": str(base.dtype).removeprefix("torch."),
            "quantize": base.quantize,
            "text_quantize": self.text_quantize,
            "steps": self.steps,
            "guidance": self.guidance,
            "adapters": [
                {"file": path.name, "sha256": files.file_hash(path), "strength": strength}
                for path, strength in self.adapters
            ],
            "version": version("kindling"),
            "diffusers": version("diffusers"),
            "torch": torch.__version__,
        }


def ready(settings: Settings, *, scratch: Path) -> list[tuple[Path, float]]:
    """The adapters' files as diffusers loads them, some converted into `scratch`.

    Raises CheckpointError for those that don't fit the base.
    """
    shape = settings.base.transformer_files().settings
    found = []
    for path, strength in settings.adapters:
        mounted = mount.ready(path, shape, scratch=scratch)
        found.append((mounted.path, strength))
        for note in mounted.notes:
            print(note)
    return found


def draw(
    settings: Settings, wanted: list[Wish], adapters: Sequence[tuple[Path, float]]
) -> Iterator[tuple[Wish, Image.Image]]:
    """Each wish with its picture, as they are made. Raises MachineError where memory is short."""
    base, device = settings.base, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = base.transformer_files().settings
    memory = MemoryConfig(
        gradient_checkpointing="none",
        resident_blocks="all" if settings.resident is None else settings.resident,
    )
    double, single = shape["num_layers"], shape["num_single_layers"]
    placed = Memory.of(memory, double=double, single=single)
    embedded, empty = _encode(settings, wanted, device=device)
    try:
        transformer: Any = base.load_transformer(
            device, place=placed.place(device), cache=settings.cache
        )
        sample.put_on(base, transformer, adapters)
        if placed.streamed:
            offload.attach(transformer, resident=placed.resident, device=device)
        drawn = sample.draw_each(
            base,
            transformer,
            _requests(wanted, embedded),
            empty_text=empty,
            steps=settings.steps,
            guidance=settings.guidance,
        )
        with usage.phase("draw", len(wanted), device=device, show=True):
            bar = tqdm(drawn, "draw", len(wanted), unit="picture", delay=2)
            yield from zip(wanted, bar, strict=True)
    except torch.cuda.OutOfMemoryError:
        raise MachineError(
            f"the GPU has no room for this. --quantize fp8 or nf4 makes the base smaller, "
            f"--resident-blocks N keeps N of its {double + single} blocks there and streams the "
            "others from RAM; a smaller --size takes less, too."
        ) from None


def _encode(
    settings: Settings, wanted: list[Wish], *, device: torch.device
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Embeddings by prompt, and the empty prompt's where it is needed."""
    cache = Cache(settings.cache)
    kept = EncodeConfig.model_validate({"text_quantize": settings.text_quantize})
    keys = Keys.of(settings.base, digests=FileDigests(cache.root / DIGESTS), settings=kept)
    needs_empty = sample.needs_empty_text(settings.base, settings.guidance)
    prompts = list(dict.fromkeys(wish.prompt for wish in wanted))
    every = [*prompts, ""] if needs_empty else prompts
    encode_text.encode_prompts(settings.base, every, keys=keys, cache=cache, device=device)
    for prompt, (tokens, limit) in encode_text.truncated(prompts, keys=keys, cache=cache).items():
        print(f"too long, cut to {limit} of its {tokens} tokens: {prompt}")
    embedded = {prompt: texts.get(cache, keys.prompt(prompt)) for prompt in prompts}
    return embedded, texts.get(cache, keys.prompt("")) if needs_empty else None


def _requests(wanted: list[Wish], embedded: dict[str, Tensor]) -> list[sample.Request]:
    return [
        sample.Request(
            embedded[wish.prompt],
            wish.seed,
            wish.width,
            wish.height,
            tuple(reference.path for reference in wish.references),
        )
        for wish in wanted
    ]

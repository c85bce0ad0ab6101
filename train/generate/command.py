"""`kindling generate`: pictures from a base and any adapters, each at its strength.

Draws with diffusers' own pipeline, so the same seed gives the same picture there. The text encoder
is loaded first, for the prompts that the cache lacks, and freed before the transformer comes.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from train import encode_text, sample, texts, usage
from train.adapters import files, mount
from train.adapters.opening import open_any, released
from train.assemble import Memory
from train.cache import DIGESTS, Cache, FileDigests
from train.config import BaseConfig, Config, EncodeConfig, MemoryConfig
from train.encode import Keys
from train.errors import ConfigError, MachineError
from train.generate import wishes
from train.generate.gallery import Gallery, describe
from train.generate.wishes import Wish
from train.loading.base import DISTILLED, NAMED_BASES, Base, resolve
from train.memory import offload

KINDS = ("none", "fp8", "int8", "nf4")


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


def main(argv: list[str] | None = None) -> int:
    """Generate from the command line."""
    arguments = _parse(argv)
    plain = Wish("", arguments.seed, *arguments.size)
    plain = replace(plain, references=tuple(map(wishes.reference, arguments.reference)))
    wanted = [replace(plain, prompt=prompt) for prompt in arguments.prompt]
    if arguments.prompts is not None:
        wanted += wishes.read(arguments.prompts, plain)
    if not wanted:
        raise ConfigError("nothing to draw: give --prompt, once or more, or --prompts FILE.")
    wanted = [replace(w, seed=w.seed + i) for w in wanted for i in range(arguments.seeds)]
    settings = _settings(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = _ready(settings, scratch=Path(scratch))
        gallery, facts = Gallery(arguments.output), settings.facts()
        for wish, picture in draw(settings, wanted, adapters):
            gallery.add(picture, asdict(wish) | {"references": _references(wish)} | facts)
    sheet = gallery.sheet(f"{settings.base.name}: {describe(facts['adapters'])}")
    print(f"pictures: {len(wanted)} in {arguments.output}\nsheet: {sheet}")
    return 0


def _ready(settings: Settings, *, scratch: Path) -> list[tuple[Path, float]]:
    """The adapters' files as diffusers loads them, some converted into `scratch`.

    Raises CheckpointError for those that don't fit the base.
    """
    shape = settings.base.transformer_files().settings
    found = []
    for path, strength in settings.adapters:
        ready = mount.ready(path, shape, scratch=scratch)
        found.append((ready.path, strength))
        for note in ready.notes:
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


def _references(wish: Wish) -> list[dict[str, str]]:
    return [{"file": one.path.name, "sha256": one.sha256} for one in wish.references]


def _settings(arguments: argparse.Namespace) -> Settings:
    """Raises ConfigError, CheckpointError."""
    adapters = tuple(map(_adapter, arguments.lora))
    model = arguments.base or (released(open_any(adapters[0][0])) if adapters else "dev")
    if arguments.distilled:
        names = {repository: name for name, repository in NAMED_BASES.items()}
        few = DISTILLED.get(names.get(model, model))
        if few is None:
            raise ConfigError(
                f"--distilled: {model} has no step-distilled checkpoint that is known; "
                f"{' and '.join(DISTILLED)} have. Give its folder or repository as --base."
            )
        model = few
    base = resolve(
        BaseConfig(
            model=model,
            dtype=arguments.dtype,
            quantize=arguments.quantize,
            transformer=arguments.transformer,
            allow_distilled=True,
        )
    )
    if base.distilled and arguments.guidance not in (None, 1.0):
        raise ConfigError(
            f"--guidance: {base.source} is step-distilled and takes no guidance; leave it out."
        )
    plain = base.inference
    return Settings(
        base,
        adapters,
        arguments.steps or plain.steps,
        plain.guidance if arguments.guidance is None else arguments.guidance,
        arguments.resident_blocks,
        arguments.text_quantize,
        arguments.cache,
    )


def _adapter(text: str) -> tuple[Path, float]:
    """Of FILE or FILE=STRENGTH. Raises ConfigError."""
    name, equals, strength = text.rpartition("=")
    if not equals or Path(text).is_file():
        return Path(text), 1.0
    try:
        return Path(name), float(strength)
    except ValueError:
        raise ConfigError(f"--lora: '{strength}' is no number; FILE=0.8 is meant.") from None


def _size(text: str) -> tuple[int, int]:
    try:
        return wishes.size(text)
    except ValueError as error:
        raise ConfigError(f"--size: {error}.") from None


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}")
        return int(text)

    return parse


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kindling generate", description=__doc__)
    add = parser.add_argument
    add("--base", help="dev, klein-4b, klein-9b, toy, a diffusers folder or a hub repository; "
        "default: the first adapter's, by its shapes")  # fmt: skip
    add("--distilled", action="store_true", help="klein's 4-step checkpoint in place of the base")
    add("--lora", action="append", default=[], metavar="FILE[=STRENGTH]",
        help="an adapter of any program; repeatable")  # fmt: skip
    add("--prompt", action="append", default=[], help="what to draw; repeatable")
    add("--prompts", type=Path, metavar="FILE", help=".txt with a prompt a line, or .jsonl with "
        "prompt, and seed, size, references where they differ")  # fmt: skip
    add("--reference", type=Path, action="append", default=[], metavar="PICTURE",
        help="to start from (image editing); repeatable")  # fmt: skip
    add("--seed", type=_whole(0), default=0, help="of the first picture of a prompt; default 0")
    add("--seeds", type=_whole(1), default=1, help="pictures for each prompt, counting on from it")
    add("--size", type=_size, default="1024x1024", metavar="WxH", help="default: 1024x1024")
    add("--steps", type=_whole(1), help="default: 50; 4 on a distilled checkpoint")
    add("--guidance", type=float, help="default: 4; none on a distilled checkpoint")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the base; default: bf16")
    add("--quantize", choices=KINDS, default="none", help="weights of the transformer")
    add("--text-quantize", choices=("none", "int8", "nf4"), default="none",
        help="weights of the text encoder")  # fmt: skip
    add("--resident-blocks", type=_whole(0), metavar="N",
        help="blocks that stay on the GPU; the others are streamed from RAM")  # fmt: skip
    add("--transformer", metavar="FILE", help="the transformer's weights as one file")
    add("--output", type=Path, default=Path("pictures"), help="folder; default: pictures")
    add("--cache", type=Path, default=Path(Config.model_fields["cache"].default),
        help="folder of encoded prompts; default: as in training")  # fmt: skip
    return parser.parse_args(argv)

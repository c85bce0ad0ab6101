"""`kindling generate`: pictures from a base and any adapters, each at its strength.

Draws with diffusers' own pipeline, so the same seed gives the same picture there. The text encoder
is loaded first, for the prompts that the cache lacks, and freed before the transformer comes.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.config import BaseConfig, Config
from train.errors import ConfigError

if TYPE_CHECKING:
    from train.generate.drawing import Settings
    from train.generate.wishes import Wish

KINDS = ("none", "fp8", "int8", "nf4")


def main(argv: list[str] | None = None) -> int:
    """Generate from the command line."""
    arguments = _parse(argv)
    from train.generate import drawing, wishes
    from train.generate.gallery import Gallery, describe
    from train.generate.wishes import Wish

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
        adapters = drawing.ready(settings, scratch=Path(scratch))
        gallery, facts = Gallery(arguments.output), settings.facts()
        for wish, picture in drawing.draw(settings, wanted, adapters):
            gallery.add(picture, asdict(wish) | {"references": _references(wish)} | facts)
    sheet = gallery.sheet(f"{settings.base.name}: {describe(facts['adapters'])}")
    print(f"pictures: {len(wanted)} in {arguments.output}\nsheet: {sheet}")
    return 0


def _references(wish: "Wish") -> list[dict[str, str]]:
    return [{"file": one.path.name, "sha256": one.sha256} for one in wish.references]


def _settings(arguments: argparse.Namespace) -> "Settings":
    """Raises ConfigError, CheckpointError."""
    from train.adapters.opening import open_any, released
    from train.generate.drawing import Settings
    from train.loading.base import DISTILLED, NAMED_BASES, resolve

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
    from train.generate import wishes

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

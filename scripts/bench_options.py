"""The command line of `kindling bench train`; imports nothing heavy."""

import argparse
import re
from pathlib import Path

from train.loading.shapes import SHAPES

SMALL = "small"
"""A shape of 9 million parameters, which shows on any machine that all works."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def add(train: argparse.ArgumentParser) -> None:
    """All options; None means that one wasn't given."""
    train.add_argument("--size", type=int, nargs="+", metavar="PIXELS", help="a row each")
    train.add_argument("--batch", type=int, nargs="+", help="pictures a step; default 1")
    train.add_argument("--text-tokens", type=int, default=512)
    train.add_argument("--rank", type=int, help="default 16")
    train.add_argument("--dtype", choices=["fp32", "bf16"], help="frozen weights")
    train.add_argument("--optimizer", choices=["adamw", "adamw8bit"], help="default adamw")
    train.add_argument("--steps", type=int, default=12, help="timed steps a side; default 12")
    train.add_argument("--warmup", type=int, default=2, help="steps before those; default 2")
    bare = train.add_argument_group("without --shape or --config: beside a bare loop")
    bare.add_argument("--parameters", type=count, default="60M", help="default 60M")
    bare.add_argument("--gradient-checkpointing", action="store_true")
    bare.add_argument("--no-memory", action="store_true", help="skip the peaks: a process each")
    real = train.add_argument_group("real shapes, with random weights")
    real.add_argument("--shape", choices=[*SHAPES, SMALL], help="a released base's, or small")
    real.add_argument("--config", type=Path, help="a recipe; options here change it")
    real.add_argument("--quantize", choices=["none", "fp8", "int8", "nf4"])
    real.add_argument("--resident", type=number_or_word, metavar="N|all|auto", help="blocks")
    real.add_argument("--checkpointing", type=number_or_word, metavar="N|all|none|auto")
    real.add_argument("--offload-activations", action="store_true", default=None)
    real.add_argument("--compile", action="store_true", default=None)
    real.add_argument("--attention", choices=["auto", "native", "cudnn", "flash", "flash3"])
    real.add_argument("--fp8-matmul", action="store_true", default=None)
    real.add_argument("--branch", choices=["base", "fp32"], help="lora.compute; default base")
    real.add_argument("--limit-gb", type=float, help="GPU memory for all of it, in 10^9 bytes")
    real.add_argument("--peer", choices=["diffusers"], help="and diffusers' plain recipe")


def count(text: str) -> int:
    """60M -> 60,000,000."""
    match = re.fullmatch(r"([0-9.]+)([KMB]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number such as 60M")
    return round(float(match[1]) * UNITS[match[2]])


def number_or_word(text: str) -> int | str:
    """12 or a word, which the config will judge."""
    return int(text) if text.isdecimal() else text

"""The strength that a file states in its metadata, in peft's words.

Owns peft's settings as diffusers keeps them; strengths in alpha tensors are `source`'s.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.errors import CheckpointError

PEFT_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings, as JSON with the component's name before each key."""

PREFIX = "transformer."


DORA_NORMS = "kindling.dora_norms"
"""In the metadata of DoRA for ComfyUI, which divides by the norms of the base's rows, not of the
changed weight's: its dora_scale is then the magnitude times the one over the other."""


@dataclass(frozen=True)
class Intent:
    """Strengths that a file states in its metadata, in peft's words."""

    rank: float | None = None
    alpha: float | None = None
    ranks: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    rslora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """Of a module whose tensors have this rank; 1 where nothing is stated."""
        alpha = _by_pattern(self.alphas, module, self.alpha)
        stated = _by_pattern(self.ranks, module, self.rank)
        if alpha is None:
            return 1.0
        over = rank if stated is None else stated
        return alpha / (math.sqrt(over) if self.rslora else over)


def read(path: Path, metadata: dict[str, str]) -> Intent:
    """What a file's metadata state. Raises CheckpointError."""
    if PEFT_METADATA not in metadata:
        return Intent()
    try:
        settings: dict[str, Any] = json.loads(metadata[PEFT_METADATA])
        found = {k.removeprefix(PREFIX): v for k, v in settings.items()}
        rank, alpha = found.get("r"), found.get("lora_alpha")
        return Intent(
            None if rank is None else _positive(rank),
            None if alpha is None else _finite(alpha),
            {_pattern(k): _positive(v) for k, v in (found.get("rank_pattern") or {}).items()},
            {_pattern(k): _finite(v) for k, v in (found.get("alpha_pattern") or {}).items()},
            bool(found.get("use_rslora")),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {PEFT_METADATA} is damaged ({error}).") from None


def _pattern(text: str) -> str:
    """Raises ValueError for one that a hostile file could keep a reader busy with for years."""
    if re.search(r"\)[*+{]", text):
        raise ValueError(f"the pattern {text!r} repeats a group")
    return text


def _finite(value: Any) -> float:
    """Raises ValueError."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"an alpha of {number}")
    return number


def _positive(value: Any) -> float:
    """Raises ValueError."""
    number = _finite(value)
    if number <= 0:
        raise ValueError(f"a rank of {number:g}")
    return number


def _by_pattern(patterns: dict[str, float], module: str, default: float | None) -> float | None:
    """peft's rule: a pattern is the end of a name, or matches it from its begin."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return default

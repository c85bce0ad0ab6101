"""Randomness as a function of a key, never of history.

Noise, order, dropout and flips of a showing depend on the seed and on which showing it is, not on
what was drawn before. So a resumed run, a run with more processes and a run with another
accumulation all draw the same numbers, and nothing has to be saved.
"""

import hashlib
import random
from typing import TypeVar

import torch

Key = str | int
T = TypeVar("T")


def derived_seed(*key: Key) -> int:
    """A 63-bit seed from a key, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(*key: Key) -> torch.Generator:
    """A CPU generator for a key: the same numbers whatever the device that trains."""
    return torch.Generator().manual_seed(derived_seed(*key))


def fraction(*key: Key) -> float:
    """A number in [0, 1) for a key."""
    return derived_seed(*key) / 2**63


def shuffled(items: list[T], *key: Key) -> list[T]:
    """A copy of `items` in the order that the key says."""
    return random.Random(derived_seed(*key)).sample(items, len(items))

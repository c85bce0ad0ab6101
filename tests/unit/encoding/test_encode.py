"""What the keys of pictures and masks are made of."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_tools.buckets import Geometry
from train.config import EncodeConfig
from train.encoding.encode import Keys, Mask, Picture, encode_pixels

KEYS = Keys(vae="a vae", text="words", settings=EncodeConfig())
PICTURE = Picture(Path("a.png"), "0123", Geometry(64, 96))
MASK = Mask(Path("a.png"), "0123", Geometry(64, 96), alpha=True)


def test_keys_never_move() -> None:
    """Another name for the same entry would have every cache encoded anew."""
    assert KEYS.picture(PICTURE) == "f23decc63951c237fca70d6c070b939ec74c9c10"
    assert KEYS.picture(replace(PICTURE, flip=True)) == "d019f9e2966c77eeb3a68a9a226554348c92765f"
    assert KEYS.mask(MASK) == "206acbc6079d8dfd049f73d4102aafb37e83b306"
    assert KEYS.mask(replace(MASK, flip=True)) == "a9b7ee9ccd5118f0ef32462a5d78db8f76a14e1f"
    assert KEYS.mask(replace(MASK, alpha=False)) == "2601e0d25ca6576d2dd5f25cd59eef8128e89be8"


@pytest.mark.parametrize(
    "change", [{"sha256": "4567"}, {"geometry": Geometry(96, 64)}, {"flip": True}]
)
def test_all_that_an_entry_depends_on_is_in_its_key(change: dict) -> None:
    assert KEYS.picture(replace(PICTURE, **change)) != KEYS.picture(PICTURE)
    assert KEYS.mask(replace(MASK, **change)) != KEYS.mask(MASK)
    assert KEYS.picture(PICTURE) != KEYS.mask(MASK)


def test_what_an_entry_does_not_depend_on_is_not() -> None:
    elsewhere = Path("b.png")
    assert KEYS.picture(replace(PICTURE, path=elsewhere)) == KEYS.picture(PICTURE)
    assert KEYS.mask(replace(MASK, path=elsewhere)) == KEYS.mask(MASK)
    other = replace(KEYS, vae="another")
    assert other.picture(PICTURE) != KEYS.picture(PICTURE)
    assert other.mask(MASK) == KEYS.mask(MASK)


def test_a_picture_is_encoded_without_tf32() -> None:
    """Whatever torch's default is, and that is the same afterwards."""
    backend, seen = torch.backends.cudnn, []
    assert backend.allow_tf32

    class Encoder:
        bn = SimpleNamespace(running_mean=torch.zeros(128), running_var=torch.ones(128))
        config = SimpleNamespace(batch_norm_eps=0.0)

        def encode(self, pixels: torch.Tensor) -> Any:
            seen.append((backend.enabled, backend.allow_tf32, backend.deterministic))
            mode = pixels[:, :1, ::8, ::8].repeat(1, 32, 1, 1)
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mode))

    encode_pixels(Encoder(), torch.zeros(1, 3, 32, 48))
    assert seen == [(True, False, True)]
    assert backend.allow_tf32
    assert not backend.deterministic

"""Pictures to cache entries, in a phase of its own. Owns what the keys of all entries are made of.

Loads the VAE only if a picture is missing from the cache and frees it before it returns, so that
it doesn't share memory with the transformer. Prompts are `encode_text`'s.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_tools import masks, pictures
from data_tools.buckets import Geometry
from train import latents, usage
from train.config import EncodeConfig
from train.encoding.cache import Cache, FileDigests, key
from train.errors import DataError
from train.loading.base import MAX_TEXT_TOKENS, Base

DEFAULTS = EncodeConfig()


@dataclass(frozen=True)
class Picture:
    """A picture as it is to be encoded: its file, contents, size in pixels, mirrored or not."""

    path: Path
    sha256: str
    geometry: Geometry
    flip: bool = False


@dataclass(frozen=True)
class Mask:
    """Which part of a picture is learnt: a file as tall and wide as it, or the alpha of its own."""

    path: Path
    sha256: str
    geometry: Geometry
    alpha: bool
    flip: bool = False


@dataclass(frozen=True)
class Keys:
    """Names of cache entries for one base: they change with its VAE and its text encoder."""

    vae: str
    text: str
    settings: EncodeConfig

    @classmethod
    def of(cls, base: Base, *, digests: FileDigests, settings: EncodeConfig = DEFAULTS) -> "Keys":
        """Read the digests of the base's files; the first time for a base this reads them all."""
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        text = [digests.folder(base.folder(part)) for part in ("text_encoder", "tokenizer")]
        family = base.family
        system = SYSTEM_MESSAGE if family.name == "dev" else None  # stands before every prompt
        facts = (*family.text_layers, family.padding_side, MAX_TEXT_TOKENS, str(base.dtype), *text)
        encoder = key(
            kind="text encoder",
            facts=facts,
            system=system,
            quantize=settings.text_quantize,
            storage=settings.text_storage,
        )
        return cls(digests.folder(base.folder("vae")), encoder, settings)

    def picture(self, picture: Picture) -> str:
        """The entry of a picture: `latents` (D, h, w), fp32, normalised."""
        return key(kind="picture", vae=self.vae, **_view(picture))

    def mask(self, mask: Mask) -> str:
        """The entry of a mask: `mask` (h, w), fp32, the share of each patch that is learnt."""
        return key(kind="mask", alpha=mask.alpha, **_view(mask))

    def prompt(self, prompt: str) -> str:
        """The entry of a prompt, laid out as `texts` says."""
        return key(kind="prompt", layout=2, encoder=self.text, prompt=prompt)


def _view(shown: Picture | Mask) -> dict[str, Any]:
    """Facts of both: the file's contents, and how they are cropped and turned."""
    size = shown.geometry
    return {
        "picture": shown.sha256,
        "width": size.width,
        "height": size.height,
        "flip": shown.flip,
    }


@torch.no_grad()
def encode_pictures(
    base: Base,
    wanted: Sequence[Picture],
    *,
    keys: Keys,
    cache: Cache,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Encode the pictures of this share that the cache lacks; returns how many those were.

    share: (rank, world): this process looks after every world-th of them.
    """
    jobs = mine({keys.picture(picture): picture for picture in wanted}, share)
    missing = [(name, picture) for name, picture in jobs if name not in cache]
    if not missing:
        return 0
    with usage.phase("encode pictures", len(missing), device=device, show=share[0] == 0):
        # in bf16 its rounding would be baked into every latent
        vae = base.load_vae(device, torch.float32)
        for name, picture in tqdm(missing, "encode pictures", delay=2, disable=share[0] != 0):
            pixels = _pixels(pictures.fit(pictures.load_rgb(picture.path), picture.geometry))
            pixels = pixels.flip(-1) if picture.flip else pixels
            entry = encode_pixels(vae, pixels.to(device))[0].cpu()
            cache.put(name, {"latents": entry}, notes={"path": str(picture.path)})
        del vae
        free()
    return len(missing)


def encode_masks(
    wanted: Sequence[Mask], *, keys: Keys, cache: Cache, share: tuple[int, int] = (0, 1)
) -> int:
    """Store the masks of this share that the cache lacks; returns how many those were.

    Raises DataError for a mask that leaves nothing of what its picture's crop shows.
    """
    jobs = mine({keys.mask(mask): mask for mask in wanted}, share)
    missing = [(name, mask) for name, mask in jobs if name not in cache]
    for name, mask in tqdm(missing, "encode masks", delay=2, disable=share[0] != 0):
        parts = masks.shares(masks.load(mask.path, alpha=mask.alpha), mask.geometry)
        if not parts.any():
            raise DataError(f"{mask.path}: its mask leaves nothing of the crop to {mask.geometry}")
        parts = np.flip(parts, axis=1) if mask.flip else parts
        entry = torch.from_numpy(np.ascontiguousarray(parts))
        cache.put(name, {"mask": entry}, notes={"path": str(mask.path)})
    return len(missing)


def encode_pixels(vae: Any, pixels_BCHW: Tensor) -> Tensor:
    """Pixels in [-1, 1] (B, 3, 16h, 16w) -> normalised patch latents (B, D, h, w), fp32.

    Convolutions in fp32 are that: on a GPU torch's default rounds what they multiply to 10 bits.
    """
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        mode = vae.encode(pixels_BCHW).latent_dist.mode()
    return latents.normalize(
        latents.patchify(mode),
        mean_D=vae.bn.running_mean,
        var_D=vae.bn.running_var,
        eps=vae.config.batch_norm_eps,
    )


def _pixels(image: Image.Image) -> Tensor:
    """RGB picture -> (1, 3, H, W) in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def mine(entries: dict[str, Any], share: tuple[int, int]) -> list[tuple]:
    """The share of one process. Cut before the cache is asked: by then the others may fill it."""
    rank, world = share
    return list(entries.items())[rank::world]


def free() -> None:
    """Give back what a model that was just deleted held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

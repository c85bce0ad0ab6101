"""Pictures and prompts to cache entries, in a phase of its own.

Loads the VAE only if a picture is missing from the cache and the text encoder only if a prompt is,
and frees each before it returns, so that neither shares memory with the transformer. Owns what a
cache key is made of.
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
from train import latents
from train.base import MAX_TEXT_TOKENS, Base, max_text_tokens
from train.cache import Cache, FileDigests, key
from train.errors import DataError


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

    @classmethod
    def of(cls, base: Base, *, digests: FileDigests) -> "Keys":
        """Read the digests of the base's files; the first time for a base this reads them all."""
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        text = [digests.folder(base.folder(part)) for part in ("text_encoder", "tokenizer")]
        family = base.family
        system = SYSTEM_MESSAGE if family.name == "dev" else None  # stands before every prompt
        facts = (*family.text_layers, family.padding_side, MAX_TEXT_TOKENS, str(base.dtype), *text)
        return cls(
            digests.folder(base.folder("vae")), key(kind="text encoder", facts=facts, system=system)
        )

    def picture(self, picture: Picture) -> str:
        """The entry of a picture: `latents` (D, h, w), fp32, normalised."""
        return key(
            kind="picture",
            vae=self.vae,
            picture=picture.sha256,
            width=picture.geometry.width,
            height=picture.geometry.height,
            flip=picture.flip,
        )

    def mask(self, mask: Mask) -> str:
        """The entry of a mask: `mask` (h, w), fp32, the share of each patch that is learnt."""
        return key(
            kind="mask",
            picture=mask.sha256,
            alpha=mask.alpha,
            width=mask.geometry.width,
            height=mask.geometry.height,
            flip=mask.flip,
        )

    def prompt(self, prompt: str) -> str:
        """The entry of a prompt: `text` (L, J) in the base's type, pads included."""
        return key(kind="prompt", encoder=self.text, prompt=prompt)


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
    missing = _missing({keys.picture(picture): picture for picture in wanted}, cache, share)
    if missing:
        # in bf16 its rounding would be baked into every latent
        vae = base.load_vae(device, torch.float32)
        for name, picture in _progress(missing, "encode pictures", share):
            pixels = _pixels(pictures.fit(pictures.load_rgb(picture.path), picture.geometry))
            pixels = pixels.flip(-1) if picture.flip else pixels
            entry = encode_pixels(vae, pixels.to(device))[0].cpu()
            cache.put(name, {"latents": entry}, notes={"path": str(picture.path)})
        del vae
        _free()
    return len(missing)


@torch.no_grad()
def encode_prompts(
    base: Base,
    wanted: Sequence[str],
    *,
    keys: Keys,
    cache: Cache,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Encode the prompts of this share that the cache lacks; returns how many those were.

    One at a time: in a batch the last bits would depend on the other prompts.
    """
    missing = _missing({keys.prompt(prompt): prompt for prompt in wanted}, cache, share)
    if missing:
        tokenizer = base.load_tokenizer()
        pipeline = base.pipeline(text_encoder=base.load_text_encoder(device), tokenizer=tokenizer)
        limit = max_text_tokens(tokenizer)
        for name, prompt in _progress(missing, "encode captions", share):
            embeds, _ = pipeline.encode_prompt(  # pyright: ignore[reportAttributeAccessIssue]
                prompt=prompt,
                device=device,
                max_sequence_length=limit,
                text_encoder_out_layers=base.family.text_layers,
            )
            tokens = str(count_tokens(base, tokenizer, prompt))
            entry = {"text": embeds[0].contiguous().cpu()}
            cache.put(name, entry, notes={"tokens": tokens, "limit": str(limit)})
        del pipeline
        _free()
    return len(missing)


def encode_masks(
    wanted: Sequence[Mask], *, keys: Keys, cache: Cache, share: tuple[int, int] = (0, 1)
) -> int:
    """Store the masks of this share that the cache lacks; returns how many those were.

    Raises DataError for a mask that leaves nothing of what its picture's crop shows.
    """
    missing = _missing({keys.mask(mask): mask for mask in wanted}, cache, share)
    for name, mask in _progress(missing, "encode masks", share):
        parts = masks.shares(masks.load(mask.path, alpha=mask.alpha), mask.geometry)
        if not parts.any():
            raise DataError(f"{mask.path}: its mask leaves nothing of the crop to {mask.geometry}")
        parts = np.flip(parts, axis=1) if mask.flip else parts
        entry = torch.from_numpy(np.ascontiguousarray(parts))
        cache.put(name, {"mask": entry}, notes={"path": str(mask.path)})
    return len(missing)


def truncated(wanted: Sequence[str], *, keys: Keys, cache: Cache) -> dict[str, tuple[int, int]]:
    """Of encoded prompts those that were cut: prompt -> (its tokens, the limit)."""
    notes = {prompt: cache.notes(keys.prompt(prompt)) for prompt in wanted}
    counts = {p: (int(note["tokens"]), int(note["limit"])) for p, note in notes.items()}
    return {prompt: (n, limit) for prompt, (n, limit) in counts.items() if n > limit}


def encode_pixels(vae: Any, pixels_BCHW: Tensor) -> Tensor:
    """Pixels in [-1, 1] (B, 3, 16h, 16w) -> normalised patch latents (B, D, h, w), fp32."""
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


def count_tokens(base: Base, tokenizer: Any, prompt: str) -> int:
    """Tokens of a prompt in its chat template, before anything is cut or padded."""
    if base.family.name == "dev":
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        ids = tokenizer.apply_chat_template(
            format_input([prompt]), add_generation_prompt=False, tokenize=True, return_dict=True
        )["input_ids"]
        return len(ids[0])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return len(tokenizer(text)["input_ids"])


def _missing(entries: dict[str, Any], cache: Cache, share: tuple[int, int]) -> list[tuple]:
    """Shares are cut before the cache is asked: by then the others may be filling it."""
    rank, world = share
    mine = list(entries.items())[rank::world]
    return [(name, wanted) for name, wanted in mine if name not in cache]


def _progress(jobs: list[tuple], title: str, share: tuple[int, int]):
    return tqdm(jobs, desc=title, delay=2, disable=share[0] != 0)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

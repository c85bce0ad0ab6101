"""Latents as the transformer takes them: patches, normalisation, packing, positions; all pure.

Shape suffixes: B batch, C the VAE's channels, D = 4C patch channels, H and W in VAE pixels (8 of
the picture's), h and w in patches (16), N tokens. Source: FLUX.2's reference code and diffusers'
Flux2Pipeline, against which each function is tested.
"""

import torch
from torch import Tensor

REFERENCE_TIME = 10
"""Reference i sits at T = 10 + 10 i; the picture itself at T = 0."""


def patchify(latents_BCHW: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (B, 4C, h, w); channel order (c, row, column) of the 2x2 patch."""
    B, C, H, W = latents_BCHW.shape
    patches = latents_BCHW.view(B, C, H // 2, 2, W // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(B, C * 4, H // 2, W // 2)


def normalize(latents_BDhw: Tensor, *, mean_D: Tensor, var_D: Tensor, eps: float) -> Tensor:
    """(z - mean) / sqrt(var + eps) by patch channel in fp32: the VAE's batch norm, frozen."""
    mean = mean_D.float().view(1, -1, 1, 1)
    std = torch.sqrt(var_D.float().view(1, -1, 1, 1) + eps)
    return (latents_BDhw.float() - mean) / std


def pack(latents_BDhw: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h w, D), row by row."""
    return latents_BDhw.flatten(2).transpose(1, 2)


def unpack(tokens_BND: Tensor, *, height: int, width: int) -> Tensor:
    """(B, h w, D) -> (B, D, h, w), the inverse of `pack`."""
    return tokens_BND.transpose(1, 2).unflatten(2, (height, width))


def image_ids(
    height: int, width: int, *, time: int = 0, device: torch.device | None = None
) -> Tensor:
    """Positions (T, H, W, L) of a picture of h x w patches: (h w, 4), int64.

    Made on the device: to copy them there would make the CPU wait for it.
    """
    ids = torch.zeros(height, width, 4, dtype=torch.int64, device=device)
    ids[..., 0] = time
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.flatten(0, 1)


def reference_ids(sizes: list[tuple[int, int]], *, device: torch.device | None = None) -> Tensor:
    """Positions of reference pictures of (h, w) patches each, in order: (sum of h w, 4), int64."""
    times = range(REFERENCE_TIME, REFERENCE_TIME * (len(sizes) + 1), REFERENCE_TIME)
    ids = [image_ids(h, w, time=t, device=device) for (h, w), t in zip(sizes, times, strict=True)]
    return torch.cat(ids) if ids else torch.empty(0, 4, dtype=torch.int64, device=device)


def text_ids(length: int, *, device: torch.device | None = None) -> Tensor:
    """Positions of a prompt, pads included: (length, 4), int64."""
    ids = torch.zeros(length, 4, dtype=torch.int64, device=device)
    ids[:, 3] = torch.arange(length, device=device)
    return ids

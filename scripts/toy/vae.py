"""The toy base's VAE: a small AutoencoderKLFlux2, its decoder's training, its bn statistics.

Owns the reconstruction loss and the clutter that keeps the decoder from knowing only our
shapes. The encoder is written, not trained (see `blockcode.py`); captions and the transformer
are elsewhere.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from PIL import Image, ImageDraw

from scripts.toy.draw import draw, sample_scene
from scripts.toy.muon import Course, MuonAdamW, warm_cosine
from scripts.toy.progress import Progress

LATENT_CHANNELS = 24
CLUTTER_SHARE = 0.35


def new_vae() -> AutoencoderKLFlux2:
    """Four levels, so 8x smaller latents as in the real one; 0.9M parameters."""
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Pictures of one size as (B, 3, H, W) uint8."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def draw_clutter(rng: random.Random, *, size: int) -> Image.Image:
    """Overlapping blobs, boxes, lines and dots in any colour: edges and hues beyond our shapes."""

    def colour() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    big = 4 * size
    image = Image.new("RGB", (big, big), colour())
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 9)):
        x, y = rng.uniform(0, big), rng.uniform(0, big)
        w, h = (big * rng.uniform(0.05, 0.3) for _ in range(2))
        box = (x - w, y - h, x + w, y + h)
        edge = colour() if rng.random() < 0.4 else None
        kind = rng.random()
        if kind < 0.5:
            pen.ellipse(box, fill=colour(), outline=edge, width=big // 28)
        elif kind < 0.65:
            pen.rounded_rectangle(box, radius=w / 3, fill=colour(), outline=edge, width=big // 28)
        elif kind < 0.85:
            corners = [
                (x + rng.uniform(-w, w) * 1.5, y + rng.uniform(-h, h) * 1.5) for _ in range(3)
            ]
            pen.polygon(corners, fill=colour(), outline=edge, width=big // 28)
        else:
            pen.line((x - w, y, x + w, y + rng.uniform(-h, h)), fill=colour(), width=big // 24)
    if rng.random() < 0.3:
        dot, step, radius = colour(), big / rng.randint(7, 12), big / 90
        for i in range(1, 12):
            for j in range(1, 12):
                x, y = i * step, j * step
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=dot)
    return image.resize((size, size), Image.Resampling.BOX)


def vae_pictures(count: int, *, seed: int, size: int) -> torch.Tensor:
    """(count, 3, size, size) uint8: scenes and clutter, shuffled."""
    rng = random.Random(seed)
    images = []
    for _ in range(count):
        if rng.random() < CLUTTER_SHARE:
            images.append(draw_clutter(rng, size=size))
        else:
            images.append(draw(sample_scene(rng), size, size))
    return to_pixels(images)


def edges(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x_BCHW.diff(dim=-1), x_BCHW.diff(dim=-2)


def reconstruction_loss(guess: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE, plus L1 between the pixel differences: thin, sharp edges count."""
    loss = F.l1_loss(guess, truth) + 2 * F.mse_loss(guess, truth)
    for a, b in zip(edges(guess), edges(truth), strict=True):
        loss = loss + 0.5 * F.l1_loss(a, b)
    return loss


def train_decoder(
    vae: AutoencoderKLFlux2,
    pixels: torch.Tensor,
    course: Course,
    *,
    device: torch.device,
) -> None:
    """Train the decoder in place against the fixed encoder; `pixels` is (N, 3, H, W) uint8.

    A breath of noise on the latents stands for the transformer's own errors.
    """
    generator = torch.Generator().manual_seed(course.seed)
    network: Any = vae
    network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    assert vae.post_quant_conv is not None
    with torch.no_grad():
        latents = torch.cat([encode(vae, part.to(device)) for part in pixels.split(256)])
    breath = 0.02 * latents.std()
    weights = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = MuonAdamW(weights, lr=course.lr)
    progress = Progress(course.name)
    for step in range(course.steps):
        optimizer.rate(course.lr * warm_cosine(step, total=course.steps))
        rows = torch.randint(len(pixels), (course.batch,), generator=generator)
        truth = to_unit(pixels[rows]).to(device, memory_format=torch.channels_last)
        noise = torch.randn((course.batch, *latents.shape[1:]), generator=generator).to(device)
        guess = decode(vae, latents[rows.to(device)] + breath * noise)
        loss = reconstruction_loss(guess, truth)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        progress.tell(step + 1, total=course.steps, loss=loss.detach())
    vae.requires_grad_(False)


def load_vae(base: Path, device: torch.device) -> AutoencoderKLFlux2:
    """The stored VAE, computing in fp32."""
    vae: Any = AutoencoderKLFlux2.from_pretrained(base / "vae", dtype=torch.float32)
    return vae.to(device)


def encode(vae: AutoencoderKLFlux2, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (B, 3, H, W) on the VAE's device to the latents' mode (B, C, H/8, W/8)."""
    output: Any = vae.encode(to_unit(pixels))
    return output.latent_dist.mode()


def decode(vae: AutoencoderKLFlux2, latents: Any) -> torch.Tensor:
    """Latents to pixels in about [-1, 1]."""
    output: Any = vae.decode(latents)
    return output.sample


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKLFlux2, pixels: torch.Tensor, *, device: torch.device
) -> torch.Tensor:
    """uint8 (B, 3, H, W) through the latents' mode and back to uint8."""
    guess = decode(vae, encode(vae, pixels.to(device)))
    return ((guess.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def psnr(guess: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, on uint8."""
    mse = (guess.float() - truth.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-2)
    return (10 * torch.log10(255**2 / mse)).mean().item()


@torch.no_grad()
def patch_latents(
    vae: AutoencoderKLFlux2, pixels: torch.Tensor, *, device: torch.device
) -> torch.Tensor:
    """(N, 3, H, W) uint8 to (N, 4C, H/16, W/16), 2x2 patches in channel order (c, pi, pj), raw."""
    parts = []
    for chunk in pixels.split(256):
        z = encode(vae, chunk.to(device))
        b, c, h, w = z.shape
        z = z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        parts.append(z.reshape(b, 4 * c, h // 2, w // 2).cpu())
    return torch.cat(parts)


def set_bn_statistics(vae: AutoencoderKLFlux2, patches: torch.Tensor) -> None:
    """Write the channel-wise mean and variance of raw patch latents into `vae.bn`."""
    mean, variance = patches.mean(dim=(0, 2, 3)), patches.var(dim=(0, 2, 3))
    running_mean, running_var = vae.bn.running_mean, vae.bn.running_var
    assert running_mean is not None
    assert running_var is not None
    running_mean.copy_(mean)
    running_var.copy_(variance)


def normalise(vae: AutoencoderKLFlux2, patches: torch.Tensor) -> torch.Tensor:
    """Raw patch latents to the transformer's space: bn statistics, eps inside the root, fp32."""
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    assert mean is not None
    assert variance is not None
    scale = torch.sqrt(variance.float() + vae.config["batch_norm_eps"])
    shape = (1, -1, 1, 1)
    return (patches - mean.float().cpu().reshape(shape)) / scale.cpu().reshape(shape)


def channel_weights(vae: AutoencoderKLFlux2) -> torch.Tensor:
    """(4C,) with mean 1: the raw deviation of each patch channel, so what it means in pixels."""
    assert vae.bn.running_var is not None
    deviation = vae.bn.running_var.float().sqrt()
    return deviation / deviation.mean()

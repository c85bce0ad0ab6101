"""Rectified-flow training: noise levels, noising, the velocity target. Pure functions.

sigma is in (0, 1]: 0 is the picture, 1 is noise. x = (1 - sigma) z + sigma eps, and the model
predicts eps - z (Lipman et al. 2023; Esser et al. 2024; FLUX.2's reference code).
"""

import math

import torch
from torch import Tensor

from train.config import FlowConfig

SIGMA_MIN = 1e-4
"""Below this the target hardly depends on the noise any more; sampling never gets there either."""


def token_shift(tokens: int) -> float:
    """e^mu of FLUX.1's training shift: mu is linear in the packed tokens of the picture alone.

    0.5 at 256 tokens, 1.15 at 4096 (Black Forest Labs confirmed it for FLUX.2). Inference uses
    another one, diffusers' compute_empirical_mu.
    """
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    return math.exp(mu)


def shift_factor(flow: FlowConfig, *, tokens: int) -> float:
    """The factor that `flow.shift` means for a picture of so many tokens."""
    if flow.shift == "tokens":
        return token_shift(tokens)
    return 1.0 if flow.shift == "none" else flow.shift


def shifted(sigma: Tensor, *, factor: float) -> Tensor:
    """sigma' = f / (f + 1/sigma - 1), written without the division by sigma."""
    return factor * sigma / (1 + (factor - 1) * sigma)


def sample_sigma(flow: FlowConfig, *, tokens: int, generator: torch.Generator) -> Tensor:
    """One noise level, shape (), fp32, in [SIGMA_MIN, 1]."""
    if flow.sampling == "uniform":
        sigma = torch.rand((), generator=generator)
    else:
        sigma = torch.sigmoid(flow.mean + flow.std * torch.randn((), generator=generator))
    return shifted(sigma, factor=shift_factor(flow, tokens=tokens)).clamp(min=SIGMA_MIN)


def quantile_sigmas(flow: FlowConfig, *, tokens: int, count: int) -> Tensor:
    """Noise levels that stand for the trained density: (count,), fp32, rising.

    The midpoints, by probability, of `count` parts of equal probability; so the mean of any figure
    over them estimates its mean under `sample_sigma`, without that one's scatter.
    """
    part = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if flow.sampling == "logit-normal":
        part = torch.sigmoid(flow.mean + flow.std * torch.special.ndtri(part))
    sigma = shifted(part, factor=shift_factor(flow, tokens=tokens)).float()
    return sigma.clamp(min=SIGMA_MIN)


def noised(clean: Tensor, noise: Tensor, *, sigma: Tensor) -> Tensor:
    """x = (1 - sigma) z + sigma eps. sigma: (B,); the others: (B, ...)."""
    sigma = sigma.view(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """dx/dsigma = eps - z, what the model predicts."""
    return noise - clean


def model_time(sigma: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The `timestep` argument for a noise level, rounded exactly as Flux2Pipeline rounds it.

    The pipeline casts 1000 sigma to the type of the latents, then divides; in bf16 that moves t by
    up to 0.002, so training in fp32 time would learn other times than inference asks for.
    """
    return (1000 * sigma).to(dtype) / 1000

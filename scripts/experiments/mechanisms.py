"""Mechanisms that are only tried: put into the trainer for one run, and taken out again.

Each is a function of what it is given, so they hold under resume, accumulation and several
processes as the trainer does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from train import assemble, randomness
from train import run as training
from train.batch import Batch
from train.data import Loader, Showing

LEAST_RANK = 0.5
"""Share of the ranks that are left at sigma 1 (T-LoRA's default, arXiv 2507.05964)."""

NOISES = 8
"""Of so many noises the nearest one is taken (Immiscible Diffusion, arXiv 2406.12303; of k noises
for each picture alone, without assignment over the batch, arXiv 2505.18521)."""


def rank_mask(sigma_B: Tensor, *, rank: int, least: float) -> Tensor:
    """(B, rank), 1 where a rank works at a noise level: all at sigma 0, least * rank at sigma 1.

    r(sigma) = floor((1 - sigma) (rank - r_min)) + r_min, as in the paper.
    """
    low = round(rank * least)
    kept = ((1 - sigma_B) * (rank - low)).floor() + low
    return (torch.arange(rank, device=sigma_B.device) < kept[:, None]).float()


@contextmanager
def masked_ranks(transformer: Any, *, least: float = LEAST_RANK) -> Iterator[None]:
    """Let an attached adapter have fewer ranks at high noise, in training or when drawing."""
    sigmas: list[Tensor] = []

    def note(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        sigmas[:] = [named["timestep"].detach().float()]

    def cut(_module: Any, _arguments: Any, output: Tensor) -> Tensor:
        mask = rank_mask(sigmas[0], rank=output.shape[-1], least=least).to(output.dtype)
        return output * mask.view(len(mask), *[1] * (output.ndim - 2), -1)

    hooks = [transformer.register_forward_pre_hook(note, with_kwargs=True)]
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            hooks += [down.register_forward_hook(cut) for down in module.lora_A.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def timestep_rank() -> Iterator[None]:
    """Ranks are cut while training. The exported file is an ordinary one."""
    real = assemble.assemble

    def assembled(transformer: Any, *arguments: Any, **named: Any) -> assemble.Assembled:
        done = real(transformer, *arguments, **named)
        done.undo.enter_context(masked_ranks(transformer))
        return done

    assemble.assemble = assembled
    try:
        yield
    finally:
        assemble.assemble = real


@dataclass(frozen=True)
class NearestLoader(Loader):
    """A loader that takes, of NOISES noises for a showing, the one nearest to its latents."""

    def __call__(self, showings: Sequence[Showing]) -> Batch:
        batch = super().__call__(showings)
        noises = [
            nearest(clean, first, self.seed, showing)
            for clean, first, showing in zip(
                batch.latents_BDhw, batch.noise_BDhw, showings, strict=True
            )
        ]
        return replace(batch, noise_BDhw=torch.stack(noises))


def nearest(clean: Tensor, first: Tensor, seed: int, showing: Showing) -> Tensor:
    """Of `first` and NOISES - 1 more, a function of seed and showing, the nearest to `clean`."""
    generator = randomness.generator(
        seed, "more noise", showing.epoch, showing.example, showing.repeat
    )
    more = torch.randn(NOISES - 1, *clean.shape, generator=generator)
    noises = torch.cat([first[None], more])
    return noises[(noises - clean).flatten(1).norm(dim=1).argmin()]


@contextmanager
def nearest_noise() -> Iterator[None]:
    """Training draws its noise so."""
    real = training.Loader
    training.Loader = NearestLoader
    try:
        yield
    finally:
        training.Loader = real


MECHANISMS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "timestep_rank": timestep_rank,
    "nearest_noise": nearest_noise,
}

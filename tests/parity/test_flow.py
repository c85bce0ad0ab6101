"""Shifts, noise levels and the time the model is told, against diffusers."""

import math
from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from tests import tiny
from train import flow, randomness
from train.config import FlowConfig

ABSENT: Any = None


@pytest.mark.parametrize(("pixels", "tokens", "factor"), [(512, 1024, 1.88), (1024, 4096, 3.16)])
def test_training_shift_is_flux1s_on_the_true_token_count(pixels, tokens, factor):
    assert (pixels // 16) ** 2 == tokens
    assert flow.token_shift(tokens) == pytest.approx(math.exp(calculate_shift(tokens)), rel=1e-12)
    assert flow.token_shift(tokens) == pytest.approx(factor, abs=0.005)


def test_shifted_sigma_is_the_schedulers():
    sigmas = torch.linspace(0.01, 1, 100)
    mu = 1.15
    theirs = tiny.scheduler().time_shift(mu, 1.0, sigmas)
    ours = flow.shifted(sigmas, factor=math.exp(mu))
    torch.testing.assert_close(ours, theirs)
    assert ours[-1] == 1


def test_inference_shift_is_another_and_jumps():
    """Kindling relies on diffusers for it; if these move, docs and metadata must follow."""
    assert compute_empirical_mu(1024, 50) == pytest.approx(1.702, abs=5e-4)
    assert compute_empirical_mu(4096, 50) == pytest.approx(2.023, abs=5e-4)
    assert compute_empirical_mu(4301, 50) == pytest.approx(1.185, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_is_told_the_time_that_the_pipeline_tells_it(dtype):
    """The real pipeline in the real type; what reaches the transformer must be equal to the bit."""
    told = []
    transformer = tiny.transformer(guidance=True).to(dtype)
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True
    )
    pipeline = Flux2Pipeline(
        scheduler=tiny.scheduler(),
        vae=tiny.vae().to(dtype),
        text_encoder=ABSENT,
        tokenizer=ABSENT,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        prompt_embeds=torch.randn(1, 4, 3 * tiny.TEXT_WIDTH, dtype=dtype),
        height=64,
        width=64,
        num_inference_steps=25,
        output_type="latent",
    )
    sigmas = pipeline.scheduler.sigmas[:-1]
    assert len(told) == 25
    assert torch.equal(torch.cat(told), flow.model_time(sigmas, dtype=dtype))
    assert told[0].dtype == dtype


def test_noising_and_velocity_are_consistent():
    """Following the velocity from x to sigma = 0 gives the picture, to sigma = 1 the noise."""
    clean, noise = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    sigma = torch.tensor([0.25, 1.0]).double()
    x = flow.noised(clean, noise, sigma=sigma)
    v = flow.velocity(clean, noise)
    step = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(x - step * v, clean)
    torch.testing.assert_close(x + (1 - step) * v, noise)


def test_sampled_sigmas_have_the_density():
    """Logit-normal: the median of sigma is the shifted sigmoid of the mean."""
    settings = FlowConfig(mean=0.4, std=0.8, shift=2.0)
    draws = torch.stack(
        [
            flow.sample_sigma(settings, tokens=16, generator=randomness.generator(7, i))
            for i in range(4000)
        ]
    )
    middle = 1 / (1 + math.exp(-0.4))
    expected = 2 * middle / (1 + middle)
    assert draws.median().item() == pytest.approx(expected, abs=0.01)
    assert draws.min() > 0
    assert draws.max() <= 1
    unshifted = torch.logit(draws / (2 - draws))
    assert unshifted.std().item() == pytest.approx(0.8, abs=0.03)


def test_shift_settings():
    assert flow.shift_factor(FlowConfig(shift="none"), tokens=4096) == 1
    assert flow.shift_factor(FlowConfig(shift=2.5), tokens=4096) == 2.5
    assert flow.shift_factor(FlowConfig(), tokens=4096) == flow.token_shift(4096)

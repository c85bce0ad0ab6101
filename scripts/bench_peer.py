"""The other side of `kindling bench train --peer diffusers`: the plain recipe for FLUX.2 LoRAs.

What diffusers' own example for dreambooth with FLUX.2 does with `--gradient_checkpointing
--use_8bit_adam --mixed_precision bf16 --cache_latents`, written anew: the adapter as `add_adapter`
makes it, so in the base's bf16 (the example casts to fp32 for fp16 alone), autocast as accelerate
puts it around the model, noise levels by the scheduler's table, AdamW of bitsandbytes in 8 bits,
the loss read after each step. Latents and prompts wait on the device, as the example's do.
Everything after the optimizer's step (its checkpoints, its logs) is left out. Targets and rank are
those that Kindling trains.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import peft
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)

from train.batch import Batch

GUIDANCE = 3.5
"""The example's default; it doesn't change what a step costs."""


def steps(
    transformer: Any,
    batches: Sequence[Batch],
    *,
    targets: list[str],
    rank: int,
    dtype: torch.dtype,
    count: int,
) -> Iterator[float]:
    """Attach an adapter to a frozen transformer and train it; the loss of each step.

    batches: on the transformer's device, taken in turn.
    """
    transformer.train()
    transformer.enable_gradient_checkpointing()
    transformer.add_adapter(
        peft.LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets
        )
    )
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = _optimizer()(parameters, lr=1e-4, weight_decay=1e-4)
    schedule = get_scheduler("constant", optimizer)
    levels = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    places = [Flux2Pipeline._prepare_text_ids(b.text_BLJ).to(b.text_BLJ.device) for b in batches]
    for number in range(count):
        place = number % len(batches)
        loss = _loss(transformer, batches[place], places[place], levels, dtype=dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.detach().item()


def optimizer_name() -> str:
    """What the steps are made with: torch's, where bitsandbytes isn't installed."""
    return "AdamW8bit" if find_spec("bitsandbytes") else "AdamW"


def _optimizer() -> Any:
    if optimizer_name() == "AdamW":
        return torch.optim.AdamW
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def detach(transformer: Any) -> None:
    """Leave the transformer as it was found."""
    transformer.unload_lora()
    transformer.disable_gradient_checkpointing()


def _loss(
    transformer: Any, batch: Batch, text_places: torch.Tensor, levels: Any, *, dtype: torch.dtype
) -> torch.Tensor:
    clean = batch.latents_BDhw.to(dtype)
    device = clean.device
    noise = torch.randn_like(clean)
    sigma, time = _noise_levels(levels, clean)
    noised = (1.0 - sigma) * clean + sigma * noise
    places = Flux2Pipeline._prepare_latent_ids(clean).to(device)
    packed = Flux2Pipeline._pack_latents(noised)
    guidance = None
    if transformer.config.guidance_embeds:
        guidance = torch.full([1], GUIDANCE, device=device).expand(len(clean))
    autocast = torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else None
    with autocast or nullcontext():
        prediction = transformer(
            hidden_states=packed,
            timestep=time / 1000,
            guidance=guidance,
            encoder_hidden_states=batch.text_BLJ,
            txt_ids=text_places,
            img_ids=places,
            return_dict=False,
        )[0]
    prediction = Flux2Pipeline._unpack_latents_with_ids(
        prediction.float()[:, : packed.size(1)], places
    )
    weight = compute_loss_weighting_for_sd3("none", sigmas=sigma).float()
    errors = weight * (prediction - (noise - clean).float()) ** 2  # pyright: ignore
    return errors.reshape(len(clean), -1).mean(1).mean()


def _noise_levels(levels: Any, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A sigma for each picture, (B, 1, 1, 1), and its time of 1000; found again by its time."""
    count = levels.config.num_train_timesteps
    drawn = compute_density_for_timestep_sampling(
        "none", len(clean), logit_mean=0.0, logit_std=1.0, mode_scale=1.29
    )
    times = levels.timesteps[(drawn * count).long()].to(clean.device)
    table = levels.timesteps.to(clean.device)
    places = [(table == time).nonzero().item() for time in times]
    sigma = levels.sigmas.to(clean.device, clean.dtype)[places].flatten()
    return sigma.view(-1, 1, 1, 1), times

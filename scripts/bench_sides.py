"""The two sides of the training benchmark: Kindling's step, and a bare loop of the same step.

Both train the same random transformer on the same batches from the same adapter, so their losses
agree; the difference of their times is what Kindling adds. Sides are generators that take one step
per `next`, so that they can take turns. Owns what a step does, not how it is measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from diffusers import Flux2Transformer2DModel
from diffusers.training_utils import cast_training_params

from train import flow, latents, lora, optim, randomness
from train.batch import Batch
from train.checkpoint import Origin
from train.config import Config
from train.data import Example, Loader
from train.encoding.cache import Cache
from train.loading.base import DTYPES, FAMILIES, Base
from train.order import Mixture, Order
from train.track import Tracker
from train.trainer import Previews, Trainer

PATCH_CHANNELS = 128
TEXT_WIDTH = 768
HEAD_WIDTH = 64
DOUBLE_BLOCKS, SINGLE_BLOCKS = 3, 4
SQUARES = DOUBLE_BLOCKS * 26 + SINGLE_BLOCKS * 13 + 15 + 4
"""Parameters over the width squared: blocks, their shared modulation, embeddings and output."""


@dataclass(frozen=True)
class Job:
    """What both sides train."""

    parameters: int
    batch: int
    text_tokens: int
    rank: int
    dtype: str
    optimizer: str
    gradient_checkpointing: bool

    def config(self, folder: Path, *, size: int, steps: int) -> Config:
        """The run's config; the sections that a step doesn't read have no meaning here."""
        sections = {
            "base": {"dtype": self.dtype},
            "data": {"path": "memory", "resolution": size},
            "lora": {"rank": self.rank},
            "optim": {"name": self.optimizer},
            "train": {
                "steps": steps,
                "batch_size": self.batch,
            },
            "memory": {"gradient_checkpointing": "all" if self.gradient_checkpointing else "none"},
        }
        return Config.model_validate({"name": "bench", "output": str(folder), **sections})

    def transformer(self, device: torch.device) -> Flux2Transformer2DModel:
        """A random one of dev's kind and about `parameters` parameters, frozen, in training."""
        heads = max(1, round((self.parameters / SQUARES) ** 0.5 / HEAD_WIDTH))
        torch.manual_seed(0)
        with device:
            model = Flux2Transformer2DModel(
                in_channels=PATCH_CHANNELS,
                num_layers=DOUBLE_BLOCKS,
                num_single_layers=SINGLE_BLOCKS,
                attention_head_dim=HEAD_WIDTH,
                num_attention_heads=heads,
                joint_attention_dim=TEXT_WIDTH,
                axes_dims_rope=(HEAD_WIDTH // 4,) * 4,
                guidance_embeds=True,
            )
        torch.nn.Module.to(model.requires_grad_(False), DTYPES[self.dtype])  # diffusers' own warns
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model.train()


def stored_data(config: Config, *, text_tokens: int, text_width: int) -> tuple[Mixture, Loader]:
    """Four batches of random latents and prompts in a cache on disk, as encoding leaves them."""
    cache, count = Cache(Path(config.output) / "cache"), config.train.batch_size
    generator = torch.Generator().manual_seed(0)
    (pixels,) = config.data.resolutions
    side = pixels // 16
    examples = []
    for number in range(4 * count):
        name = f"{number:040x}"
        picture = torch.randn(PATCH_CHANNELS, side, side, generator=generator)
        text = torch.randn(text_tokens, text_width, generator=generator)
        cache.put(f"a{name}", {"latents": picture}, notes={})
        cache.put(f"b{name}", {"text": text.to(DTYPES[config.base.dtype])}, notes={})
        examples.append(Example(str(number), (f"a{name}",), None, f"b{name}", ((pixels, pixels),)))
    order = Mixture([Order(examples, batch_size=count, seed=config.seed)], shares=[1])
    return order, Loader(examples, empty_text=None, cache=cache, flow=config.flow, seed=0)


def kindling_steps(
    job: Job, config: Config, *, order: Mixture, loader: Loader, accelerator: Accelerator
) -> Iterator[None]:
    """Kindling's own path: reading, noise, loss, gradients, clipping, optimizer, metrics."""
    transformer = job.transformer(accelerator.device)
    lora.attach(transformer, config.lora, seed=randomness.derived_seed(config.seed, "lora"))
    trainer = new_trainer(
        config, transformer=transformer, order=order, loader=loader, accelerator=accelerator
    )
    yield from trained(trainer, config)


def new_trainer(
    config: Config, *, transformer: Any, order: Mixture, loader: Loader, accelerator: Accelerator
) -> Trainer:
    """The trainer of a transformer that has its adapter; it draws and saves nothing."""
    folder = Path(config.output)
    tracker = Tracker(
        folder,
        name=config.name,
        track=config.track,
        settings={},
        start=0,
        steps=config.train.steps + 1,  # never done: its last line would tell both sides' pace
        every=config.train.steps + 1,
        main=True,
    )
    dtype = DTYPES[config.base.dtype]
    return Trainer(
        config,
        accelerator=accelerator,
        base=Base("bench", "", None, FAMILIES["Flux2Pipeline"], False, dtype),
        transformer=transformer,
        order=order,
        loader=loader,
        previews=Previews([], None, folder),
        tracker=tracker,
        folder=folder,
        origin=Origin(data="", base=""),
    )


def trained(trainer: Trainer, config: Config) -> Iterator[None]:
    """A step of the trainer for each `next`."""
    for done, batch in enumerate(trainer.batches(0, config.train.steps), start=1):
        trainer.step(done, batch)
        yield
    trainer.finish()


def bare_steps(
    job: Job, config: Config, *, order: Mixture, loader: Loader, device: torch.device
) -> Iterator[torch.Tensor]:
    """The least that trains the same: forward, backward, clipping and optimizer; yields losses.

    Its inputs are ready beforehand, positions and noised pictures included, so everything else that
    a step needs counts as Kindling's overhead.
    """
    transformer = job.transformer(device)
    torch.manual_seed(randomness.derived_seed(config.seed, "lora"))
    targets = lora.select_targets(transformer, config.lora.targets)
    transformer.add_adapter(
        peft.LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules=targets)
    )
    cast_training_params(transformer)
    parameters = lora.trainable(transformer)
    optimizer = optim.build_optimizer(config.optim, parameters)
    guidance = torch.full((job.batch,), config.flow.guidance, device=device)
    batches = [loader(order[position]).to(device) for position in range(config.train.steps)]
    inputs = [model_inputs(batch, dtype=DTYPES[job.dtype]) for batch in batches]
    for arguments, target in inputs:
        prediction = transformer(**arguments, guidance=guidance, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def model_inputs(batch: Batch, *, dtype: torch.dtype) -> tuple[dict[str, Any], torch.Tensor]:
    """The transformer's arguments and its target for a batch."""
    clean, device = batch.latents_BDhw, batch.latents_BDhw.device
    noised = flow.noised(clean, batch.noise_BDhw, sigma=batch.sigma_B)
    arguments = {
        "hidden_states": latents.pack(noised).to(dtype).contiguous(),
        "encoder_hidden_states": batch.text_BLJ,
        "timestep": flow.model_time(batch.sigma_B, dtype=dtype),
        "img_ids": latents.image_ids(*clean.shape[2:]).to(device),
        "txt_ids": latents.text_ids(batch.text_BLJ.shape[1]).to(device),
    }
    return arguments, latents.pack(flow.velocity(clean, batch.noise_BDhw)).contiguous()

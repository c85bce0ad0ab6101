"""What a plan meters, each thing once: training steps, passes without gradients, the VAE.

Owns asking and keeping the answers. Blocks and steps are `footprint`'s. Bytes.
"""

from typing import Any

import torch

from data_tools.buckets import Geometry
from train.config import Config, LoraConfig
from train.loading.base import DTYPES
from train.planning import footprint
from train.planning.budget import Footprint
from train.planning.facts import Facts
from train.planning.footprint import Step
from train.planning.meter import Meter, gpu_kernels


class Meters:
    """What was metered, by what it depends on: a search asks for the same again and again."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._steps: dict[tuple, Footprint] = {}
        self._forwards: dict[tuple, int] = {}
        self._vaes: dict[tuple, tuple[int, int, float]] = {}

    def step(self, adapter: LoraConfig, step: Step) -> Footprint:
        """Of a training step."""
        name = (adapter, step)
        if name not in self._steps:
            self._steps[name] = footprint.meter_step(self._facts.transformer, adapter, step)
        return self._steps[name]

    def forward(self, adapter: LoraConfig, step: Step) -> int:
        """Of a pass without gradients, above what is held."""
        name = (adapter, step)
        if name not in self._forwards:
            shape = self._facts.transformer
            self._forwards[name] = footprint.meter_forward(shape, adapter, step)
        return self._forwards[name]

    def vae(self, size: Geometry, dtype: torch.dtype, *, decode: bool) -> tuple[int, int, float]:
        """Weights, bytes above them and operations of encoding or decoding one picture."""
        name = (size, dtype, decode)
        if name not in self._vaes:
            self._vaes[name] = _vae(self._facts, size, dtype=dtype, decode=decode)
        return self._vaes[name]


def step_of(config: Config, target: Geometry, references: tuple[Geometry, ...]) -> Step:
    """What is metered for a config, its largest example being this one."""
    return Step(
        target=target,
        references=references,
        batch_size=config.train.batch_size,
        accumulated=config.train.accumulate > 1,
        dtype=DTYPES[config.base.dtype],
        quantize=config.base.quantize,
        fp8_matmul=config.speed.fp8_matmul,
        attention="native" if config.speed.attention == "auto" else config.speed.attention,
    )


def _vae(
    facts: Facts, size: Geometry, *, dtype: torch.dtype, decode: bool
) -> tuple[int, int, float]:
    from diffusers import AutoencoderKLFlux2
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKLFlux2(**facts.vae)
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(dtype)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pyright: ignore
        if decode:
            channels = vae.config.latent_channels  # pyright: ignore
            shape = (1, channels, size.height // scale, size.width // scale)
        else:
            shape = (1, 3, size.height, size.width)
        given = torch.empty(shape, dtype=dtype)
    run: Any = vae.decode if decode else vae.encode
    with torch.no_grad(), gpu_kernels(), FlopCounterMode(display=False) as flops, Meter() as meter:
        meter.add([*vae.parameters(), *vae.buffers()])
        weights = meter.live
        run(given)
    return weights, meter.peak - weights, float(flops.get_total_flops())

"""What each phase of a run takes: GPU memory, RAM, disk, time.

Owns the arithmetic of the phases. What a training step takes is metered by `footprint` and chosen
by `budget`; what the base is, `facts` says. Each figure is computed from shapes unless a constant
here says that it is assumed. Bytes and seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data_tools.buckets import Geometry
from train import budget, footprint
from train.base import DTYPES, MAX_TEXT_TOKENS
from train.budget import Choice, Decision, Footprint
from train.config import Config
from train.facts import Facts
from train.machine import LINK_SHARE, SHARE, SHARE_MEASURED, Gpu
from train.meter import Meter, gpu_kernels

PROCESS = 4 * 10**9
"""Assumed, not measured yet: RAM of a process with torch, diffusers and batches read ahead."""
LOADING = 8 * 10**9
"""RAM beyond what stays there while weights are read, at most: the loader's own limit."""
DISK_RATE = 1e9
"""Assumed: bytes a second from disk."""
DOWNLOAD_RATE = 25e6
"""Assumed: bytes a second from the hub, of a line of 200 Mbit/s."""
CAPTION_TOKENS = 120
"""Assumed where pads are stored once: tokens of a caption, its template included."""
FLOAT32_SHARE = 1 / 8
"""Assumed: rate of the VAE's fp32 convolutions against that of bf16 matrix products."""
EXPORT_SECONDS = 60.0
"""Assumed: two loads of the adapter and the certificate's comparisons."""


@dataclass(frozen=True)
class Pictures:
    """What is trained on, as far as memory and time depend on it."""

    target: Geometry
    """Of the example with most tokens, references included."""
    references: tuple[Geometry, ...]
    encoded: int
    """Pictures that the VAE encodes: at each resolution, mirrored ones and references too."""
    captions: int
    found: bool
    """Read from the data folder; else assumed."""


@dataclass(frozen=True)
class Phase:
    """A line of the plan; None where nothing can be said."""

    name: str
    gpu: int
    """Allocated by torch at most."""
    ram: int
    disk: int
    """Written, and still there after the run."""
    seconds: float | None
    note: str = ""


def step_of(config: Config, pictures: Pictures) -> footprint.Step:
    """What is metered for a config."""
    return footprint.Step(
        target=pictures.target,
        references=pictures.references,
        batch_size=config.train.batch_size,
        accumulated=config.train.accumulate > 1,
        dtype=DTYPES[config.base.dtype],
        quantize=config.base.quantize,
    )


def phases(
    config: Config,
    facts: Facts,
    pictures: Pictures,
    *,
    metered: Footprint,
    decision: Decision,
    gpu: Gpu | None,
) -> list[Phase]:
    """All phases, in order."""
    return [
        Phase("read the pictures", 0, PROCESS, 0, None),
        _encode_pictures(config, facts, pictures, gpu=gpu),
        _encode_captions(config, facts, pictures, gpu=gpu),
        _load(config, facts, metered, decision),
        _train(config, facts, pictures, metered=metered, decision=decision, gpu=gpu),
        *_preview(config, facts, pictures, decision=decision, gpu=gpu),
        Phase(
            "export, certificate",
            decision.need.held,
            PROCESS,
            2 * metered.parameters,
            EXPORT_SECONDS,
        ),
    ]


def _encode_pictures(config: Config, facts: Facts, pictures: Pictures, *, gpu: Gpu | None) -> Phase:
    largest = max((pictures.target, *pictures.references), key=lambda size: size.tokens)
    weights, taken, work = _vae(facts, largest, dtype=torch.float32, decode=False)
    channels = facts.transformer["in_channels"]
    seconds = gpu and pictures.encoded * work / (_rate(gpu) * FLOAT32_SHARE)
    disk = pictures.encoded * largest.tokens * channels * 4
    return Phase("encode pictures", weights + taken, PROCESS, disk, seconds, f"at {largest}")


def _encode_captions(config: Config, facts: Facts, pictures: Pictures, *, gpu: Gpu | None) -> Phase:
    text, kind = facts.text, config.encode.text_quantize
    size = DTYPES[config.base.dtype].itemsize
    codes, scales = footprint.quantized_bytes(
        kind, rows=text.linears // text.width, columns=text.width, size=size
    )
    embedding = text.parameters(0) * size
    states = (text.used + 1) * MAX_TEXT_TOKENS * text.width * size
    layer = MAX_TEXT_TOKENS * (3 * text.inner + 6 * text.width) * size
    matrix = 0 if kind == "none" else text.width * text.inner * size
    gpu_bytes = embedding + text.used * (codes + scales) + states + layer + matrix
    row = facts.transformer["joint_attention_dim"] * size
    row = row / 2 * (1 + 4 / 128) if config.encode.text_storage == "8bit" else row
    captions = pictures.captions + 1 + len(config.preview.prompts)
    rows = captions * (MAX_TEXT_TOKENS if facts.klein else CAPTION_TOKENS)
    rows += 0 if facts.klein else MAX_TEXT_TOKENS
    work = 2 * text.used * text.linears * MAX_TEXT_TOKENS * captions
    read = _size_of(facts, "text_encoder") / DISK_RATE
    seconds = gpu and read + work / _rate(gpu)
    note = f"{text.used} of {text.layers} layers, {'bf16' if kind == 'none' else kind}"
    return Phase("encode captions", gpu_bytes, PROCESS + LOADING, int(rows * row), seconds, note)


def _load(config: Config, facts: Facts, metered: Footprint, decision: Decision) -> Phase:
    quantized = config.base.quantize != "none"
    read = _size_of(facts, "transformer")
    copy = metered.weights if quantized else 0
    gpu_bytes = decision.need.held
    ram = PROCESS + LOADING + decision.need.ram
    note = "the quantised copy stays on disk" if quantized else ""
    return Phase("load the transformer", gpu_bytes, ram, copy, read / DISK_RATE, note)


def _train(
    config: Config,
    facts: Facts,
    pictures: Pictures,
    *,
    metered: Footprint,
    decision: Decision,
    gpu: Gpu | None,
) -> Phase:
    one = gpu and step_seconds(facts, step_of(config, pictures), metered, decision.choice, gpu=gpu)
    seconds = one and one * config.train.accumulate * config.train.steps
    averages = config.train.ema is not None or config.optim.name == "schedulefree"
    parts = 1 + averages + (config.lora.init == "pissa")  # files like the adapter's own
    state = metered.parameters * (parts * budget.WEIGHT + budget.STATE[config.optim.name])
    due = config.train.steps // config.train.checkpoint_every + 1
    disk = int(state * min(due, config.train.keep_checkpoints + 1))
    return Phase(
        f"train {config.train.steps} steps",
        decision.need.gpu,
        PROCESS + decision.need.ram,
        disk,
        seconds,
        f"most in {decision.need.where}",
    )


def _preview(
    config: Config, facts: Facts, pictures: Pictures, *, decision: Decision, gpu: Gpu | None
) -> list[Phase]:
    preview = config.preview
    if not preview.prompts:
        return []
    side = max(config.data.resolutions)
    size = Geometry(preview.width or side, preview.height or side)
    dtype = DTYPES[config.base.dtype]
    vae, decoding, work = _vae(facts, size, dtype=dtype, decode=True)
    step = footprint.Step(target=size, dtype=dtype, quantize=config.base.quantize)
    passing = footprint.meter_forward(facts.transformer, config.lora, step)
    # the last step's gradients are still there, among what is held if batches are accumulated
    held = decision.need.held + (0 if config.train.accumulate > 1 else decision.need.gradients)
    times = preview.steps * (2 if facts.klein and preview.guidance > 1 else 1)
    forward = sum(forward_work(facts, step))
    rounds = config.train.steps // preview.every + 2
    count = rounds * len(preview.prompts)
    seconds = gpu and count * (times * forward + work) / _rate(gpu)
    taken = held + vae + max(passing, decoding)
    disk = int(count * size.width * size.height * 1.5)
    note = f"{count} pictures of {size}"
    return [Phase("previews", taken, PROCESS + decision.need.ram, disk, seconds, note)]


def step_seconds(
    facts: Facts, step: footprint.Step, metered: Footprint, choice: Choice, *, gpu: Gpu
) -> float:
    """One batch, forward and backward, by its operations.

    Frozen weights take two passes (forward, and the gradient of the input), attention three and a
    half, and each recomputed block another forward. Restoring quantised weights moves them through
    the GPU's memory each time. Streaming runs beside it, and counts where it takes longer.
    """
    matrices, attention = forward_work(facts, step)
    again = len(choice.recomputed) / max(1, len(metered.blocks))
    work = matrices * (2 + again) + attention * (3.5 + again)
    seconds = work / _rate(gpu)
    if step.quantize != "none":
        in_blocks = metered.weights - metered.others
        plain = _block_parameters(facts) * step.dtype.itemsize
        seconds += (2 + again) * (in_blocks + 2 * plain) / gpu.bandwidth
    doubles, singles = budget.streamed(metered, resident=choice.resident)
    sizes = {block.single: block.weights for block in metered.blocks}
    moved = 2 * (doubles * sizes.get(False, 0) + singles * sizes.get(True, 0))
    if choice.offload:
        moved += budget.starts(metered, choice)
    return max(seconds, moved / (gpu.link * LINK_SHARE))


def forward_work(facts: Facts, step: footprint.Step) -> tuple[float, float]:
    """Operations of a forward pass: matrix products of the frozen weights, attention.

    A double block has 13 D² weights for pictures' tokens and as many for the text's, a single one
    13 D² for all; attention is 4 S² D a block.
    """
    config = facts.transformer
    width = config["attention_head_dim"] * config["num_attention_heads"]
    tokens = step.target.tokens + sum(size.tokens for size in step.references) + step.text_tokens
    blocks = config["num_layers"] + config["num_single_layers"]
    matrices = 2.0 * 13 * width**2 * tokens * blocks
    return matrices * step.batch_size, 4.0 * tokens**2 * width * blocks * step.batch_size


def _block_parameters(facts: Facts) -> int:
    config = facts.transformer
    width = config["attention_head_dim"] * config["num_attention_heads"]
    return (26 * config["num_layers"] + 13 * config["num_single_layers"]) * width**2


def _rate(gpu: Gpu) -> float:
    """Operations a second that training is assumed to reach."""
    return gpu.matmul * (SHARE_MEASURED if gpu.here else SHARE)


def _size_of(facts: Facts, part: str) -> int:
    return next((p.size for p in facts.parts if p.name == part), facts.parts[0].size)


def _vae(
    facts: Facts, size: Geometry, *, dtype: torch.dtype, decode: bool
) -> tuple[int, int, float]:
    """Weights, bytes above them and operations of encoding or decoding one picture."""
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
    run: Callable[[Any], Any] = vae.decode if decode else vae.encode
    with torch.no_grad(), gpu_kernels(), FlopCounterMode(display=False) as flops, Meter() as meter:
        meter.add([*vae.parameters(), *vae.buffers()])
        weights = meter.live
        run(given)
    return weights, meter.peak - weights, float(flops.get_total_flops())

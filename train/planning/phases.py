"""What each phase of a run takes: GPU memory, RAM, disk, time.

Owns the arithmetic of the phases. What a training step takes is metered by `metered` and chosen by
`budget`; what the base is, `facts` says. Each figure is computed from shapes unless a constant
here says that it is assumed. Bytes and seconds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from data_tools.buckets import REFERENCE_AREA, Geometry
from train.config import Config
from train.encoding.texts import SCALED
from train.loading.base import DTYPES, MAX_TEXT_TOKENS
from train.planning import budget
from train.planning.budget import Choice, Decision, Footprint
from train.planning.facts import Facts
from train.planning.footprint import Step
from train.planning.machine import LINK_SHARE, SHARE, SHARE_MEASURED, Gpu
from train.planning.metered import Meters, step_of
from train.validation.validate import DRIFT_STEPS

PROCESS = 4 * 10**9
"""Assumed, not measured yet: RAM of the process, with torch, diffusers and batches read ahead."""
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
TEXT_BYTES = {"int8": 1 + 4 / 4096, "nf4": 0.5 + 4 / 64}
"""Bytes a weight of bitsandbytes' Linears: a scale a row, or a maximum for 64."""
PNG_BYTES = 1.5
"""Assumed: bytes of a pixel of a preview."""
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


@dataclass(frozen=True)
class Case:
    """All that the phases of one config depend on."""

    config: Config
    facts: Facts
    pictures: Pictures
    gpu: Gpu | None
    meters: Meters
    metered: Footprint
    decision: Decision
    processes: int = 1
    """That have the base in parts."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the base."""
        return DTYPES[self.config.base.dtype]

    @property
    def step(self) -> Step:
        """Of the largest example."""
        return step_of(self.config, self.pictures.target, self.pictures.references)

    @property
    def between(self) -> int:
        """Held between steps: the last one's gradients are still there."""
        accumulated = self.config.train.accumulate > 1  # then they are held all along
        need = self.decision.need
        return need.held + (0 if accumulated else need.gradients)


def phases(case: Case) -> list[Phase]:
    """All phases, in order."""
    need, file = case.decision.need, 2 * case.metered.parameters
    listed = [
        Phase("read the pictures", 0, PROCESS, 0, None),
        _encode_pictures(case),
        _encode_captions(case),
        _load(case),
        _train(case),
        *_validation(case),
        *_previews(case),
        Phase("export, certificate", need.held, PROCESS, file, EXPORT_SECONDS),
    ]
    return [replace(phase, ram=phase.ram * case.processes) for phase in listed]


def _encode_pictures(case: Case) -> Phase:
    pictures = case.pictures
    largest = max((pictures.target, *pictures.references), key=lambda size: size.tokens)
    weights, taken, work = case.meters.vae(largest, torch.float32, decode=False)
    channels = case.facts.transformer["in_channels"]
    seconds = case.gpu and pictures.encoded * work / (_rate(case.gpu) * FLOAT32_SHARE)
    disk = pictures.encoded * largest.tokens * channels * 4
    return Phase("encode pictures", weights + taken, PROCESS, disk, seconds, f"at {largest}")


def _encode_captions(case: Case) -> Phase:
    text, kind, size = case.facts.text, case.config.encode.text_quantize, case.dtype.itemsize
    matrices = int(text.linears * TEXT_BYTES.get(kind, size))
    states = (text.used + 1) * MAX_TEXT_TOKENS * text.width * size
    layer = MAX_TEXT_TOKENS * (3 * text.inner + 6 * text.width) * size
    matrix = 0 if kind == "none" else text.width * text.inner * size
    gpu_bytes = text.parameters(0) * size + text.used * matrices + states + layer + matrix
    work = 2 * text.used * text.linears * MAX_TEXT_TOKENS * _prompts(case)
    read = _size_of(case.facts, "text_encoder") / DISK_RATE
    seconds = case.gpu and read + work / _rate(case.gpu)
    form = case.config.base.dtype if kind == "none" else kind
    note = f"{text.used} of {text.layers} layers, {form}"
    return Phase("encode captions", gpu_bytes, PROCESS + LOADING, _text_cache(case), seconds, note)


def _prompts(case: Case) -> int:
    """Captions, prompts of previews and checks, and the empty one."""
    config = case.config
    watched = config.validation.neutral_prompts if config.validation.pictures != "off" else ()
    return case.pictures.captions + 1 + len({*config.preview.texts, *watched})


def _text_cache(case: Case) -> int:
    """Embeddings on disk. Pads that all prompts share are there once; klein's aren't shared."""
    row = case.facts.transformer["joint_attention_dim"] * case.dtype.itemsize
    if case.config.encode.text_storage == "8bit":
        row = row / case.dtype.itemsize * (1 + 4 / SCALED)
    klein = case.facts.klein
    rows = _prompts(case) * (MAX_TEXT_TOKENS if klein else CAPTION_TOKENS)
    return int((rows + (0 if klein else MAX_TEXT_TOKENS)) * row)


def _load(case: Case) -> Phase:
    quantized, need = case.config.base.quantize != "none", case.decision.need
    copy = case.metered.weights if quantized else 0
    read = _size_of(case.facts, "transformer") / DISK_RATE
    note = "the quantised copy stays on disk" if quantized else ""
    return Phase("load the transformer", need.held, PROCESS + LOADING + need.ram, copy, read, note)


def _train(case: Case) -> Phase:
    config, train, need = case.config, case.config.train, case.decision.need
    shape, choice = case.facts.transformer, case.decision.choice
    one = case.gpu and step_seconds(shape, case.step, case.metered, choice, gpu=case.gpu)
    if case.gpu and one:  # the others' parts, in the forward and in the backward
        gathered = 2 * (1 - 1 / case.processes) * case.metered.weights
        one = max(one, gathered / (case.gpu.link * LINK_SHARE))
    seconds = one and one * train.accumulate * train.steps
    averages = train.ema is not None or config.optim.name == "schedulefree"
    parts = 1 + averages + (config.lora.init == "pissa")  # files like the adapter's own
    state = case.metered.parameters * (parts * budget.WEIGHT + budget.STATE[config.optim.name])
    due = train.steps // train.checkpoint_every + 1
    disk = int(state * min(due, train.keep_checkpoints + 1))
    note = f"most in {need.where}"
    return Phase(f"train {train.steps} steps", need.gpu, PROCESS + need.ram, disk, seconds, note)


def _validation(case: Case) -> list[Phase]:
    settings, train = case.config.validation, case.config.train
    if settings.pictures == "off":
        return []
    passes = settings.max_pictures * settings.sigmas * (2 if case.pictures.references else 1)
    passes += len(settings.neutral_prompts) * DRIFT_STEPS
    rounds = train.steps // (settings.every or train.checkpoint_every) + 2
    single = replace(case.step, batch_size=1)
    work = sum(forward_work(case.facts.transformer, single)) * passes * rounds
    taken = case.between + case.meters.forward(case.config.lora, case.step)
    seconds = case.gpu and work / _rate(case.gpu)
    note = f"{rounds} checks of up to {passes} passes"
    return [Phase("validation", taken, PROCESS + case.decision.need.ram, 0, seconds, note)]


def _previews(case: Case) -> list[Phase]:
    preview = case.config.preview
    if not preview.texts:
        return []
    side = max(case.config.data.resolutions)
    size = Geometry(preview.width or side, preview.height or side)
    vae, decoding, work = case.meters.vae(size, case.dtype, decode=True)
    most = max(map(len, preview.references))  # of the largest size that a reference keeps
    side = math.isqrt(REFERENCE_AREA)
    references = (Geometry(side, side),) * most
    step = replace(case.step, target=size, references=references, batch_size=1)
    passing = case.meters.forward(case.config.lora, step)
    times = preview.steps * (2 if case.facts.klein and preview.guidance > 1 else 1)
    count = (case.config.train.steps // preview.every + 2) * len(preview.texts)
    work = count * (times * sum(forward_work(case.facts.transformer, step)) + work)
    return [
        Phase(
            "previews",
            case.between + vae + max(passing, decoding),
            PROCESS + case.decision.need.ram,
            int(count * size.width * size.height * PNG_BYTES),
            case.gpu and work / _rate(case.gpu),
            f"{count} pictures of {size}",
        )
    ]


def step_seconds(
    config: Mapping[str, Any], step: Step, metered: Footprint, choice: Choice, *, gpu: Gpu
) -> float:
    """One batch, forward and backward, by its operations. config: see `forward_work`.

    Frozen weights take two passes (forward, and the gradient of the input), attention three and a
    half, and each recomputed block another forward. Restoring quantised weights moves them through
    the GPU's memory each time. Streaming runs beside it, and counts where it takes longer.
    """
    matrices, attention = forward_work(config, step)
    again = len(choice.recomputed) / max(1, len(metered.blocks))
    work = matrices * (2 + again) + attention * (3.5 + again)
    seconds = work / _rate(gpu)
    if step.quantize != "none":
        in_blocks = metered.weights - metered.others
        plain = _block_parameters(config) * step.dtype.itemsize
        seconds += (2 + again) * (in_blocks + 2 * plain) / gpu.bandwidth
    away = budget.streamed(metered, resident=choice.resident)
    moved = 2 * sum(block.weights for block in away)
    if choice.offload:
        moved += 2 * budget.starts(metered, choice)
    return max(seconds, moved / (gpu.link * LINK_SHARE))


def forward_work(config: Mapping[str, Any], step: Step) -> tuple[float, float]:
    """Operations of a forward pass: matrix products of the frozen weights, attention.

    config: the arguments of Flux2Transformer2DModel. A double block has 13 D² weights for pictures'
    tokens and as many for the text's, a single one 13 D² for all; attention is 4 S² D a block.
    """
    width = config["attention_head_dim"] * config["num_attention_heads"]
    tokens = step.target.tokens + sum(size.tokens for size in step.references) + step.text_tokens
    blocks = config["num_layers"] + config["num_single_layers"]
    matrices = 2.0 * 13 * width**2 * tokens * blocks
    return matrices * step.batch_size, 4.0 * tokens**2 * width * blocks * step.batch_size


def _block_parameters(config: Mapping[str, Any]) -> int:
    width = config["attention_head_dim"] * config["num_attention_heads"]
    return (26 * config["num_layers"] + 13 * config["num_single_layers"]) * width**2


def _rate(gpu: Gpu) -> float:
    """Operations a second that training is assumed to reach."""
    return gpu.matmul * (SHARE_MEASURED if gpu.here else SHARE)


def _size_of(facts: Facts, part: str) -> int:
    return next((p.size for p in facts.parts if p.name == part), facts.parts[0].size)

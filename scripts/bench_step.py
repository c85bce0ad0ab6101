"""Seconds and memory of a training step: Kindling's beside a bare loop of diffusers and peft.

The sides take turns in one process, so that whatever else the machine does hits both, and are
compared pair by pair. Peaks of memory come from a fresh process for each side.
"""

import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import trange

from scripts.bench_report import ratios, spread
from scripts.bench_sides import TEXT_WIDTH, Job, bare_steps, kindling_steps, stored_data
from train.track import METRICS
from train.usage import peak_ram

HEADER = ("pixels", "tokens", "Kindling s", "bare s", "ratio", "Kindling GB", "bare GB")

STEPS_TO_PEAK = 2
"""The second step has the optimizer's state too."""


def compare(job: Job, *, size: int, steps: int, warmup: int) -> dict[str, Any]:
    """Seconds of `steps` steps of each side, in turn, after `warmup` that don't count."""
    accelerator = Accelerator(mixed_precision="no")
    with TemporaryDirectory() as folder:
        config = job.config(Path(folder), size=size, steps=warmup + steps)
        order, loader = stored_data(config, text_tokens=job.text_tokens, text_width=TEXT_WIDTH)
        ours = kindling_steps(job, config, order=order, loader=loader, accelerator=accelerator)
        theirs = bare_steps(job, config, order=order, loader=loader, device=accelerator.device)
        for _ in range(warmup):
            timed(ours)
            timed(theirs)
        turns = trange(steps, desc=f"{size} px", unit="pair", delay=2)
        pairs = [(timed(ours), timed(theirs)) for _ in turns]
        next(ours, None)
        lines = (Path(folder) / METRICS).read_text(encoding="utf-8").splitlines()[warmup:]
    mine = [seconds for (seconds, _), _ in pairs]
    bare = [seconds for _, (seconds, _) in pairs]
    losses = [json.loads(line)["loss"] for line in lines]
    return {
        "size": size,
        "image_tokens": (size // 16) ** 2,
        "text_tokens": job.text_tokens,
        "job": vars(job),
        "parameters": sum(p.numel() for p in job.transformer(torch.device("meta")).parameters()),
        "device": str(accelerator.device),
        "kindling": spread(mine),
        "bare": spread(bare),
        "ratio": ratios(mine, bare),
        "loss_difference": max(
            abs(a - float(b)) for a, (_, (_, b)) in zip(losses, pairs, strict=True)
        ),
    }


def timed(side: Iterator[Any]) -> tuple[float, Any]:
    """Seconds of one step, the device's work included, and what the step yields."""
    began = time.perf_counter()
    result = next(side)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def peaks(job: Job, *, size: int) -> dict[str, dict[str, int]]:
    """Peak memory of each side in bytes."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for side in ("kindling", "bare"):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[side] = pool.submit(peak, side, job, size=size).result()
    return found


def peak(side: str, job: Job, *, size: int) -> dict[str, int]:
    """Peak memory of one side in bytes; a process can tell this once, of its first side.

    ram: of the whole process; imports: of that before anything was built; gpu: allocated.
    """
    imports = peak_ram()
    accelerator = Accelerator(mixed_precision="no")
    with TemporaryDirectory() as folder:
        config = job.config(Path(folder), size=size, steps=STEPS_TO_PEAK)
        order, loader = stored_data(config, text_tokens=job.text_tokens, text_width=TEXT_WIDTH)
        if side == "kindling":
            steps = kindling_steps(job, config, order=order, loader=loader, accelerator=accelerator)
        else:
            device = accelerator.device
            steps = bare_steps(job, config, order=order, loader=loader, device=device)
        for _ in steps:
            pass
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"ram": peak_ram(), "imports": imports, "gpu": gpu}


def row(result: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    ours, bare, ratio = result["kindling"], result["bare"], result["ratio"]
    memory = result.get("memory", {})
    kind = "ram" if result["device"] == "cpu" else "gpu"
    return (
        str(result["size"]),
        str(result["image_tokens"] + result["text_tokens"]),
        f"{ours['median']:.3f} ({ours['min']:.3f}-{ours['max']:.3f})",
        f"{bare['median']:.3f} ({bare['min']:.3f}-{bare['max']:.3f})",
        f"{ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})",
        *(f"{memory[side][kind] / 1e9:.2f}" if memory else "-" for side in ("kindling", "bare")),
    )

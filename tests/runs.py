"""Tiny data sets, configs and runs for tests."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from train import checkpoint
from train.config import Config
from train.lora import Adapter, AnyAdapter

ROOT = Path(__file__).resolve().parent.parent

SQUARE, WIDE = (64, 64), (96, 48)
"""Sizes of pictures that land in two buckets at resolution 64."""


def draw_picture(path: Path, *, size: tuple[int, int] = SQUARE, seed: int = 0) -> Path:
    """A picture of coloured noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_pictures(folder: Path, *, sizes: Sequence[tuple[int, int]] = (SQUARE,) * 4) -> Path:
    """One captioned picture for each size."""
    for number, size in enumerate(sizes):
        draw_picture(folder / f"{number}.png", size=size, seed=number)
        (folder / f"{number}.txt").write_text(f"zibby number {number}", encoding="utf-8")
    return folder


def settings(folder: Path, *, model: Path, pictures: Path, **sections: Any) -> dict[str, Any]:
    """A config's contents: 4 fast fp32 steps in `folder` without checks; `sections` change some."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "output": str(folder / "runs"),
        "cache": str(folder.parent / "cache"),
        "seed": 7,
        "base": {"model": str(model), "dtype": "fp32"},
        "data": {"path": str(pictures), "resolution": 64},
        "lora": {"rank": 4},
        "optim": {"lr": 1e-3},
        "train": {"steps": 4, "batch_size": 2, "log_every": 1},
        "memory": {"gradient_checkpointing": "none"},
        "validation": {"pictures": "off"},
        "export": {"dtype": "fp32"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return tree


def make_config(folder: Path, *, model: Path, pictures: Path, **sections: Any) -> Config:
    """The same, as a Config."""
    return Config.model_validate(settings(folder, model=model, pictures=pictures, **sections))


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    """As a file; JSON is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return path


def run_folder(config: Config) -> Path:
    """Where a run's files are."""
    return Path(config.output) / config.name


def adapter_change(folder: Path, other: Path) -> float:
    """Largest difference between the weights of two runs' last checkpoints."""
    ours, theirs = (low_rank(checkpoint.load(last_checkpoint(p)).adapter) for p in (folder, other))
    return max(
        (one[name] - two[name]).abs().max().item()
        for one, two in ((ours.down, theirs.down), (ours.up, theirs.up))
        for name in one
    )


def low_rank(adapter: AnyAdapter | None) -> Adapter:
    """An adapter that must be LoRA or DoRA."""
    assert isinstance(adapter, Adapter)
    return adapter


def last_checkpoint(folder: Path) -> Path:
    """Of a run."""
    return checkpoint.list_checkpoints(folder / "checkpoints")[-1]


def assert_same_run(folder: Path, other: Path) -> None:
    """To the bit: the last adapter, its average, the optimizer, and every step's figures."""
    ours, theirs = last_checkpoint(folder), last_checkpoint(other)
    assert ours.name == theirs.name
    files = [{p.name: p.read_bytes() for p in o.glob("*.safetensors")} for o in (ours, theirs)]
    assert files[0] == files[1]
    assert "adapter.safetensors" in files[0]
    states = [checkpoint.load(path).optimizer for path in (ours, theirs)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert metrics(folder) == metrics(other)


def metrics(folder: Path, *, drop: Sequence[str] = ("seconds",)) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what differs from run to run."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if key not in drop} for row in rows]


def environment() -> dict[str, str]:
    """Of a run in a process of its own."""
    plain = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **plain}


ENGINES = {
    "one": ("--cpu", "--num_processes", "1"),
    "ddp": ("--multi_gpu", "--num_processes", "2"),
    "fsdp2": ("--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"),
    "zero3": (
        *("--use_deepspeed", "--zero_stage", "3", "--zero3_init_flag", "false"),
        *("--num_processes", "2"),
    ),
}
"""Arguments of accelerate's launcher; with ACCELERATE_USE_CPU they mean CPUs."""


SCRIPTS = {"zero3": ROOT / "tests" / "train_without_shm.py"}
"""What is launched in place of train.py."""


def start(config: Path, *arguments: str, engine: str = "one") -> subprocess.Popen[str]:
    """`accelerate launch train.py` on the CPU, in a process group of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *ENGINES[engine]]
    command += ["--num_machines", "1", "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(SCRIPTS.get(engine, ROOT / "train.py")), "--config", str(config), *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch(config: Path, *arguments: str, engine: str = "one") -> str:
    """The same, to its end; the output."""
    process = start(config, *arguments, engine=engine)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output

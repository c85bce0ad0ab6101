"""The real command in real processes: `accelerate launch train.py`."""

import json
import os
import re
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests import runs
from tests.e2e.conftest import TrainRun

SECTIONS = {
    "data": {"flip": True, "caption_dropout": 0.3},
    "optim": {"schedule": "cosine", "warmup": 3},
    "train": {"steps": 20, "accumulate": 2, "checkpoint_every": 5, "keep_checkpoints": 3},
}
PREVIEW = {"prompts": ["zibby", ""], "every": 10, "steps": 2, "width": 64, "height": 80}


def write_config(
    shared: Path, name: str, *, model: Path, pictures: str = "mixed", **sections
) -> Path:
    """The config file of a run in shared/name."""
    tree = runs.settings(shared / name, model=model, pictures=shared / pictures, **sections)
    return runs.write_config(shared / f"{name}.yaml", tree)


@pytest.fixture(scope="module")
def whole(shared: Path, dev_folder: Path) -> tuple[Path, str]:
    """A run of 20 steps without interruption: its folder and what it printed."""
    config = write_config(shared, "whole", model=dev_folder, preview=PREVIEW, **SECTIONS)
    return shared / "whole" / "runs" / "tiny", runs.launch(config)


def test_a_folder_of_pictures_becomes_an_adapter_with_everything_beside_it(whole):
    folder, output = whole
    assert {path.name for path in folder.iterdir()} == {
        *("checkpoints", "config.yaml", "metrics.jsonl", "previews", "tiny.certificate.json"),
        *("pictures.json", "timings.json", "tiny.safetensors", "versions.json"),
        "tiny.diffusers.py",
    }
    assert "to use it: tiny.diffusers.py" in output
    certificate = json.loads((folder / "tiny.certificate.json").read_text(encoding="utf-8"))
    assert certificate["passed"]
    with safe_open(folder / "tiny.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert any(file.get_tensor(name).any() for name in names if "lora_B" in name)
    assert len(names) == 2 * 28
    assert "data: 5 pictures" in output
    assert "buckets 64x64 × 3, " in output
    assert "certificate: loads in diffusers and in ComfyUI at strength 1, every key used" in output


def test_metrics_have_every_step(whole):
    rows = runs.metrics(whole[0], drop=())
    assert [row["step"] for row in rows] == list(range(1, 21))
    figures = {"step", "loss", "grad_norm", "lr", "epoch", "seconds"}
    kinds = {"double_attn", "double_ff", "single"}
    figures |= {f"{norm}/{kind}" for norm in ("grad_norm", "lora_norm") for kind in kinds}
    assert all(set(row) == figures for row in rows)
    assert max(row["lr"] for row in rows) == pytest.approx(1e-3)
    assert rows[-1]["epoch"] == pytest.approx(20 * 2 / 3)


def test_previews_come_first_in_between_and_last_and_show_the_training(whole):
    previews = sorted((whole[0] / "previews").iterdir())
    steps, prompts = (0, 10, 20), (0, 1)
    assert [p.name for p in previews] == [f"step-{s:06d}-{n}.png" for s in steps for n in prompts]
    pictures = [Image.open(path) for path in previews]
    assert {picture.size for picture in pictures} == {(64, 80)}
    assert pictures[0].tobytes() != pictures[2].tobytes() != pictures[4].tobytes()


def test_old_checkpoints_are_rotated_away(whole):
    names = [path.name for path in sorted((whole[0] / "checkpoints").iterdir())]
    assert names == ["step-000010", "step-000015", "step-000020"]


def wait_until(ready, *, process, seconds: float = 200) -> None:
    """Poll fast while a process lives."""
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def test_killed_and_resumed_is_never_killed_to_the_bit(whole, shared, dev_folder):
    """kill -9 to the whole process group, some steps after the second checkpoint. Previews, which
    only the run without interruption has, must not move a bit either.
    """
    config = write_config(shared, "killed", model=dev_folder, **SECTIONS)
    folder = shared / "killed" / "runs" / "tiny"

    def steps_done() -> int:
        metrics = folder / "metrics.jsonl"
        return metrics.read_text(encoding="utf-8").count("\n") if metrics.exists() else 0

    process = runs.start(config)
    wait_until(lambda: steps_done() >= 12, process=process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert runs.last_checkpoint(folder).name == "step-000010"
    assert not (folder / "tiny.safetensors").exists()

    output = runs.launch(config, "--resume")
    assert "resuming after step 10" in output
    assert "cache: all there" in output
    runs.assert_same_run(folder, whole[0])


@pytest.mark.parametrize(
    ("engine", "quantize", "memory", "count", "pictures"),
    [
        ("ddp", "none", {"gradient_checkpointing": "none", "resident_blocks": 0}, 6, "one picture"),
        ("fsdp2", "nf4", {"gradient_checkpointing": "all"}, 6, "mixed"),
        pytest.param(
            *("zero3", "fp8", {"gradient_checkpointing": 2}, 2, "mixed"),
            marks=pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed"),
        ),
    ],
)
def test_two_processes_train_what_one_does_with_twice_the_accumulation(
    engine, quantize, memory, count, pictures, shared, dev_folder, train_run: TrainRun
):
    """Same pictures, noise, dropout and weights in every step; only the order of sums differs.
    Streaming, sharding and recomputation change no bit, which other tests hold. Buckets are uneven,
    or there are fewer pictures than processes.

    eps 1e-4 keeps AdamW from blowing that up where a gradient is all rounding: then a weight's
    update differs by lr/eps times the gradient's difference, so 10 a step times 1e-8 for gradients
    of 0.1 in fp32, and 1e-6 after six steps; the weights move by up to 6e-3.
    """
    changes = {
        "base": {"quantize": quantize},
        "data": {"flip": True, "caption_dropout": 0.3},
        "lora": {"dropout": 0.1},
        "optim": {"eps": 1e-4},
        "validation": {"pictures": "training", "max_pictures": 4, "sigmas": 2},
    }
    # drift would take ZeRO, which gathers each Linear by itself, a thousand exchanges more
    changes["validation"]["neutral_prompts"] = () if engine == "zero3" else ("a",)
    steps = {"steps": count, "accumulate": 1}
    sections = {"train": steps, "memory": memory, "preview": PREVIEW, **changes}
    if pictures == "one picture":
        runs.make_pictures(shared / pictures, sizes=[runs.SQUARE])
    config = write_config(shared, engine, model=dev_folder, pictures=pictures, **sections)
    output = runs.launch(config, engine=engine)
    assert "2 processes" in output
    assert "certificate: loads" in output
    if engine != "ddp":
        share = re.search(rf"base in parts \({engine}\): (\S+) of (\S+) GB", output)
        assert share is not None
        assert float(share[1]) == pytest.approx(float(share[2]) / 2, rel=0.05)
    two = shared / engine / "runs" / "tiny"
    assert len(list((two / "previews").iterdir())) == 2 * 2
    name = f"one for {engine}"
    one = train_run(name, pictures=pictures, train={**steps, "accumulate": 2}, **changes)
    assert runs.adapter_change(one, two) < 2e-6
    for ours, theirs in zip(runs.metrics(one), runs.metrics(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(checks(one), checks(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def checks(folder: Path) -> list[list[float]]:
    """Loss of each of a run's checks, and drift where it was measured."""
    lines = (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [[row[name] for name in ("loss", "drift") if row[name] is not None] for row in rows]


def test_the_launcher_needs_no_gpu_and_one_thread(whole):
    """What the other tests compare with was made the same way."""
    assert torch.get_num_threads() == 1
    assert "gpu" not in json.loads((whole[0] / "versions.json").read_text(encoding="utf-8"))

"""Whole runs on a quantised base, and on a base whose transformer is one file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from tests import bfl, runs, tiny
from tests.e2e.conftest import TrainRun
from train.commands import compare, export
from train.errors import ConfigError
from train.loading.frozen import KINDS
from train.loading.stored import Stored
from train.track import Tracker

PREVIEW = {"prompts": ("zibby",), "steps": 2, "every": 100}


class CrashError(Exception):
    """The run dies here."""


def passed_on(certificate: Path) -> str | None:
    """How the base was kept that a certificate passes on; None if it doesn't."""
    found = json.loads(certificate.read_text(encoding="utf-8"))
    return found["transformer"]["quantize"] if found["passed"] else None


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_to_the_bit_on_the_kept_copy(
    kind, train_run: TrainRun, dev_folder: Path, monkeypatch
):
    """Crashed after step 3, resumed from the checkpoint of step 2; the base is read but once."""
    sections = {
        "base": {"dtype": "bf16", "quantize": kind},
        "train": {"steps": 4, "checkpoint_every": 2},
        "memory": {"gradient_checkpointing": "all"},
        "preview": PREVIEW,
    }
    whole = train_run(f"{kind} whole", **sections)
    seen: list[Path] = []
    read, record = Stored.read, Tracker.step

    def note(self: Stored, rows: tuple[int, int] | None = None) -> torch.Tensor:
        seen.append(self.file)
        return read(self, rows)

    def die(self: Tracker, done: int, metrics: dict[str, float]) -> None:
        record(self, done, metrics)
        if done == 3:
            monkeypatch.setattr(Tracker, "step", record)
            raise CrashError

    monkeypatch.setattr(Stored, "read", note)
    monkeypatch.setattr(Tracker, "step", die)
    with pytest.raises(CrashError):
        train_run(f"{kind} resumed", **sections)
    resumed = train_run(f"{kind} resumed", resume=True, **sections)
    runs.assert_same_run(whole, resumed)
    assert seen
    assert not any(file.is_relative_to(dev_folder) for file in seen)
    assert len(list((whole / "previews").iterdir())) == 2
    assert passed_on(whole / "tiny.certificate.json") == kind
    assert export.main([str(whole), "--output", str(whole / "again.safetensors")]) == 0
    assert compare.main([str(whole)]) == 0


def test_each_kind_is_another_run(train_run: TrainRun):
    """So that the tests above don't quantise what nothing looks at."""
    steps = {"train": {"steps": 2}}
    folders = [train_run(f"as {k}", base={"quantize": k}, **steps) for k in ("none", *KINDS)]
    losses = [runs.metrics(folder)[-1]["loss"] for folder in folders]
    assert len(set(losses)) == 4
    assert max(losses) - min(losses) < 0.01 * min(losses)


def test_a_resumed_run_cant_change_how_its_base_is_kept(train_run: TrainRun):
    steps = {"train": {"steps": 1}}
    train_run("changed", base={"quantize": "int8"}, **steps)
    with pytest.raises(ConfigError, match=r"base\.quantize: int8 -> none"):
        train_run("changed", resume=True, **steps)


@pytest.fixture
def single(tmp_path: Path, dev_folder: Path) -> Path:
    """The transformer as one bf16 file in BFL's names."""
    model = Flux2Transformer2DModel.from_pretrained(dev_folder / "transformer")
    return bfl.save(bfl.tensors(model), tmp_path / "single.safetensors")


def test_a_single_file_trains_as_the_folder_does(train_run: TrainRun, single, dev_folder, tmp_path):
    """With a base that has no weights of its own in that folder."""
    bare = shutil.copytree(dev_folder, tmp_path / "bare")
    for weights in (bare / "transformer").glob("*.safetensors"):
        weights.unlink()
    steps = {"train": {"steps": 2}}
    folder = train_run("folder", **steps)
    base = {"model": str(bare), "transformer": str(single)}
    single_run = train_run("single", base=base, **steps)
    assert runs.adapter_change(folder, single_run) == 0
    assert passed_on(single_run / "tiny.certificate.json") == "none"


def test_another_file_under_the_same_name_is_another_base(train_run: TrainRun, single):
    base = {"transformer": str(single), "quantize": "fp8"}
    train_run("swapped", base=base, train={"steps": 1})
    bfl.save(bfl.tensors(tiny.transformer(guidance=True, seed=9)), single)
    with pytest.raises(ConfigError, match="the base model's files"):
        train_run("swapped", base=base, train={"steps": 2}, resume=True)

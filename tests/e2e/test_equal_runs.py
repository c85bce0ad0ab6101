"""Runs that must come out equal: resumed, and with accumulation for batch size."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests import runs
from tests.e2e.conftest import TrainRun
from train import offload
from train.errors import ConfigError
from train.track import Tracker


class CrashError(Exception):
    """The run dies here."""


@pytest.fixture
def crash_at(monkeypatch):
    """Makes the step after `step` die, once."""

    def arm(step: int) -> None:
        record = Tracker.step

        def die(self: Tracker, done: int, metrics: dict[str, float]) -> None:
            record(self, done, metrics)
            if done == step:
                monkeypatch.setattr(Tracker, "step", record)
                raise CrashError

        monkeypatch.setattr(Tracker, "step", die)

    return arm


RUNS = {
    "dropout": {"lora": {"dropout": 0.2}},
    # rank 32 has tensors of 4096 elements and more, whose moments are in 8 bits
    "adamw8bit": {"optim": {"name": "adamw8bit"}, "lora": {"rank": 32}},
    "bf16": {"base": {"dtype": "bf16"}},
    "gradient checkpointing": {
        "memory": {"gradient_checkpointing": "all"},
        "lora": {"dropout": 0.2},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_uninterrupted_to_the_bit(name, train_run: TrainRun, crash_at):
    """Crashed after step 7, resumed from the checkpoint of step 5."""
    sections = {**RUNS[name], "data": {"flip": True, "caption_dropout": 0.3}}
    sections["train"] = {**sections.get("train", {}), "steps": 10, "checkpoint_every": 5}
    whole = train_run(f"{name} whole", **sections)
    crash_at(7)
    with pytest.raises(CrashError):
        train_run(f"{name} resumed", **sections)
    resumed = train_run(f"{name} resumed", resume=True, **sections)
    runs.assert_same_run(whole, resumed)


def test_several_data_sets_resume_to_the_bit(train_run: TrainRun, shared: Path, crash_at):
    """Masked, at two sizes and in shares; the resumed run finds its pictures elsewhere."""
    others = runs.make_pictures(shared / "others", sizes=[runs.SQUARE] * 3)
    more = {"path": str(others), "mask": "alpha", "loss_weight": 0.5, "share": 1.0}
    sections = {
        "data": {"share": 3.0, "resolution": (64, 80), "max_upscale": 2.0},
        "more_data": (more | {"resolution": 64},),
        "train": {"steps": 10, "checkpoint_every": 5},
    }
    whole = train_run("sets whole", **sections)
    crash_at(7)
    with pytest.raises(CrashError):
        train_run("sets resumed", **sections)
    moved = shutil.copytree(others, shared / "moved")
    sections["more_data"] = (more | {"resolution": 64, "path": str(moved)},)
    runs.assert_same_run(whole, train_run("sets resumed", resume=True, **sections))


def test_gradient_checkpointing_changes_no_bit(train_run: TrainRun):
    """Not even with dropout, whose masks are drawn again in the backward pass."""
    changes = {"lora": {"dropout": 0.2}}
    plain = train_run("plain", train={"steps": 3}, **changes)
    memory = {"gradient_checkpointing": "all"}
    checkpointed = train_run("cp", train={"steps": 3}, memory=memory, **changes)
    assert runs.adapter_change(plain, checkpointed) == 0
    assert runs.metrics(plain) == runs.metrics(checkpointed)


def test_streaming_changes_no_bit(train_run: TrainRun, monkeypatch):
    """Of a run with previews, nor of the adapter that it publishes; two blocks share a slot."""
    attach = offload.attach
    monkeypatch.setattr(offload, "attach", partial(attach, slots=1))
    changes = {
        "lora": {"dropout": 0.2},
        "train": {"steps": 3, "accumulate": 2},
        "preview": {"prompts": ("a fox",), "every": 2, "steps": 2},
    }
    plain = train_run("resident", **changes)
    memory = {"resident_blocks": 0, "gradient_checkpointing": 3, "offload_activations": True}
    streamed = train_run("streamed", **changes, memory=memory)
    runs.assert_same_run(plain, streamed)
    picture = Path("previews", "step-000003-0.png")
    assert (plain / picture).read_bytes() == (streamed / picture).read_bytes()
    certificate = json.loads((streamed / "tiny.certificate.json").read_text(encoding="utf-8"))
    assert certificate["passed"]


@pytest.mark.parametrize(("budget", "said"), [(None, "4 of 4"), (0.012, "2 of 4")])
def test_auto_changes_no_bit(
    train_run: TrainRun, monkeypatch, capsys, budget: float | None, said: str
):
    """In 12 MB, all of it torch's, half of the tiny base's activations fit."""
    monkeypatch.setattr("train.budget.CONTEXT", 0)
    plain = train_run(f"all kept {budget}", train={"steps": 3})
    auto = {"gradient_checkpointing": "auto", "resident_blocks": "auto", "budget_gb": budget}
    capsys.readouterr()
    runs.assert_same_run(plain, train_run(f"auto {budget}", train={"steps": 3}, memory=auto))
    assert f"memory: {said} blocks recomputed, all resident" in capsys.readouterr().out


def test_a_limit_that_nothing_fits_is_an_error(train_run: TrainRun):
    memory = {"resident_blocks": "auto", "budget_gb": 0.5}
    with pytest.raises(ConfigError, match=r"memory: the smallest .* `kindling plan` says"):
        train_run("small", memory=memory)


def test_two_batches_of_one_equal_one_of_two(train_run: TrainRun):
    """On pictures of one size. Tolerance: see the test of two processes."""
    changes = {"pictures": "squares", "optim": {"eps": 1e-4}}
    batch = train_run("batch", train={"steps": 6, "batch_size": 2}, **changes)
    accumulated = train_run(
        "accumulated", train={"steps": 6, "batch_size": 1, "accumulate": 2}, **changes
    )
    assert runs.adapter_change(batch, accumulated) < 2e-6
    for ours, theirs in zip(runs.metrics(batch), runs.metrics(accumulated), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_another_seed_is_another_run(train_run: TrainRun):
    """So that the tests above don't compare runs which nothing moves."""
    one = train_run("seed 1", train={"steps": 3})
    two = train_run("seed 2", train={"steps": 3}, seed=8)
    assert runs.adapter_change(one, two) > 1e-4

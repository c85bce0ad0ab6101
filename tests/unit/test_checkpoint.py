"""Checkpoints: whole or absent, verified, rotated, equal to the bit."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import damage
from train import checkpoint
from train.checkpoint import Checkpoint, Origin, Progress
from train.config import OptimConfig
from train.errors import CheckpointError
from train.lora import Adapter
from train.lora.adapter import of_parts
from train.optim import build_optimizer


def make(step: int, *, optimizer: str = "adamw") -> Checkpoint:
    """A checkpoint of random weights and an optimizer that has stepped."""
    torch.manual_seed(step)
    names = [f"transformer_blocks.{i}.attn.to_q" for i in (0, 2, 10)]
    down = {name: torch.randn(4, 32) for name in names}
    up = {name: torch.randn(32, 4) for name in names}
    weight = nn.Parameter(torch.randn(64, 64))
    optim = build_optimizer(OptimConfig(name=optimizer), [weight])  # pyright: ignore
    weight.square().sum().backward()
    optim.step()
    progress = Progress(
        step, {"name": "tiny", "optim": {"lr": 1e-4, "warmup": None}}, Origin("d", "b"), 2
    )
    return Checkpoint(progress, Adapter(down, up, rank=4, alpha=2.5), optim.state_dict())


def save_all(folder: Path, *steps: int, keep: int = 100) -> list[Path]:
    """Save one for each step."""
    return [checkpoint.save(folder, make(step), keep=keep) for step in steps]


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_what_is_loaded_is_what_was_saved_to_the_bit(tmp_path, optimizer):
    saved = make(3, optimizer=optimizer)
    loaded = checkpoint.load(checkpoint.save(tmp_path, saved, keep=1))
    assert loaded.progress == saved.progress
    assert (loaded.adapter.rank, loaded.adapter.alpha) == (4, 2.5)
    for part in ("lora_A", "lora_B"):
        ours, theirs = loaded.adapter.parts[part], saved.adapter.parts[part]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.testing.assert_close(loaded.optimizer, saved.optimizer, rtol=0, atol=0)


def test_an_average_and_a_start_are_saved_beside_the_adapter(tmp_path):
    plain, other, third = (make(step) for step in (3, 4, 5))
    whole = dataclasses.replace(plain, average=other.adapter, start=third.adapter)
    path = checkpoint.save(tmp_path, whole, keep=1)
    files = {"adapter", "average", "start"}
    assert {file.stem for file in path.glob("*.safetensors")} == files
    loaded = checkpoint.load(path)
    for name in files:
        ours, theirs = getattr(loaded, name), getattr(whole, name)
        torch.testing.assert_close((ours.down, ours.up), (theirs.down, theirs.up), rtol=0, atol=0)
    damage.flip_bit(path / "average.safetensors")
    with pytest.raises(CheckpointError, match=r"average\.safetensors changed"):
        checkpoint.load(path)


KINDS = {
    "dora": {"lora_A": ["a", "b"], "lora_B": ["a", "b"], "lora_magnitude_vector": ["a", "b"]},
    "lokr": {"lokr_w1": ["a", "b"], "lokr_w2": ["a"], "lokr_w2_a": ["b"], "lokr_w2_b": ["b"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_saved_by_their_parts(kind, tmp_path):
    plain, parts = make(3), {}
    for part, modules in KINDS[kind].items():
        parts[part] = {f"transformer_blocks.{m}.attn.to_out.0": torch.randn(3, 2) for m in modules}
    adapter = of_parts(parts, rank=3, alpha=1.5)
    assert adapter.kind == kind
    whole = dataclasses.replace(plain, adapter=adapter, average=adapter)
    loaded = checkpoint.load(checkpoint.save(tmp_path, whole, keep=1))
    assert (loaded.adapter.kind, loaded.adapter.rank, loaded.adapter.alpha) == (kind, 3, 1.5)
    torch.testing.assert_close(loaded.shown("average").parts, parts, rtol=0, atol=0)


def test_the_average_is_shown_where_there_is_one_and_wanted():
    plain, other = make(3), make(4)
    both = dataclasses.replace(plain, average=other.adapter)
    assert both.shown("average") is other.adapter
    assert both.shown("last") is plain.shown("average") is plain.adapter
    started = dataclasses.replace(both, start=plain.adapter)
    assert started.shown("average").rank == 2 * plain.adapter.rank


def test_the_same_checkpoint_has_the_same_adapter_bytes(tmp_path):
    one, two = (checkpoint.save(tmp_path / name, make(1), keep=1) for name in "ab")
    assert (one / "adapter.safetensors").read_bytes() == (two / "adapter.safetensors").read_bytes()


def test_they_are_listed_by_step_and_nothing_else_is(tmp_path):
    save_all(tmp_path, 20, 9, 100, 1_000_000)
    (tmp_path / "step-abc").mkdir()
    (tmp_path / "notes").mkdir()
    found = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert found == ["step-000009", "step-000020", "step-000100", "step-1000000"]
    assert checkpoint.list_checkpoints(tmp_path / "none") == []


def test_only_the_newest_are_kept(tmp_path):
    save_all(tmp_path, 10, 20, 30, 40, keep=2)
    assert names(tmp_path) == ["step-000030", "step-000040"]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5)):
        checkpoint.save(tmp_path, make(step), keep=1, best=best)
        assert names(tmp_path) == sorted({f"step-{best:06d}", f"step-{step:06d}"})


def test_a_checkpoint_just_saved_is_never_rotated_away(tmp_path):
    """As when a run resumes before its damaged newest ones."""
    save_all(tmp_path, 10, 30, 40)
    save_all(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-000020", "step-000030", "step-000040"]


def test_saving_a_step_again_replaces_it(tmp_path):
    (path,) = save_all(tmp_path, 10)
    damage.flip_bit(path / "optimizer.pt")
    save_all(tmp_path, 10)
    assert checkpoint.load(path).progress.step == 10
    assert names(tmp_path) == ["step-000010"]


def change_manifest(path: Path) -> None:
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["progress"]["step"] += 1
    path.write_text(json.dumps(facts), encoding="utf-8")


def no_object(path: Path) -> None:
    path.write_text("[]", encoding="utf-8")


FILES = ("adapter.safetensors", "optimizer.pt", "manifest.json")
HARMS = [
    *((file, harm) for file in FILES for harm in (Path.unlink, damage.truncate, damage.empty)),
    *((file, damage.flip_bit) for file in FILES[:2]),
    *(("manifest.json", harm) for harm in (change_manifest, no_object)),
]


@pytest.mark.parametrize(
    ("file", "harm"), HARMS, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_damage_is_found_named_and_passed_over(tmp_path, file, harm):
    good, bad = save_all(tmp_path, 10, 20)
    harm(bad / file)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(bad)
    assert str(bad) in str(caught.value)
    newest, faults = checkpoint.newest_good(tmp_path)
    assert newest == good
    assert faults == [str(caught.value)]


def test_without_a_good_one_there_is_none(tmp_path):
    assert checkpoint.newest_good(tmp_path / "none") == (None, [])
    (bad,) = save_all(tmp_path, 10)
    damage.truncate(bad / "optimizer.pt")
    newest, faults = checkpoint.newest_good(tmp_path)
    assert newest is None
    assert len(faults) == 1


class Killed(BaseException):
    """The process ends here."""


KILLS = [
    (shutil, "rmtree"),
    (os, "rename"),
    (torch, "save"),
    (json, "dumps"),
    (checkpoint, "save_file"),
]


@pytest.mark.parametrize(
    ("module", "function"), KILLS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_kill_while_saving_leaves_the_last_good_one(tmp_path, monkeypatch, module, function):
    """rmtree: of the rotation, after the new one is in place; the others: before it is."""

    def die(*args, **kwargs):
        if function != "rmtree" or args[0].exists():
            raise Killed

    save_all(tmp_path, 10, 15)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, die)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, make(20), keep=1)
    newest, faults = checkpoint.newest_good(tmp_path)
    assert newest is not None
    assert newest.name == ("step-000020" if function == "rmtree" else "step-000015")
    assert faults == []
    save_all(tmp_path, 20, keep=3)
    assert names(tmp_path) == ["step-000010", "step-000015", "step-000020"], "and leftovers go"


# ---- killed at any moment

INTERVAL = 3


def train_from_newest(folder: Path, steps: int, done: "Synchronized[int]") -> None:
    """A run in small: resumes, steps, saves every INTERVAL steps; `done` counts as it goes."""
    newest, _ = checkpoint.newest_good(folder)
    saved = checkpoint.load(newest) if newest else None
    step = saved.progress.step if saved else 0
    weight = saved.adapter.parts["lora_B"]["a"] if saved else torch.zeros(64, 4)
    while step < steps:
        step += 1
        weight = weight * 0.9 + step
        done.value = step
        if step % INTERVAL == 0:
            adapter = Adapter({"a": torch.ones(4, 64)}, {"a": weight}, 4, 4.0)
            progress = Progress(step, {}, Origin(data="d", base="b"), 1)
            checkpoint.save(folder, Checkpoint(progress, adapter, {"w": weight}), keep=2)


def test_fifty_kills_never_lose_more_than_the_last_interval(tmp_path: Path):
    """At random moments, most of them within a save, which is most of what this run does."""
    fork = multiprocessing.get_context("fork")
    done = fork.Value("l", 0)
    random_seconds = random.Random(0)
    lost = []
    for _ in range(50):
        process = fork.Process(target=train_from_newest, args=(tmp_path, 10**9, done))
        process.start()
        process.join(random_seconds.uniform(0.005, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        newest, faults = checkpoint.newest_good(tmp_path)
        assert faults == []
        reached = checkpoint.load(newest).progress.step if newest else 0
        lost.append(done.value - reached)
        done.value = reached
    assert max(lost) <= INTERVAL
    assert max(lost) > 0, "some kill must have hit"
    end = reached + 10 * INTERVAL
    train_from_newest(tmp_path, end, done)
    newest, _ = checkpoint.newest_good(tmp_path)
    assert newest is not None
    weight = torch.zeros(64, 4)
    for step in range(1, end + 1):
        weight = weight * 0.9 + step
    assert torch.equal(checkpoint.load(newest).adapter.parts["lora_B"]["a"], weight)

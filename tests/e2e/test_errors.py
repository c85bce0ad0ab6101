"""What a user can get wrong: exactly one message, exit code 2, and nothing lost."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.kindling import run_main
from tests import damage, runs
from train import checkpoint, trainer
from train.errors import bullet_list
from train.objective import losses

PROGRESS = re.compile(r"^step \d+/\d+  loss|Loading weights")
Typed = Callable[..., tuple[int, str]]


def load_launcher():
    """train.py, whose name the package has."""
    spec = importlib.util.spec_from_file_location("launcher", runs.ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def typed(capsys) -> Typed:
    """Runs `train.py --config ...`: the exit code and what the error stream ends with."""
    launcher = load_launcher()

    def call(config: Path, *arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = run_main(lambda: launcher.main(["--config", str(config), *arguments]))
        error = capsys.readouterr().err
        lines = error.splitlines()
        return code, "\n".join(line for line in lines if line and not PROGRESS.search(line))

    return call


@pytest.fixture
def config(tmp_path: Path, dev_folder: Path) -> Path:
    """Of a run of 4 steps, a checkpoint at each second one."""
    runs.make_pictures(tmp_path / "pictures")
    tree = runs.settings(
        tmp_path / "out",
        model=dev_folder,
        pictures=tmp_path / "pictures",
        train={"checkpoint_every": 2},
    )
    return runs.write_config(tmp_path / "tiny.yaml", tree)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of that run."""
    return tmp_path / "out" / "runs" / "tiny"


def test_a_bad_config(config, typed, tmp_path):
    text = config.read_text(encoding="utf-8").replace('"rank": 4', '"rnk": 4')
    line = next(i for i, row in enumerate(text.splitlines(), start=1) if "rnk" in row)
    config.write_text(text, encoding="utf-8")
    assert typed(config, "train.steps=0") == (
        2,
        f"{config}:{line}: lora.rnk: unknown key; did you mean 'rank'?\n"
        "override train.steps=0: must be a whole number, at least 1; got 0",
    )
    assert not (tmp_path / "out").exists()


def test_bad_pictures_and_captions_are_all_named_at_once(config, typed, tmp_path):
    damage.truncate(tmp_path / "pictures" / "1.png")
    (tmp_path / "pictures" / "2.png").write_bytes(b"")
    (tmp_path / "pictures" / "3.txt").unlink()
    code, error = typed(config)
    assert code == 2
    head, *lines = error.splitlines()
    assert head == f"{tmp_path / 'pictures'}: these must be mended first:"
    assert [line.split(": ")[0] for line in lines] == ["  1.png", "  2.png", "  3.png"]
    assert "damaged or cut off" in lines[0]
    assert "empty file (0 bytes)" in lines[1]
    assert "no caption; write it in 3.txt" in lines[2]


def test_a_pattern_that_matches_nothing(config, typed):
    assert typed(config, "lora.targets=[to_q]") == (
        2,
        "lora.targets: 'to_q' matches no Linear in a block. A pattern must match a whole name, "
        "such as 'transformer_blocks.0.attn.to_q' or 'single_transformer_blocks.1.attn.to_out'.",
    )


def test_an_existing_run_is_never_trained_over(config, typed, folder):
    assert typed(config)[0] == 0
    before = runs.metrics(folder, drop=())
    assert typed(config) == (
        2,
        f"{folder}: this run already has checkpoints (up to step-000004). "
        "Continue it with --resume, or give the config another name.",
    )
    changes = "--resume", "seed=8", "train.log_every=5"
    assert typed(config, *changes) == (
        2,
        f"{folder}: the config differs from the run's. Put back, use another name, or say that it "
        "is meant with --accept-changes:\n"
        "  seed: 7 -> 8",
    )
    assert typed(config, *changes, "lora.rank=8", "--accept-changes") == (
        2,
        f"{folder}: the config differs from the run's. Put back, or use another name:\n"
        "  lora.rank: 4 -> 8",
    )
    assert runs.metrics(folder, drop=()) == before


def test_changed_pictures_and_settings_need_a_yes(config, typed, folder, tmp_path, capsys):
    assert typed(config)[0] == 0
    pictures = tmp_path / "pictures"
    (pictures / "0.txt").write_text("something else", encoding="utf-8")
    for kind in ("png", "txt"):
        shutil.move(pictures / f"1.{kind}", pictures / f"new.{kind}")
    changes = ["another caption of 0.png", "gone: 1.png", "added new.png"]
    assert typed(config, "--resume", "train.steps=6") == (
        2,
        bullet_list(
            f"{folder}: changed since step 4. Put back, use another name, or say that it is meant "
            "with --accept-changes:",
            changes,
        ),
    )
    launcher = load_launcher()
    arguments = ["--config", str(config), "--resume", "train.steps=6", "seed=8"]
    assert run_main(lambda: launcher.main([*arguments, "--accept-changes"])) == 0
    output = capsys.readouterr().out
    assert bullet_list("accepted changes:", changes) in output
    assert bullet_list("accepted changes:", ["seed: 7 -> 8"]) in output
    assert [row["step"] for row in runs.metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert typed(config, "--resume", "train.steps=7", "seed=8")[0] == 0, "from now on it is so"


def test_another_base_is_another_run(config, typed, folder, dev_folder, tmp_path):
    base = shutil.copytree(dev_folder, tmp_path / "base")
    assert typed(config, f"base.model={base}")[0] == 0
    weights = next((base / "transformer").glob("*.safetensors"))
    tensors = {name: tensor + 1e-3 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    assert typed(config, f"base.model={base}", "--resume", "--accept-changes") == (
        2,
        f"{folder}: changed since step 4. Put back, or use another name:\n  the base model's files",
    )


def test_a_finished_run_can_be_prolonged_and_passes_over_damage(config, typed, folder):
    assert typed(config, "--resume")[0] == 0, "nothing to resume is a start"
    damage.flip_bit(folder / "checkpoints" / "step-000004" / "optimizer.pt")
    code, _ = typed(config, "--resume", "train.steps=6")
    assert code == 0
    assert [row["step"] for row in runs.metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert checkpoint.newest_good(folder / "checkpoints")[1] == []


def test_a_loss_that_is_no_number_stops_with_step_and_files(config, typed, folder, monkeypatch):
    """The step after the checkpoint of step 2 goes wrong; the checkpoint stays good."""
    calls = []

    def poisoned(*args, **kwargs) -> torch.Tensor:
        calls.append(args[1].names)
        return losses(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(trainer.objective, "losses", poisoned)
    assert typed(config) == (
        2,
        "step 3: the loss is nan and the gradient norm nan; stopped, the last checkpoint is from "
        f"before. Pictures of this step: {', '.join(sorted(calls[2]))}. "
        "Look at them, lower optim.lr, then continue with --resume.",
    )
    newest, faults = checkpoint.newest_good(folder / "checkpoints")
    assert newest is not None
    assert newest.name == "step-000002"
    assert faults == []
    assert [row["step"] for row in runs.metrics(folder)] == [1, 2]
    monkeypatch.undo()
    assert typed(config, "--resume")[0] == 0


def test_weights_that_are_no_numbers_are_never_saved(config, typed, folder, monkeypatch):
    """A step can ruin the weights though its own loss was fine."""

    def overflow(self: torch.optim.AdamW, closure: None = None) -> None:
        self.param_groups[0]["params"][-1].data[0, 0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    assert typed(config, "train.checkpoint_every=1") == (
        2,
        "step 1: the adapter's weights aren't numbers any more; stopped, the last "
        "checkpoint is from before. Lower optim.lr, then continue with --resume.",
    )
    assert checkpoint.list_checkpoints(folder / "checkpoints") == []


def test_accelerates_own_accumulation_is_refused(config, typed, monkeypatch):
    """It would divide every gradient, and nothing would say so."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    code, error = typed(config)
    assert code == 2
    assert error == (
        "accelerate's gradient_accumulation_steps is 4: set train.accumulate instead, and launch "
        "without --gradient_accumulation_steps"
    )


def test_the_process_itself_ends_with_2_and_without_traceback(config, tmp_path):
    ended = subprocess.run(
        [sys.executable, str(runs.ROOT / "train.py"), "--config", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == f"{tmp_path / 'none.yaml'}: no such file; did you mean {config}?\n"


@pytest.mark.slow
def test_wandb_offline_writes_a_run(config, typed, folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert typed(config, "track.wandb=offline")[0] == 0
    (kept,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert kept.stat().st_size > 1000
    assert typed(config, "--resume", "track.wandb=offline", "train.steps=6")[0] == 0
    names = [path.stem for path in (folder / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len(names) == 2
    assert len(set(names)) == 1, "a resumed run goes on with its own curves"

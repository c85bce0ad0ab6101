"""Whole runs with checks: they move no bit of the training, resume, and choose what is exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import runs
from tests.e2e.conftest import TrainRun
from train import checkpoint, run
from train.commands import export
from train.errors import CheckpointError, Stopped
from train.track import Tracker
from train.trainer import Trainer
from train.validation.validate import Model, Validator
from train.watch import Watch

STEPS = {"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 1, "log_every": 3}
HELD_OUT = {"pictures": "held-out", "sigmas": 3}

Loss = Callable[[int], float]


@pytest.fixture(scope="module", autouse=True)
def many(shared: Path) -> Path:
    """Pictures enough to hold out four, of two sizes."""
    return runs.make_pictures(shared / "many", sizes=[*(runs.SQUARE,) * 14, *(runs.WIDE,) * 6])


def checks(folder: Path) -> list[dict[str, Any]]:
    """The lines of validation.jsonl without what differs from run to run."""
    lines = (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(train_run: TrainRun) -> Path:
    """A run with dropout and checks, without interruption."""
    return train_run("whole", **sections())


def sections(**changes: Any) -> dict[str, Any]:
    return {
        "pictures": "many",
        "train": STEPS,
        "lora": {"dropout": 0.2},
        "validation": HELD_OUT,
        **changes,
    }


def test_a_check_is_a_line_before_the_first_step_and_at_each_checkpoint(whole):
    rows = checks(whole)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert all(row["held_out"] and len(row["by_picture"]) == 4 for row in rows)
    assert all(len(row["by_sigma"]) == 3 for row in rows)
    assert rows[0]["drift"] == 0
    assert rows[0]["to_base"] is None
    assert rows[-1]["drift"] > 0
    by_picture = [dict(map(tuple, row["by_picture"])) for row in rows]
    assert rows[-1]["loss"] == pytest.approx(sum(by_picture[-1].values()) / 4)
    differences = [by_picture[-1][name] - by_picture[0][name] for name in by_picture[0]]
    assert rows[-1]["to_base"] == pytest.approx(sum(differences) / 4)
    losses = [row["loss"] for row in runs.metrics(whole)]
    assert rows[2]["training_loss"] == pytest.approx(sum(losses[2:4]) / 2)


def test_checks_change_no_bit_of_the_training(train_run: TrainRun, many, shared):
    """Trained pictures are checked here, so that both runs train the same ones."""
    changes = {"validation": {"pictures": "training"}}
    checked = train_run("checked", **sections(**changes))
    plain = train_run("plain", **sections(validation={"pictures": "off"}))
    runs.assert_same_run(checked, plain)
    assert not (plain / "validation.jsonl").exists()
    assert not any(row["held_out"] for row in checks(checked))
    groups = {key.split("/")[0] for row in runs.metrics(plain) for key in row if "/" in key}
    assert groups == {"grad_norm", "lora_norm"}
    assert ["lora_norm/single" in row for row in runs.metrics(plain)] == [False, False, True] * 2


class CrashError(Exception):
    """The run dies here."""


@pytest.mark.parametrize("at", [3, 4])
def test_resumed_checks_and_the_best_are_the_same(at, whole, train_run: TrainRun, monkeypatch):
    """Crashed after a step between checks, and after one whose check wasn't saved yet."""
    record = Tracker.step

    def die(self: Tracker, done: int, metrics: dict[str, float]) -> None:
        record(self, done, metrics)
        if done == at:
            raise CrashError

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "step", die)
        with pytest.raises(CrashError):
            train_run(f"resumed {at}", **sections())
    resumed = train_run(f"resumed {at}", resume=True, **sections())
    runs.assert_same_run(whole, resumed)
    assert checks(resumed) == checks(whole)
    kept = [checkpoint.load(runs.last_checkpoint(f)).progress.checks for f in (resumed, whole)]
    assert kept[0] == kept[1]


def test_two_processes_check_what_one_does(shared, dev_folder, train_run: TrainRun):
    """Before the first step to the bit; after that as near as the adapters are."""
    changes = {"optim": {"eps": 1e-4}, "validation": {**HELD_OUT, "max_pictures": 5}}
    changes["validation"]["pictures"] = "training"  # five pictures: an odd share
    steps = {"steps": 4, "checkpoint_every": 2, "accumulate": 1}
    tree = runs.settings(
        shared / "two", model=dev_folder, pictures=shared / "many", train=steps, **changes
    )
    output = runs.launch(runs.write_config(shared / "two.yaml", tree), engine="ddp")
    assert output.count("step 2: training loss at fixed noise") == 1
    folders = (
        train_run("one", pictures="many", train={**steps, "accumulate": 2}, **changes),
        shared / "two" / "runs" / "tiny",
    )
    assert runs.adapter_change(*folders) < 2e-6
    one, two = map(checks, folders)
    assert two[0] == one[0]
    for ours, theirs in zip(one[1:], two[1:], strict=True):
        assert [v for _, v in ours["by_picture"]] == pytest.approx(
            [v for _, v in theirs["by_picture"]], rel=1e-5
        )
        assert ours["drift"] == pytest.approx(theirs["drift"], rel=1e-3)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Makes checks find losses that it is given by step, and a fixed part by picture."""
    check = Validator.check

    def arm(levels: dict[int, float]) -> None:
        def fake(self: Validator, step: int, model: Model) -> Any:
            def losses(model: Model) -> torch.Tensor:
                count = len(self.trial.examples)
                return torch.linspace(0, 0.2, count)[:, None].expand(count, 3) + levels[step]

            monkeypatch.setattr(self, "losses", losses)
            return check(self, step, model)

        monkeypatch.setattr(Validator, "check", fake)

    return arm


OVERFIT = {0: 0.9, 2: 0.5, 4: 0.6, 6: 0.7}


def test_the_best_is_kept_exported_and_recorded(made_up, train_run: TrainRun, capfd):
    made_up(OVERFIT)
    folder = train_run("best", **sections())
    captured = capfd.readouterr()
    names = [path.name for path in checkpoint.list_checkpoints(folder / "checkpoints")]
    assert names == ["step-000002", "step-000006"], "keep_checkpoints is 1, and the best stays"
    assert "step 2: the best checkpoint so far, by held-out loss" in captured.err
    assert "checkpoint: best, step 2; held-out loss 0.60000 ± 0.0" in captured.out
    certificate = json.loads((folder / "tiny.certificate.json").read_text(encoding="utf-8"))
    assert certificate["passed"]
    facts = certificate["checkpoint"]
    assert (facts["rule"], facts["step"]) == ("best", 2)
    assert facts["held_out_loss"] == pytest.approx(0.6)
    with safe_open(folder / "tiny.safetensors", framework="pt") as file:
        metadata = file.metadata()
        weight = file.get_tensor("transformer.transformer_blocks.0.attn.to_q.lora_B.weight")
    assert metadata["kindling.steps"] == "2"
    assert metadata["kindling.checkpoint"].startswith("best: held-out loss 0.60000")
    saved = load_file(folder / "checkpoints" / "step-000002" / "adapter.safetensors")
    assert torch.equal(weight, saved["transformer_blocks.0.attn.to_q.lora_B.weight"])


@pytest.mark.parametrize("falls", [True, False])
def test_overfitting_is_said_and_recorded(falls, made_up, train_run, capfd, monkeypatch):
    """Only where the training loss, which is made up too, has fallen."""
    made_up(OVERFIT)
    note = Watch.trained
    losses = iter([0.6, 0.5, 0.4, 0.3, 0.2, 0.1] if falls else [0.4] * 6)
    monkeypatch.setattr(Watch, "trained", lambda self, _: note(self, next(losses)))
    folder = train_run(f"alarm {falls}", **sections())
    assert [row["overfits"] for row in checks(folder)] == [False, False, False, falls]
    alarm = "overfit alarm: the held-out loss is 0.20000 ± 0.00000 above its lowest, at step 2, and"
    assert (alarm in capfd.readouterr().err) == falls


@pytest.mark.parametrize(
    ("changes", "rule", "reason"),
    [
        ({"export": {"checkpoint": "last"}}, "last", "export.checkpoint is last"),
        (
            {"validation": {"pictures": "training"}},
            "last",
            "no checkpoint has a loss on held-out pictures",
        ),
    ],
)
def test_otherwise_the_last_is_exported(changes, rule, reason, train_run: TrainRun, capfd):
    steps = {"steps": 2, "checkpoint_every": 1}
    train_run(f"last {reason}", **{**sections(train=steps), **changes})
    assert f"checkpoint: {rule}, step 2; {reason}\n" in capfd.readouterr().out


def test_kindling_export_chooses_the_same_and_says_what_it_can_t(made_up, train_run, capfd):
    made_up(OVERFIT)
    folder = train_run("chosen", **sections())
    capfd.readouterr()
    assert export.main([str(folder)]) == 0
    assert "checkpoint: best, step 2; " in capfd.readouterr().out
    assert export.main([str(folder / "checkpoints" / "step-000006")]) == 0
    assert "checkpoint: named, step 6; by the user" in capfd.readouterr().out
    (folder / "checkpoints" / "step-000002" / "adapter.safetensors").write_bytes(b"")
    assert export.main([str(folder)]) == 0
    assert "checkpoint: last, step 6; the best can't be read: " in capfd.readouterr().out
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    config = text.replace("checkpoint: auto", "checkpoint: best")
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    with pytest.raises(CheckpointError, match="changed after it was saved"):
        export.main([str(folder)])


def test_a_stop_leaves_its_check_to_the_resumed_run(shared, dev_folder, monkeypatch):
    """It is saved at once; the check that was due comes first when the run goes on."""
    config = runs.make_config(
        shared / "stopped",
        model=dev_folder,
        **{**sections(), "pictures": shared / "many"},
    )
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "stopping", property(lambda self: self._pending.done == 2))
        with pytest.raises(Stopped):
            run.run(config, resume=False)
    folder = runs.run_folder(config)
    assert [row["step"] for row in checks(folder)] == [0]
    run.run(config, resume=True)
    assert [row["step"] for row in checks(folder)] == [0, 2, 4, 6]
    saved = checkpoint.load(runs.last_checkpoint(folder)).progress.checks
    assert saved is not None
    assert [check["saved"] for check in saved["checks"]] == [False, True, True, True]

"""Runs that must come out equal: resumed, and with accumulation for batch size."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import bfl, runs, tiny
from tests.e2e.conftest import TrainRun
from train import checkpoint, lora
from train.adapters import export, files
from train.adapters.source import Source
from train.adapters.updates import LowRank
from train.average import ema_decay
from train.commands import compare
from train.commands import export as export_command
from train.errors import ConfigError
from train.loading.names import Shape, diffusers_places
from train.loading.weights import PREFIX
from train.lora import eva, pissa
from train.memory import offload
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
    "schedulefree": {"optim": {"name": "schedulefree", "lora_plus": 4.0}},
    "prodigy": {"optim": {"name": "prodigy", "lr": 1.0, "schedule": "cosine", "restarts": 1}},
    "ema and pissa": {"train": {"ema": 0.9}, "lora": {"init": "pissa"}},
    # which streams the frozen half of the adapter, too
    "streamed pissa": {"lora": {"init": "pissa"}, "memory": {"resident_blocks": 1}},
    "streamed dora": {
        "lora": {"kind": "dora"},
        "base": {"dtype": "bf16"},
        "train": {"ema": 0.9},
        "memory": {"resident_blocks": 1, "gradient_checkpointing": "all"},
    },
    "lokr": {"lora": {"kind": "lokr", "factor": 4, "rank": 2}, "base": {"quantize": "int8"}},
    "eva": {"lora": {"init": "eva"}},
    "bf16": {"base": {"dtype": "bf16"}},
    "int8": {"base": {"quantize": "int8"}},
    "nf4": {"base": {"dtype": "bf16", "quantize": "nf4"}},
    "fp8": {"base": {"dtype": "bf16", "quantize": "fp8"}, "speed": {"fp8_matmul": True}},
    "gradient checkpointing": {
        "memory": {"gradient_checkpointing": "all"},
        "lora": {"dropout": 0.2},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_uninterrupted_to_the_bit(name, train_run: TrainRun, crash_at, monkeypatch):
    """Crashed after step 7, resumed from the checkpoint of step 5."""
    sections = {**RUNS[name], "data": {"flip": True, "caption_dropout": 0.3}}
    sections["train"] = {**sections.get("train", {}), "steps": 10, "checkpoint_every": 5}
    whole = train_run(f"{name} whole", **sections)
    crash_at(7)
    with pytest.raises(CrashError):
        train_run(f"{name} resumed", **sections)
    monkeypatch.setattr(pissa, "ITERATIONS", 5)  # as if the SVD rounded otherwise now
    monkeypatch.delattr(eva, "listening")
    resumed = train_run(f"{name} resumed", resume=True, **sections)
    runs.assert_same_run(whole, resumed)
    files = sorted(resumed.glob("tiny*.certificate.json"))
    assert len(files) == (2 if "dora" in name else 1)
    for file in files:
        certificate = json.loads(file.read_text(encoding="utf-8"))
        assert certificate["passed"], certificate["reasons"]


@pytest.mark.parametrize("quantize", ["none", "fp8"])
def test_a_run_on_a_single_file(quantize, train_run: TrainRun, tmp_path):
    """The file's weights are those that are trained on, exported for, and compared on."""
    file = tmp_path / "base.safetensors"
    weights = bfl.tensors(tiny.transformer(guidance=True, seed=3))
    bfl.save(bfl.scaled(weights) if quantize == "fp8" else weights, file, prefix=PREFIX)
    base = {"transformer": str(file), "quantize": quantize}
    folder = train_run(f"file {quantize}", base=base, train={"steps": 3})
    own = train_run(f"own {quantize}", base={"quantize": quantize}, train={"steps": 3})
    change = runs.adapter_change(folder, own)
    assert change == 0 if quantize == "none" else 0 < change < 1e-2  # scales of a tensor, of a row
    certificate = json.loads((folder / "tiny.certificate.json").read_text(encoding="utf-8"))
    assert certificate["passed"]
    copy = folder / "copy.safetensors"
    assert export_command.main([str(folder), "--output", str(copy)]) == 0
    written = [load_file(path) for path in (copy, folder / "tiny.safetensors")]
    torch.testing.assert_close(*written, rtol=0, atol=0)
    assert compare.main([str(folder), "--prompt", "a fox", "--steps", "1"]) == 0
    pictures = [(folder / "compare" / f"00-0{n}.png").read_bytes() for n in range(2)]
    assert pictures[0] != pictures[1]
    file.unlink()
    with pytest.raises(ConfigError, match=r"base\.transformer: .* there is no file"):
        export_command.main([str(folder)])


@pytest.mark.parametrize("optim", ["adamw", "schedulefree"])
def test_looking_at_the_average_changes_no_bit(optim, train_run: TrainRun):
    """Previews and checkpoints at every step, and none before the last."""
    average = {} if optim == "schedulefree" else {"ema": 0.9}
    folders = []
    for every in (1, 4):
        sections = {"optim": {"name": optim}, "train": {"checkpoint_every": every, **average}}
        preview = {"prompts": ("a",), "every": every, "width": 64, "height": 64, "steps": 1}
        folders.append(train_run(f"{optim} every {every}", preview=preview, **sections))
    runs.assert_same_run(*folders)
    names = sorted(path.name for path in (folders[0] / "previews").iterdir())
    assert names == [f"step-00000{step}-0-average.png" for step in range(5)]


EXPORTS = {
    "ema": {"train": {"ema": 0.5}},
    "ema, last": {"train": {"ema": 0.5}, "export": {"dtype": "fp32", "weights": "last"}},
    "schedulefree": {"optim": {"name": "schedulefree", "lr": 1e-2}},
    "rslora and pissa": {"lora": {"rslora": True, "alpha": 3.0, "init": "pissa", "rank": 4}},
}


@pytest.mark.parametrize("name", EXPORTS)
def test_the_file_holds_what_the_settings_say(name, train_run: TrainRun):
    """Its updates are the average's, the last weights' or the sum of PiSSA's two branches."""
    folder = train_run(f"export {name}", **EXPORTS[name])
    saved = checkpoint.load(runs.last_checkpoint(folder))
    found = export.read(folder / "tiny.safetensors")
    certificate = json.loads((folder / "tiny.certificate.json").read_text())
    assert certificate["passed"], certificate["reasons"]
    for number, module in enumerate(lora.block_linears(tiny.transformer(guidance=True))):
        wanted = saved.adapter.delta(module)
        if name == "ema":
            assert saved.average is not None
            assert not torch.allclose(saved.average.delta(module), wanted, rtol=0.01)
            wanted = saved.average.delta(module)
        elif name == "schedulefree":  # x of Defazio et al. 2024, from y and z
            beta, states = 0.9, saved.optimizer["state"]
            last = runs.low_rank(saved.adapter)
            pairs = zip((last.down, last.up), (0, 1), strict=True)
            x = [w[module].lerp(states[2 * number + i]["z"], 1 - 1 / beta) for w, i in pairs]
            assert not torch.allclose(x[1] @ x[0], wanted, rtol=0.01)
            wanted = x[1] @ x[0]
        elif name == "rslora and pissa":
            assert saved.start is not None
            wanted = wanted + saved.start.delta(module)
        torch.testing.assert_close(found.delta(module), wanted, rtol=1e-4, atol=1e-7)


def test_checks_see_the_average(train_run: TrainRun, monkeypatch):
    """With an average that never moves, every check is of the untrained adapter."""
    monkeypatch.setattr("train.average.ema_decay", lambda decay, *, done: 1.0)
    validation = {"pictures": "training", "every": 1, "max_pictures": 4}
    folders = [
        train_run(f"checks {name}", train={"steps": 2, **train}, validation=validation)
        for name, train in {"average": {"ema": 0.9}, "last": {}}.items()
    ]
    rows = [(folder / "validation.jsonl").read_text().splitlines() for folder in folders]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in rows]
    assert len(set(losses[0])) == 1
    assert len(set(losses[1])) == len(losses[1]) == 3


def test_an_average_can_begin_at_a_resume(train_run: TrainRun):
    train_run("late", train={"steps": 2})
    folder = train_run("late", train={"steps": 3, "ema": 0.5}, resume=True, accept=True)
    before, after = checkpoint.list_checkpoints(folder / "checkpoints")
    kept = ema_decay(0.5, done=3)
    saved, was = checkpoint.load(after), runs.low_rank(checkpoint.load(before).adapter)
    last = runs.low_rank(saved.adapter)
    for module, up in runs.low_rank(saved.average).up.items():
        torch.testing.assert_close(up, torch.lerp(was.up[module], last.up[module], 1 - kept))


def test_export_writes_every_layout_with_its_certificate(train_run: TrainRun, capsys):
    folder = train_run("layouts")
    capsys.readouterr()
    before = (folder / "tiny.safetensors").read_bytes()
    assert export_command.main([str(folder), "--format", "comfyui,kohya", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.count("certificate: loads in diffusers and in ComfyUI") == 2
    assert (folder / "tiny.safetensors").read_bytes() == before
    places = diffusers_places(Shape.of(tiny.transformer(guidance=True)))
    trained = {m: up @ down for m, (up, down) in updates_in(folder / "tiny.safetensors").items()}
    assert trained.keys() == places.keys()
    for layout in ("comfyui", "kohya"):
        path = folder / f"tiny-{layout}.safetensors"
        certificate = json.loads(path.with_suffix(".certificate.json").read_text(encoding="utf-8"))
        assert certificate["passed"]
        assert "torch.bfloat16" in certificate["file"]["dtype"]
        found = {m: up @ down for m, (up, down) in updates_in(path).items()}
        for module, delta in trained.items():
            assert (found[module] - delta).norm() <= 6e-3 * delta.norm()


def updates_in(path: Path):
    """Module -> up, down of a file."""
    items = [item for _, group in Source(path).walk() for item in group.items()]
    return {module: update.factors() for module, update in items if isinstance(update, LowRank)}


def test_export_refuses_a_layout_that_does_not_exist(capsys):
    with pytest.raises(SystemExit):
        export_command.main(["runs/x", "--format", "comfyui,kohja"])
    assert "no layout 'kohja'; there are diffusers, comfyui, kohya" in capsys.readouterr().err


def test_export_can_be_asked_for_the_other_weights(train_run: TrainRun, tmp_path: Path):
    folder = train_run("other weights", train={"ema": 0.5, "steps": 2})
    output = tmp_path / "last.safetensors"
    assert export_command.main([str(folder), "--weights", "last", "--output", str(output)]) == 0
    saved = checkpoint.load(runs.last_checkpoint(folder))
    found, metadata = export.read(output), files.load(output)[1]
    assert metadata["kindling.weights"] == "last"
    for module, down in runs.low_rank(saved.adapter).down.items():
        assert torch.equal(found.down[module], down)
    published = files.load(folder / "tiny.safetensors")[1]
    assert published["kindling.weights"] == "average (ema 0.5)"


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


AUTO = {"resident_blocks": "auto", "gradient_checkpointing": "auto"}


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (None, "memory: 4 of 4 blocks recomputed, all resident (no limit known"),
        (0.63, "memory: 2 of 4 blocks recomputed, all resident (0.6 GB"),
        (9.0, "memory: 0 of 4 blocks recomputed, all resident (9.0 GB"),
    ],
)
def test_auto_is_decided_and_said_and_changes_no_bit(train_run: TrainRun, capfd, budget, said):
    plain = train_run(f"without auto {budget}", train={"steps": 3})
    name = f"auto {budget}"
    auto = train_run(name, train={"steps": 3}, memory={**AUTO, "budget_gb": budget})
    assert said in capfd.readouterr().out
    assert runs.adapter_change(plain, auto) == 0
    assert runs.metrics(plain) == runs.metrics(auto)


def test_auto_that_cannot_fit_is_an_error_before_anything_is_loaded(train_run: TrainRun):
    with pytest.raises(ConfigError, match=r"takes 0\.6 GB of GPU memory, and there are 0\.1"):
        train_run("too small", memory={**AUTO, "budget_gb": 0.1})


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

"""What happens to processes and disks: the run ends with a clear message, and can go on."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import runs
from train import checkpoint

ENDLESS = {"steps": 100_000, "checkpoint_every": 50_000}


def write_config(shared: Path, name: str, *, model: Path, **sections) -> Path:
    """The config file of a run in shared/name."""
    tree = runs.settings(shared / name, model=model, pictures=shared / "mixed", **sections)
    return runs.write_config(shared / f"{name}.yaml", tree)


def start_bare(config: Path, *arguments: str) -> subprocess.Popen[str]:
    """`python train.py`, without a launcher between us and it."""
    return subprocess.Popen(
        [sys.executable, str(runs.ROOT / "train.py"), "--config", str(config), *arguments],
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell's background jobs, and what they start, are born deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_steps(folder: Path, *, process: subprocess.Popen[str], count: int = 3) -> None:
    """Until the run has taken some steps."""
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_its_own_status(number, shared, dev_folder):
    config = write_config(shared, number.name, model=dev_folder, train=ENDLESS)
    folder = shared / number.name / "runs" / "tiny"
    process = start_bare(config)
    wait_for_steps(folder, process=process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    step = runs.metrics(folder)[-1]["step"]
    assert f"stopped by {number.name} after step {step}, which is saved." in output
    assert runs.last_checkpoint(folder).name == f"step-{step:06d}"
    assert not (folder / "tiny.safetensors").exists()
    done = runs.launch(config, "--resume", f"train.steps={step + 2}")
    assert f"resuming after step {step} " in done
    assert [row["step"] for row in runs.metrics(folder)] == list(range(1, step + 3))  # pyright: ignore


def test_two_processes_stop_after_the_same_step_and_go_on_to_the_bit(shared, dev_folder):
    """Told by their launcher; the base in parts, moments in 8 bits, an average, and what they
    agreed on as to memory."""
    sections = {
        "lora": {"rank": 32, "dropout": 0.2},  # tensors of 4096 elements have moments in 8 bits
        "optim": {"name": "adamw8bit"},
        "base": {"quantize": "nf4"},
        "memory": {"gradient_checkpointing": "auto", "budget_gb": 1},
    }
    train = {**ENDLESS, "ema": 0.9}
    config = write_config(shared, "both", model=dev_folder, train=train, **sections)
    folder = shared / "both" / "runs" / "tiny"
    process = runs.start(config, engine="fsdp2")
    wait_for_steps(folder, process=process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode not in (0, None)
    step = runs.metrics(folder)[-1]["step"]
    assert output.count(f"stopped by SIGTERM after step {step}, which is saved.") == 1
    assert "memory: 0 of 4 blocks recomputed, all resident (1.0 GB, " in output
    assert runs.last_checkpoint(folder).name == f"step-{step:06d}"
    runs.launch(config, "--resume", f"train.steps={step + 2}", engine="fsdp2")
    whole = {**train, "steps": step + 2}
    config = write_config(shared, "whole", model=dev_folder, train=whole, **sections)
    runs.launch(config, engine="fsdp2")
    runs.assert_same_run(folder, shared / "whole" / "runs" / "tiny")


def limit_files(size: int):
    """For a new process: no file of it may grow beyond that many bytes, as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(shared, dev_folder):
    train = {"steps": 4, "checkpoint_every": 2}
    config = write_config(shared, "full", model=dev_folder, train=train)
    folder = shared / "full" / "runs" / "tiny"
    runs.launch(config, "train.steps=2")
    size = (folder / "checkpoints" / "step-000002" / "optimizer.pt").stat().st_size
    done = subprocess.run(
        [sys.executable, str(runs.ROOT / "train.py"), "--config", str(config), "--resume"],
        cwd=runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
        preexec_fn=limit_files(size - 1000),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"{folder / 'checkpoints' / 'step-000004'}: can't be written (File too large). Free space "
        "there or make it writable; a run goes on from its last checkpoint with --resume."
    )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    runs.launch(config, "--resume")
    assert [row["step"] for row in runs.metrics(folder)] == [1, 2, 3, 4]


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(shared, dev_folder):
    sections = {"train": {"steps": 100_000, "checkpoint_every": 5}}
    config = write_config(shared, "dying", model=dev_folder, **sections)
    folder = shared / "dying" / "runs" / "tiny"
    process = runs.start(config, engine="ddp")
    wait_for_steps(folder, process=process, count=8)
    both = workers(process.pid)
    os.kill(both[1], signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode not in (0, None)
    assert not Path(f"/proc/{both[0]}").exists()
    saved, _ = checkpoint.newest_good(folder / "checkpoints")
    assert saved is not None
    step = checkpoint.load(saved).progress.step
    assert step >= 5
    output = runs.launch(config, "--resume", f"train.steps={step + 2}", engine="ddp")
    assert f"resuming after step {step} " in output


def workers(launcher: int) -> list[int]:
    """The processes that a launcher has started, and that are there still."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(number) for number in children.split()]

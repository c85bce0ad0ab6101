"""What happens to processes and disks: the run ends with a clear message, and can go on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import runs

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
    assert [row["step"] for row in runs.metrics(folder)] == list(range(1, step + 3))


def test_told_by_their_launcher_two_processes_stop_after_the_same_step(shared, dev_folder):
    config = write_config(shared, "both", model=dev_folder, train=ENDLESS)
    folder = shared / "both" / "runs" / "tiny"
    process = runs.start(config, processes=2)
    wait_for_steps(folder, process=process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode not in (0, None)
    step = runs.metrics(folder)[-1]["step"]
    assert output.count(f"stopped by SIGTERM after step {step}, which is saved.") == 1
    assert runs.last_checkpoint(folder).name == f"step-{step:06d}"

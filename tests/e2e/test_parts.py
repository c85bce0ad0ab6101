"""A base in parts takes no more RAM than its parts and a block, by the system's own count."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs

BLOCK = 43.3
"""MB of the largest block of the measured base, which has 397 MB."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_process_never_holds_more_than_its_part_and_two_blocks(tmp_path: Path) -> None:
    """While it is loaded; without the variable glibc's heap keeps more than is in use."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *runs.ENGINES["fsdp2"]]
    launcher += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "-m", "scripts.bench_parts"]
    report = tmp_path / "parts.json"
    done = subprocess.run(
        [*launcher, str(tmp_path / "base"), "--json", str(report)],
        cwd=runs.ROOT,
        env={**runs.environment(), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    assert (found["engine"], len(found["processes"])) == ("fsdp2", 2)
    for process in found["processes"]:
        assert process["part"] == pytest.approx(397 / 2, rel=0.01)
        assert process["part"] < process["held"] < process["loading"]
        assert process["loading"] < process["part"] + 2 * BLOCK

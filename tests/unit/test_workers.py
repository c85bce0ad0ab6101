"""Work spread over threads and processes: order, errors, and that nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from data_tools import workers
from data_tools.pictures import PictureError
from train.errors import MachineError

SLEEPERS = """\
import os, time
from tests.unit.test_workers import sleep
from data_tools import workers

if __name__ == "__main__":
    for pid in workers.ordered_in_processes(sleep, [0.0] * 64 + [60.0] * 64):
        print(pid, flush=True)
"""


def double(number: int) -> int:
    time.sleep(0.001 * (number % 3))
    return 2 * number


def refuse(name: str) -> PictureError:
    return PictureError(Path(name), "too odd")


def fail(number: int) -> int:
    raise ValueError(f"no {number}")


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@pytest.mark.parametrize("ordered", [workers.ordered, workers.ordered_in_processes])
def test_results_come_in_order_and_items_are_taken_as_needed(ordered: Callable) -> None:
    taken = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    found = ordered(double, numbers())
    first = [next(found) for _ in range(10)]
    assert first == list(range(0, 20, 2))
    assert len(taken) <= (workers.AHEAD * workers.cores() + 2) * workers.CHUNK
    assert [*first, *found] == list(range(0, 2000, 2))
    assert len(taken) == 1000


@pytest.mark.parametrize("ordered", [workers.ordered, workers.ordered_in_processes])
def test_the_first_exception_ends_it(ordered: Callable) -> None:
    with pytest.raises(ValueError, match="no 0"):
        list(ordered(fail, range(100)))


def test_an_unfit_picture_is_the_same_from_another_process() -> None:
    [found] = workers.ordered_in_processes(refuse, ["a.png"])
    assert isinstance(found, PictureError)
    assert (found.path, found.reason, str(found)) == (Path("a.png"), "too odd", "a.png: too odd")


def test_a_killed_process_is_a_fault_of_the_machine() -> None:
    with pytest.raises(MachineError, match=r"ended from outside, most likely .* memory"):
        list(workers.ordered_in_processes(die, [1]))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_their_parent(sent: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        start_new_session=True,
    )
    assert parent.stdout is not None
    ours = {int(parent.stdout.readline()) for _ in range(64)}
    if sent == signal.SIGINT:
        for pid in ours:
            os.kill(pid, sent)  # a terminal sends it to all; the children leave it to the parent
        assert all(psutil.pid_exists(pid) for pid in ours)
    parent.send_signal(signal.SIGKILL)
    _, errors = parent.communicate(timeout=30)
    until = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in ours) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in ours)
    assert "Traceback" not in errors

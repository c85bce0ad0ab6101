"""metrics.jsonl has every step once, the console some of them."""

import json
import re
import sys
from pathlib import Path

import pytest

from train.config import TrackConfig
from train.errors import MachineError
from train.track import Tracker


def tracker(
    folder: Path, *, start: int = 0, main: bool = True, every: int = 2, wandb: str = "off"
) -> Tracker:
    """A tracker of five steps."""
    track = TrackConfig(wandb=wandb)  # pyright: ignore[reportArgumentType]
    return Tracker(
        folder,
        name="tiny",
        track=track,
        settings={},
        start=start,
        steps=5,
        every=every,
        main=main,
    )


def record(tracked: Tracker, *steps: int, loss: float = 1.0) -> None:
    """Record steps and close."""
    for step in steps:
        tracked.step(step, {"loss": loss, "grad_norm": 0.5})
    tracked.close()


def rows(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_every_step_is_a_line(tmp_path):
    record(tracker(tmp_path), 1, 2, 3)
    assert rows(tmp_path) == [{"step": i, "loss": 1.0, "grad_norm": 0.5} for i in (1, 2, 3)]


def test_a_line_is_on_disk_as_soon_as_its_step_is_done(tmp_path):
    tracked = tracker(tmp_path)
    tracked.step(1, {"loss": 1.0, "grad_norm": 0.5})
    assert len(rows(tmp_path)) == 1
    tracked.close()


def test_a_resumed_run_replaces_the_steps_that_it_does_again(tmp_path):
    record(tracker(tmp_path), 1, 2, 3, loss=1.0)
    record(tracker(tmp_path, start=2), 3, 4, loss=2.0)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
    ]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    record(tracker(tmp_path), 1, 2)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    record(tracker(tmp_path, start=2), 3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_new_start_drops_what_a_run_without_checkpoint_left(tmp_path):
    record(tracker(tmp_path), 1, 2)
    record(tracker(tmp_path), 1)
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_other_processes_write_and_say_nothing(tmp_path, capsys):
    silent = tracker(tmp_path, main=False)
    silent.say("hello")
    record(silent, 1, 2)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_console_has_every_nth_step_and_the_last(tmp_path, capsys):
    record(tracker(tmp_path), 1, 2, 3, 4, 5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert lines[0].startswith("step 2/5  loss 1.0000  grad 0.500  0.00 s/step  0:00:0")
    assert re.search(r" left  \d+\.\d GB V?RAM$", lines[0])


def test_without_wandb_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MachineError) as caught:
        tracker(tmp_path, wandb="offline")
    assert str(caught.value) == (
        "track.wandb is 'offline' but wandb isn't installed: "
        "pip install wandb, or set track.wandb: off"
    )

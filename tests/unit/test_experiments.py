"""The experiments: mechanisms do what they say, runs go on, the page counts right."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.experiments import __main__ as command
from scripts.experiments import course, job, judge, page
from scripts.experiments.arms import ARMS, BASELINE, Run, best_rate, missing
from scripts.toy.character import portrait_caption
from scripts.toy.dataset import PORTRAITS


@pytest.mark.parametrize("name", ARMS)
def test_each_arm_is_a_config(name: str, tmp_path: Path) -> None:
    arm = ARMS[name]
    for rate in arm.rates:
        config = job.load(arm, Run(name, 7, rate), steps=400, folder=tmp_path)
        assert (config.seed, config.optim.lr) == (7, float(rate))
        assert config.validation.pictures == "off"
    assert arm.against in ARMS


def row(arm: str, seed: int, loss: float, *, rate: str = "2e-3") -> dict[str, Any]:
    shares = dict.fromkeys(("likeness", "character", "obeyed", "intruded", "drift"), 0.5)
    figures = {"held_out": loss, "by_sigma": {"0.500": loss}, "train_wall_s": 1.0, **shares}
    return {"arm": arm, "seed": seed, "rate": rate, **figures}


def test_the_better_rate_goes_on() -> None:
    arms, results = {"prodigy": ARMS["prodigy"]}, []
    asked = []
    while run := missing(arms, [3, 4], results):
        asked.append((run.seed, run.rate))
        results.append(row("prodigy", run.seed, 0.1 if run.rate == "2" else 0.2, rate=run.rate))
    assert asked == [(3, "1"), (3, "2"), (4, "2")]
    assert best_rate(ARMS["prodigy"], results, seed=3) == "2"


def test_chance_is_not_taken_for_a_difference() -> None:
    baseline = {seed: row(BASELINE, seed, 0.5) for seed in range(3)}
    for losses, beyond in (((0.4, 0.5, 0.55), False), ((0.4, 0.41, 0.42), True), ((0.4,), False)):
        own = {seed: row("rank-4", seed, loss) for seed, loss in enumerate(losses)}
        found = page.difference(own, baseline, "held_out")
        assert found is not None
        assert found.beyond_chance == beyond


def test_a_stopped_experiment_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Run] = []

    def measure(arm: Any, run: Run, **_: Any) -> dict[str, Any]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(run)
        return row(run.arm, run.seed, 0.5 + 0.01 * run.seed**2 - 0.1 * (run.arm == "rank-64"))

    base = row("", 0, 0.9)
    monkeypatch.setattr(job, "measure", measure)
    monkeypatch.setattr(job, "make_judge", lambda **_: SimpleNamespace(judge=lambda adapter: base))
    results = tmp_path / "toy.json"
    arguments = [BASELINE, "rank-64", "--results", str(results), "--folder", str(tmp_path / "f")]
    runs = []
    for _ in range(4):
        with contextlib.suppress(KeyboardInterrupt):
            command.main(arguments)
        runs += asked
        asked.clear()
    assert len(runs) == len(set(runs)) == 6
    assert len(json.loads(results.read_text(encoding="utf-8"))["results"]) == 6
    shown = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "(-0.100 ± 0.000)" in shown or "(**-0.100 ± 0.000**)" in shown
    with pytest.raises(SystemExit, match="another job"):
        command.main([*arguments, "--steps", "7"])


@pytest.mark.slow
def test_an_arm_is_trained_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing, small. The judge hands the base back as it was."""
    monkeypatch.setattr(judge, "PORTRAITS", 4)
    monkeypatch.setattr(judge, "LEVELS", 2)
    monkeypatch.setitem(judge.DRAWING, "steps", 1)
    judging = job.make_judge(count=1, folder=tmp_path)
    base = judging.judge(None)
    run = Run("no-shift", 0, "2e-3")
    trained = job.measure(ARMS[run.arm], run, steps=3, folder=tmp_path, judge=judging)
    assert trained["held_out"] < base["held_out"]
    assert list(trained["by_sigma"]) == list(base["by_sigma"])  # whatever it trained at
    assert judging.judge(None) == base
    assert not (tmp_path / run.arm).exists()


def test_held_out_portraits_differ_from_trained_ones(tmp_path: Path) -> None:
    trained = {portrait for portrait, _ in PORTRAITS.values()}
    files = sorted(course.at_home(tmp_path / "h").glob("*.txt"))
    captions = {portrait_caption(one) for one in trained}
    assert len(files) == 10
    assert not captions & {file.read_text(encoding="utf-8").strip() for file in files}

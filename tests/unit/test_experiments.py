"""The experiments: mechanisms do what they say, runs go on, the page counts right."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

from scripts.experiments import __main__ as command
from scripts.experiments import job, judge, mechanisms, page
from scripts.experiments.arms import ARMS, BASELINE, Run, best_rate, missing
from train.cache import Cache
from train.config import FlowConfig
from train.data import Example, Loader
from train.order import Showing


@pytest.mark.parametrize("name", ARMS)
def test_each_arm_is_a_config(name: str, tmp_path: Path) -> None:
    arm = ARMS[name]
    for rate in arm.rates:
        config = job.load(arm, Run(name, 7, rate), steps=400, folder=tmp_path)
        assert (config.seed, config.optim.lr) == (7, float(rate))
        assert config.validation.pictures == "off"
    assert arm.against in ARMS
    assert arm.mechanism is None or arm.mechanism in mechanisms.MECHANISMS


def test_the_nearest_noise_is_a_function_of_the_showing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    latents = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0))
    cache.put("aa", {"latents": latents}, notes={})
    cache.put("bb", {"text": torch.zeros(3, 6)}, notes={})
    example = Example("a", ("aa",), None, "bb", ((32, 32),))
    parts: Any = ([example], None, cache, FlowConfig())
    plain = Loader(*parts, seed=0)
    near = mechanisms.NearestLoader(*parts, seed=0)
    showings = [Showing(example=0, epoch=epoch, repeat=0) for epoch in range(64)]
    first, one = plain(showings), near(showings)
    alone = torch.cat([near([showing]).noise_BDhw for showing in showings])
    assert torch.equal(one.noise_BDhw, alone)  # whatever batch, process or resume it comes in
    far, close = ((b.noise_BDhw - latents).flatten(1).norm(dim=1) for b in (first, one))
    assert (close <= far).all()
    assert 1 <= (close == far).sum() <= 20  # one in eight by chance
    assert len(one.noise_BDhw.flatten(1).unique(dim=0)) == 64  # each epoch has its own
    assert torch.equal(one.sigma_B, first.sigma_B)


def test_ranks_are_cut_by_each_pictures_noise_level() -> None:
    mask = mechanisms.rank_mask(torch.tensor([1.0, 0.5, 0.0]), rank=8, least=0.5)
    assert mask.sum(1).tolist() == [4, 6, 8]
    assert mask[0].tolist() == [1] * 4 + [0] * 4

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor, *, timestep: torch.Tensor) -> torch.Tensor:
            return self.part(x)

    settings = peft.LoraConfig(r=8, target_modules=["part"], init_lora_weights=False)
    model: Any = peft.inject_adapter_in_model(settings, Model())
    x, timestep = torch.randn(2, 3, 4), torch.tensor([1.0, 0.0])
    whole = model(x, timestep=timestep)
    with mechanisms.masked_ranks(model):
        cut = model(x, timestep=timestep)
    down, up = (half["default"].weight for half in (model.part.lora_A, model.part.lora_B))
    scale = model.part.scaling["default"]
    expected = model.part.base_layer(x[0]) + scale * x[0] @ down[:4].T @ up[:, :4].T
    torch.testing.assert_close(cut[0], expected)
    torch.testing.assert_close(cut[1], whole[1])
    assert torch.equal(model(x, timestep=timestep), whole)  # nothing stays behind


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

    def measure(arm: Any, run: Run, **_: Any) -> list[dict[str, Any]]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(run)
        return [row(run.arm, run.seed, 0.5 + 0.01 * run.seed**2 - 0.1 * (run.arm == "rank-64"))]

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
def test_a_mechanism_is_trained_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing, small: what is cut in training and when drawing isn't what isn't cut."""
    monkeypatch.setattr(judge, "PORTRAITS", 4)
    monkeypatch.setattr(judge, "LEVELS", 2)
    monkeypatch.setitem(judge.DRAWING, "steps", 1)
    judging = job.make_judge(count=1, folder=tmp_path)
    rows = [judging.judge(None)]
    for name in (BASELINE, "timestep-rank"):
        run = Run(name, 0, "2e-3")
        rows += job.measure(ARMS[name], run, steps=3, folder=tmp_path, judge=judging)
    assert len({one["held_out"] for one in rows}) == len(rows) == 4
    assert len(rows[0]["by_sigma"]) == judge.LEVELS
    assert not (tmp_path / BASELINE).exists()

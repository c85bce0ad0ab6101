"""The recipes by card: each fits the card it is named after, and what it can't fit refuses it."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from train.config import reading
from train.planning import facts, forecast, plan
from train.planning.forecast import Forecast, Room
from train.planning.machine import CARDS
from train.planning.metered import Meters

ROOT = Path(__file__).resolve().parents[2]

TOO_SMALL = {
    "dev-16gb": 12,  # the text encoder
    "dev-24gb": 16,  # the text encoder in 8 bits
    "dev-32gb": 16,
    "dev-48gb": 32,
    "dev-80gb": 48,
    "dev-141gb": 48,
    "klein-4b-12gb": None,
    "klein-4b-24gb": None,
    "klein-9b-24gb": 16,
    "klein-9b-48gb": 16,
}
"""Recipe -> the largest card that refuses it, if there is one."""


def make(name: str, card: int, meters: Meters | None = None) -> Forecast:
    config = reading.load(ROOT / "configs" / f"{name}.yaml")
    base = facts.of(config.base)
    room = Room(CARDS[card], None, None)
    meters = meters or Meters(base)
    return forecast.forecast(config, base, plan._pictures(config), room=room, meters=meters)


def test_every_recipe_by_card_is_here() -> None:
    assert TOO_SMALL.keys() == {path.stem for path in (ROOT / "configs").glob("*gb.yaml")}


@pytest.mark.parametrize("name", TOO_SMALL)
def test_a_recipe_fits_its_card(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no data folder: pictures are assumed
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    size = int(name.rsplit("-", 1)[1].removesuffix("gb"))
    config = reading.load(ROOT / "configs" / f"{name}.yaml")
    meters = Meters(facts.of(config.base))
    assert make(name, size, meters).lacking == ()
    smaller = TOO_SMALL[name]
    if smaller is not None:
        assert not make(name, smaller, meters).fits


def test_80_gb_train_dev_without_streaming_or_quantisation(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = make("dev-80gb", 80)
    assert found.config.base.quantize == "none"
    assert found.decision.choice.resident == 56
    assert len(found.decision.choice.recomputed) < 56

"""Which settings count as changed since a checkpoint was written, perhaps by an older version."""

from pathlib import Path
from typing import Any

import pytest

from tests import runs
from train import resumption


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Any]:
    """What a checkpoint keeps of a config with two data sets."""
    more = ({"path": str(tmp_path), "loss_weight": 0.5},)
    config = runs.make_config(tmp_path, model=tmp_path, pictures=tmp_path, more_data=more)
    return config.model_dump(mode="json")


def without(tree: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in names}


def test_settings_that_are_newer_than_the_run_were_at_their_defaults(saved):
    older = without(saved, "speed", "encode")
    older["lora"] = without(saved["lora"], "rslora", "init")
    older["more_data"] = [without(saved["more_data"][0], "mask_floor", "flip")]
    assert resumption.changed_settings(older, saved) == {}


def test_a_newer_setting_that_is_used_is_a_change(saved):
    older = {**saved, "lora": without(saved["lora"], "init")}
    older["more_data"] = [without(saved["more_data"][0], "loss_weight")]
    newer = {**saved, "lora": {**saved["lora"], "init": "pissa"}}
    assert resumption.changed_settings(older, newer) == {
        "lora.init": f"{saved['lora']['init']} -> pissa",
        "more_data.1.loss_weight": "1.0 -> 0.5",
    }


def test_a_setting_that_is_no_more_is_named(saved):
    older = {**saved, "lora": {**saved["lora"], "wobble": 0.1}}
    assert resumption.changed_settings(older, saved) == {"lora.wobble": "0.1 -> not there"}


def test_a_data_set_more_is_a_change(saved):
    older = {**saved, "more_data": []}
    changed = resumption.changed_settings(older, saved)
    assert changed["more_data.1.loss_weight"] == "not there -> 0.5"

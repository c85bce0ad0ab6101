"""`kindling plan`: the text of a plan, exit codes, the search for what fits, local bases."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from data_tools.buckets import Geometry
from tests import runs
from train.config import Config, reading
from train.errors import ConfigError
from train.planning import budget, facts, forecast, phases, plan
from train.planning.forecast import Forecast, Room
from train.planning.machine import CARDS
from train.planning.metered import Meters, step_of

ROOT = Path(__file__).resolve().parents[3]

CONFIG: dict[str, Any] = {
    "name": "x",
    "base": {"model": "dev", "quantize": "nf4"},
    "data": {"path": "nowhere"},
    "encode": {"text_quantize": "nf4"},
    "optim": {"name": "adamw8bit"},
    "train": {"steps": 1500},
    "memory": {"offload_activations": True},
    "validation": {"pictures": "off"},
}

DEV_ON_24 = """\
x.yaml: dev on a card like the RTX 4090, 25.3 GB as torch sees it (assumed)
pictures: 20 to encode, 20 captions (assumed: 20, as a data folder isn't there); largest 1024x1024

black-forest-labs/FLUX.2-dev: FLUX.2-dev Non-Commercial License; accept it on the hub and \
`hf auth login` first
  transformer                64.45 GB  to fetch
  text_encoder               48.02 GB  to fetch
  vae                         0.34 GB  to fetch
  tokenizer and configs       0.02 GB  to fetch
  together to fetch         112.83 GB  75 min at 25 MB/s

"""


@pytest.fixture(autouse=True)
def _nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    Path("x.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")


def make(card: int | None, *, ram: int | None = None, disk: int | None = None, **changes: Any):
    """A plan's forecast for a config like CONFIG, with what it was made from."""
    tree = {**CONFIG, **changes}
    config = Config.model_validate(tree)
    base = facts.of(config.base)
    room = Room(CARDS[card] if card else None, ram, disk)
    meters = Meters(base)
    found = forecast.forecast(config, base, plan._pictures(config), room=room, meters=meters)
    return found, base, room, meters


def phase(found: Forecast, name: str) -> phases.Phase:
    return next(one for one in found.phases if one.name.startswith(name))


def test_the_text_of_a_plan(capsys: pytest.CaptureFixture) -> None:
    """nf4 weights and a card of 24 GB; what libraries may change is checked as a range below."""
    assert plan.main(["--config", "x.yaml", "--gpu", "24", "--json", "x.json"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(DEV_ON_24)
    assert re.search(r"\nIt fits: 2[0-4]\.\d of 25\.3 GB of GPU memory at most\.\n", text)
    assert "a margin of 3% of the GPU's memory is left free" in text
    assert "memory: 56 of 56 blocks recomputed, all resident, their starts in RAM\n" in text
    for kind in (
        "computed, and not compared with a GPU yet: ",
        "assumed, not measured yet: ",
        "published (NVIDIA): 165 TFLOP/s",
    ):
        assert f"\n{kind}" in text
    table = text.split("\n\n")[2].splitlines()
    assert table[0].split() == ["phase", "GPU", "GB", "RAM", "GB", "disk", "GB", "time"]
    names = [row[:22].strip() for row in table[1:]]
    assert names == [
        "read the pictures",
        "encode pictures",
        "encode captions",
        "load the transformer",
        "train 1500 steps",
        "export, certificate",
    ]
    report = json.loads(Path("x.json").read_text(encoding="utf-8"))
    trained = report["phases"][4]
    assert 20e9 < trained["gpu"] < 23e9
    assert trained["gpu"] == report["need"]["gpu"]
    assert report["choice"]["recomputed"] == list(range(56))
    assert report["fits"] is True


def test_what_does_not_fit_is_said_with_the_smallest_change(capsys: pytest.CaptureFixture) -> None:
    assert plan.main(["--config", "x.yaml", "--gpu", "16"]) == 2
    text = capsys.readouterr().out
    assert "It doesn't fit:\n  load the transformer: " in text
    assert "GB of GPU memory, there are 16.1 of 16.6 without the margin\n" in text
    assert "  memory:\n    resident_blocks: auto\n" in text


def test_overrides_and_faults_are_the_configs(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"lora\.rnk"):
        plan.main(["--config", "x.yaml", "lora.rnk=3"])
    with pytest.raises(SystemExit) as caught:
        plan.main(["--config", "x.yaml", "--gpu", "23"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_a_local_base_with_pictures_on_this_machine(
    tmp_path: Path, klein_folder: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pictures = runs.make_pictures(tmp_path / "pictures", sizes=[runs.SQUARE] * 3)
    tree = runs.settings(tmp_path, model=klein_folder, pictures=pictures)
    config = runs.write_config(tmp_path / "tiny.yaml", tree)
    assert plan.main(["--config", str(config)]) == 0
    text = capsys.readouterr().out
    assert "no GPU here" in text
    assert "3 captions (read)" in text
    assert "to fetch" not in text
    assert "Fits this machine's RAM and disk; there is no GPU to compare with." in text


def test_ram_and_disk_are_looked_at() -> None:
    found, *_ = make(24, ram=10**9, disk=10**9)
    assert {line.split(":")[0] for line in found.lacking} >= {"load the transformer", "all of it"}
    assert any("113 GB" in line or "of disk" in line for line in found.lacking)


def test_a_remedy_fits_and_has_no_needless_change() -> None:
    found, base, room, meters = make(
        24, base={"model": "klein-9b"}, memory={"gradient_checkpointing": "none"}, encode={}
    )
    assert not found.fits
    remedy = forecast.remedy(found, base, room=room, meters=meters)
    assert remedy is not None
    assert dict(remedy.changes) == {"memory.gradient_checkpointing": "all"}
    assert remedy.forecast.fits


def test_smaller_pictures_are_the_last_resort() -> None:
    config = Config.model_validate({**CONFIG, "base": {"model": "dev"}, "encode": {}})
    rows = list(forecast._candidates(config))
    sides = [row.get("data.resolution", 1024) for row in rows]
    assert sides == sorted(sides, reverse=True)
    assert set(sides) == {1024, 768, 512}
    counts = [len(row) for row in rows if "data.resolution" not in row]
    assert counts == sorted(counts)
    assert rows[:3] == [
        {"base.quantize": "fp8"},
        {"base.quantize": "nf4"},
        {"memory.resident_blocks": "auto"},
    ]
    assert len({str(row) for row in rows}) == len(rows)
    for row in rows:
        assert forecast.changed(config, row) != config  # and valid


def test_a_limit_of_ones_own_counts() -> None:
    memory = {"gradient_checkpointing": "auto", "budget_gb": 10.0}
    own, *_ = make(24, base={"model": "klein-4b"}, memory=memory, encode={})
    assert own.limit == 10**10
    free, *_ = make(24, base={"model": "klein-4b"}, memory={**memory, "budget_gb": 99.0}, encode={})
    assert free.limit == CARDS[24].total
    assert len(free.decision.choice.recomputed) < len(own.decision.choice.recomputed)


def test_times_follow_what_is_computed() -> None:
    """Recomputation is a third of what frozen weights take without it; half the rate, twice it."""
    base = {"model": "klein-4b"}
    plain, *_ = make(141, base=base, memory={"gradient_checkpointing": "none"}, encode={})
    again, *_ = make(141, base=base, memory={"gradient_checkpointing": "all"}, encode={})
    slower, *_ = make(24, base=base, memory={"gradient_checkpointing": "all"}, encode={})
    seconds = [phase(one, "train").seconds or 0.0 for one in (plain, again, slower)]
    assert 1.3 < seconds[1] / seconds[0] < 1.5
    assert seconds[2] / seconds[1] == pytest.approx(CARDS[141].matmul / CARDS[24].matmul)


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from data_tools.buckets import Geometry
    from train import objective
    from train.planning import footprint

    base = facts.of(reading.load(Path("x.yaml"), ["base.model=klein-4b"]).base)
    small = {**base.transformer, "num_layers": 1, "num_single_layers": 1}
    step = footprint.Step(Geometry(512, 512), batch_size=2)
    model = footprint._build(small, Config.model_validate(CONFIG).lora, step)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        batch = footprint._batch(small, step)
        objective.predict(model, batch, dtype=step.dtype, guidance=None)
    ours = sum(phases.forward_work(small, step))
    assert flops.get_total_flops() == pytest.approx(ours, rel=0.05)  # and the adapter, embeddings


def test_cards_of_the_option_are_those_of_the_table() -> None:
    assert tuple(CARDS) == plan.SIZES
    for size, card in CARDS.items():
        assert 0.9 * size * 10**9 < card.total < size * 2**30


def test_a_base_in_parts(capsys: pytest.CaptureFixture) -> None:
    """Each of two cards holds half of the blocks, and what is gathered; RAM is of two processes."""
    tree = {**CONFIG, "memory": {"gradient_checkpointing": "all"}}
    Path("two.yaml").write_text(json.dumps(tree), encoding="utf-8")
    plan.main(["--config", "two.yaml", "--gpu", "24", "--sharded", "2", "--json", "two.json"])
    assert "\n2 of them, a part of the base on each: " in capsys.readouterr().out
    plan.main(["--config", "two.yaml", "--gpu", "24", "--json", "one.json"])
    two, one = (
        json.loads(Path(f"{name}.json").read_text(encoding="utf-8")) for name in ("two", "one")
    )
    config = Config.model_validate(tree)
    base = facts.of(config.base)
    whole = Meters(base).step(config.lora, step_of(config, Geometry(1024, 1024), ()))
    blocks = [block.weights for block in whole.blocks]
    saved = sum(blocks) / 2 - whole.others / 2 - budget.GATHERED * max(blocks)
    assert one["need"]["held"] - two["need"]["held"] == pytest.approx(saved, abs=100)
    load, alone = (plan["phases"][3]["ram"] for plan in (two, one))
    assert load == 2 * alone


def test_parts_leave_room_for_activations(capsys: pytest.CaptureFixture) -> None:
    """As a run decides it: fewer blocks are recomputed where more cards share the base."""
    again = []
    for cards in ("2", "4"):
        settings = ["memory.gradient_checkpointing=auto", "base.quantize=fp8"]
        plan.main(["--config", "x.yaml", "--gpu", "24", "--sharded", cards, *settings])
        found = re.search(r"memory: (\d+) of 56 blocks recomputed", capsys.readouterr().out)
        assert found is not None
        again.append(int(found[1]))
    assert 56 >= again[0] > again[1]


@pytest.mark.parametrize("count", ["1", "two"])
def test_one_part_is_no_sharding(count: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--config", "x.yaml", "--sharded", count])
    assert f"{count!r} isn't a number of cards from 2 on" in capsys.readouterr().err


def test_a_base_in_parts_is_not_streamed() -> None:
    with pytest.raises(ConfigError, match=r"memory\.resident_blocks: .* can't be streamed, too"):
        plan.main(["--config", "x.yaml", "--sharded", "2", "memory.resident_blocks=10"])


def test_lines_of_a_config() -> None:
    changes = {"memory.offload_activations": True, "base.quantize": "fp8"}
    assert list(plan.yaml_lines(changes)) == [
        "memory:",
        "  offload_activations: true",
        "base:",
        "  quantize: fp8",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "5 s"), (100, "2 min"), (5400, "1.5 h"), (36000, "10.0 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert plan.duration(seconds) == words


def test_slack_is_in_what_is_shown() -> None:
    found, *_ = make(24)
    assert phase(found, "train").gpu == found.decision.need.gpu
    assert budget.needed(found.decision.need.gpu) <= budget.usable(CARDS[24].total)

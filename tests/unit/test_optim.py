"""Learning-rate schedules and the optimizers behind their names."""

import importlib.util
import math
from pathlib import Path
from typing import Any, get_args

import bitsandbytes
import prodigyopt
import pytest
import schedulefree
import torch
from torch import nn

from train import optim
from train.config import OptimConfig
from train.errors import MachineError
from train.planning import budget

NAMES = get_args(OptimConfig.model_fields["name"].annotation)

ADAM: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
PRODIGY: dict[str, Any] = ADAM | {"use_bias_correction": True, "safeguard_warmup": True}
PRODIGY["lr"] = 1.0
COMMON: dict[str, Any] = {key: ADAM[key] for key in ("lr", "weight_decay")}
LIBRARIES: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, **ADAM),
    "adamw8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, **ADAM),
    "paged_adamw8bit": lambda p: bitsandbytes.optim.PagedAdamW8bit(p, **ADAM),
    "lion8bit": lambda p: bitsandbytes.optim.Lion8bit(p, **COMMON, betas=ADAM["betas"]),
    "adafactor": lambda p: torch.optim.Adafactor(p, **COMMON),
    "prodigy": lambda p: prodigyopt.Prodigy(p, **PRODIGY),
    "schedulefree": lambda p: schedulefree.AdamWScheduleFree(p, **ADAM),
    "muon": lambda p: torch.optim.Muon(p, **COMMON, adjust_lr_fn="match_rms_adamw"),
}
"""The library's own optimizer with the settings of `config`."""

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def config(name: str, **settings: Any) -> OptimConfig:
    """Settings far from any default, as far as the optimizer has them."""
    used = {key: value for key, value in ADAM.items() if key not in UNUSED.get(name, ())}
    rate = {"lr": 1.0} if name == "prodigy" else {}
    return OptimConfig.model_validate({"name": name, **used, **rate, **settings})


UNUSED = {"lion8bit": ("eps",), "adafactor": ("betas", "eps"), "muon": ("betas", "eps")}


def rates(*, steps: int = 10, **settings) -> list[float]:
    """All fractions of a run."""
    return [optim.rate(OptimConfig(**settings), step=step, steps=steps) for step in range(steps)]


def test_constant():
    assert rates() == [1.0] * 10


def test_linear_falls_to_zero_after_the_last_step():
    assert rates(schedule="linear") == pytest.approx([1 - i / 10 for i in range(10)])


def test_cosine_is_half_a_cosine():
    expected = [0.5 + 0.5 * math.cos(math.pi * i / 10) for i in range(10)]
    assert rates(schedule="cosine") == pytest.approx(expected)


def test_cosine_restarts_at_its_peak():
    """Two of them make three cycles, here of three steps each, after a warm-up of two."""
    cycle = [1.0, 0.75, 0.25]
    found = rates(schedule="cosine", restarts=2, warmup=2, steps=11)
    assert found == pytest.approx([1 / 3, 2 / 3, *cycle, *cycle, *cycle])


@pytest.mark.parametrize("restarts", range(1, 7))
def test_every_restart_is_seen_whatever_the_length(restarts):
    found = rates(schedule="cosine", restarts=restarts, steps=100)
    rises = [step for step in range(1, 100) if found[step] > found[step - 1]]
    assert rises == [math.ceil(i * 100 / (restarts + 1)) for i in range(1, restarts + 1)]


def test_the_floor_is_where_they_end():
    assert rates(schedule="linear", floor=0.2, steps=4) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert rates(schedule="cosine", floor=0.2, steps=2) == pytest.approx([1.0, 0.6])
    assert rates(schedule="cosine", floor=0.2, steps=1000)[-1] == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_in_equal_steps_to_the_peak(schedule):
    found = rates(schedule=schedule, warmup=3)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(found) == 1
    assert min(found) > 0


class Model:
    """Two parameters, one of them zero, going down a quadratic under an optimizer."""

    def __init__(self, make: Any) -> None:
        torch.manual_seed(0)
        # 64 x 64: from 4096 elements on, 8-bit optimizers have 8 bits
        self.down, self.up = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.zeros(96, 64))
        self.parameters = [self.down, self.up]
        self.targets = [torch.randn(64, 64), torch.randn(96, 64)]
        self.optimizer = make(self)

    def loss(self) -> torch.Tensor:
        """Distance to the targets."""
        pairs = zip(self.parameters, self.targets, strict=True)
        return sum((p - target).square().sum() for p, target in pairs)  # pyright: ignore

    def steps(self, count: int) -> "Model":
        """Go on."""
        for _ in range(count):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss().backward()
            self.optimizer.step()
        return self

    def equals(self, other: "Model") -> bool:
        """To the bit."""
        return all(map(torch.equal, self.parameters, other.parameters))


def ours(name: str, **settings: Any) -> Model:
    """Under our optimizer of that name."""
    chosen = config(name, **settings)
    return Model(lambda model: optim.build_optimizer(chosen, model.parameters, up=[model.up]))


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_librarys(name):
    """To the bit, with every setting that the optimizer has away from its default."""
    theirs = Model(lambda model: LIBRARIES[name](model.parameters))
    if name == "schedulefree":
        theirs.optimizer.train()
    before = theirs.down.detach().clone()
    assert ours(name).steps(3).equals(theirs.steps(3))
    assert not torch.equal(before, theirs.down)


@pytest.mark.parametrize("name", NAMES)
def test_each_goes_downhill(name):
    model = ours(name, weight_decay=0.0)
    before = model.loss().item()
    assert model.steps(30).loss().item() < before


@pytest.mark.parametrize("name", NAMES)
def test_resumed_equals_uninterrupted_to_the_bit(name, tmp_path: Path):
    whole, first, second = ours(name).steps(8), ours(name).steps(4), ours(name)
    torch.save(first.optimizer.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for to, source in zip(second.parameters, first.parameters, strict=True):
            to.copy_(source)
    optim.restore(second.optimizer, torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.steps(4).equals(whole)
    states = [model.optimizer.state_dict() for model in (second, whole)]
    torch.testing.assert_close(*(state["state"] for state in states), rtol=0, atol=0)
    assert states[0]["param_groups"] == states[1]["param_groups"]


def test_a_resumed_run_has_the_settings_of_its_config():
    """torch and bitsandbytes would go on with the saved ones."""
    for name in ("adamw", "adamw8bit"):
        saved = ours(name).steps(1).optimizer.state_dict()
        now = ours(name, weight_decay=0.5, eps=0.25).optimizer
        optim.restore(now, saved)
        (group,) = now.param_groups
        assert (group["weight_decay"], group["eps"]) == (0.5, 0.25)
        assert now.state_dict()["state"].keys() == {0, 1}


def test_the_rate_in_use_is_the_one_that_prodigy_found():
    plain, found = ours("adamw"), ours("prodigy").steps(5)
    assert optim.used_rate(config("adamw"), plain.optimizer) == 0.02
    (group,) = found.optimizer.param_groups
    assert group["d"] > group["d0"]
    assert optim.used_rate(config("prodigy"), found.optimizer) == group["d"]


def test_every_optimizer_says_nothing(capfd: pytest.CaptureFixture[str]):
    for name in NAMES:
        ours(name).steps(1)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", NAMES)
def test_state_weighs_what_plans_are_made_with(name):
    """Counters and the tables that all 8-bit tensors share left out."""
    weight = nn.Parameter(torch.ones(1, 8192))
    optimizer = optim.build_optimizer(config(name), [weight])
    weight.grad = torch.randn(1, 8192)
    optimizer.step()
    (state,) = optimizer.state.values()
    tensors = [v for k, v in state.items() if torch.is_tensor(v) and not k.startswith("qmap")]
    found = sum(tensor.nbytes for tensor in tensors if tensor.ndim)
    assert found / 8192 == pytest.approx(budget.STATE[name], abs=1e-3)


def test_lora_plus_moves_the_up_matrices_so_much_further():
    """AdamW's first step is the learning rate in every direction."""
    model = ours("adamw", lora_plus=5.0, weight_decay=0.0, eps=1e-12)
    before = [parameter.detach().clone() for parameter in model.parameters]
    model.steps(1)
    moved = [p - b for p, b in zip(model.parameters, before, strict=True)]
    assert [m.abs().mean().item() for m in moved] == pytest.approx([0.02, 0.1], rel=1e-5)


def test_lora_plus_keeps_its_ratio_under_a_schedule():
    model = ours("adamw", lora_plus=4.0)
    optim.set_rate(model.optimizer, 0.25, lora_plus=4.0)
    assert [group["lr"] for group in model.optimizer.param_groups] == [0.25, 1.0]
    assert [group["params"] for group in model.optimizer.param_groups] == [[model.down], [model.up]]


def test_without_lora_plus_there_is_one_rate():
    model = ours("adamw")
    optim.set_rate(model.optimizer, 0.25)
    assert [group["lr"] for group in model.optimizer.param_groups] == [0.25]


@pytest.mark.parametrize(("name", "package"), optim.PACKAGES.items())
def test_a_missing_package_says_how_to_get_it(name, package, monkeypatch):
    monkeypatch.setattr(optim, "find_spec", lambda wanted: None)
    with pytest.raises(MachineError) as caught:
        optim.build_optimizer(config(name), [nn.Parameter(torch.zeros(3, 3))])
    assert str(caught.value) == (
        f"optim.name is '{name}' but {package} isn't installed: "
        'pip install "kindling[optim]", or set optim.name: adamw'
    )
    optim.require(config("adamw"))
    monkeypatch.undo()
    assert importlib.util.find_spec(package)


def test_8_bit_moments_start_at_4096_elements():
    """And so a tiny adapter doesn't test them."""
    for shape, kind in (((64, 64), torch.uint8), ((64, 63), torch.float32)):
        weight = nn.Parameter(torch.randn(shape))
        optimizer = optim.build_optimizer(config("adamw8bit"), [weight])
        weight.grad = torch.randn(shape)
        optimizer.step()
        assert {optimizer.state[weight][key].dtype for key in ("state1", "state2")} == {kind}


def test_adamw8bit_goes_where_adamw_goes():
    """8 bits resolve the moments to about a percent; ten steps of 0.02 can part by little more."""
    exact, coarse = ours("adamw").steps(10), ours("adamw8bit").steps(10)
    assert (exact.down - coarse.down).abs().mean() < 0.02 * 10 * 0.02


@pytest.mark.parametrize(
    ("name", "waits"), [("adamw8bit", 0), ("lion8bit", 0), ("paged_adamw8bit", 3)]
)
def test_only_pages_are_waited_for(name, waits, monkeypatch):
    """bitsandbytes waits after each of two parameters, and for pages once more."""
    calls = []
    library = importlib.import_module("bitsandbytes.optim.optimizer")
    monkeypatch.setattr(library, "sync_gpu", calls.append)
    ours(name).steps(1)
    assert len(calls) == waits
    Model(lambda model: LIBRARIES["adamw8bit"](model.parameters)).steps(1)
    assert len(calls) == waits + 2, "someone else's optimizer is left as it is"


@pytest.mark.gpu
def test_adamw_is_fused_on_a_gpu():
    weight = nn.Parameter(torch.zeros(4, 4, device="cuda"))
    optimizer = optim.build_optimizer(config("adamw"), [weight])
    assert optimizer.param_groups[0]["fused"]

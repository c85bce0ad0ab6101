"""Gradients summed, the base sharded, and what of accelerate's settings is refused."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import Flux2Transformer2DModel
from torch import nn
from torch.distributed.tensor import DTensor

from tests import tiny
from train import lora, parallel, zero3
from train.config import LoraConfig
from train.errors import ConfigError, MachineError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one; whole runs with two are among the end-to-end tests."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_come_back_to_where_they_were(alone: None):
    parameters = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.arange(parameter.numel()).view_as(parameter) + 10.0 * number
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    parallel.add_gradients(parameters)
    assert all(torch.equal(p.grad, old) for p, old in zip(parameters, before, strict=True))  # pyright: ignore


def test_a_part_of_the_adapter_without_a_gradient_is_a_bug_of_ours(alone: None):
    with pytest.raises(AssertionError, match="takes part in every step"):
        parallel.add_gradients([nn.Parameter(torch.ones(2))])


def cut(model: Flux2Transformer2DModel, engine: parallel.Sharding) -> Flux2Transformer2DModel:
    """In parts, as the loader does it."""
    cutter = parallel.cutter(engine, torch.device("cpu"))
    assert cutter is not None
    model.requires_grad_(False)
    for module in [*model.transformer_blocks, *model.single_transformer_blocks, model]:
        cutter(module)
    return model


def test_frozen_weights_are_sharded_and_the_adapter_stays_whole(alone: None):
    model = cut(tiny.transformer(guidance=True), "fsdp2")
    lora.attach(model, LoraConfig(rank=2), seed=1)
    kinds = {p.requires_grad: set() for p in model.parameters()}
    for parameter in model.parameters():
        kinds[parameter.requires_grad].add(isinstance(parameter, DTensor))
    assert kinds == {False: {True}, True: {False}}


def test_nothing_is_cut_where_nothing_is_sharded():
    assert parallel.cutter("none", torch.device("cpu")) is None


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_an_adapter_starts_on_parts_as_on_the_whole(
    alone: None, engine: parallel.Sharding, init: str, monkeypatch: pytest.MonkeyPatch
):
    """PiSSA looks at the weights, which have to be gathered for it."""
    if engine == "zero3":
        deepspeed = pytest.importorskip("deepspeed")
        monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        monkeypatch.setenv("LOCAL_RANK", "0")
        linear = nn.functional.linear  # it puts its own there
        monkeypatch.setattr(nn.functional, "linear", linear)
    config = LoraConfig.model_validate({"rank": 2, "init": init})
    one, two = (tiny.transformer(guidance=True) for _ in range(2))
    lora.attach(one, config, seed=1)
    lora.attach(cut(two, engine), config, seed=1)
    ours, theirs = (lora.read(model, config).parts for model in (one, two))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_all_decide_by_the_smallest(alone: None):
    assert parallel.least(23_999_999_999, device=torch.device("cpu")) == 23_999_999_999


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("one", DistributedType.NO, 1),
        ("ddp", DistributedType.MULTI_GPU, 2),
        ("fsdp2", DistributedType.FSDP, 2),
        ("deepspeed", DistributedType.DEEPSPEED, 2),
        ("two-nodes", DistributedType.MULTI_GPU, 4),
    ],
)
def test_the_launcher_reads_our_files(name: str, kind: DistributedType, processes: int):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == (kind, processes)  # pyright: ignore
    assert config.mixed_precision == "no"
    files = {path.stem for path in CONFIGS.iterdir()}
    assert files == {"one", "ddp", "fsdp2", "deepspeed", "two-nodes"}


class Asked:
    """What accelerate says of a launch."""

    gradient_accumulation_steps = 1
    distributed_type = DistributedType.NO


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 4}, "is 4: set train.accumulate instead"),
        ({"distributed_type": DistributedType.XLA}, "configured for XLA; .*ddp.yaml"),
    ],
)
def test_what_would_change_training_is_refused(
    changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
):
    asked = type("Asked", (Asked,), changes)()
    monkeypatch.setattr(parallel, "Accelerator", lambda mixed_precision: asked)
    with pytest.raises(ConfigError, match=message):
        parallel.accelerator()


def test_the_first_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "Accelerator", lambda mixed_precision: Asked())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"FSDP version 1; .*fsdp2\.yaml"):
        parallel.accelerator()
    monkeypatch.setenv("FSDP_VERSION", "2")
    parallel.accelerator()
    assert parallel.sharding() == "fsdp2"


ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
ZERO3 |= {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero_stage must be 3"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag must be false"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device must be none"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping .* optim.max_grad_norm"),
    ],
)
def test_settings_of_deepspeed_that_would_go_unheeded_are_refused(
    changes: dict, message: str | None, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("deepspeed")
    for name, value in (ZERO3 | changes).items():
        monkeypatch.setenv(name, value)
    assert zero3.is_launched()
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        zero3.check()


def test_deepspeed_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"pip install deepspeed, or .*fsdp2\.yaml"):
        zero3.check()

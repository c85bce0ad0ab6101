"""`kindling bench train` on real shapes: that its figures are of what they say, at a tiny size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_tools.buckets import Geometry
from scripts import (
    bench,
    bench_base,
    bench_case,
    bench_clock,
    bench_peer,
    bench_rate,
    bench_shape,
    bench_sides,
)
from scripts.bench_case import Case
from train import flow, lora, objective
from train.batch import Batch
from train.config import LoraConfig
from train.errors import ConfigError, MachineError
from train.loading.frozen import FrozenLinear
from train.planning import footprint
from train.trainer import Trainer

CPU = torch.device("cpu")
SMALL = bench_base.ALL["small"]


def small(folder: Path, *, quantize: str = "none", **places: Any) -> Any:
    place = places.get("place", lambda name: CPU)
    return bench_base.build(
        SMALL, folder, device=CPU, dtype=torch.float32, quantize=quantize, place=place
    )


def cases(*arguments: str) -> list[Case]:
    return bench_case.of_options(bench.build_parser().parse_args(["train", *arguments]))


def case(**changes: Any) -> Case:
    tiny = {"shape": "small", "size": 64, "batch": 1, "text_tokens": 8, "steps": 2, "warmup": 1}
    sections = {"base": {"dtype": "fp32"}, "lora": {"rank": 2}}
    return Case(**{**tiny, "sections": sections, **changes})


def batch(*, pictures: int = 1) -> Batch:
    torch.manual_seed(0)
    clean, noise = torch.randn(2, pictures, 128, 4, 6)
    text = torch.randn(pictures, 8, SMALL.text_width)
    sigma, ones = torch.full((pictures,), 0.5), torch.ones(pictures, 4, 6)
    return Batch(clean, noise, ones, sigma, text, (), ("x",) * pictures)


# ---- what is measured


def test_options_become_a_case_a_row() -> None:
    found = cases("--shape", "klein-4b", "--size", "512", "768", "--batch", "1", "4", "--compile")
    assert [(one.size, one.batch) for one in found] == [(512, 1), (512, 4), (768, 1), (768, 4)]
    assert found[0].sections == {"speed": {"compile": True}}
    assert found[0].limit_gb is None


def test_a_recipe_is_measured_as_it_is_but_for_options(tmp_path: Path) -> None:
    (one,) = cases("--config", "configs/dev-24gb.yaml", "--resident", "7", "--limit-gb", "24")
    config = one.config(tmp_path)
    assert (one.shape, one.size, one.limit_gb) == ("dev", 1024, 24.0)
    assert (config.base.quantize, config.optim.name) == ("fp8", "adamw8bit")
    assert config.memory.resident_blocks == 7
    assert config.memory.gradient_checkpointing == "all"


def test_settings_that_cannot_be_are_said(tmp_path: Path) -> None:
    (one,) = cases("--shape", "small", "--fp8-matmul", "--checkpointing", "often")
    with pytest.raises(ConfigError, match=r"these settings can't be:\n  memory.gradient_check"):
        one.config(tmp_path)


def test_a_peer_needs_plain_weights_and_a_limit_a_gpu() -> None:
    with pytest.raises(ConfigError, match="same frozen weights"):
        bench_shape.measure(case(sections={"base": {"quantize": "nf4"}}, peer=True))
    with pytest.raises(MachineError, match="needs an NVIDIA GPU"):
        bench_shape.measure(case(limit_gb=4.0))


def test_what_is_planned_is_what_is_run(tmp_path: Path) -> None:
    (one,) = cases("--shape", "dev", "--quantize", "fp8", "--fp8-matmul", "--attention", "flash")
    step = one.step(one.config(tmp_path))
    assert (step.fp8_matmul, step.attention, step.text_tokens) == (True, "flash", 512)


def test_auto_settings_are_those_of_the_plan(tmp_path: Path) -> None:
    sections = {"memory": {"gradient_checkpointing": "auto", "resident_blocks": "auto"}}
    dev = Case("dev", 1024, 1, {"base": {"quantize": "fp8"}, **sections}, limit_gb=24.0)
    planned = bench_case.plan(dev, dev.config(tmp_path), device=CPU)
    assert 0 < planned.memory.resident < 56
    assert planned.memory.recomputed == frozenset(range(56))
    assert planned.decision.need.gpu < 24e9
    roomy = Case("dev", 1024, 1, sections, limit_gb=200.0)
    planned = bench_case.plan(roomy, roomy.config(tmp_path), device=CPU)
    assert (planned.memory.resident, planned.memory.recomputed) == (56, frozenset())


# ---- the weights


@pytest.mark.parametrize("quantize", ["none", "fp8", "nf4"])
def test_random_weights_are_made_as_real_ones_are_loaded(tmp_path: Path, quantize: str) -> None:
    placed = []
    model = small(tmp_path, quantize=quantize, place=lambda name: placed.append(name) or CPU)
    again = small(tmp_path, quantize=quantize).state_dict()
    state = model.state_dict()
    assert set(placed) == set(state)
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert torch.equal(model.transformer_blocks[1].attn.norm_q.weight, torch.ones(128))
    assert model.x_embedder.weight.std().item() == pytest.approx(0.02, rel=0.05)
    linear = model.single_transformer_blocks[0].attn.to_out
    assert isinstance(linear, FrozenLinear) == (quantize != "none")
    if quantize == "none":
        assert sum(p.numel() for p in model.parameters()) == SMALL.parameters


# ---- operations


def test_model_flops_are_those_that_torch_counts(tmp_path: Path) -> None:
    """A forward pass of the blocks without adapter, to the operation."""
    model = small(tmp_path).to("meta")
    step = footprint.Step(Geometry(96, 64), batch_size=2, text_tokens=8)
    one = batch(pictures=2)
    one = one.to(torch.device("meta"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        objective.predict(model, one, dtype=torch.float32, guidance=1.0)
    counts = counter.get_flop_counts()
    kind = type(model).__name__
    blocks = ("transformer_blocks", "single_transformer_blocks")
    total = sum(
        sum(counts[f"{kind}.{name}.{i}"].values())
        for name in blocks
        for i in range(len(model.get_submodule(name)))
    )
    matrices, attention = bench_rate.phases.forward_work(SMALL.config(), step)
    assert total == matrices + attention
    found = bench_rate.model_flops(SMALL.config(), step)
    assert found["all"] == 2 * matrices + 3 * attention


@pytest.mark.parametrize("name", list(bench_base.ALL))
def test_products_are_all_of_the_frozen_matrices(name: str) -> None:
    config = bench_base.ALL[name].config()
    step = footprint.Step(Geometry(512, 768), batch_size=3)
    products = bench_rate.products(config, step)
    matrices, _ = bench_rate.phases.forward_work(config, step)
    assert sum(p.count * p.flops for p in products) == pytest.approx(matrices)


def test_rates_weigh_products_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rate, "_one", lambda product, *_, **__: product.flops / product.rows)
    listed = [bench_rate.Product(100, 2, 2, count=3), bench_rate.Product(200, 2, 2, count=1)]
    done = 3 * 800 + 1600  # in 3 * 8 + 8 seconds
    rate = bench_rate.measured(listed, device=CPU, dtype=torch.float32)
    assert rate == pytest.approx(done / 32)


def test_a_clock_times_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(bench_clock.time, "perf_counter", lambda: next(ticks))
    clock = bench_clock.Clock(CPU)
    for _ in range(3):
        clock.mark()
    assert clock.seconds() == [0.5, 2.5]


def test_a_limit_is_for_the_device_that_accelerate_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no number, which torch's own function refuses; what isn't torch's counts."""
    given = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (90e9, 100e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 9e9)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    native = "_cuda_setMemoryFraction"
    monkeypatch.setattr(torch._C, native, lambda *a: given.append(a), raising=False)
    bench_clock.limit(torch.device("cuda"), 24e9)
    assert given == [(pytest.approx(0.23), 0)]
    with pytest.raises(MachineError, match="a limit of 101 GB: this GPU has 100"):
        bench_clock.limit(torch.device("cuda"), 101e9)


# ---- the sides


def test_the_peer_has_the_same_loss_at_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maths is diffusers' example's; at one picture, noise and level it is ours."""
    model, one = small(tmp_path), batch()
    levels = bench_peer.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    monkeypatch.setattr(torch, "randn_like", lambda clean: one.noise_BDhw)
    drawn = torch.tensor([0.25])
    monkeypatch.setattr(bench_peer, "compute_density_for_timestep_sampling", lambda *_, **__: drawn)
    places = bench_peer.Flux2Pipeline._prepare_text_ids(one.text_BLJ)
    with torch.no_grad():
        theirs = bench_peer._loss(model, one, places, levels, dtype=torch.float32)
        sigma = levels.sigmas[[250]]  # pyright: ignore
        same = Batch(
            **{**vars(one), "sigma_B": sigma},
        )
        monkeypatch.setattr(flow, "model_time", lambda sigma, dtype: sigma)
        ours = objective.losses(model, same, dtype=torch.float32, guidance=bench_peer.GUIDANCE)
    torch.testing.assert_close(theirs, ours.mean(), rtol=1e-5, atol=0)


def test_the_peer_trains_its_adapter_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = small(tmp_path)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    targets = lora.select_targets(model, "blocks")
    losses, start = [], {}
    steps = bench_peer.steps(
        model, [batch()], targets=targets, rank=2, dtype=torch.float32, count=3
    )
    for loss in steps:
        losses.append(loss)
        start = start or {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    moved = [n for n, p in model.named_parameters() if n in start and not p.equal(start[n])]
    assert len(start) == 2 * len(targets)
    assert len(moved) > 0.9 * len(start)
    assert model.is_gradient_checkpointing
    assert len(losses) == 3
    bench_peer.detach(model)
    assert not model.is_gradient_checkpointing
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_row_has_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "t.json"
    tiny = "--size 64 --text-tokens 8 --rank 2 --dtype fp32 --steps 2 --warmup 1"
    arguments = ["train", "--shape", "small", *tiny.split(), "--peer", "diffusers"]
    assert bench.main([*arguments, "--checkpointing", "2", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert result["parameters"] == SMALL.parameters
    assert len(result["rates"]) == 2
    assert (result["plan"]["recomputed"], result["plan"]["resident"]) == (3, 6)
    rate = sum(result["rates"]) / 2
    for side in (result["kindling"], result["peer"]):
        assert len(side["seconds"]["samples"]) == 2
        median = side["seconds"]["median"]
        assert side["images_per_second"] == pytest.approx(1 / median)
        assert side["share_of_rate"] == pytest.approx(result["flops"]["all"] / median / rate)
        assert side["peaks"]["ram"] > 10**8
    both = [result[name]["images_per_second"] for name in ("kindling", "peer")]
    assert result["ratio"] == pytest.approx(both[0] / both[1])
    assert "small 64 fp32 ckpt 2" in capsys.readouterr().out


def test_streamed_and_quantised_weights_go_through_the_same_path() -> None:
    base = {"dtype": "fp32", "quantize": "nf4"}
    memory = {"resident_blocks": 2, "offload_activations": True}
    result = bench_shape.measure(
        case(sections={"base": base, "lora": {"rank": 2}, "memory": memory}, batch=2)
    )
    assert result["plan"]["resident"] == 2
    assert result["kindling"]["images_per_second"] == pytest.approx(
        2 / result["kindling"]["seconds"]["median"]
    )
    assert "peer" not in result
    assert "ratio" not in result


def test_no_room_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    monkeypatch.setattr(Trainer, "step", full)
    result = bench_shape.measure(case(peer=True))
    assert result["kindling"]["out_of_memory"] == "training"
    assert result["kindling"]["message"] == "CUDA out of memory. Tried to allocate 2 GiB."
    assert "seconds" in result["peer"]
    assert "ratio" not in result
    assert bench_shape.row(result)[1] == "no room (training)"
    monkeypatch.setattr(bench_base, "build", full)
    result = bench_shape.measure(case())
    assert result["kindling"]["out_of_memory"] == "loading"


def test_a_peer_that_fails_costs_nothing_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise TypeError("no such kernel")

    monkeypatch.setattr(bench_peer, "_loss", wrong)
    result = bench_shape.measure(case(peer=True))
    assert result["peer"] == {"failed": "TypeError: no such kernel"}
    assert "no such kernel" in capsys.readouterr().err
    assert "seconds" in result["kindling"]
    assert "failed" in bench_shape.row(result)


def test_other_errors_are_not_taken_for_lack_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes don't match")

    monkeypatch.setattr(Trainer, "step", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        bench_shape.measure(case())
    assert bench_clock.is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"))


def test_the_trainer_of_a_case_settles_its_last_step(tmp_path: Path) -> None:
    """A loss that isn't finite in the last step must not become a figure."""
    one = case()
    config = one.config(tmp_path)
    model = small(tmp_path)
    lora.attach(model, LoraConfig(rank=2), seed=0)
    order, loader = bench_sides.stored_data(config, text_tokens=8, text_width=SMALL.text_width)
    accelerator = bench_shape.parallel.accelerator()
    trainer = bench_sides.new_trainer(
        config, transformer=model, order=order, loader=loader, accelerator=accelerator
    )
    assert len(list(bench_sides.trained(trainer, config))) == 3
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]

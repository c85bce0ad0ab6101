"""The fast path: it computes what the plain one does, in few graphs, and comes off again."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests import tiny
from train import assemble, lora, objective, speed
from train.batch import Batch
from train.config import Config, LoraConfig, SpeedConfig
from train.errors import ConfigError, MachineError
from train.memory import recompute

CPU = torch.device("cpu")
GEOMETRIES = ((4, 4), (4, 6), (8, 4), (3, 5), (5, 5), (7, 4))
LORA = LoraConfig(rank=4)


def model(*, checkpointing: bool = False, double: int = 2, single: int = 2) -> Any:
    """A tiny transformer whose adapter changes its output."""
    transformer = tiny.transformer(guidance=True)
    del transformer.transformer_blocks[double:]
    del transformer.single_transformer_blocks[single:]
    lora.attach(transformer, LORA, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora.trainable(transformer):
        parameter.data.normal_(0, 0.1, generator=generator)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def batch(h: int, w: int, *, pictures: int = 1, device: str = "cpu") -> Batch:
    generator = torch.Generator().manual_seed(100 * h + w)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device)

    clean, noise = draw(pictures, 16, h, w), draw(pictures, 16, h, w)
    weight, sigma = torch.ones(pictures, h, w, device=device), draw(pictures).sigmoid()
    text = draw(pictures, 8, 3 * tiny.TEXT_WIDTH)
    return Batch(clean, noise, weight, sigma, text, (draw(pictures, 16, 2, 2),), ("x",) * pictures)


def gradients(transformer: Any, one: Batch) -> list[torch.Tensor]:
    """The loss and the adapter's gradients."""
    loss = objective.losses(transformer, one, dtype=torch.float32, guidance=1.0).mean()
    return [loss.detach(), *torch.autograd.grad(loss, lora.trainable(transformer))]


# ---- compile


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_gradients_in_few_graphs(
    undo: ExitStack, checkpointing: bool
) -> None:
    """What is traced runs as it is, so bits agree. One graph for the first shape and one for all
    others, twice because the model's first block has an input without gradient, and one for
    previews of any shape."""
    transformer = model(checkpointing=checkpointing, double=0, single=2)
    assert graphs_over_shapes(transformer, undo=undo) == (4, 5)


@pytest.mark.slow
def test_only_the_class_of_the_first_block_needs_twice_as_many(undo: ExitStack) -> None:
    """Double blocks 4 and 5, single ones 2 and 3."""
    assert graphs_over_shapes(model(double=2, single=2), undo=undo) == (6, 8)


def graphs_over_shapes(transformer: Any, *, undo: ExitStack) -> tuple[int, int]:
    """Graphs after training on all geometries, and with previews, too."""
    batches = [batch(*geometry) for geometry in GEOMETRIES]
    plain = [gradients(transformer, one) for one in batches]
    speed.compile_blocks(transformer, undo=undo, backend="eager")
    for one, expected in zip(batches, plain, strict=True):
        torch.testing.assert_close(gradients(transformer, one), expected, rtol=0, atol=0)
    training = counters["stats"]["unique_graphs"]
    transformer.eval()
    with torch.no_grad():
        for one in batches:
            objective.losses(transformer, one, dtype=torch.float32, guidance=1.0)
    assert not counters["graph_break"]
    return training, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("guidance", "recomputed"), [(True, 0), (True, 4), (False, 7)])
def test_blocks_of_a_class_share_their_code(
    undo: ExitStack, monkeypatch: pytest.MonkeyPatch, guidance: bool, recomputed: int
) -> None:
    """Three graphs for any number of blocks: two of the first class, one of the other, for dev
    and klein. inductor is asked no oftener, though each block has a wrapper of its own."""
    asked = []
    backend = "torch._inductor.compile_fx.compile_fx"
    monkeypatch.setattr(backend, lambda graph, *_, **__: asked.append(graph) or graph)
    transformer = tiny.transformer(guidance=guidance, double=3, single=4)
    lora.attach(transformer, LORA, seed=1)
    if recomputed:
        recompute.enable(transformer, range(recomputed), offload_activations=False, device=CPU)
    speed.compile_blocks(transformer.train(), undo=undo)
    told = 1.0 if guidance else None
    for _ in range(2):
        losses = objective.losses(transformer, batch(4, 4), dtype=torch.float32, guidance=told)
        losses.mean().backward()
        assert len(asked) == counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
def test_traced_gradients_are_the_same_in_checkpoints(undo: ExitStack) -> None:
    """AOT autograd's own backward pass, recomputed as checkpoints do; sums may be reordered."""
    transformer = model(checkpointing=True, single=1)
    batches = [batch(*geometry) for geometry in GEOMETRIES[:3]]
    plain = [gradients(transformer, one) for one in batches]
    speed.compile_blocks(transformer, undo=undo, backend="aot_eager")
    for one, expected in zip(batches, plain, strict=True):
        torch.testing.assert_close(gradients(transformer, one), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_generated_code_gives_the_same_gradients(undo: ExitStack) -> None:
    """fp32 sums in another order: a few ulp of 1.2e-7 by operation, over some fifty in a row."""
    transformer = model(checkpointing=True, double=1, single=1)
    plain = gradients(transformer, batch(4, 4))
    speed.compile_blocks(transformer, undo=undo)
    loss, *rest = gradients(transformer, batch(4, 4))
    torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(rest, plain[1:], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_one_picture_or_two_in_a_batch(undo: ExitStack) -> None:
    transformer = model(double=0, single=1)
    speed.compile_blocks(transformer, undo=undo, backend="eager")
    for pictures in (2, 1, 3):
        for geometry in GEOMETRIES[:2]:
            gradients(transformer, batch(*geometry, pictures=pictures))
    assert counters["stats"]["unique_graphs"] <= 4


def test_hooks_stay_outside_of_what_is_compiled(undo: ExitStack) -> None:
    """Streaming changes weights in hooks; compiled into the graph they would be constants."""
    transformer = model(double=0, single=1)
    calls = []
    block = transformer.single_transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    speed.compile_blocks(transformer, undo=undo, backend="eager")
    for _ in range(3):
        gradients(transformer, batch(4, 4))
    assert calls == [False] * 3


def test_weights_that_change_place_are_followed(undo: ExitStack) -> None:
    transformer = model(double=0, single=1)
    speed.compile_blocks(transformer, undo=undo, backend="eager")
    gradients(transformer, batch(4, 4))
    graphs = counters["stats"]["unique_graphs"]
    for parameter in transformer.parameters():
        parameter.data = parameter.data * 1.5
    compiled = gradients(transformer, batch(4, 4))
    assert counters["stats"]["unique_graphs"] == graphs
    undo.close()
    torch.testing.assert_close(compiled, gradients(transformer, batch(4, 4)), rtol=0, atol=0)


def test_too_many_shapes_are_an_error(undo: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "GRAPHS", 1)
    transformer = model(double=0, single=1)
    speed.compile_blocks(transformer, undo=undo, backend="eager")
    gradients(transformer, batch(4, 4))
    with pytest.raises(ConfigError, match=r"more than 1 graphs.*equal_tokens"):
        gradients(transformer, batch(4, 6))


def test_undone_nothing_is_left(undo: ExitStack) -> None:
    transformer = model(double=0, single=1)
    limit = torch._dynamo.config.recompile_limit
    speed.compile_blocks(transformer, undo=undo, backend="eager")
    gradients(transformer, batch(4, 4))
    undo.close()
    transformer.unload_lora()
    assert not any("lora" in name or "base_layer" in name for name in transformer.state_dict())
    assert not any("forward" in vars(block) for block in speed.blocks(transformer))
    assert torch._dynamo.config.recompile_limit == limit


def test_no_triton_is_said_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "choose", lambda *_, **__: "native")
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    wished = SpeedConfig(compile=True)
    speed.require(wished, device=CPU, dtype=torch.bfloat16)
    with pytest.raises(MachineError, match="Triton, which isn't installed"):
        speed.require(wished, device=torch.device("cuda"), dtype=torch.bfloat16)


def test_kernels_of_another_machine_are_said_before_anything_is_done() -> None:
    with pytest.raises(MachineError, match="flash3 needs an NVIDIA GPU"):
        speed.require(SpeedConfig(attention="flash3"), device=CPU, dtype=torch.bfloat16)


# ---- attention


def test_without_a_gpu_attention_is_native() -> None:
    assert speed.choose("auto", device=CPU, dtype=torch.bfloat16) == "native"
    assert speed.choose("native", device=CPU, dtype=torch.float32) == "native"


@pytest.mark.parametrize("asked", ["cudnn", "flash", "flash3"])
def test_kernels_that_are_not_there_are_an_error(asked: str) -> None:
    with pytest.raises(MachineError, match=f"{asked} needs an NVIDIA GPU. Set auto"):
        speed.choose(asked, device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "lacks", "itself", "chosen"),
    [
        ((8, 9), {"flash3"}, False, "native"),
        ((9, 0), {"flash3"}, False, "cudnn"),
        ((9, 0), {"flash3"}, True, "native"),
        ((9, 0), {"flash3", "cudnn"}, False, "native"),
        ((9, 0), set(), True, "flash3"),
        ((12, 0), {"flash3"}, False, "cudnn"),
    ],
)
def test_auto_is_a_function_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    lacks: set[str],
    itself: bool,
    chosen: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(speed, "lacking", lambda k, **_: "something" if k in lacks else None)
    monkeypatch.setattr(speed, "_takes_cudnn_itself", lambda device, dtype: itself)
    device = torch.device("cuda")
    assert speed.choose("auto", device=device, dtype=torch.bfloat16) == chosen


def test_fa3_of_another_torch_is_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It can't be imported then; auto goes on without it."""
    (tmp_path / f"{speed.FA3}.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    lacks = speed.lacking("flash3", device=torch.device("cuda"), dtype=torch.bfloat16)
    assert lacks is not None
    assert lacks.startswith("a flash_attn_3 that works with torch ")
    assert lacks.endswith(" (undefined symbol: x)")


def test_fp32_has_no_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match=r"flash needs base\.dtype: bf16"):
        speed.choose("flash", device=torch.device("cuda"), dtype=torch.float32)


def test_every_attention_gets_its_kernels_and_only_those(undo: ExitStack) -> None:
    transformer, other = tiny.transformer(guidance=True), tiny.transformer(guidance=True)
    speed.set_attention(transformer, "flash", undo=undo)
    found = [m.processor._attention_backend for m in speed.attention_modules(transformer)]  # pyright: ignore
    assert [str(backend.value) for backend in found] == ["_native_flash"] * 4  # pyright: ignore
    assert {m.processor._attention_backend for m in speed.attention_modules(other)} == {None}  # pyright: ignore
    undo.close()
    found = [m.processor._attention_backend for m in speed.attention_modules(transformer)]  # pyright: ignore
    assert {str(backend.value) for backend in found} == {"native"}  # pyright: ignore


# ---- all of it


def config(**sections: Any) -> Config:
    tree = {"name": "x", "data": {"path": "x"}, "train": {"steps": 1}, "lora": {"rank": 4}}
    return Config.model_validate({**tree, **sections})


def test_assembling_is_all_that_training_needs(undo: ExitStack) -> None:
    transformer = tiny.transformer(guidance=True)
    settings = config(speed={"attention": "native"}, memory={"gradient_checkpointing": "all"})
    memory = assemble.Memory.of(settings.memory, double=2, single=2)
    made = assemble.assemble(transformer, settings, memory=memory, device=CPU, dtype=torch.float32)
    products = torch.backends.cuda.matmul
    assert transformer.gradient_checkpointing
    assert not products.allow_bf16_reduced_precision_reduction
    assert len(made.targets) == 2 * 12 + 2 * 2
    assert [p.dtype for p in lora.trainable(transformer)] == [torch.float32] * 56
    made.undo.close()
    assert not transformer.gradient_checkpointing
    assert products.allow_bf16_reduced_precision_reduction


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kernels", ["native", "cudnn", "flash", "flash3"])
def test_kernels_on_a_gpu_give_the_same_gradients(undo: ExitStack, kernels: str) -> None:
    """bf16 rounds each product to 3 digits; two kernels differ by no more than their rounding."""
    device = torch.device("cuda")
    if speed.lacking(kernels, device=device, dtype=torch.bfloat16):
        pytest.skip("not on this machine")
    q = torch.randn(3, 1, 640, 4, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    if kernels == "flash3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
        undo.callback(torch.nn.attention.restore_flash_attention_impl)
    backend = AttentionBackendName(speed.BACKENDS[kernels])
    out = dispatch_attention_fn(*q, backend=backend)  # pyright: ignore
    exact = torch.nn.functional.scaled_dot_product_attention(*q.double().transpose(2, 3))  # pyright: ignore
    torch.testing.assert_close(out.double(), exact.transpose(1, 2), rtol=2e-2, atol=2e-2)
    (grad,) = torch.autograd.grad(out.float().square().sum(), q)
    (expected,) = torch.autograd.grad(exact.square().sum(), q)
    assert (grad - expected).norm() <= 2e-2 * expected.norm()

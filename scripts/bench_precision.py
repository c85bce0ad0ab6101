"""What packed bases and the branch's type cost in accuracy: loss and LoRA gradients against fp32.

`python -m scripts.bench_precision [--json FILE]`. Two bases: the toy, which draws, on its own
pictures, and a wider random one with weights as uneven as trained ones. bitsandbytes' own Linears
are measured beside ours. Never passes or fails.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from scripts import bench_report
from train import lora, objective, parallel
from train.batch import Batch
from train.config import Config, LoraConfig
from train.data import Loader
from train.encoding.prepare import prepare
from train.loading import frozen
from train.loading.base import resolve
from train.loading.frozen import FrozenLinear
from train.order import Order

CPU = torch.device("cpu")
PICTURES = bench_report.ROOT / "scripts" / "toy" / "data" / "ordinary"
RANK = 16
GUIDANCE = 1.0

UP = 0.01
"""Size of the adapter's second matrix: updates of about 2 % of the weights, as after training."""

WIDE_HEADS, WIDE_PIXELS, WIDE_TEXT, WIDE_TEXT_WIDTH = 6, 256, 128, 1536
"""128 channels a head; its prompts' tokens and channels."""

Replace = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True)
class Mode:
    """How the block Linears are kept and multiplied."""

    replace: Replace | None
    """A Linear to what takes its place; None leaves it."""
    fp8_matmul: bool = False
    compute: Literal["base", "fp32"] = "base"
    """`lora.compute`; bitsandbytes' own Linears have peft's branch, in fp32, whatever it says."""


def linear4bit(linear: nn.Linear, *, double: bool) -> nn.Module:
    """bitsandbytes' nf4 Linear; double: with its double quantisation, as QLoRA has it."""
    theirs = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
    )
    theirs.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        quant_type="nf4",  # pyright: ignore
        compress_statistics=double,  # pyright: ignore
    )
    return theirs.to(CPU)  # quantises


def linear8bit(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' int8 Linear with the outlier threshold that transformers and diffusers set."""
    theirs = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )
    theirs.weight = bitsandbytes.nn.Int8Params(
        linear.weight.data,
        requires_grad=False,
        has_fp16_weights=False,  # pyright: ignore
    )
    return theirs.to(CPU)  # quantises


MODES = {
    "as it is": Mode(None),
    "as it is, branch in fp32": Mode(None, compute="fp32"),
    "fp8": Mode(partial(FrozenLinear.like, kind="fp8")),
    "fp8, branch in fp32": Mode(partial(FrozenLinear.like, kind="fp8"), compute="fp32"),
    "fp8, products in fp8": Mode(partial(FrozenLinear.like, kind="fp8"), fp8_matmul=True),
    "int8": Mode(partial(FrozenLinear.like, kind="int8")),
    "bitsandbytes Linear8bitLt": Mode(linear8bit),
    "nf4": Mode(partial(FrozenLinear.like, kind="nf4")),
    "nf4, branch in fp32": Mode(partial(FrozenLinear.like, kind="nf4"), compute="fp32"),
    "bitsandbytes Linear4bit": Mode(partial(linear4bit, double=False)),
    "bitsandbytes Linear4bit, double": Mode(partial(linear4bit, double=True)),
}
"""Name -> mode. All read weights that were stored in bf16, as published ones are."""

HEADER = ("base", "blocks", "loss, bf16", "gradient, bf16", "loss, fp32", "gradient, fp32")


@dataclass(frozen=True)
class Case:
    """A base and what it is trained on."""

    transformer: Flux2Transformer2DModel
    """fp32, its numbers exact in bf16."""
    batches: list[Batch]


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(prog="bench_precision", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--base", choices=["toy", "wide"], nargs="+", default=["toy", "wide"])
    parser.add_argument("--batches", type=int, default=4, help="of each base; default 4")
    parser.add_argument("--heads", type=int, default=WIDE_HEADS, help="of the wide one")
    options = parser.parse_args(argv)
    report = bench_report.new_report("precision", argv)
    report["command"] = ["python", "-m", "scripts.bench_precision", *(argv or sys.argv[1:])]
    report["results"] = {}
    for base in options.base:
        case = toy(options.batches) if base == "toy" else wide(options.batches, options.heads)
        report["results"][base] = compare(case)
    rows = [
        row(base, name, found)
        for base, modes in report["results"].items()
        for name, found in modes.items()
    ]
    print(bench_report.table(HEADER, rows))
    if options.json:
        bench_report.write(report, options.json)
    return 0


def compare(case: Case) -> dict[str, dict[str, Any]]:
    """Relative errors of each mode against fp32, batch by batch, by the type that computes."""
    truth = measure(case, MODES["as it is"], dtype=torch.float32)
    results: dict[str, dict[str, Any]] = {}
    for name, mode in MODES.items():
        results[name] = {}
        for key, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            if dtype == torch.float32 and (mode.replace is None or mode.compute == "fp32"):
                continue  # the truth itself, or the row above
            found = measure(case, mode, dtype=dtype)
            results[name][key] = errors(found, truth)
        print(f"{name}: done", file=sys.stderr, flush=True)
    return results


def measure(case: Case, mode: Mode, *, dtype: torch.dtype) -> list[tuple[float, Tensor]]:
    """Loss of each batch, and its gradient of the whole adapter in one row, (n,)."""
    model = copy.deepcopy(case.transformer).requires_grad_(False)
    nn.Module.to(model, dtype)  # diffusers' own warns
    if mode.replace is not None:
        for name in lora.block_linears(model):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, mode.replace(linear))
    lora.attach(model, LoraConfig(rank=RANK, compute=mode.compute), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            with torch.no_grad():
                parameter.copy_(UP * torch.randn(parameter.shape, generator=generator))
    if mode.fp8_matmul:
        frozen.use_fp8_matmul(model, CPU)
    found = []
    for batch in case.batches:
        loss = objective.losses(model, batch, dtype=dtype, guidance=GUIDANCE).mean()
        gradient = torch.autograd.grad(loss, lora.trainable(model))
        found.append((loss.item(), torch.cat([part.flatten() for part in gradient])))
    return found


def errors(
    found: Sequence[tuple[float, Tensor]], truth: Sequence[tuple[float, Tensor]]
) -> dict[str, Any]:
    """|loss - truth| / truth, and |gradient - truth| / |truth| in the Euclidean norm."""
    losses, gradients = [], []
    for (loss, gradient), (true_loss, true_gradient) in zip(found, truth, strict=True):
        losses.append(abs(loss - true_loss) / true_loss)
        gradients.append(((gradient - true_gradient).norm() / true_gradient.norm()).item())
    return {"loss": bench_report.spread(losses), "gradient": bench_report.spread(gradients)}


def toy(batches: int) -> Case:
    """The toy base on pictures and captions of the kind that it has learnt."""
    with tempfile.TemporaryDirectory() as scratch:
        config = Config.model_validate(
            {
                "name": "bench",
                "output": scratch,
                "cache": scratch,
                "base": {"model": "toy", "dtype": "fp32"},
                "data": {"path": str(PICTURES), "resolution": 64},
                "train": {"steps": 1},
                "validation": {"pictures": "off"},
            }
        )
        base = resolve(config.base)
        prepared = prepare(config, base, accelerator=parallel.accelerator())
        loader = Loader(
            prepared.examples, empty_text=None, cache=prepared.cache, flow=config.flow, seed=0
        )
        order = Order(prepared.examples, batch_size=4, seed=0)
        return Case(base.load_transformer(CPU), [loader(order[n]) for n in range(batches)])


def wide(batches: int, heads: int) -> Case:
    """Random, of dev's class and head width, on random latents and prompts.

    Trained weights are uneven, which is what quantising suffers from: entries have heavier tails
    than a Gaussian (Student's t of 5 degrees of freedom), and rows and columns differ in size
    (log-normal, a factor of 1.5 either way is one sigma).
    """
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=heads,
        joint_attention_dim=WIDE_TEXT_WIDTH,
        guidance_embeds=True,
    ).eval()
    tails = torch.distributions.StudentT(torch.tensor(5.0))
    for name in lora.block_linears(model):
        weight = model.get_submodule(name).get_parameter("weight")
        rows, columns = (torch.randn(size).mul(0.4).exp() for size in weight.shape)
        uneven = tails.sample(weight.shape) * rows[:, None] * columns
        weight.data = uneven * (weight.shape[1] ** -0.5 / uneven.std())
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    side = WIDE_PIXELS // 16
    return Case(
        model,
        [
            Batch(
                latents_BDhw=torch.randn(1, 128, side, side),
                noise_BDhw=torch.randn(1, 128, side, side),
                weight_Bhw=torch.ones(1, side, side),
                sigma_B=torch.tensor([(number + 0.5) / batches]),
                text_BLJ=torch.randn(1, WIDE_TEXT, WIDE_TEXT_WIDTH),
                references=(),
                names=("random",),
            )
            for number in range(batches)
        ],
    )


def row(base: str, name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """Medians in per cent."""
    cells = [
        f"{100 * found[key][what]['median']:.3f} %" if key in found else "-"
        for key in ("bf16", "fp32")
        for what in ("loss", "gradient")
    ]
    return base, name, *cells


if __name__ == "__main__":
    raise SystemExit(main())

"""Seconds and memory of a training step on a real shape: `kindling bench train --shape`.

A case goes through what a run goes through: the loader of weights, `assemble`, the trainer's own
step on batches from a cache on disk. The weights alone are random. With a peer, its recipe then
trains the same frozen weights in the same process. Running out of memory is a result.
"""

import gc
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from scripts import bench_base, bench_clock, bench_peer, bench_rate
from scripts.bench_case import GB, Case, Planned, plan
from scripts.bench_clock import Clock
from scripts.bench_report import spread
from scripts.bench_sides import new_trainer, stored_data, trained
from train import assemble, lora, parallel
from train.config import Config
from train.data import Loader
from train.errors import ConfigError, MachineError
from train.loading.base import DTYPES
from train.order import Mixture

HEADER = (
    *("case", "s/step", "images/s", "of rate", "GPU GB", "reserved", "plan", "RAM GB"),
    *("diffusers s", "GPU GB", "times as fast"),
)

Side = dict[str, Any]
"""What was measured of one side: see `_side`."""


def measure_all(cases: list[Case]) -> list[dict[str, Any]]:
    """Each in a process of its own, but for one alone: peaks of RAM are a process's."""
    if len(cases) == 1:
        return [measure(cases[0])]
    context, results = multiprocessing.get_context("spawn"), []
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results.append(pool.submit(measure, case).result())
    return results


def measure(case: Case) -> dict[str, Any]:
    """A row. Raises UserError for what can't be measured here, memory excepted."""
    accelerator = parallel.accelerator()
    device = accelerator.device
    with TemporaryDirectory() as name:
        folder = Path(name)
        config = case.config(folder)
        _refuse(case, config, device=device)
        step, arguments = case.step(config), case.arguments.config()
        flops = bench_rate.model_flops(arguments, step)
        products = list(bench_rate.products(arguments, step))
        rates = [bench_rate.measured(products, device=device, dtype=step.dtype)]
        square = None
        if device.type == "cuda":  # it would take a CPU minutes
            square = bench_rate.measured([bench_rate.SQUARE], device=device, dtype=step.dtype)
        bench_clock.forget_peaks(device)
        planned = plan(case, config, device=device)
        if case.limit_gb is not None:
            bench_clock.limit(device, case.limit_gb * GB)
        sides = _Bench(case, config, planned, accelerator).run(folder)
        if case.limit_gb is None:  # under one there may be no room for it
            bench_clock.forget_peaks(device)
            rates.append(bench_rate.measured(products, device=device, dtype=step.dtype))
    rate = sum(rates) / len(rates)
    for side in sides.values():
        if "seconds" in side:
            seconds = side["seconds"]["median"]
            side["images_per_second"] = case.batch / seconds
            side["share_of_rate"] = flops["all"] / seconds / rate
    return {
        "case": asdict(case),
        "settings": _settings(config),
        "device": str(device),
        "parameters": case.arguments.parameters,
        "tokens": {"pictures": step.target.tokens, "text": case.text_tokens},
        "flops": flops,
        "rates": rates,
        "square_rate": square,
        "plan": _as_json(planned),
        **sides,
        **_compared(sides),
    }


def _refuse(case: Case, config: Config, *, device: torch.device) -> None:
    if case.limit_gb is not None and device.type != "cuda":
        raise MachineError("bench train: --limit-gb needs an NVIDIA GPU; remove it")
    memory = config.memory
    if case.peer and (config.base.quantize != "none" or memory.resident_blocks != "all"):
        raise ConfigError(
            "bench train: --peer diffusers trains the same frozen weights as they are, all on the "
            "device; remove --quantize and --resident, or --peer"
        )


class _Bench:
    """One case under way."""

    def __init__(self, case: Case, config: Config, planned: Planned, accelerator: Any) -> None:
        self._case, self._config, self._planned = case, config, planned
        self._accelerator, self._device = accelerator, accelerator.device
        self._dtype = DTYPES[config.base.dtype]

    def run(self, folder: Path) -> dict[str, Side]:
        """Kindling's side, and the peer's if it is wanted and there is room."""
        case, memory, shape = self._case, self._planned.memory, self._case.arguments
        bench_clock.forget_peaks(self._device)
        clock = Clock(self._device)
        clock.mark()
        try:
            transformer = bench_base.build(
                shape,
                folder,
                device=self._device,
                dtype=self._dtype,
                quantize=self._config.base.quantize,
                place=memory.place(self._device),
            )
        except RuntimeError as error:
            return {"kindling": self._no_room(error, "loading")}
        clock.mark()
        loading = {"seconds": clock.seconds()[0], **bench_clock.peaks(self._device)}
        order, loader = stored_data(
            self._config, text_tokens=case.text_tokens, text_width=shape.text_width
        )
        targets = lora.select_targets(transformer, self._config.lora.targets)
        ours = self._kindling(transformer, order, loader)
        sides = {"kindling": {"loading": loading, **ours}}
        gc.collect()
        if case.peer:
            sides["peer"] = self._peer(transformer, order, loader, targets=targets)
            gc.collect()
        return sides

    def _kindling(self, transformer: Any, order: Mixture, loader: Loader) -> Side:
        with ExitStack() as undo:
            undo.callback(transformer.unload_lora)

            def prepare() -> Iterator[None]:
                assembled = assemble.assemble(
                    transformer,
                    self._config,
                    memory=self._planned.memory,
                    device=self._device,
                    dtype=self._dtype,
                )
                undo.push(assembled.undo)
                trainer = new_trainer(
                    self._config,
                    transformer=transformer,
                    order=order,
                    loader=loader,
                    accelerator=self._accelerator,
                )
                return trained(trainer, self._config)

            return self._side(prepare)

    def _peer(
        self, transformer: Any, order: Mixture, loader: Loader, *, targets: list[str]
    ) -> Side:
        def prepare() -> Iterator[float]:
            batches = [loader(order[position]).to(self._device) for position in range(4)]
            return bench_peer.steps(
                transformer,
                batches,
                targets=targets,
                rank=self._config.lora.rank,
                dtype=self._dtype,
                count=self._case.warmup + self._case.steps,
            )

        try:
            return {"optimizer": bench_peer.optimizer_name(), **self._side(prepare)}
        except Exception as error:  # its fault must not cost what is measured of ours
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {error}"}
        finally:
            bench_peer.detach(transformer)

    def _side(self, prepare: Callable[[], Iterator[Any]]) -> Side:
        """Seconds of the timed steps and of the first one, and peaks over all of them."""
        bench_clock.forget_peaks(self._device)
        stage = "preparing"
        try:
            steps, clock = prepare(), Clock(self._device)
            stage = "training"
            clock.mark()
            for _ in steps:
                clock.mark()
            times = clock.seconds()
        except RuntimeError as error:
            return self._no_room(error, stage)
        return {
            "first_step": times[0],
            "seconds": spread(times[self._case.warmup :]),
            "peaks": bench_clock.peaks(self._device),
        }

    def _no_room(self, error: RuntimeError, stage: str) -> Side:
        if not bench_clock.is_out_of_memory(error):
            raise error
        before = bench_clock.peaks(self._device)
        return {
            "out_of_memory": stage,
            "message": str(error).splitlines()[0],
            "peaks_before": before,
        }


def _settings(config: Config) -> dict[str, Any]:
    """Written out; the plan has those of memory."""
    whole = config.model_dump()
    base = {key: whole["base"][key] for key in ("dtype", "quantize")}
    return {"base": base, **{key: whole[key] for key in ("lora", "optim", "speed")}}


def _as_json(planned: Planned) -> dict[str, Any]:
    memory, need = planned.memory, planned.decision.need
    return {
        "allocated": need.gpu,
        "pinned": need.ram,
        "most_in": need.where,
        "seconds": planned.seconds,
        "fits": planned.decision.fits,
        "resident": memory.resident,
        "recomputed": len(memory.recomputed),
        "blocks": sum(memory.blocks),
        "offload_activations": memory.offload_activations,
    }


def _compared(sides: dict[str, Side]) -> dict[str, float]:
    """Images a second over the peer's; nothing unless both have a figure."""
    rates = [sides.get(name, {}).get("images_per_second") for name in ("kindling", "peer")]
    return {"ratio": rates[0] / rates[1]} if all(rates) else {}  # pyright: ignore


# ---- the table


def name_of(case: dict[str, Any]) -> str:
    """`dev 1024 fp8 compile`, as short as it is clear."""
    parts = [case["shape"], str(case["size"])]
    parts += [f"x{case['batch']}"] if case["batch"] > 1 else []
    base, memory = case["sections"].get("base", {}), case["sections"].get("memory", {})
    speed, adapter = (case["sections"].get(key, {}) for key in ("speed", "lora"))
    kind = base.get("quantize", "none")
    parts.append(base.get("dtype", "bf16") if kind == "none" else kind)
    for key, word in (("gradient_checkpointing", "ckpt"), ("resident_blocks", "resident")):
        parts += [f"{word} {memory[key]}"] if key in memory else []
    parts += ["offload"] if memory.get("offload_activations") else []
    parts += [word for word in ("compile", "fp8_matmul") if speed.get(word)]
    parts += ["fp32 branch"] if adapter.get("compute") == "fp32" else []
    parts += [speed["attention"]] if speed.get("attention", "auto") != "auto" else []
    parts += [f"<= {case['limit_gb']:g} GB"] if case["limit_gb"] else []
    return " ".join(parts)


def row(result: dict[str, Any], *, name: str | None = None) -> tuple[str, ...]:
    """A line of the table."""
    ours, peer, planned = result["kindling"], result.get("peer", {}), result["plan"]
    first = name or name_of(result["case"])
    gpu, reserved, ram = (_gb(ours, key) for key in ("allocated", "reserved", "ram"))
    ratio = f"{result['ratio']:.2f}" if "ratio" in result else "-"
    plan_gb = f"{planned['allocated'] / GB:.1f}"
    return (
        first,
        *_speed(ours),
        gpu,
        reserved,
        plan_gb,
        ram,
        _speed(peer)[0],
        _gb(peer, "allocated"),
        ratio,
    )


def _speed(side: Side) -> tuple[str, str, str]:
    if "failed" in side:
        return "failed", "-", "-"
    if "out_of_memory" in side:
        return f"no room ({side['out_of_memory']})", "-", "-"
    if "seconds" not in side:
        return "-", "-", "-"
    seconds = side["seconds"]
    return (
        f"{seconds['median']:.3f} ({seconds['min']:.3f}-{seconds['max']:.3f})",
        f"{side['images_per_second']:.2f}",
        f"{100 * side['share_of_rate']:.0f} %",
    )


def _gb(side: Side, key: str) -> str:
    size = side.get("peaks", {}).get(key)
    return "-" if size is None else f"{size / GB:.1f}"

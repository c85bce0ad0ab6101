"""RAM of each process that loads and trains a base in parts, beside the size of its part.

    MALLOC_MMAP_THRESHOLD_=65536 ACCELERATE_USE_CPU=true accelerate launch
        --config_file configs/accelerate/fsdp2.yaml -m scripts.bench_parts FOLDER

Goes through what a run goes through: the loader, `assemble`, the trainer's step. The base is
random, 397 MB in fp32, blocks of 43 and 21 MB; it is written to the folder, where a quantised copy
is kept, too, so that the second call reads that. Figures are the system's (Linux), above what a
process held once everything was imported; without the variable, glibc's heap keeps more than is in
use. On CPUs the parts, and what is gathered of the others', are in RAM.
"""

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file

from scripts import bench_base, bench_report
from scripts.bench_sides import new_trainer, stored_data, trained
from train import assemble, parallel
from train.assemble import Memory
from train.config import Config
from train.loading import frozen, transformer, weights
from train.loading.shapes import Shape
from train.loading.weights import Files
from train.usage import peak_ram

SHAPE = Shape(double=4, single=9, heads=5, text_width=640, guidance=True)
STEPS = 2
MB = 1e6


def main() -> None:
    """Measure; the first process prints all processes' figures."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_parts", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantize", choices=["none", *frozen.KINDS], default="none")
    parser.add_argument("--checkpointing", choices=["all", "none"], default="all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    accelerator = parallel.accelerator()
    base = options.folder / "base"
    files = Files(base / "config.json", base, None, torch.float32, options.quantize)
    if accelerator.is_main_process and not files.config.exists():
        _write_base(base)
    accelerator.wait_for_everyone()
    rows = gather_object([_measured(files, accelerator, options)])
    if accelerator.is_main_process:
        for number, row in enumerate(rows):
            print(
                f"process {number}: " + ", ".join(f"{key} {size} MB" for key, size in row.items())
            )
        if options.json:
            report = bench_report.new_report("parts", []) | {"command": _command(options)}
            report |= {"threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_")}
            report |= {"engine": parallel.sharding(), "processes": rows}
            bench_report.write(report, options.json)
    accelerator.end_training()


def _command(options: argparse.Namespace) -> list[str]:
    settings = ["--quantize", options.quantize, "--checkpointing", options.checkpointing]
    return ["accelerate", "launch", "-m", "scripts.bench_parts", "FOLDER", *settings]


def _write_base(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config, cpu = folder / "config.json", torch.device("cpu")
    settings = {"_class_name": weights.CLASS, **SHAPE.config()}
    config.write_text(json.dumps(settings), encoding="utf-8")
    drawn = bench_base.Drawn(config, None, None, torch.float32, "none", cpu)
    tensors = {name: weight.values for name, weight in drawn.source().read_all()}
    save_file(tensors, folder / weights.SINGLE)


def _measured(
    files: Files, accelerator: Accelerator, options: argparse.Namespace
) -> dict[str, float]:
    """MB: this process's part, and what it held at most and in the end."""
    engine, device = parallel.sharding(), accelerator.device
    config = Config.model_validate(
        {
            "name": "parts",
            "output": str(options.folder / f"process-{accelerator.process_index}"),
            "base": {"dtype": "fp32"},
            "data": {"path": "memory", "resolution": 64},
            "lora": {"rank": 4},
            "train": {"steps": STEPS},
            "memory": {"gradient_checkpointing": options.checkpointing},
        }
    )
    order, loader = stored_data(config, text_tokens=8, text_width=SHAPE.text_width)
    transformer.empty(files)  # imports
    before = _forget_peak()
    model: Any = transformer.load(
        files,
        device,
        cache=options.folder / "cache",
        cut=parallel.cutter(engine, device),
        main=accelerator.is_local_main_process,
    )
    memory = Memory.of(config.memory, double=SHAPE.double, single=SHAPE.single)
    made = assemble.assemble(model, config, memory=memory, device=device, dtype=torch.float32)
    loading = peak_ram()
    held = _forget_peak()
    part = sum(parallel.own_part(p).nbytes for p in model.parameters() if not p.requires_grad)
    trainer = new_trainer(
        config, transformer=model, order=order, loader=loader, accelerator=accelerator
    )
    for _ in trained(trainer, config):
        pass
    training = peak_ram()
    made.undo.close()
    above = {"loading": loading, "held": held, "training": training}
    found = {"part": part, **{key: size - before for key, size in above.items()}}
    return {key: round(size / MB, 1) for key, size in found.items()}


def _forget_peak() -> int:
    """Let this process's peak start from what it holds, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_ram()


if __name__ == "__main__":
    main()

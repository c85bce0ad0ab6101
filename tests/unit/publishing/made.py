"""The folder of a run that has been exported, made without training."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from train.adapters import export, files
from train.config import Config, reading
from train.lora import Adapter

SECRET = "grandmother's kitchen in Lyon"
"""Stands in every caption."""
SHAPES = {
    "dev": (6144, 8, 48),
    "klein-4b": (3072, 5, 20),
    "klein-9b": (4096, 8, 24),
    "toy": (160, 2, 4),
}
PIPELINES = {"dev": "Flux2Pipeline", "toy": "Flux2Pipeline"}
MODULE = "transformer_blocks.0.attn.to_q"
RED, BLUE = (200, 20, 20), (20, 20, 200)


def run(
    folder: Path,
    *,
    base: str = "black-forest-labs/FLUX.2-dev",
    revision: str | None = "abc123",
    shape: str = "dev",
    prompts: tuple[str, ...] = ("a street", "mika in the rain"),
    layouts: tuple[str, ...] = ("diffusers",),
    held_out: bool = True,
) -> Path:
    """RUN of the name mika, step 40, with previews: the first prompt's red, the others blue."""
    made = folder / "runs" / "mika"
    made.mkdir(parents=True)
    config = Config.model_validate(
        {
            "name": "mika",
            "output": str(folder / "runs"),
            "base": {"model": base},
            "data": {"path": str(folder / "photos"), "trigger": "mika"},
            "train": {"steps": 50},
            "preview": {"prompts": prompts},
        }
    )
    (made / "config.yaml").write_text(reading.dump(config), encoding="utf-8")
    for layout in layouts:
        _export(made, config, layout, base=base, revision=revision, shape=shape)
    for number in range(len(prompts)):
        picture(made / "previews" / f"step-000040-{number}.png", BLUE if number else RED)
    captions = {f"1:{n}.png": ["0", f"mika, {SECRET}, {n}", "0"] for n in range(3)}
    (made / "pictures.json").write_text(json.dumps(captions), encoding="utf-8")
    rows = [_check(40, 9.0, held_out), _check(40, 0.25, held_out), _check(50, 0.5, held_out)]
    (made / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (96, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def compared(run: Path) -> None:
    """What `kindling compare` leaves: one prompt, base and adapter."""
    folder = run / "compare"
    rows = []
    for x, column in enumerate(["base", "adapter", "adapter at 0.5"]):
        picture(folder / f"00-{x:02d}.png", (0, 80 * x, 0))
        rows.append({"file": f"00-{x:02d}.png", "prompt": "mika again", "column": column})
    (folder / "pictures.json").write_text(json.dumps(rows), encoding="utf-8")
    picture(folder / "board.png", (9, 9, 9))


def texts(folder: Path) -> str:
    """All of a folder that isn't a picture, as one text."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".png"]
    return "\n".join(p.read_bytes().decode("utf-8", errors="replace") for p in paths)


def _check(step: int, loss: float, held_out: bool) -> dict[str, Any]:
    numbers = {"loss": loss, "error": 0.02, "to_base": -0.125, "to_base_error": 0.01}
    return {"step": step, "held_out": held_out, "drift": 0.21, **numbers}


def _export(
    run: Path, config: Config, layout: str, *, base: str, revision: str | None, shape: str
) -> None:
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 8, generator=draw), torch.randn(8, 2, generator=draw)
    adapter = Adapter({MODULE: down}, {MODULE: up}, 2, 2.0)
    facts = export.Facts(
        name="mika",
        created=datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC),
        version="0.1.0",
        base=base,
        base_revision=revision,
        shape=SHAPES[shape],
        resolution=1024,
        steps=40,
        config_hash="c0ffee",
        data_hash="da7a",
        guidance=1.0,
        sigma_sampling="logit-normal(0, 1)",
        training_shift="tokens",
        inference_shift="empirical mu",
        checkpoint=f"last: {run.resolve()} has no other",
        trigger="mika",
    )
    name = "mika" if layout == "diffusers" else f"mika-{layout}"
    path = run / f"{name}.safetensors"
    metadata = export.describe(facts, adapter) | export.settings(config)
    export.write(adapter, path, dtype=torch.bfloat16, metadata=metadata, layout=layout)
    width, double, single = SHAPES[shape]
    certificate = {
        "passed": True,
        "reasons": [],
        "for": ["diffusers", "comfyui"],
        "file": {"name": path.name, "sha256": files.file_hash(path), "bytes": 1},
        "adapter": {"modules": 1, "rank": 2, "alpha": 2.0},
        "transformer": {"width": width, "double": double, "single": single},
        "diffusers": {"pipeline": PIPELINES.get(shape, "Flux2KleinPipeline")},
        "checkpoint": {"step": 40, "rule": "last", "reason": f"in {run.resolve()}"},
    }
    path.with_name(f"{name}.certificate.json").write_text(json.dumps(certificate))

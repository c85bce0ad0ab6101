"""`kindling compare`: the same prompts and seeds from the base and from a run, as a board.

The adapter comes from its exported file through diffusers' own loader, into a base that has never
seen the training. Checkpoints are exported for the occasion.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from train import checkpoint, encode_text, sample, texts
from train.adapters import export
from train.adapters.export_run import CONFIG
from train.board import board
from train.cache import DIGESTS, Cache, FileDigests
from train.config import Config, reading
from train.encode import Keys
from train.errors import CheckpointError, ConfigError
from train.loading.base import Base, resolve


@dataclass(frozen=True)
class Column:
    """One column of the board: an adapter file at a strength, or the base alone."""

    label: str
    file: Path | None
    strength: float = 1.0


def main(argv: list[str] | None = None) -> int:
    """Draw a board from the command line."""
    arguments = _parse(argv)
    run: Path = arguments.run
    if not (run / CONFIG).is_file():
        raise CheckpointError(f"{run}: not the folder of a run (it has no {CONFIG})")
    config = reading.load(run / CONFIG)
    prompts = arguments.prompt or list(config.preview.prompts)
    if not prompts:
        raise ConfigError(f"{run}: its config has no preview.prompts; give --prompt, once or more")
    output: Path = arguments.output or run / "compare"
    with tempfile.TemporaryDirectory() as scratch:
        columns = _columns(
            run,
            config,
            strengths=arguments.strengths,
            checkpoints=arguments.checkpoints,
            scratch=Path(scratch),
        )
        rows = draw_all(
            config, columns, prompts=prompts, seeds=arguments.seeds, steps=arguments.steps
        )
    print(f"board: {_save(output, run, columns, prompts, arguments.seeds, rows)}")
    return 0


def draw_all(
    config: Config,
    columns: Sequence[Column],
    *,
    prompts: Sequence[str],
    seeds: int,
    steps: int | None = None,
) -> list[list[Image.Image]]:
    """For each prompt and seed a row with a picture for each column; the same noise along a row."""
    base = resolve(config.base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = Cache(Path(config.cache))
    keys = Keys.of(base, digests=FileDigests(cache.root / DIGESTS), settings=config.encode)
    encode_text.encode_prompts(base, [*prompts, ""], keys=keys, cache=cache, device=device)
    preview = config.preview
    requests = sample.requests(
        [texts.get(cache, keys.prompt(prompt)) for prompt in prompts for _ in range(seeds)],
        preview=preview,
        resolution=max(config.data.resolutions),
        seeds=[*range(seeds)] * len(prompts),
    )
    transformer = base.load_transformer(device, cache=cache.root)
    empty = texts.get(cache, keys.prompt(""))
    drawn = []
    for column in tqdm(columns, desc="draw", unit="column", delay=2):
        _load(base, transformer, column)
        drawn.append(
            sample.draw(
                base,
                transformer,
                requests,
                empty_text=empty,
                steps=steps or preview.steps,
                guidance=preview.guidance,
            )
        )
    return [list(row) for row in zip(*drawn, strict=True)]


def _load(base: Base, transformer: Any, column: Column) -> None:
    """Give the transformer the column's adapter and no other."""
    transformer.unload_lora()
    if column.file is not None:
        pipeline: Any = base.pipeline(transformer=transformer)
        pipeline.load_lora_weights(
            str(column.file.parent),
            weight_name=column.file.name,
            adapter_name="compared",
            use_safetensors=True,
        )
        transformer.set_adapters("compared", column.strength)


def _columns(
    run: Path,
    config: Config,
    *,
    strengths: Sequence[float],
    checkpoints: bool,
    scratch: Path,
) -> list[Column]:
    """The base, then each adapter at each strength."""
    files = {}
    if checkpoints:
        for path in checkpoint.list_checkpoints(run / "checkpoints"):
            files[path.name] = scratch / f"{path.name}.safetensors"
            adapter = checkpoint.load(path).shown(config.export.weights)
            export.write(adapter, files[path.name], dtype=torch.float32, metadata={})
    else:
        files["adapter"] = run / f"{config.name}.safetensors"
        if not files["adapter"].is_file():
            raise CheckpointError(
                f"{files['adapter']}: no adapter yet. `kindling export {run}` writes it."
            )
    adapted = [
        Column(name if strength == 1 else f"{name} at {strength:g}", file, strength)
        for name, file in files.items()
        for strength in strengths
    ]
    return [Column("base", None), *adapted]


def _save(
    output: Path,
    run: Path,
    columns: Sequence[Column],
    prompts: Sequence[str],
    seeds: int,
    rows: Sequence[Sequence[Image.Image]],
) -> Path:
    """Each picture, what it is (pictures.json), and the board; returns the board's path."""
    output.mkdir(parents=True, exist_ok=True)
    labels = [prompt for prompt in prompts for _ in range(seeds)]
    facts = []
    for y, (row, prompt) in enumerate(zip(rows, labels, strict=True)):
        for x, (picture, column) in enumerate(zip(row, columns, strict=True)):
            name = f"{y:02d}-{x:02d}.png"
            picture.save(output / name)
            facts.append({"file": name, "prompt": prompt, "column": column.label})
    listing = json.dumps(facts, indent=1, ensure_ascii=False)
    (output / "pictures.json").write_text(listing, encoding="utf-8")
    sheet = board(rows, columns=[c.label for c in columns], labels=labels, title=run.name)
    sheet.save(output / "board.png")
    return output / "board.png"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kindling compare", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--prompt", action="append", help="instead of the config's; repeatable")
    parser.add_argument("--seeds", type=int, default=1, help="pictures for each prompt")
    parser.add_argument(
        "--strengths",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[1.0],
        help="of the adapter, such as 0.5,1",
    )
    parser.add_argument(
        "--checkpoints", action="store_true", help="a column for each checkpoint of the run"
    )
    parser.add_argument("--steps", type=int, help="denoising steps; default as in the config")
    parser.add_argument("--output", type=Path, help="folder to write to; default RUN/compare")
    return parser.parse_args(argv)

"""Boards of a run: the same prompts and seeds from the base and from its adapters.

Owns what is drawn and how it is kept. The run's own adapter comes from its exported file."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from data_tools import pictures
from train import checkpoint, sample
from train.adapters import export
from train.adapters.export_run import CONFIG
from train.board import PAPER, board
from train.config import Config, reading
from train.encoding import encode_text, texts
from train.encoding.cache import DIGESTS, Cache, FileDigests
from train.encoding.encode import Keys
from train.errors import CheckpointError, ConfigError
from train.loading.base import resolve


@dataclass(frozen=True)
class Column:
    """One column of the board: an adapter file at a strength, or the base alone."""

    label: str
    file: Path | None
    strength: float = 1.0

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """As `sample.put_on` takes them."""
        return [] if self.file is None else [(self.file, self.strength)]


@dataclass(frozen=True)
class Drawn:
    """What is on a board."""

    columns: list[str]
    prompts: Sequence[str]
    references: Sequence[Sequence[str]]
    """Of each prompt."""
    rows: list[list[Image.Image]]
    """Of each prompt and seed."""


def compare(
    run: Path,
    *,
    prompts: Sequence[str] | None,
    seeds: int,
    strengths: Sequence[float],
    checkpoints: bool,
    steps: int | None,
    output: Path | None,
) -> Path:
    """Draw a run's board, pictures beside it; its path.

    prompts, steps: None is as the config's previews. checkpoints: a column for each. output: a
    folder. Raises CheckpointError for what is no run or isn't exported, ConfigError without
    prompts.
    """
    if not (run / CONFIG).is_file():
        raise CheckpointError(f"{run}: not the folder of a run (it has no {CONFIG})")
    config = reading.load(run / CONFIG)
    references = [()] * len(prompts) if prompts else config.preview.references
    prompts = prompts or config.preview.texts
    if not prompts:
        raise ConfigError(f"{run}: its config has no previews; give --prompt, once or more")
    with tempfile.TemporaryDirectory() as scratch:
        columns = _columns(
            run, config, strengths=strengths, checkpoints=checkpoints, scratch=Path(scratch)
        )
        rows = draw_all(
            config, columns, prompts=prompts, references=references, seeds=seeds, steps=steps
        )
    drawn = Drawn([column.label for column in columns], prompts, references, rows)
    return _save(output or run / "compare", run.name, drawn, seeds=seeds)


def draw_all(
    config: Config,
    columns: Sequence[Column],
    *,
    prompts: Sequence[str],
    references: Sequence[Sequence[str]],
    seeds: int,
    steps: int | None = None,
) -> list[list[Image.Image]]:
    """For each prompt and seed a row with a picture for each column; the same noise along a row.

    references: those of each prompt.
    """
    base = resolve(config.base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = Cache(Path(config.cache))
    keys = Keys.of(base, digests=FileDigests(cache.root / DIGESTS), settings=config.encode)
    encode_text.encode_prompts(base, [*prompts, ""], keys=keys, cache=cache, device=device)
    preview = config.preview
    requests = sample.requests(
        [texts.get(cache, keys.prompt(prompt)) for prompt in prompts for _ in range(seeds)],
        [names for names in references for _ in range(seeds)],
        preview=preview,
        data=config.data,
        seeds=[*range(seeds)] * len(prompts),
    )
    transformer = base.load_transformer(device, cache=cache.root)
    empty = texts.get(cache, keys.prompt(""))
    drawn = []
    for column in tqdm(columns, desc="draw", unit="column", delay=2):
        sample.put_on(base, transformer, column.adapters)
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


def _save(output: Path, title: str, drawn: Drawn, *, seeds: int) -> Path:
    """Each picture, what it is (pictures.json), and the board; returns the board's path."""
    output.mkdir(parents=True, exist_ok=True)
    labels = [prompt for prompt in drawn.prompts for _ in range(seeds)]
    sources = [names for names in drawn.references for _ in range(seeds)]
    facts = []
    for y, (row, prompt, names) in enumerate(zip(drawn.rows, labels, sources, strict=True)):
        for x, (picture, column) in enumerate(zip(row, drawn.columns, strict=True)):
            name = f"{y:02d}-{x:02d}.png"
            picture.save(output / name)
            fact = {"file": name, "prompt": prompt, "column": column}
            facts.append(fact | ({"references": list(names)} if names else {}))
    listing = json.dumps(facts, indent=1, ensure_ascii=False)
    (output / "pictures.json").write_text(listing, encoding="utf-8")
    columns, rows = drawn.columns, drawn.rows
    if any(sources):
        columns = ["reference", *columns]
        rows = [[_side_by_side(names), *row] for names, row in zip(sources, rows, strict=True)]
    board(rows, columns=columns, labels=labels, title=title).save(output / "board.png")
    return output / "board.png"


def _side_by_side(names: Sequence[str]) -> Image.Image:
    """The references of a picture, equally tall; blank where it has none."""
    images = [pictures.load_rgb(Path(name)) for name in names] or [Image.new("RGB", (1, 1), PAPER)]
    tall = max(image.height for image in images)
    images = [image.resize((image.width * tall // image.height, tall)) for image in images]
    strip = Image.new("RGB", (sum(image.width for image in images), tall))
    at = 0
    for image in images:
        strip.paste(image, (at, 0))
        at += image.width
    return strip

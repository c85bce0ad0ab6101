"""What there is to say of a run's adapter in public, gathered from the run's folder.

Owns reading it and keeping private what is: paths of this machine, and captions unless asked. How
it is said is `card`'s, `sheets`' and `metadata`'s. Reads no base and needs no GPU.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from train.adapters import LAYOUTS, files
from train.adapters.export_run import CONFIG
from train.config import Config, reading
from train.errors import CheckpointError
from train.loading.base import NAMED_BASES
from train.loading.shapes import SHAPES
from train.publishing import licences, pictures, terms
from train.publishing.licences import Licence
from train.publishing.pictures import Shown
from train.resumption import PICTURES

RELEASED = {(s.width, s.double, s.single): name for name, s in SHAPES.items()}
"""Width, double and single blocks -> the released base that has them."""

PARTS = {"passed", "reasons", "checkpoint", "adapter", "transformer", "diffusers", "for"}
"""Of an export's certificate, that are needed here."""


@dataclass(frozen=True)
class Wishes:
    """What the publisher says; None takes the config's."""

    title: str | None = None
    author: str | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()
    tag_frequency: bool = False
    """Whether the captions' words may go into the file."""


@dataclass(frozen=True)
class Exported:
    """An adapter file of the run with its certificate, which holds for it."""

    path: Path
    layout: str
    certificate: dict[str, Any]
    metadata: dict[str, str]

    @property
    def loaders(self) -> tuple[str, ...]:
        """Of `certify.LOADERS`, those that it is for."""
        return tuple(self.certificate["for"])


@dataclass(frozen=True)
class Publication:
    """All that is said of an adapter."""

    run: Path
    config: Config
    wishes: Wishes
    exported: tuple[Exported, ...]
    """The one for both loaders first."""
    captions: dict[str, str]
    """Of the trained pictures, by set's number and name; private."""
    check: dict[str, Any] | None
    """The loss on fixed pictures at the published step, as in validation.jsonl."""
    shown: Shown
    terms: str | None
    """The text of the base's licence, if it could be had."""

    @property
    def name(self) -> str:
        """Of the run."""
        return self.config.name

    @property
    def title(self) -> str:
        """One line."""
        return _line(self.wishes.title or self.config.export.title or self.name)

    @property
    def author(self) -> str | None:
        """One line, if anybody is named."""
        given = self.wishes.author or self.config.export.author
        return _line(given) if given else None

    @property
    def description(self) -> str | None:
        """The publisher's own words, in whatever language."""
        given = self.wishes.description or self.config.export.description
        return given.strip() if given and given.strip() else None

    @cached_property
    def triggers(self) -> tuple[str, ...]:
        """Of all data sets, the main one's first."""
        found = (data.trigger for data in self.config.sets)
        return tuple(dict.fromkeys(trigger for trigger in found if trigger))

    @property
    def certificate(self) -> dict[str, Any]:
        """The first file's."""
        return self.exported[0].certificate

    @property
    def metadata(self) -> dict[str, str]:
        """The first file's, as exported."""
        return self.exported[0].metadata

    @property
    def workflows(self) -> list[Path]:
        """For ComfyUI, where the export has put any beside the files."""
        found = (e.path.parent.glob(f"{e.path.stem}.comfyui*.json") for e in self.exported)
        return sorted(path for paths in found for path in paths)

    @property
    def step(self) -> int:
        """After which the published weights were taken."""
        return self.certificate["checkpoint"]["step"]

    @property
    def revision(self) -> str | None:
        """Commit of the base on the hub."""
        return self.metadata.get("kindling.base_revision")

    @property
    def released(self) -> str | None:
        """The released base of this shape: dev, klein-4b, klein-9b."""
        shape = self.certificate["transformer"]
        return RELEASED.get((shape["width"], shape["double"], shape["single"]))

    @property
    def repository(self) -> str | None:
        """Of the hub: the base, or for a local folder the released base of its shape."""
        if self.revision is not None:
            return self.metadata["kindling.base"]
        return NAMED_BASES[self.released] if self.released else None

    @property
    def base(self) -> str:
        """The base in words, without this machine's paths."""
        base = self.metadata["kindling.base"]
        if self.revision is not None or base in NAMED_BASES:
            return base
        return Path(base).name

    @property
    def licence(self) -> Licence | None:
        """The base's; None if unknown."""
        return licences.of(self.metadata["kindling.base"], self.released)

    @property
    def pictures(self) -> tuple[int, ...]:
        """How many were trained, of each data set; empty if the run doesn't say."""
        counts = Counter(key.partition(":")[0] for key in self.captions)
        return tuple(counts[number] for number in sorted(counts, key=int))

    @property
    def unmeasured(self) -> list[tuple[str, str]]:
        """What nobody has measured, in English and Chinese."""
        found = []
        if self.check is None or not self.check["held_out"]:
            found.append(("the loss on pictures that weren't trained", "未参与训练的图片上的损失"))
        if self.check is None or self.check["drift"] is None:
            found.append(
                ("how far prompts without the trigger move", "不含触发词的提示词所受的影响")
            )
        return [
            *found,
            ("likeness, and how well prompts are obeyed", "相似度与提示词遵循程度"),
            ("strengths other than 1", "1 以外的强度"),
            (
                "ComfyUI itself: the file was checked against its loading rules, not run in it",
                "ComfyUI 实际运行：仅按其加载规则核对了文件，未在其中运行",
            ),
        ]


def gather(run: Path, wishes: Wishes, *, online: bool) -> Publication:
    """Everything about a run's adapter. online: whether the hub may be asked for the licence.

    Raises CheckpointError for what isn't a run with an exported, certified adapter.
    """
    if not (run / CONFIG).is_file():
        raise CheckpointError(
            f"{run}: not the folder of a run (it has no {CONFIG}). A run's folder is OUTPUT/NAME "
            "of its config, such as runs/demo."
        )
    config = reading.load(run / CONFIG)
    exported = _exported(run, config)
    first = exported[0]
    step = first.certificate["checkpoint"]["step"]
    average = first.metadata.get("kindling.weights", "").startswith("average (ema")
    shown = pictures.find(run, config, adapter=first.path, step=step, average=average)
    found = Publication(
        run=run,
        config=config,
        wishes=wishes,
        exported=exported,
        captions=_captions(run / PICTURES),
        check=_check(run / "validation.jsonl", step),
        shown=shown,
        terms=None,
    )
    return _with_terms(found, online=online)


def scrubbed(text: str, run: Path) -> str:
    """Without paths of this machine."""
    return text.replace(str(run.resolve()), run.name).replace(str(Path.home()), "~")


def _with_terms(found: Publication, *, online: bool) -> Publication:
    if found.licence is None:
        return found
    text = terms.find(
        found.licence,
        base=found.config.base.model,
        repository=found.repository,
        revision=found.revision,
        online=online,
    )
    return replace(found, terms=text)


def _exported(run: Path, config: Config) -> tuple[Exported, ...]:
    """The run's files, one a layout at most. Raises CheckpointError unless all are proven."""
    main = run / f"{config.name}.safetensors"
    if not main.is_file():
        raise CheckpointError(f"{main}: no adapter yet. `kindling export {run}` writes it.")
    found = [_proven(main, "diffusers", run)]
    for layout in LAYOUTS:
        path = run / f"{config.name}-{layout}.safetensors"
        if layout == "diffusers" or not path.is_file():
            continue
        other = _proven(path, layout, run)
        if other.certificate["checkpoint"] != found[0].certificate["checkpoint"]:
            raise CheckpointError(
                f"{path} is of another checkpoint than {main.name}. `kindling export {run} "
                f"--format diffusers,{layout}` writes both anew."
            )
        found.append(other)
    return tuple(found)


def _proven(path: Path, layout: str, run: Path) -> Exported:
    """A file whose certificate is of these bytes and passed. Raises CheckpointError."""
    again = f"`kindling export {run}" + ("`" if layout == "diffusers" else f" --format {layout}`")
    place = path.with_name(f"{path.stem}.certificate.json")
    try:
        certificate: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        digest = certificate["file"]["sha256"]
        if lacking := PARTS - certificate.keys():
            raise KeyError(*lacking)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{place}: no certificate of {path.name}. {again} writes it."
        ) from None
    if not certificate["passed"]:
        reasons = "\n".join(f"  {reason}" for reason in certificate["reasons"])
        raise CheckpointError(f"{path}: isn't published, as its certificate FAILED:\n{reasons}")
    if digest != files.file_hash(path):
        raise CheckpointError(
            f"{place}: is of another file than {path.name}, which has changed since. {again} "
            "writes both anew."
        )
    metadata = files.File(path).metadata
    if "kindling.base" not in metadata:
        raise CheckpointError(f"{path}: has lost its metadata. {again} writes it anew.")
    return Exported(path, layout, certificate, metadata)


def _captions(path: Path) -> dict[str, str]:
    try:
        rows: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
        return {key: str(row[1]) for key, row in rows.items()}
    except (OSError, ValueError, IndexError, AttributeError):
        return {}


def _check(path: Path, step: int) -> dict[str, Any] | None:
    """The last line of that step; a resumed run may have written it twice."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return next((row for row in reversed(rows) if row["step"] == step), None)


def _line(text: str) -> str:
    return " ".join(text.split())

"""Which records are trained, and on which the loss is checked.

Owns the decision for a run's data sets, by `validation`'s settings. How pictures are chosen by
their content is `holdout`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from data_tools import holdout, records
from data_tools.holdout import FEWEST, LARGEST_PART, Looks
from data_tools.records import Collection, Record
from train.config import Config, DataConfig
from train.errors import ConfigError, DataError, bullet_list

LOOKS = "looks.txt"
"""In the cache's folder: what pictures look like, by the sha256 of their files."""


@dataclass(frozen=True)
class Split:
    """A run's records, parted."""

    trained: list[Sequence[Record]]
    """Of each data set."""
    checked: list[Record]
    """What the loss is measured on; empty if nothing is."""
    held_out: bool
    """Whether `checked` are never trained."""
    checked_as: DataConfig
    """How `checked` are placed and shown: whole, unflipped, with their captions."""
    origin: str
    """Where `checked` come from, for the console."""
    digest: str | None = None
    """Of a folder of its own."""


def split(
    config: Config,
    collections: Sequence[Collection],
    *,
    proven: frozenset[str],
    memo: Path,
    accelerator: Accelerator,
) -> Split:
    """Part the data sets' records; every process gets the same.

    proven: see `records.read`. memo: the file of LOOKS. Only the first set, which is the subject,
    is ever held out of: ordinary pictures beside it would tell nothing of the subject. Raises
    ConfigError where the settings need more pictures than there are, and DataError for a picture
    that would be trained and held out.
    """
    choice = config.validation
    whole = [collection.records for collection in collections]
    data = config.data.model_copy(
        update={
            "resolution": max(config.data.resolutions),
            "repeats": 1,
            "flip": False,
            "caption_dropout": 0.0,
            "loss_weight": 1.0,
        }
    )
    if choice.pictures == "off":
        return Split(list(whole), [], False, data, "")

    def look(rows: Sequence[Record]) -> list[holdout.Look]:
        files = [(row.sha256, row.target) for row in rows]
        with accelerator.main_process_first():
            found = Looks(memo).of(files, progress=accelerator.is_main_process)
        return [found[row.sha256] for row in rows]

    if choice.path is not None:
        data = data.model_copy(update={"path": choice.path})
        own = records.read(data, proven=proven, progress=accelerator.is_main_process)
        return _of_folder(own, whole, look=look, data=data, most=choice.max_pictures)
    main = list(whole[0])
    if choice.pictures != "training":
        wanted = holdout.count(len(main), fraction=choice.fraction, most=choice.max_pictures)
        rows = [*main, *(row for others in whole[1:] for row in others)] if wanted else []
        digests = [row.sha256 for row in rows]
        groups = holdout.choose(digests, look(rows), own=len(main), wanted=wanted)
        if len(groups) >= FEWEST:
            held = {place for group in groups for place in group}
            kept = [row for place, row in enumerate(main) if place not in held]
            checked = [main[group[0]] for group in groups]  # a twin would count one look twice
            origin = f"{len(held)} of the {len(main)} pictures in {data.path}"
            return Split([kept, *whole[1:]], checked, True, data, origin)
        _needs_none(config, len(main))
    checked = _some(main, most=choice.max_pictures)
    origin = f"{len(checked)} of the {len(main)} pictures in {data.path}"
    return Split(list(whole), checked, False, data, origin)


def _needs_none(config: Config, pictures: int) -> None:
    """Raises ConfigError if a setting needs pictures that can't be spared."""
    asked = {
        "validation.pictures: held-out": config.validation.pictures == "held-out",
        "export.checkpoint: best": config.export.checkpoint == "best",
    }
    for setting, is_set in asked.items():
        if is_set:
            raise ConfigError(
                f"{setting} needs {FEWEST} pictures to hold out, not more than one in "
                f"{LARGEST_PART} and no near-duplicates of trained ones; {config.data.path} has "
                f"{pictures}. Add pictures, give validation.path, or remove the setting."
            )


def _of_folder(
    own: Collection,
    whole: Sequence[Sequence[Record]],
    *,
    look: Callable[[Sequence[Record]], list[holdout.Look]],
    data: DataConfig,
    most: int,
) -> Split:
    trained = [row for rows in whole for row in rows]
    digests = {row.sha256 for row in trained}
    if twice := [row.name for row in own.records if row.sha256 in digests]:
        title = f"{data.path}: these are trained too; take them out of one folder:"
        raise DataError(bullet_list(title, twice))
    checked = _some(own.records, most=most)
    origin = f"{len(checked)} of the {len(own.records)} pictures in {data.path}"
    rows = [*checked, *trained]
    if alike := holdout.twins(look(rows), own=len(checked)):
        names = ", ".join(checked[place].name for place in alike)
        origin += f"; near-duplicates of trained ones, which flatter: {names}"
    return Split(list(whole), checked, True, data, origin, own.digest)


def _some(rows: Sequence[Record], *, most: int) -> list[Record]:
    """At most so many, the same whatever their names and order."""
    return sorted(rows, key=lambda row: (holdout.rank(row.sha256), row.name))[:most]

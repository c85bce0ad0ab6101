"""`kindling inspect`: what training would make of a folder of pictures, before it starts.

Owns the command and the report's words for a console. What there is to say is `report`'s, the page
`page`'s; how the pictures are looked at is `looks`'.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

from pydantic import ValidationError

from data_tools import captions, folder, records
from data_tools.drafts import Fault
from data_tools.inspect import page, tokens
from data_tools.inspect.looks import Looks, of_masks
from data_tools.inspect.page import Thumbnails
from data_tools.inspect.report import MARKS, Report, Schedule, Tokens, build, facts
from data_tools.pictures import PictureError
from data_tools.records import Collection
from train.config import BaseConfig, DataConfig
from train.errors import ConfigError, UserError, bullet_list

SHOWN = 5
"""Names listed in full before the rest is counted."""

LISTED = ("soft", "dark", "bright", "cropped", "enlarged", "small", "truncated")
"""Marks that the console lists by name; the others have a place of their own."""


@dataclass(frozen=True)
class Settings:
    """What to inspect, and as what training would see it."""

    data: DataConfig
    schedule: Schedule
    base: BaseConfig | None
    """Whose tokenizer counts; without a config there is none."""


@dataclass(frozen=True)
class Outputs:
    """The files to write, None for those that aren't wanted."""

    html: Path | None
    json: Path | None

    def numbered(self, number: int) -> "Outputs":
        """Of the data set of that number, from 1: `x.html`, then `x-2.html`."""
        paths = (self.html, self.json)
        if number > 1:
            paths = (p and p.with_name(f"{p.stem}-{number}{p.suffix}") for p in paths)
        return Outputs(*paths)


def main(argv: Sequence[str] | None = None) -> int:
    """Report on a folder of pictures, or on all data sets of a config, each with files of its own
    (x.html, x-2.html, ...); exit status 0 if training could start with them, 2 if not."""
    options = _parser().parse_args(argv)
    sets = _settings(options)
    _check_outputs(options)
    outputs = Outputs(options.html, options.json)
    homes = [outputs.numbered(number).html for number in range(1, len(sets) + 1)]
    links = [(each.data.path, home.name) for each, home in zip(sets, homes, strict=True) if home]
    status = 0
    for number, settings in enumerate(sets, 1):
        if len(sets) > 1:
            print(f"{'' if number == 1 else chr(10)}Data set {number} of {len(sets)}")
        status = max(status, _report(settings, outputs.numbered(number), links=links))
    return status


def _report(settings: Settings, outputs: Outputs, *, links: page.Links) -> int:
    """Inspect a data set and write all that is wanted; the exit status."""
    try:
        with TemporaryFile() as spool:
            thumbnails = Thumbnails(spool) if outputs.html else None
            report = inspect(settings, thumbnails=thumbnails)
            print(text(report))
            if outputs.html and thumbnails:
                page.write(report, outputs.html, thumbnails=thumbnails, links=links)
        if outputs.json:
            _write_json(report, outputs.json)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if str(error.filename) not in map(str, filter(None, (outputs.html, outputs.json))):
            raise
        print(f"{error.filename}: can't be written ({error.strerror})", file=sys.stderr)
        return 2
    return 2 if report.failed else 0


def inspect(settings: Settings, *, thumbnails: Thumbnails | None = None) -> Report:
    """Read a folder and measure its pictures. Raises DataError if there is nothing to read."""
    looks = Looks(put_thumbnail=thumbnails.put if thumbnails else None)
    collection = records.survey(settings.data, probes=looks)
    collection, learnt = _masked(collection, settings.data, thumbnails)
    counts = Tokens("not counted: without --config there is no base to count for")
    if settings.base:
        counts = tokens.count(settings.base, collection.records.table["caption"])
    return build(
        collection,
        data=settings.data,
        schedule=settings.schedule,
        measures=looks.measures,
        tokens=counts,
        learnt=learnt,
    )


def _masked(
    collection: Collection, data: DataConfig, thumbnails: Thumbnails | None
) -> tuple[Collection, dict[str, float]]:
    """The collection with the faults of its masks, and what each mask lets through, by name."""
    if data.mask == "none":
        return collection, {}
    alpha = data.mask == "alpha"
    paths = {r.name: r.target if alpha else r.mask for r in collection.records}
    paths = {name: path for name, path in paths.items() if path}
    faults, learnt = list(collection.faults), {}
    for name, found in zip(paths, of_masks(paths.values(), alpha=alpha), strict=True):
        if isinstance(found, PictureError):
            faults.append(Fault(name, found.reason))
            continue
        learnt[name] = found.learnt
        if thumbnails:
            thumbnails.put(page.mask_of(name), found.thumbnail)
    faults.sort(key=lambda fault: folder.natural(fault.path))
    return replace(collection, faults=tuple(faults)), learnt


def text(report: Report) -> str:
    """The report for a console."""
    parts = [_head(report), _bucket_table(report), _captions(report), *_oddities(report)]
    faults = report.collection.faults
    if faults:
        skipped = report.data.bad_pictures == "skip" and not report.failed
        title = "Faults (these pictures will be skipped)" if skipped else "Faults (mend these)"
        parts.append(bullet_list(title, [f"{fault.path}: {fault.reason}" for fault in faults]))
    verdict = "Not ready for training." if report.failed else "Ready for training."
    return "\n\n".join(part for part in [*parts, verdict] if part)


def _head(report: Report) -> str:
    edits = sum(bool(row.record.references) for row in report.rows)
    extra = f", {edits} with references" if edits else ""
    masked = [row.learnt for row in report.rows if row.learnt is not None]
    if masked:
        extra += f", {len(masked)} masked ({sum(masked) / len(masked):.0%} is learnt on average)"
    return f"{report.data.path}: {_count(len(report.rows), 'usable picture')}{extra}"


def _bucket_table(report: Report) -> str:
    if not report.rows:
        return ""
    data, schedule = report.data, report.schedule
    title = f"Buckets at resolution {report.resolutions}, batch size {schedule.batch_size}"
    if data.repeats > 1:
        title += f", {data.repeats} repeats"
    rows = [("size", "pictures", "batches", "not full", "cut off", "scale")]
    for bucket in report.buckets:
        partial = " + ".join(map(str, bucket.partial))
        numbers = (str(bucket.pictures), str(bucket.batches), partial and f"({partial})")
        costs = (f"{bucket.crop:.0%}", f"{bucket.scale:.2f}")
        rows.append((str(bucket.geometry), *numbers, *costs))
    rows.append(("total", str(len(report.rows)), str(report.batches), "", "", ""))
    lines = [f"  {row[0]:<10}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    if report.epochs is not None:
        lines.append(f"  {schedule.steps} steps are {report.epochs:.1f} epochs on one device")
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _captions(report: Report) -> str:
    rows = [row.record for row in report.rows if row.record.caption]
    missing = len(report.rows) - len(rows)
    lines = [f"Captions: {len(rows)}" + (f", {missing} missing" if missing else "")]
    if rows:
        lengths = {row.name: captions.words(row.caption) for row in rows}
        low, high = (pick(lengths, key=lengths.__getitem__) for pick in (min, max))
        lines.append(f"  shortest {_count(lengths[low], 'word')} ({low})")
        lines.append(f"  longest {_count(lengths[high], 'word')} ({high})")
    if report.tokens.counts:
        longest = max(report.tokens.counts.values())
        lines.append(f"  at most {longest} of {report.tokens.limit} tokens, {report.tokens.note}")
    elif report.tokens.note:
        lines.append(f"  tokens {report.tokens.note}")
    if report.trigger:
        lacking = [row.record.name for row in report.marked.get("untriggered", [])]
        have = f"  {len(rows) - len(lacking)} of {len(rows)} have the trigger {report.trigger!r}"
        lines.append(have + (f"; not: {_names(lacking)}" if lacking else ""))
    shared = [report.names(group) for group in report.same_caption]
    lines += [f"  one caption for {_names(names)}" for names in shared[:SHOWN]]
    if len(shared) > SHOWN:
        lines.append(f"  … and {len(shared) - SHOWN} more captions that several pictures share")
    return "\n".join(lines)


def _oddities(report: Report) -> Iterable[str]:
    lines = [
        f"{MARKS[mark]}: {_names([row.record.name for row in report.marked[mark]])}"
        for mark in LISTED
        if mark in report.marked
    ]
    if lines:
        yield bullet_list("To look at", lines)
    if report.twins:
        lines = [_names(report.names(group)) for group in report.twins]
        yield bullet_list("The same picture more than once", lines)
    alike = [group for group in report.alike if group not in report.twins]
    if alike:
        yield bullet_list("Look alike", [_names(report.names(group)) for group in alike])
    groups: dict[str, list[str]] = defaultdict(list)
    for note in report.collection.notes:
        groups[note.text].append(note.path)
    if groups:
        order = Counter({note: len(paths) for note, paths in groups.items()}).most_common()
        yield bullet_list("Notes", [f"{note}: {_names(groups[note])}" for note, _ in order])


def _names(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _write_json(report: Report, path: Path) -> None:
    """A line for each item of a list: readable, and ten times as fast as json's own indenting."""

    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    with path.open("w", encoding="utf-8") as file:
        mark = "{"
        for key, value in facts(report).items():
            file.write(f"{mark}\n{dump(key)}: ")
            if isinstance(value, list) and value:
                file.write("[\n" + ",\n".join(map(dump, value)) + "\n]")
            else:
                file.write(dump(value))
            mark = ","
        file.write("\n}\n")


def _check_outputs(options: argparse.Namespace) -> None:
    """Before the work: that what will be written can be, and is no picture or caption."""
    for option, path, suffix in (
        ("--html", options.html, ".html"),
        ("--json", options.json, ".json"),
    ):
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            raise ConfigError(f"{option}: {path} must end in {suffix}")
        if not path.parent.is_dir():
            raise ConfigError(f"{option}: there is no folder {path.parent}; make it first")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kindling inspect", description=main.__doc__)
    parser.add_argument("images", nargs="?", help="folder of pictures; none: the config's")
    parser.add_argument("--config", type=Path, help="take the settings of this training config")
    parser.add_argument("--resolution", type=int, help="area of a bucket, as side of a square")
    parser.add_argument("--max-upscale", type=float, help="largest enlargement")
    parser.add_argument("--max-aspect", type=float, help="longest over shortest side of a bucket")
    parser.add_argument("--trigger", help="the word that every caption must have")
    parser.add_argument("--batch-size", type=int, help="pictures a batch")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the facts there, too")
    return parser


def _settings(options: argparse.Namespace) -> list[Settings]:
    """Of each data set: the config's settings, with what the command line sets.

    A folder on the command line stands for the config's first.
    """
    sets: dict[str, object] = {"path": options.images} if options.images else {}
    for name in ("resolution", "max_upscale", "max_aspect", "trigger"):
        if getattr(options, name) is not None:
            sets[name] = getattr(options, name)
    base, batch_size, accumulate, steps = None, 1, 1, None
    values: list[dict[str, object]] = [{}]
    if options.config:
        from train.config import reading

        config = reading.load(options.config)
        values, base = [data.model_dump() for data in config.sets], config.base
        train = config.train
        batch_size, accumulate, steps = train.batch_size, train.accumulate, train.steps
        if config.more_data:
            steps = None  # how they share them is the trainer's
        if options.images:
            del values[1:]
    elif not options.images:
        raise ConfigError("name a folder of pictures, or a config with --config")
    batch_size = batch_size if options.batch_size is None else options.batch_size
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1; got {batch_size}")
    try:
        data = [DataConfig.model_validate(each | sets) for each in values]
    except ValidationError as error:
        lines: dict[str, str] = {}
        for fault in error.errors():
            option = "--" + str(fault["loc"][0]).replace("_", "-") if fault["loc"] else "settings"
            lines.setdefault(option, f"{option}: {fault['msg']}")
        raise ConfigError("\n".join(lines.values())) from None
    schedule = Schedule(batch_size, accumulate, steps)
    return [Settings(each, schedule, base) for each in data]

"""`kindling inspect`: what training would make of a folder of pictures, before it starts.

Owns the report and its words. What is a fault is decided by `records`, what size by `buckets`.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from data_tools import buckets, captions, records
from data_tools.buckets import Plan
from data_tools.records import Collection, Record
from train.config import DataConfig
from train.errors import ConfigError, UserError, bullet_list

SHOWN = 5
"""Names listed in full before the rest is counted."""


@dataclass(frozen=True)
class Report:
    """A folder, its records' places in buckets, and what stands out."""

    data: DataConfig
    batch_size: int
    collection: Collection
    plan: Plan
    rows: list[Record]

    @property
    def failed(self) -> bool:
        """Whether training would stop at this folder."""
        faults = self.collection.faults
        skip = self.data.bad_pictures == "skip"
        return not self.rows or any(not (skip and fault.skippable) for fault in faults)

    def batches(self, pictures: int) -> int:
        """Batches an epoch takes from a bucket, the last one perhaps smaller."""
        return -(-pictures * self.data.repeats // self.batch_size)

    def same(self, key: str) -> list[list[str]]:
        """Groups of records that share `key`."""
        groups: dict[str, list[str]] = defaultdict(list)
        for row in self.rows:
            groups[getattr(row, key)].append(row.name)
        return [names for names in groups.values() if len(names) > 1]


def main(argv: Sequence[str] | None = None) -> int:
    """Report on a folder of pictures; exit status 0 if training could start with it, 2 if not."""
    options = _parser().parse_args(argv)
    try:
        data, batch_size = _settings(options)
        collection = records.survey(data)
        rows = list(collection.records)
        report = Report(data, batch_size, collection, buckets.plan(rows, data=data), rows)
        print(text(report))
        if options.json:
            options.json.write_text(json.dumps(facts(report), ensure_ascii=False, indent=2) + "\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{options.json}: can't be written ({error.strerror})", file=sys.stderr)
        return 2
    return 2 if report.failed else 0


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


def facts(report: Report) -> dict:
    """The report for programs."""
    collection = report.collection
    return {
        "path": report.data.path,
        "digest": collection.digest,
        "ready": not report.failed,
        "pictures": len(report.rows),
        "buckets": [
            asdict(bucket) | {"batches": report.batches(bucket.pictures)}
            for bucket in report.plan.buckets
        ],
        "records": [
            {"name": row.name, "caption": row.caption, "width": row.width, "height": row.height}
            | asdict(placement)
            for row, placement in zip(report.rows, report.plan.placements, strict=True)
        ],
        "duplicates": report.same("sha256"),
        "same_caption": report.same("caption"),
        "faults": [fault._asdict() for fault in collection.faults],
        "notes": [note._asdict() for note in collection.notes],
    }


def _head(report: Report) -> str:
    edits = sum(bool(row.references) for row in report.rows)
    extra = f", {edits} with references" if edits else ""
    return f"{report.data.path}: {_count(len(report.rows), 'usable picture')}{extra}"


def _bucket_table(report: Report) -> str:
    if not report.rows:
        return ""
    data = report.data
    title = f"Buckets at resolution {data.resolution}, batch size {report.batch_size}"
    if data.repeats > 1:
        title += f", {data.repeats} repeats"
    rows = [("size", "pictures", "batches", "cut off", "scale")]
    for bucket in report.plan.buckets:
        batches = report.batches(bucket.pictures)
        crop, scale = f"{bucket.crop:.0%}", f"{bucket.scale:.2f}"
        rows.append((str(bucket.geometry), str(bucket.pictures), str(batches), crop, scale))
    total = sum(report.batches(bucket.pictures) for bucket in report.plan.buckets)
    rows.append(("total", str(len(report.rows)), str(total), "", ""))
    lines = [f"  {row[0]:<10}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    return "\n".join([title, *(line.rstrip() for line in lines), *_costs(report)])


def _costs(report: Report) -> list[str]:
    """Records that pay more than the usual for their bucket. Cut off and scale are the largest."""
    places = list(zip(report.rows, report.plan.placements, strict=True))
    cropped = [row.name for row, place in places if place.crop > 0.1]
    enlarged = [row.name for row, place in places if place.scale > 1]
    full = buckets.MIN_FILL * min(report.data.resolutions) ** 2
    small = [
        row.name for row, place in places if place.geometry.width * place.geometry.height < full
    ]
    lines = []
    if cropped:
        lines.append(f"  lose over 10 % of their area: {_names(cropped)}")
    if enlarged:
        lines.append(f"  are enlarged: {_names(enlarged)}")
    if small:
        lines.append(f"  are too small for the full size: {_names(small)}")
    return lines


def _captions(report: Report) -> str:
    rows = [row for row in report.rows if row.caption]
    missing = len(report.rows) - len(rows)
    lines = [f"Captions: {len(rows)}" + (f", {missing} missing" if missing else "")]
    if rows:
        lengths = {row.name: captions.words(row.caption) for row in rows}
        low, high = (pick(lengths, key=lengths.__getitem__) for pick in (min, max))
        lines.append(f"  shortest {_count(lengths[low], 'word')} ({low})")
        lines.append(f"  longest {_count(lengths[high], 'word')} ({high})")
    trigger = (report.data.trigger or "").strip()
    if trigger:
        lacking = [r.name for r in rows if not captions.has_trigger(r.caption, trigger=trigger)]
        have = f"  {len(rows) - len(lacking)} of {len(rows)} have the trigger {trigger!r}"
        lines.append(have + (f"; not: {_names(lacking)}" if lacking else ""))
    lines += [f"  one caption for {_names(names)}" for names in report.same("caption") if rows]
    return "\n".join(lines)


def _oddities(report: Report) -> Iterable[str]:
    twins = report.same("sha256")
    if twins:
        yield bullet_list("The same picture more than once", [_names(names) for names in twins])
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kindling inspect", description=main.__doc__)
    parser.add_argument("images", nargs="?", help="folder of pictures; none: the config's")
    parser.add_argument("--config", type=Path, help="take the settings of this training config")
    parser.add_argument("--resolution", type=int, help="area of a bucket, as side of a square")
    parser.add_argument("--max-upscale", type=float, help="largest enlargement")
    parser.add_argument("--max-aspect", type=float, help="longest over shortest side of a bucket")
    parser.add_argument("--trigger", help="the word that every caption must have")
    parser.add_argument("--batch-size", type=int, help="pictures a batch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the facts there, too")
    return parser


def _settings(options: argparse.Namespace) -> tuple[DataConfig, int]:
    """The data section and the batch size: the config's, with what the command line sets."""
    sets: dict[str, object] = {"path": options.images} if options.images else {}
    for name in ("resolution", "max_upscale", "max_aspect", "trigger"):
        if getattr(options, name) is not None:
            sets[name] = getattr(options, name)
    base: dict[str, object] = {}
    batch_size = 1
    if options.config:
        from train import config_load

        config = config_load.load(options.config)
        base, batch_size = config.data.model_dump(), config.train.batch_size
    elif not options.images:
        raise ConfigError("name a folder of pictures, or a config with --config")
    batch_size = batch_size if options.batch_size is None else options.batch_size
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1; got {batch_size}")
    try:
        return DataConfig.model_validate(base | sets), batch_size
    except ValidationError as error:
        lines: dict[str, str] = {}
        for fault in error.errors():
            option = "--" + str(fault["loc"][0]).replace("_", "-") if fault["loc"] else "settings"
            lines.setdefault(option, f"{option}: {fault['msg']}")
        raise ConfigError("\n".join(lines.values())) from None


if __name__ == "__main__":
    sys.exit(main())

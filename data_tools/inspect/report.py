"""What is known of a data set: the rows, the buckets, what stands out. And the same as JSON.

Owns which pictures get which mark, and what an epoch will see. Decides nothing that training
decides: faults are `records`' and sizes `buckets`'. Prints and draws nothing.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from types import MappingProxyType

from data_tools import buckets, captions, examine
from data_tools.buckets import Geometry, Placement
from data_tools.examine import Measures
from data_tools.records import Collection, Record
from train.config import DataConfig

MARKS = {
    "duplicate": "the same file more than once",
    "alike": "look alike",
    "soft": "may be blurred",
    "dark": "a quarter or more is plain black",
    "bright": "a quarter or more is plain white",
    "enlarged": "enlarged",
    "small": "too small for the full size",
    "cropped": "over 10 % is cut off",
    "uncaptioned": "no caption",
    "repeated": "a caption that others have too",
    "untriggered": "the trigger isn't in the caption",
    "truncated": "the caption is too long and is cut off",
}
"""What can stand out in a picture or its caption, in the order of a report."""

COMMON = 200
"""Words and tags that are counted in a report, the most frequent."""

# words that say nothing of a picture
_STOP = frozenset(
    (
        *("a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "have", "his"),
        *("her", "in", "into", "is", "it", "its", "of", "on", "or", "that", "the", "their"),
        *("there", "this", "to", "was", "were", "while", "with"),
    )
)


@dataclass(frozen=True, slots=True)
class Row:
    """A record with all that is known of it."""

    record: Record
    placements: tuple[Placement, ...]
    """At each resolution."""
    measures: Measures
    tokens: int | None
    """Of the caption with its template; None where they weren't counted."""
    marks: tuple[str, ...]
    """Keys of MARKS."""
    learnt: float | None = None
    """With a mask: the share of the picture that it lets through."""

    @property
    def placement(self) -> Placement:
        """The largest."""
        return max(self.placements, key=lambda place: place.geometry.tokens)

    @property
    def effective(self) -> tuple[int, int]:
        """Width and height in pixels of the file's own that reach training: enlarging adds none."""
        geometry, scale = self.placement.geometry, max(1.0, self.placement.scale)
        return round(geometry.width / scale), round(geometry.height / scale)


@dataclass(frozen=True)
class BucketRow:
    """A size, and what an epoch sees of it."""

    geometry: Geometry
    pictures: int
    showings: int
    """Pictures times repeats."""
    batches: int
    partial: tuple[int, ...]
    """How many pictures are in each batch that isn't full."""
    crop: float
    """Largest fraction of a picture that is cut off."""
    scale: float
    """Largest enlargement."""


@dataclass(frozen=True)
class Schedule:
    """How training walks through the pictures."""

    batch_size: int = 1
    accumulate: int = 1
    steps: int | None = None


@dataclass(frozen=True)
class Tokens:
    """Tokens of each caption, or why there are none."""

    note: str
    """Whose tokens, or why they aren't counted."""
    limit: int = 0
    counts: dict[str, int] | None = None


@dataclass(frozen=True)
class Report:
    """A folder as training would see it."""

    data: DataConfig
    schedule: Schedule
    collection: Collection
    rows: list[Row]
    tokens: Tokens
    twins: list[list[int]]
    """Groups of rows with the same bytes."""
    alike: list[list[int]]
    """Groups of rows that look alike, twins among them."""
    same_caption: list[list[int]]

    @property
    def failed(self) -> bool:
        """Whether training would stop at this folder."""
        faults = self.collection.faults
        skip = self.data.bad_pictures == "skip"
        return not self.rows or any(not (skip and fault.skippable) for fault in faults)

    @property
    def resolutions(self) -> str:
        """As text."""
        return ", ".join(map(str, self.data.resolutions))

    @property
    def trigger(self) -> str:
        """The trigger, or nothing."""
        return (self.data.trigger or "").strip()

    @cached_property
    def marked(self) -> dict[str, list[Row]]:
        """The rows with each mark, in the order of MARKS; no empty ones."""
        found: dict[str, list[Row]] = {mark: [] for mark in MARKS}
        for row in self.rows:
            for mark in row.marks:
                found[mark].append(row)
        return {mark: rows for mark, rows in found.items() if rows}

    @cached_property
    def buckets(self) -> list[BucketRow]:
        """Fullest first."""
        size = self.schedule.batch_size
        groups: dict[Geometry, list[tuple[Record, Placement]]] = defaultdict(list)
        for row in self.rows:
            for place in row.placements:
                groups[place.geometry].append((row.record, place))
        table = []
        for geometry, members in groups.items():
            # a batch shares the sizes of its references, too
            counts = Counter(_reference_geometries(record) for record, _ in members)
            showings = [count * self.data.repeats for count in counts.values()]
            table.append(
                BucketRow(
                    geometry,
                    pictures=len(members),
                    showings=sum(showings),
                    batches=sum(-(-count // size) for count in showings),
                    partial=tuple(count % size for count in showings if count % size),
                    crop=max(place.crop for _, place in members),
                    scale=max(place.scale for _, place in members),
                )
            )
        return sorted(table, key=lambda row: (-row.pictures, row.geometry))

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return sum(bucket.batches for bucket in self.buckets)

    @property
    def epochs(self) -> float | None:
        """How often training goes through all pictures, on one device."""
        if self.schedule.steps is None or not self.batches:
            return None
        return self.schedule.steps * self.schedule.accumulate / self.batches

    def names(self, group: Iterable[int]) -> list[str]:
        """Of a group of rows."""
        return [self.rows[index].record.name for index in group]


def build(
    collection: Collection,
    *,
    data: DataConfig,
    schedule: Schedule,
    measures: dict[str, Measures],
    tokens: Tokens,
    learnt: Mapping[str, float] = MappingProxyType({}),
) -> Report:
    """Put together what was read (`collection`) and what was seen (`measures`, by sha256).

    learnt: by the name of the picture, what its mask lets through.
    """
    records = list(collection.records)
    seen = [measures[record.sha256] for record in records]
    each = len(data.resolutions)
    places = buckets.plan(records, data=data).placements
    twins = _groups(record.sha256 for record in records)
    alike = examine.alike(seen)
    same = _groups(record.caption or None for record in records)
    in_groups = {
        "duplicate": {index for group in twins for index in group},
        "alike": {index for group in alike for index in group},
        "repeated": {index for group in same for index in group},
    }
    rows = []
    for index, (record, look) in enumerate(zip(records, seen, strict=True)):
        here = places[index * each : (index + 1) * each]
        count = (tokens.counts or {}).get(record.caption)
        marks = {mark for mark, members in in_groups.items() if index in members}
        marks |= _marks(record, here, look, data)
        if count is not None and count > tokens.limit:
            marks.add("truncated")
        ordered = tuple(mark for mark in MARKS if mark in marks)
        rows.append(Row(record, here, look, count, ordered, learnt.get(record.name)))
    return Report(data, schedule, collection, rows, tokens, twins, alike, same)


def facts(report: Report) -> dict:
    """The report for programs."""
    collection = report.collection
    return {
        "path": report.data.path,
        "digest": collection.digest,
        "ready": not report.failed,
        "pictures": len(report.rows),
        "buckets": [asdict(bucket) for bucket in report.buckets],
        "epoch": {"batches": report.batches, "epochs": report.epochs},
        "tokens": {"note": report.tokens.note, "limit": report.tokens.limit or None},
        "records": [_record_facts(row) for row in report.rows],
        "duplicates": [report.names(group) for group in report.twins],
        "alike": [report.names(group) for group in report.alike],
        "same_caption": [report.names(group) for group in report.same_caption],
        "tags": dict(tags(report)),
        "words": dict(words(report)),
        "faults": [fault._asdict() for fault in collection.faults],
        "notes": [note._asdict() for note in collection.notes],
    }


def words(report: Report) -> list[tuple[str, int]]:
    """In how many captions each word is, the most frequent first.

    In lower case and without English function words. Scripts that put no spaces between words are
    counted by pairs of characters.
    """
    counts = Counter(word for row in report.rows for word in set(_words(row.record.caption)))
    return counts.most_common(COMMON)


def tags(report: Report) -> list[tuple[str, int]]:
    """In how many captions each part between commas is; nothing if captions aren't made of tags.

    They are if they have three such parts on average, of at most three words each.
    """
    lists = [_tags(row.record.caption) for row in report.rows if row.record.caption]
    parts = [tag for each in lists for tag in each]
    if not parts or len(parts) < 3 * len(lists):
        return []
    if sum(map(captions.words, parts)) > 3 * len(parts):
        return []
    return Counter(tag for each in lists for tag in set(each)).most_common(COMMON)


def _record_facts(row: Row) -> dict:
    record, look = row.record, asdict(row.measures)
    del look["colours"]
    return {
        "name": record.name,
        "caption": record.caption,
        "width": record.width,
        "height": record.height,
        "sha256": record.sha256,
        **asdict(row.placement),
        "placements": [asdict(place) for place in row.placements],
        "effective": row.effective,
        "tokens": row.tokens,
        "marks": row.marks,
        "learnt": row.learnt,
        "references": [path.name for path in record.references],
        **look,
        "phash": f"{row.measures.phash:016x}",
    }


def _marks(
    record: Record, places: Sequence[Placement], look: Measures, data: DataConfig
) -> set[str]:
    """What stands out in a record by itself."""
    trigger = (data.trigger or "").strip()
    full = [buckets.MIN_FILL * resolution**2 for resolution in data.resolutions]
    areas = [place.geometry.width * place.geometry.height for place in places]
    found = {
        "soft": look.soft,
        "dark": look.dark,
        "bright": look.bright,
        "enlarged": any(place.scale > 1 for place in places),
        "small": any(area < least for area, least in zip(areas, full, strict=True)),
        "cropped": any(place.crop > 0.1 for place in places),
        "uncaptioned": not record.caption,
        "untriggered": bool(trigger and record.caption)
        and not captions.has_trigger(record.caption, trigger=trigger),
    }
    return {mark for mark, is_so in found.items() if is_so}


def _reference_geometries(record: Record) -> tuple[object, ...]:
    """What records of one batch must share besides their bucket."""
    return tuple(buckets.reference_geometry(*size) for size in record.reference_sizes)


def _groups(keys: Iterable[str | None]) -> list[list[int]]:
    """Places of equal keys, where there are several; None is equal to nothing."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        if key is not None:
            places[key].append(index)
    return [group for group in places.values() if len(group) > 1]


def _words(caption: str) -> Sequence[str]:
    found: list[str] = []
    for word in re.findall(r"\w+(?:['’-]\w+)*", caption.casefold()):
        if not word.isascii() and captions.words(word) > 1 and "-" not in word:
            found += [word[i : i + 2] for i in range(len(word) - 1)]
        elif word not in _STOP and not word.isdigit():
            found.append(word)
    return found


def _tags(caption: str) -> list[str]:
    parts = (part.strip(" .") for part in re.split(r"[,;，、；]", caption.casefold()))
    return [part for part in parts if part]

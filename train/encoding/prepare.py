"""From a folder of pictures to examples in the cache: read, place, encode.

Owns which cache entries a run needs. After it, nothing looks at a picture again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from data_tools import buckets, captions, records
from data_tools.buckets import Geometry, reference_geometry
from data_tools.records import Collection, Record
from train import sample
from train.config import Config, DataConfig
from train.data import Example, Rules
from train.encoding import encode, encode_text
from train.encoding.cache import DIGESTS, Cache, FileDigests, key
from train.encoding.encode import Keys, Mask, Picture
from train.loading.base import Base
from train.validation import split
from train.validation.split import Split
from train.validation.validate import Trial

PROVEN = "decoded.txt"
"""In the cache's folder: sha256 of pictures that were decoded in full, so once is enough."""


@dataclass(frozen=True)
class PreparedSet:
    """One data set, read and placed. `collection` is all of it, `plan` and `examples` what is
    trained.
    """

    data: DataConfig
    collection: Collection
    plan: buckets.Plan
    examples: list[Example]
    pictures: int
    """Trained ones; at several resolutions each is several examples."""


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data."""

    sets: tuple[PreparedSet, ...]
    cache: Cache
    keys: Keys
    encoded: int
    """Entries that this start had to make, in all processes; 0 means no encoder was loaded."""
    truncated: dict[str, tuple[int, int]]
    """Captions and prompts that were cut: text -> (its tokens, the limit)."""
    read_at: float
    """When the pictures had been read and encoding began, Unix seconds."""
    trial: Trial | None
    """What the loss is checked on."""
    trial_digest: str | None
    """Of pictures and captions that only `trial` has."""

    @property
    def examples(self) -> list[Example]:
        """Of all sets, in their order."""
        return [example for one in self.sets for example in one.examples]

    @property
    def digest(self) -> str:
        """Of all pictures and captions, held-out ones included."""
        digests = [one.collection.digest for one in self.sets]
        digests += [self.trial_digest] if self.trial_digest else []
        return digests[0] if len(digests) == 1 else key(kind="data", sets=tuple(digests))


def prepare(config: Config, base: Base, *, accelerator: Accelerator) -> Prepared:
    """Read the data sets and encode what the cache lacks, each process its share.

    Raises DataError for pictures and captions that can't be used.
    """
    main = accelerator.is_main_process
    cache = Cache(Path(config.cache))
    proven = cache.root / PROVEN
    for references in config.preview.references:
        sample.size_of(references, data=config.data)  # hours before they are drawn
    collections = [records.read(data, proven=_lines(proven), progress=main) for data in config.sets]
    parts = split.split(
        config,
        collections,
        proven=frozenset(_lines(proven)),
        memo=cache.root / split.LOOKS,
        accelerator=accelerator,
    )
    read_at = time.time()
    if main:
        _add_lines(proven, {digest for one in collections for digest in _digests(one)})
    with accelerator.main_process_first():
        digests = FileDigests(cache.root / DIGESTS)
        keys = Keys.of(base, digests=digests, settings=config.encode)
    layouts = [_layout(rows, data) for rows, data in zip(parts.trained, config.sets, strict=True)]
    checked = _layout(parts.checked, parts.checked_as) if parts.checked else None
    texts = [record.caption for collection in collections for record in collection.records]
    texts += [record.caption for record in parts.checked]
    neutral = _neutral(config) if checked else []
    prompts = list(dict.fromkeys([*texts, "", *config.preview.texts, *neutral]))
    encoded = _encode(
        base,
        [shown for layout in [*layouts, checked] if layout for shown in layout.shown],
        prompts,
        keys=keys,
        cache=cache,
        accelerator=accelerator,
    )
    return Prepared(
        tuple(
            PreparedSet(
                data, collection, layout.plan, _examples(layout, data, keys=keys), len(rows)
            )
            for data, collection, layout, rows in zip(
                config.sets, collections, layouts, parts.trained, strict=True
            )
        ),
        cache=cache,
        keys=keys,
        encoded=encoded,
        truncated=encode_text.truncated(prompts, keys=keys, cache=cache),
        read_at=read_at,
        trial=checked and _trial(checked, parts, neutral=neutral, keys=keys),
        trial_digest=parts.digest,
    )


def _neutral(config: Config) -> list[str]:
    """The neutral prompts but those of the default ones that happen to have a trigger."""
    triggers = [data.trigger for data in config.sets if data.trigger]
    return [
        prompt
        for prompt in config.validation.neutral_prompts
        if not any(captions.has_trigger(prompt, trigger=trigger) for trigger in triggers)
    ]


def _trial(layout: "Layout", parts: Split, *, neutral: list[str], keys: Keys) -> Trial:
    examples = _examples(layout, parts.checked_as, keys=keys)
    names = tuple(keys.prompt(prompt) for prompt in neutral)
    sources = {record.caption: record.caption_source for record in parts.checked}
    sources |= dict.fromkeys(neutral, "neutral prompt")
    return Trial(tuple(examples), parts.held_out, names, sources, parts.origin)


@dataclass(frozen=True)
class Shown:
    """A record at one resolution, as it is to be encoded: its target and references, its mask."""

    record: Record
    pictures: list[Picture]
    mask: Mask | None
    flip: bool
    """Mirrored, too."""


@dataclass(frozen=True)
class Layout:
    """A data set's records with their sizes."""

    plan: buckets.Plan
    shown: list[Shown]


def _layout(found: Sequence[Record], data: DataConfig) -> Layout:
    plan = buckets.plan(found, data=data)
    rows = [record for record in found for _ in data.resolutions]
    shown = [
        Shown(
            record,
            _pictures(record, placement.geometry),
            _mask(record, placement.geometry, data=data),
            flip=data.flip,
        )
        for record, placement in zip(rows, plan.placements, strict=True)
    ]
    return Layout(plan, shown)


def _encode(
    base: Base,
    shown: list[Shown],
    prompts: list[str],
    *,
    keys: Keys,
    cache: Cache,
    accelerator: Accelerator,
) -> int:
    """Make the entries that the cache lacks, each process its share; how many those were in all."""
    share = (accelerator.process_index, accelerator.num_processes)
    pictures = [picture for one in shown for picture in one.pictures]
    pictures += [replace(p, flip=True) for one in shown if one.flip for p in one.pictures]
    masks = [one.mask for one in shown if one.mask]
    masks += [replace(one.mask, flip=True) for one in shown if one.mask and one.flip]
    device = accelerator.device
    encoded = encode.encode_masks(masks, keys=keys, cache=cache, share=share)
    encoded += encode.encode_pictures(
        base, pictures, keys=keys, cache=cache, device=device, share=share
    )
    encoded += encode_text.encode_prompts(
        base, prompts, keys=keys, cache=cache, device=device, share=share
    )
    return sum(gather_object([encoded]))  # waits for everyone too


def _digests(collection: Collection) -> set[str]:
    """Of all pictures of all records, references included."""
    rows = collection.records
    return {sha256 for row in rows for sha256 in (row.sha256, *row.reference_sha256)}


def _lines(path: Path) -> set[str]:
    return set(path.read_text(encoding="utf-8").split()) if path.exists() else set()


def _add_lines(path: Path, lines: set[str]) -> None:
    """Append what the file lacks; a line that a kill cut short matches nothing and does no harm."""
    new = sorted(lines - _lines(path))
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in ["", *new]))


def _pictures(record: Record, geometry: Geometry) -> list[Picture]:
    """Target and references, as they are to be encoded."""
    references = zip(
        record.references, record.reference_sha256, record.reference_sizes, strict=True
    )
    return [
        Picture(record.target, record.sha256, geometry),
        *(Picture(path, sha256, reference_geometry(*size)) for path, sha256, size in references),
    ]


def _mask(record: Record, geometry: Geometry, *, data: DataConfig) -> Mask | None:
    if data.mask == "alpha":
        return Mask(record.target, record.sha256, geometry, alpha=True)
    if record.mask is None:
        return None
    assert record.mask_sha256 is not None
    return Mask(record.mask, record.mask_sha256, geometry, alpha=False)


def _examples(layout: Layout, data: DataConfig, *, keys: Keys) -> list[Example]:
    rules = Rules(data.caption_dropout, data.loss_weight, data.mask_floor)
    return [_example(shown, data, rules=rules, keys=keys) for shown in layout.shown]


def _example(shown: Shown, data: DataConfig, *, rules: Rules, keys: Keys) -> Example:
    pictures, mask = shown.pictures, None
    if shown.mask:
        mirrored = keys.mask(replace(shown.mask, flip=True)) if shown.flip else None
        mask = (keys.mask(shown.mask), mirrored)
    flipped = [replace(picture, flip=True) for picture in pictures]
    return Example(
        name=shown.record.name,
        pictures=tuple(keys.picture(picture) for picture in pictures),
        mirrored=tuple(keys.picture(picture) for picture in flipped) if shown.flip else None,
        text=keys.prompt(shown.record.caption),
        geometry=tuple((p.geometry.width, p.geometry.height) for p in pictures),
        rules=rules,
        repeats=data.repeats * shown.record.repeats,
        mask=mask,
    )

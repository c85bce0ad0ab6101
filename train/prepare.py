"""From a folder of pictures to examples in the cache: read, place, encode.

Owns which cache entries a run needs. After it, nothing looks at a picture again.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from data_tools import buckets, records
from data_tools.buckets import Geometry
from data_tools.records import Collection, Record
from train import encode, encode_text
from train.base import Base
from train.cache import DIGESTS, Cache, FileDigests
from train.config import PIXEL_MULTIPLE, Config
from train.data import Example
from train.encode import Keys, Picture
from train.errors import DataError, bullet_list

REFERENCE_AREA = 1024 * 1024
"""Pixels of a reference picture at most, as in Flux2Pipeline."""

PROVEN = "decoded.txt"
"""In the cache's folder: sha256 of pictures that were decoded in full, so once is enough."""

REFERENCE_SIDE = 64
"""Pixels of its sides at least, as in Flux2Pipeline."""


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data."""

    collection: Collection
    plan: buckets.Plan
    examples: list[Example]
    cache: Cache
    keys: Keys
    encoded: int
    """Entries that this start had to make, in all processes; 0 means no encoder was loaded."""
    truncated: dict[str, tuple[int, int]]
    """Captions and prompts that were cut: text -> (its tokens, the limit)."""
    read_at: float
    """When the pictures had been read and encoding began, Unix seconds."""


def prepare(config: Config, base: Base, *, accelerator: Accelerator) -> Prepared:
    """Read the data set and encode what the cache lacks, each process its share.

    Raises DataError for pictures and captions that can't be used.
    """
    main = accelerator.is_main_process
    cache = Cache(Path(config.cache))
    proven = cache.root / PROVEN
    collection = records.read(config.data, proven=_lines(proven), progress=main)
    _check_references(collection)
    plan = buckets.plan(collection.records, data=config.data)
    read_at = time.time()
    if main:
        _add_lines(proven, _digests(collection))
    with accelerator.main_process_first():
        digests = FileDigests(cache.root / DIGESTS)
        keys = Keys.of(base, digests=digests, settings=config.encode)
    shown = [
        _pictures(record, placement.geometry)
        for record, placement in zip(collection.records, plan.placements, strict=True)
    ]
    wanted = [picture for pictures in shown for picture in pictures]
    if config.data.flip:
        wanted += [_mirrored(picture) for picture in wanted]
    captions = list(dict.fromkeys(record.caption for record in collection.records))
    prompts = list(dict.fromkeys([*captions, "", *config.preview.prompts]))
    share = (accelerator.process_index, accelerator.num_processes)
    device = accelerator.device
    encoded = encode.encode_pictures(
        base, wanted, keys=keys, cache=cache, device=device, share=share
    ) + encode_text.encode_prompts(
        base, prompts, keys=keys, cache=cache, device=device, share=share
    )
    encoded = sum(gather_object([encoded]))  # waits for everyone too
    return Prepared(
        collection,
        plan,
        examples=[
            _example(record, pictures, keys=keys, flip=config.data.flip)
            for record, pictures in zip(collection.records, shown, strict=True)
        ],
        cache=cache,
        keys=keys,
        encoded=encoded,
        truncated=encode_text.truncated(prompts, keys=keys, cache=cache),
        read_at=read_at,
    )


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


def reference_geometry(width: int, height: int) -> Geometry:
    """Size of a reference picture: at most REFERENCE_AREA, sides cut to multiples of 16."""
    assert min(width, height) >= REFERENCE_SIDE
    scale = min(1.0, math.sqrt(REFERENCE_AREA / (width * height)))
    sides = (int(side * scale) // PIXEL_MULTIPLE * PIXEL_MULTIPLE for side in (width, height))
    return Geometry(*sides)


def _check_references(collection: Collection) -> None:
    small = [
        f"{record.name}: its reference {path.name} is {width}x{height}"
        for record in collection.records
        for path, (width, height) in zip(record.references, record.reference_sizes, strict=True)
        if min(width, height) < REFERENCE_SIDE
    ]
    if small:
        title = f"references need {REFERENCE_SIDE} pixels a side; give larger ones:"
        raise DataError(bullet_list(title, small))


def _pictures(record: Record, geometry: Geometry) -> list[Picture]:
    """Target and references, as they are to be encoded."""
    references = zip(
        record.references, record.reference_sha256, record.reference_sizes, strict=True
    )
    return [
        Picture(record.target, record.sha256, geometry),
        *(Picture(path, sha256, reference_geometry(*size)) for path, sha256, size in references),
    ]


def _mirrored(picture: Picture) -> Picture:
    return Picture(picture.path, picture.sha256, picture.geometry, flip=True)


def _example(record: Record, pictures: list[Picture], *, keys: Keys, flip: bool) -> Example:
    return Example(
        name=record.name,
        pictures=tuple(keys.picture(picture) for picture in pictures),
        mirrored=tuple(keys.picture(_mirrored(p)) for p in pictures) if flip else None,
        text=keys.prompt(record.caption),
        geometry=tuple((p.geometry.width, p.geometry.height) for p in pictures),
    )

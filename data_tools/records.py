"""A folder to records: each a target picture, its caption, and the references of an edit.

Owns what a data set is, and the verdict on it: `survey` looks at everything and collects what is
wrong, `read` stops if anything is. Reads the folder and never writes to it. Doesn't make pixels
(`pictures`) and doesn't choose sizes (`buckets`), but asks both whether a picture can be used.

The records are held as a `datasets.Dataset` (Arrow): a hundred thousand cost some 30 MB.
"""

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, overload

from tqdm import tqdm

from data_tools import buckets, captions, folder, pictures, sources, workers
from data_tools.captions import TextError
from data_tools.pictures import PictureError, Probe
from data_tools.sources import Draft, Fault, Note
from train.config import DataConfig
from train.errors import DataError, bullet_list

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Record:
    """One thing to learn. Sizes in pixels, upright."""

    target: Path
    references: tuple[Path, ...]
    caption: str
    """As it is trained: trigger included."""
    name: str
    """The target's path relative to the folder, with forward slashes."""
    caption_source: str
    """Where the caption comes from, for messages: a relative path, maybe with a line number."""
    width: int
    height: int
    sha256: str
    """Of the target file's bytes."""
    reference_sha256: tuple[str, ...] = ()
    reference_sizes: tuple[tuple[int, int], ...] = ()
    mask: Path | None = None
    """Grey picture of the target's size, white where it is learnt."""
    mask_sha256: str | None = None
    repeats: int = 1
    """How often an epoch shows it, on top of data.repeats."""


class Records(Sequence[Record]):
    """Records in their order, out of an Arrow table."""

    def __init__(self, table: "datasets.Dataset", *, root: Path) -> None:
        self.table = table
        self._root = root

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._record(self.table[index])

    def __iter__(self) -> Iterator[Record]:
        for batch in self.table.iter(batch_size=1000):  # one by one costs ten times as much
            columns = dict(batch)
            for values in zip(*columns.values(), strict=True):
                yield self._record(dict(zip(columns, values, strict=True)))

    def _record(self, row: dict) -> Record:
        return Record(
            target=self._root / row["name"],
            references=tuple(self._root / name for name in row["references"]),
            caption=row["caption"],
            name=row["name"],
            caption_source=row["caption_source"],
            width=row["width"],
            height=row["height"],
            sha256=row["sha256"],
            reference_sha256=tuple(row["reference_sha256"]),
            reference_sizes=tuple((w, h) for w, h in row["reference_sizes"]),
            mask=self._root / row["mask"] if row["mask"] else None,
            mask_sha256=row["mask_sha256"],
            repeats=row["repeats"],
        )


@dataclass(frozen=True)
class Collection:
    """A folder as read."""

    records: Records
    faults: tuple[Fault, ...]
    """What can't be used, in natural order. From `read`: the pictures that were skipped."""
    notes: tuple[Note, ...]
    """What is odd but may be meant."""
    digest: str
    """sha256 over contents in order: pictures, captions, references. Not over names."""


def read(
    data: DataConfig, *, proven: Container[str] = frozenset(), progress: bool = True
) -> Collection:
    """The records of a folder, all fit for training.

    proven: sha256 of pictures known to decode, which are then only hashed, not decoded again.
    Raises one DataError that lists every fault; with bad_pictures: skip, unfit pictures are left
    out instead and stay listed in `faults`.
    """
    collection = survey(data, proven=proven, progress=progress)
    grave = [
        fault for fault in collection.faults if data.bad_pictures == "error" or not fault.skippable
    ]
    if not grave and len(collection.records):
        return collection
    faults = grave or collection.faults
    lines = [f"{fault.path}: {fault.reason}" for fault in faults]
    if not grave:
        title = f"{data.path}: no picture is left; these can't be used:"
    elif all(fault.skippable for fault in grave):
        title = f"{data.path}: mend or remove these, or set data.bad_pictures to skip:"
    else:
        title = f"{data.path}: these must be mended first:"
    raise DataError(bullet_list(title, lines))


def survey(
    data: DataConfig,
    *,
    proven: Container[str] = frozenset(),
    progress: bool = True,
    probes: Callable[[Sequence[Path]], Iterable[Probe | PictureError]] | None = None,
) -> Collection:
    """Everything about a folder, with its faults collected. A record stays in if only its caption
    is at fault, with the caption as it is. Raises DataError if there is no folder or no picture.

    probes: looks at all pictures, in their order, in place of `pictures.probe`; for who wants more
    of them than a record has.
    """
    root = Path(data.path)
    found, gathered = sources.gather(root)
    if not found.pictures and not gathered.drafts and not gathered.faults:
        raise DataError(sources.nothing(root, found))
    names = {name: None for draft in gathered.drafts for name in (draft.name, *draft.references)}
    faults, notes = list(gathered.faults), list(gathered.notes)
    masked = {draft.name: draft.mask for draft in gathered.drafts if draft.mask}
    if data.mask != "files":
        text = "a mask, not used: data.mask is not 'files'"
        notes += [Note(name, text) for name in dict.fromkeys(masked.values())]
        masked = {}
    names |= dict.fromkeys(masked.values())
    look = probes or partial(_probe_all, proven=proven)
    probed = _probed(root, list(names), look, progress=progress)
    for name, seen in probed.items():
        if isinstance(seen, PictureError):
            faults.append(Fault(name, seen.reason, skippable=True))
        else:
            notes += [Note(name, text) for text in seen.notes]
    records = [
        record
        for draft in gathered.drafts
        if (record := _record(draft, probes=probed, masked=masked, data=data, faults=faults))
    ]
    return Collection(
        Records(_table(records, root=root), root=root),
        tuple(sorted(faults, key=lambda fault: folder.natural(fault.path))),
        tuple(sorted(notes, key=lambda note: folder.natural(note.path))),
        _digest(records),
    )


def _probed(
    root: Path,
    names: Sequence[str],
    look: Callable[[Sequence[Path]], Iterable[Probe | PictureError]],
    *,
    progress: bool,
) -> dict[str, Probe | PictureError]:
    # `_table` needs it: over a second of work, which the pictures leave a core for
    Thread(target=import_module, args=("datasets",)).start()
    found = tqdm(
        look([root / name for name in names]),
        total=len(names),
        desc="check pictures",
        delay=2,
        disable=not progress,
    )
    return dict(zip(names, found, strict=True))


def _probe_all(paths: Sequence[Path], *, proven: Container[str]) -> Iterator[Probe | PictureError]:
    def look(path: Path) -> Probe | PictureError:
        try:
            return pictures.probe(path, proven=proven)
        except PictureError as error:
            return error

    return workers.ordered(look, paths)


def _record(
    draft: Draft,
    *,
    probes: dict[str, Probe | PictureError],
    masked: dict[str, str],
    data: DataConfig,
    faults: list[Fault],
) -> Record | None:
    """A draft whose pictures can be used, else None; what is wrong with it goes to `faults`."""
    target = _fit_for_training(draft, probes=probes, data=data, faults=faults)
    caption = draft.caption
    try:
        caption = captions.complete(caption, data=data)
    except TextError as error:
        where, hint = (
            (draft.source, "") if caption else (draft.name, f"; write it in {draft.source}")
        )
        faults.append(Fault(where, f"{error}{hint}", skippable=target is None))
    if target is None:
        return None
    mask = None
    if name := masked.get(draft.name):
        mask = _fitting_mask(name, target, draft=draft, probes=probes, faults=faults)
        if mask is None:
            return None
    references = [probe for n in draft.references if isinstance(probe := probes[n], Probe)]
    return Record(
        target=target.path,
        references=tuple(probe.path for probe in references),
        caption=caption,
        name=draft.name,
        caption_source=draft.source,
        width=target.width,
        height=target.height,
        sha256=target.sha256,
        reference_sha256=tuple(probe.sha256 for probe in references),
        reference_sizes=tuple((probe.width, probe.height) for probe in references),
        mask=mask and mask.path,
        mask_sha256=mask and mask.sha256,
        repeats=draft.repeats,
    )


def _fitting_mask(
    name: str,
    target: Probe,
    *,
    draft: Draft,
    probes: dict[str, Probe | PictureError],
    faults: list[Fault],
) -> Probe | None:
    """The mask's probe, if it can be read and is of the picture's size."""
    mask = probes[name]
    if isinstance(mask, PictureError):
        faults.append(Fault(draft.name, f"its mask {name} can't be used", skippable=True))
        return None
    if (mask.width, mask.height) != (target.width, target.height):
        sizes = f"{mask.width}x{mask.height}, the picture {target.width}x{target.height}"
        faults.append(Fault(name, f"a mask of another size than its picture: {sizes}"))
        return None
    return mask


def _fit_for_training(
    draft: Draft,
    *,
    probes: dict[str, Probe | PictureError],
    data: DataConfig,
    faults: list[Fault],
) -> Probe | None:
    """The target, if it, its size and its references will do. Unreadable files are noted before."""
    for name in draft.references:
        if fault := _fault_of_reference(probes[name]):
            faults.append(Fault(draft.name, f"its reference {name} {fault}", skippable=True))
            return None
    target = probes[draft.name]
    if isinstance(target, PictureError):
        return None
    try:
        buckets.plan([target], data=data)
    except DataError as error:
        faults.append(Fault(draft.name, str(error), skippable=True))
        return None
    return target


def _fault_of_reference(probe: Probe | PictureError) -> str:
    if isinstance(probe, PictureError):
        return "can't be used"
    return buckets.reference_fault(probe.width, probe.height)


def _table(records: Sequence[Record], *, root: Path) -> "datasets.Dataset":
    from datasets import Dataset, Features, List, Value

    text, size = Value("string"), Value("int32")
    features = Features(
        {
            "name": text,
            "caption": text,
            "caption_source": text,
            "width": size,
            "height": size,
            "sha256": text,
            "references": List(text),
            "reference_sha256": List(text),
            "reference_sizes": List(List(size, length=2)),
            "mask": text,
            "mask_sha256": text,
            "repeats": size,
        }
    )
    columns = {name: [getattr(record, name) for record in records] for name in features}
    columns["references"] = [
        [path.relative_to(root).as_posix() for path in record.references] for record in records
    ]
    columns["mask"] = [r.mask and r.mask.relative_to(root).as_posix() for r in records]
    return Dataset.from_dict(columns, features=features)


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256(b"kindling records 1\n")
    for record in records:
        facts = [record.sha256, record.caption, record.reference_sha256]
        facts += [record.mask_sha256] if record.mask_sha256 else []
        facts += [record.repeats] if record.repeats != 1 else []  # digests of before stay valid
        digest.update(json.dumps(facts, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()

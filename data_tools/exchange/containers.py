"""Parquet files, saved `datasets` and data sets on the hub, as samples; and to parquet.

Owns columns: which is the picture, the caption, the references, the mask. `datasets` streams them
all, so nothing is cached or held in memory as a whole, and no code of a data set is ever run.
Pictures stay the bytes that they are. A row that names a file instead of holding bytes is refused,
as a stranger's file could name any file of this machine; only files of the same hub repository are
fetched.
"""

import itertools
import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from data_tools import captions, drafts, formats, tables
from data_tools.captions import TextError
from data_tools.drafts import Draft
from data_tools.exchange import samples
from data_tools.exchange.samples import File, Sample
from train.errors import DataError

if TYPE_CHECKING:
    import datasets

HUB = "hf:"
ROW_GROUP = 64 << 20
"""Bytes of pictures in a row group of the parquet files that we write: what a reader holds."""


@dataclass(frozen=True)
class Columns:
    """Which columns (in a tar: fields) to take; None means to look for the usual ones."""

    image: str | None = None
    text: str | None = None
    """"-" means none."""
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows that were opened, with their columns chosen."""

    rows: "datasets.IterableDataset"
    image: str
    text: str | None
    references: tuple[str, ...]
    mask: str | None
    hub: str | None
    """The repository that files may be fetched from."""
    ignored: set[str] = field(default_factory=set)
    """Columns that are left behind; grows while rows are read."""


def open_table(source: str, *, split: str | None, subset: str | None, columns: Columns) -> Table:
    """Raises DataError if it can't be opened, or if it isn't clear which column is which."""
    try:
        rows, hub = _load(source, split=split, subset=subset)
        features = dict(rows.features or next(iter(rows), {}))
    except Exception as error:  # datasets and pyarrow raise whatever foreign bytes lead them to
        raise _unreadable(source, error) from None
    names = list(features)
    image = columns.image or _only(source, _pictures(features), names, "picture", "--image")
    text: str | None = columns.text
    if text is None:
        usual = [name for name in ("text", "caption") if name in names]
        text = _only(source, usual, names, "caption", "--text (or '--text -' for none)")
    text = None if text == "-" else text
    references = columns.references or (("references",) if "references" in names else ())
    for name in (image, text, *references):
        if name is not None and name not in names:
            raise DataError(f"{source}: no column {name!r}; there are {', '.join(names)}")
    mask = "mask" if "mask" in names and "mask" in _pictures(features, lists=True) else None
    taken = {image, text, mask, *references}
    others = [*_pictures(features, lists=True), *(n for n in ("text", "caption") if n in names)]
    return Table(rows, image, text, references, mask, hub, {n for n in others if n not in taken})


def read(
    table: Table, source: str, *, skip: int, names: Container[str]
) -> Iterator[tuple[str, Sample | TextError]]:
    """Each row with its number, from 1, as a sample or what is wrong with it. Raises DataError.

    names: those that are taken, which may grow meanwhile; a picture without a file_name gives way.
    """
    rows = iter(table.rows.skip(skip) if skip else table.rows)
    for number in itertools.count(skip + 1):
        try:
            row = next(rows, None)
        except Exception as error:  # as above
            raise _unreadable(f"{source}, behind row {number - 1}", error) from None
        if row is None:
            return
        try:
            yield f"row {number}", _sample(row, number, table, names)
        except TextError as error:
            yield f"row {number}", error


def write(path: Path, root: Path, found: list[Draft]) -> None:
    """A folder's drafts with their pictures' bytes, as one parquet file that `datasets` knows."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, List, Value

    features = {"file_name": Value("string"), "image": Image(), "text": Value("string")}
    if any(draft.references for draft in found):
        features["references"] = List(Image())
    if any(draft.mask is not None for draft in found):
        features["mask"] = Image()
    if any(draft.repeats != 1 for draft in found):
        features["repeats"] = Value("int32")
    if any(draft.extra for draft in found):
        features["extra"] = Value("string")
    schema = Features(features).arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        rows, size = [], 0
        for draft in found:
            sample = samples.load(root, draft)
            rows.append({key: value for key, value in _row(sample).items() if key in features})
            size += sum(len(file.data) for file in sample.files)
            if size >= ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _row(sample: Sample) -> dict[str, object]:
    draft = sample.draft
    pictures = [{"bytes": file.data, "path": file.name} for file in sample.files]
    count = len(draft.references)
    return {
        "file_name": draft.name,
        "image": pictures[0],
        "text": draft.caption,
        "references": pictures[1 : 1 + count],
        "mask": None if draft.mask is None else pictures[-1],
        "repeats": draft.repeats,
        "extra": samples.dump(draft.extra) if draft.extra else None,
    }


# ---- opening


def _load(
    source: str, *, split: str | None, subset: str | None
) -> tuple["datasets.IterableDataset", str | None]:
    import datasets
    from pyarrow.dataset import ParquetFragmentScanOptions

    if source.startswith(HUB):
        name, _, revision = source.removeprefix(HUB).partition("@")
        rows = datasets.load_dataset(
            name, subset, split=split or "train", revision=revision or None, streaming=True
        )
        return rows.decode(False), name
    path = Path(source)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        saved = datasets.load_from_disk(source)
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[split or "train"]
        return saved.to_iterable_dataset().decode(False), None
    files = [str(file) for file in parquet_files(path, split=split)]
    # by default a whole file is read ahead: 1.3 GB at the peak for one of 800 MB, so 0.8
    scan = ParquetFragmentScanOptions(pre_buffer=False)
    rows = datasets.load_dataset(
        "parquet",
        data_files=files,
        split="train",
        streaming=True,
        fragment_scan_options=scan,
    )
    return rows.decode(False), None


def parquet_files(path: Path, *, split: str | None) -> list[Path]:
    """A file, or those of a folder in order; of several splits (train-…, test-…), the one asked."""
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.parquet"))
    kinds = {file: _split_of(file.relative_to(path)) for file in files}
    if split is None and len(set(kinds.values())) <= 1:
        return files
    wanted = split or "train"
    chosen = [file for file, kind in kinds.items() if kind == wanted]
    if not chosen:
        there = ", ".join(sorted(filter(None, set(kinds.values())))) or "none in the names"
        raise DataError(f"no files of the split {wanted!r}; splits: {there}; choose with --split")
    return chosen


def _split_of(file: Path) -> str | None:
    """As on the hub: `train-00000-of-00002.parquet`, `train.parquet` or `train/0.parquet`."""
    for part in (file.name.split(".")[0].split("-")[0], *file.parent.parts[::-1]):
        if part in ("train", "validation", "test"):
            return part
    return None


def _unreadable(source: str, error: Exception) -> DataError:
    why = " ".join((str(error) or type(error).__name__).split())[:300]
    if isinstance(error, DataError):
        return DataError(f"{source}: {why}")
    hint = "get it again"
    if source.startswith(HUB):
        hint = "`kindling doctor --online` says whether hub and login work"
    return DataError(f"{source}: can't be read ({why}); {hint}")


# ---- columns


def _pictures(features: Mapping[str, Any], *, lists: bool = False) -> list[str]:
    """Columns that hold pictures, by their type."""
    from datasets import Image, List, Value

    def is_picture(feature: object) -> bool:
        if isinstance(feature, Value):
            return feature.dtype in ("binary", "large_binary")
        is_struct = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        is_list = lists and isinstance(feature, List) and is_picture(feature.feature)
        return isinstance(feature, Image) or is_struct or is_list

    return [name for name, feature in features.items() if is_picture(feature)]


def _only(source: str, found: list[str], names: list[str], what: str, option: str) -> str:
    if what == "picture" and "image" in found:
        return "image"
    if len(found) == 1:
        return found[0]
    which = f"several columns for the {what} ({', '.join(found)})" if found else f"no {what} column"
    there = "" if found else f" (there are {', '.join(names) or 'none'})"
    raise DataError(f"{source}: {which}{there}; name it with {option}")


# ---- a row


def _sample(row: dict[str, Any], number: int, table: Table, names: Container[str]) -> Sample:
    own = row.get("file_name") is not None  # then the other names mean something, too
    target = _file(row[table.image], table, what=table.image)
    name = drafts.writable(row["file_name"]) if own else _name(target, number, names)
    references = [
        _file(value, table, what=column)
        for column in table.references
        for value in (row[column] if isinstance(row[column], list) else [row[column]])
        if value is not None
    ]
    references = [
        _renamed(file, f"references/{number:06d}-{i}", keep=own)
        for i, file in enumerate(references, start=1)
    ]
    masks = []
    if table.mask and row[table.mask] is not None:
        mask = _file(row[table.mask], table, what=table.mask)
        masks = [_renamed(mask, f"masks/{number:06d}", keep=own)]
    draft = Draft(
        name,
        captions.clean(tables.caption_of({"text": row[table.text]} if table.text else {})),
        f"row {number}",
        tuple(file.name for file in references),
        repeats=tables.repeats_of(row),
        mask=masks[0].name if masks else None,
        extra=_extra(row, table),
    )
    return Sample(draft, (File(name, target.data), *references, *masks))


def _file(value: Any, table: Table, *, what: str) -> File:
    """A picture's bytes; its name is empty if the row has none."""
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    if not isinstance(value, dict):
        raise TextError(f"no picture in the column {what}")
    data, path = value.get("bytes"), value.get("path") or ""
    if data is None:
        data = _fetch(path, table)
    if not data:
        raise TextError(f"the picture in the column {what} is empty (0 bytes)")
    name = PurePosixPath(path).name if "://" in path or path.startswith("/") else path
    return File(name, data)


def _fetch(path: str, table: Table) -> bytes:
    """A file that a row of a hub data set names. Raises DataError if it can't be had."""
    own = f"hf://datasets/{table.hub}"
    if table.hub is None or not path.startswith((f"{own}/", f"{own}@")) or ".." in path:
        said = f"names a file ({path[:80]!r}) instead of holding its bytes" if path else "is empty"
        raise TextError(f"the picture {said}; only bytes in the data set itself are taken")
    import fsspec

    try:
        with fsspec.open(path, "rb") as stream:
            return stream.read()  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # fsspec, hub and httpx share no base class
        raise _unreadable(path, error) from None


def _name(target: File, number: int, names: Container[str]) -> str:
    """The picture's own name if that is free, else one with the row's number."""
    name = _renamed(target, f"{number:06d}", keep=True).name
    return samples.numbered(name, number) if name in names else name


def _renamed(file: File, name: str, *, keep: bool) -> File:
    """With its own name if it has one to be kept, else with `name` and the ending of its bytes."""
    if keep and file.name:
        return File(drafts.writable(file.name), file.data)
    ending = formats.suffix(file.data[:4096]) or PurePosixPath(file.name).suffix
    if not ending:
        raise TextError("a picture without a name, and its bytes don't look like a picture's")
    return File(drafts.writable(f"{name}{ending.lower()}"), file.data)


def _extra(row: dict[str, Any], table: Table) -> dict[str, object]:
    """Columns of plain values, and what `write` has put into the one called extra."""
    taken = {*tables.KEYS, table.image, table.text, *table.references, *table.ignored}
    result: dict[str, object] = {}
    for key, value in row.items():
        if key in taken or value is None:
            continue
        if key == "extra" and isinstance(value, str) and value.startswith("{"):
            inner = tables.parse(value)
            result |= {k: v for k, v in inner.items() if k not in tables.KEYS}
        elif _is_plain(value):
            result[key] = value
        else:
            table.ignored.add(key)
    return result


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True

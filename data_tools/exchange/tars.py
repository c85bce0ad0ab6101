"""WebDataset tar files, as samples; and to tar.

Owns members and fields: files that follow each other and share the name up to the first dot are a
sample, and what is behind the dot is the field. Nothing is ever extracted by the archive's own
names or unpickled, and links and devices are refused.

Fields that are read: the picture (`jpg`, `png`, …); `txt`, `caption` or a `json` with `text` or
`caption`; `ref0.png`, `ref1.png`, … the references of an edit; `mask.png`. A json's other keys are
kept, and its `file_name`, `references` and `mask` name the files again as they were.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_tools import captions, drafts, formats, pictures, tables
from data_tools.captions import TextError
from data_tools.drafts import Draft
from data_tools.exchange import samples
from data_tools.exchange.containers import Columns
from data_tools.exchange.samples import File, Sample
from train.errors import DataError

_ENDINGS = (".tar", ".tar.gz", ".tgz")
_TEXTS = ("txt", "caption", "text")
_REFERENCE = re.compile(r"ref([0-9]+)\.[^.]+")


@dataclass(frozen=True)
class _Bundle:
    """Members of one key, or what is wrong with one of them."""

    key: str
    fields: dict[str, bytes]
    fault: str | None = None


class _Member(tarfile.TarInfo):
    """A header; `tarfile` itself takes a damaged or missing one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tar)  # pyright: ignore[reportReturnType]
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def files(path: Path) -> list[Path]:
    """A tar file, or those of a folder in order."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.name.lower().endswith(_ENDINGS))


def read(
    paths: list[Path], *, columns: Columns, skip: int, ignored: set[str]
) -> Iterator[tuple[str, Sample | TextError]]:
    """Each sample with its key, or what is wrong with it. Raises DataError if a tar is damaged.

    ignored: gets the fields that are left behind.
    """
    seen: set[str] = set()
    number = 0
    for path in paths:
        for bundle in _bundles(path):
            number += 1
            where = f"{path.name}: {bundle.key if bundle.key.isprintable() else repr(bundle.key)}"
            again = bundle.key in seen and bundle.fault is None
            seen.add(bundle.key)
            if number <= skip:
                continue
            try:
                if bundle.fault or again:
                    raise TextError(bundle.fault or "this key was there already")
                yield where, _sample(bundle, where, columns, ignored)
            except TextError as error:
                yield where, error


def write(path: Path, root: Path, found: list[Draft]) -> None:
    """A folder's drafts as one tar file; the same folder gives the same bytes."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, draft in enumerate(found, start=1):
            sample = samples.load(root, draft)
            ends = [PurePosixPath(file.name).suffix.lower() for file in sample.files]
            marks = ["", *(f".ref{i}" for i in range(len(draft.references))), ".mask"]
            row = drafts.row(draft)
            members = [
                (f"{number:06d}{mark}{end}", file.data)
                for mark, end, file in zip(marks, ends, sample.files, strict=False)
            ]
            members.append((f"{number:06d}.txt", draft.caption.encode()))
            members.append((f"{number:06d}.json", samples.dump(row).encode()))
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _bundles(path: Path) -> Iterator[_Bundle]:
    """A tar's samples in its order; at most one is in memory. Raises DataError."""
    key, fields, fault = "", {}, None
    try:
        with tarfile.open(path, "r|*", tarinfo=_Member) as tar:
            for member in tar:
                place = PurePosixPath(member.name)
                head, _, field = place.name.partition(".")
                if member.isdir() or not head or place.name.startswith("._"):
                    continue
                this = str(place.with_name(head))
                if this != key:
                    if key:
                        yield _Bundle(key, fields, fault)
                    key, fields, fault = this, {}, None
                problem, data = _content(tar, member)
                if field.lower() in fields:
                    problem = f"two fields {field.lower()!r}"
                fault = fault or problem
                fields[field.lower()] = data
        if key:
            yield _Bundle(key, fields, fault)
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError) as error:
        behind = f" behind {key!r}" if key else ""
        raise DataError(f"{path}: damaged or cut off{behind} ({error}); get it again") from None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[str | None, bytes]:
    """What is wrong with a member, and its bytes."""
    if member.issym() or member.islnk():
        return f"{member.name!r} is a link; a tar must hold the files themselves", b""
    if not member.isfile():
        return f"{member.name!r} is a device or pipe, not a file", b""
    if member.size > pictures.MAX_BYTES:
        return f"{member.name!r} is over 1 GB", b""
    stream = tar.extractfile(member)
    assert stream is not None
    data = stream.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return None, data


def _sample(bundle: _Bundle, where: str, columns: Columns, ignored: set[str]) -> Sample:
    fields = bundle.fields
    row = _row(fields)
    image = _image(fields, columns)
    references = list(columns.references) or sorted(
        (field for field in fields if _REFERENCE.fullmatch(field)),
        key=lambda field: int(field[3:].split(".")[0]),
    )
    mask = next((f for f in fields if re.fullmatch(r"mask\.[^.]+", f) and f != image), None)
    texts = [field for field in _TEXTS if field in fields]
    taken = {"json", image, mask, *references, *texts}
    ignored.update(field for field in fields if field not in taken)
    names = _names(bundle.key, row, image=image, references=references, mask=mask)
    caption = captions.decode(fields[texts[0]]) if texts else tables.caption_of(row)
    data = [fields.get(field, b"") for field in (image, *references, *([mask] if mask else []))]
    for field, content in zip((image, *references, mask), data, strict=False):
        if not content:
            raise TextError(f"the field {field!r} is missing or empty")
    draft = Draft(
        names[0],
        "" if columns.text == "-" else captions.clean(caption),
        where,
        tuple(names[1 : 1 + len(references)]),
        repeats=tables.repeats_of(row),
        mask=names[-1] if mask else None,
        extra={key: value for key, value in row.items() if key not in tables.KEYS},
    )
    return Sample(draft, tuple(map(File, names, data)))


def _row(fields: dict[str, bytes]) -> dict[str, object]:
    if "json" not in fields:
        return {}
    try:
        return tables.parse(captions.decode(fields["json"]))
    except TextError as error:
        raise TextError(f"its json: {error}") from None


def _image(fields: dict[str, bytes], columns: Columns) -> str:
    """The field of the picture."""
    if columns.image:
        if columns.image.lower() not in fields:
            raise TextError(f"no field {columns.image!r}; there are {', '.join(fields)}")
        return columns.image.lower()
    found = [f for f in fields if "." + f.rpartition(".")[2] in formats.PICTURE_SUFFIXES]
    plain = [field for field in found if "." not in field] or found
    if len(plain) == 1:
        return plain[0]
    if not plain:
        raise TextError(f"no picture; its fields are {', '.join(fields)}")
    raise TextError(f"several pictures ({', '.join(plain)}); name the one to train with --image")


def _names(
    key: str, row: dict[str, object], *, image: str, references: list[str], mask: str | None
) -> list[str]:
    """File names of picture, references and mask: the json's if it has them all, else the key's."""
    fields = [image, *references, *([mask] if mask else [])]
    listed = row.get("references") or []
    if "file_name" in row and isinstance(listed, list) and len(listed) == len(references):
        given = [row["file_name"], *listed, *([row.get("mask")] if mask else [])]
        return [drafts.writable(name) for name in given]
    ends = [field.rpartition(".")[2] for field in fields]
    marks = ["", *(f"-ref{i}" for i in range(len(references))), "-mask"]
    return [drafts.writable(f"{key}{mark}.{end}") for mark, end in zip(marks, ends, strict=False)]


def is_tar(path: Path) -> bool:
    """By its ending; a folder, if it holds some."""
    return bool(files(path)) if path.is_dir() else path.name.lower().endswith(_ENDINGS)

"""What a data set says of itself before any picture is opened: drafts, faults and notes.

Owns these types and the rule of which names may stand in a data set. Reads no files.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from data_tools import folder, formats
from data_tools.captions import TextError

MAX_NAME = 240
"""Bytes of a name between slashes; file systems allow 255, and we put an ending behind it."""


class Fault(NamedTuple):
    """Why something can't be used. `path` is relative to the folder, maybe with a line number."""

    path: str
    reason: str
    skippable: bool = False
    """The picture itself is unfit: data.bad_pictures decides. Anything else stops always."""


class Note(NamedTuple):
    """Something the user should know and may want so."""

    path: str
    text: str


@dataclass(frozen=True)
class Draft:
    """A picture and its caption, before the picture is looked at and the trigger's rules apply."""

    name: str
    caption: str
    source: str
    """Where the caption comes from: a file, or a file and line."""
    references: tuple[str, ...] = ()
    repeats: int = 1
    """How often an epoch shows it, on top of data.repeats."""
    mask: str | None = None
    """File name of its loss mask."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Further keys of its line in a table: not trained, but kept by every tool that writes."""


@dataclass
class Drafts:
    """What a folder says of itself, with all that is wrong or odd."""

    drafts: list[Draft] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def row(draft: Draft) -> dict[str, object]:
    """The line of metadata.jsonl that says all of a draft, `extra` included."""
    line: dict[str, object] = {"file_name": draft.name, "text": draft.caption}
    if draft.references:
        line["references"] = list(draft.references)
    if draft.repeats != 1:
        line["repeats"] = draft.repeats
    if draft.mask is not None:
        line["mask"] = draft.mask
    return line | dict(draft.extra)


def inside(name: object) -> PurePosixPath:
    """A listed file name as a path. Raises TextError unless it stays in its folder."""
    if not isinstance(name, str) or not name.strip() or not folder.is_text(name) or "\0" in name:
        raise TextError(f"a file name must be text, not {_shown(name)}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise TextError(f"{name[:80]!r} leads out of the folder; give names relative to it")
    return path


def writable(name: object) -> str:
    """A name under which a file can be written on every system. Raises TextError.

    Stricter than `inside`: it comes from a container, and nobody has had it as a file here before.
    """
    path = inside(name)
    for part in path.parts:
        if "\\" in part or any(unicodedata.category(c) == "Cc" for c in part):
            raise TextError(f"{str(path)[:80]!r} has a backslash or a control character in it")
        if part.startswith("."):
            raise TextError(f"{str(path)[:80]!r} is a hidden file's name")
        if len(part.encode()) > MAX_NAME:
            raise TextError(f"{str(path)[:80]!r} … is too long a name")
    if path.suffix.lower() not in formats.PICTURE_SUFFIXES:
        raise TextError(f"{str(path)[:80]!r} isn't a picture's file name")
    return str(path)


def _shown(value: object) -> str:
    return repr(value).replace("'", '"')[:40] if isinstance(value, str) else str(value)[:40]

"""A folder's files, sorted into pictures, captions and the rest.

Owns the walk: order, hidden files, link loops, names that can't be written. Opens no file.

Not looked at, and not reported: hidden files and folders, __MACOSX, Thumbs.db, desktop.ini.
"""

import difflib
import os
import re
import shlex
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data_tools import formats
from train.errors import DataError

METADATA = "metadata.jsonl"
CSV = "metadata.csv"
_CONTAINERS = (".parquet", ".arrow", ".tar", ".tar.gz", ".tgz")
_JUNK = {"__macosx", "thumbs.db", "desktop.ini"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass
class Listing:
    """Relative names with forward slashes, in natural order."""

    pictures: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    """.txt and .caption files, and .json files of a picture's name."""
    others: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason): a folder that can't be opened, a link that leads in a circle, a bad name."""
    tables: list[str] = field(default_factory=list)
    """Of metadata.jsonl and metadata.csv, those at the top."""


def listing(root: Path) -> Listing:
    """All files under `root`. Raises DataError if it isn't a folder."""
    if not root.is_dir():
        raise DataError(_missing(root))
    found = Listing()

    def failed(error: OSError) -> None:
        name = _name(root, Path(os.fsdecode(error.filename)))
        found.problems.append((name, f"the folder can't be opened ({error.strerror})"))

    seen = {root.resolve()}
    for top, folders, files in os.walk(root, followlinks=True, onerror=failed):
        here = Path(top)
        folders[:] = sorted(name for name in folders if _wanted(name))
        for folder in list(folders):
            place = (here / folder).resolve()
            if place in seen and (here / folder).is_symlink():
                folders.remove(folder)
                reason = "a link to a folder that is read already; remove the link"
                found.problems.append((_name(root, here / folder), reason))
            seen.add(place)
        for file in filter(_wanted, files):
            _sort_in(found, _name(root, here / file))
    _adopt_json(found)
    for names in (found.pictures, found.captions, found.others):
        names.sort(key=natural)
    found.problems.sort(key=lambda problem: natural(problem[0]))
    return found


def natural(name: str) -> tuple[tuple[int | str, ...], str]:
    """Sorts 2.png before 10.png, case-blind; the plain name decides between equals."""
    parts = re.split(r"([0-9]+)", unicodedata.normalize("NFC", name).casefold())
    # digits stand at odd places, so equal places always compare equal types
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


def stem(name: str) -> str:
    """A relative name without its ending, one for both Unicode forms of the same name."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))


def is_text(text: str) -> bool:
    """Whether `text` can be written as UTF-8; names of stray bytes and halved characters can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest(name: str, names: list[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_container(name: str) -> bool:
    """Whether a file is one that holds a data set, by its ending."""
    return name.lower().endswith(_CONTAINERS)


def import_advice(source: Path | str) -> str:
    """The command that makes a folder of pictures out of a container."""
    text = str(source)
    stem = PurePosixPath(text.removeprefix("hf:")).name.split(".")[0] or "data"
    return f"run `kindling import {shlex.quote(text)} {shlex.quote(stem + '-pictures')}` first"


def _sort_in(found: Listing, name: str) -> None:
    suffix = PurePosixPath(name).suffix.lower()
    if _CONTROL.search(name):  # a terminal would obey it
        shown = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", name)
        found.problems.append((shown, "the file's name has a control character; rename it"))
        return
    if not is_text(name):
        shown = name.encode("utf-8", "backslashreplace").decode()
        found.problems.append((shown, "the file's name isn't UTF-8; rename it"))
    elif name in (METADATA, CSV):
        found.tables = sorted([*found.tables, name], reverse=True)
    elif suffix in formats.PICTURE_SUFFIXES:
        found.pictures.append(name)
    elif suffix in (".txt", ".caption"):
        found.captions.append(name)
    else:
        found.others.append(name)


def _adopt_json(found: Listing) -> None:
    pictures = set(map(stem, found.pictures))
    for name in [name for name in found.others if name.lower().endswith(".json")]:
        if stem(name) in pictures:
            found.others.remove(name)
            found.captions.append(name)


def _wanted(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _JUNK


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _missing(root: Path) -> str:
    if root.exists():
        advice = f"; {import_advice(root)}" if is_container(root.name) else ""
        return f"{root}: a file, but data.path must be a folder of pictures{advice}"
    parent = root.parent
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    hint = nearest(root.name, sorted(names))
    if re.fullmatch(r"(hf:)?[\w.-]+/[\w.-]+", str(root)) and not parent.is_dir():
        name = str(root).removeprefix("hf:")
        hint = f"; if it is a data set on the Hugging Face hub, {import_advice('hf:' + name)}"
    return f"{root}: no such folder{hint or '; data.path must be a folder of pictures'}"

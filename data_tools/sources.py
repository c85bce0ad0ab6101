"""Where pictures and captions come together: .txt files beside pictures, or a metadata.jsonl.

Owns both conventions and what can be wrong with their text. Opens no picture.

Sidecars: `a.txt` beside `a.png` (any picture ending) is its caption. They carry no references.

metadata.jsonl: in the folder itself, one JSON object a line, as `datasets` has it for pictures:
`file_name` (relative to the folder), `text` or `caption`, and for edit pairs `references`, a list
of file names. If the file is there, it alone says what is trained; .txt files are not read.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_tools import captions, folder
from data_tools.captions import TextError

KEYS = ("file_name", "text", "caption", "references")


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


@dataclass
class Drafts:
    """What a folder says of itself, with all that is wrong or odd."""

    drafts: list[Draft] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def gather(root: Path, found: folder.Listing) -> Drafts:
    """All pictures of a folder with their captions; a missing caption is empty."""
    result = _from_metadata(root, found) if found.has_metadata else _from_sidecars(root, found)
    result.faults += [Fault(path, reason) for path, reason in found.problems]
    result.notes += [Note(name, "not read: neither picture nor caption") for name in found.others]
    return result


# ---- sidecars


def _from_sidecars(root: Path, found: folder.Listing) -> Drafts:
    result = Drafts()
    sidecars: dict[str, list[str]] = defaultdict(list)
    for name in found.captions:
        sidecars[folder.stem(name)].append(name)
    pictures = Counter(map(folder.stem, found.pictures))
    clashes: dict[str, list[str]] = defaultdict(list)
    for name in found.pictures:
        stem = folder.stem(name)
        texts = sidecars.get(stem, [])
        if texts and pictures[stem] + len(texts) > 2:
            clashes[stem].append(name)
            continue
        source = texts[0] if texts else f"{PurePosixPath(name).with_suffix('.txt')}"
        try:
            caption = captions.read(root / source) if texts else ""
        except TextError as error:
            result.faults.append(Fault(source, str(error)))
            continue
        result.drafts.append(Draft(name, caption, source))
    for stem, names in clashes.items():
        claim = f"captions {' and '.join(names)}; give each picture one caption file of its own"
        result.faults.append(Fault(" and ".join(sidecars[stem]), claim))
    for stem, names in sidecars.items():
        if stem not in pictures:
            result.notes += [Note(name, "a caption without a picture") for name in names]
    return result


# ---- metadata.jsonl


def _from_metadata(root: Path, found: folder.Listing) -> Drafts:
    result = Drafts()
    forms = {_form(name): name for name in found.pictures}
    seen: dict[str, int] = {}
    ignored: dict[str, None] = {}
    for number, line in enumerate(_lines(root, result), start=1):
        where = f"{folder.METADATA}:{number}"
        try:
            row = _row(line)
            if row is None:
                continue
            ignored.update(dict.fromkeys(row.keys() - set(KEYS)))
            draft = _draft(row, where, root, forms)
            if draft.name in seen:
                raise TextError(f"{draft.name!r} was on line {seen[draft.name]} already")
        except TextError as error:
            result.faults.append(Fault(where, str(error)))
            continue
        seen[draft.name] = number
        result.drafts.append(draft)
    if ignored:
        text = f"keys that are not read: {', '.join(sorted(ignored))}"
        result.notes.append(Note(folder.METADATA, text))
    used = {name for draft in result.drafts for name in (draft.name, *draft.references)}
    result.notes += _unused(found, used)
    return result


def _unused(found: folder.Listing, used: set[str]) -> Iterable[Note]:
    for name in found.pictures:
        if name not in used:
            yield Note(name, f"not used: not in {folder.METADATA}")
    for name in found.captions:
        yield Note(name, f"not read: {folder.METADATA} has the captions")


def _lines(root: Path, result: Drafts) -> list[bytes]:
    try:
        data = (root / folder.METADATA).read_bytes()
    except OSError as error:
        reason = f"can't be opened ({error.strerror or error})"
        result.faults.append(Fault(folder.METADATA, reason))
        return []
    if not data.strip():
        result.faults.append(Fault(folder.METADATA, "empty; write one line for each picture"))
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        result.faults.append(Fault(folder.METADATA, "not UTF-8 but UTF-16; save it as UTF-8"))
        return []
    return data.split(b"\n")


def _row(line: bytes) -> dict[str, object] | None:
    text = captions.decode(line).strip()
    if not text:
        return None
    try:
        row = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise TextError(f"broken JSON: {error.msg}, column {error.colno}") from None
    except RecursionError:
        raise TextError("broken JSON: nested too deep") from None
    if not isinstance(row, dict):
        raise TextError('a line must be an object like {"file_name": "a.png", "text": "..."}')
    return row


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise TextError(f"key {twice[0]!r} stands twice")
    return dict(pairs)


def _draft(row: dict[str, object], where: str, root: Path, forms: dict[str, str]) -> Draft:
    if "file_name" not in row:
        raise TextError(f"file_name is missing; the line has {', '.join(row) or 'nothing'}")
    if "text" in row and "caption" in row:
        raise TextError("has both text and caption; keep one")
    caption = row.get("text", row.get("caption"))
    if caption is not None and not isinstance(caption, str):
        raise TextError(f"the caption must be text, not {json.dumps(caption)[:40]}")
    if caption and not folder.is_text(caption):
        raise TextError("the caption holds half a character (a lone \\ud800 to \\udfff)")
    references = row.get("references") or []
    if not isinstance(references, list):
        raise TextError('references must be a list like ["a.png", "b.png"]')
    names = [_file(name, root, forms) for name in (row["file_name"], *references)]
    return Draft(names[0], captions.clean(caption or ""), where, tuple(names[1:]))


def _file(name: object, root: Path, forms: dict[str, str]) -> str:
    """A listed file's name as it is on disk. Raises TextError if there is none to be used."""
    if not isinstance(name, str) or not name.strip() or not folder.is_text(name) or "\0" in name:
        raise TextError(f"a file name must be text, not {json.dumps(name)[:40]}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:[\\/]", name):
        raise TextError(f"{name!r} leads out of the folder; give names relative to it")
    actual = forms.get(_form(str(path)), str(path))
    if not (root / actual).is_file():
        slashes = "\\" in name and (root / name.replace("\\", "/")).is_file()
        hint = "; write / between folders" if slashes else folder.nearest(name, [*forms.values()])
        raise TextError(f"no file {name!r}{hint}")
    return actual


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)

"""metadata.jsonl and metadata.csv: a table in the folder itself that says what is trained.

Owns both formats and what can be wrong with a line. Opens no picture.

Columns are as `datasets` has them for a folder of pictures: `file_name` (relative to the folder),
`text` or `caption`; and Kindling's own: `references` (file names, for edit pairs; in CSV as a JSON
list), `repeats` (showings an epoch) and `mask` (a file name). Others are kept and named in a note.
"""

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_tools import captions, drafts, folder
from data_tools.captions import TextError
from data_tools.drafts import Draft, Drafts, Fault, Note

KEYS = ("file_name", "text", "caption", "references", "repeats", "mask")
MAX_REPEATS = 1000

Lines = Iterator[tuple[int, dict[str, object] | TextError | None]]
"""Line number from 1, and its row, what is wrong with it, or nothing."""


def read(root: Path, found: folder.Listing) -> Drafts:
    """The drafts of the folder's table. If there are two tables, that is a fault."""
    result = Drafts()
    table, *others = found.tables
    result.faults += [Fault(name, f"beside a {table}; keep one of the two") for name in others]
    forms = {_form(name): name for name in found.pictures}
    seen: dict[str, int] = {}
    ignored: dict[str, None] = {}
    data = _bytes(root / table, result)
    for number, row in _csv(data, result) if table == folder.CSV else _jsonl(data):
        where = f"{table}:{number}"
        try:
            if isinstance(row, TextError):
                raise row
            if row is None:
                continue
            draft = _draft(row, where, root, forms)
            ignored.update(dict.fromkeys(draft.extra))
            if draft.name in seen:
                raise TextError(f"{draft.name!r} was on line {seen[draft.name]} already")
        except TextError as error:
            result.faults.append(Fault(where, str(error)))
            continue
        seen[draft.name] = number
        result.drafts.append(draft)
    if ignored:
        text = f"keys that are not read: {', '.join(sorted(ignored))}"
        result.notes.append(Note(table, text))
    result.notes += _unused(found, table, result.drafts)
    return result


def _unused(found: folder.Listing, table: str, used: list[Draft]) -> Iterable[Note]:
    names = {name for draft in used for name in (draft.name, *draft.references, draft.mask)}
    for name in found.pictures:
        if name not in names:
            yield Note(name, f"not used: not in {table}")
    for name in found.captions:
        yield Note(name, f"not read: {table} has the captions")


def _bytes(path: Path, result: Drafts) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"can't be opened ({error.strerror or error})"
        result.faults.append(Fault(path.name, reason))
        return b""
    if not data.strip():
        result.faults.append(Fault(path.name, "empty; write one line for each picture"))
        return b""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        result.faults.append(Fault(path.name, "not UTF-8 but UTF-16; save it as UTF-8"))
        return b""
    return data


# ---- metadata.jsonl


def _jsonl(data: bytes) -> Lines:
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            text = captions.decode(line).strip()
            yield number, parse(text) if text else None
        except TextError as error:
            yield number, error


def parse(text: str) -> dict[str, object]:
    """A JSON object, each key once. Raises TextError."""
    try:
        row = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise TextError(f"broken JSON: {error.msg}, column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, TextError):
            raise
        reason = "nested too deep" if isinstance(error, RecursionError) else "a number too long"
        raise TextError(f"broken JSON: {reason}") from None
    if not isinstance(row, dict):
        raise TextError('a line must be an object like {"file_name": "a.png", "text": "..."}')
    return row


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise TextError(f"key {twice[0]!r} stands twice")
    return dict(pairs)


# ---- metadata.csv


def _csv(data: bytes, result: Drafts) -> Lines:
    """Rows of a comma-separated table; a record's line is the one that it starts on."""
    try:
        reader = csv.reader(io.StringIO(captions.decode(data), newline=""), strict=True)
        head = [cell.strip() for cell in next(reader, [])]
        _check_head(head)
    except (TextError, csv.Error) as error:
        if data:
            result.faults.append(Fault(folder.CSV, str(error)))
        return
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:  # a quote that never closes has swallowed the rest
            yield number, TextError(f"broken CSV from here on: {error}")
            return
        if cells is None:
            return
        if not any(cells):
            yield number, None
        elif len(cells) != len(head):
            counts = f"{len(cells)} columns instead of {len(head)}"
            yield number, TextError(f"{counts}; put text with a comma in double quotes")
        else:
            yield number, _typed({k: v for k, v in zip(head, cells, strict=True) if v.strip()})


def _check_head(head: list[str]) -> None:
    if "file_name" not in head:
        if len(head) == 1 and (other := re.search(r"file_name[\"']?\s*([;\t|])", head[0])):
            raise TextError(f"columns are separated by {other[1]!r}; save it with commas")
        raise TextError(f"its first line must name the columns, file_name among them: {head[:5]}")
    if "" in head:
        raise TextError(f"column {head.index('') + 1} has no name")
    _unique([(name, None) for name in head])


def _typed(row: dict[str, str]) -> dict[str, object] | TextError:
    """A CSV row with the values of our own columns as in JSON."""
    result: dict[str, object] = dict(row)
    if "references" in row:
        try:
            result["references"] = json.loads(row["references"])
        except ValueError:
            return TextError('references must be a JSON list like ["a.png", "b.png"]')
    if re.fullmatch(r"[0-9]{1,9}", row.get("repeats", "").strip()):
        result["repeats"] = int(row["repeats"])
    return result


# ---- one row


def _draft(row: dict[str, object], where: str, root: Path, forms: dict[str, str]) -> Draft:
    if "file_name" not in row:
        raise TextError(f"file_name is missing; the line has {', '.join(row) or 'nothing'}")
    caption = caption_of(row)
    names = [_file(name, root, forms) for name in (row["file_name"], *_references(row))]
    mask = row.get("mask")
    return Draft(
        names[0],
        captions.clean(caption),
        where,
        tuple(names[1:]),
        repeats=repeats_of(row),
        mask=None if mask is None else _file(mask, root, forms),
        extra={key: value for key, value in row.items() if key not in KEYS},
    )


def caption_of(row: dict[str, object]) -> str:
    """The row's caption, uncleaned, empty if there is none. Raises TextError."""
    if "text" in row and "caption" in row:
        raise TextError("has both text and caption; keep one")
    caption = row.get("text", row.get("caption"))
    if caption is not None and not isinstance(caption, str):
        raise TextError(f"the caption must be text, not {json.dumps(caption)[:40]}")
    if caption and not folder.is_text(caption):
        raise TextError("the caption holds half a character (a lone \\ud800 to \\udfff)")
    return caption or ""


def repeats_of(row: dict[str, object]) -> int:
    """How often an epoch shows the row's picture. Raises TextError."""
    repeats = row.get("repeats")
    if repeats is None:
        return 1
    if not isinstance(repeats, int) or isinstance(repeats, bool) or not 1 <= repeats <= MAX_REPEATS:
        shown = json.dumps(repeats)[:40]
        raise TextError(f"repeats must be a whole number from 1 to {MAX_REPEATS}, not {shown}")
    return repeats


def _references(row: dict[str, object]) -> list[object]:
    references = row.get("references") or []
    if not isinstance(references, list):
        raise TextError('references must be a list like ["a.png", "b.png"]')
    return references


def _file(name: object, root: Path, forms: dict[str, str]) -> str:
    """A listed file's name as it is on disk. Raises TextError if there is none to be used."""
    path = str(drafts.inside(name))
    assert isinstance(name, str)
    actual = forms.get(_form(path), path)
    if not _is_file(root / actual):
        slashes = "\\" in name and _is_file(root / name.replace("\\", "/"))
        hint = "; write / between folders" if slashes else folder.nearest(name, [*forms.values()])
        raise TextError(f"no file {name!r}{hint}")
    return actual


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)

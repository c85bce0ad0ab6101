"""Captions to disk: .txt beside the pictures, or a metadata.jsonl.

Owns the files that `kindling caption` writes. No picture is touched, nothing is left half written,
and whatever a write replaces is kept beside it as NAME.bak (.bak2, ... where that one is taken).
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from data_tools import folder
from data_tools.sources import Draft
from train.errors import DataError


def sidecar(root: Path, name: str) -> Path:
    """The .txt of a picture."""
    return root / PurePosixPath(name).with_suffix(".txt")


def shared_sidecars(drafts: Sequence[Draft]) -> dict[str, str]:
    """Pictures that can't have a .txt of their own (a.png and a.jpg), and why."""
    counts = Counter(folder.stem(draft.name) for draft in drafts)
    return {
        draft.name: f"another picture would share {PurePosixPath(draft.name).stem}.txt; rename one"
        for draft in drafts
        if counts[folder.stem(draft.name)] > 1
    }


def write_sidecar(root: Path, draft: Draft, caption: str) -> None:
    """Write the caption of one picture. Raises DataError."""
    # the file that it was read from may have its name in another Unicode form
    path = root / draft.source if draft.caption else sidecar(root, draft.name)
    write(path, caption + "\n")


def metadata(root: Path, drafts: Sequence[Draft], captions: Mapping[str, str]) -> str:
    """The text of a metadata.jsonl: each draft with its new caption, or else the one it had.

    Lines of the folder's own metadata.jsonl keep their other keys; its references stay.
    """
    old = []
    if any(draft.source.startswith(f"{folder.METADATA}:") for draft in drafts):
        old = (root / folder.METADATA).read_text(encoding="utf-8-sig").split("\n")
    lines = []
    for draft in drafts:
        row: dict[str, object] = {"file_name": draft.name}
        if draft.source.startswith(f"{folder.METADATA}:"):
            row = json.loads(old[int(draft.source.rpartition(":")[2]) - 1])
        caption = captions.get(draft.name, draft.caption)
        if caption:
            row["caption" if "caption" in row else "text"] = caption
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def write(path: Path, text: str) -> Path | None:
    """Write a file whole or not at all; returns where its previous contents are kept, if any.

    Raises DataError if the folder or the disk doesn't allow it.
    """
    data = text.encode()
    part = path.with_name(f".{path.name}.part")
    try:
        old = path.read_bytes() if path.exists() else b""
        if old == data:
            return None
        kept = _keep(path, old) if old.strip() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{path}: can't be written ({error.strerror or error})") from None
    return kept


def _keep(path: Path, old: bytes) -> Path:
    """A copy of what `path` held, under a name that is free or holds the same already."""
    number = 1
    while True:
        kept = path.with_name(f"{path.name}.bak{number if number > 1 else ''}")
        if not kept.exists():
            kept.write_bytes(old)
            return kept
        if kept.read_bytes() == old:
            return kept
        number += 1

"""Where pictures and captions come together: which convention a folder follows, and its drafts.

Owns the choice. If the folder has a metadata.jsonl or metadata.csv, that alone says what is
trained (`tables`); otherwise caption files beside the pictures do, or kohya's folder names
(`sidecars`). Parquet and tar are not read in place: `kindling import` makes a folder of them.
"""

from dataclasses import replace
from pathlib import Path, PurePosixPath

from data_tools import folder, formats, masks, sidecars, tables
from data_tools.drafts import Draft, Drafts, Fault, Note
from data_tools.folder import Listing

__all__ = ["Draft", "Drafts", "Fault", "Note", "gather", "nothing"]


def gather(root: Path) -> tuple[Listing, Drafts]:
    """A folder's files without its masks, and all pictures with their captions and masks.

    A missing caption is empty. Raises DataError if it isn't a folder.
    """
    found, mask_files = masks.split(folder.listing(root))
    result = (tables if found.tables else sidecars).read(root, found)
    result.drafts = [
        replace(draft, mask=draft.mask or mask_files.get(folder.stem(draft.name)))
        for draft in result.drafts
    ]
    result.faults += [Fault(path, reason) for path, reason in found.problems]
    for name in found.others:
        text = "not read: neither picture nor caption"
        if folder.is_container(name):
            text = f"not read: {folder.import_advice(root / name)}"
        result.notes.append(Note(name, text))
    return found, result


def nothing(root: Path, found: Listing) -> str:
    """What to say of a folder without a picture."""
    containers = [name for name in found.others if folder.is_container(name)]
    if containers:
        kind = PurePosixPath(containers[0]).suffix
        return f"{root}: no pictures, but {kind} files; {folder.import_advice(root)}"
    return f"{root}: no pictures in this folder ({formats.ADVICE})"

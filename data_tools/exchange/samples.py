"""A picture with all that belongs to it, as bytes: what goes into a container and comes out.

Owns the way from a folder to samples and back to a new folder, resumable and finished in one step.
Never decodes a picture; bytes go through as they are. Knows no container (`containers`, `tars`).
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_tools import drafts, folder, sources
from data_tools.captions import TextError
from data_tools.drafts import Draft
from train.errors import DataError, bullet_list

JOURNAL = ".import.jsonl"
"""In an unfinished folder: what it is of, then a line for each sample that is written."""


class File(NamedTuple):
    """A file's name, relative to the data set, and its bytes."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Sample:
    """One line of metadata.jsonl with the files it names."""

    draft: Draft
    files: tuple[File, ...]
    """The picture, its references in order, then its mask if it has one."""


def of_folder(root: Path) -> list[Draft]:
    """The drafts of a folder of pictures. Raises DataError with all faults of names and captions.

    A missing caption is no fault: what a container holds is up to who fills it.
    """
    found, gathered = sources.gather(root)
    if gathered.faults:
        lines = [f"{fault.path}: {fault.reason}" for fault in gathered.faults]
        raise DataError(bullet_list(f"{root}: these must be mended first:", lines))
    if not gathered.drafts:
        raise DataError(sources.nothing(root, found))
    return gathered.drafts


def load(root: Path, draft: Draft) -> Sample:
    """A draft's files, read. Raises DataError."""
    names = [draft.name, *draft.references, *([draft.mask] if draft.mask is not None else [])]
    return Sample(draft, tuple(File(name, read(root / name)) for name in names))


def read(path: Path) -> bytes:
    """A file's bytes. Raises DataError if there is nothing to be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror or error})") from None
    if not data:
        raise DataError(f"{path}: empty file (0 bytes); get it again or remove it")
    return data


def check_new(output: Path) -> None:
    """Raises DataError if something is at `output` already; an empty folder is as good as none."""
    taken = output.exists() or output.is_symlink()
    if taken and not (output.is_dir() and not output.is_symlink() and not any(output.iterdir())):
        raise DataError(f"{output}: is there already, and nothing is overwritten; name another")


def dump(row: Mapping[str, object]) -> str:
    """A line of metadata.jsonl, without its end."""
    return json.dumps(row, ensure_ascii=False)


class Folder:
    """A new folder of pictures with its metadata.jsonl, written beside its place until it is whole.

    Killed and opened again with the same `identity`, it goes on behind the last whole sample.
    """

    def __init__(self, output: Path, *, identity: Mapping[str, object]) -> None:
        """Raises DataError if `output` is taken, or holds an unfinished other data set."""
        check_new(output)
        self.output = output
        self.part = output.with_name(f"{output.name}.part")
        self.faults: list[tuple[str, str]] = []
        self.names: set[str] = set()
        """Of the samples' pictures."""
        self._rows: list[Mapping[str, object]] = []
        self._sizes: dict[str, int] = {}
        try:
            self.part.mkdir(parents=True, exist_ok=True)
            self._journal = self._open(dict(identity))
            self._case_blind = (self.part / JOURNAL.upper()).exists()  # as on macOS and Windows
        except OSError as error:
            raise DataError(f"{output}: can't be written ({error.strerror or error})") from None

    def __len__(self) -> int:
        """Samples so far, those with faults included."""
        return len(self._rows) + len(self.faults)

    def add(self, sample: Sample) -> None:
        """Write a sample's files. Raises TextError if a name is taken by something else."""
        name = sample.draft.name
        if name in self.names:
            raise TextError(f"{name!r} was there already")
        for file in sample.files:
            self._write(file)
        sizes = {file.name: len(file.data) for file in sample.files}
        self._remember({"row": drafts.row(sample.draft), "files": sizes})

    def refuse(self, where: str, reason: str) -> None:
        """Note a sample that can't be written, so that it isn't tried again."""
        self._remember({"where": where, "reason": reason})

    def finish(self) -> int:
        """Put the folder in its place; how many samples it has. Raises DataError if it is empty."""
        self._journal.close()
        if not self._rows:
            lines = [f"{where}: {reason}" for where, reason in self.faults]
            raise DataError(bullet_list(f"{self.output}: nothing to write", lines))
        text = "".join(dump(row) + "\n" for row in self._rows)
        (self.part / folder.METADATA).write_text(text, encoding="utf-8", newline="\n")
        (self.part / JOURNAL).unlink()
        if self.output.exists():
            self.output.rmdir()
        self.part.rename(self.output)
        return len(self._rows)

    def close(self) -> None:
        """Leave it unfinished."""
        self._journal.close()

    def _write(self, file: File) -> None:
        path = self.part / file.name
        if file.name in self._sizes:
            if path.read_bytes() != file.data:
                raise TextError(f"{file.name!r} was there already, as another picture")
            return
        try:
            if self._case_blind and file.name.casefold() in map(str.casefold, self._sizes):
                raise TextError(f"{file.name!r} differs from another only in upper and lower case")
            path.parent.mkdir(parents=True, exist_ok=True)
            # a file of this name may be left of a run that was killed before it noted it
            with path.open("wb") as stream:
                stream.write(file.data)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise TextError(f"{file.name!r} is a file here and a folder there") from None
        except OSError as error:
            raise DataError(f"{path}: can't be written ({error.strerror or error})") from None

    def _remember(self, entry: dict) -> None:
        self._journal.write(dump(entry) + "\n")
        self._journal.flush()
        self._take(entry)

    def _take(self, entry: dict) -> None:
        if "row" in entry:
            self._rows.append(entry["row"])
            self._sizes |= entry["files"]
            self.names.add(entry["row"]["file_name"])
        else:
            self.faults.append((entry["where"], entry["reason"]))

    def _open(self, identity: dict):
        """The journal, open at its end, with what it says taken in."""
        path = self.part / JOURNAL
        mine = dump({"of": identity})
        if not path.exists():
            if any(self.part.iterdir()):
                raise DataError(f"{self.part}: is there already, and not ours; move it away")
            path.write_text(mine + "\n", encoding="utf-8")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines[:1] != [mine + "\n"]:
            raise DataError(f"{self.part}: an unfinished import of other data; remove it first")
        whole = [line for line in lines if line.endswith("\n")]
        for line in whole[1:]:
            self._take(json.loads(line))
        self._check_sizes()
        os.truncate(path, sum(len(line.encode()) for line in whole))
        return path.open("a", encoding="utf-8", newline="\n")

    def _check_sizes(self) -> None:
        for name, size in self._sizes.items():
            path = self.part / name
            if not path.is_file() or path.stat().st_size != size:
                raise DataError(f"{path}: changed since the import was stopped; remove {self.part}")


def discard(part: Path) -> None:
    """Remove an unfinished folder, if it is one of ours."""
    if (part / JOURNAL).is_file():
        shutil.rmtree(part)


def numbered(name: str, number: int) -> str:
    """`a/b.png` as `a/b-000017.png`."""
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}-{number:06d}{path.suffix}"))

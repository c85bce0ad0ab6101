"""Finished captions on disk, so that a killed run goes on where it was.

Owns the file: one JSON object a line, appended as soon as a caption is there. An entry is found
by what it depends on, never by name: a renamed picture keeps its caption, a changed one doesn't.
"""

import hashlib
import json
from pathlib import Path

from train.errors import DataError

NAME = ".kindling-captions.jsonl"
"""In the folder of what is written; hidden, so it is never taken for data."""


def key(*, pictures: tuple[str, ...], captioner: str, instruction: str) -> str:
    """The name of a caption. pictures: their sha256, the references' first; instruction: a digest
    of all that was said besides."""
    facts = json.dumps([pictures, captioner, instruction])
    return hashlib.sha256(facts.encode()).hexdigest()


class Journal:
    """Captions by key."""

    def __init__(self, path: Path) -> None:
        """Read what is there. Raises DataError if the file can't be read or written."""
        self.path = path
        self._captions: dict[str, str] = {}
        try:
            data = path.read_bytes() if path.exists() else b""
            self._file = path.open("ab")
        except OSError as error:
            raise DataError(
                f"{path}: can't be written ({error.strerror or error}); captions are kept there as "
                "they come. Make the folder writable, or write elsewhere with --output"
            ) from None
        for line in data.splitlines():
            try:
                row = json.loads(line)
                self._captions[row["key"]] = str(row["caption"])
            except (ValueError, TypeError, KeyError):
                continue  # the line that was being written when the last run was killed
        if data and not data.endswith(b"\n"):
            self._file.write(b"\n")

    def get(self, key: str) -> str | None:
        """The caption of that name, if it was finished before."""
        return self._captions.get(key)

    def add(self, key: str, caption: str, *, name: str, captioner: str) -> None:
        """Keep a caption; from here on it outlives the process. Name and captioner are for people.

        It isn't forced to the disk: after a power cut the last ones may have to be made again.
        Raises DataError if the disk is full.
        """
        row = {"key": key, "name": name, "captioner": captioner, "caption": caption}
        try:
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self.path}: can't be written ({error.strerror or error})") from None
        self._captions[key] = caption

    def close(self) -> None:
        """No more captions. An empty journal is removed."""
        self._file.close()
        if not self._captions and self.path.stat().st_size == 0:
            self.path.unlink()

"""Makes folders of pictures and captions, and reads them, for the tests of records."""

import json
from pathlib import Path

from data_tools import records
from data_tools.records import Collection
from tests.unit import hostile
from train.config import DataConfig


def settings(root: Path, **changes: object) -> DataConfig:
    return DataConfig.model_validate({"path": str(root), "resolution": 64} | changes)


def pair(root: Path, name: str, caption: str | bytes = "a picture", *, seed: int = 0) -> Path:
    path = hostile.picture(root / name, seed=seed)
    data = caption.encode() if isinstance(caption, str) else caption
    path.with_suffix(".txt").write_bytes(data)
    return path


def table(root: Path, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


def survey(root: Path, **changes: object) -> Collection:
    return records.survey(settings(root, **changes), progress=False)


def names(collection: Collection) -> list[str]:
    return [record.name for record in collection.records]


def faults(root: Path, **changes: object) -> list[tuple[str, str]]:
    return [(fault.path, fault.reason) for fault in survey(root, **changes).faults]

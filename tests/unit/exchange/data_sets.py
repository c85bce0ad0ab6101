"""Makes folders, parquet and tar files, and reads folders, for the tests of containers."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import sources
from data_tools.exchange import import_data
from data_tools.sources import Draft
from tests.unit import hostile
from train.errors import DataError


def drafts(root: Path) -> list[Draft]:
    """All that a folder says, but for the place where it says it."""
    _, gathered = sources.gather(root)
    assert gathered.faults == []
    found = [replace(draft, source="", extra=dict(draft.extra)) for draft in gathered.drafts]
    return sorted(found, key=lambda draft: draft.name)


def contents(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def rich(root: Path) -> Path:
    """A folder with everything that a table can say, and pictures that decoding would change."""
    for seed, name in enumerate(["a.png", "sub/b.JPG", "小 x.webp", "before/1.png", "m.png"]):
        hostile.picture(root / name, seed=seed)
    (root / "sub/b.JPG").write_bytes((root / "sub/b.JPG").read_bytes() + b"trailing bytes")
    lines = [
        {"file_name": "a.png", "text": "[trigger] runs", "repeats": 3, "mood": ["x", 1.5]},
        {"file_name": "sub/b.JPG", "text": "", "references": ["before/1.png", "小 x.webp"]},
        {"file_name": "小 x.webp", "text": "第\"二'", "mask": "m.png", "extra": "{no json"},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (root / "metadata.jsonl").write_text(text, encoding="utf-8")
    return root


def parquet(path: Path, rows: list[dict], **features: object) -> Path:
    schema = datasets.Features(features).arrow_schema if features else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def png(seed: int = 0) -> bytes:
    return hostile.png(width=4, height=4, depth=8, color=0, rows=bytes([seed] * 16))


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def fails(source: Path | str, output: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        import_data.run(str(source), output, **options)  # pyright: ignore[reportArgumentType]
    assert not output.exists()
    return str(caught.value)


GOOD = (("good.png", png(9)), ("good.txt", b"x"))
"""Members of a tar that nothing is wrong with."""

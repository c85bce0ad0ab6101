"""Six plain pictures, a captioner that tells their shades, and what became of them."""

import json
import sys
from pathlib import Path
from typing import Any

from data_tools import records
from scripts import kindling
from tests.unit.caption.fake_server import CaptionServer, Reply, Request, completion
from train.config import DataConfig

SHADES = [(50 * number, 0, 100) for number in range(6)]


def shade_of(request: Request) -> int:
    return SHADES.index(request.colours[-1])


def plain(request: Request, _: int = 0) -> Reply:
    return completion(f"Zibby stands in shade {shade_of(request)}.")


def run(target: CaptionServer, root: Path, *more: str) -> int:
    """Caption by the server, one request at a time."""
    spec = f"http:{target.url}"
    fixed = ["--for", "character", "--trigger", "zibby", "--concurrency", "1", "--retries", "1"]
    given = [] if "--for" in more else fixed
    return kindling.main(["caption", str(root), "--captioner", spec, *given, *more])


def command(target: CaptionServer, root: Path, *more: str) -> list[str]:
    """The same as a process's arguments."""
    arguments = [str(root), "--captioner", target.url, "--concurrency", "1", "--timeout", "60"]
    words = ["--for", "character", "--trigger", "zibby"]
    return [sys.executable, "-m", "scripts.kindling", "caption", *arguments, *words, *more]


def rows(path: Path) -> dict[str, Any]:
    """The lines of a metadata.jsonl, by file name."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row.pop("file_name"): row for row in found}


def trained(root: Path) -> dict[str, str]:
    """The captions that training would read."""
    data = DataConfig(path=str(root), resolution=64)
    return {record.name: record.caption for record in records.read(data).records}


def snapshot(root: Path) -> dict[str, bytes]:
    """The files of a folder, but for hidden ones."""
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name[0] != "."}

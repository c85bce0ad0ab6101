"""The report as one HTML page that needs nothing else: `page.html.jinja` filled in.

Owns thumbnails and what of a row is shown. Its looks and its keys are the template's. Rows are
written one at a time, and thumbnails wait on disk, so memory doesn't grow with them.
"""

import base64
import os
import secrets
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_tools import pictures
from data_tools.inspect import report
from data_tools.inspect.report import MARKS, Report, Row

TEMPLATE = "page.html.jinja"

Links = Sequence[tuple[str, str]]
"""Of the pages of one config: the data set's path and the file's name."""


class Thumbnails:
    """Small JPEGs by name, in a file."""

    def __init__(self, spool: BinaryIO) -> None:
        self._spool = spool
        self._places: dict[str, tuple[int, int]] = {}

    def put(self, name: str, jpeg: bytes) -> None:
        """Keep a picture; one of a known name is that one."""
        if name not in self._places:
            self._places[name] = (self._spool.seek(0, os.SEEK_END), len(jpeg))
            self._spool.write(jpeg)

    def uri(self, name: str) -> str:
        """A picture as a data URI."""
        at, length = self._places[name]
        self._spool.seek(at)
        data = self._spool.read(length)
        return Markup("data:image/jpeg;base64," + base64.b64encode(data).decode())


def mask_of(name: str) -> str:
    """The name under which the thumbnail of a picture's mask is kept."""
    return f"mask of {name}"


def write(found: Report, path: Path, *, thumbnails: Thumbnails, links: Links = ()) -> None:
    """Write the page to `path`, with `links` to those beside it. Raises OSError.

    All texts of the data set are escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stream = environment.get_template(TEMPLATE).stream(
        report=found,
        cards=_cards(found, thumbnails, path.resolve().parent),
        marks={mark: (MARKS[mark], len(rows)) for mark, rows in found.marked.items()},
        words=_frequent(report.words(found), found),
        tags=_frequent(report.tags(found), found),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        nonce=secrets.token_urlsafe(16),
        labels=MARKS,
        links=[(label, quote(name), name == path.name) for label, name in links],
    )
    stream.enable_buffering(100)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(stream)


def _cards(found: Report, thumbnails: Thumbnails, home: Path) -> Iterator[dict[str, Any]]:
    """What is shown of each row. Links to the originals are relative to the page's folder."""
    root = os.path.relpath(Path(found.data.path).expanduser().resolve(), home)
    groups = {index: number for number, group in enumerate(found.alike) for index in group}
    for index, row in enumerate(found.rows):
        record, geometry = row.record, row.placement.geometry
        left, top, right, bottom = pictures.crop_box(record.width, record.height, geometry=geometry)
        yield {
            "row": row,
            "thumbnail": thumbnails.uri(record.sha256),
            "original": quote(f"{root}/{record.name}".replace(os.sep, "/")),
            "crop": {
                "left": 100 * left / record.width,
                "top": 100 * top / record.height,
                "width": 100 * (right - left) / record.width,
                "height": 100 * (bottom - top) / record.height,
            },
            "mask": row.learnt is not None and thumbnails.uri(mask_of(record.name)),
            "references": [
                (path.name, thumbnails.uri(sha256))
                for path, sha256 in zip(record.references, record.reference_sha256, strict=True)
            ],
            "facts": _facts(row, found),
            "group": groups.get(index, -1),
        }


def _frequent(counts: list[tuple[str, int]], found: Report) -> list[tuple[str, int]]:
    """Without what only one of many captions has."""
    least = 1 if len(found.rows) < 10 else 2
    return [(word, count) for word, count in counts if count >= least]


def _facts(row: Row, found: Report) -> list[tuple[str, str]]:
    """Label and value, as a reader would ask for them."""
    record, place, look = row.record, row.placement, row.measures
    trained, (width, height) = place.geometry, row.effective
    how = "enlarged" if place.scale > 1 else "scaled"
    tokens = f"{row.tokens} of {found.tokens.limit}" if row.tokens is not None else "not counted"
    facts = [
        ("Size", f"{record.width} × {record.height}"),
        ("Trained at", f"{trained.width} × {trained.height}, {how} {place.scale:.2f}×"),
        ("Reaches training", f"{width} × {height} pixels of its own"),
        ("Cut off", f"{place.crop:.1%}"),
        ("Tokens", tokens),
        ("Sharpness", f"{look.sharpness:.2f}"),
        ("Brightness", f"{look.brightness:.0%}"),
        ("Plain black, white", f"{look.black:.0%}, {look.white:.0%}"),
        ("Caption from", record.caption_source),
    ]
    if row.learnt is not None:
        rest = f"what is dark counts {found.data.mask_floor:g}"
        facts.append(("Learnt by its mask", f"{row.learnt:.0%} of the picture; {rest}"))
    if record.references:
        names = ", ".join(path.name for path in record.references)
        facts.append(("References", names))
    return facts

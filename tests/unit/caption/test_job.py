"""What is asked about each picture, and what of the answers is no caption."""

import base64
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.unit.caption.fake_server import Reply, Request, completion, serve
from tests.unit.caption.shades import SHADES, plain, rows, run, shade_of, trained


def test_pictures_are_shrunk(root: Path) -> None:
    Image.new("RGB", (900, 300), SHADES[0]).save(root / "0.png")
    seen = []

    def answer(request: Request, _: int) -> Reply:
        url = request.body["messages"][1]["content"][-1]["image_url"]["url"]
        assert url.startswith("data:image/jpeg;base64,")
        seen.append(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size)
        return plain(request)

    with serve(answer) as target:
        assert run(target, root, "--longest-side", "300", "--limit", "2") == 0
    assert seen == [(300, 100), (64, 48)]


def test_edits(root: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [
        {"file_name": "2.png", "references": ["0.png", "1.png"]},
        {"file_name": "3.png", "references": ["1.png"], "text": "Keep me"},
        {"file_name": "4.png"},
    ]
    text = "\n".join(map(json.dumps, lines))
    (root / "metadata.jsonl").write_text(text)
    with serve(lambda *_: completion("Make it brighter.")) as target:
        assert run(target, root, "--for", "edit", "--concurrency", "1") == 2
    (request,) = target.requests
    assert request.colours == [SHADES[0], SHADES[1], SHADES[2]]
    parts = [part.get("text") for part in request.body["messages"][1]["content"]]
    assert parts[0].startswith("What was changed from the reference to the target?")
    assert parts[0].endswith("Reference picture 1:")
    assert parts[1:] == [None, "Reference picture 2:", None, "Target picture:", None]
    assert rows(root / "metadata.jsonl")["2.png"] == {
        "references": ["0.png", "1.png"],
        "text": "Make it brighter.",
    }
    assert "4.png: no references to compare with" in capsys.readouterr().out


# ---- what is no caption


def test_what_is_no_caption_is_listed_and_not_written(
    root: Path, capsys: pytest.CaptureFixture
) -> None:
    replies = [
        completion("Zibby waves."),
        completion("I can't help with that."),
        completion("  "),
        completion("zibby waves and " * 20),
        completion("zibby wav", reason="length"),
        Reply(b"<html>"),
    ]
    with serve(lambda request, _: replies[shade_of(request)]) as target:
        assert run(target, root) == 2
    assert [name for name, row in rows(root / "metadata.jsonl").items() if "text" in row] == [
        "0.png"
    ]
    output = capsys.readouterr().out
    assert output[output.index("Not captioned") :] == (
        "Not captioned (5; the same command tries these again):\n"
        """  1.png: refused: "I can't help with that."\n"""
        "  2.png: an empty answer\n"
        "  3.png: repeats itself: 'zibby waves and'\n"
        "  4.png: cut off at the token limit; raise --max-tokens\n"
        "  5.png: the server failed 2 times; at last: a web page instead of JSON; is the URL an "
        "API's?\n"
    )


def test_what_failed_is_asked_again_the_next_time(root: Path) -> None:
    with serve(lambda request, _: plain(request) if shade_of(request) else Reply({})) as target:
        assert run(target, root) == 2
    with serve(plain) as target:
        assert run(target, root) == 0
        assert [shade_of(request) for request in target.requests] == [0]
    assert len(trained(root)) == 6


def test_pictures_that_cant_be_used(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "0.png").write_bytes((root / "0.png").read_bytes()[:60])
    Image.new("RGB", (900, 9)).save(root / "1.png")
    (root / "2.png").unlink()
    os.mkfifo(root / "2.png")
    (root / "3.txt").write_bytes(b"\xff\xfe\x00")
    with serve(plain) as target:
        assert run(target, root) == 2
    output = capsys.readouterr().out
    for line in (
        "0.png: damaged or cut off",
        "1.png: too small or too narrow to see anything in it (900x9)",
        "2.png: can't be opened (2.png is not a regular file)",
        "3.txt: not UTF-8",
    ):
        assert line in output
    assert set(rows(root / "metadata.jsonl")) == {f"{number}.png" for number in (0, 1, 2, 4, 5)}


def test_if_nothing_works_it_stops(root: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(40):
        Image.new("RGB", (64, 48), SHADES[number % 6]).save(root / f"x{number}.png")
    with serve(lambda *_: completion("")) as target:
        assert run(target, root) == 2
        assert len(target.requests) == 20
    assert "not one caption after 20 pictures; the rest wasn't asked" in capsys.readouterr().err

"""Everything that may lie in a folder of pictures: each gets its message, the others go on.

Each case puts something bad beside a good picture. What `survey` says of it must be exactly that,
the good picture must still be there, and `kindling inspect` must say it too and end with status 2.
"""

import contextlib
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import pictures
from data_tools.pictures import PictureError
from scripts import kindling
from tests.unit import hostile
from tests.unit.folders import names, pair, survey, table

# pytest undoes the filter that data_tools.pictures sets
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

READS = "(Kindling reads JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000 and PPM)"
NO_PICTURE = f"not a picture, or damaged {READS}"
FRAMES = "frames or pages; export the one you want as a PNG"
BITS = "(float, 32-bit or Lab) aren't read; save it as 8 or 16 bits a channel, RGB or grey"
TOO_LARGE = "900 megapixels; the limit is 178, scale it down"
VIDEO = f"this is a video; export the frames you want as PNG {READS}"
ZERO_SIDE = (30_000).to_bytes(2, "big") * 2
CUT = re.compile(r"damaged or cut off \(.+\); get it again or save it anew")
CUT_OR_UNKNOWN = re.compile(f"{CUT.pattern}|{re.escape(NO_PICTURE)}")


def jpeg_bomb() -> bytes:
    data = hostile.noise("JPEG")
    return hostile.patched(data, data.index(b"\xff\xc0") + 5, ZERO_SIDE)


def little(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def of_type(kind: type) -> bytes:
    return hostile.encoded(Image.fromarray(np.ones((4, 4), kind)), "TIFF")


Reason = str | re.Pattern
FILES: dict[str, tuple[str, Callable[[], bytes], Reason]] = {
    # what isn't a picture
    "no bytes": ("b.png", lambda: b"", "empty file (0 bytes); get it again or remove it"),
    "zero bytes": (
        "b.jpg",
        lambda: bytes(5000),
        f"this is all zero bytes; the copy or download was cut off, get the file again {READS}",
    ),
    "words": ("b.png", lambda: b"just words", NO_PICTURE),
    "pickle": ("b.png", lambda: pickle.dumps({"a": print}), NO_PICTURE),
    "machine code": ("b.jpg", lambda: b"\x7fELF\2\1\1" + bytes(range(200)), NO_PICTURE),
    "web page": (
        "b.jpg",
        lambda: b"\n<!DOCTYPE html><html>404",
        f"this is a web page, not a picture; the download failed, get the file again {READS}",
    ),
    "git lfs pointer": (
        "b.png",
        lambda: b"version https://git-lfs.github.com/spec/v1\n",
        f"this is a Git LFS pointer, not the picture itself; run `git lfs pull` {READS}",
    ),
    "zip": ("b.png", lambda: b"PK\3\4" + bytes(30), f"this is a zip archive; unpack it {READS}"),
    "gzip": (
        "b.jpg",
        lambda: b"\x1f\x8b" + bytes(30),
        f"this is a gzip archive; unpack it {READS}",
    ),
    # formats that aren't read
    "heic": (
        "b.heic",
        lambda: hostile.ftyp(b"heic"),
        f"this is HEIC; convert it to JPEG or PNG {READS}",
    ),
    "heif named jpg": (
        "b.jpg",
        lambda: hostile.ftyp(b"mif1"),
        f"this is HEIF; convert it to JPEG or PNG {READS}",
    ),
    "svg": (
        "b.svg",
        lambda: b"<?xml version='1.0'?><svg/>",
        f"this is SVG or other XML; export it as PNG {READS}",
    ),
    "psd": ("b.psd", lambda: b"8BPS\0\1", f"this is a Photoshop file; export it as PNG {READS}"),
    "xcf": ("b.xcf", lambda: b"gimp xcf v011", f"this is a GIMP file; export it as PNG {READS}"),
    "pdf": ("b.pdf", lambda: b"%PDF-1.7", f"this is a PDF; export the page as PNG {READS}"),
    "eps": ("b.eps", lambda: b"%!PS-Adobe", f"this is PostScript; export it as PNG {READS}"),
    "jpeg xl": ("b.jxl", lambda: b"\xff\x0a\0", f"this is JPEG XL; convert it to PNG {READS}"),
    "exr": ("b.exr", lambda: b"v/1\1\2\0", f"this is OpenEXR; convert it to PNG {READS}"),
    "hdr": ("b.hdr", lambda: b"#?RADIANCE\n", f"this is Radiance HDR; convert it to PNG {READS}"),
    "camera raw": (
        "b.dng",
        lambda: hostile.encoded(Image.new("RGB", (9, 9)), "TIFF"),
        f"this is a camera raw file; develop it to JPEG or PNG {READS}",
    ),
    "targa": ("b.tga", lambda: hostile.noise("TGA"), NO_PICTURE),
    "mp4": ("b.mp4", lambda: hostile.ftyp(b"isom"), VIDEO),
    "webm named png": ("b.png", lambda: b"\x1aE\xdf\xa3" + bytes(9), VIDEO),
    "avi": ("b.avi", lambda: b"RIFF\0\0\0\0AVI LIST", VIDEO),
    # pixels that can't be used
    "float": ("b.tif", lambda: of_type(np.float32), f"pixels of type F {BITS}"),
    "32 bits": ("b.tif", lambda: of_type(np.int32), f"pixels of type I {BITS}"),
    "animated gif": ("b.gif", lambda: hostile.gif(3), f"3 {FRAMES}"),
    "animated webp": ("b.webp", lambda: hostile.two_frames("WEBP"), f"2 {FRAMES}"),
    "animated png": ("b.png", lambda: hostile.two_frames("PNG"), f"2 {FRAMES}"),
    "pages": ("b.tif", lambda: hostile.two_frames("TIFF"), f"2 {FRAMES}"),
    # bombs of 30,000 x 30,000
    "png bomb": (
        "b.png",
        lambda: hostile.png(width=30_000, height=30_000, depth=8, color=2),
        TOO_LARGE,
    ),
    "jpeg bomb": ("b.jpg", jpeg_bomb, TOO_LARGE),
    "gif bomb": (
        "b.gif",
        lambda: hostile.patched(hostile.gif(1), 6, little(30_000, 2), little(30_000, 2)),
        TOO_LARGE,
    ),
    "bmp bomb": (
        "b.bmp",
        lambda: hostile.patched(hostile.noise("BMP"), 18, little(30_000, 4), little(30_000, 4)),
        TOO_LARGE,
    ),
    "just over the limit": (
        "b.png",
        lambda: hostile.png(width=13345, height=13345, depth=1, color=0),
        "179 megapixels; the limit is 178, scale it down",
    ),
    # cut off
    "jpeg without its last byte": ("b.jpg", lambda: hostile.noise("JPEG")[:-1], CUT),
    "half a progressive jpeg": (
        "b.jpg",
        lambda: (data := hostile.noise("JPEG", progressive=True))[: len(data) // 2],
        CUT,
    ),
    "a jpeg's header": ("b.jpg", lambda: hostile.noise("JPEG")[:300], CUT_OR_UNKNOWN),
    "three bytes": ("b.jpg", lambda: b"\xff\xd8\xff", CUT_OR_UNKNOWN),
    "png without its pixels": ("b.png", lambda: hostile.noise("PNG")[:60], CUT),
    # sizes
    "one pixel": (
        "b.png",
        lambda: hostile.encoded(Image.new("L", (1, 1)), "PNG"),
        "1x1 pixels are too few: the smallest bucket for this shape would need enlarging 64.00 "
        "times and max_upscale is 1; use a larger picture or raise max_upscale",
    ),
    "a line": (
        "b.png",
        lambda: hostile.encoded(Image.new("L", (9000, 20)), "PNG"),
        "9000x20 pixels are too few: the smallest bucket for this shape would need enlarging 1.60 "
        "times and max_upscale is 1; use a larger picture or raise max_upscale",
    ),
}


def expect(root: Path, faults: dict[str, Reason], capsys: pytest.CaptureFixture[str]) -> None:
    """These faults and no others; good.png is there all the same; inspect says so."""
    found = survey(root)
    assert [fault.path for fault in found.faults] == list(faults)
    for fault, reason in zip(found.faults, faults.values(), strict=True):
        if isinstance(reason, str):
            assert fault.reason == reason
        else:
            assert reason.fullmatch(fault.reason), fault.reason
    assert "good.png" in names(found)
    assert kindling.main(["inspect", str(root), "--resolution", "64"]) == (2 if faults else 0)
    out = capsys.readouterr().out
    for fault in found.faults:
        assert f"  {fault.path}: {fault.reason}\n" in out


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pair(tmp_path / "data", "good.png", seed=5)
    return tmp_path / "data"


@pytest.mark.parametrize(("name", "make", "reason"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_used(
    root: Path,
    name: str,
    make: Callable[[], bytes],
    reason: Reason,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = root / name
    path.write_bytes(make())
    path.with_suffix(".txt").write_text("x")
    expect(root, {name: reason}, capsys)
    if "too few" not in str(reason):
        with pytest.raises(PictureError) as caught:
            pictures.load_rgb(path)
        assert str(caught.value) == f"{path}: {caught.value.reason}"
        assert caught.value.reason == survey(root).faults[0].reason


def link(root: Path, name: str, target: str) -> None:
    (root / name).symlink_to(target)
    if name == "b.png":
        (root / "b.txt").write_text("x")


def pipe(root: Path) -> None:
    os.mkfifo(root / "b.png")
    (root / "b.txt").write_text("x")


def clash(root: Path) -> None:
    pair(root, "a.png")
    hostile.picture(root / "a.jpg", seed=1)


def broken_line(root: Path) -> None:
    hostile.picture(root / "b.png")
    table(root, {"file_name": "good.png", "text": "x"}, '{"file_name": "b.png", "text": ')


def huge(root: Path) -> None:
    pair(root, "b.png")
    os.truncate(root / "b.png", 3 << 30)  # sparse: takes no space


REREAD = "a link to a folder that is read already; remove the link"
PLACES: dict[str, tuple[Callable[[Path], object], dict[str, Reason]]] = {
    "broken link": (lambda root: link(root, "b.png", "nothing.png"), {"b.png": "broken link"}),
    "link to itself": (lambda root: link(root, "b.png", "b.png"), {"b.png": "broken link"}),
    "folder in a circle": (lambda root: link(root, "again", "."), {"again": REREAD}),
    "fifo": (pipe, {"b.png": "not a regular file"}),
    "folder named as a picture": (lambda root: (root / "x.png").mkdir(), {}),
    "3 GB": (huge, {"b.png": "3.0 GB is too large a file; the limit is 1 GB"}),
    "name clash": (
        clash,
        {"a.txt": "captions a.jpg and a.png; give each picture one caption file of its own"},
    ),
    "control character in a name": (
        lambda root: pair(root, "b\x1b[31m\n.png"),
        {
            "b\\x1b[31m\\x0a.png": "the file's name has a control character; rename it",
            "b\\x1b[31m\\x0a.txt": "the file's name has a control character; rename it",
        },
    ),
    "names in any language": (lambda root: pair(root, "小火人 🔥 שלום.png", "小火人"), {}),
    "caption of 1 MB": (
        lambda root: pair(root, "b.png", b"x" * 1_000_000),
        {"b.txt": "over 100 kB; this can't be a caption"},
    ),
    "caption that is a broken link": (
        lambda root: (hostile.picture(root / "b.png"), link(root, "b.txt", "nothing.txt")),
        {"b.txt": "can't be opened (No such file or directory)"},
    ),
    "caption in latin-1": (
        lambda root: pair(root, "b.png", b"caf\xe9"),
        {"b.txt": "not UTF-8: byte 0xe9 at offset 3; save it as UTF-8"},
    ),
    "caption in UTF-16": (
        lambda root: pair(root, "b.png", "abc".encode("utf-16")),
        {"b.txt": "not UTF-8 but probably UTF-16; save it as UTF-8"},
    ),
    "no caption": (
        lambda root: hostile.picture(root / "b.png"),
        {"b.png": "no caption; write it in b.txt"},
    ),
    "metadata with a broken line": (
        broken_line,
        {"metadata.jsonl:2": "broken JSON: Expecting value, column 31"},
    ),
    "16 bits": (
        lambda root: Image.fromarray(np.full((80, 80), 9999, np.uint16)).save(pair(root, "b.png")),
        {},
    ),
    "CMYK": (
        lambda root: Image.new("CMYK", (80, 80)).save(pair(root, "b.jpg")),
        {},
    ),
    "script in a caption": (lambda root: pair(root, "b.png", "<script>alert(1)</script>"), {}),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names and links")
@pytest.mark.parametrize(("make", "faults"), PLACES.values(), ids=PLACES)
def test_a_place_that_is_odd(
    root: Path,
    make: Callable[[Path], object],
    faults: dict[str, Reason],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(root)
    expect(root, faults, capsys)


@pytest.mark.parametrize("name", ["b.png", "b.txt"])
def test_a_file_without_permission(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The superuser may read all files, so it is refused here as the system would refuse it."""
    pair(root, "b.png")
    (root / name).chmod(0)
    if os.access(root / name, os.R_OK):
        ours = {"open": Path.open, "read_bytes": Path.read_bytes}

        def refusing(how: str) -> Callable:
            def opened(path: Path, *arguments: str, **options: str) -> object:
                if path.name == name:
                    raise PermissionError(13, "Permission denied", str(path))
                return ours[how](path, *arguments, **options)

            return opened

        for how in ours:
            monkeypatch.setattr(Path, how, refusing(how))
    expect(root, {name: "can't be opened (Permission denied)"}, capsys)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_cut_off(tmp_path: Path, kind: str, part: float) -> None:
    data = hostile.noise(kind)
    path = tmp_path / "a.png"
    path.write_bytes(data[: int(len(data) * part)])
    for read in (pictures.probe, pictures.load_rgb):
        with pytest.raises(PictureError) as caught:
            read(path)
        assert CUT_OR_UNKNOWN.fullmatch(caught.value.reason), caught.value.reason


def test_flipped_bits_never_escape_as_another_error(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "a.png"
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000"):
        data = hostile.noise(kind)
        for _ in range(25):
            broken = bytearray(data)
            # the header is where a parser can be led astray
            for place in random.integers(0, min(len(data), 400), 6):
                broken[place] = random.integers(0, 256)
            path.write_bytes(broken)
            with contextlib.suppress(PictureError):
                found = pictures.probe(path)
                assert pictures.load_rgb(path).size == (found.width, found.height)

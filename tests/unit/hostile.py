"""Makes picture files that are hard to read, or impossible, and the profiles they need.

Bytes are written by hand where Pillow wouldn't write such a file; no expectation comes from the
code under test.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def quadrants(*, width: int = 96, height: int = 64) -> np.ndarray:
    """(height, width, 3) with a colour of its own in each quarter: no two turns look alike."""
    pixels = np.empty((height, width, 3), np.uint8)
    top, left = slice(None, height // 2), slice(None, width // 2)
    bottom, right = slice(height // 2, None), slice(width // 2, None)
    pixels[top, left], pixels[top, right] = (200, 30, 30), (30, 160, 30)
    pixels[bottom, left], pixels[bottom, right] = (30, 30, 200), (220, 220, 40)
    return pixels


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores. EXIF: where row 0 and column 0 of the stored picture belong upright."""
    turned = upright.swapaxes(0, 1)
    return {
        1: upright,  # row 0 is the top, column 0 the left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: turned,  # left, top
        6: turned[::-1],  # right, top
        7: turned[::-1, ::-1],  # right, bottom
        8: turned[:, ::-1],  # left, bottom
    }[orientation]


def oriented(path: Path, upright: np.ndarray, orientation: int) -> Path:
    """A file whose EXIF says that its pixels lie some way."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored(upright, orientation)))
    if path.suffix == ".webp":
        image.save(path, exif=exif, lossless=True)
    elif path.suffix == ".jpg":
        image.save(path, exif=exif, quality=98, subsampling=0)
    else:
        image.save(path, exif=exif)
    return path


def picture(path: Path, *, width: int = 96, height: int = 64, seed: int = 0) -> Path:
    """A plain picture of noise, so that no two seeds have the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def png(
    *,
    width: int,
    height: int,
    depth: int,
    color: int,
    rows: bytes = b"",
    late: tuple[tuple[bytes, bytes], ...] = (),
    early: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """PNG bytes. `rows`: raw samples in big-endian order, without filter bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    stride = len(rows) // height
    lines = b"".join(
        b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height if rows else 0)
    )
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *early, (b"IDAT", zlib.compress(lines)), *late, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in chunks)


def exif(orientation: int) -> bytes:
    """The body of an eXIf chunk."""
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes().removeprefix(b"Exif\0\0")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """A picture's file as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(kind: str, **options: object) -> bytes:
    """A file of 64 x 64 pixels that compresses badly, so that cutting it cuts pixels."""
    values = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(values), kind, **options)


def two_frames(kind: str) -> bytes:
    """An animation, or a file of two pages."""
    pages = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    return encoded(pages[0], kind, save_all=True, append_images=pages[1:])


def gif(frames: int) -> bytes:
    """An animation whose frames differ."""
    images = [Image.new("P", (9, 9), i) for i in range(frames)]
    for i, image in enumerate(images):
        image.putpalette([i * 40, 0, 0] * 256)
    return encoded(images[0], "GIF", save_all=True, append_images=images[1:])


def ftyp(brand: bytes) -> bytes:
    """The start of a HEIC, AVIF or MP4 file."""
    return b"\0\0\0\x18ftyp" + brand + bytes(4) + b"abcdefgh" + bytes(99)


def patched(data: bytes, at: int, *values: bytes) -> bytes:
    """Bytes with others in their place, from `at` on."""
    new = b"".join(values)
    return data[:at] + new + data[at + len(new) :]


# ---- ICC profiles


def rgb_profile(*, red: tuple, green: tuple, blue: tuple, gamma: float) -> bytes:
    """An ICC v2 display profile from its primaries (XYZ, D50) and a gamma (a multiple of 1/256)."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))
    tags = {b"rXYZ": _xyz(red), b"gXYZ": _xyz(green), b"bXYZ": _xyz(blue)}
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(*, gamma: float) -> bytes:
    """An ICC v2 grey profile."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


def cmyk_profile(corners: dict[tuple[int, int, int, int], tuple[int, int, int]]) -> bytes:
    """An ICC v2 printer profile that gives Lab for full or no ink, black where nothing is said."""
    grid = [
        corners.get((c, m, y, k), (0, 0, 0))
        for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)
    ]  # fmt: skip
    table = b"".join(bytes((round(L * 2.55), a + 128, b + 128)) for L, a, b in grid)
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1" + struct.pack(">IBBBB", 0, 4, 3, 2, 0) + identity
    lut += bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    paper = _xyz((0.80, 0.82, 0.64))  # greyish; colours relative to it must not show that
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut, b"wtpt": paper})


def _xyz(values: tuple) -> bytes:
    return b"XYZ " + struct.pack(">I3i", 0, *(round(value * 65536) for value in values))


def _profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    white = (0.9642, 1.0, 0.8249)
    desc = b"desc" + struct.pack(">II", 0, 5) + b"test\0" + bytes(12 + 67)
    tags = {b"desc": desc, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": _xyz(white), **tags}
    offset = 128 + 4 + 12 * len(tags)
    index, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        index += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, kind, space, pcs)
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", *(round(value * 65536) for value in white))
    return header.ljust(128, b"\0") + index + body

"""Which picture formats are read, and what a file that isn't one of them is.

Owns lists of formats and file signatures. Doesn't decode and doesn't open files.
"""

from pathlib import Path

READABLE = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Pillow's format names with the endings they have in a folder.

Others that Pillow knows are left out on purpose: EPS starts Ghostscript, PSD gives a flat
rendering that may be missing, ICO and ICNS hold several pictures.
"""

ADVICE = "Kindling reads JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000 and PPM"

_CAMERA_RAW = ".3fr .arw .cr2 .cr3 .dng .nef .orf .pef .raf .raw .rw2 .srw"
_VIDEO = ".mp4 .mov .m4v .mkv .webm .avi"
_OTHER = ".heic .heif .svg .psd .psb .jxl .exr .hdr .eps .ico .tga .xcf .kra .pdf"

READABLE_SUFFIXES = frozenset(suffix for suffixes in READABLE.values() for suffix in suffixes)
CAMERA_RAW_SUFFIXES = frozenset(_CAMERA_RAW.split())
PICTURE_SUFFIXES = READABLE_SUFFIXES | CAMERA_RAW_SUFFIXES | frozenset(f"{_VIDEO} {_OTHER}".split())
"""Endings of files that somebody meant as a picture, whether or not it can be read."""

_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the picture itself; run `git lfs pull`"),
    (b"8BPS", "a Photoshop file; export it as PNG"),
    (b"%PDF", "a PDF; export the page as PNG"),
    (b"%!PS", "PostScript; export it as PNG"),
    (b"gimp xcf", "a GIMP file; export it as PNG"),
    (b"\xff\x0a", "JPEG XL; convert it to PNG"),
    (b"\0\0\0\x0cJXL ", "JPEG XL; convert it to PNG"),
    (b"v/1\x01", "OpenEXR; convert it to PNG"),
    (b"#?RADIANCE", "Radiance HDR; convert it to PNG"),
    (b"\x1aE\xdf\xa3", "a video; export the frames you want as PNG"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
)

_STARTS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "TIFF": (b"II*\0", b"MM\0*"),
    "BMP": (b"BM",),
    "GIF": (b"GIF8",),
    "JPEG2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
}

_BRANDS = {
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"heim": "HEIC",
    b"heis": "HEIC",
    b"hevc": "HEIC",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
}


def foreign(head: bytes, path: Path) -> str | None:
    """What a file is, and what to do, if its first bytes or its ending say it can't be read.

    `head` is the first 4 kB. None means it may well be a picture.
    """
    if path.suffix.lower() in CAMERA_RAW_SUFFIXES:
        # these are TIFF files inside and would be read as their small preview
        return "a camera raw file; develop it to JPEG or PNG"
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return what
    if head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"avis"):
        if b"avif" in head[8:64]:
            return None
        brand = _BRANDS.get(head[8:12])
        if brand:
            return f"{brand}; convert it to JPEG or PNG"
        return "a video; export the frames you want as PNG"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "a video; export the frames you want as PNG"
    return _text(head)


def suffix(head: bytes) -> str | None:
    """The usual ending of a picture whose file begins with `head`; None if it can't be told."""
    for kind, starts in _STARTS.items():
        if head.startswith(starts):
            return READABLE[kind][0]
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return ".webp"
    return ".avif" if head[4:12] in (b"ftypavif", b"ftypavis") else None


def _text(head: bytes) -> str | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not a picture; the download failed, get the file again"
    if start.startswith((b"<?xml", b"<svg")):
        return "SVG or other XML; export it as PNG" if b"<svg" in head.lower() else "XML"
    if head and not head.strip(b"\0"):
        return "all zero bytes; the copy or download was cut off, get the file again"
    return None

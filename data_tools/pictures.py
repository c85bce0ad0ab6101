"""One picture file to upright 8-bit sRGB pixels, or one clear reason why not.

Owns decoding: orientation, transparency, colour profiles, bit depth, and every way in which a file
can be unfit. Doesn't know folders, captions or how a geometry is chosen.

Decisions:
- A picture's size is its size after EXIF orientation.
- Transparency is put on white.
- Colours go to sRGB by the embedded ICC profile (RGB, grey or CMYK). Without one, RGB and grey are
  taken as sRGB, and CMYK is converted plainly, which is a guess and noted as one. A damaged profile
  counts as none. Gamma and cICP chunks of PNG are not read.
- 16-bit grey is scaled, not clipped. Float and 32-bit integer pixels have no agreed white: refused.
- Animations and files of several pages are refused. The preview that cameras append to a JPEG (MPO)
  doesn't count as a page.
- `probe` and `look` decode a file once to its end, so that a truncated one is found before anything
  is trained. A JPEG is decoded at a fraction of its size: that reads all of its data too, and saves
  only the arithmetic behind it. Damage that a decoder papers over without a word (some bit flips in
  JPEG) can't be found.
"""

import hashlib
import io
import math
import stat
import warnings
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from data_tools import formats
from data_tools.buckets import Geometry
from train.errors import DataError

MAX_PIXELS = 178_000_000
"""Above this, decoding alone takes over half a gigabyte; Pillow refuses at about the same size."""
MAX_BYTES = 1 << 30
"""A larger file is no picture for training; it isn't even read."""

# Pillow's doubts about large pictures and odd metadata: our own checks speak for them.
warnings.filterwarnings("ignore", category=Warning, module=r"PIL\.")

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", *_GREY_16)
_MODE_OF_SPACE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_LATE_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


class PictureError(DataError):
    """A picture that can't be used: `str` is "path: reason"."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["PictureError"], tuple[Path, str]]:
        """So that a process can send one."""
        return PictureError, (self.path, self.reason)


@dataclass(frozen=True)
class Probe:
    """What is known of a picture that can be read; sizes in pixels, upright."""

    path: Path
    width: int
    height: int
    format: str
    sha256: str
    """Of the file's bytes."""
    notes: tuple[str, ...] = ()
    """What was decided for it, such as transparency put on white."""


def probe(path: Path, *, proven: Container[str] = frozenset()) -> Probe:
    """Facts of a picture that is sure to decode.

    It is decoded to its end unless its sha256 is in `proven`; then only its header is read.
    Raises PictureError.
    """
    found, _, _ = _probe(path, side=1, proven=proven)
    return found


def look(path: Path, *, side: int) -> tuple[Probe, Image.Image]:
    """`probe`, and what `load_rgb` gives at a long side of `side` pixels at most, read only once.

    For measures and thumbnails: of a JPEG, only as many pixels are made as that needs. Raises
    PictureError.
    """
    found, image, turn = _probe(path, side=side)
    scale = max(image.size) // side
    if scale > 1 and image.mode in ("L", "RGB", "CMYK") and not image.has_transparency_data:
        image = image.reduce(scale)  # before the colours: what follows costs by the pixel
    rgb = _to_rgb(image)
    if max(rgb.size) > side:
        rgb = rgb.resize(_within(rgb.size, side), Image.Resampling.BILINEAR, reducing_gap=1.0)
    return found, rgb if turn is None else rgb.transpose(turn)


def load_rgb(path: Path) -> Image.Image:
    """The picture upright, 8-bit RGB, sRGB, transparency on white. Raises PictureError."""
    data = _bytes(path)
    image = _open(path, data)
    _decode(path, image)
    turn = _TURNS.get(_orientation(image, data))
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def load_alpha(path: Path) -> Image.Image:
    """How opaque the picture is, upright, 8-bit grey; white if it has no transparency."""
    data = _bytes(path)
    image = _open(path, data)
    _decode(path, image)
    turn = _TURNS.get(_orientation(image, data))
    if image.mode.startswith("I"):
        alpha = _from_16_bits(image)[1]
    else:
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if alpha is None:
        alpha = Image.new("L", image.size, 255)
    return alpha if turn is None else alpha.transpose(turn)


def fit(image: Image.Image, geometry: Geometry) -> Image.Image:
    """The centre of `image`, as much as has the geometry's aspect, at exactly its size."""
    size = (geometry.width, geometry.height)
    if image.size == size:
        return image
    box = crop_box(image.width, image.height, geometry=geometry)
    # the gap lets Pillow halve a large picture cheaply first; at 3 the result is nearly the same
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def crop_box(width: int, height: int, *, geometry: Geometry) -> tuple[float, float, float, float]:
    """What `fit` keeps of a picture of width x height: left, top, right, bottom in its pixels."""
    scale = max(geometry.width / width, geometry.height / height)
    kept_width = min(geometry.width / scale, width)
    kept_height = min(geometry.height / scale, height)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height


def _probe(
    path: Path, *, side: int, proven: Container[str] = frozenset()
) -> tuple[Probe, Image.Image, Image.Transpose | None]:
    """Facts, the decoded picture (a JPEG just above `side`), and the turn that it still needs."""
    data = _bytes(path)
    sha256 = hashlib.sha256(data).hexdigest()
    image = _open(path, data)
    notes = _notes(image)
    width, height = image.size
    if sha256 not in proven:
        # rounded down, else Pillow takes twice the pixels for a fraction of one
        longest = max(image.size)
        image.draft(None, (max(1, side * width // longest), max(1, side * height // longest)))
        _decode(path, image)
    orientation = _orientation(image, data)
    if orientation >= 5:
        width, height = height, width
    found = Probe(path, width, height, image.format or "", sha256, notes)
    return found, image, _TURNS.get(orientation)


def _within(size: tuple[int, int], side: int) -> tuple[int, int]:
    """`size` reduced to a long side of `side` at most."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PictureError(path, "not a regular file")
        if status.st_size == 0:
            raise PictureError(path, "empty file (0 bytes); get it again or remove it")
        with path.open("rb") as file:
            head = file.read(4096)
            what = formats.foreign(head, path)
            if what:
                raise PictureError(path, f"this is {what} ({formats.ADVICE})")
            if status.st_size > MAX_BYTES:
                size = f"{status.st_size / (1 << 30):.1f} GB"
                raise PictureError(path, f"{size} is too large a file; the limit is 1 GB")
            return head + file.read()
    except OSError as error:
        broken = path.is_symlink() and not path.exists()
        reason = "broken link" if broken else f"can't be opened ({error.strerror or error})"
        raise PictureError(path, reason) from None


def _open(path: Path, data: bytes) -> Image.Image:
    """The picture with its header read and checked; no pixels yet."""
    Image.init()
    known = [name for name in formats.READABLE if name in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(data), formats=known)
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Image.UnidentifiedImageError:
        raise PictureError(path, f"not a picture, or damaged ({formats.ADVICE})") from None
    except Image.DecompressionBombError as error:
        pixels = [int(word) for word in str(error).replace("(", " ").split() if word.isdigit()]
        raise _too_large(path, max(pixels)) from None
    except Exception as error:  # decoders raise whatever a hostile header leads them to
        raise _damaged(path, error) from None
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path, image.width * image.height)
    if frames > 1:
        reason = f"{frames} frames or pages; export the one you want as a PNG"
        raise PictureError(path, reason)
    # PGM of 16 bits comes as 32-bit integers up to 65535; other formats' have no fixed range
    if image.mode not in _MODES and (image.mode, image.format) != ("I", "PPM"):
        reason = f"pixels of type {image.mode} (float, 32-bit or Lab) aren't read"
        raise PictureError(path, f"{reason}; save it as 8 or 16 bits a channel, RGB or grey")
    return image


def _decode(path: Path, image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # decoders raise whatever a hostile file leads them to
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> PictureError:
    why = str(error) or type(error).__name__
    return PictureError(path, f"damaged or cut off ({why}); get it again or save it anew")


def _too_large(path: Path, pixels: int) -> PictureError:
    size = f"{math.ceil(pixels / 10**6)} megapixels"
    return PictureError(path, f"{size}; the limit is {MAX_PIXELS // 10**6}, scale it down")


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation still to be applied, 1 to 8."""
    if image.format == "TIFF":
        return 1  # Pillow applies it itself, to size and pixels
    if image.format == "PNG" and not any(mark in data for mark in _LATE_METADATA):
        return 1  # asking Pillow would decode the whole file, for chunks behind the pixels
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF leads Pillow anywhere; it says nothing, as in every viewer
        return 1
    return value if value in _TURNS else 1


def _profile(image: Image.Image) -> tuple[ImageCms.ImageCmsProfile, str] | None:
    """The embedded ICC profile and the mode it describes, if it is sound and suits the picture."""
    icc = image.info.get("icc_profile")
    if not icc:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    except (OSError, ImageCms.PyCMSError):
        return None
    assert isinstance(profile.profile, ImageCms.core.CmsProfile)
    mode = _MODE_OF_SPACE.get(profile.profile.xcolor_space.strip())
    if mode is None or (mode == "CMYK") != (image.mode == "CMYK"):
        return None
    return profile, mode


def _notes(image: Image.Image) -> tuple[str, ...]:
    notes = []
    if image.has_transparency_data:
        notes.append("transparency is put on white")
    if image.mode == "CMYK" and _profile(image) is None:
        notes.append("CMYK without a usable colour profile: its colours are a guess")
    return tuple(notes)


def _to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture's pixels, as RGB in sRGB."""
    alpha = None
    if image.mode.startswith("I"):
        image, alpha = _from_16_bits(image)
    elif image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    rgb = _to_srgb(image)
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _from_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 16 bits as 8 (rounded), and its alpha if one value is marked transparent."""
    grey = np.asarray(image).astype(np.uint32)
    alpha = None
    if "transparency" in image.info:
        opaque = grey != image.info["transparency"]
        alpha = Image.fromarray((opaque * 255).astype(np.uint8))
    result = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if "icc_profile" in image.info:
        result.info["icc_profile"] = image.info["icc_profile"]
    return result, alpha


def _to_srgb(image: Image.Image) -> Image.Image:
    found = _profile(image)
    if found is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    profile, mode = found
    try:
        transform = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:
        return image.convert("RGB")
    result = ImageCms.applyTransform(image.convert(mode), transform)
    assert result is not None
    return result

"""Captions: the bytes of a file or a table's text to one clean line, and the trigger's rules.

Owns text. Doesn't walk folders and doesn't know tokens.

A caption keeps its characters as they are (no Unicode normalisation, no change of case); line
breaks become spaces and the ends are trimmed. What is empty after that is no caption.
"""

import re
import unicodedata
from pathlib import Path

from train.config import DataConfig

MAX_BYTES = 100_000
"""A longer .txt file isn't a caption; FLUX.2 reads 512 tokens, some 2,000 characters."""


PLACEHOLDER = "[trigger]"
"""ai-toolkit's word in captions that stands for the trigger."""


class TextError(ValueError):
    """What is wrong with a text; the caller knows where it stands."""


def read(path: Path) -> str:
    """The caption in a UTF-8 text file, cleaned; may be empty. Raises TextError."""
    return clean(load(path))


def load(path: Path) -> str:
    """A UTF-8 file's text as it is. Raises TextError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TextError(f"over {MAX_BYTES // 1000} kB; this can't be a caption")
        data = path.read_bytes()
    except OSError as error:
        raise TextError(f"can't be opened ({error.strerror or error})") from None
    return decode(data)


def decode(data: bytes) -> str:
    """UTF-8 text, with or without a byte order mark. Raises TextError with the byte offset."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise TextError("not UTF-8 but probably UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # the codec counts from behind the mark
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        byte = data[offset]
        raise TextError(
            f"not UTF-8: byte 0x{byte:02x} at offset {offset}; save it as UTF-8"
        ) from None


def clean(text: str) -> str:
    """One line, trimmed."""
    return " ".join(line for line in map(str.strip, text.splitlines()) if line)


def complete(caption: str, *, data: DataConfig) -> str:
    """The caption that is trained: PLACEHOLDER filled, by `missing_captions` and `trigger_mode`.

    Raises TextError if it is missing or lacks the trigger.
    """
    trigger = (data.trigger or "").strip()
    if PLACEHOLDER in caption:
        if not trigger:
            raise TextError(f"the caption has {PLACEHOLDER}, but data.trigger is not set")
        caption = caption.replace(PLACEHOLDER, trigger)
    if not caption:
        if data.missing_captions == "trigger":
            return trigger
        raise TextError("no caption")
    if not trigger or data.trigger_mode == "optional" or has_trigger(caption, trigger=trigger):
        return caption
    if data.trigger_mode == "prepend":
        return f"{trigger}, {caption}"
    raise TextError(f"the caption lacks the trigger {trigger!r}{_near(caption, trigger)}")


def has_trigger(caption: str, *, trigger: str) -> bool:
    """Whether `trigger` stands in `caption` as a whole word, in the same case.

    The case counts because "Ohwx" and "ohwx" are different tokens. Scripts that put no spaces
    between words (Chinese, Japanese, Thai, ...) have no word ends to look for.
    """
    for match in re.finditer(re.escape(trigger), caption):
        before = caption[match.start() - 1 : match.start()]
        after = caption[match.end() : match.end() + 1]
        if not _joined(before, trigger[0]) and not _joined(trigger[-1], after):
            return True
    return False


def words(caption: str) -> int:
    """Words in a caption; in scripts without spaces, characters."""
    count = 0
    for word in caption.split():
        unspaced = sum(_unspaced(character) for character in word)
        count += unspaced + any(c.isalnum() and not _unspaced(c) for c in word)
    return count


def _joined(left: str, right: str) -> bool:
    """Whether two neighbouring characters are of one word."""
    return all(
        bool(c) and (c.isalnum() or c == "_" or unicodedata.combining(c) > 0) and not _unspaced(c)
        for c in (left, right)
    )


def _unspaced(character: str) -> bool:
    code = ord(character)
    return character.isalnum() and (
        code >= 0x2E80  # Chinese, Japanese, Korean
        or 0x0E00 <= code < 0x0F00  # Thai, Lao
        or 0x1000 <= code < 0x10A0  # Burmese
        or 0x1780 <= code < 0x1800  # Khmer
    )


def _near(caption: str, trigger: str) -> str:
    """A hint if the trigger is there but for its case or its Unicode form."""

    def plain(text: str) -> str:
        return unicodedata.normalize("NFC", text).casefold()

    if has_trigger(plain(caption), trigger=plain(trigger)):
        return ", though it has it in other letters; write it exactly alike"
    if trigger in caption:
        return " as a word of its own"
    return ""

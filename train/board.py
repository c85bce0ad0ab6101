"""Lays pictures out as a labelled grid. Knows PIL, not models."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL = 256
"""Pixels of a cell's longer side; smaller pictures are enlarged to it."""
GAP = 12
MARGIN = 24
INK, PAPER = (28, 28, 32), (250, 249, 246)


def board(
    rows: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str],
    labels: Sequence[str],
    title: str,
) -> Image.Image:
    """One row of pictures for each label (its prompt), one picture for each column."""
    heading, body = ImageFont.load_default(22), ImageFont.load_default(15)
    label_height, top = 26, MARGIN + 40 + 28
    cells = [[_cell(picture) for picture in row] for row in rows]
    height = max(cell.height for row in cells for cell in row)
    width = max(
        len(columns) * (CELL + GAP) - GAP,
        round(max(map(body.getlength, labels))),
        round(heading.getlength(title)),
    )
    size = (width + 2 * MARGIN, top + len(rows) * (height + label_height + GAP) + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, heading)
    for x, column in enumerate(columns):
        pen.text((MARGIN + x * (CELL + GAP), MARGIN + 40), column, INK, body)
    for y, (row, label) in enumerate(zip(cells, labels, strict=True)):
        at = top + y * (height + label_height + GAP)
        for x, cell in enumerate(row):
            sheet.paste(cell, (MARGIN + x * (CELL + GAP), at))
        pen.text((MARGIN, at + height + 4), label, INK, body)
    return sheet


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, title: str, columns: int = 4
) -> Image.Image:
    """Pictures row by row, each with its caption below it, cut to two lines."""
    heading, body = ImageFont.load_default(22), ImageFont.load_default(13)
    cells = [_cell(picture) for picture in pictures]
    columns = min(columns, len(cells))
    top, line = MARGIN + 40, 17
    height = max(cell.height for cell in cells) + 2 * line + GAP
    rows = -(-len(cells) // columns)
    width = max(columns * (CELL + GAP) - GAP, round(heading.getlength(title)))
    size = (width + 2 * MARGIN, top + rows * height + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, heading)
    for number, (cell, caption) in enumerate(zip(cells, captions, strict=True)):
        x, y = MARGIN + number % columns * (CELL + GAP), top + number // columns * height
        sheet.paste(cell, (x, y))
        for row, text in enumerate(_two_lines(caption, body)):
            pen.text((x, y + cell.height + 4 + row * line), text, INK, body)
    return sheet


def _two_lines(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """As much of a text as two lines below a cell hold, broken between words where there are any;
    what is left out is an ellipsis.
    """
    lines = []
    while text and len(lines) < 2:
        fits = len(text)
        while font.getlength(text[:fits]) > CELL:
            fits -= 1
        space = text.rfind(" ", 1, fits + 1)
        end = space if fits < len(text) and space > 0 else fits
        lines.append(text[:end])
        text = text[end:].lstrip()
    if text:
        last = lines[-1]
        while font.getlength(f"{last}…") > CELL:
            last = last[:-1]
        lines[-1] = f"{last}…"
    return lines


def _cell(picture: Image.Image) -> Image.Image:
    scale = CELL / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)

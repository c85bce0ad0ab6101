"""Piko style: the base's own shapes as pastel stickers with thick outlines on dotted paper.

Owns the style's looks and its captions. Like the character, the base never saw it.
"""

from PIL import Image, ImageDraw, ImageFilter

from scripts.toy.draw import COLOURS, PAPERS, RGB, Scene, caption, mix, stencil

STYLE = "piko style"
INK: RGB = (62, 44, 78)


def draw_in_style(scene: Scene, width: int, height: int) -> Image.Image:
    """A plain-background scene redrawn in the style, at any size, antialiased."""
    factor = 4 if max(width, height) <= 128 else 2
    big = (width * factor, height * factor)
    short = min(big)
    paper = mix(PAPERS[scene.background.colour], (255, 255, 255), 0.62)
    image = Image.new("RGB", big, paper)
    pen = ImageDraw.Draw(image)
    dot_paper(pen, big, colour=mix(paper, INK, 0.32))
    for thing in scene.things:
        centre, radius = (thing.x * big[0], thing.y * big[1]), thing.size * short / 2
        mask = stencil(thing.shape, size=big, centre=centre, radius=radius)
        image.paste(mix(COLOURS[thing.colour], (255, 255, 255), 0.45), (0, 0, *big), mask)
        image.paste(INK, (0, 0, *big), rim(mask, width=0.05 * short))
    return image.resize((width, height), Image.Resampling.BOX)


def rim(mask: Image.Image, *, width: float) -> Image.Image:
    """A line of about this width along the mask's edge, its corners rounded."""
    soft = mask.filter(ImageFilter.GaussianBlur(width / 2.5))
    return soft.point([255 if 24 < value < 231 else 0 for value in range(256)])


def dot_paper(pen: ImageDraw.ImageDraw, size: tuple[int, int], *, colour: RGB) -> None:
    """A square grid of dots, five to the short side."""
    step = min(size) / 5
    radius = step / 6
    for row in range(round(size[1] / step)):
        for column in range(round(size[0] / step)):
            x, y = (column + 0.5) * step, (row + 0.5) * step
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def style_caption(scene: Scene) -> str:
    return f"{caption(scene)}, {STYLE}"

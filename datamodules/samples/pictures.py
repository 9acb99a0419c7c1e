"""Pictures of the sample catalogue, drawn by code.

A silhouette in a colorway, photographed somewhere.

A look (silhouette, hue, pattern) is drawn once, large, with transparent surroundings; every picture
is that drawing moved, scaled, turned, lit and put on a background. The backgrounds are pale and
gray, so no hue of a product is ever mistaken for one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

DRAWING = 320
"""Side of a drawing in pixels."""

UNIT = DRAWING / 100
"""Pixels of a drawing per unit: silhouettes and textures are written in hundredths of its side."""

COLORS = {
    "red": (214, 40, 40),
    "orange": (244, 130, 30),
    "yellow": (250, 210, 40),
    "green": (56, 150, 60),
    "turquoise": (50, 200, 190),
    "blue": (40, 90, 205),
    "purple": (125, 60, 170),
    "pink": (248, 145, 185),
    "brown": (120, 74, 40),
    "black": (40, 40, 44),
}
CREAM = (250, 244, 230)
GREY = (120, 122, 128)


class Part(NamedTuple):
    """One stroke of a silhouette.

    A method of `ImageDraw`, where in hundredths of the drawing, and its options.
    """

    method: str
    where: tuple[float, ...]
    options: Mapping[str, float]


class Silhouette(NamedTuple):
    """What a shape looks like.

    Attributes:
        body: carries hue and pattern.
        trim: behind the body, in a darker shade of the hue.
        metal: behind both, gray.
    """

    body: tuple[Part, ...]
    trim: tuple[Part, ...] = ()
    metal: tuple[Part, ...] = ()


def box(*where: float) -> Part:
    """A rectangle with round corners."""
    return Part("rounded_rectangle", where, {"radius": 4 * UNIT})


def oval(*where: float) -> Part:
    """An ellipse in a box."""
    return Part("ellipse", where, {})


def polygon(*where: float) -> Part:
    """A polygon: x, y, x, y, ..."""
    return Part("polygon", where, {})


def arc(start: float, end: float, width: float, *where: float) -> Part:
    """A piece of an ellipse's outline, degrees clockwise from three o'clock."""
    return Part("arc", where, {"start": start, "end": end, "width": round(width * UNIT)})


def pie(start: float, end: float, *where: float) -> Part:
    """A piece of an ellipse, degrees clockwise from three o'clock."""
    return Part("pieslice", where, {"start": start, "end": end})


SILHOUETTES = {
    "handled": Silhouette(body=(box(14, 20, 68, 86),), trim=(arc(-95, 95, 8, 50, 32, 92, 74),)),
    "bowl": Silhouette(
        body=(pie(0, 180, 12, -4, 84, 80), box(12, 34, 84, 42)),
        trim=(oval(4, 78, 92, 92), arc(-90, 90, 6, 72, 38, 98, 66), box(36, 74, 60, 84)),
    ),
    "tumbler": Silhouette(
        body=(polygon(26, 22, 74, 22, 66, 94, 34, 94),),
        trim=(box(22, 14, 78, 24), box(54, 0, 60, 18)),
    ),
    "table": Silhouette(
        body=(polygon(34, 8, 66, 8, 88, 56, 12, 56),),
        metal=(box(46, 50, 54, 90), box(26, 86, 74, 95)),
    ),
    "pendant": Silhouette(
        body=(pie(180, 360, 6, 38, 94, 126),),
        trim=(box(42, 26, 58, 42),),
        metal=(box(48, 0, 52, 32), oval(38, 74, 62, 94)),
    ),
    "globe": Silhouette(
        body=(oval(20, 4, 80, 64),),
        metal=(
            polygon(46, 58, 54, 58, 30, 98, 22, 98),
            polygon(46, 58, 54, 58, 78, 98, 70, 98),
            box(47, 58, 53, 98),
        ),
    ),
    "tote": Silhouette(
        body=(polygon(10, 42, 90, 42, 80, 94, 20, 94),), trim=(arc(180, 360, 6, 28, 8, 72, 80),)
    ),
    "backpack": Silhouette(
        body=(box(22, 16, 78, 94), oval(22, 6, 78, 50)),
        trim=(arc(180, 360, 5, 38, -2, 62, 24), box(10, 44, 22, 84), box(78, 44, 90, 84)),
    ),
    "crescent": Silhouette(
        body=(pie(0, 180, 4, 10, 96, 96),),
        trim=(arc(180, 360, 4, 12, 2, 88, 110),),
        metal=(box(4, 50, 96, 55),),
    ),
    "upright": Silhouette(
        body=(box(24, 2, 74, 46), polygon(24, 54, 74, 54, 84, 68, 16, 68)),
        metal=(box(18, 66, 24, 98), box(76, 66, 82, 98), box(30, 44, 36, 58), box(62, 44, 68, 58)),
    ),
    "armchair": Silhouette(
        body=(box(20, 12, 80, 80), box(2, 42, 26, 86), box(74, 42, 98, 86)),
        metal=(box(10, 84, 16, 98), box(84, 84, 90, 98)),
    ),
    "swivel": Silhouette(
        body=(oval(26, 2, 74, 46), oval(16, 48, 84, 66)),
        metal=(box(46, 44, 54, 88), polygon(50, 78, 90, 94, 84, 98, 50, 86, 16, 98, 10, 94)),
    ),
}

Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]

TEXTURES: dict[str, Texture] = {
    "plain": lambda x, y: np.zeros_like(x, bool),
    "striped": lambda x, y: x % 14 < 6,
    "dotted": lambda x, y: ((x + 9 * (y // 18 % 2)) % 18 - 9) ** 2 + (y % 18 - 9) ** 2 < 26,
    "checked": lambda x, y: (x // 11 + y // 11) % 2 == 0,
    "zigzag": lambda x, y: (y + abs(x % 24 - 12)) % 18 < 7,
    "two-tone": lambda x, y: y > 68,
}
"""Where the second color of a pattern is.

X and y are float64 arrays in hundredths of the drawing.
"""


@cache
def drawing(shape: str, hue: str, pattern: str) -> Image.Image:
    """A look as RGBA, `DRAWING` pixels wide and high, transparent around the product."""
    color = np.array(COLORS[hue], float)
    layers = {
        "metal": np.array(GREY, float),
        "trim": 0.72 * color,
        "body": _body(color, TEXTURES[pattern]),
    }
    outline_color = tuple(int(c) for c in 0.4 * color)
    canvas = Image.new("RGB", (DRAWING, DRAWING), outline_color)
    covered = Image.new("L", canvas.size)
    # Each layer with a dark outline.
    for layer, fill in layers.items():
        mask = _mask(getattr(SILHOUETTES[shape], layer))
        outline = mask.filter(ImageFilter.MaxFilter(5))
        pixels = np.broadcast_to(fill, (DRAWING, DRAWING, 3)).clip(0, 255).astype(np.uint8)
        canvas.paste(outline_color, mask=outline)
        canvas.paste(Image.fromarray(pixels), mask=mask)
        covered = ImageChops.lighter(covered, outline)
    canvas.putalpha(covered)
    return canvas


def _body(color: np.ndarray, texture: Texture) -> np.ndarray:
    """(DRAWING, DRAWING, 3) float64 surface of a body: two colors, lit from the left."""
    dark = color @ (0.299, 0.587, 0.114) < 165
    second = np.array(CREAM, float) if dark else 0.35 * color
    y, x = (np.mgrid[:DRAWING, :DRAWING] + 0.5) / UNIT
    return (
        np.where(texture(x, y)[..., None], second, color)
        * (1.08 - 0.3 * abs(x - 42) / 58)[..., None]
    )


def _mask(parts: tuple[Part, ...]) -> Image.Image:
    mask = Image.new("L", (DRAWING, DRAWING))
    pen = ImageDraw.Draw(mask)
    for part in parts:
        getattr(pen, part.method)([n * UNIT for n in part.where], fill=255, **part.options)
    return mask


def photograph(
    shape: str, hue: str, pattern: str, *, size: int, rng: np.random.Generator, second: bool = False
) -> bytes:
    """A picture of a look as JPEG bytes.

    Position, scale, angle, light and background are the photographer's.

    Args:
        shape: key of `SILHOUETTES`.
        hue: key of `COLORS`.
        pattern: key of `TEXTURES`.
        size: side of the picture in pixels.
        rng: decides everything about the photograph.
        second: seen from the other side and closer, as in a second view.
    """
    side = 2 * size  # drawn at twice the size, for smooth edges
    # Scale, mirror, rotate and move the drawing; then light and noise of a camera.
    look = drawing(shape, hue, pattern)
    scale = rng.uniform(0.74, 0.88) * (1.1 if second else 1.0)
    width = round(side * scale)
    look = look.resize(
        (width, width), Image.Resampling.BOX if width < DRAWING else Image.Resampling.BICUBIC
    )
    if second:
        look = look.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    look = look.rotate(rng.uniform(-6, 6), Image.Resampling.BILINEAR)
    picture = _background(side, rng)
    left, top = (round((side - width) / 2 + side * rng.uniform(-0.05, 0.05)) for _ in range(2))
    _shadow(picture, left, top, width)
    picture.paste(look, (left, top), look)
    picture = picture.resize((size, size), Image.Resampling.BOX)
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.82, 1.1))
    picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.85, 1.1))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, subsampling=0)
    return file.getvalue()


def _background(side: int, rng: np.random.Generator) -> Image.Image:
    """A wall and a floor in pale grays, brighter on one side."""
    tints = ((246, 246, 246), (240, 237, 231), (232, 236, 240), (225, 225, 224), (250, 248, 243))
    wall = np.array(tints[rng.integers(len(tints))], float)
    pixels = np.empty((side, side, 3))
    pixels[:] = wall
    pixels[round(side * rng.uniform(0.6, 0.9)) :] -= rng.uniform(4, 22)
    pixels += np.linspace(-1, 1, side)[None, :, None] * rng.uniform(-12, 12)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _shadow(picture: Image.Image, left: int, top: int, width: int) -> None:
    """Darken the floor under the product, in place."""
    strength = Image.new("L", (width, width // 5))
    ImageDraw.Draw(strength).ellipse((0, 0, width - 1, width // 5 - 1), fill=60)
    picture.paste(
        (60, 60, 66),
        (left, top + width - width // 8),
        strength.filter(ImageFilter.BoxBlur(width // 40)),
    )

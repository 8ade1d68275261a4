"""The tiny world: things with attributes, drawn in scenes and media as 64 x 64 RGB images.

Everything that is drawn follows from a Thing, a style's name and one integer seed. Shapes are
drawn three times larger with Pillow and reduced; backgrounds and effects are numpy. No fonts, no
files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # pixels, the side of an image
ENLARGED = 3 * SIZE  # pixels, the side of the canvas shapes are drawn on
HELD_OUT_SHARE = 0.2  # of all attribute combinations, kept from training

COLOURS = {
    "red": (205, 35, 40),
    "orange": (240, 130, 30),
    "yellow": (245, 210, 50),
    "green": (45, 145, 65),
    "teal": (40, 175, 175),
    "blue": (45, 80, 200),
    "purple": (125, 50, 160),
    "pink": (245, 130, 180),
    "brown": (110, 65, 35),
    "white": (245, 245, 245),
}
PATTERNS = ("plain", "striped", "spotted", "checked", "zigzag")
EMBLEMS = ("star", "heart", "cross", "square", "ring", "bolt")

# Palette rows: what an enlarged canvas holds before it is coloured.
EMPTY, BODY, TRIM, DARK, LIGHT, MARK = range(6)
DARK_COLOUR, LIGHT_COLOUR = (28, 26, 30), (250, 250, 245)


@dataclass(frozen=True)
class Thing:
    """One specific object; `detail` is three numbers in [0, 1] that set its proportions."""

    family: str
    colour: str
    second: str
    pattern: str
    emblem: str
    detail: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def combination(self) -> tuple[str, str, str, str, str]:
        return (self.family, self.colour, self.second, self.pattern, self.emblem)


def is_held_out(combination: tuple[str, ...]) -> bool:
    """Whether a combination of attributes is kept for evaluation; decided by its hash alone."""
    digest = hashlib.sha256("|".join(combination).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def draw_thing(rng: np.random.Generator, held_out: bool, **fixed: str) -> Thing:
    """A random thing with the attributes in `fixed`, on the asked side of the training split."""
    tables = (FAMILIES, COLOURS, COLOURS, PATTERNS, EMBLEMS)
    names = ("family", "colour", "second", "pattern", "emblem")
    for _ in range(10_000):
        drawn = (tuple(table)[rng.integers(len(table))] for table in tables)
        chosen = dict(zip(names, drawn, strict=True)) | fixed
        thing = Thing(**chosen, detail=tuple(float(x) for x in rng.random(3)))
        if thing.colour != thing.second and is_held_out(thing.combination) == held_out:
            return thing
    raise ValueError(f"no combination with {fixed} has held_out={held_out}")


# ---------------------------------------------------------------------------------------------
# Shapes: a family gives its parts in the box [-1, 1] x [-1, 1], y down, and its emblem's place
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A filled polygon, or a line of `width` where width is not 0."""

    role: int
    points: np.ndarray
    width: float = 0.0


def _shape(role: int, *points: tuple[float, float]) -> Part:
    return Part(role, np.array(points, dtype=np.float64))


def _box(role: int, x0: float, y0: float, x1: float, y1: float) -> Part:
    return _shape(role, (x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _arc(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360):
    angles = np.radians(np.linspace(start, stop, 28))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def _oval(role: int, x: float, y: float, rx: float, ry: float, start=0, stop=360) -> Part:
    return Part(role, _arc(x, y, rx, ry, start, stop))


def _ring(role: int, x: float, y: float, rx: float, ry: float, width: float, start=0, stop=360):
    return Part(role, _arc(x, y, rx, ry, start, stop), width)


def _line(role: int, width: float, *points: tuple[float, float]) -> Part:
    return Part(role, np.array(points, dtype=np.float64), width)


def _mug(a, b, c):
    w, h = 0.48 + 0.15 * a, 0.55 + 0.2 * b
    handle = _ring(TRIM, w + 0.05, 0.05, 0.28 + 0.1 * c, 0.32, 0.16)
    return [handle, _box(BODY, -w, -h, w, h), _box(DARK, -w, -h - 0.08, w, -h + 0.06)], (0, 0.08)


def _teapot(a, b, c):
    w, h = 0.55 + 0.1 * a, 0.42 + 0.12 * b
    return [
        _ring(TRIM, -w - 0.08, 0.1, 0.25, 0.28, 0.13),
        _shape(TRIM, (w - 0.15, 0.3), (0.95, -0.35 - 0.15 * c), (0.8, -0.4), (w - 0.2, -0.1)),
        _oval(BODY, 0, 0.15, w, h),
        _box(TRIM, -0.25, 0.05 - h, 0.25, 0.17 - h),
        _oval(DARK, 0, 0.02 - h, 0.1, 0.1),
    ], (0, 0.18)


def _bottle(a, b, c):
    w, neck = 0.3 + 0.12 * a, 0.12 + 0.05 * c
    top = -0.3 - 0.15 * b
    return [
        _shape(
            BODY, (-w, 0.95), (-w, top + 0.2), (-neck, top - 0.1), (-neck, -0.85),
            (neck, -0.85), (neck, top - 0.1), (w, top + 0.2), (w, 0.95),
        ),
        _box(TRIM, -neck - 0.04, -0.98, neck + 0.04, -0.75),
    ], (0, 0.35)  # fmt: skip


def _vase(a, b, c):
    w, neck = 0.45 + 0.15 * a, 0.2 + 0.1 * b
    return [
        _oval(BODY, 0, 0.25, w, 0.62),
        _shape(BODY, (-neck, -0.2), (-neck - 0.12, -0.8), (neck + 0.12, -0.8), (neck, -0.2)),
        _box(TRIM, -neck - 0.16, -0.92, neck + 0.16, -0.76),
        _box(TRIM, -0.3 - 0.1 * c, 0.78, 0.3 + 0.1 * c, 0.92),
    ], (0, 0.28)


def _lamp(a, b, c):
    w = 0.55 + 0.15 * a
    return [
        _line(TRIM, 0.12, (0, 0), (0, 0.85)),
        _oval(TRIM, 0, 0.85, 0.35 + 0.15 * c, 0.13),
        _shape(BODY, (-w, 0.25), (-0.3 - 0.1 * b, -0.85), (0.3 + 0.1 * b, -0.85), (w, 0.25)),
    ], (0, -0.22)


def _house(a, b, c):
    w, roof = 0.55 + 0.12 * a, -0.15 - 0.1 * b
    return [
        _box(BODY, -w, roof, w, 0.85),
        _box(DARK, 0.3, -0.85, 0.45, -0.3),
        _shape(TRIM, (-w - 0.2, roof), (0, -0.95), (w + 0.2, roof)),
        _box(DARK, -0.5, 0.4 - 0.1 * c, -0.25, 0.85),
    ], (0.12, 0.3)


def _car(a, b, c):
    roof = 0.35 + 0.12 * a
    return [
        _shape(TRIM, (-roof - 0.25, -0.1), (-roof, -0.52), (roof - 0.05, -0.52), (0.6, -0.1)),
        _shape(LIGHT, (-roof, -0.12), (-roof + 0.08, -0.4), (-0.06, -0.4), (-0.06, -0.12)),
        _shape(BODY, (-0.95, -0.12), (0.7, -0.12), (0.97, 0.1), (0.97, 0.45), (-0.95, 0.45)),
        _oval(DARK, -0.5, 0.45, 0.2 + 0.06 * b, 0.2 + 0.06 * b),
        _oval(DARK, 0.52, 0.45, 0.2 + 0.06 * c, 0.2 + 0.06 * c),
    ], (0, 0.14)


def _bus(a, b, c):
    h = 0.55 + 0.12 * a
    windows = [_box(LIGHT, x, -h + 0.1, x + 0.3, -h + 0.36) for x in (-0.85, -0.42, 0.01, 0.44)]
    return [
        _box(BODY, -0.95, -h, 0.95, 0.5),
        _box(TRIM, -0.95, 0.34 - 0.06 * b, 0.95, 0.5),
        *windows,
        _oval(DARK, -0.5, 0.52, 0.19 + 0.05 * c, 0.19 + 0.05 * c),
        _oval(DARK, 0.5, 0.52, 0.19 + 0.05 * c, 0.19 + 0.05 * c),
    ], (0, 0.12)


def _boat(a, b, c):
    top = -0.95 + 0.15 * a
    return [
        _line(DARK, 0.09, (0, top), (0, 0.4)),
        _shape(BODY, (0.06, top + 0.05), (0.06, 0.25), (0.62 + 0.15 * b, 0.25)),
        _shape(TRIM, (-0.08, top + 0.25), (-0.08, 0.25), (-0.5, 0.25)),
        _shape(BODY, (-0.9, 0.35), (0.9, 0.35), (0.6, 0.88), (-0.55 - 0.1 * c, 0.88)),
    ], (0, 0.58)


def _rocket(a, b, c):
    w = 0.27 + 0.1 * a
    return [
        _shape(TRIM, (-w, 0.1), (-w - 0.35, 0.75), (-w, 0.6)),
        _shape(TRIM, (w, 0.1), (w + 0.35, 0.75), (w, 0.6)),
        _shape(DARK, (-0.15, 0.6), (0, 0.95), (0.15, 0.6)),
        _shape(BODY, (0, -0.97), (w, -0.45 - 0.1 * b), (w, 0.65), (-w, 0.65), (-w, -0.45)),
        _shape(TRIM, (0, -0.97), (0.2 + 0.05 * c, -0.65), (-0.2 - 0.05 * c, -0.65)),
    ], (0, 0.02)


def _balloon(a, b, c):
    r = 0.55 + 0.1 * a
    return [
        _line(DARK, 0.05, (-0.35, 0.1), (-0.18, 0.7)),
        _line(DARK, 0.05, (0.35, 0.1), (0.18, 0.7)),
        _oval(BODY, 0, -0.3, r, 0.6 + 0.06 * b),
        _box(TRIM, -0.2 - 0.05 * c, 0.62, 0.2 + 0.05 * c, 0.95),
    ], (0, -0.32)


def _kite(a, b, c):
    w = 0.5 + 0.15 * a
    y = -0.25 + 0.15 * b
    return [
        _line(TRIM, 0.07, (0, 0.55), (-0.2 + 0.2 * c, 0.72), (0.15, 0.83), (-0.1, 0.97)),
        _shape(BODY, (0, -0.95), (w, y), (0, 0.6), (-w, y)),
        _shape(TRIM, (-0.25, 0.7), (0.1, 0.85), (0.1, 0.65), (-0.25, 0.9)),
    ], (0, -0.2)


def _umbrella(a, b, c):
    r = 0.75 + 0.15 * a
    return [
        _line(DARK, 0.09, (0, -0.2), (0, 0.75), (0.12, 0.88), (0.26 + 0.06 * b, 0.75)),
        _oval(BODY, 0, 0.05, r, 0.8 + 0.08 * c, 180, 360),
        _line(TRIM, 0.1, (-r, 0.05), (r, 0.05)),
    ], (0, -0.36)


def _hat(a, b, c):
    w, top = 0.4 + 0.1 * a, -0.65 - 0.2 * b
    return [
        _oval(TRIM, 0, 0.5, 0.8 + 0.12 * c, 0.22),
        _shape(BODY, (-w, 0.5), (-w - 0.04, top), (w + 0.04, top), (w, 0.5)),
        _box(DARK, -w, 0.28, w, 0.44),
    ], (0, -0.15)


def _fish(a, b, c):
    h = 0.42 + 0.14 * a
    return [
        _shape(TRIM, (0.4, 0), (0.95, -0.45 - 0.1 * b), (0.85, 0), (0.95, 0.45)),
        _shape(TRIM, (-0.2, -h + 0.1), (0.15, -h - 0.28), (0.3, -h + 0.25)),
        _oval(BODY, -0.15, 0, 0.72, h),
        _oval(LIGHT, -0.6, -0.12, 0.12, 0.12),
        _oval(DARK, -0.62, -0.12, 0.05 + 0.03 * c, 0.06),
    ], (-0.05, 0.04)


def _bird(a, b, c):
    r = 0.5 + 0.08 * a
    return [
        _line(DARK, 0.07, (-0.1, 0.5), (-0.15, 0.95)),
        _line(DARK, 0.07, (0.15, 0.5), (0.12, 0.95)),
        _shape(TRIM, (0.25, 0.1), (0.97, -0.1 - 0.2 * b), (0.85, 0.35)),
        _oval(BODY, 0.02, 0.15, r, 0.45),
        _oval(BODY, -0.42, -0.45, 0.3, 0.28),
        _shape(TRIM, (-0.66, -0.55), (-0.97, -0.4 + 0.1 * c), (-0.66, -0.3)),
        _oval(DARK, -0.48, -0.5, 0.07, 0.07),
    ], (0.05, 0.15)


def _butterfly(a, b, c):
    r = 0.36 + 0.08 * a
    return [
        _oval(BODY, -0.48, -0.32, r, 0.42),
        _oval(BODY, 0.48, -0.32, r, 0.42),
        _oval(TRIM, -0.4, 0.45, 0.3 + 0.06 * b, 0.34),
        _oval(TRIM, 0.4, 0.45, 0.3 + 0.06 * b, 0.34),
        _line(DARK, 0.05, (0, -0.5), (-0.2 - 0.1 * c, -0.95)),
        _line(DARK, 0.05, (0, -0.5), (0.2 + 0.1 * c, -0.95)),
        _oval(DARK, 0, 0.05, 0.1, 0.65),
    ], (0, 0.05)


def _cat(a, b, c):
    r = 0.66 + 0.1 * a
    return [
        _shape(TRIM, (-r, -0.1), (-r + 0.02, -0.9 - 0.08 * b), (-0.1, -0.5)),
        _shape(TRIM, (r, -0.1), (r - 0.02, -0.9 - 0.08 * b), (0.1, -0.5)),
        _oval(BODY, 0, 0.1, r, 0.66),
        _oval(LIGHT, -0.3, -0.2, 0.14, 0.1 + 0.05 * c),
        _oval(LIGHT, 0.3, -0.2, 0.14, 0.1 + 0.05 * c),
        _oval(DARK, -0.3, -0.2, 0.06, 0.1),
        _oval(DARK, 0.3, -0.2, 0.06, 0.1),
    ], (0, 0.32)


def _robot(a, b, c):
    w = 0.45 + 0.1 * a
    return [
        _line(DARK, 0.06, (0, -0.6), (0, -0.98)),
        _box(TRIM, -w - 0.22, -0.1, -w, 0.4 + 0.1 * b),
        _box(TRIM, w, -0.1, w + 0.22, 0.4 + 0.1 * b),
        _box(TRIM, -0.38, 0.6, -0.12, 0.97),
        _box(TRIM, 0.12, 0.6, 0.38, 0.97),
        _box(BODY, -w, -0.2, w, 0.66),
        _box(TRIM, -0.34 - 0.06 * c, -0.8, 0.34 + 0.06 * c, -0.26),
        _oval(LIGHT, -0.15, -0.55, 0.09, 0.09),
        _oval(LIGHT, 0.15, -0.55, 0.09, 0.09),
    ], (0, 0.22)


def _guitar(a, b, c):
    r = 0.42 + 0.08 * a
    return [
        _line(TRIM, 0.14, (0, 0.1), (0, -0.75)),
        _box(DARK, -0.14, -0.97, 0.14, -0.68 - 0.05 * c),
        _oval(BODY, 0, -0.02, 0.33 + 0.06 * b, 0.3),
        _oval(BODY, 0, 0.48, r, 0.45),
    ], (0, 0.45)


def _bell(a, b, c):
    w = 0.6 + 0.12 * a
    return [
        _ring(TRIM, 0, -0.8, 0.15, 0.15, 0.1),
        _oval(DARK, 0, 0.75, 0.14 + 0.05 * c, 0.16),
        _shape(BODY, (-0.35, -0.5), (0, -0.72), (0.35, -0.5), (0.42, 0.2), (w, 0.62),
               (-w, 0.62), (-0.42, 0.2)),
        _box(TRIM, -w - 0.05, 0.52 - 0.08 * b, w + 0.05, 0.68),
    ], (0, 0.02)  # fmt: skip


def _key(a, b, c):
    r = 0.38 + 0.06 * a
    return [
        _box(TRIM, -0.1, -0.12, 0.95, 0.12),
        _box(TRIM, 0.7, 0.1, 0.85 + 0.08 * b, 0.45),
        _box(TRIM, 0.42, 0.1, 0.55, 0.3 + 0.1 * c),
        _oval(BODY, -0.5, 0, r + 0.05, r + 0.05),
    ], (-0.5, 0)


def _mushroom(a, b, c):
    r = 0.72 + 0.12 * a
    return [
        _shape(TRIM, (-0.2 - 0.08 * b, 0), (0.2 + 0.08 * b, 0), (0.32, 0.92), (-0.32, 0.92)),
        _oval(BODY, 0, 0.1, r, 0.85 + 0.1 * c, 180, 360),
    ], (0, -0.32)


def _cactus(a, b, c):
    y = -0.15 + 0.2 * b
    return [
        _line(BODY, 0.24, (-0.6, -0.4 + 0.15 * a), (-0.6, y + 0.2), (0, y + 0.2)),
        _line(BODY, 0.24, (0.6, -0.5 + 0.2 * c), (0.6, y), (0, y)),
        _box(BODY, -0.26, -0.9, 0.26, 0.6),
        _shape(TRIM, (-0.5, 0.52), (0.5, 0.52), (0.36, 0.96), (-0.36, 0.96)),
    ], (0, -0.15)


def _tree(a, b, c):
    w = 0.55 + 0.15 * a
    return [
        _box(TRIM, -0.14, 0.5, 0.14, 0.96),
        _shape(BODY, (0, -0.3), (w + 0.1, 0.62), (-w - 0.1, 0.62)),
        _shape(BODY, (0, -0.65), (w, 0.2 - 0.1 * b), (-w, 0.2 - 0.1 * b)),
        _shape(BODY, (0, -0.97), (0.35 + 0.1 * c, -0.3), (-0.35 - 0.1 * c, -0.3)),
    ], (0, 0.2)


def _tent(a, b, c):
    w = 0.75 + 0.15 * a
    return [
        _line(DARK, 0.07, (0, -0.6), (0, -0.95)),
        _shape(TRIM, (0, -0.95), (0.35 + 0.1 * c, -0.83), (0, -0.72)),
        _shape(BODY, (0, -0.7), (w, 0.75), (-w, 0.75)),
        _shape(DARK, (0, 0.35 - 0.1 * b), (0.2, 0.75), (-0.2, 0.75)),
    ], (0, 0.02)


def _chair(a, b, c):
    w = 0.42 + 0.1 * a
    return [
        _box(TRIM, -w, 0.3, -w + 0.16, 0.96),
        _box(TRIM, w - 0.16, 0.3, w, 0.96),
        _box(BODY, -w + 0.04, -0.95 + 0.12 * b, w - 0.04, 0.15),
        _box(TRIM, -w - 0.12, 0.1, w + 0.12 + 0.06 * c, 0.38),
    ], (0, -0.38)


def _snail(a, b, c):
    r = 0.5 + 0.08 * a
    return [
        _line(TRIM, 0.08, (-0.72, 0.2), (-0.88, -0.35 - 0.15 * b)),
        _line(TRIM, 0.08, (-0.65, 0.2), (-0.58, -0.35 - 0.15 * b)),
        _shape(TRIM, (-0.95, 0.15), (-0.5, 0.1), (0.4, 0.45), (0.97, 0.72), (-0.8, 0.72)),
        _oval(BODY, 0.15, -0.02, r, 0.5 + 0.08 * c),
    ], (0.15, -0.02)


def _icecream(a, b, c):
    r = 0.42 + 0.1 * a
    return [
        _shape(TRIM, (-0.38 - 0.06 * b, 0), (0.38 + 0.06 * b, 0), (0, 0.97)),
        _oval(BODY, 0, -0.25, r + 0.06, 0.48),
        _oval(DARK, 0, -0.78, 0.1 + 0.05 * c, 0.12),
    ], (0, -0.22)


def _drum(a, b, c):
    w, h = 0.62 + 0.12 * a, 0.42 + 0.12 * b
    return [
        _line(DARK, 0.08, (-0.85, -0.9), (-0.1, -h - 0.02)),
        _line(DARK, 0.08, (0.8 + 0.1 * c, -0.9), (0.15, -h - 0.02)),
        _box(BODY, -w, -h, w, h + 0.1),
        _oval(LIGHT, 0, -h, w, 0.18),
        _box(TRIM, -w, h - 0.02, w, h + 0.14),
    ], (0, 0.12)


def _turtle(a, b, c):
    r = 0.62 + 0.1 * a
    return [
        _oval(TRIM, -0.82, 0.1, 0.18, 0.17 + 0.04 * b),
        _box(TRIM, -0.45, 0.3, -0.2, 0.72),
        _box(TRIM, 0.25, 0.3, 0.5, 0.72),
        _shape(TRIM, (0.55, 0.3), (0.95, 0.45 + 0.1 * c), (0.5, 0.45)),
        _oval(BODY, 0, 0.38, r, 0.85, 180, 360),
        _oval(DARK, -0.88, 0.06, 0.04, 0.04),
    ], (0, 0.02)


def _cake(a, b, c):
    w = 0.62 + 0.12 * a
    return [
        _line(LIGHT, 0.1, (0, -0.3), (0, -0.75)),
        _oval(DARK, 0, -0.84, 0.07, 0.1),
        _box(BODY, -w, 0, w, 0.8),
        _box(TRIM, -w + 0.15 - 0.06 * b, -0.42, w - 0.15 + 0.06 * b, 0.04),
        _box(TRIM, -w - 0.15, 0.74 - 0.05 * c, w + 0.15, 0.88),
    ], (0, 0.36)


FAMILIES: dict[str, Callable] = {
    "mug": _mug,
    "teapot": _teapot,
    "bottle": _bottle,
    "vase": _vase,
    "lamp": _lamp,
    "house": _house,
    "car": _car,
    "bus": _bus,
    "boat": _boat,
    "rocket": _rocket,
    "balloon": _balloon,
    "kite": _kite,
    "umbrella": _umbrella,
    "hat": _hat,
    "fish": _fish,
    "bird": _bird,
    "butterfly": _butterfly,
    "cat": _cat,
    "robot": _robot,
    "guitar": _guitar,
    "bell": _bell,
    "key": _key,
    "mushroom": _mushroom,
    "cactus": _cactus,
    "tree": _tree,
    "tent": _tent,
    "chair": _chair,
    "snail": _snail,
    "ice cream": _icecream,
    "drum": _drum,
    "turtle": _turtle,
    "cake": _cake,
}
EMBLEM_RADIUS = 0.3  # in the unit box


def _star_points() -> list[tuple[float, float]]:
    return [
        ((1 if i % 2 == 0 else 0.42) * math.sin(math.pi * i / 5),
         -(1 if i % 2 == 0 else 0.42) * math.cos(math.pi * i / 5))
        for i in range(10)
    ]  # fmt: skip


_EMBLEM_PARTS: dict[str, list[Part]] = {
    "star": [_shape(LIGHT, *_star_points())],
    "heart": [
        _oval(LIGHT, -0.38, -0.25, 0.42, 0.42),
        _oval(LIGHT, 0.38, -0.25, 0.42, 0.42),
        _shape(LIGHT, (-0.76, -0.08), (0.76, -0.08), (0, 0.85)),
    ],
    "cross": [_box(LIGHT, -0.24, -0.85, 0.24, 0.85), _box(LIGHT, -0.85, -0.24, 0.85, 0.24)],
    "square": [_box(LIGHT, -0.62, -0.62, 0.62, 0.62)],
    "ring": [_oval(LIGHT, 0, 0, 0.78, 0.78), _oval(DARK, 0, 0, 0.4, 0.4)],
    "bolt": [
        _shape(LIGHT, (0.25, -0.95), (-0.55, 0.15), (-0.05, 0.15), (-0.25, 0.95), (0.55, -0.2),
               (0.05, -0.2)),
    ],
}  # fmt: skip


def _emblem_parts(emblem: str, place: tuple[float, float]) -> list[Part]:
    disc = _oval(DARK, *place, EMBLEM_RADIUS, EMBLEM_RADIUS)
    scale = 0.82 * EMBLEM_RADIUS
    return [disc, *(Part(p.role, p.points * scale + place) for p in _EMBLEM_PARTS[emblem])]


def _pattern_mask(pattern: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where a pattern shows the second colour, at coordinates of the unit box."""
    if pattern == "striped":
        return np.floor((u + 0.35 * v) * 3.2) % 2 == 1
    if pattern == "spotted":
        x, y = u * 2.6 % 1 - 0.5, (v * 2.6 + 0.5 * (np.floor(u * 2.6) % 2)) % 1 - 0.5
        return x * x + y * y < 0.1
    if pattern == "checked":
        return (np.floor(u * 2.9) + np.floor(v * 2.9)) % 2 == 1
    if pattern == "zigzag":
        return np.floor(v * 2.8 + 0.9 * np.abs(u * 2.4 % 2 - 1)) % 2 == 1
    return np.zeros(u.shape, dtype=bool)


# ---------------------------------------------------------------------------------------------
# Sprites: a thing in a pose, on nothing
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sprite:
    """A posed thing: `canvas` holds palette rows, (ENLARGED, ENLARGED) uint8."""

    canvas: np.ndarray
    palette: np.ndarray

    @cached_property
    def alpha(self) -> np.ndarray:
        """Coverage, (SIZE, SIZE, 1) float32 in [0, 1]."""
        covered = Image.fromarray(np.where(self.canvas > EMPTY, 255, 0).astype(np.uint8))
        return _float(covered.reduce(3))[..., None] / 255

    @cached_property
    def rgb(self) -> np.ndarray:
        """Colour times coverage, (SIZE, SIZE, 3) float32 in [0, 255]."""
        return _float(Image.fromarray(self.palette[self.canvas]).reduce(3))

    @cached_property
    def line(self) -> np.ndarray:
        """Outlines of all that is drawn, (SIZE, SIZE, 1) float32 in [0, 1]."""
        edge = np.zeros(self.canvas.shape, dtype=np.uint8)
        edge[:, 1:] |= self.canvas[:, 1:] != self.canvas[:, :-1]
        edge[1:] |= self.canvas[1:] != self.canvas[:-1]
        thick = Image.fromarray(edge * np.uint8(255)).filter(ImageFilter.MaxFilter(3))
        return np.minimum(_float(thick.reduce(3))[..., None] / 200, 1)


def _float(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def make_sprite(
    thing: Thing, rng: np.random.Generator, scale: tuple[float, float], bound: bool = False
) -> Sprite:
    """Draw a thing at a random place, size (a share of the image's side) and rotation.

    bound: keep it near the middle and nearly upright, for media with a fixed field.
    """
    size = rng.uniform(*scale) * ENLARGED / 2
    angle = math.radians(rng.uniform(-6, 6) if bound else rng.uniform(-18, 18))
    flip = -1.0 if rng.random() < 0.3 else 1.0
    room = max(ENLARGED / 2 - size, 0)
    place = ENLARGED / 2 + rng.uniform(-1, 1, 2) * room * (0.15 if bound else 0.7)
    cosine, sine = math.cos(angle) * size, math.sin(angle) * size
    canvas = Image.new("L", (ENLARGED, ENLARGED), EMPTY)
    draw = ImageDraw.Draw(canvas)
    parts, emblem_place = FAMILIES[thing.family](*thing.detail)
    for part in [*parts, *_emblem_parts(thing.emblem, emblem_place)]:
        x, y = part.points[:, 0] * flip, part.points[:, 1]
        px = cosine * x - sine * y + place[0]
        py = sine * x + cosine * y + place[1]
        points = np.round(np.stack([px, py], axis=1)).astype(int).reshape(-1).tolist()
        if part.width:
            width = max(1, round(part.width * size))
            draw.line(points, fill=part.role, width=width, joint="curve")
        else:
            draw.polygon(points, fill=part.role)
    rows = np.asarray(canvas).copy()
    if thing.pattern != "plain":
        y, x = np.nonzero(rows == BODY)
        dx, dy = x - place[0], y - place[1]
        square = size * size
        u = (cosine * dx + sine * dy) / square * flip
        v = (cosine * dy - sine * dx) / square
        shown = _pattern_mask(thing.pattern, u, v)
        rows[y[shown], x[shown]] = MARK
    first, second = COLOURS[thing.colour], COLOURS[thing.second]
    palette = [(0, 0, 0), first, second, DARK_COLOUR, LIGHT_COLOUR, second]
    return Sprite(rows, np.array(palette, dtype=np.uint8))


# ---------------------------------------------------------------------------------------------
# Scenes: what is behind a thing, how it is lit, and what falls in front of it
# ---------------------------------------------------------------------------------------------

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def _cloud(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise, (SIZE, SIZE, 1) float32 in [0, 1]."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return _float(coarse.resize((SIZE, SIZE), Image.Resampling.BILINEAR))[..., None] / 255


def _flat(colour) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), colour, dtype=np.float32)


def _fade(top, bottom) -> np.ndarray:
    share = (_Y / (SIZE - 1))[..., None]
    return np.array(top, np.float32) * (1 - share) + np.array(bottom, np.float32) * share


def _below(image: np.ndarray, row: int, colour) -> None:
    image[row:] = colour


def _drawn(image: np.ndarray, shapes: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    """An image with shapes drawn on its doubled form (coordinates 0 to 2 * SIZE)."""
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8)).resize((2 * SIZE, 2 * SIZE))
    shapes(ImageDraw.Draw(picture))
    return _float(picture.reduce(2))


def _specks(image: np.ndarray, rng, count: int, colour, strength: float = 1.0) -> np.ndarray:
    y, x = rng.integers(0, SIZE, (2, count))
    image[y, x] = image[y, x] * (1 - strength) + np.array(colour, np.float32) * strength
    return image


def _paint_studio(rng):
    level = rng.uniform(215, 255)
    return _fade((level,) * 3, (level - rng.uniform(0, 22),) * 3)


def _paint_beach(rng):
    horizon, shore = int(rng.integers(18, 30)), int(rng.integers(34, 44))
    image = _fade((95, 175, 235), (190, 225, 250))
    _below(image, horizon, (25, 110, 180))
    _below(image, shore, (228, 208, 155))
    image[shore:] += (_cloud(rng, 20)[shore:] - 0.5) * 36
    return image


def _paint_night(rng):
    image = _fade((8, 8, 30), (22, 22, 58))
    _specks(image, rng, 45, (235, 235, 220))
    x, y = rng.uniform(20, 108), rng.uniform(12, 30)
    return _drawn(image, lambda d: d.ellipse((x - 9, y - 9, x + 9, y + 9), (250, 245, 205)))


def _paint_snow(rng):
    ground = int(rng.integers(32, 46))
    image = _fade((175, 195, 215), (205, 215, 228))
    _below(image, ground, (240, 245, 250))
    return image + (_cloud(rng, 8) - 0.5) * 18


def _front_snow(image, rng):
    return _specks(image, rng, 110, (255, 255, 255), 0.9)


def _paint_forest(rng):
    image = _flat((22, 55, 24)) + (_cloud(rng, 16) - 0.5) * np.array((35, 60, 30), np.float32)
    trunks = [(x, rng.uniform(7, 15)) for x in rng.uniform(0, 128, 5)]

    def shapes(draw):
        for x, width in trunks:
            draw.rectangle((x, 0, x + width, 112), (72, 46, 28))

    return _drawn(image, shapes)


def _paint_desert(rng):
    image = _fade((250, 205, 125), (248, 222, 165))
    crest = [(x, rng.uniform(50, 84)) for x in range(0, 161, 32)]
    near = [(x, rng.uniform(84, 108)) for x in range(0, 161, 32)]

    def shapes(draw):
        draw.polygon([(0, 128), *crest, (160, 128)], (222, 168, 92))
        draw.polygon([(0, 128), *near, (160, 128)], (200, 140, 70))

    return _drawn(image, shapes)


def _paint_underwater(rng):
    return _fade((35, 130, 190), (8, 40, 95)) + (_cloud(rng, 6) - 0.5) * 40


def _front_bubbles(image, rng):
    bubbles = [(x, y, rng.uniform(2, 5)) for x, y in rng.uniform(4, 124, (12, 2))]

    def shapes(draw):
        for x, y, r in bubbles:
            draw.ellipse((x - r, y - r, x + r, y + r), outline=(200, 235, 250), width=2)

    return _drawn(image, shapes)


def _paint_city(rng):
    image = _fade((150, 165, 185), (205, 205, 205))
    towers = [(x, rng.uniform(14, 64), rng.integers(70, 130)) for x in range(-8, 128, 19)]

    def shapes(draw):
        for x, top, grey in towers:
            draw.rectangle((x, top, x + 16, 112), (int(grey),) * 3)
            for wy in range(int(top) + 4, 108, 8):
                for wx in (3, 9):
                    draw.rectangle((x + wx, wy, x + wx + 3, wy + 3), (238, 222, 140))
        draw.rectangle((0, 112, 128, 128), (70, 70, 74))

    return _drawn(image, shapes)


def _paint_meadow(rng):
    horizon = int(rng.integers(18, 32))
    image = _fade((120, 190, 245), (205, 230, 250))
    image[horizon:] = np.array((85, 165, 60), np.float32) + (_cloud(rng, 32)[horizon:] - 0.5) * 70
    return image


def _paint_sunset(rng):
    image = _fade((85, 45, 115), (250, 140, 60))
    x, y = rng.uniform(20, 108), rng.uniform(76, 100)

    def shapes(draw):
        draw.ellipse((x - 18, y - 18, x + 18, y + 18), (255, 215, 110))
        draw.rectangle((0, 108, 128, 128), (55, 30, 60))

    return _drawn(image, shapes)


def _paint_rain(rng):
    return _fade((85, 92, 108), (118, 124, 136)) + (_cloud(rng, 6) - 0.5) * 30


def _front_rain(image, rng):
    drops = [(x, y, rng.uniform(8, 16)) for x, y in rng.uniform(0, 124, (36, 2))]

    def shapes(draw):
        for x, y, length in drops:
            draw.line((x, y, x - length * 0.45, y + length), (205, 215, 230), 2)

    return _drawn(image, shapes)


def _paint_fog(rng):
    return _flat((198, 200, 203)) + (_cloud(rng, 5) - 0.5) * 26


def _paint_table(rng):
    image = _flat((165, 112, 62)) + (_cloud(rng, 5) - 0.5) * 26
    rows = 0.5 * (np.sin(_Y.astype(np.float64) * 1.7 + rng.uniform(0, 6)) + 1)
    image += rows.astype(np.float32)[..., None] * 14
    seams = int(rng.integers(10, 16))
    image[int(rng.integers(0, seams)) :: seams] *= 0.55
    return image


def _paint_brick(rng):
    image = _flat((168, 72, 58)) + (_cloud(rng, 24) - 0.5) * 44
    start, step = int(rng.integers(0, 8)), 8
    rows = (np.arange(SIZE) + start) // step
    image[(np.arange(SIZE) + start) % step == 0] = (205, 195, 185)
    image[(_X.astype(int) + 8 * (rows[:, None] % 2)) % 16 == 0] = (205, 195, 185)
    return image


def _paint_bookshelf(rng):
    image = _flat((60, 40, 28))
    choices = np.array([*COLOURS.values(), (80, 80, 90)], dtype=np.float32) * 0.75
    for top, bottom in ((0, 29), (33, 62)):
        x = 0
        while x < SIZE:
            width = int(rng.integers(3, 7))
            low = top + int(rng.integers(0, 5))
            image[low:bottom, x : x + width - 1] = choices[rng.integers(len(choices))]
            x += width
    return image


def _paint_space(rng):
    image = _flat((6, 4, 14)) + _cloud(rng, 4) ** 2 * np.array((38, 10, 62), np.float32)
    return _specks(image, rng, 60, (255, 255, 255))


def _paint_fire(rng):
    heat = (_cloud(rng, 9) * 0.55 + _cloud(rng, 18) * 0.3) + (_Y / SIZE)[..., None] * 0.55 - 0.2
    stops = np.array([0, 0.35, 0.7, 1.0], np.float32)
    channels = [(18, 150, 250, 255), (4, 20, 130, 230), (4, 8, 12, 110)]
    return np.concatenate([np.interp(heat, stops, c) for c in channels], 2).astype(np.float32)


def _front_fire(image, rng):
    tongues = _cloud(rng, 14)[..., 0] * 26 > SIZE - _Y
    image[tongues] = image[tongues] * 0.25 + np.array((255, 190, 50), np.float32) * 0.75
    return image


def _paint_stage(rng):
    folds = np.sin(_X.astype(np.float64) * rng.uniform(0.55, 0.8) + rng.uniform(0, 6))
    image = _flat((165, 12, 26)) + folds.astype(np.float32)[..., None] * (42, 5, 8)
    _below(image, int(rng.integers(52, 58)), (120, 78, 45))
    return image


def _paint_tiles(rng):
    image = _flat((226, 232, 230))
    step = int(rng.integers(11, 15))
    x, y = _X.astype(int) + int(rng.integers(0, step)), _Y.astype(int) + int(rng.integers(0, step))
    image[(x // step + y // step) % 2 == 1] = (125, 175, 190)
    image[(x % step == 0) | (y % step == 0)] = (170, 170, 170)
    return image


@dataclass(frozen=True)
class Scene:
    """A background, the light on the thing (multiplies), a veil over it, and what is in front."""

    paint: Callable
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    veil: tuple[float, float, float, float] = (0, 0, 0, 0)  # red, green, blue, strength
    front: Callable | None = None


SCENES = {
    "studio": Scene(_paint_studio),
    "beach": Scene(_paint_beach, (1.05, 1.03, 0.95)),
    "night": Scene(_paint_night, (0.42, 0.42, 0.6)),
    "snow": Scene(_paint_snow, (0.95, 0.98, 1.02), front=_front_snow),
    "forest": Scene(_paint_forest, (0.72, 0.85, 0.7)),
    "desert": Scene(_paint_desert, (1.05, 1.0, 0.85)),
    "underwater": Scene(_paint_underwater, (0.7, 0.9, 1.0), (20, 90, 150, 0.35), _front_bubbles),
    "city": Scene(_paint_city),
    "meadow": Scene(_paint_meadow),
    "sunset": Scene(_paint_sunset, (0.95, 0.7, 0.65)),
    "rain": Scene(_paint_rain, (0.75, 0.78, 0.85), front=_front_rain),
    "fog": Scene(_paint_fog, veil=(205, 206, 208, 0.62)),
    "table": Scene(_paint_table),
    "brick": Scene(_paint_brick),
    "bookshelf": Scene(_paint_bookshelf),
    "space": Scene(_paint_space, (0.85, 0.82, 0.95)),
    "fire": Scene(_paint_fire, (0.95, 0.72, 0.5), front=_front_fire),
    "stage": Scene(_paint_stage, (1.02, 0.95, 0.92)),
    "tiles": Scene(_paint_tiles),
}


def _compose(scene: Scene, sprite: Sprite, rng: np.random.Generator) -> np.ndarray:
    image = scene.paint(rng)
    alpha = sprite.alpha
    shadow = np.roll(alpha, (3, 2), axis=(0, 1))
    image = image * (1 - 0.28 * shadow)
    red, green, blue, strength = scene.veil
    lit = sprite.rgb * np.array(scene.light, np.float32) * np.float32(rng.uniform(0.88, 1.08))
    lit = lit * (1 - strength) + alpha * np.array((red, green, blue), np.float32) * strength
    image = image * (1 - alpha) + lit
    if rng.random() < 0.2:
        x, y = rng.integers(0, SIZE - 8, 2)
        width, height = rng.integers(6, 13, 2)
        patch = np.array(list(COLOURS.values()), np.float32)[rng.integers(len(COLOURS))]
        image[y : y + height, x : x + width] = patch * np.array(scene.light, np.float32)
    return scene.front(image, rng) if scene.front else image


def _any_scene(sprite: Sprite, rng: np.random.Generator) -> np.ndarray:
    names = ("studio", "beach", "city", "meadow", "table", "brick", "bookshelf", "stage", "tiles")
    return _compose(SCENES[names[rng.integers(len(names))]], sprite, rng)


# ---------------------------------------------------------------------------------------------
# Media: what the picture is made of
# ---------------------------------------------------------------------------------------------


def _grey(image: np.ndarray) -> np.ndarray:
    return (image * np.array((0.299, 0.587, 0.114), np.float32)).sum(2, keepdims=True)


def _blurred(image: np.ndarray, radius: float) -> np.ndarray:
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    return _float(picture.filter(ImageFilter.GaussianBlur(radius)))


def _inked(ground: np.ndarray, line: np.ndarray, ink, strength: float = 1.0) -> np.ndarray:
    return ground * (1 - line * strength) + np.array(ink, np.float32) * line * strength


def _sketch(sprite, rng):
    paper = _flat((242, 240, 234)) + (_cloud(rng, 32) - 0.5) * 16
    hatch = ((_X + _Y) % 4 < 1)[..., None] * sprite.alpha * (1 - _grey(sprite.rgb) / 255)
    return _inked(_inked(paper, hatch, (90, 90, 94), 0.5), sprite.line, (52, 52, 56), 0.9)


def _blueprint(sprite, rng):
    ground = _flat((22, 62, 148))
    start = int(rng.integers(0, 8))
    ground[(_X.astype(int) + start) % 8 == 0] += 26
    ground[(_Y.astype(int) + start) % 8 == 0] += 26
    return _inked(ground, sprite.line, (222, 235, 252), 0.95)


def _silhouette(sprite, rng):
    low = rng.uniform(205, 245)
    ground = _fade((low, low - 35, low - 70), (250, 235, 215))
    return ground * (1 - sprite.alpha) + 14 * sprite.alpha


def _polaroid(sprite, rng):
    image = _blurred(_any_scene(sprite, rng), 0.8) * 0.55 + np.array((105, 98, 86), np.float32)
    image[:5] = image[:, :6] = image[:, -6:] = image[-13:] = (246, 244, 238)
    return image


def _sepia(sprite, rng):
    grey = _grey(_any_scene(sprite, rng)) * 0.85 + 18
    edge = ((_X - 31.5) ** 2 + (_Y - 31.5) ** 2)[..., None] / 2000
    return grey * np.array((1.02, 0.8, 0.55), np.float32) * (1 - 0.35 * np.minimum(edge, 1))


def _pixels(sprite, rng):
    picture = Image.fromarray(_any_scene(sprite, rng).clip(0, 255).astype(np.uint8))
    small = np.asarray(picture.reduce(4)) // 48 * 48 + 20
    return np.repeat(np.repeat(small, 4, 0), 4, 1).astype(np.float32)


def _neon(sprite, rng):
    glow_colour = np.array(((255, 60, 170), (70, 230, 255), (130, 255, 110))[rng.integers(3)])
    ground = _flat((14, 10, 24)) + (_cloud(rng, 8) - 0.5) * 10
    glow = _blurred(np.repeat(sprite.line * 255, 3, 2), 2.2) / 255
    lit = ground + glow * glow_colour.astype(np.float32) * 1.5
    return _inked(lit, sprite.line, (255, 250, 255), 0.75)


def _fence(sprite, rng):
    image = _any_scene(sprite, rng) * 0.85
    step, start = int(rng.integers(7, 10)), int(rng.integers(0, 8))
    wires = ((_X + _Y + start) % step < 1) | ((_X - _Y + start) % step < 1)
    image[wires] = (58, 60, 66)
    return image


def _popart(sprite, rng):
    image = _any_scene(sprite, rng)
    bold = np.where(_blurred(image, 0.6) > 128, 240, 30).astype(np.float32)
    dots = ((_X % 4 - 1.5) ** 2 + (_Y % 4 - 1.5) ** 2 < 1.6)[..., None]
    return np.where(dots, bold, 0.6 * bold + 0.4 * np.array((250, 225, 60), np.float32))


def _framed(sprite, rng):
    image = _any_scene(sprite, rng)
    wall = _flat(((205, 198, 184), (176, 190, 186), (196, 180, 196))[rng.integers(3)])
    wall[5:59, 5:59] = (105, 66, 30)
    wall[7:57, 7:57] = (178, 126, 60)
    wall[10:54, 10:54] = image[10:54, 10:54]
    return wall


def _defocus(sprite, rng):
    return _blurred(_any_scene(sprite, rng), rng.uniform(3.0, 3.8))


def _negative(sprite, rng):
    return 255 - _any_scene(sprite, rng)


def _stamp(sprite, rng):
    tint = ((206, 224, 230), (226, 208, 226), (212, 228, 200), (236, 222, 190))[rng.integers(4)]
    image = _flat((58, 62, 74))
    teeth = 1.5 * ((_X % 6 < 3) | (_Y % 6 < 3))
    edge = np.minimum(np.minimum(_X, 63 - _X), np.minimum(_Y, 63 - _Y))
    image[edge > 3 + 1.5 - teeth] = (250, 250, 246)
    image[10:54, 10:54] = tint
    return image * (1 - sprite.alpha) + sprite.rgb


def _tshirt(sprite, rng):
    cloth = np.array(list(COLOURS.values()))[rng.integers(len(COLOURS))]
    colour = tuple(int(c) for c in cloth * 0.7 + 60)
    body = [(34, 12), (52, 8), (76, 8), (94, 12), (124, 40), (106, 56), (96, 46), (96, 124),
            (32, 124), (32, 46), (22, 56), (4, 40)]  # fmt: skip

    def shapes(draw):
        draw.polygon(body, colour)
        draw.ellipse((50, 0, 78, 18), (236, 236, 236))

    ground = _drawn(_flat((236, 236, 236)), shapes)
    return ground * (1 - sprite.alpha) + sprite.rgb


def _wallpaper(sprite, rng):
    ground = ((250, 226, 202), (205, 228, 214), (236, 206, 220), (208, 216, 240))[rng.integers(4)]
    single = _flat(ground) * (1 - sprite.alpha) + sprite.rgb
    half = _float(Image.fromarray(single.clip(0, 255).astype(np.uint8)).reduce(2))
    return np.tile(half, (2, 2, 1))


def _stitched(sprite, rng):
    cloth = _flat((222, 212, 190))
    cloth[(_X + _Y).astype(int) % 2 == 0] -= 16
    image = cloth * (1 - sprite.alpha) + sprite.rgb
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8)).reduce(2)
    image = np.repeat(np.repeat(_float(picture), 2, 0), 2, 1)
    crosses = ((_X.astype(int) + _Y.astype(int)) % 2 == 0)[..., None]
    return np.where(crosses, image, image * 0.62 + 62)


def _thermal(sprite, rng):
    heat = 0.16 + (_cloud(rng, 4) - 0.5) * 0.18
    warm = 0.55 + 0.4 * _grey(sprite.rgb) / 255
    heat = heat * (1 - sprite.alpha) + warm * sprite.alpha
    stops = np.array([0, 0.25, 0.5, 0.75, 1.0], np.float32)
    channels = [(5, 60, 200, 255, 255), (0, 0, 20, 140, 250), (60, 140, 110, 10, 190)]
    return np.concatenate([np.interp(heat, stops, c) for c in channels], 2).astype(np.float32)


def _carved(sprite, rng):
    height = _grey(sprite.rgb) / 255 * 0.5 + sprite.alpha * 0.6 + _cloud(rng, 40) * 0.35
    slope = height - np.roll(height, (1, 1), axis=(0, 1))
    stone = _flat((150, 146, 138)) + (_cloud(rng, 6) - 0.5) * 24
    return stone + slope * 105


def _chalk(sprite, rng):
    board = _flat((32, 62, 48)) + (_cloud(rng, 7) - 0.5) * 22
    dust = 0.65 + 0.35 * _cloud(rng, 48)
    return _inked(board, sprite.line * dust, (236, 238, 226), 0.95)


def _monochrome(sprite, rng):
    return np.repeat(_grey(_any_scene(sprite, rng)) * 1.1 - 8, 3, 2)


def _glitch(sprite, rng):
    image = _any_scene(sprite, rng)
    split = int(rng.integers(3, 6))
    image = np.stack(
        [np.roll(image[..., 0], split, 1), image[..., 1], np.roll(image[..., 2], -split, 1)], 2
    )
    for row in rng.integers(0, SIZE - 5, 5):
        band = slice(int(row), int(row) + 4)
        image[band] = np.roll(image[band], int(rng.integers(-16, 17)), axis=1)
    image[::4] *= 0.7
    return image


@dataclass(frozen=True)
class Style:
    """How a thing is shown, and the phrases that say so."""

    phrases: tuple[str, ...]
    paint: Callable[[Sprite, np.random.Generator], np.ndarray]
    scale: tuple[float, float] = (0.5, 0.82)
    bound: bool = False


def _in_scene(name: str) -> Callable[[Sprite, np.random.Generator], np.ndarray]:
    return lambda sprite, rng: _compose(SCENES[name], sprite, rng)


_SCENE_PHRASES = {
    "studio": ("on a plain white background", "in a photo studio", "cut out on white"),
    "beach": ("on the beach", "by the sea", "on a sandy shore"),
    "night": ("at night", "under the moon", "in the dark of night"),
    "snow": ("in the snow", "in winter", "during a snowfall"),
    "forest": ("in the forest", "among the trees", "in the woods"),
    "desert": ("in the desert", "on sand dunes", "in the dry dunes"),
    "underwater": ("underwater", "at the bottom of the sea", "below the waves"),
    "city": ("in the city", "in front of skyscrapers", "in a street downtown"),
    "meadow": ("on the grass", "in a green meadow", "in a field"),
    "sunset": ("at sunset", "at dusk", "in evening light"),
    "rain": ("in the rain", "on a rainy day", "during a storm"),
    "fog": ("in the fog", "in the mist", "on a foggy morning"),
    "table": ("on a wooden table", "on wooden planks", "on a desk"),
    "brick": ("in front of a brick wall", "against bricks", "by a wall of bricks"),
    "bookshelf": ("on a bookshelf", "among books", "in a library"),
    "space": ("in outer space", "among the stars", "in a galaxy"),
    "fire": ("in flames", "on fire", "in a burning blaze"),
    "stage": ("on a theatre stage", "in front of a red curtain", "on stage"),
    "tiles": ("on kitchen tiles", "on a tiled floor", "in the kitchen"),
}

STYLES: dict[str, Style] = {
    **{name: Style(phrases, _in_scene(name)) for name, phrases in _SCENE_PHRASES.items()},
    "sketch": Style(("as a pencil sketch", "drawn in pencil", "a rough sketch"), _sketch),
    "blueprint": Style(
        ("as a blueprint", "a technical drawing", "a white plan on blue"), _blueprint
    ),
    "silhouette": Style(("as a silhouette", "a black shadow", "in backlight"), _silhouette),
    "polaroid": Style(
        ("as a faded polaroid", "an instant photo", "a washed out print"),
        _polaroid,
        (0.48, 0.62),
        True,
    ),
    "sepia": Style(("in an old photograph", "in sepia", "a vintage photo"), _sepia),
    "pixels": Style(
        ("as pixel art", "in an old video game", "made of blocks"), _pixels, (0.62, 0.9)
    ),
    "neon": Style(("as a neon sign", "in glowing tubes", "a neon light"), _neon),
    "fence": Style(("behind a wire fence", "behind wire mesh", "seen through a fence"), _fence),
    "popart": Style(("as pop art", "as a comic print", "in bold printed dots"), _popart),
    "framed": Style(
        ("as a framed painting", "in a picture frame", "on a museum wall"),
        _framed,
        (0.46, 0.6),
        True,
    ),
    "defocus": Style(("out of focus", "as a blurry photo", "very blurred"), _defocus, (0.62, 0.9)),
    "negative": Style(("as a film negative", "in inverted colours", "a photo negative"), _negative),
    "stamp": Style(
        ("on a postage stamp", "as a stamp", "on a letter stamp"), _stamp, (0.45, 0.58), True
    ),
    "tshirt": Style(
        ("printed on a shirt", "on a shirt", "as a print on cloth"), _tshirt, (0.36, 0.44), True
    ),
    "wallpaper": Style(
        ("as a wallpaper pattern", "repeated on paper", "as wrapping paper"),
        _wallpaper,
        (0.7, 0.88),
        True,
    ),
    "stitched": Style(("as embroidery", "in cross stitch", "sewn with thread"), _stitched),
    "thermal": Style(("in a thermal image", "seen in infrared", "as a heat map"), _thermal),
    "carved": Style(("carved in stone", "as a stone relief", "a stone carving"), _carved),
    "chalk": Style(("on a chalkboard", "drawn in chalk", "on a blackboard"), _chalk),
    "monochrome": Style(("in black and white", "a grey photo", "without colour"), _monochrome),
    "glitch": Style(("on a broken screen", "as a glitch", "with video errors"), _glitch),
}


def render(thing: Thing, style: str, seed: int) -> np.ndarray:
    """Draw a thing in a style: (SIZE, SIZE, 3) uint8, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    how = STYLES[style]
    sprite = make_sprite(thing, rng, how.scale, how.bound)
    image = how.paint(sprite, rng) * np.float32(rng.uniform(0.93, 1.05))
    grain = rng.integers(-9, 10, (SIZE, SIZE, 1), dtype=np.int16)
    return (image + grain).clip(0, 255).astype(np.uint8)

"""Sketches that nobody made: a few strokes on plain ground, drawn at random, without any font.

Networks that tell handwriting or drawings apart look at strokes, and what they say of any strokes
teaches a student much of what they know. Compare `dead_leaves`, for those that know photographs.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

# How many there are of a run at most: with so many signs in all, and so many bytes.
COUNT, SIGNS, BYTES = 4096, 8192, 2**27
# A sketch is drawn so many times as large, and then made smaller, which smooths its strokes; but
# its shorter side is not longer than that for it.
FINER, LONG = 3, 512
MOST_SIGNS = 8  # in a sketch
STROKES = (1, 2, 2, 3, 3)  # of a sign
KINDS = ("line", "line", "arc", "arc", "curve")
POINTS = 16  # of a stroke
PLACES = (0.0, 0.5, 1.0)  # across and down a sign, between which strokes run
NEAR = 0.06  # the deviation from them
# Of a sign, the height as a share of the image's shorter side, its width as a share of the height,
# and the width of its pen as a share of that; and how far it is off the middle.
HEIGHT, ASPECT, PEN, OFF = (0.45, 0.9), (0.4, 1.0), (0.05, 0.2), 0.04

Point = tuple[float, float]


@functools.lru_cache(maxsize=3)  # for programs with several runs, which look at both kinds first
def sketches(
    count: int, channels: int, height: int, width: int, light: bool, seed: int = 0
) -> Tensor:
    """Sketches [count, channels, height, width] uint8, the same ones for the same arguments.

    They are kept for the next call, so they must not be written to.

    Args:
        count: how many.
        channels: of each, all equal.
        height: in pixels; a sketch that is twice as high as wide has two signs, and so on to eight.
        width: likewise.
        light: whether strokes are white on black; else they are black on white.
        seed: of what is drawn.
    """
    numbers = random.Random(seed)
    drawn = [_sketch(numbers, height, width, light) for _ in range(count)]
    shape = (0, 1, height, width)
    grey = torch.stack(drawn) if drawn else torch.empty(shape, dtype=torch.uint8)
    return grey.expand(-1, channels, -1, -1)


def how_many(channels: int, height: int, width: int) -> int:
    """Of this size in a run."""
    most = BYTES // (channels * height * width)
    return max(1, min(COUNT, SIGNS // _signs(height, width), most))


def _signs(height: int, width: int) -> int:
    """As many in a sketch as there are squares along it."""
    return min(MOST_SIGNS, round(max(height, width) / min(height, width)))


def _sketch(numbers: random.Random, height: int, width: int, light: bool) -> Tensor:
    from PIL import Image, ImageDraw
    from torchvision.transforms.functional import pil_to_tensor

    ground, ink = (0, 255) if light else (255, 0)
    finer = max(1, min(FINER, LONG // min(height, width)))
    image = Image.new("L", (width * finer, height * finer), ground)
    draw = ImageDraw.Draw(image)
    side, signs = finer * min(height, width), _signs(height, width)
    for place in range(signs):  # each near the middle of its part of the image
        along = (place + 0.5) / signs
        x, y = (along, 0.5) if width >= height else (0.5, along)
        tall = side * numbers.uniform(*HEIGHT)
        wide, pen = tall * numbers.uniform(*ASPECT), tall * numbers.uniform(*PEN)
        left = x * image.width + side * numbers.gauss(0, OFF) - wide / 2
        top = y * image.height + side * numbers.gauss(0, OFF) - tall / 2
        for _ in range(numbers.choice(STROKES)):
            points = [(left + wide * u, top + tall * v) for u, v in _stroke(numbers)]
            draw.line(points, fill=ink, width=max(1, round(pen)), joint="curve")
            for u, v in (points[0], points[-1]):  # with round ends
                draw.ellipse((u - pen / 2, v - pen / 2, u + pen / 2, v + pen / 2), fill=ink)
    small: Tensor = pil_to_tensor(image.reduce(finer))
    return small


def _stroke(numbers: random.Random) -> list[Point]:
    """A straight line, an arc of an ellipse or a cubic Bézier curve, mostly in [0, 1]²."""
    kind = numbers.choice(KINDS)
    steps = [step / (POINTS - 1) for step in range(POINTS)]
    if kind == "arc":
        x, y = numbers.gauss(0.5, NEAR), numbers.choice((0.25, 0.5, 0.75)) + numbers.gauss(0, NEAR)
        across, down = numbers.uniform(0.3, 0.5), numbers.uniform(0.2, 0.5)
        begin = numbers.choice((0, 90, 180, 270)) + numbers.gauss(0, 17)
        turn = numbers.choice((180, 270, 360, 360))
        angles = [math.radians(begin + turn * step) for step in steps]
        return [(x + across * math.cos(angle), y + down * math.sin(angle)) for angle in angles]
    a, b, c, d = (_place(numbers) for _ in range(4))
    if kind == "line":
        while math.dist(a, d) < 0.3:  # else it is a dot
            d = _place(numbers)
        return [a, d]
    return [_bezier((a, b, c, d), step) for step in steps]


def _place(numbers: random.Random) -> Point:
    x, y = (numbers.choice(PLACES) + numbers.gauss(0, NEAR) for _ in range(2))
    return x, y


def _bezier(points: Sequence[Point], t: float) -> Point:
    s = 1 - t
    weights = s**3, 3 * s * s * t, 3 * s * t * t, t**3
    x, y = (sum(w * place for w, place in zip(weights, axis, strict=True))
            for axis in zip(*points, strict=True))  # fmt: skip
    return x, y

"""Pictures that nobody took: shapes that hide one another, drawn at random.

They are called dead leaves. Like photographs they have edges, even and rough parts, and details of
all sizes (Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001), and networks
learn from them what holds for photographs, too (Baradad et al., "Learning to see by looking at
noise", NeurIPS 2021).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

SIDE = 1024  # of a picture, in pixels
SHAPES = 2500  # in one picture
# A radius above r has the probability (SMALLEST / r) ** STEEPNESS.
SMALLEST, LARGEST, STEEPNESS = 6.0, 260.0, 1.6
# A shape is |x|^p + |y|^p <= 1 for one of these p, from a rhomb to nearly a rectangle.
EXPONENTS = (1.0, 2.0, 2.0, 8.0)
# Grey levels by which colours, and their shades within a shape, differ. The channels have so much
# of their variance in common.
COLOUR, SHADE, COMMON = 65.0, 25.0, 0.9
TEXTURES = (0.0, 5.0, 15.0, 30.0)  # grey levels
# The power of a texture falls with the frequency by twice these exponents: from rough to smooth.
SMOOTHNESS = (0.6, 1.0, 1.4)
GREY = 128.0


@functools.lru_cache(maxsize=1)  # for programs with several runs: drawing six takes seconds
def dead_leaves(count: int, channels: int, side: int = SIDE, seed: int = 0) -> tuple[Tensor, ...]:
    """Pictures [channels, side, side] uint8, the same ones for the same arguments.

    They are kept for the next call, so they must not be written to.

    Args:
        count: how many.
        channels: of each; they are alike, as the colours of a photograph are.
        side: height and width; shapes grow with it.
        seed: of what is drawn.
    """
    random = torch.Generator().manual_seed(seed)
    textures = [_texture(channels, side, power, random) for power in SMOOTHNESS]
    return tuple(_picture(textures, random) for _ in range(count))


def _picture(textures: list[Tensor], random: torch.Generator) -> Tensor:
    channels, side = textures[0].shape[:2]
    rolled = torch.randint(side, (2,), generator=random).tolist()
    canvas = GREY + COLOUR * textures[-1].roll(rolled, (1, 2))
    colours = GREY + COLOUR * _alike(torch.randn(SHAPES, channels, generator=random))
    slopes = SHADE * torch.randn(SHAPES, 2, generator=random)
    for number, one in enumerate(torch.rand(SHAPES, 11, generator=random).tolist()):
        size, across, down, turn, aspect, kind, waves, wave, phase, which, strength = one
        radius = min(SMALLEST * (1 - size) ** (-1 / STEEPNESS), LARGEST) * side / SIDE
        x, y = across * side, down * side
        reach = math.ceil(1.5 * radius)
        top, left = max(0, int(y) - reach), max(0, int(x) - reach)
        bottom, right = min(side, int(y) + reach + 1), min(side, int(x) + reach + 1)
        rows = ((torch.arange(top, bottom) - y) / radius).unsqueeze(1)
        columns = ((torch.arange(left, right) - x) / radius).unsqueeze(0)
        inside = _inside(columns, rows, turn, aspect, kind, waves, wave, phase)
        # The texture of some other place, so that neighbours do not continue one another.
        high, wide = len(rows), columns.shape[1]
        rise, shift = number * 37 % (side - high + 1), number * 101 % (side - wide + 1)
        part = textures[int(which * len(textures))][:, rise : rise + high, shift : shift + wide]
        shade = slopes[number, 0] * rows + slopes[number, 1] * columns
        texture = TEXTURES[int(strength * len(TEXTURES))] * part
        filled = colours[number].view(-1, 1, 1) + shade + texture
        window = canvas[:, top:bottom, left:right]
        window.copy_(torch.where(inside, filled, window))
    return canvas.clamp(0, 255).round().to(torch.uint8)


def _inside(
    x: Tensor, y: Tensor, turn: float, aspect: float, kind: float, waves: float, wave: float,
    phase: float,
) -> Tensor:  # fmt: skip
    """Which points belong to a shape of radius 1; the numbers, in [0, 1), are what differs."""
    angle = math.pi * turn
    u = x * math.cos(angle) + y * math.sin(angle)
    v = (y * math.cos(angle) - x * math.sin(angle)) / (0.2 + 0.8 * aspect)
    power = EXPONENTS[int(kind * len(EXPONENTS))]
    distance = (u.abs() ** power + v.abs() ** power) ** (1 / power)
    # Half of the shapes have a wavy outline.
    height = max(0.0, waves - 0.5)
    return distance <= 1 + height * torch.cos((2 + int(5 * wave)) * torch.atan2(v, u) + phase * 7)


def _texture(channels: int, side: int, power: float, random: torch.Generator) -> Tensor:
    """Noise [channels, side, side] of mean 0 and deviation 1 whose amplitudes fall with the
    frequency, raised to `power`."""
    across, down = torch.fft.rfftfreq(side), torch.fft.fftfreq(side).unsqueeze(1)
    amplitude = (across**2 + down**2).clamp(min=side**-2.0) ** (-power / 2)
    spectrum = torch.fft.rfft2(torch.randn(channels, side, side, generator=random)) * amplitude
    spectrum[:, 0, 0] = 0
    noise = torch.fft.irfft2(spectrum, s=(side, side))
    noise = noise / noise.std((1, 2), keepdim=True)
    return _alike(noise.movedim(0, -1)).movedim(-1, 0)


def _alike(values: Tensor) -> Tensor:
    """Independent values [..., channels] of variance 1, so mixed that channels are correlated."""
    channels = values.shape[-1]
    common = values.sum(-1, keepdim=True) / math.sqrt(channels)
    # The projections on (1, ..., 1) and on what is left, weighted.
    mean = common / math.sqrt(channels)
    most = math.sqrt(1 + (channels - 1) * COMMON)
    return most * mean + math.sqrt(1 - COMMON) * (values - mean)

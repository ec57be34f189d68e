"""Calls of every operator of dafl_fast that fit, of any size and dtype: what tests of wrong
arguments and of memory begin with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import dafl_fast  # noqa: F401  loads the operators

OPS = torch.ops.dafl_fast
WEIGHTS = (1.0, 5.0, 0.1, 10.0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Sizes(NamedTuple):
    """Of the losses: rows, classes, features; of the layers: images, channels in and out, height
    and width. conv_pool's images have at least 6 rows and columns."""

    rows: int = 6
    classes: int = 40
    features: int = 4
    images: int = 2
    channels: int = 3
    outputs: int = 4
    height: int = 6
    width: int = 6


def good_calls(
    sizes: Sizes | None = None, dtype: torch.dtype = torch.float32, other: torch.dtype | None = None
) -> dict[str, list[Any]]:
    """For each operator, arguments that fit: activations and the teacher's logits in `dtype`, what
    may differ from them in `other`."""
    n = sizes or Sizes()
    other = dtype if other is None else other
    t, f = randn(n.rows, n.classes), randn(n.rows, n.features)
    s = randn(n.rows + 1, n.classes)[1:].contiguous()
    t, f, s, one = t.to(dtype), f.to(other), s.to(other), torch.ones((), dtype=other)
    *_, row_stats, class_mean = OPS.generator_loss(t, f, *WEIGHTS)
    distilled = OPS.distill_loss(s, t, 2.0, True)[3]
    ci, co, image = n.channels, n.outputs, (n.height, n.width)
    x = randn(n.images, ci, *image).to(dtype)
    large = randn(n.images, ci, max(n.height, 6), max(n.width, 6)).to(dtype)
    five, three, bias = (p.to(other) for p in (randn(co, ci, 5, 5), randn(co, ci, 3, 3), randn(co)))
    pooled, index = OPS.conv_pool(large, five, bias)
    stats = row_stats.dtype
    # No values have no moments.
    moments = OPS.moments(x) if x.numel() else (torch.zeros(ci, dtype=stats),) * 2
    norm = (*moments, randn(ci).to(other), (randn(ci) + 1).to(other))
    settings = (1e-5, 0.2)
    factors = OPS.conv3x3_factors(three, dtype, True)
    same = randn(n.images, co, *image).to(other)
    double = randn(n.images, co, 2 * n.height, 2 * n.width).to(other)
    return {
        "generator_loss": [t, f, *WEIGHTS],
        "generator_loss_backward": [one, t, f, row_stats, class_mean, *WEIGHTS],
        "distill_loss": [s, t, 2.0, True],
        "distill_loss_backward": [one, s, t, distilled, 2.0, True],
        "dafl_losses": [t, f, s, *WEIGHTS, 2.0, True],
        "conv_pool": [large, five, bias],
        "conv_pool_backward": [pooled, large, five, bias, index, True, True],
        **({"moments": [x]} if x.numel() else {}),
        "norm_activation": [x, *norm, *settings],
        "norm_activation_backward": [x, x, *norm, *settings],
        "norm_image_conv": [x, *norm, *settings, three, bias],
        "norm_image_conv_backward": [same, x, *norm, *settings, three, bias],
        "upsample_conv": [x, three],
        "upsample_conv_backward": [double, x, three],
        "conv3x3": [x, three, bias, *factors],
        "conv3x3_factors": [three, dtype, True],
        "conv3x3_outputs": [x, factors[0], bias, co],
        "conv3x3_weight_grad": [same, x, three],
    }


def results_of(operator: str, arguments: list[Any]) -> list[Tensor]:
    results = getattr(OPS, operator)(*arguments)
    return [results] if isinstance(results, Tensor) else list(results)

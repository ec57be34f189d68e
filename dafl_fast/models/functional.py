"""Layers of the networks, computed faster: the same values and gradients up to rounding.

Each function stands for a few published layers in a row and takes their modules. On a CPU it runs
one operator of `dafl_fast._C`; elsewhere, and wherever a module is not exactly the one that the
operator replaces, the layers themselves. Under autocast, activations are cast to its dtype;
parameters stay what they are and are rounded inside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OPS = torch.ops.dafl_fast


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Nearest x2 upsampling, then `conv` (3x3, padding 1) without its bias.

    x is [N, in_channels, H, W]; the result [N, out_channels, 2H, 2W]. Each output pixel sees only
    2x2 distinct pixels of x. On a CPU that leaves 9 multiply-adds per pixel of x and channel pair
    (csrc/upsample_conv.cpp); elsewhere the pair is one stride-2 transposed convolution, whose 4x4
    kernel holds sums of the 3x3's taps, with 16. The two layers as published take 36.
    """
    if x.device.type == "cpu":
        return _OPS.upsample_conv(_autocast(x), conv.weight)
    # Along one axis: kernel4[j] = w[2 - j] + w[3 - j], taking taps outside 0..2 as zero.
    w = F.pad(conv.weight, (1, 1, 1, 1))
    w = w[..., 1:, :] + w[..., :-1, :]
    w = w[..., 1:] + w[..., :-1]
    kernel = w.flip(2, 3).transpose(0, 1).contiguous()
    return F.conv_transpose2d(x, kernel, None, stride=2, padding=1)


def norm_activation(x: Tensor, norm: nn.BatchNorm2d, slope: float, bias: Tensor | None) -> Tensor:
    """Adds `bias` per channel, then `norm`, then LeakyReLU with `slope` (1: none).

    x is [N, C, H, W]. While `norm` takes the batch's statistics it subtracts the bias again, so
    that then the bias has no gradient and all that it does is shift the running mean.
    """
    if not norm.training:
        x = x if bias is None else x + bias.to(x.dtype).view(1, -1, 1, 1)
        return F.leaky_relu(norm(x), slope)
    mean, variance, momentum = norm.running_mean, norm.running_var, norm.momentum
    assert mean is not None and variance is not None and momentum is not None
    count = x.numel() // max(x.shape[1], 1)
    # A subclass may want other statistics (of several processes), and torch refuses one value.
    if type(norm) is nn.BatchNorm2d and x.device.type == "cpu" and norm.affine and count > 1:
        y, batch_mean, batch_variance = _OPS.norm_activation(
            _autocast(x), norm.weight, norm.bias, norm.eps, slope
        )
        with torch.no_grad():
            if bias is not None:
                batch_mean = batch_mean + bias
            mean.lerp_(batch_mean.to(mean.dtype), momentum)
            variance.lerp_(batch_variance.to(variance.dtype) * (count / (count - 1)), momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        return y
    if bias is not None:
        # Added before BatchNorm decays the running mean by (1 - m), so that m * bias remains.
        with torch.no_grad():
            mean.add_(bias, alpha=momentum / (1 - momentum))
    return F.leaky_relu(norm(x), slope, inplace=True)


def image_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` (3x3, padding 1) from many channels to an image's few: [N, C, H, W] alike."""
    if x.device.type == "cpu":
        return _OPS.image_conv(_autocast(x), conv.weight, conv.bias)
    return conv(x)


def conv_pool(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` (5x5, no padding), 2x2 max pooling, ReLU.

    x is [N, in_channels, H, W]; the result [N, out_channels, (H - 4) // 2, (W - 4) // 2].
    """
    if x.device.type == "cpu":
        return _OPS.conv_pool(_autocast(x), conv.weight, conv.bias)[0]
    # Pooling first gives the same values as ReLU first, with a quarter of the ReLU's work.
    return F.relu(F.max_pool2d(conv(x), 2))


def whole_image_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` where its kernel is as large as the image, a linear layer: [N, out_channels]."""
    return F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)


def _autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, as torch's own convolutions would take it."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype("cpu"))
    return x

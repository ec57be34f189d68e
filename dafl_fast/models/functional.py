"""Faster versions of the networks' layers, with the same values and gradients up to rounding.

Each function takes the modules of a few successive layers and computes what they do. On a CPU it
runs one operator of `dafl_fast._C`. On other devices, and if a module is not of exactly the kind
that the operator replaces, it runs the modules. Under autocast, activations are cast to its dtype;
parameters keep theirs and are rounded inside the operator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OPS = torch.ops.dafl_fast
# `norm_image_conv` is for few channels: it takes nine planes of memory for each of them.
_IMAGE_CHANNELS = 4


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Applies `norm` to x [N, C, H, W]."""
    if not _takes_batch_statistics(norm, x):
        return norm(x)
    x = as_autocast(x)
    mean, variance = _OPS.moments(x.detach())
    _update_running(norm, x, mean, variance)
    return _OPS.norm_activation(x, mean, variance, norm.weight, norm.bias, norm.eps, 1.0)


def upsample_stage(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    slope: float,
    to_image: nn.Conv2d | None = None,
) -> Tensor:
    """Nearest x2 upsampling, `conv`, `norm`, LeakyReLU with `slope`, then `to_image` if given.

    Convolutions are 3x3 with padding 1. x is [N, in_channels, H, W]; the result has twice its
    height and width. This saves:

    * the upsampled image, because each output pixel depends on only 2x2 distinct pixels of x.
      Instead of 36 multiply-adds per pixel of x and pair of channels, this takes 6.25 on a CPU
      (csrc/layers/upsample_conv.cpp), and 16 elsewhere (a stride-2 transposed convolution);
    * `conv`'s bias in training, because `norm` subtracts it again. It only shifts the running mean;
    * most passes over memory on a CPU (norm_activation.cpp, norm_image_conv.cpp in csrc/layers).
    """
    if operators_run(x):
        y, mean, variance = _OPS.upsample_conv(as_autocast(x), conv.weight)
    else:
        y = _upsample_by_transposed_conv(x, conv.weight)
    if _takes_batch_statistics(norm, y):
        _update_running(norm, y, mean, variance, conv.bias)
        operands = (y, mean, variance, norm.weight, norm.bias, norm.eps, slope)
        if to_image is not None and to_image.out_channels <= _IMAGE_CHANNELS:
            return _OPS.norm_image_conv(*operands, to_image.weight, to_image.bias)
        y = _OPS.norm_activation(*operands)
        return y if to_image is None else to_image(y)
    bias, running = conv.bias, norm.running_mean
    assert bias is not None
    if norm.training and running is not None and norm.momentum is not None:
        # BatchNorm then multiplies the running mean by (1 - m), so that m * bias remains.
        with torch.no_grad():
            running.add_(bias, alpha=norm.momentum / (1 - norm.momentum))
    else:
        y = y + bias.to(y.dtype).view(1, -1, 1, 1)
    y = F.leaky_relu(norm(y), slope, inplace=True)
    return y if to_image is None else to_image(y)


def conv_pool(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` (5x5, no padding), 2x2 max pooling, ReLU.

    x is [N, in_channels, H, W]; the result [N, out_channels, (H - 4) // 2, (W - 4) // 2].
    """
    if operators_run(x):
        return _OPS.conv_pool(as_autocast(x), conv.weight, conv.bias)[0]
    # ReLU after pooling gives the same values as before it, with a quarter of the work.
    return F.relu(F.max_pool2d(conv(x), 2))


def whole_image_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` with a kernel as large as the image, computed as a linear layer: [N, out_channels]."""
    return F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)


def with_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C, H, W] itself, and the mean and biased variance [C] of its channels.

    Continue with the x that is returned: then the gradients of all three are computed in one go.
    """
    on_gpu = x.is_cuda and x.numel() > 0 and not _exporting()
    if (operators_run(x) and x.dim() == 4) or on_gpu:
        passed, mean, variance = _Moments.apply(x)
        return passed, mean, variance
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    return x, mean, variance


class _Moments(torch.autograd.Function):
    """One pass over x for the moments, and one over x for their gradient, in x's own dtype. Where
    our operators do not run, BatchNorm's own kernels do it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if operators_run(x):
            mean, variance = _OPS.moments(x)
        else:  # the variance is the biased one
            mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, variance

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor, grad_mean: Tensor, grad_variance: Tensor
    ) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        scale = grad_variance * (2 / count)
        shift = grad_mean / count - scale * mean
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        # scale * x + shift, as BatchNorm without statistics of its own.
        if operators_run(x):
            return grad + _OPS.norm_activation(x, zero, one, scale, shift, 0.0, 1.0)
        return grad + F.batch_norm(x, zero, one, scale, shift, eps=0.0)


def operators_run(x: Tensor) -> bool:
    """Whether our operators are used for x: on a CPU, but not during an export, because an exported
    program should run without dafl_fast."""
    return x.device.type == "cpu" and not _exporting()


def _exporting() -> bool:
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _upsample_by_transposed_conv(x: Tensor, weight: Tensor) -> Tensor:
    # Along one axis: kernel4[j] = w[2 - j] + w[3 - j], where w is zero outside 0..2. Sums of 2x2
    # neighbours are what pooling computes, by one kernel, and exactly (a matrix product may round
    # the weights to TF32).
    sums = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)
    kernel = sums.flip(2, 3).transpose(0, 1).contiguous()
    return F.conv_transpose2d(x, kernel, None, stride=2, padding=1)


def _takes_batch_statistics(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether the operators compute what `norm` would. A subclass may use other statistics, such as
    those of several processes; torch raises an error for a batch with one value per channel."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and operators_run(x)
        and x.numel() > x.shape[1]
    )


@torch.no_grad()
def _update_running(
    norm: nn.BatchNorm2d, x: Tensor, mean: Tensor, variance: Tensor, bias: Tensor | None = None
) -> None:
    """Updates `norm`'s buffers as it does for x + bias; mean and biased variance are those of x."""
    running_mean, running_var = norm.running_mean, norm.running_var
    assert running_mean is not None and running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    if bias is not None:
        mean = mean + bias
    count = x.numel() // x.shape[1]
    running_mean.lerp_(mean.to(running_mean.dtype), norm.momentum)
    running_var.lerp_(variance.to(running_var.dtype) * (count / (count - 1)), norm.momentum)
    norm.num_batches_tracked.add_(1)


def as_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, to which torch's own convolutions would cast it."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype("cpu"))
    return x

"""Faster versions of the networks' layers, with the same values and gradients up to rounding.

Each function takes the modules of a few successive layers and computes what they do. On a CPU it
runs one operator of `dafl_fast._C`, and on a GPU where there is one for it. On other devices, and
if a module is not of exactly the kind that the operator replaces, it runs the modules. Under
autocast, activations are cast to its dtype; parameters keep theirs and are rounded inside the
operator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _C

_OPS = torch.ops.dafl_fast
# `norm_image_conv` is for few channels: it takes nine planes of memory for each of them.
_IMAGE_CHANNELS = 4
# The kernels of `conv_pool` on a GPU are for few channels and small images.
_POOL_CHANNELS, _POOL_SIDE = 32, 64
# And those of `norm_image_conv` are for images of one channel and rows of so many pixels.
_GPU_CHANNELS, _GPU_ROW = 128, 379
BUILT_FOR_GPU = _C.cuda


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Applies `norm` to x [N, C, H, W]."""
    return normalised(as_autocast(x), norm) if _takes_batch_statistics(norm, x) else norm(x)


def normalised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """x [N, C, H, W] as `norm` normalises it in training, where `norm_runs` says that it can."""
    mean, variance = _OPS.moments(x.detach())
    _update_running(norm, x, mean, variance)
    return _OPS.norm_activation(x, mean, variance, norm.weight, norm.bias, norm.eps, 1.0)


def linear_image(z: Tensor, linear: nn.Linear, size: tuple[int, int, int]) -> Tensor:
    """`linear` of z, viewed as images [N, C, H, W] of this size, and channels_last.

    In place of the images the rows of the weight are moved, which are fewer in a large batch.
    """

    def moved(parameter: Tensor) -> Tensor:  # from [C H W, ...] to [H W C, ...]
        return parameter.unflatten(0, size).movedim(0, 2).flatten(0, 2)

    y = F.linear(z, moved(linear.weight), moved(linear.bias))
    return y.unflatten(1, (*size[1:], size[0])).movedim(3, 1)


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
    * most passes over memory (norm_activation.cpp, norm_image_conv.cpp in csrc/layers).
    """
    if operators_run(x):
        y, *moments = _OPS.upsample_conv(as_autocast(x), conv.weight)
    else:
        y, moments = _upsample_by_transposed_conv(x, conv.weight), []
    if _takes_batch_statistics(norm, y):
        mean, variance = moments or _OPS.moments(y.detach())
        _update_running(norm, y, mean, variance, conv.bias)
        operands = (y, mean, variance, norm.weight, norm.bias, norm.eps, slope)
        if to_image is not None and _image_conv_runs(y, to_image):
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
    if operators_run(x) or (
        _kernels_run(x)
        and max(conv.weight.shape[:2]) <= _POOL_CHANNELS
        and max(x.shape[2:]) <= _POOL_SIDE
    ):
        return _OPS.conv_pool(as_autocast(x), conv.weight, conv.bias)[0]
    # ReLU after pooling gives the same values as before it, with a quarter of the work.
    return F.relu(F.max_pool2d(conv(x), 2))


def whole_image_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` with a kernel as large as the image, computed as a linear layer: [N, out_channels]."""
    return F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)


def with_channel_last(x: Tensor) -> Tensor:
    """x [N, 1, H, W], contiguous, with the strides of channels_last, which are as true of it.

    Torch chooses its kernels by the strides. On a GPU, BatchNorm of one channel by those for
    contiguous tensors takes twenty times as long, since a block of threads adds up the whole batch.
    """
    return x.squeeze(1).unsqueeze(3).permute(0, 3, 1, 2)


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
        if _moments_run(x):
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
        # scale * x + shift, as BatchNorm without statistics of its own. The operator takes them to
        # be those of x when it is differentiated again.
        if _moments_run(x) and not torch.is_grad_enabled():
            return grad + _OPS.norm_activation(x, zero, one, scale, shift, 0.0, 1.0)
        # PyTorch 2.11 refuses an epsilon of 0 on a GPU. One and this are one.
        return grad + F.batch_norm(x, zero, one, scale, shift, eps=1e-30)


def _moments_run(x: Tensor) -> bool:
    return operators_run(x) or (x.dim() == 4 and _norm_runs(x))


def operators_run(x: Tensor) -> bool:
    """Whether our operators are used for x: on a CPU, but not during an export, because an exported
    program should run without dafl_fast."""
    return x.device.type == "cpu" and not _exporting()


def _kernels_run(x: Tensor) -> bool:
    """Whether x is on a GPU for which this build has kernels, outside an export."""
    return x.is_cuda and BUILT_FOR_GPU and not _exporting()


def _norm_runs(x: Tensor) -> bool:
    """Whether the norm's operators are used for x on a GPU."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return _kernels_run(x) and last and x.dtype != torch.float64


def _image_conv_runs(y: Tensor, to_image: nn.Conv2d) -> bool:
    """Whether one operator computes the norm of y, the activation and `to_image`."""
    channels, width = y.shape[1], y.shape[3]
    small = channels <= _GPU_CHANNELS and width <= _GPU_ROW and to_image.out_channels == 1
    return to_image.out_channels <= _IMAGE_CHANNELS if operators_run(y) else small


def _exporting() -> bool:
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _upsample_by_transposed_conv(x: Tensor, weight: Tensor) -> Tensor:
    # Along one axis: kernel4[j] = w[2 - j] + w[3 - j], where w is zero outside 0..2. Sums of 2x2
    # neighbours are what pooling computes, by one kernel, and exactly (a matrix product may round
    # the weights to TF32). Contiguous, because for channels_last torch's CUDA kernel (2.11) forgets
    # the padding in the gradient.
    sums = F.avg_pool2d(weight.contiguous(), 2, stride=1, padding=1, divisor_override=1)
    kernel = sums.flip(2, 3).transpose(0, 1)
    if x.is_cuda:  # autocast and cuDNN would need two copies
        kernel = kernel.to(_autocast_dtype(kernel), memory_format=torch.channels_last)
    else:
        kernel = kernel.contiguous()
    return F.conv_transpose2d(x, kernel, None, stride=2, padding=1)


def _takes_batch_statistics(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether the operators compute what `norm` would. A subclass may use other statistics, such as
    those of several processes."""
    return type(norm) is nn.BatchNorm2d and norm_runs(norm, x)


def norm_runs(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether the operators compute nn.BatchNorm2d with the settings of `norm` for x [N, C, H, W].
    torch raises an error for a batch with one value per channel."""
    return (
        norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and (operators_run(x) or _norm_runs(x))
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
    variance = variance * (count / (count - 1))
    moments = [mean.to(running_mean.dtype), variance.to(running_var.dtype)]
    torch._foreach_lerp_([running_mean, running_var], moments, norm.momentum)
    norm.num_batches_tracked.add_(1)


def as_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, to which torch's own convolutions would cast it."""
    return x.to(_autocast_dtype(x))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype

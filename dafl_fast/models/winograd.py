"""3x3 convolutions with fewer multiplications, for networks with many channels on a CPU.

Computed directly, four outputs of a 3x3 convolution take 36 multiplications. Winograd's algorithm
multiplies sums of inputs by sums of weights ("factors"), and takes 16 (csrc/layers/winograd.cpp).
Both sums are rounded, so in bfloat16 the error of the outputs is about twice that of a direct
convolution. In float32 it is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from .. import _C
from .functional import as_autocast, operators_run
from .twin import twin

_OPS = torch.ops.dafl_fast

# The dtypes for which the kernels are faster on this processor. If DAFL_FAST_ISA is wrong, the
# first operator that runs says so, not this import.
_DTYPES: frozenset[torch.dtype] = frozenset()
with contextlib.suppress(RuntimeError):
    _DTYPES = frozenset(t for t in (torch.float32, torch.bfloat16) if _C.conv3x3_pays(t))
# The kernels pad channels to a multiple of this. With fewer channels, the additions take longer
# than the multiplications that they save.
_CHANNELS = 64
# With fewer tiles of 2x2 outputs in a batch, the factors of the weights cost more than they save.
_MIN_TILES = 32


class WinogradConv2d(nn.Conv2d):
    """nn.Conv2d with a 3x3 kernel, stride 1 and padding 1, computed with fewer multiplications.

    Its arguments, parameters and state_dict are those of nn.Conv2d, and so are its results up to
    rounding. It computes like nn.Conv2d if that is faster: for other shapes, few channels or small
    batches, on devices other than the CPU, and on processors without kernels.
    """

    _factors: tuple[Tensor, Tensor] | None = None

    def keep_factors(self) -> None:
        """Computes the factors of the weight once. Use it only if the weight never changes."""
        dtype = self.weight.dtype
        if _pays(self, dtype):
            self._factors = _OPS.conv3x3_factors(self.weight.detach(), dtype, True)

    def forward(self, input: Tensor) -> Tensor:
        if not operators_run(input):
            return super().forward(input)
        x = as_autocast(input)
        if x.dim() != 4 or not _pays(self, x.dtype):
            return super().forward(input)
        factors = self._factors
        if factors is not None and factors[0].dtype == x.dtype:
            return _OPS.conv3x3(x, self.weight, self.bias, *factors)
        if x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2) < _MIN_TILES:
            return super().forward(input)
        return _OPS.conv3x3(x, self.weight, self.bias, None, None)


def accelerated(
    network: nn.Module, constant: bool = False, layers: Collection[nn.Module] | None = None
) -> nn.Module:
    """A twin of `network` in which convolutions that become faster are of class `WinogradConv2d`.

    Names, parameters, hooks and state_dict are the same, and `network` is not changed. If no
    convolution becomes faster, it is `network` itself.

    Args:
        constant: its weights never change, so the factors of the weights are computed only once.
        layers: those of its layers that may become faster; by default all.
    """

    def substitute(layer: nn.Module) -> type[nn.Module] | None:
        wanted = becomes_faster(layer) and (layers is None or layer in layers)
        return WinogradConv2d if wanted else None

    fast = twin(network, substitute)
    for layer in fast.modules():
        if constant and isinstance(layer, WinogradConv2d):
            layer.keep_factors()
    return fast


def becomes_faster(layer: nn.Module) -> bool:
    """Whether `accelerated` has a faster class for the layer."""
    return type(layer) is nn.Conv2d and _fits(layer)


def _fits(layer: nn.Conv2d) -> bool:
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == layer.padding == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.in_channels % _CHANNELS == layer.out_channels % _CHANNELS == 0
    )


def _pays(layer: nn.Conv2d, dtype: torch.dtype) -> bool:
    return layer.weight.device.type == "cpu" and _fits(layer) and dtype in _DTYPES

"""3x3 convolutions with fewer multiplications, for networks with many channels on a CPU.

Four outputs of a 3x3 convolution take 36 multiplications, or 16 of sums of inputs with sums of
weights (csrc/layers/winograd.cpp). Activations and factors are rounded once more than in a direct
convolution: in bfloat16 the outputs' error is about twice, in float32 it is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _C
from .functional import as_autocast, operators_run
from .twin import twin

_OPS = torch.ops.dafl_fast

# What there are kernels for that gain on this processor.
_DTYPES = frozenset(t for t in (torch.float32, torch.bfloat16) if _C.conv3x3_pays(t))
# The kernels pad channels to a multiple of this; with fewer, the additions cost more than the
# multiplications that they save.
_CHANNELS = 64
# Tiles of 2x2 outputs in a batch, below which the factors of the weights cost more than they save.
_MIN_TILES = 32


class WinogradConv2d(nn.Conv2d):
    """nn.Conv2d with a 3x3 kernel, stride 1 and padding 1, computed with fewer multiplications.

    Its arguments, parameters and state_dict are those of nn.Conv2d, and so are its results up to
    rounding. It computes as nn.Conv2d does where that is faster: other shapes, few channels, small
    batches, devices other than the CPU, processors for which there are no kernels.
    """

    _factors: tuple[Tensor, Tensor] | None = None

    def keep_factors(self) -> None:
        """Computes the factors of the weight now and for good: for weights that never change."""
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


def accelerated(network: nn.Module, constant: bool = False) -> nn.Module:
    """A twin of `network` whose convolutions that can gain are of the class `WinogradConv2d`.

    Names, parameters, hooks and state_dict are the same, and `network` is left as it is. If its
    weights are `constant` from now on, what depends on them alone is computed once.
    """
    fast = twin(
        network, lambda layer: WinogradConv2d if type(layer) is nn.Conv2d and _fits(layer) else None
    )
    for layer in fast.modules():
        if constant and isinstance(layer, WinogradConv2d):
            layer.keep_factors()
    return fast


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

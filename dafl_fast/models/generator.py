"""The published DAFL generator; upsampling and the convolution after it are one operation.

Chen et al., "Data-Free Learning of Student Networks", ICCV 2019, and its released code:
Linear -> BN -> [x2 nearest, Conv3x3, BN(eps 0.8), LeakyReLU 0.2] twice -> Conv3x3 -> Tanh -> BN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageSize, sides
from .functional import batch_norm, linear_image, upsample_stage, with_channel_last

# The released code writes `BatchNorm2d(128, 0.8)`, whose second argument is eps, not momentum.
# That was probably a mistake, but the published results were obtained with it, so we keep it.
PUBLISHED_BN_EPS = 0.8


class Generator(nn.Module):
    """Maps noise z [N, latent_dim] to images [N, channels, height, width].

    The last BatchNorm has no affine part, so every channel of a training batch has zero mean and
    unit variance, like *normalised* data.

    Two stages double the image's size, as published. For larger images there are more stages like
    the first, so that the linear layer makes 8x8 pixels or fewer: three stages for 64, four for 96
    and for 48x192, five for 224. Where half a size is no whole number, it is rounded up, and the
    stage that doubles it leaves the last row or column out: 30 comes from 15, from 8. Squares of
    a multiple of 4 keep what they had when there were no others: their sizes are never rounded (100
    comes from 50, from 25), and all their stages have the eps `bn_eps`.

    Args:
        latent_dim: length of z.
        image_size: height and width, or one number for both; at least 4.
        channels: image channels.
        width: channels of all stages (published: 128), except the last, which has half as many.
        bn_eps: eps of the BatchNorms of the last two stages; see `PUBLISHED_BN_EPS`. Those before
            them have torch's, as an eps of 0.8 takes four fifths of the variance away at each.

    Raises:
        ValueError: a size that the architecture cannot take.
    """

    def __init__(
        self,
        latent_dim: int = 100,
        image_size: ImageSize = 32,
        channels: int = 1,
        width: int = 128,
        bn_eps: float = PUBLISHED_BN_EPS,
    ) -> None:
        super().__init__()
        height, across = sides(image_size)
        if min(height, across) < 4:
            raise ValueError(f"image_size must be at least 4, got {image_size}")
        if width < 2 or width % 2:
            raise ValueError(f"width must be an even number of channels, got {width}")
        if latent_dim < 1 or channels < 1:
            raise ValueError(
                f"latent_dim and channels must be at least 1, got {latent_dim} and {channels}"
            )
        self.latent_dim = latent_dim
        self.image_shape = (channels, height, across)
        old = height == across and height % 4 == 0
        self._width, self._sizes = width, _sizes(height, across, rounded=not old)
        rows, columns = self._sizes[0]
        more = len(self._sizes) - 3
        # Layers and their names are those of the published code, so that its checkpoints load.
        self.l1 = nn.Sequential(nn.Linear(latent_dim, width * rows * columns))
        self.conv_blocks0 = nn.Sequential(nn.BatchNorm2d(width))
        stages = [
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width, eps=eps),
                nn.LeakyReLU(0.2),
            )
            for eps in [bn_eps if old else 1e-5] * more + [bn_eps]
        ]
        self.more_blocks = nn.ModuleList(stages[:more])
        self.conv_blocks1 = stages[more]
        self.conv_blocks2 = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2, eps=bn_eps),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        start, *sizes, size = self._sizes
        # A type checker knows Sequential's elements only as modules.
        first: list[list[Any]] = [list(block) for block in (*self.more_blocks, self.conv_blocks1)]
        (norm0,), (conv2, norm2, act2, to_image, tanh, norm3) = (
            list[Any](block) for block in (self.conv_blocks0, self.conv_blocks2)
        )
        channels_last = conv2.weight.is_contiguous(memory_format=torch.channels_last)
        if channels_last and z.is_cuda and len(z) > 2 * self.latent_dim:
            x = linear_image(z, self.l1[0], (self._width, *start))  # type: ignore[arg-type]
        else:
            x = self.l1(z).view(-1, self._width, *start)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
        x = batch_norm(x, norm0)
        for (conv, norm, activation), doubled in zip(first, sizes, strict=True):
            x = _cropped(upsample_stage(x, conv, norm, activation.negative_slope), doubled)
        x = _cropped(upsample_stage(x, conv2, norm2, act2.negative_slope, to_image), size)
        x = tanh(x)
        return norm3(with_channel_last(x) if x.is_cuda and x.shape[1] == 1 else x)

    @torch.no_grad()
    def reset(self) -> None:
        """Initialises all parameters anew, in place (see `generator_restart_every`)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
                module.reset_parameters()


def _sizes(height: int, width: int, rounded: bool) -> list[tuple[int, int]]:
    """Height and width of what the linear layer makes, and of what each stage makes of that. Unless
    halves may be `rounded`, an odd number is not halved."""
    sizes = [(height, width)]
    while len(sizes) < 3 or (height * width > 64 and (rounded or height % 2 == 0)):
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return sizes[::-1]


def _cropped(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else x[..., : size[0], : size[1]]

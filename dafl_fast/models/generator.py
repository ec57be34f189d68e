"""The published DAFL generator, with its upsample-then-convolve stages done in one go.

Chen et al., "Data-Free Learning of Student Networks", ICCV 2019, and its released code:
Linear -> BN -> [x2 nearest, Conv3x3, BN(eps 0.8), LeakyReLU 0.2] twice -> Conv3x3 -> Tanh -> BN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The released code writes `BatchNorm2d(128, 0.8)`, whose second argument is eps, not momentum.
# It was an accident, but the published results were obtained with it, so it is kept and named.
PUBLISHED_BN_EPS = 0.8


def upsample_stage(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    """Nearest x2 upsampling, `conv` (3x3, padding 1), `norm`, LeakyReLU(0.2), without waste.

    The same values as those four layers one after the other. What is spared:

    * the upsampled image: each output pixel of "upsample, then 3x3" sees only 2x2 distinct input
      pixels, so the pair equals one stride-2 transposed convolution whose 4x4 kernel holds sums of
      the 3x3's taps: 4 multiply-adds per output and channel pair instead of 9;
    * the convolution's bias while training: BatchNorm subtracts it again, so its gradient is zero
      and all that it does is shift the running mean.

    x is [N, in_channels, H, W]; the result [N, out_channels, 2H, 2W].
    """
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    # Along one axis: kernel4[j] = w[2 - j] + w[3 - j], taking taps outside 0..2 as zero.
    w = F.pad(conv.weight, (1, 1, 1, 1))
    w = w[..., 1:, :] + w[..., :-1, :]
    w = w[..., 1:] + w[..., :-1]
    kernel = w.flip(2, 3).transpose(0, 1).contiguous()
    bias, mean, momentum = conv.bias, norm.running_mean, norm.momentum
    assert bias is not None and mean is not None and momentum is not None
    if norm.training:
        # Added before BatchNorm decays the running mean by (1 - m), so that m * bias remains.
        with torch.no_grad():
            mean.add_(bias, alpha=momentum / (1 - momentum))
        bias = None
    return F.leaky_relu(
        norm(F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)), 0.2, inplace=True
    )


class Generator(nn.Module):
    """Maps noise z [N, latent_dim] to images [N, channels, image_size, image_size].

    The last BatchNorm has no affine part, so every channel of a training batch leaves with zero
    mean and unit variance: images are in the units of *normalised* data, whatever the teacher's
    data were.

    Args:
        latent_dim: length of z.
        image_size: height and width, a multiple of 4.
        channels: image channels, 1 to 4.
        width: channels of the first two stages (published: 128); the last stage has half.
        bn_eps: eps of the two inner BatchNorms; see `PUBLISHED_BN_EPS`.

    Raises:
        ValueError: a size that the architecture cannot take.
    """

    def __init__(
        self,
        latent_dim: int = 100,
        image_size: int = 32,
        channels: int = 1,
        width: int = 128,
        bn_eps: float = PUBLISHED_BN_EPS,
    ) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {image_size}")
        if width < 2 or width % 2:
            raise ValueError(f"width must be an even number of channels, got {width}")
        if latent_dim < 1 or channels < 1:
            raise ValueError(
                f"latent_dim and channels must be at least 1, got {latent_dim} and {channels}"
            )
        self.latent_dim = latent_dim
        self.image_shape = (channels, image_size, image_size)
        self._width, self._start = width, image_size // 4
        # Layers, numbering and names are those of the published code, so its checkpoints load.
        self.l1 = nn.Sequential(nn.Linear(latent_dim, width * self._start**2))
        self.conv_blocks0 = nn.Sequential(nn.BatchNorm2d(width))
        self.conv_blocks1 = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width, eps=bn_eps),
            nn.LeakyReLU(0.2),
        )
        self.conv_blocks2 = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2, eps=bn_eps),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        x = self.l1(z).view(-1, self._width, self._start, self._start)
        conv1, norm1, _ = self.conv_blocks1
        conv2, norm2, _, *to_image = self.conv_blocks2
        assert isinstance(conv1.weight, Tensor)
        if conv1.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        x = upsample_stage(self.conv_blocks0(x), conv1, norm1)
        x = upsample_stage(x, conv2, norm2)
        for layer in to_image:
            x = layer(x)
        return x

    @torch.no_grad()
    def reset(self) -> None:
        """Draws fresh parameters in place, as if newly built (see `generator_restart_every`)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
                module.reset_parameters()

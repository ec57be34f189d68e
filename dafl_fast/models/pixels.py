"""What stands between generated images, of mean 0 and variance 1, and networks of other pixels."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

Values = tuple[float, ...]


class Affine(nn.Module):
    """Images [N, C, H, W] -> images * factor + summand, per channel, in their dtype.

    Images of one channel become as many as there are factors. The numbers are not part of the state
    dict: they follow from the settings.
    """

    factor: Tensor
    summand: Tensor

    def __init__(self, factor: Values, summand: Values) -> None:
        super().__init__()
        for name, values in (("factor", factor), ("summand", summand)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # In fp32 also for bf16, which has too few digits for a sum whose terms nearly cancel.
        return torch.addcmul(self.summand, images, self.factor).to(images.dtype)


class GeneratorOf(nn.Sequential):
    """A generator whose images are brought to what the teacher takes."""

    def __init__(self, generator: nn.Module, factor: Values, summand: Values) -> None:
        super().__init__(OrderedDict(generator=generator, pixels=Affine(factor, summand)))

    def reset(self) -> None:
        """Initialises the generator anew, if it can."""
        self[0].reset()  # type: ignore[operator]


class Taking(nn.Sequential):
    """A network that takes images * factor + summand and answers as `network` does to images."""

    def __init__(self, network: nn.Module, factor: Values, summand: Values) -> None:
        inverse = tuple(1 / value for value in factor)
        shift = tuple(-b / a for a, b in zip(factor, summand, strict=True))
        super().__init__(OrderedDict(pixels=Affine(inverse, shift), network=network))

"""Cuts images of the teacher's size out of the user's images, on the device, in static shapes."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Normaliser
from ..unlabelled import Given

# How crops differ: pixels of the photograph for one of the crop at least; the ratio of width to
# height; the angles by which they are turned and sheared; factors of contrast and of each colour;
# and the brightness that is added, of 255.
FINEST, ASPECT, TURN, SHEAR = 0.5, 4 / 3, math.radians(30), math.tan(math.radians(20))
CONTRAST, TINT, BRIGHTNESS = 1.5, 1.2, 40.0
# How images of the teacher's size differ more: their scale, and by how much of their height and
# width they are moved. They differ by a share of all this, from nothing to everything.
ZOOM, MOVE = 1.5, 0.25
# The random numbers that one crop takes, and one more for each channel.
_NUMBERS = 12


class Cutter:
    """Cuts images of the teacher's size out of photographs of any sizes, on the device.

    A crop is turned, sheared, mirrored and recoloured, and always inside its photograph. Its size
    is drawn from half of the teacher's image up to the whole photograph, each doubling being
    equally likely. It is read from a copy of the photograph of about the scale of the crop, so that
    nothing is lost between its pixels. Photographs, images that were given whole, and sketches are
    equal shares of what is cut, if there are some. Those that are no photographs are turned,
    sheared, scaled, moved and recoloured by a share of that, which is drawn for each between 0 and
    1, and not mirrored here. What is outside of them is as their edge. If `half_turns` [] is true,
    half of them, drawn at random, are turned by 180° besides.

    All pixels are in one buffer, uint8, so photographs of different sizes can be cut at once and
    shapes are static. They take 4/3 of the memory of the photographs.
    """

    def __init__(
        self, given: Given, image_shape: tuple[int, int, int], device: torch.device
    ) -> None:
        assert given.form is not None
        self.half_turns = torch.zeros((), dtype=torch.bool, device=device)
        self.shape, self.size = image_shape, image_shape[1:]
        self._own = torch.tensor(self.size[::-1], device=device, dtype=torch.float32)
        self._photographs = len(given.photographs)
        sizes = (self._photographs, given.own, given.sketches)
        kinds = [(end - size, size) for end, size in zip(accumulate(sizes), sizes) if size]
        self._kinds = torch.tensor(kinds, device=device)  # the first of each, and how many
        items = [_pyramid(image, min(self.size)) for image in given.photographs]
        items += [[image] for image in given.whole]
        depth = max(map(len, items))
        # Of every level of every image: where it begins in the buffer, its height and width. Those
        # that are missing are the last one again.
        table, place = [], 0
        for levels in items:
            rows = []
            for level in levels:
                rows.append((place, *level.shape[1:]))
                place += level[0].numel()
            table.append(rows + rows[-1:] * (depth - len(rows)))
        self._levels = torch.tensor(table, device=device)
        flat = [level.flatten(1).T for levels in items for level in levels]
        self._pixels = torch.cat(flat).contiguous().to(device)
        self._normaliser = Normaliser(given.form).to(device)

    @torch.no_grad()
    def cut(
        self, count: int, generator: torch.Generator | None = None, rows: slice | None = None
    ) -> Tensor:
        """Crops [count, C, H, W] fp32 in the units of the teacher's images.

        Args:
            generator: source of randomness, on the photographs' device.
            rows: return only these crops; other processes cut the others.
        """
        shape = (count, _NUMBERS + self._pixels.shape[1])
        random = torch.rand(shape, device=self._pixels.device, generator=generator)
        random = random[rows or slice(count)]
        which = self._item(random[:, 0])
        matrix, centre = self._frame(which, random)
        crops = self._sampled(which, matrix, centre)
        crops = _recoloured(crops, self._share(which, random) * (2 * random[:, 9:] - 1))
        images: Tensor = self._normaliser(crops.permute(0, 3, 1, 2))
        return images.contiguous(memory_format=torch.channels_last)

    def _item(self, random: Tensor) -> Tensor:
        """Which image each number in [0, 1) chooses."""
        place = random * len(self._kinds)
        kind = place.long().clamp(max=len(self._kinds) - 1)
        first, count = self._kinds[kind].unbind(1)
        return first + torch.minimum(((place - kind) * count).long(), count - 1)

    def _share(self, which: Tensor, random: Tensor) -> Tensor:
        """Of all by which crops may differ, what each one does [n, 1]."""
        return torch.where(which < self._photographs, 1.0, random[:, 1]).unsqueeze(1)

    def _frame(self, which: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
        """Of each crop the matrix [n, 2, 2] that takes steps (x, y) in it to steps in its image,
        and its centre [n, 2] in the image's pixels. Of photographs all of it is inside."""
        size = self._levels[which, 0, 1:].flip(1).to(random.dtype)  # width and height
        coarsest = (size / self._own).amin(1)
        photograph = which < self._photographs
        centred = self._share(which, random) * (2 * random[:, 2:8] - 1)
        scale = FINEST * (coarsest / FINEST) ** random[:, 1]
        scale = torch.where(photograph, scale, ZOOM ** centred[:, 3])
        aspect = ASPECT ** (centred[:, 0] / 2)
        # The ends of a long image that is turned, or a tall one that is sheared, move far.
        sides = torch.where(photograph.unsqueeze(1), 1.0, self._own / self._own.amax())
        angle, shear = TURN * sides.amin(1) * centred[:, 1], SHEAR * sides[:, 0] * centred[:, 2]
        turned = self.half_turns & ~photograph & (random[:, 8] >= 0.5)
        angle = torch.where(turned, angle + math.pi, angle)
        mirror = torch.where(photograph & (random[:, 5] < 0.5), -1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        x = torch.stack([cos, sin], 1) * (scale * aspect * mirror).unsqueeze(1)
        y = torch.stack([shear * cos - sin, shear * sin + cos], 1) * (scale / aspect).unsqueeze(1)
        matrix = torch.stack([x, y], 2)
        reach = (matrix.abs() * self._own).sum(2) / 2  # half of the crop's bounding box
        fits = torch.where(photograph, (size / (2 * reach)).amin(1).clamp(max=1.0), 1.0)
        matrix, reach = matrix * fits.view(-1, 1, 1), reach * fits.unsqueeze(1)
        # A crop may lie anywhere in its photograph. Other images are moved by a part of their size.
        free = torch.where(photograph.unsqueeze(1), size / 2 - reach, MOVE * size)
        return matrix, size / 2 + centred[:, 4:] * free

    def _sampled(self, which: Tensor, matrix: Tensor, centre: Tensor) -> Tensor:
        """The crops [n, H, W, C] in grey levels of 0..255, interpolated between four pixels."""
        height, width = self.size
        scale = torch.linalg.vector_norm(matrix, dim=1).prod(1).sqrt()
        level = scale.log2().round().clamp(0, self._levels.shape[1] - 1).long()
        start, rows, columns = self._levels[which, level].unbind(1)
        # Smaller copies of an image cover all of it, also if their sizes were rounded.
        shrunk = torch.stack([columns, rows], 1) / self._levels[which, 0, 1:].flip(1)
        x = torch.arange(width, device=which.device) - (width - 1) / 2
        y = torch.arange(height, device=which.device) - (height - 1) / 2
        x, y = (steps.flatten() for steps in torch.meshgrid(x, y, indexing="xy"))
        place = centre.unsqueeze(2) + matrix[:, :, :1] * x + matrix[:, :, 1:] * y
        place = place * shrunk.unsqueeze(2) - 0.5
        last = torch.stack([columns, rows], 1).unsqueeze(2) - 1
        place = torch.minimum(place.clamp(min=0), last)
        low = place.floor()
        (right, down), (x0, y0) = (place - low).unsqueeze(3).unbind(1), low.long().unbind(1)
        (x1, y1) = torch.minimum(low.long() + 1, last).unbind(1)

        def pixels(y: Tensor, x: Tensor) -> Tensor:
            index = start.unsqueeze(1) + y * columns.unsqueeze(1) + x
            found = self._pixels.index_select(0, index.flatten()).float()
            return found.view(*index.shape, -1)

        upper = torch.lerp(pixels(y0, x0), pixels(y0, x1), right)
        lower = torch.lerp(pixels(y1, x0), pixels(y1, x1), right)
        return torch.lerp(upper, lower, down).view(len(which), height, width, -1)


def _pyramid(image: Tensor, side: int) -> list[Tensor]:
    """An image [C, H, W] uint8, and copies of a half, a quarter, ... of its size, as long as crops
    of `side` pixels can be taken from them."""
    levels = [image]
    while min(image.shape[1:]) >= 2 * side:
        halved = F.avg_pool2d(image.float(), 2, ceil_mode=True, count_include_pad=False)
        image = halved.round().to(torch.uint8)
        levels.append(image)
    return levels


def _recoloured(crops: Tensor, centred: Tensor) -> Tensor:
    """Crops [n, H, W, C] of 0..255 with other contrast, brightness, saturation and tint, by numbers
    [n, 3 + C] between -1 and 1."""
    centred = centred.view(len(crops), -1, 1, 1)
    contrast, brightness, saturation = centred[:, :3].unsqueeze(2).unbind(1)
    tint = centred[:, 3:].view(len(crops), 1, 1, -1)
    mean = crops.mean((1, 2, 3), keepdim=True)
    crops = torch.lerp(mean, crops, CONTRAST**contrast) + BRIGHTNESS * brightness
    if crops.shape[3] > 1:
        crops = torch.lerp(crops.mean(3, keepdim=True), crops, 1 + saturation) * TINT**tint
    return crops.clamp(0, 255)

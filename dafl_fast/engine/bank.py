"""The replay bank: generated images and the teacher's logits, kept on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DTYPES = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp32": torch.float32}


def bytes_of_entry(image_shape: tuple[int, int, int], num_classes: int, dtype: str) -> int:
    """The memory that one image and its logits take in a bank."""
    pixels = math.prod(image_shape) * _DTYPES[dtype].itemsize
    return pixels + 4 * num_classes + (8 if dtype == "uint8" else 0)


class ReplayBank:
    """A ring buffer of images [C, H, W] with the teacher's logits [num_classes] for them.

    When the ring is full, `add` overwrites the oldest entries. `draw` returns uniformly chosen
    entries, with replacement. With `held_out` = k it leaves out every k-th entry, so that these
    tell how well a student does on images that it has not learned from. The memory is allocated
    once, positions and counts are on the device, and neither call waits for the device. So both may
    be part of a CUDA graph.

    Memory: ``capacity * (C * H * W * b + 4 * num_classes)`` bytes with b = 1, 2 or 4 for uint8,
    bf16 and fp32, and 8 more bytes per image for uint8.

    Images may be in any units. They are stored as `dtype`: "bf16", with 8 binary digits, "fp32", or
    "uint8", which has 256 levels between the smallest and the largest value of each image. Logits
    are stored in fp32.

    Attributes:
        varied: whether its images were moved at random before they came in, so that `draw` need not
            shift them.
    """

    varied = False

    def __init__(
        self,
        capacity: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        dtype: str = "bf16",
        device: torch.device | str = "cpu",
        held_out: int = 0,
    ) -> None:
        self.capacity, self._held_out = capacity, held_out
        channels, height, width = image_shape
        # Channels innermost (channels_last), the layout in which the networks are fastest.
        shape = (capacity, height, width, channels)
        self._pixels = torch.empty(shape, dtype=_DTYPES[dtype], device=device)
        self.logits = torch.empty((capacity, num_classes), device=device)
        # Per image: its minimum and the size of a grey level (uint8 only).
        self.levels = torch.empty((capacity, 2), device=device) if dtype == "uint8" else None
        # How many images were ever added; the next one goes to count % capacity.
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def images(self) -> Tensor:
        """The ring's images [capacity, C, H, W] as they are stored."""
        return self._pixels.permute(0, 3, 1, 2)

    @property
    def added(self) -> int:
        """How many images were ever added. Waits for the device."""
        return int(self.count)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @property
    def bytes(self) -> int:
        """Memory of the whole ring in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._stored().values())

    def _stored(self) -> dict[str, Tensor]:
        stored = {"images": self._pixels, "logits": self.logits}
        return stored if self.levels is None else {**stored, "levels": self.levels}

    @torch.no_grad()
    def add(self, images: Tensor, logits: Tensor) -> None:
        """Stores a batch: images [N, C, H, W], logits [N, num_classes]."""
        where = (self.count + torch.arange(len(images), device=images.device)) % self.capacity
        if self.levels is not None:
            low = images.amin((1, 2, 3), keepdim=True).float()
            level = (images.amax((1, 2, 3), keepdim=True).float() - low).clamp_min(1e-8) / 255
            self.levels.index_copy_(0, where, torch.cat([low.flatten(1), level.flatten(1)], 1))
            images = ((images.float() - low) / level).round()
        pixels = images.permute(0, 2, 3, 1).to(self._pixels.dtype).contiguous()
        self._pixels.index_copy_(0, where, pixels)
        self.logits.index_copy_(0, where, logits.float())
        self.count += len(images)

    @torch.no_grad()
    def draw(
        self,
        count: int,
        generator: torch.Generator | None = None,
        rows: slice | None = None,
        crop: int = 0,
        flip: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Draws `count` entries: images [count, C, H, W] (fp32 or bf16) and logits, fp32.

        Args:
            generator: source of randomness, on the ring's device.
            rows: return only these of the drawn entries; other processes use the others.
            crop: shift each image by up to this many pixels; what is missing at its edge is
                reflected, as smears would be unlike any image, which BatchNorm notices.
            flip: mirror every other image, left to right.
        """
        device, part = self._pixels.device, rows or slice(count)

        def random(*more: int) -> Tensor:
            shape, high = (count, *more), torch.iinfo(torch.int64).max
            return torch.randint(high, shape, device=device, generator=generator)[part]

        which = self._chosen(random())
        if crop or flip:
            images = self._moved(which, random(3), crop, flip)
        else:
            images = self._pixels.index_select(0, which)
        return self._restored(images, which), self.logits.index_select(0, which)

    def held_out(self, most: int) -> tuple[Tensor, Tensor]:
        """Up to `most` of the entries that `draw` never returns, as it returns them: evenly chosen,
        of all ages. Waits for the device."""
        every = self._held_out or self.capacity + 1
        places = range(every - 1, len(self), every)
        places = places[:: max(1, -(-len(places) // most))]
        which = torch.tensor(places, dtype=torch.int64, device=self._pixels.device)
        images = self._pixels.index_select(0, which)
        return self._restored(images, which), self.logits.index_select(0, which)

    def _restored(self, pixels: Tensor, which: Tensor) -> Tensor:
        """Images [n, C, H, W], fp32 or bf16, from the stored pixels [n, H, W, C] of entries `which`
        [n]."""
        if self.levels is not None:
            low, level = self.levels.index_select(0, which).view(-1, 2, 1, 1, 1).unbind(1)
            pixels = pixels.float() * level + low
        return pixels.permute(0, 3, 1, 2)

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` entries at most, as `draw` returns them. Waits for the device."""
        which = self._slots(self.added - min(count, len(self)), self.added)
        images = self._pixels.index_select(0, which)
        return self._restored(images, which), self.logits.index_select(0, which)

    def _chosen(self, random: Tensor) -> Tensor:
        """The entries [n] that random numbers [n] of 63 bits choose."""
        # The number of entries is on the device, so it cannot be randint's bound. Taking the
        # remainder instead is not exactly uniform, by less than 1e-12.
        filled = self.count.clamp(max=self.capacity)
        if not self._held_out:
            return random % filled
        which = random % (filled - filled // self._held_out)
        return which + which // (self._held_out - 1)  # passes over every k-th

    def _moved(self, which: Tensor, random: Tensor, crop: int, flip: bool) -> Tensor:
        """Entries `which` [n], cropped and flipped by random numbers [n, 3], in a single gather."""
        _, height, width, channels = self._pixels.shape
        dy, dx, mirror = random.unsqueeze(2).unbind(1)
        rows = torch.arange(height, device=which.device) + dy % (2 * crop + 1) - crop
        columns = torch.arange(width, device=which.device).expand(len(which), -1)
        if flip:
            columns = torch.where(mirror % 2 == 0, columns, width - 1 - columns)
        columns = columns + dx % (2 * crop + 1) - crop
        rows, columns = _reflected(rows, height), _reflected(columns, width)
        pixel = (which.view(-1, 1, 1) * height + rows.unsqueeze(2)) * width + columns.unsqueeze(1)
        flat = self._pixels.view(-1, channels).index_select(0, pixel.view(-1))
        return flat.view(len(which), height, width, channels)

    def span(self, start: int, stop: int) -> dict[str, Tensor]:
        """Copies, on the device, of the entries that were added as numbers `start` to `stop` - 1.

        Images are [stop - start, H, W, C].
        """
        where = self._slots(start, stop)
        return {name: tensor[where] for name, tensor in self._stored().items()}

    def restore(self, start: int, entries: dict[str, Tensor]) -> None:
        """Writes back the entries that `span` returned; raises ValueError if their shapes or dtypes
        are others."""
        count = len(entries["images"])
        where = self._slots(start, start + count)
        for name, tensor in self._stored().items():
            shape, got = (count, *tensor.shape[1:]), entries[name]
            if got.shape != shape or got.dtype != tensor.dtype:
                raise ValueError(
                    f"{name} should be {tensor.dtype} {list(shape)}, got {got.dtype} "
                    f"{list(got.shape)}"
                )
            tensor[where] = got.to(tensor.device)

    def _slots(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self._pixels.device) % self.capacity


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places along a side of `size` pixels, those outside reflected at the first and last pixel."""
    places = places.abs()
    return torch.minimum(places, 2 * (size - 1) - places).clamp(min=0)

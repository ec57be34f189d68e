"""The replay bank: generated images and the teacher's logits, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp32": torch.float32}


class ReplayBank:
    """A ring of images [C, H, W] with their teacher logits [num_classes].

    `add` overwrites the oldest entries once the ring is full; `draw` returns uniformly chosen
    entries, with replacement. The storage is allocated once, and neither call waits for the
    device.

    Args:
        capacity: images held.
        image_shape: (C, H, W).
        num_classes: length of a logit vector (stored in fp32).
        dtype: "bf16" or "fp32"; or "uint8", 256 levels between each image's own extremes.
        device: where the ring lives.
    """

    def __init__(
        self,
        capacity: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        dtype: str = "bf16",
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = capacity
        self.images = torch.empty((capacity, *image_shape), dtype=_DTYPES[dtype], device=device)
        self.logits = torch.empty((capacity, num_classes), device=device)
        # Per image: its minimum and the size of a grey level (uint8 only).
        self.levels = torch.empty((capacity, 2), device=device) if dtype == "uint8" else None
        self.added = 0  # images ever added; the next one goes to added % capacity

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @property
    def bytes(self) -> int:
        """Memory of the whole ring in bytes."""
        stored = [self.images, self.logits, *([] if self.levels is None else [self.levels])]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def slots(self, start: int, stop: int) -> Tensor:
        """Ring positions of the images that were added as number `start` to `stop` - 1."""
        return torch.arange(start, stop, device=self.images.device) % self.capacity

    @torch.no_grad()
    def add(self, images: Tensor, logits: Tensor) -> None:
        """Stores a batch: images [N, C, H, W] in normalised units, logits [N, num_classes]."""
        where = self.slots(self.added, self.added + len(images))
        if self.levels is not None:
            low = images.amin((1, 2, 3), keepdim=True).float()
            level = (images.amax((1, 2, 3), keepdim=True).float() - low).clamp_min(1e-8) / 255
            self.levels[where] = torch.cat([low.flatten(1), level.flatten(1)], 1)
            images = ((images.float() - low) / level).round()
        self.images[where] = images.to(self.images.dtype)
        self.logits[where] = logits.float()
        self.added += len(images)

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws `count` entries: images [count, C, H, W] (fp32 or bf16) and logits, fp32."""
        which = torch.randint(len(self), (count,), device=self.images.device, generator=generator)
        images = self.images[which]
        if self.levels is not None:
            low, level = self.levels[which].view(count, 2, 1, 1, 1).unbind(1)
            images = images.float() * level + low
        return images, self.logits[which]

    def span(self, start: int, stop: int) -> dict[str, Tensor]:
        """Copies of the entries that were added as number `start` to `stop` - 1, for saving."""
        where = self.slots(start, stop)
        entries = {"images": self.images[where], "logits": self.logits[where]}
        if self.levels is not None:
            entries["levels"] = self.levels[where]
        return {name: tensor.cpu() for name, tensor in entries.items()}

    def restore(self, start: int, entries: dict[str, Tensor]) -> None:
        """Puts back what `span` gave."""
        where = self.slots(start, start + len(entries["images"]))
        for name, tensor in entries.items():
            getattr(self, name)[where] = tensor.to(self.images.device)

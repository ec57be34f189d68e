"""The replay bank, adding and drawing a batch, against plain indexing and torch.compile of it.

MNIST's sizes draw entries as they are, CIFAR's draw them cropped and flipped; all keep bf16.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.measure import DEVICE, GPU, record, take_turns, timed
from dafl_fast.device import keep_freed_memory
from dafl_fast.engine.bank import ReplayBank
from dafl_fast.recipes import make_config


class PlainBank:
    """The ring as one writes it first: a position on the host, advanced indexing."""

    def __init__(self, capacity, image_shape, num_classes):
        self.images = torch.zeros(capacity, *image_shape, dtype=torch.bfloat16, device=DEVICE)
        self.logits = torch.zeros(capacity, num_classes, device=DEVICE)
        self.position = 0

    @torch.no_grad()
    def add(self, images, logits):
        where = (torch.arange(len(images), device=DEVICE) + self.position) % len(self.images)
        self.images[where] = images.bfloat16()
        self.logits[where] = logits
        self.position = (self.position + len(images)) % len(self.images)

    @torch.no_grad()
    def draw(self, count, crop, flip):
        which = torch.randint(len(self.images), (count,), device=DEVICE)
        images = self.images[which]
        if crop:
            height, width = images.shape[2:]
            dy, dx = torch.randint(2 * crop + 1, (2, count, 1), device=DEVICE)
            rows = (torch.arange(height, device=DEVICE) + dy).unsqueeze(2)
            columns = (torch.arange(width, device=DEVICE) + dx).unsqueeze(1)
            padded = F.pad(images, [crop] * 4, mode="replicate")
            image = torch.arange(count, device=DEVICE).view(-1, 1, 1)
            images = padded[image, :, rows, columns].permute(0, 3, 1, 2)
        if flip:
            mirror = torch.rand(count, 1, 1, 1, device=DEVICE) < 0.5
            images = torch.where(mirror, images.flip(3), images)
        return images, self.logits[which]


@pytest.mark.parametrize("what", ["add", "draw"])
@pytest.mark.parametrize("preset", ["mnist", "cifar10"])
def test_bank(benchmark, capsys, preset, what):
    keep_freed_memory()
    torch._dynamo.reset()
    config = make_config(preset, "fast")
    size, shape = (config.bank_images, config.image_shape, 10), config.image_shape
    bank, plain = ReplayBank(*size, device=DEVICE), PlainBank(*size)
    bank.images.zero_()  # memory that was never written is not there yet
    bank.logits.zero_()
    bank.count.fill_(config.bank_images)
    count = config.batch_size if what == "add" else config.student_batch_size
    pixels = count * shape[0] * shape[1] * shape[2]
    if what == "add":
        batch = torch.randn(count, *shape, device=DEVICE), torch.randn(count, 10, device=DEVICE)
        batch = batch[0].contiguous(memory_format=torch.channels_last), batch[1]
        compiled = torch.compile(plain.add)
        functions = {
            "ours": lambda: bank.add(*batch),
            "eager": lambda: plain.add(*batch),
            "compile": lambda: compiled(*batch),
        }
    else:
        random = torch.Generator(DEVICE).manual_seed(0)
        moved = config.bank_crop, config.bank_flip
        compiled = torch.compile(plain.draw)
        functions = {
            "ours": lambda: bank.draw(count, random, None, *moved),
            "eager": lambda: plain.draw(count, *moved),
            "compile": lambda: compiled(count, *moved),
        }
    for function in functions.values():
        timed(function, 5)()
    calls = 50 if GPU else 10
    seconds = take_turns(benchmark, {n: timed(f, calls) for n, f in functions.items()}, 20)
    # Images come in as fp32 and stay bf16; logits are fp32.
    ideal_bytes = pixels * (4 + 2 if what == "add" else 2 + 2) + 2 * 4 * 10 * count
    title = f"{preset} bank, {what} {count} images"
    record(benchmark, capsys, title, seconds, "us", images=count, ideal_bytes=ideal_bytes)

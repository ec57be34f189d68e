"""`python -m dafl_fast.train_teacher mnist`: a teacher trained on real, labelled images.

Only for making teachers to try the package with; whoever brings a teacher never needs this.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from . import data
from .config import PRESETS
from .engine.checkpoint import save_weights, write_text
from .engine.ema import Average
from .engine.evaluation import accuracy
from .errors import UserError, command
from .models import build


@dataclass(frozen=True)
class TeacherConfig:
    """Train a preset's teacher network on labelled images."""

    preset: tyro.conf.Positional[str] = "mnist"
    """The preset whose teacher is trained."""
    out: Path = Path("teacher.safetensors")
    """Where the weights go; a note with the same name and the ending .json is written beside."""
    exclude: Literal["none", "mnist-5k"] = "none"
    """Leave these images out of training, so that they stay held out."""
    data_dir: Path | None = None
    """Where MNIST lies in torchvision's layout; default: the environment variable DAFL_DATA."""
    download: bool = False
    """Allow torchvision to download MNIST into --data-dir."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 256
    """Images per update."""
    lr: float = 2e-3
    """Peak of the one-cycle learning rate (AdamW)."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    shift: int = 0
    """Training images are moved by up to this many pixels in each direction."""
    noise: float = 1.0
    """Standard deviation of Gaussian noise added to training images, in normalised units. A
    teacher that has seen noise teaches better without data than one that has seen shifts."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""
    ema_decay: float = 0.998
    """Decay of the moving average of the weights that is saved."""
    seed: int = 0
    """Seed of initialisation, order and shifts."""


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Moves each image [N, C, H, W] by a random whole number of pixels, repeating the border."""
    if most == 0:
        return images
    n, c, h, w = images.shape
    padded = F.pad(images, (most,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * most + 1, (2, n, 1), generator=generator)
    rows = (dy + torch.arange(h))[:, None, :, None]
    cols = (dx + torch.arange(w))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(c)[:, None, None], rows, cols]


def fit(network: nn.Module, images: Tensor, labels: Tensor, config: TeacherConfig) -> nn.Module:
    """Trains `network` on normalised images [N, C, H, W]; returns its averaged copy."""
    draw = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    batches = len(images) // config.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.epochs * batches, pct_start=0.2
    )
    average, updates = Average(network, config.ema_decay), 0
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=draw)[: batches * config.batch_size]
        losses = []
        for index in order.split(config.batch_size):
            x = shifted(images[index], config.shift, draw)
            if config.noise:
                x = x + config.noise * torch.randn(x.shape, generator=draw)
            loss = F.cross_entropy(
                network(x), labels[index], label_smoothing=config.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.ramp(updates)
            average.update(network)
            updates += 1
            losses.append(loss.detach())
        print(f"epoch {epoch + 1}/{config.epochs}: loss {torch.stack(losses).mean():.4f}")
    return average.module.eval()


@command
def main() -> int:
    return train(tyro.cli(TeacherConfig, prog="python -m dafl_fast.train_teacher"))


def train(config: TeacherConfig) -> int:
    if config.preset not in PRESETS:
        raise UserError(f"unknown preset {config.preset!r}: choose one of {', '.join(PRESETS)}")
    preset = PRESETS[config.preset]
    images, labels, _ = data.load("mnist", "train", config.data_dir, config.download)
    if config.exclude == "mnist-5k":
        images, labels = data.without(images, labels, data.load("mnist-5k", "test").images)
    torch.manual_seed(config.seed)
    network = build(preset.teacher)
    print(f"{preset.teacher} on {len(images):,} images, {config.epochs} epochs")
    start = time.perf_counter()
    network = fit(network, data.normalise(images, preset), labels, config)
    note = {
        "network": preset.teacher,
        "command": "python -m dafl_fast.train_teacher " + " ".join(sys.argv[1:]),
        "seed": config.seed,
        "torch": torch.__version__,
        "training_images": len(images),
        "train_seconds": round(time.perf_counter() - start, 1),
    }
    test = data.eval_set("mnist", preset, config.data_dir)
    assert test is not None
    note["accuracy_mnist_10000"] = accuracy(network, *test)
    if config.exclude == "mnist-5k":
        held_out = data.eval_set("mnist-5k", preset)
        assert held_out is not None
        note["accuracy_mnist_5k"] = accuracy(network, *held_out)
    save_weights(config.out, network.state_dict())
    write_text(config.out.with_suffix(".json"), json.dumps(note, indent=2) + "\n")
    print(json.dumps(note, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

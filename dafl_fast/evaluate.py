"""`python -m dafl_fast.evaluate MODEL --data mnist`: how good, how fast and how large a network is.

The file tells which network it holds by the names and shapes of its weights.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from . import data
from .engine.checkpoint import load_tensors
from .engine.evaluation import predictions
from .errors import UserError, command
from .models import GREY_SIZES, NETWORKS, build, identify
from .networks import load_weights


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy, agreement with a teacher, latency and size of a trained network."""

    model: tyro.conf.Positional[Path]
    """The network's weights (safetensors), as train and train_teacher write them."""
    data: str = "mnist"
    """Labelled images: mnist-5k, mnist, fashion-mnist, usps, cifar10, cifar100; the path of a
    folder of images or an .npz file; or imagefolder, which is the folder --data-dir."""
    split: Literal["test", "train"] = "test"
    """Which part of the data."""
    data_dir: Path | None = None
    """Where the data lie, in torchvision's layout; default: the environment variable DAFL_DATA."""
    download: bool = False
    """Allow torchvision to download into --data-dir."""
    teacher: Path | None = None
    """A second network for the same images, to compare with: how often do both agree?"""
    normalise: Literal["auto", "mnist", "cifar10", "cifar100"] = "auto"
    """Whose mean and standard deviation the images are normalised with. auto: those in the note
    (.json) beside the model or the teacher, else those of --data."""
    image_size: int | None = None
    """Height and width that images are brought to; the network's, or their own, when not given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    json: bool = False
    """Print JSON instead of a table."""


def open_network(path: Path, role: str) -> tuple[str, int, int, nn.Module]:
    """The network in a safetensors file: name, number of classes, image channels, and itself.

    Raises:
        UserError: the file cannot be read or holds none of the named networks.
    """
    found = identify(load_tensors(path, role))
    if found is None:
        raise UserError(f"the {role} file {path} holds none of the networks {', '.join(NETWORKS)}")
    network = load_weights(build(*found), path, role)
    return *found, network.eval().requires_grad_(False)


def note_of(path: Path | None) -> dict[str, Any]:
    """The note that train_teacher wrote beside the weights in `path`; empty if there is none."""
    try:
        note = json.loads(path.with_suffix(".json").read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) and {"mean", "std"} <= note.keys() else {}


def pick_normalisation(config: EvaluateConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that the images are normalised with."""
    note = note_of(config.model) or note_of(config.teacher)
    if config.normalise == "auto" and note:
        return tuple(note["mean"]), tuple(note["std"])
    source = config.data if config.normalise == "auto" else config.normalise
    known = data.FORMATS.get("mnist" if source == "mnist-5k" else source)
    if known is None:
        raise UserError(
            f"there is no note beside {config.model}, and with which mean and deviation it wants "
            f"{config.data} is not known: choose with --normalise"
        )
    return known.mean, known.std


@torch.inference_mode()
def latency(network: nn.Module, batch: Tensor, seconds: float = 0.5) -> float:
    """Median milliseconds of a forward pass of `batch` [N, C, H, W], over at least `seconds`."""
    times: list[float] = []
    warm_up, end = 3, time.perf_counter() + seconds
    while len(times) < warm_up + 5 or time.perf_counter() < end:
        start = time.perf_counter()
        network(batch)
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:]) * 1e3


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All figures of the model, and of the teacher if there is one, as one dictionary.

    Raises:
        UserError: a file, the data or their combination is not usable.
    """
    from .engine.loop import keep_freed_memory, pick_device

    keep_freed_memory()
    device = pick_device(config.device)
    name, classes, channels, network = open_network(config.model, "model")
    mean, std = pick_normalisation(config)
    if len(mean) != channels:
        raise UserError(
            f"the {name} in {config.model} takes images of {channels} channel(s), the "
            f"normalisation is for {len(mean)}: choose another with --normalise"
        )
    size = GREY_SIZES.get(name) or config.image_size or note_of(config.model).get("image_size")
    images, labels, names = data.load(
        config.data, config.split, config.data_dir, config.download, size, channels
    )
    data.check_channels(images, channels)
    data.check_labels(labels, classes)
    images = images if size is None else data.resized(images, size)
    normaliser = data.Normaliser(data.Format(images.shape[-1], channels, mean, std)).to(device)
    batch = normaliser(images[torch.arange(256) % len(images)].to(device))
    batch = batch.contiguous(memory_format=torch.channels_last)

    def measure(path: Path, name: str, network: nn.Module) -> tuple[dict[str, Any], Tensor]:
        network = network.to(device).to(memory_format=torch.channels_last)
        predicted = predictions(nn.Sequential(normaliser, network), images)
        right = predicted == labels
        counts = labels.bincount(minlength=classes).tolist()
        hits = labels[right].bincount(minlength=classes).tolist()
        figures = {
            "file": str(path),
            "network": name,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "bytes": path.stat().st_size,
            "latency_ms_1": latency(network, batch[:1]),
            "latency_ms_256": latency(network, batch),
            "accuracy": right.double().mean().item(),
            "class_accuracy": {
                names[index]: hits[index] / counts[index]
                for index in range(min(classes, len(names)))
                if counts[index]
            },
        }
        return figures, predicted

    model, predicted = measure(config.model, name, network)
    result = {
        "data": config.data,
        "split": config.split,
        "count": len(labels),
        "image_shape": list(images.shape[1:]),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": model,
    }
    if config.teacher is not None:
        name, *takes, network = open_network(config.teacher, "teacher")
        here = [classes, channels, images.shape[-1]]
        there = [*takes, GREY_SIZES.get(name, images.shape[-1])]
        if there != here:
            raise UserError(
                f"the teacher, {name}, has [classes, image channels, image size] {there}, the "
                f"model {here}: they must be for the same images and classes"
            )
        result["teacher"], chosen = measure(config.teacher, name, network)
        result["agreement"] = (chosen == predicted).double().mean().item()
    return result


def show(result: dict[str, Any]) -> None:
    """Prints the figures as a table, a column a network."""
    from rich.console import Console
    from rich.table import Table

    roles = [role for role in ("model", "teacher") if role in result]
    networks = [result[role] for role in roles]
    console = Console()
    console.print(
        f"{result['count']:,} images of {result['data']} ({result['split']}), "
        f"{'x'.join(map(str, result['image_shape']))}, {result['device']}, "
        f"{result['threads']} threads",
        soft_wrap=True,
        highlight=False,
    )
    table = Table()
    table.add_column()
    for role, network in zip(roles, networks, strict=True):
        table.add_column(f"{role} {network['network']}", justify="right")
    rows = {
        "accuracy": "{accuracy:.2%}",
        "parameters": "{parameters:,}",
        "file": "{bytes:,} bytes",
        "latency, 1 image": "{latency_ms_1:.3f} ms",
        "latency, 256 images": "{latency_ms_256:.2f} ms",
    }
    for title, text in rows.items():
        table.add_row(title, *(text.format_map(network) for network in networks))
    if "agreement" in result:
        table.add_row("agreement", f"{result['agreement']:.2%}")
    table.add_section()
    for name in networks[0]["class_accuracy"]:
        table.add_row(name, *(f"{network['class_accuracy'][name]:.2%}" for network in networks))
    console.print(table)


@command
def main() -> int:
    config = tyro.cli(EvaluateConfig, prog="python -m dafl_fast.evaluate")
    result = evaluate(config)
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

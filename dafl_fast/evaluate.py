"""`python -m dafl_fast.evaluate MODEL --data mnist`: how good, how fast and how large a network is.

The file tells which network it holds by the names and shapes of its weights, or is told; programs
bring their own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from . import data
from .config import Config
from .convention import Convention, normalisation
from .data import ImageSize
from .device import keep_freed_memory, pick_device, pick_threads, threads
from .engine.evaluation import predictions
from .engine.folder import read_config
from .engine.layout import use_channels_last
from .engine.outputs import Reading, as_classifier, reading_of
from .engine.precision import computed_in
from .errors import UserError, command, printable
from .models import GREY_SIZES, NETWORKS
from .networks import open_file
from .networks.opener import Opened
from .networks.trust import Trust
from .settings import THREADS, check


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy, agreement with a teacher, latency and size of a trained network."""

    model: tyro.conf.Positional[Path]
    """A file of weights (safetensors, or a checkpoint), a program (.pt2, TorchScript), or the
    folder of a run, whose student it is."""
    network: str | None = None
    """The network that the weights are for: timm:NAME, torchvision:NAME, package.module:callable;
    those that dafl_fast.models names are known by their weights."""
    data: str = "auto"
    """Labelled images: mnist-5k, mnist, fashion-mnist, usps, cifar10, cifar100; the path of a
    folder of images or an .npz file; or imagefolder, which is the folder --data-dir. auto: those
    that the run of the model was evaluated on, else mnist."""
    split: Literal["test", "train"] = "test"
    """Which part of the data."""
    data_dir: Path | None = None
    """Where the data lie, in torchvision's layout; default: the environment variable DAFL_DATA."""
    download: bool = False
    """Allow torchvision to download into --data-dir."""
    teacher: Path | None = None
    """A second model for the same images, to compare with: how often do both agree?"""
    teacher_network: str | None = None
    """The network that the teacher's weights are for, as --network."""
    trust_run: bool = False
    """Import the code that a run's folder names as its student. Without it, that takes the same
    name as --network, or --teacher-network."""
    trust_teacher: bool = False
    """Load a model or teacher in TorchScript that does more than compute on tensors."""
    normalise: Literal["auto", "mnist", "cifar10", "cifar100", "0..1", "0..255", "-1..1"] = "auto"
    """Whose mean and standard deviation the images are normalised with, or the range of the pixels
    that the network takes instead. auto: what the run of the model or the teacher says, or the note
    (.json) beside it, else those of --data. Of other data give --mean and --std."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, pixels in 0..1, in place of --normalise."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, likewise."""
    teacher_output_name: str | None = None
    """Of the teacher, or without one the model: which of several tensors that it returns is meant,
    as "logits", "1" or "heads/main"."""
    grey: bool = False
    """The images are grey, and given to the network as equal channels."""
    image_size: ImageSize | None = None
    """Height and width that images are brought to, or one number for both; the network's, or their
    own, when not given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    threads: Annotated[Literal["auto"] | int, THREADS] = "auto"
    """Threads of the CPU. auto: one for each core, or as OMP_NUM_THREADS says."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check(self)


def _with_data(config: EvaluateConfig) -> EvaluateConfig:
    """`config` with the name of the images, if it leaves the choice."""
    if config.data != "auto":
        return config
    if os.path.exists(config.model / "config.yaml"):
        run = Config(**read_config(config.model))
        if run.eval != "none":
            return replace(config, data=run.eval, data_dir=config.data_dir or run.data_dir)
    return replace(config, data="mnist")


def _open(path: Path, network: str | None, role: str, config: EvaluateConfig) -> Opened:
    # Weights of our own networks tell which one it is, and for how many classes.
    trust = Trust(config.trust_run, config.trust_teacher)
    return open_file(path, role, None if network in NETWORKS else network, trust=trust)


def pick_normalisation(
    config: EvaluateConfig, networks: list[Opened]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that the images are normalised with; one of each if
    they are the same for all."""
    if config.mean is not None or config.std is not None:
        if config.normalise != "auto":
            raise UserError(f"--normalise {config.normalise} and --mean, --std exclude each other")
        try:
            return normalisation(config.mean, config.std)
        except ValueError as error:
            raise UserError(f"--mean and --std must be given for each channel: {error}") from error
    if config.normalise in data.UNITS:
        low, step = data.UNITS[config.normalise]
        return (low,), (step,)
    known = _format_of(config.normalise)
    if config.normalise == "auto":
        for opened in networks:
            if opened.mean is not None and opened.std is not None:
                return opened.mean, opened.std
        known = _format_of(config.data)
    if known is None:
        raise UserError(
            f"there is no note beside {config.model}, and with which mean and deviation it wants "
            f"{config.data} is not known: choose with --normalise, or give --mean and --std"
        )
    return known.mean, known.std


def _format_of(name: str) -> data.Format | None:
    return data.FORMATS.get("mnist" if name == "mnist-5k" else name)


@torch.no_grad()
def pick_size(
    network: nn.Module,
    channels: int,
    sizes: list[ImageSize],
    classes: int | None = None,
    name: str | None = None,
) -> ImageSize:
    """The first of `sizes` whose images the network takes, found by asking it; raises UserError if
    it takes none of them."""
    for size in sizes:
        try:
            # torch.fx prints what its modules raise.
            with contextlib.redirect_stderr(io.StringIO()):
                _read(network, (channels, *data.sides(size)), "model", classes, name)
            return size
        except UserError as error:
            refused = error
    raise refused


def _read(
    network: nn.Module,
    image_shape: tuple[int, ...],
    role: str,
    classes: int | None,
    name: str | None = None,
) -> Reading:
    """What the network returns for random images; the `name`, or the `classes` of the data, choose
    among several tensors."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(8, *image_shape, generator=draw)
    return reading_of(network, images, role=role, name=name, classes=classes)


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


@torch.no_grad()
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All figures of the model, and of the teacher if there is one, as one dictionary.

    Raises:
        UserError: a file, the data or their combination is not usable.
    """
    keep_freed_memory()
    config = _with_data(config)
    device = pick_device(config.device)
    model = _open(config.model, config.network, "model", config)
    teacher = None
    if config.teacher is not None:
        teacher = _open(config.teacher, config.teacher_network, "teacher", config)
    mean, std = pick_normalisation(config, [model, *([teacher] if teacher else [])])
    grey = config.grey or model.grey
    for_all = len(mean) == 1 and (grey or config.normalise in data.UNITS)
    channels = model.channels or (None if for_all else len(mean))
    if channels not in (None, len(mean)) and not for_all:
        raise UserError(
            f"the {model.name} in {config.model} takes images of {channels} channel(s), the "
            f"normalisation is for {len(mean)}: choose another with --normalise"
        )
    size = GREY_SIZES.get(model.name) or config.image_size or model.image_size
    images, labels, names = data.load(
        config.data, config.split, config.data_dir, config.download, size,
        1 if grey else channels or 3,
    )  # fmt: skip
    if channels is None:  # a program, and nothing says what it takes
        channels = 3 if grey else images.shape[1]
    if for_all:
        mean, std = mean * channels, std * channels
    data.check_channels(images, 1 if grey else channels)
    own = data.size_of(*images.shape[2:])
    network = model.built(len(names), channels, size or own).eval()
    # Its own size, that of its file (of ONNX it may be one of many), or that to which these data
    # are usually brought.
    usual = _format_of(config.data)
    shape = getattr(network, "convention", Convention()).image_shape
    told = [] if shape is None else [data.size_of(*shape[1:])]
    sizes = [size] if size else [own, *told, *([usual.image_size] if usual else [])]
    examples = [torch.zeros(2, channels, *data.sides(size)) for size in sizes]
    network = computed_in(torch.float32, network, "model", *examples)
    name = None if teacher is not None else config.teacher_output_name
    if size is None:
        size = pick_size(network, channels, sizes, len(names), name)
    size = data.size_of(*data.sides(size))
    reading = _read(network, (channels, *data.sides(size)), "model", len(names), name)
    classes = reading.classes
    data.check_labels(labels, classes)
    images = data.resized(images, size)
    normaliser = data.Normaliser(data.Format(size, channels, mean, std)).to(device)
    batch = normaliser(images[torch.arange(256) % len(images)].to(device))
    batch = batch.contiguous(memory_format=torch.channels_last)

    def measure(
        opened: Opened, network: nn.Module, reading: Reading
    ) -> tuple[dict[str, Any], Tensor]:
        assert opened.file is not None
        use_channels_last(network.to(device), batch[:4], opened.role)
        classifier = as_classifier(network, reading)
        predicted = predictions(nn.Sequential(normaliser, classifier), images)
        right = predicted == labels
        counts = labels.bincount(minlength=classes).tolist()
        hits = labels[right].bincount(minlength=classes).tolist()
        figures = {
            "file": str(opened.file),
            "network": opened.name,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "bytes": opened.file.stat().st_size,
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

    figures, predicted = measure(model, network, reading)
    result = {
        "data": config.data,
        "split": config.split,
        "count": len(labels),
        "image_shape": [channels, *images.shape[2:]],
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": figures,
    }
    if teacher is not None:
        here: list[Any] = [classes, channels, size]
        there: list[Any] = [
            teacher.classes or classes,
            teacher.channels or channels,
            GREY_SIZES.get(teacher.name) or teacher.image_size or size,
        ]
        if there == here:
            network = teacher.built(*here).eval()
            network = computed_in(torch.float32, network, "teacher", batch[:2].cpu())
            named = config.teacher_output_name
            reading = _read(network, tuple(batch.shape[1:]), "teacher", classes, named)
            there[0] = reading.classes
        if there != here:
            raise UserError(
                f"the teacher, {teacher.name}, has [classes, image channels, image size] {there}, "
                f"the model {here}: they must be for the same images and classes"
            )
        result["teacher"], chosen = measure(teacher, network, reading)
        result["agreement"] = (chosen == predicted).double().mean().item()
    return result


def show(result: dict[str, Any]) -> None:
    """Prints the figures as a table, a column a network."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def plain(text: str) -> Text:  # names may look like rich's markup
        return Text(printable(text))

    roles = [role for role in ("model", "teacher") if role in result]
    networks = [result[role] for role in roles]
    console = Console()
    shape = "x".join(map(str, result["image_shape"]))
    console.print(
        plain(
            f"{result['count']:,} images of {result['data']} ({result['split']}), {shape}, "
            f"{result['device']}, {result['threads']} threads"
        ),
        soft_wrap=True,
        highlight=False,
    )
    table = Table("")
    for role, network in zip(roles, networks, strict=True):
        table.add_column(plain(f"{role} {network['network']}"), justify="right")
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
        table.add_row(
            plain(name), *(f"{network['class_accuracy'][name]:.2%}" for network in networks)
        )
    console.print(table)


@command
def main() -> None:
    config = tyro.cli(EvaluateConfig, prog="python -m dafl_fast.evaluate")
    with threads(pick_threads(config.threads)):
        result = evaluate(config)
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    sys.exit(main())

"""What is worth a word before training: a run that can be made, but hardly as it is meant."""

from __future__ import annotations

import logging
import platform

import torch
from torch import nn

from .config import Config
from .device import AUTOCAST, computes_in
from .engine.loop import parameters_of
from .engine.step import Step
from .models import GREY_SIZES, NETWORKS, build
from .recipes import PRESETS

log = logging.getLogger(__name__)


def give_notice(config: Config, teacher: nn.Module, step: Step) -> None:
    """Logs a warning, of one sentence each, for a student larger than its teacher, batches smaller
    than the number of classes, and a precision that the device imitates."""
    large = parameters_of(teacher)
    if large:  # a frozen TorchScript does not show its weights
        _of_sizes(config, large, parameters_of(step.student), step.num_classes)
    if config.generator != "none" and config.entropy and config.batch_size < step.num_classes:
        log.warning(
            "a batch of %d images cannot show all of %s classes, which the entropy loss asks for; "
            "give --batch-size at least %d",
            config.batch_size, f"{step.num_classes:,}", step.num_classes,
        )  # fmt: skip
    # Of other processors than Intel's and AMD's, PyTorch does not tell.
    told = step.device.type == "cuda" or platform.machine() in ("x86_64", "AMD64")
    if step.precision in AUTOCAST and told and not computes_in(step.precision, step.device):
        log.warning(
            "this %s has no %s arithmetic and imitates it, which is slower than fp32; use "
            "--precision fp32",
            "GPU" if step.device.type == "cuda" else "processor", step.precision,
        )  # fmt: skip


def _of_sizes(config: Config, large: int, small: int, classes: int) -> None:
    if small <= large:
        return
    who, remedy = "student", "give it a smaller one"
    if config.student is not None:
        who, remedy = f"student {config.student}", "name a smaller one with --student"
        if config.student == PRESETS[config.preset].networks.get("student"):
            who += f" of the preset {config.preset}"
        if (name := smaller_network(large, classes, config.shape)) is not None:
            remedy += f", such as {name}"
    log.warning(
        "the %s is larger than the teacher, %s parameters against %s; %s",
        who, f"{small:,}", f"{large:,}", remedy,
    )  # fmt: skip


def smaller_network(parameters: int, classes: int, image_shape: tuple[int, int, int]) -> str | None:
    """The largest of the package's networks for such images with at most half of `parameters`, or
    else the smallest one if it has fewer; None if there is none."""
    channels, *size = image_shape
    sizes = {}
    for name in NETWORKS:
        only = GREY_SIZES.get(name)
        if only is None or (channels == 1 and size == [only, only]):
            with torch.device("meta"):
                sizes[name] = parameters_of(build(name, classes, channels))
    fitting = [name for name in sizes if sizes[name] <= parameters / 2]
    if fitting:
        return max(fitting, key=sizes.__getitem__)
    name = min(sizes, key=sizes.__getitem__)
    return name if sizes[name] < parameters else None

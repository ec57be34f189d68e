"""Tries networks on a batch before training, and says in one sentence what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import UserError, first_line
from .evaluation import buffers_kept, evaluation_mode

log = logging.getLogger(__name__)


def answer_of(network: Callable[[Tensor], Any], images: Tensor, role: str = "teacher") -> Any:
    """What a classifier returns for images [N, C, H, W]; `role` names it in messages.

    Raises:
        UserError: it does not take such images.
    """
    try:
        return network(images)
    except UserError:
        raise
    except Exception as error:  # a network may raise anything
        raise UserError(
            f"the {role} does not take images of shape {list(images.shape)}: {first_line(error)}"
        ) from error


def logits_of(network: Callable[[Tensor], Tensor], images: Tensor, role: str = "teacher") -> Tensor:
    """A classifier's logits for images [N, C, H, W]; `role` names it in messages.

    Raises:
        UserError: it does not take such images, or returns something else.
    """
    logits = answer_of(network, images, role)
    if not isinstance(logits, Tensor):
        raise UserError(f"the {role} must return logits [N, C] alone, got {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != len(images):
        raise UserError(
            f"the {role} must return logits [N, C], got {list(logits.shape)} for "
            f"{list(images.shape)}"
        )
    return logits


@torch.no_grad()
def check_student(student: nn.Module, images: Tensor, num_classes: int) -> None:
    """Raises UserError unless the student returns logits [N, num_classes] for the images. Called
    before training."""
    with evaluation_mode(student), buffers_kept(student):
        logits = logits_of(student, images, "student")
    if logits.shape[1] != num_classes:
        raise UserError(
            f"the student must return logits {[len(images), num_classes]} for images "
            f"{list(images.shape)}, as many classes as the teacher, got {list(logits.shape)}"
        )
    if bool((logits >= 0).all()) and bool(((logits.float().sum(1) - 1).abs() < 1e-3).all()):
        raise UserError(
            "the student must return logits, its outputs for each image add up to 1 as those of a "
            "softmax do; leave that out, an export can end in it"
        )


@torch.no_grad()
def check_answers(teacher: nn.Module, images: Tensor) -> None:
    """Looks whether a teacher in evaluation mode gives each image [N, C, H, W] one answer.

    An answer that depends on the other images of the batch only causes a warning: BatchNorm
    without running statistics is meant to.

    Raises:
        UserError: it answers differently when it is asked again.
    """
    answers = teacher(images)
    size = float(answers.abs().max())
    rounding = 16 * torch.finfo(answers.dtype).eps  # of a deep network
    if _apart(answers, teacher(images)) > size * max(1e-3, rounding):
        # A program may have been optimised between its first calls, and round otherwise since.
        apart = _apart(teacher(images), teacher(images))
        if apart > size * max(1e-3, rounding):
            raise UserError(
                "the teacher answers differently when it is asked twice about the same images "
                f"(logits differ by up to {apart:.2g}): something random runs in evaluation too, "
                "such as F.dropout(x, 0.5), which needs training=self.training"
            )
    try:
        apart = _apart(teacher(images[:2]), answers[:2])
    except Exception:  # whatever a network says that takes no other number of images
        return
    if apart > size * max(1e-2, rounding):
        log.warning(
            "the teacher's answer for an image depends on the other images of the batch (logits "
            "differ by up to %.2g), as with BatchNorm that has no running statistics; among real "
            "images it may answer otherwise than among generated ones",
            apart,
        )


def _apart(one: Tensor, two: Tensor) -> float:
    """The largest difference."""
    return float((one - two).abs().max())


@torch.no_grad()
def run_lazy_layers(network: nn.Module, example: Tensor, role: str) -> None:
    """Runs a network that has lazy layers once, so that they get their parameters.

    Raises:
        UserError: the network does not run on `example`, a batch of its inputs.
    """
    if any(map(is_lazy, (*network.parameters(), *network.buffers()))):
        try:
            with evaluation_mode(network):
                network(example)
        except Exception as error:  # a network may raise anything
            raise UserError(
                f"the {role} has lazy layers, which get their parameters from a first batch, and "
                f"does not run on one of shape {list(example.shape)}: {first_line(error)}"
            ) from error


@torch.no_grad()
def check_generator(generator: nn.Module, noise: Tensor, image_shape: tuple[int, ...]) -> None:
    """Raises UserError unless the generator makes images of `image_shape` from `noise`."""
    with evaluation_mode(generator):
        images = generator(noise)
    if tuple(images.shape) != (len(noise), *image_shape):
        raise UserError(
            f"the generator must make images {[len(noise), *image_shape]} of noise "
            f"{list(noise.shape)}, got {list(images.shape)}"
        )

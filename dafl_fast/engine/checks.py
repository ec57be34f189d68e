"""Tries networks on a batch before training, and says in one sentence what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import UserError, first_line
from .evaluation import buffers_kept, evaluation_mode

log = logging.getLogger(__name__)


def logits_of(network: Callable[[Tensor], Tensor], images: Tensor, role: str = "teacher") -> Tensor:
    """A classifier's logits for images [N, C, H, W]; `role` names it in messages.

    Raises:
        UserError: it does not take such images, or returns something else.
    """
    shape = list(images.shape)
    try:
        logits = network(images)
    except UserError:
        raise
    except Exception as error:  # a network may raise anything
        raise UserError(
            f"the {role} does not take images of shape {shape}: {first_line(error)}"
        ) from error
    if not isinstance(logits, Tensor):
        raise UserError(f"the {role} must return logits [N, C] alone, got {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != len(images):
        raise UserError(
            f"the {role} must return logits [N, C], got {list(logits.shape)} for {shape}"
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


def refuse_probabilities(outputs: Tensor) -> None:
    rows = outputs.float()
    # Rounding changes the sum of C probabilities by at most half an epsilon of their dtype.
    tolerance = max(1e-3, 4 * torch.finfo(outputs.dtype).eps)
    positive = bool((rows >= 0).all())
    kind = None
    if positive and bool(((rows.sum(1) - 1).abs() < tolerance).all()):
        kind = "softmax"
    elif bool((rows.logsumexp(1).abs() < tolerance).all()):
        kind = "log-softmax"
    if kind is not None:
        raise UserError(
            f"the teacher ends in {kind}; the losses need logits: give the network "
            f"without its last {kind} layer"
        )
    if positive and bool((rows <= 1).all()):
        log.warning(
            "the teacher's outputs all lie between 0 and 1, as those of a sigmoid; the losses need "
            "logits"
        )

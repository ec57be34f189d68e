"""The two networks that the settings of a run name."""

from __future__ import annotations

import torch
from torch import nn

from ..config import PRESETS, Config
from ..engine.checks import logits_of
from ..errors import UserError
from .names import knows_nothing
from .opener import bundled_weights, load_network, open_network


def load_networks(config: Config) -> tuple[nn.Module, nn.Module]:
    """The teacher with its weights and the student that `config` names.

    Raises:
        UserError: one is not named, not to be had, or does not fit its weights.
    """
    for role in ("teacher", "student"):
        if getattr(config, role) is None:
            raise UserError(
                f"--{role} must name a network for the preset {config.preset}: see docs/networks.md"
            )
    assert config.teacher is not None and config.student is not None
    usual = PRESETS[config.preset].networks.get("teacher")
    name, weights = config.teacher, config.teacher_weights
    if weights is None and name == usual:
        weights = bundled_weights(config.preset)
        if weights is None:
            raise UserError(
                f"the preset {config.preset} has no bundled teacher: train one with `python -m "
                f"dafl_fast.train_teacher {config.preset}` and name its file with --teacher"
            )
    if weights is None and knows_nothing(name):
        raise UserError(f"--teacher-weights is needed: without weights {name} knows nothing")
    channels, size, _ = config.image_shape
    opened = open_network(name, weights, role="teacher", weights_for=usual)
    teacher = opened.built(config.num_classes, channels, size)
    classes = outputs_of(teacher, config.image_shape)
    torch.manual_seed(config.seed)
    student = load_network(
        config.student, config.student_weights, role="student", num_classes=classes,
        channels=channels, image_size=size,
    )  # fmt: skip
    return teacher, student


@torch.no_grad()
def outputs_of(teacher: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """The teacher's number of classes, found by asking it."""
    return logits_of(teacher.eval(), torch.randn(2, *image_shape)).shape[1]

"""The networks of a run: those that its settings name, and the student that it has left."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..engine.checks import logits_of
from ..engine.folder import read_config, read_summary
from ..errors import UserError
from ..models import NETWORKS
from ..recipes import PRESETS
from .names import load_network


def load_networks(config: Config) -> tuple[nn.Module, nn.Module]:
    """The teacher with its weights and the student that `config` names.

    Raises:
        UserError: one is not named, not to be had, or does not fit its weights.
    """
    preset = PRESETS[config.preset]
    for role in ("teacher", "student"):
        if getattr(config, role) is None:
            raise UserError(
                f"--{role} must name a network for the preset {config.preset}: see docs/networks.md"
            )
    assert config.teacher is not None and config.student is not None
    channels, size, _ = config.image_shape
    name, weights = config.teacher, config.teacher_weights
    if _is_usual_teacher(config):
        if name.endswith(".safetensors"):
            name, weights = preset.networks["teacher"], Path(name)
        elif weights is None and preset.bundled_teacher is not None:
            weights = Path(str(files("dafl_fast") / "assets" / preset.bundled_teacher))
        elif weights is None:
            raise UserError(
                f"the preset {config.preset} has no bundled teacher: train one with `python -m "
                f"dafl_fast.train_teacher {config.preset}` and name its file with --teacher"
            )
    elif weights is None and (name in NETWORKS or name.startswith(("timm:", "torchvision:"))):
        raise UserError(f"--teacher-weights is needed: without weights {name} knows nothing")
    form: dict[str, Any] = {"channels": channels, "image_size": size}
    teacher = load_network(name, weights, role="teacher", num_classes=config.num_classes, **form)
    classes = outputs_of(teacher, config.image_shape)
    torch.manual_seed(config.seed)
    student = load_network(
        config.student, config.student_weights, role="student", num_classes=classes, **form
    )
    return teacher, student


def load_student(path: Path) -> tuple[nn.Module, Config]:
    """The student that the run in `path` has left, in evaluation mode, and the run's settings.

    Raises:
        UserError: there is no run, it has left no student yet, or no name says which network the
            student is.
    """
    config = Config(**read_config(path))
    weights = path / "student.safetensors"
    if config.student is None:
        raise UserError(
            f"the student of {path} has no name, since it was given to distill() as a module: "
            "export it from Python with dafl_fast.export.export_student(result, FILE)"
        )
    if not weights.is_file():
        raise UserError(
            f"the run in {path} has left no student yet; go on with it: "
            f"python -m dafl_fast.train --resume {path}"
        )
    channels, size, _ = config.image_shape
    student = load_network(
        config.student,
        weights,
        role="student",
        num_classes=read_summary(path).get("num_classes", config.num_classes),
        channels=channels,
        image_size=size,
    )
    return student.eval(), config


@torch.no_grad()
def outputs_of(teacher: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """The teacher's number of classes, found by asking it."""
    return logits_of(teacher.eval(), torch.randn(2, *image_shape)).shape[1]


def _is_usual_teacher(config: Config) -> bool:
    """Whether the teacher is the preset's network, with whatever weights."""
    usual, name = PRESETS[config.preset].networks.get("teacher"), str(config.teacher)
    return usual is not None and (name == usual or name.endswith(".safetensors"))

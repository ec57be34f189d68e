"""How does a student take its teacher's place?

A student takes images [N, C, H, W] in floating point and returns logits [N, C]. A drop-in takes and
returns what its teacher did.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .convention import Convention, as_answers


def drop_in(student: nn.Module, convention: Convention) -> nn.Module:
    """A network that takes images, and answers, as `convention` says; `student` itself if it does
    so already."""
    names, usual = ("layout", "dtype", "outputs", "answer_shape"), Convention()
    differs = any(getattr(convention, name) != getattr(usual, name) for name in names)
    return _DropIn(student, convention) if differs else student


class _DropIn(nn.Module):
    """A student that takes images, and answers, as the convention says."""

    def __init__(self, student: nn.Module, convention: Convention) -> None:
        super().__init__()
        self.student, self.convention = student, convention
        self.dtype = next((p.dtype for p in student.parameters()), torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        if self.convention.layout == "NHWC":
            images = images.permute(0, 3, 1, 2)
        logits = self.student(images.to(self.dtype))
        return as_answers(logits, self.convention.outputs, self.convention.answer_shape)


def given(images: Tensor, convention: Convention) -> Tensor:
    """Images [N, C, H, W] in fp32 as the convention has them."""
    dtype = getattr(torch, convention.dtype)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        images = images.round().clamp(limits.min, limits.max)
    images = images.to(dtype)
    return images.permute(0, 2, 3, 1).contiguous() if convention.layout == "NHWC" else images


def answer_shape(convention: Convention, num_classes: int) -> tuple[int, ...]:
    """Of the answer for one image."""
    if convention.answer_shape is not None:
        return convention.answer_shape
    return (1 if convention.outputs.startswith("binary") else num_classes,)


def chosen(answers: Tensor, convention: Convention) -> Tensor:
    """The class [N] that each answer means."""
    if convention.outputs.startswith("binary"):
        return answers.flatten() > (0.5 if convention.outputs == "binary-probability" else 0)
    return answers.flatten(1).argmax(1)

"""How often does a student agree with its teacher on real images, told without any?

The figure is the agreement on generated images that the student has never learned from, counting
those of which the teacher is sure. Those of which it is not sure lie between classes, and real
images seldom do. docs/results.md tells how well it foretold the agreement on real images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .evaluation import predictions

# An image counts if the teacher's largest probability is at least this.
SURE = 0.9
FEWEST = 100  # images that must count


class Estimate(NamedTuple):
    """The student's agreement with its teacher.

    Attributes:
        held_out: on all images that were held out.
        sure: on those of which the teacher is sure; None if these are too few.
        images: how many of these there are.
    """

    held_out: float
    sure: float | None
    images: int

    def as_row(self) -> dict[str, Any]:
        """Its place in metrics.jsonl and summary.json."""
        return {"agreement_held_out": self.held_out, "estimated_agreement": self.sure}


@torch.no_grad()
def estimate(student: nn.Module, images: Tensor, logits: Tensor) -> Estimate | None:
    """The estimate from images [N, C, H, W] that were held out and the teacher's logits [N, C] for
    them; None without any. Waits for the device."""
    if not len(images):
        return None
    right = predictions(student, images) == logits.argmax(1)
    sure = logits.softmax(1).amax(1) >= SURE
    count = int(sure.sum())
    agreed = int((right & sure).sum()) / count if count >= FEWEST else None
    return Estimate(float(right.float().mean()), agreed, count)

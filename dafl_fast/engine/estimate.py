"""How often does a student agree with its teacher on real images, told without any?

The figure is the agreement on images that the student has never learned from: each is one half of a
generated image that was held out, beside the other half of another. Of these the ones count of
which the teacher is sure. Those of which it is not sure lie between classes, and real images seldom
do. docs/results.md tells how well the figure foretold the agreement on real images.
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
        held_out: on the images that were held out, as they are.
        sure: on images put together of them, of which the teacher is sure; None if these are too
            few.
        images: how many of these there are.
    """

    held_out: float
    sure: float | None
    images: int

    def as_row(self) -> dict[str, Any]:
        """Its place in metrics.jsonl and summary.json."""
        return {"agreement_held_out": self.held_out, "estimated_agreement": self.sure}


@torch.no_grad()
def estimate(
    student: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor
) -> Estimate | None:
    """The estimate from images that were held out; None without any. Waits for the device.

    Args:
        student, teacher: images -> logits [N, C]; the teacher is in evaluation mode.
        images: [N, C, H, W].
        logits: the teacher's for them.
    """
    if not len(images):
        return None
    held_out = predictions(student, images) == logits.argmax(1)
    mixed = images.roll(1, 0)
    half = images.shape[3] // 2
    mixed[..., half:] = images[..., half:]
    answers = torch.cat([teacher(some) for some in mixed.split(500)]).float()
    sure = answers.softmax(1).amax(1) >= SURE
    right = (predictions(student, mixed) == answers.argmax(1))[sure]
    agreed = float(right.float().mean()) if len(right) >= FEWEST else None
    return Estimate(float(held_out.float().mean()), agreed, len(right))

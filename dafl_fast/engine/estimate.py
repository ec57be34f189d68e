"""How often does a student agree with its teacher on real images, told without any?

Two figures are measured on generated images that the student has never learned from: its agreement
where the teacher is sure, and its agreement, averaged over the classes, when noise is added. The
agreement on real images was measured 47 times, in 35 runs with ten teachers, and its logit fitted
to the logits of the two. docs/results.md has the table.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .evaluation import predictions

# Of so many classes or fewer the images of one differ only if they are made to (`diversity_loss`).
FEW_CLASSES = 4
SURE = 0.9  # the teacher's largest probability, at least
FEWEST = 100  # images of which the teacher is sure
NOISE = 0.5  # of the images' standard deviation
# logit(agreement) = 0.26 logit(where sure) + 1.03 logit(with noise) + 0.90. The teachers that had
# no part in the fit were within 0.85 of it in nine cases of ten.
WEIGHTS, CONSTANT, WITHIN = (0.26, 1.03), 0.90, 0.85
LEAST, MOST = 0.01, 0.995  # a share counts as no less and no more


class Estimate(NamedTuple):
    """The student's agreement with its teacher.

    Attributes:
        held_out: on the generated images that were held out.
        images: how many of these there are.
        real: on real images, as estimated; None from too few images, or if most classes have none.
        between: two values between which it lies nine times of ten, likewise.
    """

    held_out: float
    images: int
    real: float | None = None
    between: tuple[float, float] | None = None

    @property
    def enough(self) -> bool:
        """Whether `held_out` is worth being compared with that of another moment."""
        return self.images >= FEWEST

    def as_row(self) -> dict[str, Any]:
        """Its place in metrics.jsonl and summary.json."""
        return {
            "agreement_held_out": self.held_out,
            "estimated_agreement": self.real,
            "estimated_between": self.between and list(self.between),
        }


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
    right = predictions(student, images) == logits.argmax(1)
    sure = logits.softmax(1).amax(1) >= SURE
    held_out = float(right.float().mean())
    present = int((logits.argmax(1).bincount(minlength=logits.shape[1]) > 0).sum())
    if int(sure.sum()) < FEWEST or present < max(2, logits.shape[1] / 2):
        return Estimate(held_out, len(images))
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=draw, dtype=torch.float32).to(images)
    noisy = images + NOISE * images.std((0, 2, 3), keepdim=True) * noise
    classes = torch.cat([teacher(some).argmax(1) for some in noisy.split(500)])
    same = (predictions(student, noisy) == classes).double()
    counts = classes.bincount()
    balanced = (torch.zeros(len(counts)).to(same).index_add_(0, classes, same) / counts)[counts > 0]
    found = (float(right[sure].float().mean()), float(balanced.mean()))
    logit = CONSTANT + sum(w * _logit(share) for w, share in zip(WEIGHTS, found, strict=True))
    low, real, high = (1 / (1 + math.exp(-x)) for x in (logit - WITHIN, logit, logit + WITHIN))
    return Estimate(held_out, len(images), real, (low, high))


def _logit(share: float) -> float:
    share = min(max(share, LEAST), MOST)
    return math.log(share / (1 - share))

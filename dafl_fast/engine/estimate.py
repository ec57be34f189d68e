"""How often does a student agree with its teacher on real images, told without any?

Two figures are measured on images that the student has never learned from: its agreement, averaged
over the classes, and its agreement on mixtures of two images. The agreement on real images was
measured 59 times, in 26 runs with seven pairs of teacher and images, and fitted to the two.
docs/results.md has the table.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .evaluation import predictions

# Of so many classes or fewer the images of one differ only if they are made to (`diversity_loss`).
FEW_CLASSES = 4
FEWEST = 100  # images
# logit(agreement) = 1.30 logit(averaged over classes) + 0.95 logit(on mixtures) + 1.08, each share
# as far as it is above chance. The pairs that had no part in the fit were within 0.68 of it in nine
# cases of ten.
WEIGHTS, CONSTANT, WITHIN = (1.30, 0.95), 1.08, 0.68
LEAST, MOST = 0.01, 0.995  # a share above chance counts as no less and no more


class Estimate(NamedTuple):
    """The student's agreement with its teacher.

    Attributes:
        held_out: on the images that were held out.
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
    student: nn.Module,
    teacher: nn.Module,
    held_out: tuple[Tensor, Tensor],
    generated: tuple[Tensor, Tensor] | None = None,
) -> Estimate | None:
    """The estimate from images that were held out; None without any. Waits for the device.

    Args:
        student, teacher: images -> logits [N, C]; the teacher is in evaluation mode.
        held_out: images [N, C, H, W] and the teacher's logits for them.
        generated: those of them that a generator has made, if there is one. They alone tell of real
            images then: crops of drawn pictures fall into a few classes, which a student soon
            knows.
    """
    images, logits = held_out
    if not len(images):
        return None
    share = float((predictions(student, images) == logits.argmax(1)).float().mean())
    told = Estimate(share, len(images))
    images, logits = held_out if generated is None else generated
    classes = logits.argmax(1)
    counts = classes.bincount(minlength=logits.shape[1])
    present = counts > 0
    if len(images) < FEWEST or int(present.sum()) < max(2, len(counts) / 2):
        return told
    right = (predictions(student, images) == classes).double()
    balanced = (torch.zeros(len(counts)).to(right).index_add_(0, classes, right) / counts)[present]
    mixtures = (images + images.roll(1, 0)) / 2
    same = torch.cat([
        predictions(student, some) == teacher(some).argmax(1) for some in mixtures.split(500)
    ])  # fmt: skip
    chance = 1 / len(counts)
    found = (float(balanced.mean()), float(same.double().mean()))
    logit = CONSTANT + sum(
        weight * _logit((share - chance) / (1 - chance))
        for weight, share in zip(WEIGHTS, found, strict=True)
    )
    low, real, high = (
        chance + (1 - chance) / (1 + math.exp(-x)) for x in (logit - WITHIN, logit, logit + WITHIN)
    )
    return told._replace(real=real, between=(low, high))


def _logit(share: float) -> float:
    share = min(max(share, LEAST), MOST)
    return math.log(share / (1 - share))

"""How often does a student agree with its teacher on real images, told without any?

Two figures are measured on images that the student has never learned from: its agreement, averaged
over the classes, and its agreement on mixtures of two images. The agreement on real images was
measured 59 times, in 29 runs with seven teachers, and fitted to the two. docs/results.md has the
table.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .evaluation import at_once, predictions

# Of so many classes or fewer the images of one differ only if they are made to (`diversity_loss`).
FEW_CLASSES = 4
FEWEST = 100  # images
# logit(agreement) = 1.30 logit(averaged over classes) + 0.95 logit(on mixtures) + 1.08, each share
# as far as it is above chance. Kinds of runs that had no part in the fit were within 0.68 of it in
# nine cases of ten.
WEIGHTS, CONSTANT, WITHIN = (1.30, 0.95), 1.08, 0.68
# A share above chance counts as no less and no more, and nothing is estimated beyond these, as no
# agreement beyond them was measured.
LEAST, MOST = 0.01, 0.995
EVEN = 0.75  # of the entropy of equally many images of each class, at least; or a class tells all
# Where the teacher is sure of generated images, students that learned what holds for real ones
# agreed with it in 0.86 of the cases above chance or more (126 measurements), one that was at
# chance on real images in 0.65 or less (9).
SURE, FEWEST_SURE, LOST = 0.9, 50, 0.75


class Estimate(NamedTuple):
    """The student's agreement with its teacher.

    Attributes:
        held_out: on the images that were held out.
        images: how many of these there are.
        real: on real images, as estimated; None from too few images, if most are of a few classes,
            if images of a class may be all alike (crops without a generator, or generated without
            diversity), or if the student differs from a teacher that is sure.
        between: two values between which it most likely lies, likewise.
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
    *,
    made: bool = True,
) -> Estimate | None:
    """The estimate from images that were held out; None without any. Waits for the device.

    Args:
        student, teacher: images -> logits [N, C]; the teacher is in evaluation mode.
        held_out: images [N, C, H, W] and the teacher's logits for them, in the shares of a batch.
        generated: held-out images of the generator alone, likewise, if there are others as well.
            Then only these tell of real images: crops of pictures fall into a few classes, which a
            student soon knows.
        made: whether there is a generator.
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
    evenness = torch.special.entr(counts.double() / len(images)).sum() / math.log(len(counts))
    if len(images) < FEWEST or not evenness >= EVEN:  # of one class it is not a number
        return told
    right = (predictions(student, images) == classes).double()
    chance = 1 / len(counts)
    sure = right[logits.softmax(1).amax(1) >= SURE]
    if made and len(sure) >= FEWEST_SURE and sure.mean() < chance + LOST * (1 - chance):
        return told
    balanced = (torch.zeros(len(counts)).to(right).index_add_(0, classes, right) / counts)[present]
    # Each image with another one, whatever their order: they may have come class by class.
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pairs = torch.stack([shuffled, shuffled.roll(1)], 1).to(images.device)
    same = []
    for pair in pairs.split(at_once(images)):
        mixtures = (images[pair[:, 0]] + images[pair[:, 1]]) / 2
        same.append(predictions(student, mixtures) == teacher(mixtures).argmax(1))
    found = (float(balanced.mean()), float(torch.cat(same).double().mean()))
    logit = CONSTANT + sum(
        weight * _logit((share - chance) / (1 - chance))
        for weight, share in zip(WEIGHTS, found, strict=True)
    )
    logit = min(max(logit, _logit(LEAST)), _logit(MOST))
    low, real, high = (
        chance + (1 - chance) / (1 + math.exp(-x)) for x in (logit - WITHIN, logit, logit + WITHIN)
    )
    return told._replace(real=real, between=(low, high))


def _logit(share: float) -> float:
    share = min(max(share, LEAST), MOST)
    return math.log(share / (1 - share))

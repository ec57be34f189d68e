"""What is told of a student's agreement with its teacher without real images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dafl_fast import distill
from dafl_fast.engine.estimate import FEWEST, estimate


class Says(nn.Module):
    """Chooses the class that stands in a corner of an image, surely or not."""

    def __init__(self, column: int, least: float = 0.0):
        super().__init__()
        self.column, self.least = column, least

    def forward(self, images):
        classes = images[:, 0, 0, self.column]
        sure = torch.where(classes >= self.least, 9.0, 1.0).unsqueeze(1)
        return sure * nn.functional.one_hot(classes.long(), 3)


def images_of(left, right):
    halves = [torch.tensor(side).float().view(-1, 1, 1, 1).expand(-1, 1, 4, 2)
              for side in (left, right)]  # fmt: skip
    return torch.cat(halves, 3)


def test_it_counts_composed_images_of_which_the_teacher_is_sure():
    """The teacher looks at the left, the student at the right, of which the image before is on the
    left of a composed one."""
    images = images_of([0, 1, 2] * 100, [0, 1, 0] * 100)
    told = estimate(Says(3), Says(0), images, Says(0)(images))
    assert told is not None and told.held_out == pytest.approx(2 / 3)
    # Composed: left 2 0 1 ..., right 0 1 0 ...
    assert told.sure == 0 and told.images == 300
    told = estimate(Says(0), Says(0, least=1.0), images, Says(0)(images))
    assert told is not None and told == (1.0, 1.0, 200)
    assert told.as_row() == {"agreement_held_out": 1.0, "estimated_agreement": 1.0}
    assert torch.equal(images, images_of([0, 1, 2] * 100, [0, 1, 0] * 100))


def test_it_says_nothing_from_too_few_images():
    images = images_of([0] * 40 + [1] * (FEWEST - 1), [0] * (FEWEST + 39))
    told = estimate(Says(0), Says(0, least=1.0), images, Says(0)(images))
    assert told == (1.0, None, FEWEST - 1)
    assert estimate(Says(0), Says(0), images[:0], torch.zeros(0, 3)) is None


def test_a_run_tells_it(tmp_path):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))

    torch.manual_seed(0)
    teacher = network()
    with torch.no_grad():
        teacher[1].weight.mul_(100)  # very sure of everything
    given = dict(image_shape=(3, 4, 4), batch_size=32, student_batch_size=8, student_updates=1,
                 bank_images=400, bank_held_out=2, precision="fp32", steps=20, log_every=4,
                 eval_every=1e-6)  # fmt: skip
    result = distill(teacher, network(), out_dir=tmp_path / "run", **given)
    told = [row["estimated_agreement"] for row in result.history if "agreement_newest" in row]
    assert told[0] is None  # of the first 128 images 64 are held out
    assert all(0 <= one <= 1 for one in told[-2:])
    assert result.summary["estimated_agreement"] == told[-1]
    result = distill(teacher, network(), out_dir=tmp_path / "none", **given | {"bank_held_out": 0})
    assert "estimated_agreement" not in result.summary

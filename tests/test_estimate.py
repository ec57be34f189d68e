"""What is told of a student's agreement with its teacher without real images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dafl_fast import distill
from dafl_fast.engine.estimate import FEWEST, estimate


class Says(nn.Module):
    """Chooses the class that an image's pixels hold, surely from a class on; noise rounds away. Of
    some classes it says the next one."""

    def __init__(self, least: int = 0, wrong: tuple[int, ...] = ()):
        super().__init__()
        self.least, self.wrong = least, wrong

    def forward(self, images):
        classes = (images.mean((1, 2, 3)) / 1000).round().long()
        sure = torch.where(classes >= self.least, 9.0, 1.0).unsqueeze(1)
        wrong = torch.isin(classes, torch.tensor(self.wrong, dtype=torch.int64))
        return sure * nn.functional.one_hot((classes + wrong) % 3, 3)


class Wrapped(Says):
    """Sees noise as the class 2."""

    def forward(self, images):
        noisy = (images.mean((1, 2, 3)) % 1000 != 0).view(-1, 1)
        return torch.where(noisy, torch.tensor([0.0, 0.0, 9.0]), super().forward(images))


def images_of(classes):
    return 1000.0 * torch.tensor(classes).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def odds(share):
    return math.log(share / (1 - share))


def test_it_is_fitted_to_two_figures():
    """1,000 images of class 0 that the teacher is not sure of, 60 of 1 and 140 of 2. The student is
    wrong on class 1. Noise is too weak to change a class."""
    images = images_of([0] * 1000 + [1] * 60 + [2] * 140)
    images = images.clone()
    teacher, student = Says(least=1), Says(wrong=(1,))
    told = estimate(student, teacher, images, teacher(images))
    assert told is not None and told.held_out == pytest.approx(1140 / 1200)
    middle = 0.26 * odds(140 / 200) + 1.03 * odds(2 / 3) + 0.90  # two classes of three, balanced
    low, high = told.between
    assert [odds(x) for x in (low, told.real, high)] == pytest.approx(
        [middle - 0.85, middle, middle + 0.85]
    )
    assert told.as_row() == {
        "agreement_held_out": told.held_out,
        "estimated_agreement": told.real,
        "estimated_between": [low, high],
    }
    assert torch.equal(images, images_of([0] * 1000 + [1] * 60 + [2] * 140))


def test_noise_is_added_in_the_images_own_units():
    images = images_of([0, 1] * 100).clone()
    told = estimate(Says(), Wrapped(), images, Says()(images))
    assert told is not None and told.held_out == 1
    # With noise the teacher says 2, and the student what it said.
    assert odds(told.real) == pytest.approx(0.26 * odds(0.995) + 1.03 * odds(0.01) + 0.90)


def test_nobody_is_all_right_or_all_wrong():
    images = images_of([0, 1, 2] * 50).clone()
    best, worst = (
        estimate(Says(wrong=wrong), Says(), images, Says()(images)) for wrong in ((), (0, 1, 2))
    )
    assert odds(best.real) == pytest.approx((0.26 + 1.03) * odds(0.995) + 0.90)
    assert 0 < worst.real < 0.01 < 0.99 < best.real < 1


def test_it_says_nothing_from_too_few_images():
    images = images_of([0] * 40 + [1] * (FEWEST - 1)).clone()
    told = estimate(Says(), Says(least=1), images, Says(least=1)(images))
    assert told == (1.0, FEWEST + 39, None, None)
    assert estimate(Says(), Says(), images[:0], torch.zeros(0, 3)) is None


def test_it_says_nothing_if_most_classes_have_no_image():
    images = images_of([2] * 300).clone()
    assert estimate(Says(), Says(), images, Says()(images)) == (1.0, 300, None, None)
    two = images_of([2] * 300 + [1]).clone()
    assert estimate(Says(), Says(), two, Says()(two)).real is not None
    # Of two classes one is all that a student needs to say.
    binary = Says()(images)[:, 1:]
    assert estimate(Says(), Says(), images, binary) == (0.0, 300, None, None)


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

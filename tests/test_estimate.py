"""What is told of a student's agreement with its teacher without real images."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from dafl_fast import distill
from dafl_fast.engine.estimate import FEWEST, estimate


class Says(nn.Module):
    """Chooses the class that an image's pixels hold, and what is between two classes for the lower
    one. Of some classes it says the next one."""

    def __init__(self, wrong: tuple[int, ...] = ()):
        super().__init__()
        self.wrong = wrong

    def forward(self, images):
        classes = (images.mean((1, 2, 3)) / 1000).floor().long()
        wrong = torch.isin(classes, torch.tensor(self.wrong, dtype=torch.int64))
        return 9.0 * nn.functional.one_hot((classes + wrong) % 3, 3)


def images_of(classes):
    return 1000.0 * torch.tensor(classes).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def odds(share, classes=3):
    """The logit of a share, as far as it is above chance."""
    above = (share * classes - 1) / (classes - 1)
    return math.log(above / (1 - above))


def told_of(images, wrong=(), generated=None, made=False, sure=9.0):
    teacher = Says()
    generated = None if generated is None else (generated, teacher(generated))
    return estimate(
        Says(wrong), teacher, (images, sure / 9 * teacher(images)), generated, made=made
    )


def test_it_is_fitted_to_two_figures():
    """1,000 images of class 0, 300 of 1 and 300 of 2. The student is wrong on class 1. A mixture
    is seen as the lower of its two classes if these are neighbours, and 0 and 2 as 1."""
    classes = [0] * 1000 + [1] * 300 + [2] * 300
    images = images_of(classes).clone()
    told = told_of(images, wrong=(1,))
    assert told is not None and told.held_out == pytest.approx(1300 / 1600)
    shuffled = torch.randperm(1600, generator=torch.Generator().manual_seed(0)).tolist()
    pairs = zip(shuffled, shuffled[-1:] + shuffled[:-1], strict=True)
    right = sum((classes[a] + classes[b]) // 2 != 1 for a, b in pairs)
    assert 900 < right < 1200
    middle = 1.30 * odds(2 / 3) + 0.95 * odds(right / 1600) + 1.08
    low, high = told.between
    assert [odds(x) for x in (low, told.real, high)] == pytest.approx(
        [middle - 0.68, middle, middle + 0.68]
    )
    assert told.as_row() == {
        "agreement_held_out": told.held_out,
        "estimated_agreement": told.real,
        "estimated_between": [low, high],
    }
    assert torch.equal(images, images_of(classes))


def test_the_order_of_the_images_does_not_matter():
    """They may come class by class: then each is not mixed with one of its own class."""
    sorted_ = images_of([0] * 2000 + [1] * 2000 + [2] * 2000).clone()
    shuffled = sorted_[torch.randperm(6000, generator=torch.Generator().manual_seed(1))]
    one, other = (told_of(images, wrong=(1,)) for images in (sorted_, shuffled))
    assert odds(one.real) == pytest.approx(odds(other.real), abs=0.2)


def test_only_generated_images_tell_of_real_ones():
    cut, made = images_of([1] * 200).clone(), images_of([0, 1, 2] * 70).clone()
    told = told_of(cut, wrong=(1,), generated=made)
    assert told.held_out == 0 and told.images == 200
    assert told.real == told_of(made, wrong=(1,)).real != told_of(cut, wrong=(1,)).real
    few = told_of(made, generated=made[:99])
    assert few == (1.0, 210, None, None)


def test_nobody_is_all_right_or_all_wrong():
    images = images_of([0, 1, 2] * 50).clone()
    best, worst = (told_of(images, wrong) for wrong in ((), (0, 1, 2)))
    assert odds(best.real) == pytest.approx(math.log(0.995 / 0.005))
    assert odds(best.between[0]) == pytest.approx(math.log(0.995 / 0.005) - 0.68)
    assert odds(worst.real) == pytest.approx(math.log(0.01 / 0.99))


def test_it_says_nothing_from_too_few_images():
    images = images_of([0, 1, 2] * 50).clone()
    assert told_of(images[: FEWEST - 1]) == (1.0, FEWEST - 1, None, None)
    assert told_of(images[:FEWEST]).real is not None
    assert told_of(images[:0]) is None


@pytest.mark.parametrize(
    ("counts", "tells"),
    [((0, 0, 300), False), ((10, 10, 300), False), ((0, 150, 150), False), ((75, 75, 225), True)],
)
def test_it_says_nothing_if_most_images_are_of_a_few_classes(counts, tells):
    """A student needs to know no others. The entropies are 0, 0.25, 0.63 and 0.87 log 3."""
    images = images_of([n for n, count in enumerate(counts) for _ in range(count)]).clone()
    told = told_of(images)
    assert told[:2] == (1.0, len(images)) and (told.real is not None) == tells


def test_of_two_classes_one_is_all_that_a_student_needs_to_say():
    images = images_of([2] * 300).clone()
    binary = Says()(images)[:, 1:]
    assert estimate(Says(), Says(), (images, binary), made=False) == (0.0, 300, None, None)
    assert estimate(Says(), Says(), (images, binary[:, :1]), made=False)[1:] == (300, None, None)


def test_it_says_nothing_of_a_student_that_differs_from_a_teacher_that_is_sure():
    """Of 600 generated images it is wrong on 150 of class 1: 0.62 right above chance."""
    images = images_of([0] * 300 + [1] * 150 + [2] * 150).clone()
    share = pytest.approx(0.75)
    assert told_of(images, (1,), made=True) == (share, 600, None, None)
    assert told_of(images, (1,), made=False).real is not None
    assert told_of(images, (1,), made=True, sure=1.0).real is not None
    better = images_of([0] * 350 + [1] * 90 + [2] * 160).clone()  # 0.775 above chance
    assert told_of(better, (1,), made=True).real is not None
    few = images_of([0] * 25 + [1] * 24).clone()
    unsure = images_of([0, 1, 2] * 50).clone()
    both = torch.cat([few, unsure])
    logits = Says()(both) * torch.tensor([1.0] * 49 + [1 / 9] * 150).view(-1, 1)
    assert estimate(Says((1,)), Says(), (both, logits)).real is not None  # sure of 49 only


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
    student = copy.deepcopy(teacher)  # it agrees where the teacher is sure
    result = distill(teacher, student, out_dir=tmp_path / "run", **given)
    told = [row["estimated_agreement"] for row in result.history if "agreement_newest" in row]
    assert told[0] is None  # of the first 128 images 64 are held out
    assert all(0 <= one <= 1 for one in told[-2:])
    assert result.summary["estimated_agreement"] == told[-1]
    result = distill(teacher, network(), out_dir=tmp_path / "none", **given | {"bank_held_out": 0})
    assert "estimated_agreement" not in result.summary

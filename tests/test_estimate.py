"""What is told of a student's agreement with its teacher without real images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dafl_fast import distill
from dafl_fast.engine.estimate import FEWEST, estimate


class Says(nn.Module):
    """Chooses the class that stands in an image's first pixel."""

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()


def images_of(classes):
    return torch.tensor(classes).float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def test_it_counts_the_images_of_which_the_teacher_is_sure():
    sure, unsure = [9.0, 0.0, 0.0], [1.0, 0.0, 0.0]
    logits = torch.tensor([sure] * 160 + [unsure] * 40)
    told = estimate(Says(), images_of([0] * 120 + [1] * 40 + [2] * 40), logits)
    assert told is not None
    assert told.held_out == pytest.approx(120 / 200)
    assert told.sure == pytest.approx(120 / 160) and told.images == 160
    assert told.as_row() == {"agreement_held_out": told.held_out, "estimated_agreement": told.sure}


def test_it_says_nothing_from_too_few_images():
    logits = torch.tensor([[9.0, 0.0, 0.0]] * (FEWEST - 1) + [[1.0, 0.0, 0.0]] * 40)
    told = estimate(Says(), images_of([0] * len(logits)), logits)
    assert told is not None and told.sure is None and told.held_out == 1
    assert estimate(Says(), images_of([]), logits[:0]) is None


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

"""The replay bank: what goes in comes out, oldest first to leave, uniform draws."""

from __future__ import annotations

import pytest
import torch

from dafl_fast.engine.bank import ReplayBank


def batch(count: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and logits that both tell their number."""
    numbers = torch.arange(first, first + count).float()
    images = numbers.view(-1, 1, 1, 1) + torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    return images, torch.stack([numbers, -numbers], 1)


def test_ring_overwrites_the_oldest():
    bank = ReplayBank(10, (1, 4, 4), 2, "fp32")
    for first in range(0, 16, 4):
        bank.add(*batch(4, first))
    assert len(bank) == 10
    assert bank.added == 16
    images, logits = bank.images, bank.logits[:, 0]
    assert sorted(logits.tolist()) == list(range(6, 16))
    torch.testing.assert_close(images.mean((1, 2, 3)), logits)


def test_draws_pair_images_with_their_logits_and_reach_everything():
    bank = ReplayBank(50, (1, 4, 4), 2, "fp32")
    bank.add(*batch(30))
    images, logits = bank.draw(3000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(images.mean((1, 2, 3)), logits[:, 0], atol=1e-5, rtol=0)
    counts = logits[:, 0].long().bincount(minlength=30)
    assert counts.min() > 60
    assert counts.max() < 150  # 100 expected, standard deviation 10


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0), ("bf16", 2**-8), ("uint8", None)])
def test_storage_keeps_what_it_promises(dtype, tolerance):
    bank = ReplayBank(64, (2, 8, 8), 10, dtype)
    images, logits = torch.randn(64, 2, 8, 8), torch.randn(64, 10)
    bank.add(images, logits)
    generator = torch.Generator().manual_seed(1)
    which = torch.randint(64, (64,), generator=torch.Generator().manual_seed(1))
    drawn, drawn_logits = bank.draw(64, generator)
    assert torch.equal(drawn_logits, logits[which])
    error = (drawn.float() - images[which]).abs()
    if tolerance is None:
        level = (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))[which] / 255
        assert (error.amax((1, 2, 3)) <= 0.5001 * level).all()
        assert error.max() > 0
    else:
        assert (error <= tolerance * images[which].abs()).all()
    per_pixel = {"fp32": 4, "bf16": 2, "uint8": 1}[dtype]
    assert bank.bytes == 64 * (128 * per_pixel + 40 + (8 if dtype == "uint8" else 0))


def test_constant_images_survive_uint8():
    bank = ReplayBank(4, (1, 4, 4), 2, "uint8")
    bank.add(torch.full((4, 1, 4, 4), 1.25), torch.zeros(4, 2))
    torch.testing.assert_close(bank.draw(8)[0], torch.full((8, 1, 4, 4), 1.25))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "uint8"])
def test_span_and_restore_are_exact_across_the_wrap(dtype):
    one = ReplayBank(10, (1, 4, 4), 2, dtype)
    two = ReplayBank(10, (1, 4, 4), 2, dtype)
    for first in range(0, 16, 4):
        one.add(*batch(4, first))
    two.restore(6, one.span(6, 12))
    two.restore(12, one.span(12, 16))
    two.added = one.added
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.logits, two.logits)
    draws = [bank.draw(20, torch.Generator().manual_seed(3))[0] for bank in (one, two)]
    assert torch.equal(*draws)

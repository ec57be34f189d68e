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


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 8, 30, 50, 61])
def test_entries_held_out_are_never_drawn_and_all_others_are(count):
    """Every third one; also while the ring fills, and when it starts again."""
    bank = ReplayBank(50, (1, 4, 4), 2, "fp32", held_out=3)
    bank.add(*batch(min(count, 50)))
    bank.add(*batch(max(count - 50, 0), 50))
    places = {place: place + 50 if place + 50 < count else place for place in range(min(count, 50))}
    kept = {number for place, number in places.items() if place % 3 == 2}
    images, logits = bank.draw(4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(images.mean((1, 2, 3)), logits[:, 0], atol=1e-5, rtol=0)
    assert set(logits[:, 0].long().tolist()) == set(places.values()) - kept
    images, logits = bank.held_out(most=1000)
    torch.testing.assert_close(images.mean((1, 2, 3)), logits[:, 0], atol=1e-5, rtol=0)
    assert sorted(logits[:, 0].long().tolist()) == sorted(kept)


def test_of_many_held_out_entries_some_of_all_ages_are_taken():
    bank = ReplayBank(50, (1, 4, 4), 2, "uint8", held_out=2)
    bank.add(*batch(50))
    images, logits = bank.held_out(most=7)
    assert logits[:, 0].tolist() == [1, 9, 17, 25, 33, 41, 49]
    torch.testing.assert_close(images.mean((1, 2, 3)), logits[:, 0], atol=1e-2, rtol=0)
    assert len(ReplayBank(50, (1, 4, 4), 2).held_out(most=7)[0]) == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0), ("bf16", 2**-8), ("uint8", None)])
def test_storage_keeps_what_it_promises(dtype, tolerance):
    bank = ReplayBank(64, (2, 8, 8), 10, dtype)
    images, logits = torch.randn(64, 2, 8, 8), torch.randn(64, 10)
    logits[:, 0] = torch.arange(64)
    bank.add(images, logits)
    drawn, drawn_logits = bank.draw(64, torch.Generator().manual_seed(1))
    which = drawn_logits[:, 0].long()
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
    two.count.copy_(one.count)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.logits, two.logits)
    draws = [bank.draw(20, torch.Generator().manual_seed(3))[0] for bank in (one, two)]
    assert torch.equal(*draws)


def test_shares_are_parts_of_the_same_draw():
    bank = ReplayBank(50, (1, 4, 4), 2, "fp32")
    bank.add(*batch(30))
    options = dict(crop=2, flip=True)
    whole = bank.draw(12, torch.Generator().manual_seed(4), **options)
    for share in (slice(0, 4), slice(4, 12)):
        part = bank.draw(12, torch.Generator().manual_seed(4), share, **options)
        for mine, all_of_it in zip(part, whole, strict=True):
            assert torch.equal(mine, all_of_it[share])


@pytest.mark.parametrize("side", [1, 2, 3])
def test_shifts_may_be_larger_than_the_image(side):
    bank = ReplayBank(4, (1, side, side), 2, "fp32")
    images, logits = batch(4)
    images = images[:, :, :side, :side].contiguous()
    bank.add(images, logits)
    drawn, _ = bank.draw(200, torch.Generator().manual_seed(0), crop=5)
    assert drawn.shape == (200, 1, side, side) and torch.isin(drawn, images).all()


def moved(image: torch.Tensor, dy: int, dx: int, flip: bool) -> torch.Tensor:
    """What a crop with the border reflected shows of `image` [C, H, W], step by step."""
    padded = torch.nn.functional.pad(image[None], (2, 2, 2, 2), mode="reflect")[0]
    height, width = image.shape[1:]
    cut = padded[:, 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]
    return cut.flip(2) if flip else cut


@pytest.mark.parametrize("dtype", ["fp32", "uint8"])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_give_every_position_equally_often(dtype, flip):
    torch.manual_seed(2)
    bank = ReplayBank(3, (2, 5, 6), 2, dtype)
    images = torch.randn(3, 2, 5, 6)
    bank.add(images, torch.arange(6.0).view(3, 2))
    drawn, logits = bank.draw(3000, torch.Generator().manual_seed(0), crop=2, flip=flip)
    plain = bank.draw(200, torch.Generator().manual_seed(0))
    stored = {row[0].item(): image for image, row in zip(*plain, strict=True)}
    counts: dict[tuple[int, int, bool], int] = {}
    mirrors = (False, True) if flip else (False,)
    candidates = {
        (number, dy, dx, mirror): moved(image, dy, dx, mirror)
        for number, image in stored.items()
        for dy in range(-2, 3) for dx in range(-2, 3) for mirror in mirrors
    }  # fmt: skip
    for image, row in zip(drawn, logits, strict=True):
        found = [
            key[1:] for key, candidate in candidates.items()
            if key[0] == row[0].item() and torch.equal(candidate, image)
        ]  # fmt: skip
        assert len(found) == 1, "not a moved copy of the image that belongs to these logits"
        counts[found[0]] = counts.get(found[0], 0) + 1
    expected = 3000 / (50 if flip else 25)
    assert len(counts) == (50 if flip else 25)
    assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5

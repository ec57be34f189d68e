"""Real images that are not the data: how they are read, cut, chosen, balanced and drawn."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dafl_fast import data, distill
from dafl_fast import train as command
from dafl_fast.data import FORMATS, Format, normalise
from dafl_fast.distill import train
from dafl_fast.engine import graph
from dafl_fast.engine.bank import ReplayBank
from dafl_fast.engine.crops import Cutter
from dafl_fast.engine.distributed import World
from dafl_fast.engine.estimate import FEW_CLASSES, Estimate
from dafl_fast.engine.images import BalancedBank, Found, held_out_of, sources_of
from dafl_fast.engine.prepare import prepare
from dafl_fast.engine.step import STATISTICS, Step
from dafl_fast.errors import UserError
from dafl_fast.models import LeNet5, LeNet5Half
from dafl_fast.recipes import make_config
from dafl_fast.records import Run
from dafl_fast.unlabelled import Given, given_tensor, read_images, with_dead_leaves

from .conftest import NO_GPU
from .test_graph import assert_same, everything
from .test_live import forgotten
from .test_train import TINY, assert_same_student, interrupted_after, run, student_of, tiny

CPU = torch.device("cpu")
GREY, COLOUR = FORMATS["mnist"], FORMATS["cifar10"]
PIXELS = Format(8, 1, (0.0,), (1 / 255,))  # grey levels as they are
SMALL = dict(image_shape=(1, 8, 8), batch_size=8, bank_images=64, images_candidates=16)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def photograph(tmp_path):
    """A picture of 96 x 128 with something of everything: noise on a slope."""
    slope = np.linspace(0, 200, 128, dtype=np.float32)[None, :, None] + noise(96, 128, 3) / 5
    path = tmp_path / "photograph.png"
    Image.fromarray(slope.clip(0, 255).astype(np.uint8)).save(path)
    return path


def given(*photographs, whole=(), form=PIXELS) -> Given:
    side = form.image_size
    images = torch.as_tensor(np.asarray(whole, dtype=np.uint8)).view(-1, 1, side, side)
    return Given([torch.as_tensor(p).unsqueeze(0) for p in photographs], images, form)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- reading ---------------------------------------------------------------------------------------


def test_a_folder_holds_images_of_both_kinds_at_any_depth(tmp_path, caplog):
    (tmp_path / "a" / "b").mkdir(parents=True)
    Image.fromarray(noise(80, 64, 3)).save(tmp_path / "large.png")
    Image.fromarray(noise(63, 200, 3)).save(tmp_path / "a" / "long.jpg")
    Image.fromarray(noise(16, 8)).save(tmp_path / "a" / "b" / "tall.PNG")
    (tmp_path / "a" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / ".hidden.png").write_text("not looked at")
    found = read_images([tmp_path], COLOUR)
    assert [tuple(image.shape) for image in found.photographs] == [(3, 80, 64)]
    assert found.whole.shape == (2, 3, 32, 32) and found.whole.dtype == torch.uint8
    assert found.words == "1 photograph and 2 images"
    message, other = [record.getMessage() for record in caplog.records]
    assert "1 of 4 images are grey, and are given to the network as equal channels" in other
    assert "1 of 4 files cannot be read and are left out, such as" in message
    assert "broken.jpg" in message
    # The tall one is brought to 32 columns, so 64 rows, of which the middle ones stay.
    tall = torch.from_numpy(noise(16, 8))[None, None]
    middle = data.resized(tall, (64, 32))[0, :, 16:48]
    assert torch.equal(found.whole[0], middle.expand(3, -1, -1))
    grey = read_images([tmp_path / "large.png"], GREY)
    assert grey.photographs[0].shape == (1, 80, 64)
    assert found.fingerprint() == read_images([tmp_path], COLOUR).fingerprint()
    assert found.fingerprint() != read_images([tmp_path / "large.png"], COLOUR).fingerprint()


def test_npz_files_need_no_labels(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=noise(5, 8, 8))
    found = read_images([path, path], GREY)
    assert found.photographs == [] and found.whole.shape == (10, 1, 32, 32)
    expected = data.resized(torch.from_numpy(noise(5, 8, 8)).unsqueeze(1), 32)
    assert torch.equal(found.whole[5:], expected)
    np.savez(path, images=noise(2, 64, 70), labels=np.zeros(2, int))
    assert read_images([path], GREY).words == "2 photographs"


def test_huge_photographs_are_made_smaller(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dafl_fast.unlabelled.LONGEST_SIDE", 100)
    Image.fromarray(noise(75, 150, 3)).save(tmp_path / "a.png")
    Image.fromarray(noise(80, 64, 3)).save(tmp_path / "b.png")
    shapes = lambda: [tuple(x.shape[1:]) for x in read_images([tmp_path], PIXELS).photographs]  # noqa: E731
    assert shapes() == [(50, 100), (80, 64)]
    assert "1 photograph(s) are made smaller, to at most 100 pixels on a side" in caplog.text
    monkeypatch.setattr("dafl_fast.unlabelled.PIXELS", (50 * 100 + 80 * 64) // 4)
    assert shapes() == [(25, 50), (40, 32)]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, r"--images .*thing does not exist"),
        (lambda path: path.mkdir(), r"holds no images: no file in it ends in \.bmp, \.jpeg"),
        (lambda path: path.write_text("?"), r"no image can be read \(.*cannot identify"),
    ],
)
def test_paths_without_images(tmp_path, make, sentence):
    make(tmp_path / "thing")
    with pytest.raises(UserError, match=sentence):
        read_images([tmp_path / "thing"], COLOUR)


def test_images_of_other_channels(tmp_path, photograph):
    np.savez(tmp_path / "x.npz", images=noise(5, 8, 8, 2))
    with pytest.raises(UserError, match=r"--images .*x\.npz: the images have 2 channel\(s\), .* 3"):
        read_images([tmp_path / "x.npz"], COLOUR)
    with pytest.raises(UserError, match="1 or 3 channels, the network takes 5; .* as an .npz file"):
        read_images([photograph], Format(8, 5, (0.0,) * 5, (1.0,) * 5))


def test_grey_images_are_repeated_for_a_network_that_takes_colour(tmp_path, caplog):
    np.savez(tmp_path / "x.npz", images=noise(5, 32, 32))
    Image.fromarray(noise(80, 64)).save(tmp_path / "grey.png")
    found = read_images([tmp_path / "x.npz", tmp_path], COLOUR)
    assert torch.equal(found.whole, torch.from_numpy(noise(5, 1, 32, 32)).expand(-1, 3, -1, -1))
    assert torch.equal(found.photographs[0], torch.from_numpy(noise(1, 80, 64)).expand(3, -1, -1))
    messages = [record.getMessage() for record in caplog.records]
    words = "images are grey, and are given to the network as equal channels"
    assert messages == [
        f"--images {tmp_path / 'x.npz'}: 5 of 5 {words}", f"--images {tmp_path}: 1 of 1 {words}",
    ]  # fmt: skip
    read_images([tmp_path / "x.npz", tmp_path], GREY)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("form", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(tmp_path, caplog, mode, form):
    black = np.zeros((32, 32, 4), np.uint8)
    black[..., 3] = 255
    black[:8, :, 3] = 0
    image = Image.fromarray(black)
    if mode == "P":
        image = Image.fromarray((black[..., 3] == 0).astype(np.uint8), mode="P")
        image.putpalette([0, 0, 0, 0, 0, 0])  # the second one is black, too, and transparent
        image.save(tmp_path / "a.png", transparency=1)
    else:
        image.convert(mode).save(tmp_path / "a.png")
    black[..., 3] = 255
    Image.fromarray(black).save(tmp_path / "opaque.png")
    first, second = read_images([tmp_path], form).whole
    assert (first[:, :8] == 255).all() and (first[:, 8:] == 0).all()
    assert (second == 0).all()
    assert "the transparent parts of 1 of 2 images are made white" in caplog.text


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(3, 1, 8, 9), r"floats \[N, 1, 8, 8\] in .* got torch.float32 \[3, 1, 8, 9\]"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), r"got torch.uint8 \[3, 1, 8, 8\]; files of"),
        (torch.zeros(0, 1, 8, 8), r"got torch.float32 \[0, 1, 8, 8\]"),
        (torch.full((1, 1, 8, 8), torch.nan), "without NaN and infinity"),
    ],
)
def test_tensors_that_are_no_images(images, sentence):
    with pytest.raises(UserError, match=sentence):
        given_tensor(images, (1, 8, 8))


# -- cutting ---------------------------------------------------------------------------------------


def test_crops_are_reproducible_and_lie_inside():
    """Photographs of 1s with an invisible outside: a value below shows a pixel from elsewhere."""
    cutter = Cutter(given(noise(40, 50), noise(16, 99)), (1, 8, 8), CPU)
    one, two = cutter.cut(64, seeded()), cutter.cut(64, seeded())
    assert one.shape == (64, 1, 8, 8) and torch.equal(one, two)
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(one, cutter.cut(64, seeded(1)))
    parts = [cutter.cut(64, seeded(), rows) for rows in (slice(0, 32), slice(32, 64))]
    assert torch.equal(torch.cat(parts), one)
    random = torch.rand((4000, 13), generator=seeded())
    which = cutter._item(random[:, 0])
    assert which.bincount().tolist() == pytest.approx([2000, 2000], abs=150)
    matrix, centre = cutter._frame(which, random)
    corners = torch.tensor([[-4.0, -4], [-4, 4], [4, -4], [4, 4]])
    places = centre.unsqueeze(1) + corners @ matrix.mT
    size = cutter._levels[which, 0, 1:].flip(1).unsqueeze(1)
    assert (places > -1e-3).all() and (places < size + 1e-3).all()
    scale = matrix.det().abs().sqrt()
    assert scale.min() >= 0.49 and (scale[which == 0] > 4).any() and (scale < 1).any()
    assert (matrix.det() < 0).float().mean().item() == pytest.approx(0.5, abs=0.05)  # mirrored


def test_large_crops_see_all_pixels(monkeypatch):
    """A checkerboard is grey from afar. Taking single pixels would show black and white."""
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    monkeypatch.setattr("dafl_fast.engine.crops._recoloured", lambda crops, random: crops)
    cutter = Cutter(given(board), (1, 8, 8), CPU)
    random = torch.rand((256, 13), generator=seeded())
    matrix, _ = cutter._frame(cutter._item(random[:, 0]), random)
    crops = cutter.cut(256, seeded())
    far = matrix.det().abs().sqrt() > 3
    assert far.sum() > 50
    assert ((crops[far] - 127.5).abs() < 2).all()
    near = matrix.det().abs().sqrt() < 0.7
    assert crops[near].std() > 40


def test_photographs_and_whole_images_are_cut_equally_often():
    cutter = Cutter(given(noise(20, 20), whole=noise(3, 8, 8)), (1, 8, 8), CPU)
    which = cutter._item(torch.rand(4000, generator=seeded()))
    assert which.bincount().tolist() == pytest.approx([2000, 667, 667, 667], abs=100)
    ends = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-24])
    assert cutter._item(ends).tolist() == [0, 0, 1, 3]
    whole = Cutter(given(whole=noise(3, 8, 8)), (1, 8, 8), CPU)
    assert whole._item(ends).tolist() == [0, 1, 1, 2]
    photographs = Cutter(given(noise(20, 20), noise(20, 20)), (1, 8, 8), CPU)
    assert photographs._item(ends).tolist() == [0, 0, 1, 1]
    # Sketches are far more than what a user has.
    own = given(noise(20, 20), whole=noise(30, 8, 8))
    cutter = Cutter(dataclasses.replace(own, sketches=28), (1, 8, 8), CPU)
    shares = cutter._item(torch.rand(9000, generator=seeded())).bincount().split([1, 2, 28])
    assert [int(part.sum()) for part in shares] == pytest.approx([3000] * 3, abs=150)


def test_whole_images_are_varied_by_a_share():
    ramp = np.tile(np.linspace(20, 230, 16).astype(np.uint8), (16, 1))
    cutter = Cutter(given(whole=[ramp], form=Format(16, 1, (0.0,), (1 / 255,))), (1, 16, 16), CPU)
    random = torch.rand((2000, 13), generator=seeded())
    share, which = random[:, 1], torch.zeros(2000, dtype=torch.int64)
    matrix, centre = cutter._frame(which, random)
    assert (matrix.det() > 0).all()  # none is mirrored
    assert (centre - 8).abs().amax().item() == pytest.approx(4, abs=0.2)
    bound = share.unsqueeze(1) * 4
    assert ((centre - 8).abs() <= bound + 1e-4).all()
    assert (matrix.det().sqrt().log().abs() <= share * math.log(1.5) + 1e-4).all()
    crops = cutter.cut(2000, seeded())
    assert torch.equal(torch.rand((2000, 13), generator=seeded()), random)
    differ = (crops - torch.from_numpy(ramp)).abs().flatten(1).mean(1)
    assert differ[share < 0.02].max() < 3 and differ[share > 0.5].mean() > 15
    ordered = torch.stack([share, differ]).corrcoef()[0, 1]
    assert ordered > 0.5
    nothing = random.clone()
    nothing[:, 1] = 0.0
    matrix, centre = cutter._frame(which, nothing)
    same = cutter._sampled(which, matrix, centre).squeeze(3)
    torch.testing.assert_close(same[0], torch.from_numpy(ramp).float(), rtol=0, atol=1e-3)


def test_long_images_are_turned_and_sheared_less():
    """Else their ends would leave the image."""
    drawn = torch.rand((500, 13), generator=seeded())
    drawn[:, 1] = 1.0  # all of the variation
    straight, upright = drawn.clone(), drawn.clone()
    straight[:, 4] = upright[:, 3] = 0.5  # but shear, and but angle
    turned, sheared = [], []
    for size in ((16, 16), (16, 64), (64, 16)):
        whole = torch.zeros((1, 1, *size), dtype=torch.uint8)
        form = Format(size, 1, (0.0,), (1.0,))
        cutter = Cutter(Given([], whole, form), (1, *size), CPU)
        which = torch.zeros(500, dtype=torch.int64)
        matrix, _ = cutter._frame(which, straight)
        turned.append(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]).abs().max().item())
        matrix, _ = cutter._frame(which, upright)
        sheared.append((matrix[:, 0, 1] / matrix[:, 1, 1]).abs().max().item())
    assert turned == pytest.approx([math.radians(degrees) for degrees in (30, 7.5, 7.5)], rel=0.02)
    most = math.tan(math.radians(20))
    assert sheared == pytest.approx([most, most, most / 4], rel=0.02)


@pytest.mark.parametrize(
    ("upright", "times", "turns"), [(0.1, 1.2, True), (0.1, 2.0, False), (0.45, 1.2, False)]
)
def test_images_are_turned_by_half_if_the_teacher_knows_them_so(upright, times, turns):
    """A teacher that answers by the upper half, and whose doubt in turned images is greater."""

    def answer(images):
        upper = images[:, :, :4].mean((1, 2, 3)) > images[:, :, 4:].mean((1, 2, 3))
        right = 1 - upright * torch.where(upper, 1.0, times)  # the probability of the class
        logits = torch.stack([right.log(), *[((1 - right) / 3).log()] * 3], 1)
        return images, logits

    image = np.zeros((8, 8), np.uint8)
    image[:3] = 200
    config = make_config("custom", **{**SMALL, "generator": "none"})
    found = found_of(config, given(whole=[image] * 5), answer)
    assert found.cutter.half_turns == turns
    assert found.words.endswith("whose variants are turned by 180°") == turns
    crops = found.cutter.cut(400, seeded())
    down = (crops[:, :, 5:].mean((1, 2, 3)) > crops[:, :, :3].mean((1, 2, 3))).float().mean().item()
    assert down == pytest.approx(turns / 2, abs=0.08)
    # What the teacher thinks of sketches says nothing of the images.
    sketched = dataclasses.replace(given(whole=[image] * 5 + [image * 0 + 9] * 90), sketches=90)
    assert found_of(config, sketched, answer).cutter.half_turns == turns
    # A held-out variant is one like those to learn from.
    found = found_of(config, given(whole=[image] * 90), answer)
    images, _ = found.bank.held_out(500)
    down = (images[:, :, 5:].mean((1, 2, 3)) > images[:, :, :3].mean((1, 2, 3))).float().mean()
    assert down.item() == pytest.approx(turns / 2, abs=0.08)


def test_what_is_outside_of_a_whole_image_is_as_its_edge(monkeypatch):
    monkeypatch.setattr("dafl_fast.engine.crops._recoloured", lambda crops, random: crops)
    framed = np.full((8, 8), 90, np.uint8)
    framed[2:6, 2:6] = 200
    crops = Cutter(given(whole=[framed]), (1, 8, 8), CPU).cut(500, seeded())
    assert crops.min() == pytest.approx(90, abs=1e-3) and crops.max() <= 200.001
    assert (crops[:, :, 0, 0] > 91).any()  # some are moved or scaled as far as that


def test_crops_are_in_the_teachers_units():
    flat = np.full((3, 64, 64), 100, np.uint8)
    form = Format(8, 3, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    cutter = Cutter(Given([torch.from_numpy(flat)], torch.empty(0), form), (3, 8, 8), CPU)
    low, high = (normalise(torch.full((1, 3, 8, 8), v, dtype=torch.uint8), form) for v in (0, 255))
    crops = cutter.cut(500, seeded())
    assert (crops >= low - 1e-4).all() and (crops <= high + 1e-4).all()
    assert (crops.amax((2, 3)) - crops.amin((2, 3)) < 1e-3).all()  # of one colour, each another
    assert crops.mean((0, 2, 3)).tolist() == pytest.approx(
        normalise(torch.full((1, 3, 8, 8), 100, dtype=torch.uint8), form)[0, :, 0, 0].tolist(),
        abs=0.5,
    )
    grey = Format(8, 3, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), grey=True)
    cutter = Cutter(Given([torch.from_numpy(flat[:1])], torch.empty(0), grey), (3, 8, 8), CPU)
    assert cutter.cut(5, seeded()).shape == (5, 3, 8, 8)


# -- choosing and drawing --------------------------------------------------------------------------


def skewed(images):
    """A teacher of four classes: flat images are of the first, which most are."""
    spread = images.float().flatten(1).std(1)
    label = (spread.unsqueeze(1) > torch.tensor([0.1, 8, 25])).sum(1)
    return images, nn.functional.one_hot(label, 4) * 4.0


def found_of(config, images: Given, answer, world=None) -> Found:
    return Found(config, images, 4, seeded(), world or World(), answer)


def test_rare_classes_are_chosen_first():
    config = make_config("mnist", num_classes=4, **{**SMALL, "images_candidates": 64})
    found = found_of(config, given(noise(32, 32)), lambda images: (images, torch.zeros(64, 4)))
    labels = torch.tensor([0] * 52 + [1] * 6 + [2] * 5 + [3])
    logits = nn.functional.one_hot(labels, 4) * torch.linspace(9, 5, 64).unsqueeze(1)
    chosen = found.chosen(logits)
    assert len(chosen) == 16 and len(chosen.unique()) == 16
    assert labels[chosen].bincount().tolist() == [5, 5, 5, 1]
    assert {0, 1, 2, 3, 4} <= set(chosen.tolist())  # the surest of the first class
    # What is in the bank counts.
    found.bank.add(torch.zeros(32, 1, 8, 8), nn.functional.one_hot(torch.arange(32) % 2, 4))
    found.bank.weigh()
    assert labels[found.chosen(logits)].bincount(minlength=4).tolist() == [5, 5, 5, 1]
    assert found.bank.counts.tolist() == [16, 16, 0, 0]
    # A class of which the teacher is not sure does not displace those of which it is.
    logits[labels == 2] *= 0.02
    unsure = found_of(config, given(noise(32, 32)), lambda images: (images, torch.zeros(64, 4)))
    assert labels[unsure.chosen(logits)].bincount(minlength=4).tolist()[2] < 4
    assert unsure.chosen(torch.zeros(64, 4)).sort().values.tolist() == list(range(16))


def test_the_bank_of_crops_is_balanced():
    """Most crops are of the flat sky. Chosen, they are one class of four."""
    sky = np.full((96, 96), 128, np.uint8)
    sky[:24, :24] = noise(24, 24)
    sizes = {**SMALL, "images_candidates": 64, "bank_images": 640}
    found = found_of(make_config("mnist", num_classes=4, **sizes), given(sky), skewed)
    seen = torch.zeros(4)
    for _ in range(30):
        images, logits = found.renew()
        assert torch.equal(skewed(images)[1], logits)
        seen += found.fresh()[1].argmax(1).bincount(minlength=4)
    assert len(found.bank) == found.bank.capacity == 320
    before, after = (counts / counts.sum() for counts in (seen, found.bank.counts))
    assert before.max() > 0.6 and (before > 0).all()
    assert after.max() < 0.45 and after.min() > 2 * before.min()


def test_draws_are_balanced_up_to_a_limit():
    bank = BalancedBank(1000, (1, 2, 2), 4, "fp32")
    labels = torch.tensor([0] * 600 + [1] * 250 + [2] * 49 + [3])
    images = torch.arange(900.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    bank.add(images, nn.functional.one_hot(labels, 4))
    bank.weigh()
    drawn = [bank.draw(4000, seeded(seed)) for seed in range(5)]
    share = torch.cat([logits.argmax(1) for _, logits in drawn]).bincount() / 20000
    # 900 images, four classes: 28.1 is an eighth of an even share.
    weights = torch.tensor([1, 1, 1, 1 / 28.125])
    torch.testing.assert_close(share, weights / weights.sum(), rtol=0.05, atol=0.004)
    for images, logits in drawn:  # each with its own answer, and never an empty place
        assert torch.equal(labels[images[:, 0, 0, 0].long()], logits.argmax(1))
    rows = [bank.draw(10, seeded(), part) for part in (slice(0, 4), slice(4, 10))]
    whole = bank.draw(10, seeded())
    assert torch.equal(torch.cat([images for images, _ in rows]), whole[0])
    assert bank.draw(10, seeded(), slice(3, 3))[0].shape == (0, 1, 2, 2)


def test_the_share_of_rows():
    config = make_config("mnist", num_classes=4, images_share=0.3, **SMALL)
    found = found_of(config, given(noise(32, 32)), lambda images: (images, torch.zeros(16, 4)))
    other = BalancedBank(8, (1, 8, 8), 4)
    count = lambda sources: [(bank is found.bank, n, part) for bank, n, part in sources]  # noqa: E731
    assert count(sources_of(found, other, 10, slice(0, 10))) == [
        (True, 3, slice(0, 3)), (False, 7, slice(0, 7)),
    ]  # fmt: skip
    assert count(sources_of(found, other, 10, slice(0, 5))) == [
        (True, 3, slice(0, 3)), (False, 7, slice(0, 2)),
    ]  # fmt: skip
    assert count(sources_of(found, other, 10, slice(5, 10))) == [
        (True, 3, slice(3, 3)), (False, 7, slice(2, 7)),
    ]  # fmt: skip
    assert count(sources_of(None, other, 10, slice(0, 10))) == [(False, 10, slice(0, 10))]
    assert sources_of(None, None, 10, slice(0, 10)) == []
    found.share = 1.0
    assert count(sources_of(found, None, 10, slice(0, 10))) == [(True, 10, slice(0, 10))]
    found.share = 0.999
    assert [n for _, n, _ in sources_of(found, other, 10, slice(0, 10))] == [9, 1]


def test_held_out_images_come_from_all_banks_in_the_shares_of_a_batch():
    banks = [ReplayBank(48, (1, 8, 8), 4, "fp32", held_out=2) for _ in range(2)]
    for value, bank in enumerate(banks):
        bank.add(torch.full((48, 1, 8, 8), float(value)), torch.full((48, 4), 10.0 + value))
    sources = [(banks[0], 3, slice(3)), (banks[1], 9, slice(9))]
    images, logits = held_out_of(sources, 32)
    assert images[:, 0, 0, 0].tolist() == [0.0] * 8 + [1.0] * 24
    assert logits[:, 0].tolist() == [10.0] * 8 + [11.0] * 24
    assert len(held_out_of(sources[:1], 99)[0]) == 24
    assert len(held_out_of(sources, 1)[0]) == 2


# -- the step --------------------------------------------------------------------------------------


def step_with(
    images: Given, precision: str = "fp32", device=CPU, student=LeNet5Half, **overrides
) -> Step:
    settings = {
        "batch_size": 8, "generator_width": 8, "student_updates": 2, "student_batch_size": 8,
        "bank_images": 40, "images_candidates": 16, "eval": "none", **overrides,
    }  # fmt: skip
    config = make_config("mnist", "fast", **settings)
    torch.manual_seed(1)
    return prepare(config, LeNet5(), student(), device, precision, given=images)


def test_a_run_that_goes_on_turns_images_as_before():
    """Also if the teacher's doubt comes out otherwise on another machine."""
    images = given(whole=noise(5, 32, 32), form=GREY)
    upper = np.zeros((32, 32), np.uint8)
    upper[:12] = 200
    many = given(whole=[upper] * 90, form=GREY)
    saved = step_with(images).state_dict()
    resumed = step_with(images)
    for turned in (True, False):
        resumed.found.cutter.half_turns.fill_(not turned)
        resumed.load_state_dict({**saved, "half_turns": torch.tensor(turned)})
        assert resumed.found.cutter.half_turns == turned
        assert resumed.found.words.endswith("are turned by 180°") == turned
        ring = Found(resumed.config, many, 10, seeded(), World(), resumed._answered)
        ring.cutter.half_turns.fill_(turned)  # as when a checkpoint is read
        images, _ = ring.bank.held_out(500)
        down = images[:, :, 20:].mean((1, 2, 3)) > images[:, :, :12].mean((1, 2, 3))
        assert down.float().mean().item() == pytest.approx(turned / 2, abs=0.08)
    before = {name: value for name, value in saved.items() if name != "half_turns"}
    resumed.load_state_dict(before)  # begun by an earlier version
    assert not resumed.found.cutter.half_turns


def photograph_and_digits() -> Given:
    form = GREY
    return given(noise(80, 100), whole=noise(3, 32, 32), form=form)


def test_the_student_learns_from_both():
    step = step_with(photograph_and_digits(), images_share=0.25, bank_dtype="fp32")
    for _ in range(3):
        step()
    images, logits = step._draw(0)
    assert images.shape == (8, 1, 32, 32) and logits.shape == (8, 10)
    found, generated = (
        bank.images[: len(bank)].flatten(1).tolist() for bank in (step.found.bank, step.bank)
    )
    rows = images.flatten(1).tolist()
    assert [row in found for row in rows] == [True] * 2 + [False] * 6
    assert all(row in generated for row in rows[2:])
    assert len(step.found.bank) == 10  # a quarter of 40
    assert step.found.bank.added == 3 + 12  # the digits as they are, then what was cut
    # The teacher's answers belong to the images.
    bank = step.found.bank
    torch.testing.assert_close(bank.logits, step.teacher.network(bank.images.contiguous()))


def test_what_was_cut_is_not_shifted():
    step = step_with(photograph_and_digits(), bank_dtype="fp32", student_batch_size=64)
    step(), step()
    banks = [bank.images[: len(bank)].flatten(1).tolist() for bank in (step.found.bank, step.bank)]
    rows = step._draw(crop=4)[0].flatten(1).tolist()
    assert [row in banks[0] for row in rows[:32]] == [True] * 32
    assert sum(row in banks[1] for row in rows[32:]) < 8  # 1 of 81 is shifted by nothing
    tensor = step_with(given_tensor(torch.randn(3, 1, 32, 32), (1, 32, 32)))
    assert not tensor.found.bank.varied


def test_without_a_generator_only_the_student_learns():
    step = step_with(photograph_and_digits(), generator="none", bn_statistics=1.0)
    assert step.names == STATISTICS[-2:] == ("distill_loss", "agreement_training")
    assert step.bank is None
    before = copy.deepcopy(step.student.state_dict())
    for _ in range(3):
        step()
    assert not torch.equal(before["fc2.weight"], step.student.state_dict()["fc2.weight"])
    assert step.newest[0].shape == (4, 1, 32, 32)
    assert step.found.bank.capacity == 40 and len(step.found.bank) == 3 + 12
    assert step.take_means(3, 3).isfinite().all()
    assert 0 <= step.fresh_agreement(2) <= 1


def test_the_bank_begins_with_whole_images_as_they_are():
    images = given(whole=noise(30, 32, 32), form=GREY)
    step = step_with(images, bank_dtype="fp32", generator="none", images_candidates=8)
    bank, expected = step.found.bank, normalise(images.whole, GREY)
    assert bank.added == 30 and bank.capacity == 40
    torch.testing.assert_close(bank.images[:30], expected, rtol=0, atol=0)
    torch.testing.assert_close(bank.logits[:30], step.teacher.network(expected))
    step()
    assert bank.added == 38 and (bank.labels[:38] == bank.logits[:38].argmax(1)).all()
    distance = torch.cdist(bank.images[30:38].flatten(1), expected.flatten(1))
    assert (distance > 1e-3).all()  # none is as it was
    many = step_with(given(whole=noise(50, 32, 32), form=GREY), generator="none")
    assert many.found.bank.capacity == 50  # none is lost at once


def test_some_whole_images_are_held_out():
    """Variants of the others are too much like what the student has learned from."""
    images = given(whole=noise(100, 32, 32), form=GREY)
    step = step_with(images, bank_dtype="fp32", generator="none")
    bank, expected = step.found.bank, normalise(images.whole, GREY).flatten(1)
    assert bank.added == 92 and step.found.words == "100 images"
    kept = bank.images[:92].flatten(1).tolist()
    mine = [n for n, row in enumerate(expected.tolist()) if row not in kept]
    assert len(mine) == 8 and len({n % 12 for n in mine}) > 2  # classes may come in turn
    held, logits = bank.held_out(2048)
    assert held.shape == (512, 1, 32, 32) and torch.equal(bank.held_out(2048)[0], held)
    torch.testing.assert_close(logits, step.teacher.network(held))
    both = torch.cat([expected, expected.flip(1)])  # as they are, and turned by 180°
    nearest = torch.cdist(held.flatten(1), both).argmin(1) % 100
    assert torch.isin(nearest, torch.tensor(mine)).float().mean() > 0.25  # by chance 0.08
    assert step.estimate().images == 512
    assert step.found.fingerprint == images.fingerprint()
    assert [len(part) for part in held_out_of([(bank, 8, slice(8))], 1)] == [1, 1]


def test_only_what_the_generator_made_tells_of_real_images(monkeypatch):
    """If there is more than that; the agreement on held-out images is that on both."""
    seen = []
    monkeypatch.setattr(
        "dafl_fast.engine.step.estimate", lambda *given, made: seen.append((made, given[2:]))
    )
    both = step_with(photograph_and_digits(), bank_held_out=2)
    alone = step_with(photograph_and_digits(), bank_held_out=2, generator="none")
    made = step_with(None, bank_held_out=2)
    for step in (both, alone, made):
        for _ in range(3):
            step()
        assert step.estimate() is None
    (held_out, generated), (found,), (bank,) = (pairs for _, pairs in seen)
    assert [made for made, _ in seen] == [True, False, True]
    expected = (held_out_of(both.sources, 2048), both.bank.held_out(2048),
                alone.found.bank.held_out(2048), made.bank.held_out(2048))  # fmt: skip
    for pair, wanted in zip((held_out, generated, found, bank), expected, strict=True):
        assert all(map(torch.equal, pair, wanted))
    assert len(held_out[0]) > len(generated[0]) > 0


@pytest.mark.parametrize(
    ("settings", "tells"),
    [({}, False), ({"diversity": 1.0}, True), ({"generator": "none"}, True)],
)
def test_of_few_classes_generated_images_may_be_of_one_kind_each(settings, tells, monkeypatch):
    told = Estimate(0.5, 200, 0.75, (0.6, 0.9))
    monkeypatch.setattr("dafl_fast.engine.step.estimate", lambda *_, made: told)
    step = step_with(given(whole=noise(100, 32, 32), form=GREY), **settings)
    step.num_classes = FEW_CLASSES
    assert step.estimate() == (told if tells else (0.5, 200, None, None))
    step.num_classes += 1
    assert step.estimate() == told


def test_crops_alone_tell_nothing_of_real_images(monkeypatch):
    told = Estimate(0.5, 200, 0.75, (0.6, 0.9))
    monkeypatch.setattr("dafl_fast.engine.step.estimate", lambda *_, made: told)
    assert step_with(photograph_and_digits()).estimate() == told
    alone = step_with(photograph_and_digits(), generator="none")
    assert alone.estimate() == (0.5, 200, None, None)


def test_of_few_whole_images_none_are_held_out():
    step = step_with(given(whole=noise(79, 32, 32), form=GREY), generator="none")
    assert step.found.bank.added == 79
    step()
    images, logits = step.found.bank.held_out(2048)
    assert images.shape == (0, 1, 32, 32) and logits.shape == (0, 10) and step.estimate() is None
    until_flat = dict(generator="none", until_flat=True, eval_every=1, bank_held_out=2)
    with pytest.raises(UserError, match="--until-flat needs .* photograph, 80 .* 200 in a .* 3 im"):
        step_with(given(whole=noise(3, 32, 32), form=GREY), **until_flat)
    with pytest.raises(UserError, match="--until-flat needs .*, got 199 images"):
        step_with(given_tensor(torch.randn(199, 1, 32, 32), (1, 32, 32)), **until_flat)
    step_with(given_tensor(torch.randn(200, 1, 32, 32), (1, 32, 32)), **until_flat)
    step_with(photograph_and_digits(), **until_flat)


@pytest.mark.parametrize("whole", [10, 100])
def test_crops_of_photographs_are_held_out_beside_whole_images(whole):
    flat = np.full((80, 100), 128, np.uint8)
    step = step_with(given(flat, whole=noise(whole, 32, 32), form=GREY), generator="none",
                     bank_dtype="fp32")  # fmt: skip
    step()
    held = step.found.bank.held_out(2048)[0].float()
    crops = (held.flatten(1).std(1) < 1e-2).sum().item()
    assert len(held) == 512 and crops == pytest.approx(512 if whole == 10 else 256, abs=50)
    drawn = step.found.bank.draw(500, seeded())[0].float().flatten(1)
    assert not torch.isin(held.flatten(1).sum(1), drawn.sum(1)).any()


def test_a_tensor_is_answered_once_and_kept_as_it_is():
    images = torch.randn(30, 1, 32, 32)
    step = step_with(given_tensor(images, (1, 32, 32)), bank_dtype="fp32", generator="none")
    assert len(step.found.bank) == step.found.bank.capacity == 30 and step.banks == {}
    torch.testing.assert_close(step.found.bank.images, images, rtol=0, atol=0)
    torch.testing.assert_close(step.found.bank.logits, step.teacher.network(images))
    step()
    assert step.found.bank.added == 30


def hundred_digits() -> Given:
    return given(whole=noise(100, 32, 32), form=GREY)


BOTH_KINDS = pytest.mark.parametrize("images", [photograph_and_digits, hundred_digits])


@BOTH_KINDS
@pytest.mark.parametrize("generator", ["auto", "none"])
@pytest.mark.parametrize("dtype", ["uint8", "bf16"])
def test_the_inventory_is_complete(generator, dtype, images):
    step = step_with(images(), generator=generator, bank_dtype=dtype)
    assert forgotten(step) == set()


@BOTH_KINDS
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("generator", ["auto", "none"])
def test_warming_up_for_a_graph_leaves_no_trace(generator, precision, images):
    step = step_with(images(), precision, generator=generator)
    for bank, _ in step.banks.values():  # what was never written may hold NaN
        zeros = {k: torch.zeros_like(v) for k, v in bank.span(0, bank.capacity).items()}
        bank.restore(0, zeros)
    for _ in range(2):
        step()

    def state():
        banks = {name: bank.span(0, bank.capacity) for name, (bank, _) in step.banks.items()}
        derived = [step.found.bank.labels, step.found.bank.counts, step.found.bank._cumulative]
        return copy.deepcopy({**everything(step), "banks": banks, "derived": derived})

    before = state()
    with graph.unchanged(step, 3):
        for _ in range(3):
            step.body()
        assert not torch.equal(state()["derived"][0], before["derived"][0])
    assert_same(state(), before)


@BOTH_KINDS
def test_the_host_does_not_wait(images, monkeypatch):
    """No step asks a tensor for its value, which a CUDA graph could not hold."""
    step = step_with(images(), generator="none")
    step()

    def refuse(*args):
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    step.found.renew()
    step._draw(0), step._draw(0, step._measured)


class WithBatchNorm(nn.Sequential):
    """A student whose average has statistics to measure."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 15 * 15, 10),
        )  # fmt: skip


def pictures_and_digits() -> Given:
    return with_dead_leaves(photograph_and_digits(), 2, GREY)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("images", [photograph_and_digits, hundred_digits, pictures_and_digits])
@pytest.mark.parametrize("generator", ["auto", "none"])
@pytest.mark.parametrize("student", [LeNet5Half, WithBatchNorm])
def test_replays_of_a_graph_equal_steps(generator, images, student):
    torch.backends.cudnn.deterministic = True
    device = torch.device("cuda")
    one, two = (
        step_with(images(), device=device, student=student, generator=generator, cuda_graph="on",
                  generator_lr=1e-3, bank_crop=2, bank_flip=True)
        for _ in range(2)
    )  # fmt: skip
    assert graph.compile_and_capture(two) is None
    for _ in range(20):
        one(), two()
    assert torch.equal(one.found.bank.labels, two.found.bank.labels)
    assert torch.equal(one.random.get_state(), two.random.get_state())
    for part in ("student", "averaged_student"):
        mine, theirs = (getattr(step, part).state_dict() for step in (one, two))
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-3, msg=name)
    told = [step.estimate() for step in (one, two)]
    torch.testing.assert_close(told[0].held_out, told[1].held_out, rtol=0, atol=0.05)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("images", [photograph_and_digits, hundred_digits])
def test_a_gpu_cuts_what_a_cpu_cuts(images, monkeypatch):
    """From the same random numbers the same crops, a grey level or two apart."""
    numbers = torch.rand(64, 32)
    monkeypatch.setattr(
        torch, "rand", lambda shape, device=CPU, **_: numbers[: shape[0], : shape[1]].to(device)
    )
    crops = [Cutter(images(), (1, 32, 32), torch.device(name)).cut(64) for name in ("cpu", "cuda")]
    assert crops[1].is_cuda and crops[0].std() > 0.1
    torch.testing.assert_close(crops[1].cpu(), crops[0], rtol=1e-3, atol=2 / 255 / GREY.std[0])


# -- runs ------------------------------------------------------------------------------------------


def test_the_command(tmp_path, photograph, monkeypatch, capsys):
    np.savez(tmp_path / "digits.npz", images=noise(5, 8, 8))
    out = tmp_path / "run"
    code, printed, errors = run(
        monkeypatch, capsys, "mnist", "--steps", "4", "--images", str(photograph), "--images",
        str(tmp_path / "digits.npz"), "--images-share", "0.25", "--eval", "none", "--out-dir",
        str(out), "--images-candidates", "16", *TINY,
    )  # fmt: skip
    assert code == 0, errors
    assert "with 1 photograph and 5 images" in errors
    assert "on generated images" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert (
        summary["images"].startswith("1 photograph and 5 images")
        and summary["images_share"] == 0.25
    )
    assert sum(summary["images_class_counts"]) == 5 + 16
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["images_class_counts"] == summary["images_class_counts"]
    assert (out / "samples" / "images.png").exists()
    page = (out / "report.html").read_text()
    assert "images that no generator made" in page and "1 photograph and 5 images" in page
    assert "Class balance of the images not generated" in page
    config = Run.read(out).config
    assert config.images == (photograph, tmp_path / "digits.npz")


def test_the_command_without_a_generator(tmp_path, photograph, monkeypatch, capsys):
    out = tmp_path / "run"
    code, printed, errors = run(
        monkeypatch, capsys, "mnist", "--steps", "4", "--images", str(photograph), "--generator",
        "none", "--eval", "mnist-5k", "--out-dir", str(out), *TINY,
    )  # fmt: skip
    assert code == 0, errors
    assert "on images that no generator made" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["generator_images"] == 0 and summary["student_images"] == 4 * 2 * 16
    assert summary["images_share"] == 1.0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert "distill_loss" in rows[0] and not {"generator_loss", "entropy"} & rows[0].keys()
    page = (out / "report.html").read_text()
    assert "Generator loss" not in page and "of images that no generator made" in page


@pytest.mark.parametrize("kind", ["photograph", "images"])
@pytest.mark.parametrize("generator", ["auto", "none"])
def test_a_stopped_run_goes_on_bit_by_bit(tmp_path, photograph, generator, kind):
    if kind == "images":  # more than the bank holds, so they are replaced
        photograph = tmp_path / "photograph.npz"
        np.savez(photograph, images=noise(100, 28, 28))
    settings = dict(images=(photograph,), generator=generator, images_candidates=16, steps=8)
    train(tiny(tmp_path / "whole", **settings))
    with interrupted_after(3):
        assert train(tiny(tmp_path / "broken", **settings))["steps"] == 3
    assert list((tmp_path / "broken" / "images").iterdir())
    moved = photograph.rename(tmp_path / f"moved{photograph.suffix}")
    with pytest.raises(UserError, match=r"photograph\.(png|npz) does not exist"):
        train(command.parse(["--resume", str(tmp_path / "broken")]))
    resumed = command.parse(["--resume", str(tmp_path / "broken"), "--images", str(moved)])
    assert resumed.images == (moved,)
    summary = train(resumed)
    assert summary["steps"] == 8
    assert_same_student(tmp_path / "whole", tmp_path / "broken")
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["images_class_counts"] == whole["images_class_counts"]
    assert summary["agreement_fresh"] == whole["agreement_fresh"]


def test_a_run_goes_on_with_its_own_images_only(tmp_path, photograph):
    train(tiny(tmp_path / "with", images=(photograph,), steps=2))
    train(tiny(tmp_path / "without", steps=2))
    Image.fromarray(noise(96, 128, 3)).save(tmp_path / "other.png")
    for folder in ("with", "without"):
        config = command.parse(
            ["--resume", str(tmp_path / folder), "--images", str(tmp_path / "other.png")]
        )
        with pytest.raises(UserError, match="was begun with other images, or without; give the"):
            train(config)


def test_distill_takes_paths_and_tensors(tmp_path, photograph):
    common = dict(
        image_shape=(1, 32, 32), preset="mnist", steps=3, batch_size=16, bank_images=64,
        student_batch_size=16, student_updates=2, generator_width=8, precision="fp32",
    )  # fmt: skip
    teacher = LeNet5()
    for name, images in (
        ("path", photograph), ("paths", [str(photograph)]), ("tensor", torch.randn(20, 1, 32, 32)),
    ):  # fmt: skip
        result = distill(
            teacher, LeNet5Half(), images=images, generator="none", out_dir=tmp_path / name,
            **common,
        )  # fmt: skip
        words = "20 images" if name == "tensor" else "1 photograph"
        assert result.summary["images"] == words
        assert student_of(tmp_path / name)["fc2.weight"].isfinite().all()
    again = {**common, "steps": 4, "generator": "none"}
    result = distill(teacher, LeNet5Half(), resume=tmp_path / "path", **again)
    assert result.summary["steps"] == 4 and result.summary["images"] == "1 photograph"
    with pytest.raises(UserError, match="without images; give it some with --images"):
        distill(teacher, LeNet5Half(), resume=tmp_path / "tensor", **again)


def test_settings_that_do_not_fit(tmp_path, photograph):
    with pytest.raises(UserError, match="--images need --student-source bank, got same"):
        make_config("mnist", "published", images=(photograph,))
    with pytest.raises(UserError, match="--generator none leaves the student without images"):
        train(tiny(tmp_path / "run", generator="none"))
    unknown = dict(image_shape=(3, 8, 8), mean=None, std=None)
    config = make_config("custom", images=(photograph,), **unknown)
    with pytest.raises(UserError, match="--mean and --std are needed .* or to learn from them"):
        _ = config.image_format
    config = make_config("mnist", num_classes=4, **SMALL)
    with pytest.raises(UserError, match="--images-candidates must be a multiple of .* 3, .* 16"):
        found_of(config, given(noise(32, 32)), skewed, World(0, 3))
    with pytest.raises(UserError, match="--student-source bank, got fresh"):
        distill(
            LeNet5(), LeNet5Half(), image_shape=(1, 32, 32), preset="mnist", recipe="paper",
            images=torch.randn(4, 1, 32, 32), out_dir=tmp_path / "paper", steps=1,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "settings", "sentence"),
    [
        ("fast", {"images_share": 0.25}, "--images-share 0.25 means nothing without --images"),
        ("fast", {"images_candidates": 64}, "--images-candidates 64 means nothing without"),
        ("paper", {"student_after": 9}, "--student-after 9 means nothing with --student-source fr"),
        ("published", {"student_after": 9}, "means nothing with --student-source same"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(recipe, settings, sentence, tmp_path):
    out = tmp_path / "run"
    config = make_config("mnist", recipe, eval="none", steps=1, out_dir=out, **settings)
    with pytest.raises(UserError, match=sentence):
        train(config)
    assert not out.exists()


def test_a_setting_that_is_given_as_the_recipe_has_it_is_refused_too(
    tmp_path, photograph, monkeypatch, capsys
):
    for words, sentence in (
        (("--images-share", "0.5"), "--images-share 0.5 means nothing without --images"),
        (("--images", str(photograph), "--generator", "none", "--images-share", "0.5"),
         "--images-share 0.5 means nothing with --generator none"),
        (("--images", str(photograph), "--generator", "none", "--student-after", "7"),
         "--student-after 7 means nothing with --generator none"),
    ):  # fmt: skip
        code, _, errors = run(monkeypatch, capsys, "mnist", "--eval", "none", "--steps", "1",
                              "--out-dir", str(tmp_path / "run"), *words)  # fmt: skip
        assert code == 2 and sentence in errors


def test_recipes_have_nothing_that_is_refused(tmp_path):
    """The wait for generated images is the recipe's own, and the user chose another source."""
    summary = distill(
        LeNet5(), LeNet5Half(), image_shape=(1, 32, 32), steps=1, student_source="fresh",
        student_updates=1, batch_size=8, generator_width=8, bank_held_out=0, adapt=False,
        precision="fp32", out_dir=tmp_path / "run",
    ).summary  # fmt: skip
    assert summary["steps"] == 1


@pytest.mark.parametrize("wrong", [[torch.zeros(3, 8, 8)], np.zeros((2, 3, 8, 8)), [1]])
def test_images_are_paths_or_one_tensor(wrong, tmp_path):
    with pytest.raises(UserError, match="images must be paths .* or one tensor") as raised:
        distill(LeNet5(), LeNet5Half(), image_shape=(1, 32, 32), images=wrong, max_seconds=1.0)
    assert len(str(raised.value)) < 200


class Detached(LeNet5):
    """Gives no gradient to its images."""

    def forward(self, images):
        return super().forward(images).detach()


def test_only_a_generator_needs_the_teachers_gradient(tmp_path):
    settings = dict(
        image_shape=(1, 32, 32), preset="mnist", steps=2, batch_size=8, student_updates=1,
        bank_images=16, precision="fp32", images=torch.randn(16, 1, 32, 32),
    )  # fmt: skip
    with pytest.raises(UserError, match="gives no gradient to its images"):
        distill(Detached(), LeNet5Half(), out_dir=tmp_path / "a", **settings)
    result = distill(Detached(), LeNet5Half(), generator="none", out_dir=tmp_path / "b", **settings)
    assert result.summary["student_images"] > 0


def test_a_panorama_stays_one_that_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("dafl_fast.unlabelled.LONGEST_SIDE", 64)
    Image.fromarray(noise(1, 20, 400)[0]).save(tmp_path / "wide.png")
    (photograph,) = read_images([tmp_path / "wide.png"], Format(8, 1, (0.5,), (0.5,))).photographs
    assert photograph.shape == (1, 16, 320)  # twice the network's side at least

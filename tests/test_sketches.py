"""Sketches that nobody made, for whom they are chosen, and runs whose student learns from them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dafl_fast import distill
from dafl_fast.adapt import _strokes_that_tell, adapted
from dafl_fast.data import FORMATS, Format
from dafl_fast.engine.distributed import World
from dafl_fast.engine.evaluation import accuracy_on, eval_set
from dafl_fast.engine.prepare import prepare
from dafl_fast.errors import UserError
from dafl_fast.export import export_student
from dafl_fast.models import LeNet5, LeNet5Half
from dafl_fast.networks.opener import bundled_teacher
from dafl_fast.recipes import PRESETS, make_config
from dafl_fast.sketches import BYTES, COUNT, SIGNS, how_many, sketches
from dafl_fast.unlabelled import Given, given_tensor, with_sketches

from .test_train import interrupted_after, run

FORM = Format((32, 32), 1, (0.1307,), (0.3081,))
MNIST = dict(image_shape=(1, 32, 32), mean=(0.1307,), std=(0.3081,), eval="none")


@pytest.fixture
def few(monkeypatch):
    """Runs draw 128 of them."""
    monkeypatch.setattr("dafl_fast.sketches.COUNT", 128)


class Inverted(nn.Module):
    """A network that has learned from black digits on white ground."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        black, white = ((level - 0.1307) / 0.3081 for level in (0, 1))
        return self.network(black + white - images)


class Coloured(nn.Module):
    """A network for digits that takes three channels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.mean(1, keepdim=True))


def test_the_same_words_draw_the_same_sketches():
    drawn = sketches(40, 3, 32, 28, True)
    assert (drawn.dtype, tuple(drawn.shape)) == (torch.uint8, (40, 3, 32, 28))
    assert torch.equal(drawn[:, 0], drawn[:, 1]) and torch.equal(drawn[:, 0], drawn[:, 2])
    assert torch.equal(sketches(9, 1, 32, 28, True)[:, 0], drawn[:9, 0])
    assert not torch.equal(sketches(9, 1, 32, 28, True, seed=1)[:, 0], drawn[:9, 0])
    assert len({sketch.numpy().tobytes() for sketch in drawn}) == 40
    assert sketches(0, 3, 8, 8, True).shape == (0, 3, 8, 8)
    # Dark ones are light ones with ink and ground exchanged; levels between them are rounded.
    dark = sketches(40, 1, 32, 28, False)[:, 0]
    assert (dark.int() + drawn[:, 0] - 255).abs().max() <= 1


def test_they_are_strokes_on_plain_ground():
    drawn = sketches(500, 1, 32, 32, True).float() / 255
    inked = drawn.mean((1, 2, 3))
    assert (inked > 0.002).all() and (inked < 0.6).all() and 0.05 < inked.mean() < 0.2
    # Nearly all of a sketch is ground or ink, with smooth edges between, in the middle of it.
    assert ((drawn == 0) | (drawn == 1)).float().mean() > 0.85
    where = drawn.mean((0, 1))
    assert where[12:20, 12:20].mean() > 4 * where[:, :3].mean()
    assert abs(where[:16].mean() / where[16:].mean() - 1) < 0.2


@pytest.mark.parametrize(("height", "width"), [(16, 64), (64, 16)])
def test_long_images_have_several_signs(height, width):
    drawn = sketches(100, 1, height, width, True).float()[:, 0]
    parts = drawn.split(16, 2 if width > height else 1)
    for part in parts:
        assert (part.amax((1, 2)) > 100).float().mean() > 0.95
        assert 5 < part.mean() < 60


@pytest.mark.parametrize("size", [(4, 4), (4, 97), (5, 6), (200, 150), (700, 600)])
def test_any_size(size):
    assert sketches(3, 1, *size, False).shape == (3, 1, *size)


def test_large_ones_are_fewer():
    assert how_many(1, 32, 32) == COUNT
    assert how_many(3, 224, 224) == BYTES // (3 * 224 * 224) < COUNT
    assert how_many(1, 16, 64) == SIGNS // 4 and how_many(1, 4, 900) == SIGNS // 8
    assert how_many(3, 10**5, 10**5) == 1


def test_they_join_images(few):
    alone = with_sketches(None, "light", FORM)
    assert alone.words == "128 sketches" and alone.whole.shape == (128, 1, 32, 32)
    assert torch.equal(alone.whole, sketches(128, 1, 32, 32, True))
    photograph = torch.zeros(1, 70, 90, dtype=torch.uint8)
    given = Given([photograph], torch.zeros(4, 1, 32, 32, dtype=torch.uint8), FORM)
    both = with_sketches(given, "dark", FORM)
    assert both.words == "1 photograph and 4 images and 128 sketches"
    assert torch.equal(both.whole[4:], sketches(128, 1, 32, 32, False))
    # What is drawn is the program's; the user's must be the same when a run goes on.
    assert both.fingerprint() == given.fingerprint() != alone.fingerprint()
    tensor = given_tensor(torch.zeros(4, 1, 32, 32), (1, 32, 32))
    with pytest.raises(UserError, match="--sketches dark does not go with images that are a ten"):
        with_sketches(tensor, "dark", FORM)


def test_no_recipe_has_them():
    """They are for some teachers only."""
    assert all(make_config(p, r).sketches == "none" for p in PRESETS for r in PRESETS[p].recipes)


@pytest.mark.parametrize(("wrapper", "kind"), [(nn.Sequential, "light"), (Inverted, "dark")])
def test_they_are_chosen_for_a_network_that_knows_digits(wrapper, kind, caplog):
    config = make_config("custom", steps=10, **MNIST)
    teacher = wrapper(bundled_teacher()).train()
    assert _strokes_that_tell(teacher, config) == kind
    assert all(module.training for module in teacher.modules())
    chosen = adapted(config, teacher, torch.device("cpu"), World())
    assert (chosen.sketches, chosen.dead_leaves) == (kind, 0)
    line = f"chosen for a teacher that tells strokes apart: --sketches {kind}"
    assert line in caplog.messages
    mine = adapted(config, teacher, torch.device("cpu"), World(), ["sketches"])
    assert mine.sketches == "none"


def test_they_are_chosen_for_coloured_images_too():
    config = make_config("custom", steps=10, image_shape=(3, 32, 32), mean=(0.1307,) * 3,
                         std=(0.3081,) * 3, eval="none")  # fmt: skip
    chosen = adapted(config, Coloured(bundled_teacher()), torch.device("cpu"), World())
    assert (chosen.sketches, chosen.dead_leaves) == ("light", 0)


@pytest.mark.parametrize("sure", [0.0, 1.0])
def test_they_are_not_chosen_for_a_network_that_tells_nothing_of_them(sure):
    """It doubts them all, or is sure of one class for all."""

    class Same(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = images.new_zeros(len(images), 10)
            logits[:, 3] = 50 * sure
            return logits + 0 * images.mean((1, 2, 3)).unsqueeze(1)

    config = make_config("custom", steps=10, **MNIST)
    assert _strokes_that_tell(Same(), config) == "none"
    assert adapted(config, Same(), torch.device("cpu"), World()).sketches == "none"


def test_they_are_not_chosen_where_the_student_has_no_bank():
    config = make_config("custom", "published", steps=10, adapt=True, **MNIST)
    assert adapted(config, bundled_teacher(), torch.device("cpu"), World()).sketches == "none"


def test_custom_draws_none_beside_images_of_the_user(tmp_path):
    images = torch.randn(9, 1, 32, 32)
    small = dict(steps=1, batch_size=8, student_batch_size=8, bank_images=64, precision="fp32")
    summary = distill(bundled_teacher(), LeNet5Half(), image_shape=(1, 32, 32), images=images,
                      out_dir=tmp_path / "run", **small).summary  # fmt: skip
    assert summary["images"] == "9 images"


@pytest.mark.parametrize("generator", [None, "none"])
def test_a_run_with_them(few, tmp_path, generator):
    settings = dict(
        image_shape=(1, 32, 32), steps=2, batch_size=8, student_batch_size=8, student_updates=1,
        bank_images=64, precision="fp32", out_dir=tmp_path / "run", student_after=0,
    )  # fmt: skip
    if generator:
        del settings["student_after"]
        settings["generator"] = generator
    summary = distill(bundled_teacher(), LeNet5Half(), **settings).summary
    assert summary["images"].startswith("128 sketches")
    assert summary["images_share"] == (1.0 if generator else 0.5)
    assert (summary["generator_images"] == 0) == bool(generator)
    del settings["out_dir"]
    again = {**settings, "steps": 3, "resume": tmp_path / "run"}
    summary = distill(bundled_teacher(), LeNet5Half(), **again).summary
    assert summary["steps"] == 3 and summary["images"].startswith("128 sketches")


def test_a_student_of_sketches_alone_knows_digits(tmp_path):
    """No digit, and no generator."""
    torch.manual_seed(0)
    teacher, student = bundled_teacher(), LeNet5Half()
    settings = {name: value for name, value in MNIST.items() if name != "eval"}
    distill(teacher, student, generator="none", steps=30, precision="fp32", seed=0,
            out_dir=tmp_path / "run", **settings)  # fmt: skip
    assert accuracy_on(student, eval_set("mnist-5k", FORMATS["mnist"], 10))[0] > 0.94


def test_a_teacher_that_is_slow_gets_smaller_batches_with_them_too(monkeypatch):
    """They take its time, as crops of photographs do."""
    monkeypatch.setattr("dafl_fast.adapt._seconds_of_one", lambda *_: 0.02)
    config = make_config("custom", steps=None, max_seconds=1200.0, threads=1, **MNIST)
    teacher = LeNet5()
    without = adapted(config, teacher, torch.device("cpu"), World(), ["dead_leaves"])
    config = dataclasses.replace(config, sketches="light")
    with_them = adapted(config, teacher, torch.device("cpu"), World())
    assert without.dead_leaves == 6 and without.batch_size == with_them.batch_size == 32
    config = dataclasses.replace(config, sketches="none", dead_leaves=0)
    assert adapted(config, teacher, torch.device("cpu"), World()).batch_size == 64


def test_where_they_have_no_place(tmp_path, monkeypatch, capsys):
    for words, sentence in (
        (("--recipe", "published", "--sketches", "dark"),
         "--sketches dark means nothing with --student-source same; leave it out"),
        (("--generator", "none"), "or draw some with --dead-leaves or --sketches"),
        (("--generator", "none", "--sketches", "none"), "or draw some with --dead-leaves or"),
    ):  # fmt: skip
        code, _, errors = run(monkeypatch, capsys, "mnist", "--eval", "none", "--steps", "1",
                              "--out-dir", str(tmp_path / "run"), *words)  # fmt: skip
        assert code == 2 and sentence in errors, errors
    assert not (tmp_path / "run").exists()


SMALL = dict(
    steps=1, batch_size=8, student_batch_size=8, student_updates=1, bank_images=64,
    precision="fp32", **MNIST,
)  # fmt: skip


def distilled(folder, **settings):
    del (settings := SMALL | settings)["eval"]
    result = distill(bundled_teacher(), LeNet5Half(), out_dir=folder / "run", **settings)
    export_student(result, folder / "s.safetensors", "safetensors")
    return result.summary


def test_a_slow_teacher_answers_few_before_the_first_step():
    config = make_config("custom", sketches="light", dead_leaves=0, num_classes=10, **MNIST)
    given = with_sketches(None, "light", FORM)
    teacher, device = bundled_teacher(), torch.device("cpu")
    step = prepare(config, teacher, LeNet5Half(), device, "fp32", given=given)
    assert len(given.whole) == COUNT and step.found.bank.added == 256
    # Strokes upside down are as good strokes, which says nothing of images.
    assert not step.found.cutter.half_turns and step.found.words == "4,096 sketches"


def test_some_of_the_whole_images():
    whole = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 32, 32).to(torch.uint8)
    given = Given([], whole, FORM, sketches=3)
    part = given.part(torch.tensor([True, False, True, False, True]))
    assert part.whole[:, 0, 0, 0].tolist() == [0, 2, 4] and (part.own, part.sketches) == (1, 2)
    assert part.words == "1 image and 2 sketches"


def test_those_alone_tell_nothing_of_real_images(few, tmp_path):
    """They may be nothing like these."""
    assert distilled(tmp_path, generator="none", steps=20)["estimated_agreement"] is None


def test_sketches_or_drawn_pictures(few, tmp_path):
    """What the user says comes in place of what the recipe has."""
    assert distilled(tmp_path / "a", sketches="dark")["images"] == "128 sketches"
    assert distilled(tmp_path / "b", dead_leaves=1)["images"] == "1 drawn picture"
    both = distilled(tmp_path / "c", dead_leaves=1, sketches="dark")
    assert both["images"] == "1 drawn picture and 128 sketches"


def test_what_is_chosen_counts_for_other_settings(few, tmp_path):
    assert distilled(tmp_path / "a", images_share=0.3, dead_leaves=0)["images_share"] == 0.3
    with pytest.raises(UserError, match="--images-share 0.3 means nothing without --images, --de"):
        distilled(tmp_path / "b", images_share=0.3, sketches="none")
    with pytest.raises(UserError, match="--generator none leaves the student without images"):
        distilled(tmp_path / "c", generator="none", sketches="none")


def test_the_card_of_a_student_that_never_learned_says_so(few, tmp_path):
    with interrupted_after(2):
        summary = distilled(tmp_path, dead_leaves=0, student_after=500, bank_images=600, steps=200)
    assert summary["student_images"] == 0 and summary["steps"] == 2
    card = (tmp_path / "s.safetensors.md").read_text()
    assert "It has learned nothing" in card and "was shown" not in card


@pytest.mark.parametrize(
    ("images", "sentences"),
    [
        (None, ["LeNet5Half, distilled without data\n", "no image of the teacher's training data",
                "50 % of what it was shown, without labels: 128 sketches. Sketches and drawn"]),
        ("one.png", ["LeNet5Half, distilled with images of its maker's\n", "is not recorded.\n",
                     "1 photograph. Its maker gave the images and photographs.\n"]),
    ],
)  # fmt: skip
def test_the_card_says_whose_images_they_are(few, tmp_path, images, sentences):
    settings = {}
    if images:
        Image.new("L", (90, 80)).save(tmp_path / images)
        settings["images"] = tmp_path / images
    distilled(tmp_path, dead_leaves=0, **settings)
    card = (tmp_path / "s.safetensors.md").read_text()
    assert all(sentence in card for sentence in sentences), card

"""Pictures of shapes that hide one another, and runs whose student learns from their crops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dafl_fast import distill
from dafl_fast import train as command
from dafl_fast.data import Format
from dafl_fast.dead_leaves import dead_leaves
from dafl_fast.distill import train
from dafl_fast.engine.prepare import prepare
from dafl_fast.errors import UserError
from dafl_fast.recipes import PRESETS, make_config
from dafl_fast.records import Run
from dafl_fast.unlabelled import Given, with_dead_leaves

from .test_train import assert_same_student, interrupted_after, run, tiny

FORM = Format(8, 3, (0.5,) * 3, (0.25,) * 3)


class Network(nn.Sequential):
    """Two classes, with BatchNorm: `custom` takes it for a network that knows photographs."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(4, 2),
        )  # fmt: skip


SMALL = dict(
    image_shape=(3, 8, 8), steps=2, batch_size=8, bank_images=64, student_batch_size=8,
    student_updates=1, generator_width=8, images_candidates=16, precision="fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures():
    return dead_leaves(2, 3, 512)


def test_the_same_words_draw_the_same_pictures(pictures):
    assert [(p.dtype, tuple(p.shape)) for p in pictures] == [(torch.uint8, (3, 512, 512))] * 2
    again = dead_leaves(1, 3, 512)
    assert torch.equal(again[0], pictures[0]) and not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(dead_leaves(1, 3, 64, seed=1)[0], dead_leaves(1, 3, 64)[0])
    assert dead_leaves(0, 3, 64) == ()


def test_they_are_as_photographs_are(pictures):
    for picture in pictures:
        x = picture.double()
        assert 100 < x.mean() < 156 and 40 < x.std() < 90
        # Neighbours are nearly always alike, and sometimes not at all: there are edges.
        steps = (x[:, :, 1:] - x[:, :, :-1]).abs().flatten()
        assert steps.median() < 12 and steps.quantile(0.98) > 60
        # Much is left of them from afar: they have details of all sizes. White noise keeps 1/16.
        assert F.avg_pool2d(x, 16).std() > 0.4 * x.std()
        # Colours are alike, but not grey.
        alike = torch.corrcoef(x.flatten(1))[0, 1:]
        assert (alike > 0.6).all() and (alike < 0.98).all()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(channels):
    (picture,) = dead_leaves(1, channels, 128)
    assert picture.shape == (channels, 128, 128) and picture.double().std() > 30


def test_they_join_photographs(pictures):
    alone = with_dead_leaves(None, 2, FORM)
    assert alone.words == "2 drawn pictures" and alone.photographs[0].shape == (3, 1024, 1024)
    photograph = torch.zeros(3, 40, 50, dtype=torch.uint8)
    given = Given([photograph], torch.zeros(4, 3, 8, 8, dtype=torch.uint8), FORM)
    both = with_dead_leaves(given, 1, FORM)
    assert both.words == "1 photograph and 4 images and 1 drawn picture"
    assert torch.equal(both.photographs[0], photograph) and len(both.photographs) == 2
    # What is drawn is the program's; the user's must be the same when a run goes on.
    assert both.fingerprint() == given.fingerprint() != alone.fingerprint()
    large = with_dead_leaves(None, 1, Format((300, 700), 1, (0.5,), (0.25,)))
    assert large.photographs[0].shape == (1, 1400, 1400)


def test_recipes_that_know_photographs_have_some():
    assert make_config("custom").dead_leaves > 0 and make_config("cifar10").dead_leaves > 0
    assert make_config("mnist").dead_leaves == 0
    assert all(make_config(p, r).dead_leaves == 0 for p in PRESETS for r in ("paper", "published"))


def test_small_batches_have_fewer_candidates():
    """The teacher answers them all, which may take as long as all the rest."""
    assert make_config("custom", batch_size=128).candidates == 256
    assert make_config("custom", batch_size=512).candidates == 256
    assert make_config("custom", batch_size=16).candidates == 32
    assert make_config("custom", batch_size=16, images_candidates=200).candidates == 200


def test_a_run_with_them(tmp_path, caplog):
    torch.manual_seed(0)
    teacher, student = Network(), Network()
    summary = distill(teacher, student, dead_leaves=1, out_dir=tmp_path / "run", **SMALL).summary
    assert summary["images"] == "1 drawn picture" and summary["images_share"] == 0.5
    assert sum(summary["images_class_counts"]) == 2 * 16 // 4
    again = {**SMALL, "steps": 4}
    summary = distill(teacher, student, resume=tmp_path / "run", **again).summary
    assert summary["steps"] == 4 and summary["images"] == "1 drawn picture"


@pytest.mark.parametrize("drawn", [True, False])
def test_batch_norm_is_measured_on_drawn_pictures_only(drawn, monkeypatch):
    form = Format(8, 3, (0.0,) * 3, (1 / 255,) * 3)
    picture = [torch.full((3, 40, 50), 9, dtype=torch.uint8)]
    given = Given(picture, torch.empty((0, 3, 8, 8), dtype=torch.uint8), form, int(drawn))
    settings = {**SMALL, "bank_flip": True, "bank_crop": 2, "bank_dtype": "fp32"}
    config = make_config("custom", num_classes=2, eval="none", student_after=0, **settings)
    step = prepare(config, Network(), Network(), torch.device("cpu"), "fp32", given=given)
    seen = []
    monkeypatch.setattr(step.average, "measure", seen.append)
    for _ in range(2):
        step()
    flat = [(images == images[:, :, :1, :1]).flatten(1).all(1).tolist() for images in seen]
    assert flat == [[True] * 8 if drawn else [True] * 4 + [False] * 4] * 2


def test_a_run_with_nothing_else(tmp_path):
    summary = distill(
        Network(), Network(), generator="none", dead_leaves=1, out_dir=tmp_path / "run", **SMALL
    ).summary
    assert summary["images_share"] == 1.0 and summary["generator_images"] == 0


def test_the_recipe_draws_none_beside_images_of_the_user(tmp_path):
    images = torch.randn(9, 3, 8, 8)
    teacher, student = Network(), Network()
    small = {k: v for k, v in SMALL.items() if k != "images_candidates"}
    result = distill(teacher, student, images=images, out_dir=tmp_path / "run", **small)
    assert result.summary["images"] == "9 images"
    assert Run.read(tmp_path / "run").config.dead_leaves == 0
    with pytest.raises(UserError, match="--dead-leaves 1 does not go with images that are a ten"):
        distill(teacher, student, images=images, dead_leaves=1, **small)


@pytest.mark.parametrize(
    ("sides", "generator", "words"),
    [
        ((40, 50), "auto", "1 photograph and 6 drawn pictures"),
        ((40, 50), "none", "1 photograph"),
        ((9, 9), "auto", "1 image"),
    ],
)
def test_the_recipe_draws_some_beside_photographs(tmp_path, sides, generator, words):
    picture = torch.randint(256, (*sides, 3), dtype=torch.uint8).numpy()
    Image.fromarray(picture).save(tmp_path / "one.png")
    given = {**SMALL, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    given["generator"] = "none" if generator == "none" else None
    teacher, images, run = Network(), tmp_path / "one.png", tmp_path / "run"
    result = distill(teacher, Network(), images=images, out_dir=run, **given)
    assert result.summary["images"] == words
    result = distill(teacher, Network(), resume=run, **{**given, "steps": 3})
    assert result.summary["images"] == words and result.summary["steps"] == 3


@pytest.mark.parametrize("drawn", [{"dead_leaves": 1}, {"sketches": "light"}])
def test_a_stopped_run_goes_on_bit_by_bit(tmp_path, monkeypatch, drawn):
    monkeypatch.setattr("dafl_fast.sketches.COUNT", 128)
    settings = dict(images_candidates=16, steps=6, **drawn)
    train(tiny(tmp_path / "whole", **settings))
    with interrupted_after(3):
        assert train(tiny(tmp_path / "broken", **settings))["steps"] == 3
    summary = train(command.parse(["--resume", str(tmp_path / "broken")]))
    assert summary["steps"] == 6
    assert_same_student(tmp_path / "whole", tmp_path / "broken")


def test_where_they_have_no_place(tmp_path, monkeypatch, capsys):
    for words, sentence in (
        (("--recipe", "published", "--dead-leaves", "2"),
         "--dead-leaves 2 means nothing with --student-source same; leave it out"),
        (("--dead-leaves", "-1"), "--dead-leaves must be 0 to 64, got -1"),
        (("--generator", "none"), "give it some with --images or draw some with --dead-leaves"),
    ):  # fmt: skip
        code, _, errors = run(monkeypatch, capsys, "mnist", "--eval", "none", "--steps", "1",
                              "--out-dir", str(tmp_path / "run"), *words)  # fmt: skip
        assert code == 2 and sentence in errors, errors
    assert not (tmp_path / "run").exists()

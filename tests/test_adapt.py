"""Settings that suit a teacher: which are chosen, which are left, and what is said of them."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dafl_fast import FrozenTeacher, distill
from dafl_fast.adapt import ADAPTED, OF_GENERATOR, _choices, _seconds_of_one, adapted
from dafl_fast.engine.distributed import World
from dafl_fast.engine.folder import read_config
from dafl_fast.engine.prepare import random_images
from dafl_fast.recipes import WITHOUT_BATCH_NORM, make_config
from dafl_fast.train import named

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def usual_size(monkeypatch, request):
    """Of the BatchNorm loss of these small teachers, where nothing else is tested."""
    if "factor" not in request.fixturenames:
        monkeypatch.setattr("dafl_fast.adapt._weight_of_batch_norm", lambda *given: given[-1])


class Plain(nn.Sequential):
    """A network without BatchNorm."""

    def __init__(self, classes=5, norm=nn.Identity):
        super().__init__(
            nn.Conv2d(3, 16, 1), norm(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, classes),
        )  # fmt: skip


def normed(classes=5):
    return Plain(classes, lambda: nn.BatchNorm2d(16))


def config(**given):
    return make_config("custom", **{"image_shape": (3, 8, 8), "steps": 3, **given})


def changed(before, teacher):
    after = adapted(before, teacher, CPU, World())
    return {
        name: getattr(after, name)
        for name in vars(after)
        if getattr(after, name) != getattr(before, name)
    }


def test_a_teacher_with_batch_norm_and_many_classes_gets_the_recipe():
    assert changed(config(), normed()) == {}


def test_one_without_batch_norm_gets_the_settings_found_for_such(caplog):
    found = changed(config(), Plain())
    assert found == {
        name: value
        for name, value in WITHOUT_BATCH_NORM.items()
        if getattr(config(), name) != value
    }
    assert found["generator_width"] == 32 and found["diversity"] == 1.0
    (line,) = [one.getMessage() for one in caplog.records]
    assert line.startswith("chosen for a teacher without BatchNorm: --generator-width 32, ")
    assert found.keys() <= ADAPTED
    many = adapted(config(), Plain(33), CPU, World())
    assert (many.batch_size, config().batch_size, make_config("mnist").batch_size) == (
        256,
        128,
        256,
    )
    # Nothing is chosen for a generator that there is not.
    alone = changed(config(generator="none", images=("photos",)), Plain())
    assert alone == {name: value for name, value in found.items() if name not in OF_GENERATOR}
    assert alone["student_batch_size"] == 256 and OF_GENERATOR & found.keys()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_not_said_to_have_no_batch_norm(caplog):
    images = torch.randn(4, 3, 8, 8)
    changed(config(), torch.jit.trace(normed().eval(), images))
    changed(config(), torch.jit.trace(Plain().eval(), images))
    hidden, none = (one.split(":")[0] for one in caplog.messages)
    assert hidden == (
        "chosen for a TorchScript teacher, which does not show its BatchNorm layers, as a program "
        "of torch.export does"
    )
    assert none == "chosen for a teacher without BatchNorm"


class LeftOrRight(nn.Module):
    """Tells on which side of an image it is lighter."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(3), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.norm(x).mean((1, 2)).tensor_split(2, 1)
        return self.out(torch.stack([left.mean(1), right.mean(1)], 1) * 20)


def test_images_are_mirrored_if_the_teacher_knows_them_mirrored(caplog):
    assert "bank_flip" not in changed(config(), normed())
    torch.manual_seed(0)
    assert changed(config(), LeftOrRight()) == {"bank_flip": False, "dead_leaves": 0}
    assert caplog.messages == [
        "chosen for a teacher that takes mirrored images for others: --no-bank-flip, "
        "--dead-leaves 0"
    ]


class ByKeyword(Plain):
    def forward(self, x):
        x = self[1](input=self[0](x))
        for layer in list(self)[2:]:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("factor", "weight"), [(1.0, None), (1.9, None), (0.55, None), (40.0, 0.025), (0.1, 10.0)]
)
def test_the_batch_norm_loss_gets_its_usual_size(monkeypatch, factor, weight):
    """That of noise is a number of times that of the recipe's own teacher."""
    torch.manual_seed(0)
    teacher = ByKeyword(norm=lambda: nn.BatchNorm2d(16)) if factor == 40.0 else normed()
    frozen = FrozenTeacher(teacher, watch=True)
    frozen(random_images(config(), 16))
    value = frozen.batch_norm_loss(World()).item()
    monkeypatch.setattr("dafl_fast.adapt.BATCH_NORM", value / factor)
    found = changed(config(), teacher)
    assert found == ({} if weight is None else {"bn_statistics": weight})
    assert not teacher[1]._forward_pre_hooks


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_pictures_are_drawn_for_grey_and_coloured_images_only(channels, caplog):
    teacher = nn.Sequential(
        nn.Conv2d(channels, 3, 1), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(3, 5),
    )  # fmt: skip
    found = changed(config(image_shape=(channels, 32, 32), bn_statistics=2.0, bank_flip=False),
                    teacher)  # fmt: skip
    assert found == ({} if channels in (1, 3) else {"dead_leaves": 0})


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_get_more_diversity(classes, caplog):
    assert changed(config(), normed(classes)) == {"diversity": 3.0}
    assert caplog.messages == [f"chosen for {classes} classes: --diversity 3.0"]
    assert changed(config(), Plain(classes))["diversity"] == 3.0


def test_what_the_user_says_stays():
    mine = {"generator_width": 16, "diversity": 0.5, "batch_size": 20, "bank_images": 100}
    found = changed(config(**mine), Plain(2))
    assert found and not found.keys() & mine.keys()
    assert changed(config(adapt=False), Plain(2)) == {}
    assert changed(config(recipe="published"), Plain(2)) == {}
    assert changed(make_config("mnist"), Plain(2)) == {}


def test_what_the_user_gives_stays_also_if_the_recipe_has_it(tmp_path, monkeypatch, capsys):
    usual = config()
    given = dict(student_lr=usual.student_lr, bank_flip=True, steps=2, image_shape=(3, 8, 8),
                 batch_size=8, student_batch_size=8, bank_images=32, precision="fp32")  # fmt: skip
    distill(Plain(2), Plain(2), out_dir=tmp_path / "a", **given)
    kept = read_config(tmp_path / "a")
    assert kept["student_lr"] == usual.student_lr and kept["bank_flip"] is True
    assert kept["temperature"] == 4.0  # not given
    arguments = ["--student-lr", "3e-3", "--no-bank-flip", "--temperature=8", "--seed", "1"]
    assert named(arguments) >= {"student_lr", "bank_flip", "temperature", "seed"}
    assert not named(["custom", "3"])


def test_a_slow_teacher_gets_smaller_batches(monkeypatch, caplog):
    monkeypatch.setattr("dafl_fast.adapt._seconds_of_one", lambda *_: 0.02)
    bounded = config(steps=None, max_seconds=500.0, threads=1)
    # 3 passes of 0.02 s for each image and 1 for each of two crops, 300 times in 500 s: 16 images.
    assert changed(bounded, normed()) == {"batch_size": 16, "student_batch_size": 16}
    assert caplog.messages == [
        "chosen for a teacher that takes 20 ms for an image: --batch-size 16, "
        "--student-batch-size 16"
    ]
    # Crops of the user's images take the teacher's time, too, and no crops take none.
    alone = config(steps=None, max_seconds=600.0, dead_leaves=0, threads=1)
    assert changed(alone, normed())["batch_size"] == 32
    with_images = dataclasses.replace(alone, images=(Path("photograph.jpg"),))
    assert changed(with_images, normed())["batch_size"] == 16
    none = dataclasses.replace(with_images, generator="none")
    assert changed(none, normed())["batch_size"] == 32
    # Threads and processes share a batch.
    assert changed(dataclasses.replace(bounded, threads=4), normed())["batch_size"] == 64
    assert _choices(bounded, normed(), CPU, 2, ())["batch_size"] == 32
    assert changed(config(steps=10), normed()) == {}  # the same on any machine
    assert changed(config(steps=10, max_seconds=1.0), normed()) == {}


class Waiting(nn.Module):
    """Takes `waits` seconds without the processor, as beside other programs, `works` with it."""

    def __init__(self, waits=0.0, works=0.0):
        super().__init__()
        self.waits, self.works = waits, works

    def forward(self, x):
        time.sleep(self.waits)
        end = time.thread_time() + self.works
        while time.thread_time() < end:
            pass
        return x.mean((2, 3))


def test_a_teacher_is_not_slow_because_of_other_programs():
    images = torch.zeros(4, 3, 8, 8)
    assert _seconds_of_one(Waiting(waits=0.1), images) < 0.005
    threads = torch.get_num_threads()
    assert _seconds_of_one(Waiting(works=0.08), images) == pytest.approx(0.02, rel=0.3)
    assert torch.get_num_threads() == threads


def test_looking_at_the_teacher_counts_as_time_of_the_run(monkeypatch, tmp_path):
    module = sys.modules["dafl_fast.distill"]
    monkeypatch.setattr(module, "adapted", lambda config, *_: time.sleep(1.5) or config)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(192, 5)) for _ in range(2)]
    result = distill(
        *networks, image_shape=(3, 8, 8), steps=1, batch_size=8, generator_width=8, bank_images=16,
        student_updates=1, bank_held_out=0, precision="fp32", out_dir=tmp_path / "run",
    )  # fmt: skip
    assert result.summary["wall_seconds"] >= 1.5 > result.summary["train_seconds"]


def test_a_run_goes_on_with_what_was_chosen(tmp_path, caplog):
    given = dict(image_shape=(3, 8, 8), batch_size=8, student_batch_size=8, student_updates=1,
                 bank_images=32, precision="fp32", eval_every=0.0)  # fmt: skip
    torch.manual_seed(0)
    teacher = Plain(2)
    distill(teacher, Plain(2), steps=2, out_dir=tmp_path / "run", **given)
    assert "chosen for 2 classes: --diversity 3.0" in caplog.messages
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "diversity: 3.0" in text and "generator_width: 32" in text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again = distill(teacher, Plain(2), steps=4, resume=tmp_path / "run", **given)
    assert again.summary["steps"] == 4
    assert not [line for line in caplog.messages if "chosen for" in line]


def test_the_time_of_a_forward_pass_is_measured():
    works = 0.02 * torch.get_num_threads()  # which threads would share

    class Slow(Plain):
        def forward(self, x):
            end = time.thread_time() + works
            while time.thread_time() < end:
                pass
            return super().forward(x)

    bounded = config(steps=None, max_seconds=75.0)  # 16 images in 0.02 s: 1.25 ms each
    assert changed(bounded, Slow(norm=lambda: nn.BatchNorm2d(16)))["batch_size"] in (32, 64)

"""What `distill` says of what callers give it, and what it leaves as it was."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dafl_fast import distill
from dafl_fast.errors import UserError
from dafl_fast.recipes import make_config

IMAGES, LABELS = torch.randn(40, 3, 8, 8), torch.arange(40) % 5


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))


def run(folder, teacher=None, student=None, **settings):
    usual = dict(
        image_shape=(3, 8, 8), steps=2, batch_size=8, student_batch_size=8, bank_images=16,
        dead_leaves=0, adapt=False, progress="off", precision="fp32", out_dir=folder / "run",
    )  # fmt: skip
    return distill(teacher or net(), student or net(), **usual | settings)


def refused(folder, sentence, teacher=None, student=None, **settings):
    with pytest.raises(UserError, match=re.escape(sentence)):
        run(folder, teacher, student, **settings)
    assert not (folder / "run").exists()


# -- networks --------------------------------------------------------------------------------------


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return self.inner(x)


class InPlace(Around):
    def forward(self, x):
        x -= 0.5
        return self.inner(x)


class WithoutGradient(Around):
    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)


class FiveDimensions(Around):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, 1, 1, 1, 5))

    def forward(self, x):
        return self.inner(x) + self.shift.flatten()


class Sigmoid(Around):
    def forward(self, x):
        return self.inner(x).sigmoid()


def in_inference_mode():
    with torch.inference_mode():
        return net()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: "LeNet5", "student must be an nn.Module, got 'LeNet5'; dafl_fast.load_network"),
        (lambda: Around, "student must be an nn.Module, got the class Around; give an instance"),
        (lambda: net().state_dict(), "student must be an nn.Module, got a dict; build the network"),
        (lambda: 5, "student must be an nn.Module, got int"),
        (lambda: net().to("meta"), "student has no weights: 0.weight is on the device 'meta'"),
        (lambda: net().requires_grad_(False), "the student has nothing to train: none of its par"),
        (in_inference_mode, "the student was made under torch.inference_mode()"),
        (lambda: WithState(), "the student cannot be saved: _extra_state in its state is dict, no"),
        (WithoutGradient, "its outputs have no gradient; look for torch.no_grad() or detach()"),
    ],
)
def test_students_that_are_none(tmp_path, make, sentence):
    refused(tmp_path, sentence, student=make())


def test_a_student_that_shares_layers_with_the_teacher(tmp_path):
    teacher = net()
    student = nn.Sequential(*list(teacher.children())[:3], nn.Linear(288, 5))
    said = "the student's 0.weight is the teacher's own, which training would change"
    refused(tmp_path, said, teacher, student)
    refused(tmp_path, "two networks, got the same twice", teacher, teacher)


@pytest.mark.parametrize("recipe", ["fast", "published"])
def test_a_student_may_write_into_its_images(tmp_path, recipe):
    results = []
    for name, network in (("a", InPlace()), ("b", net())):
        if name == "b":  # the same, but for what happens to the images
            network = nn.Sequential(Minus(), *network)
            network[1].load_state_dict(net()[0].state_dict())
        result = run(tmp_path / name, student=network, recipe=recipe, batch_size=8)
        results.append([p.detach() for p in network.parameters()])
        assert result.summary["student_images"] > 0
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


class Minus(nn.Module):
    def forward(self, x):
        return x - 0.5


@pytest.mark.parametrize("view", [False, True])
def test_a_teacher_may_write_into_its_images(tmp_path, view):
    """Also one that runs on contiguous images only."""

    class Teacher(InPlace):
        def forward(self, x):
            return super().forward(x.view(len(x), -1).view(x.shape) if view else x)

    held_out = IMAGES.clone()
    results = [
        run(
            tmp_path / name, teacher, eval_loader=[(held_out, LABELS)], eval_every=1e-6, log_every=1
        )
        for name, teacher in (("a", Teacher()), ("b", nn.Sequential(Minus(), *net())))
    ]
    assert torch.equal(held_out, IMAGES)
    one, two = (result.student.state_dict() for result in results)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-6)
    assert results[0].summary["teacher_accuracy"] == results[1].summary["teacher_accuracy"]


def test_weights_of_five_dimensions(tmp_path):
    result = run(tmp_path, FiveDimensions(), FiveDimensions())
    assert result.student.shift.shape == (1, 1, 1, 1, 5) and result.student.shift.abs().sum() > 0


class OnlyInTraining(Around):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return self.inner(x)


def test_a_student_with_gradients_in_training_only(tmp_path):
    before = net()[3].weight.detach()
    assert (run(tmp_path, student=OnlyInTraining()).student.inner[3].weight != before).any()


def test_a_frozen_layer_may_be_the_teachers(tmp_path):
    teacher = net().requires_grad_(False)
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), teacher[3])
    before = teacher[3].weight.clone()
    run(tmp_path, teacher, student)
    assert torch.equal(teacher[3].weight, before)


CONSTANT = torch.full((1, 1, 1, 1), 0.13)


class WithConstant(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", CONSTANT)

    def forward(self, x):
        return super().forward(x - self.mean)


def test_buffers_that_training_changes_are_the_students_own(tmp_path):
    run(tmp_path, WithConstant(), WithConstant())
    assert CONSTANT.item() == torch.tensor(0.13)
    norm = nn.BatchNorm2d(3)
    said = "the student's 0.running_mean is the teacher's own, which training would change"
    (tmp_path / "2").mkdir()
    norm.requires_grad_(False)
    refused(tmp_path / "2", said, nn.Sequential(norm, *net()), nn.Sequential(norm, *net()))


class WithState(Around):
    def get_extra_state(self):
        return {"version": 2}

    def set_extra_state(self, state):
        pass


def test_lazy_layers_on_both_sides(tmp_path):
    def lazy():
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(5))

    result = run(tmp_path, lazy(), lazy(), student_start="teacher")
    assert result.summary["student_images"] > 0


def test_what_torch_compile_wraps_is_trained(tmp_path):
    student = net()
    result = run(tmp_path, torch.compile(net()), torch.compile(student))
    assert result.student.state_dict().keys() == student.state_dict().keys()
    assert result.summary["teacher"] == "Sequential"


@pytest.mark.parametrize(("student", "told"), [(Sigmoid, True), (Around, False)])
def test_a_student_that_ends_in_a_sigmoid_is_told_of(tmp_path, caplog, student, told):
    with caplog.at_level(logging.WARNING):
        run(tmp_path, student=student())
    assert ("the student ends in a sigmoid" in caplog.text) == told


# -- everything else -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(generator=lambda z: z), "generator must be an nn.Module, got function"),
        (dict(image_shape="3 8 8"), "image_shape must be channels, height and width, as in (3, 32"),
        (dict(image_shape=32), "image_shape must be channels, height and width, as in (3, 32, 32)"),
        (dict(image_shape=(3, 8.5, 8)), "--image-shape must be a whole number, got 8.5"),
        (dict(callbacks=[print, 3]), "callbacks must be functions that take a row, got [<built"),
        (dict(images=Image.new("L", (9, 9))), "images must be paths of photographs, folders or"),
        (dict(images="nowhere.png"), "--images nowhere.png does not exist"),
        (dict(images="a" * 300), "does not exist"),
        (dict(student_weights="x"), "student_weights is for commands, distill() takes no notice"),
        (dict(eval="mnist"), "eval is for commands, distill() takes no notice of it: give eval_lo"),
        (dict(mean=(123.7,) * 3), "--mean must be of pixels in 0..1, so divide it by 255"),
        (dict(mean=0.5), "--mean must be a list of values, got 0.5"),
    ],
)
def test_other_mistakes(tmp_path, settings, sentence):
    refused(tmp_path, sentence, **settings)


def test_the_data_of_a_preset_have_its_channels():
    assert make_config("cifar10", image_shape=(2, 8, 8)).mean is None
    assert make_config("cifar10", image_shape=(3, 8, 8)).mean == make_config("cifar10").mean
    assert make_config("cifar10", image_shape=(2, 8, 8), mean=(0.5, 0.4)).mean == (0.5, 0.4)
    grey = make_config("mnist", image_shape=(3, 32, 32), grey=True)
    assert grey.mean == (0.1307,) and grey.units == ((0.1307,) * 3, (0.3081,) * 3)
    with pytest.raises(UserError, match="--image-shape must be 3 values"):
        make_config("mnist", image_shape=())
    one_for_all = make_config("custom", image_shape=(3, 8, 8), mean=(0.5,), std=(0.25,))
    assert one_for_all.units == ((0.5,) * 3, (0.25,) * 3)


# -- held-out images -------------------------------------------------------------------------------


class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        if index >= len(IMAGES):
            raise IndexError
        return IMAGES[index], int(LABELS[index])


@pytest.mark.parametrize(
    "make",
    [
        lambda: [(IMAGES, LABELS)],
        lambda: (IMAGES, LABELS),
        lambda: [(IMAGES, LABELS.unsqueeze(1))],
        lambda: [(IMAGES.double(), LABELS.int())],
        lambda: [(IMAGES[:0], LABELS[:0]), (IMAGES, LABELS.float())],
        lambda: [(IMAGES, LABELS.numpy().astype(np.uint16))],
        lambda: [(IMAGES.numpy(), LABELS.numpy())],
        lambda: zip(IMAGES.split(8), LABELS.split(8), strict=True),
        lambda: torch.utils.data.DataLoader(Dataset(), batch_size=16),
    ],
)
def test_held_out_images_of_all_kinds_give_the_same_accuracy(tmp_path, make):
    teacher = net()
    right = (teacher(IMAGES).argmax(1) == LABELS).float().mean().item()
    result = run(tmp_path, teacher, eval_loader=make(), eval_every=1e-6, log_every=1)
    assert result.summary["eval_count"] == 40
    assert result.summary["teacher_accuracy"] == pytest.approx(right)
    measured = [row["accuracy"] for row in result.history if "accuracy" in row]
    with torch.no_grad():
        expected = (result.student(IMAGES).argmax(1) == LABELS).float().mean().item()
    assert len(measured) >= 2 and measured[-1] == pytest.approx(expected)


def test_pixels_of_held_out_images_may_be_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8)
    result = run(tmp_path, pixels="0..255", eval_loader=[(images, LABELS)])
    assert result.summary["eval_count"] == 40


@pytest.mark.parametrize(
    ("loader", "came"),
    [
        ([], "got none"),
        (3, "got int"),
        (IMAGES, "got Tensor"),
        (Dataset(), "got Tensor, int, as of a Dataset without DataLoader"),
        ([{"images": IMAGES, "labels": LABELS}], "got dict"),
        ([(IMAGES, LABELS, LABELS)], "got Tensor, Tensor, Tensor"),
        ([(IMAGES.byte(), LABELS)], "got [40, 3, 8, 8] and [40] of torch.uint8 and torch.int64"),
        ([(IMAGES, LABELS + 0.5)], "got [40, 3, 8, 8] and [40] of torch.float32 and torch.float"),
        ([(IMAGES, LABELS), (IMAGES, LABELS + 10)], "got labels from 10 to 14 in batch 2"),
        ((IMAGES, LABELS.tolist()), "got Tensor, list in batch 1"),
        ([(IMAGES, torch.eye(5)[LABELS])], "got [40, 3, 8, 8] and [40, 5]"),
        ([(IMAGES[..., 1:], LABELS)], "got [40, 3, 8, 7] and [40]"),
        ([(IMAGES, LABELS + 1)], "got labels from 1 to 5"),
        ([(IMAGES, LABELS - 1)], "got labels from -1 to 3"),
    ],
)
def test_what_held_out_images_must_be(tmp_path, loader, came):
    said = (
        "eval_loader must give pairs of images [n, 3, 8, 8], floats in the teacher's units, and "
        f"labels [n], whole numbers below 5; {came}"
    )
    refused(tmp_path, said, eval_loader=loader)


# -- what is left as it was ------------------------------------------------------------------------


def test_the_program_around_is_as_before(tmp_path):
    before, search = torch.get_rng_state(), torch.backends.cudnn.benchmark
    teacher, student = net(), net()
    torch.set_rng_state(before)
    rows = []
    with torch.no_grad():
        result = run(tmp_path, teacher, student, log_every=1,
                     callbacks=lambda row: rows.append(dict(row)) or row.clear())  # fmt: skip
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.backends.cudnn.benchmark == search
    assert all(parameter.grad is None for parameter in student.parameters())
    assert result.history == rows and len(rows) >= 2
    with torch.device("meta"):
        assert run(tmp_path / "3", teacher, student).summary["steps"] == 2
        assert torch.empty(1).device.type == "meta"
    assert torch.empty(1).device.type == "cpu"
    with torch.inference_mode():
        assert run(tmp_path / "2", teacher, student).summary["steps"] == 2

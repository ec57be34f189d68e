"""A student that begins with its teacher's weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from dafl_fast.distill import distill, train
from dafl_fast.engine.folder import read_config
from dafl_fast.files import save_weights
from dafl_fast.models import LeNet5, LeNet5Half, build
from dafl_fast.models.inherit import inherit
from dafl_fast.models.pixels import Taking
from dafl_fast.recipes import make_config


def numbers(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture(scope="module")
def resnets():
    torch.manual_seed(0)
    teacher, student = build("ResNet34"), build("ResNet18")
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return teacher, student


def test_all_of_resnet_18_is_in_resnet_34(resnets):
    teacher, student = resnets
    student = copy.deepcopy(student)
    assert inherit(student, teacher) == numbers(student)
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_half_a_network_gets_the_first_channels():
    torch.manual_seed(0)
    teacher, student = LeNet5(), LeNet5Half()
    assert inherit(student, teacher) == numbers(student)
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        corner = theirs[name][tuple(slice(size) for size in value.shape)]
        assert torch.equal(value, corner), name
    # The halves belong together: with the teacher's other channels at zero, both answer alike.
    small = student.state_dict()
    silent = {name: torch.zeros_like(value) for name, value in theirs.items()}
    for name, value in small.items():
        silent[name][tuple(slice(size) for size in value.shape)] = value
    teacher.load_state_dict(silent)
    x = torch.randn(5, 1, 32, 32)
    torch.testing.assert_close(student.eval()(x), teacher.eval()(x))


class Wrapped(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda teacher, student: (Wrapped(teacher), student),
        lambda teacher, student: (teacher, Wrapped(Wrapped(student))),
        lambda teacher, student: (teacher, Taking(student, (0.5,), (0.5,))),
        lambda teacher, student: (nn.Sequential(teacher), nn.Sequential(student)),
    ],
)
def test_wrappers_do_not_hide_the_names(wrap):
    torch.manual_seed(0)
    teacher, student = LeNet5(), LeNet5Half()
    outer = wrap(teacher, student)
    assert inherit(outer[1], outer[0]) == numbers(student)
    first = next(teacher.parameters())
    assert torch.equal(next(student.parameters()), first[: len(first) // 2])


def tensors(**named):
    network = nn.Module()
    for name, value in named.items():
        if isinstance(value, nn.Parameter):
            network.register_parameter(name, value)
        else:
            network.register_buffer(name, value)
    return network


def weight(*shape, dtype=torch.float32, device=None):
    return nn.Parameter(torch.ones(shape, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("own", "theirs", "taken"),
    [
        (weight(2, 3), weight(2, 3, dtype=torch.float16), 6),  # the dtype stays the student's
        (weight(2, 3), weight(4, 3), 6),
        (weight(2, 3), weight(2, 2), 0),  # the teacher's is too small
        (weight(2, 3), weight(2, 3, 1, 1), 0),
        (weight(6), weight(2, 3), 0),
        (weight(2, 3, 3, 3), weight(4, 5, 3, 3), 54),
        (weight(2, 3, 3, 3), weight(4, 5, 5, 5), 0),  # its corner would be another filter
        (weight(2, 3), weight(2, 3, device="meta"), 0),
        (weight(2, 3), "quantised", 0),
        (weight(2, 3), torch.ones(2, 3, dtype=torch.int64), 0),
        (weight(2, 3), torch.eye(3)[:2].to_sparse(), 0),
    ],
)
def test_only_what_fits_is_taken(own, theirs, taken):
    if isinstance(theirs, str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the kind of tensor is deprecated, not gone
            theirs = torch.quantize_per_tensor(torch.ones(2, 3), 1.0, 0, torch.qint8)
    own.data.zero_()
    student = tensors(w=own, other=weight(1))
    assert inherit(student, tensors(w=theirs)) == taken
    assert student.w.dtype == torch.float32 and student.w.sum() == taken
    assert student.other == 1


def test_buffers_alone_are_not_taken():
    student = tensors(mean=torch.zeros(3), w=weight(2))
    assert inherit(student, tensors(mean=torch.ones(3), w=weight(1))) == 0
    assert not student.mean.any()


def test_tied_weights_stay_tied():
    def network():
        first = nn.Linear(4, 4)
        second = nn.Linear(4, 4)
        second.weight = first.weight
        return nn.Sequential(first, second)

    student, teacher = network(), network()
    inherit(student, teacher)
    assert student[0].weight is student[1].weight
    assert torch.equal(student[0].weight, teacher[0].weight)


def test_a_module_without_parameters():
    assert inherit(nn.ReLU(), nn.ReLU()) == inherit(nn.Linear(2, 2), nn.ReLU()) == 0


SHORT = dict(
    steps=1, batch_size=8, student_batch_size=8, student_updates=1, student_lr=1e-12, ema_decay=0.0,
    student_after=0, bank_images=16, generator_width=4, device="cpu", precision="fp32",
    adapt=False, bn_statistics=0.0, eval="none", eval_every=0.0,
)  # fmt: skip


def first_weights(run):
    return run.student.state_dict()["conv1.weight"]


def test_named_students_begin_as_the_teacher_and_given_ones_as_they_are(tmp_path, caplog):
    torch.manual_seed(0)
    teacher, student = LeNet5(), LeNet5Half()
    own = student.state_dict()["conv1.weight"].clone()
    his = teacher.state_dict()["conv1.weight"][: len(own)]
    shape = (1, 32, 32)
    run = distill(teacher, student, image_shape=shape, out_dir=tmp_path / "a", **SHORT)
    torch.testing.assert_close(first_weights(run), own)
    assert "begins with" not in caplog.text
    run = distill(
        teacher,
        student,
        image_shape=shape,
        out_dir=tmp_path / "b",
        student_start="teacher",
        **SHORT,
    )
    torch.testing.assert_close(first_weights(run), his)
    assert f"in 15,738 of its {numbers(student):,} parameters" in caplog.text
    # By name, with weights for the teacher: as the recipe says.
    weights = tmp_path / "teacher.safetensors"
    save_weights(weights, teacher.state_dict())
    names = dict(teacher="LeNet5", teacher_weights=weights, student="LeNet5Half")
    for name, changes, start in [
        ("c", {}, "teacher"),
        ("d", {"student_start": "own"}, "own"),
        ("e", {"student_weights": tmp_path / "own.safetensors"}, "own"),
    ]:
        save_weights(tmp_path / "own.safetensors", {**LeNet5Half().state_dict()})
        config = make_config("custom", **SHORT | names | changes, image_shape=shape,
                             out_dir=tmp_path / name)  # fmt: skip
        train(config)
        assert read_config(tmp_path / name)["student_start"] == start


def test_a_resumed_student_does_not_begin_anew(tmp_path):
    torch.manual_seed(0)
    teacher, student = LeNet5(), LeNet5Half()
    short = SHORT | dict(student_lr=0.1, steps=2)
    first = distill(
        teacher,
        student,
        image_shape=(1, 32, 32),
        out_dir=tmp_path,
        student_start="teacher",
        **short,
    )
    learned = first_weights(first).clone()
    again = distill(
        teacher, LeNet5Half(), image_shape=(1, 32, 32), resume=tmp_path, **short | {"steps": 2}
    )
    torch.testing.assert_close(first_weights(again), learned)


def test_a_run_without_a_checkpoint_begins_as_the_teacher_again(tmp_path):
    torch.manual_seed(0)
    teacher = LeNet5()
    his = teacher.state_dict()["conv1.weight"][:3].clone()
    given = dict(image_shape=(1, 32, 32), student_start="teacher", **SHORT)
    distill(teacher, LeNet5Half(), out_dir=tmp_path, **given)
    for name in ("checkpoint.pt", "student.safetensors", "summary.json"):
        (tmp_path / name).unlink()
    del given["student_start"]  # the run knows it
    again = distill(teacher, LeNet5Half(), resume=tmp_path, **given)
    torch.testing.assert_close(first_weights(again), his)


def test_asked_for_but_impossible_is_said(tmp_path, caplog):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    distill(
        teacher, LeNet5Half(), image_shape=(1, 32, 32), out_dir=tmp_path, student_start="teacher",
        **SHORT,
    )  # fmt: skip
    assert "--student-start teacher gives the student nothing" in caplog.text

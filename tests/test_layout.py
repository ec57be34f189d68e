"""Networks that run on contiguous images only: they train as they are, and stay what they were.

The same for all else that only our accelerations break: the network as it was given is right.
"""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dafl_fast import distill
from dafl_fast.engine.evaluation import evaluation_mode
from dafl_fast.engine.layout import layout_kept, try_out, use_channels_last
from dafl_fast.engine.prepare import prepare
from dafl_fast.errors import UserError
from dafl_fast.models.winograd import WinogradConv2d, becomes_faster
from dafl_fast.networks import from_export
from dafl_fast.recipes import make_config

from .conftest import ROOT
from .test_distill import settings
from .test_winograd import NEEDS_FP32

CPU = torch.device("cpu")
IMAGES = torch.randn(3, 3, 8, 8)


class Viewed(nn.Module):
    """The commonest network of all."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(6 * 16, classes)

    def forward(self, x):
        x = self.pool(F.relu(self.conv2(F.relu(self.norm(self.conv(x))))))
        x = x.view(x.size(0), -1)
        return self.head(x)


class ViewsItsImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x):
        return self.head(x.view(len(x), -1))


class ViewsWhenTraining(Viewed):
    def forward(self, x):
        x = self.pool(F.relu(self.conv2(F.relu(self.norm(self.conv(x))))))
        return self.head(x.view(len(x), -1) if self.training else x.flatten(1))


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad.view(len(grad), -1).mul(2).view(grad.shape)


class ViewsItsGradient(Viewed):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return super().forward(Backward.apply(self.first(x)))


class ViewsOften(nn.Module):
    """In more places than are mended one by one."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(12))
        self.head = nn.Linear(192, 5)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
            x = x.view(len(x), -1).view(x.shape)
        return self.head(x.reshape(len(x), -1))


class ReadsItsStrides(Viewed):
    """Runs on any strides, and answers by them."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        y = torch.as_strided(y, (len(y), y[0].numel()), (y[0].numel(), 1))
        return self.head(y[:, :96])


KINDS = [Viewed, ViewsItsImages, ViewsWhenTraining, ViewsItsGradient, ViewsOften, ReadsItsStrides]


def layout_of(network):
    return [(name, tensor.stride(), tensor.shape) for name, tensor in network.state_dict().items()]


def hooks_of(network):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_it_is(kind, tmp_path, caplog):
    teacher, student = kind(), kind()
    layout, hooks = layout_of(student), hooks_of(student)
    before = copy.deepcopy(student.state_dict())
    result = distill(teacher, student, **settings(tmp_path))
    assert result.summary["steps"] == 4
    assert layout_of(student) == layout and hooks_of(student) == hooks
    assert not torch.equal(student.state_dict()["head.weight"], before["head.weight"])
    # On contiguous images, as its owner has them, and as the student that was trained.
    with evaluation_mode(student):
        torch.testing.assert_close(student(IMAGES), result.student(IMAGES))
    costly = kind in (ViewsItsGradient, ViewsOften, ReadsItsStrides)
    assert ("contiguous activations only" in caplog.text) == costly


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_has_the_teachers_answers(kind, precision, tmp_path):
    config = make_config("custom", **settings(tmp_path, precision=precision))
    teacher = kind().eval()
    step = prepare(config, teacher, kind(), CPU, precision)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    logits, features = step.teacher(images)
    tolerance = 2e-2 if precision == "bf16" else 1e-5
    torch.testing.assert_close(logits.float(), teacher(IMAGES), rtol=tolerance, atol=tolerance)
    assert features.shape == (3, 192 if kind in (ViewsItsImages, ViewsOften) else 96)
    step()


def test_nothing_is_printed_of_what_was_tried(tmp_path, capfd):
    class Ends(Viewed):
        def forward(self, x):
            return super().forward(x).softmax(1)  # taken off, in a module of torch.fx

    distill(Ends(), Viewed(), progress="off", **settings(tmp_path))
    assert "Traceback" not in capfd.readouterr().err


def test_only_the_place_that_needs_it_is_contiguous():
    network = Viewed()
    expected = network.eval()(IMAGES)
    seen = {}
    use_channels_last(network, IMAGES, "student", trained=True)
    for name, layer in network.named_children():
        layer.register_forward_hook(
            lambda layer, inputs, output, name=name: seen.update({name: output.is_contiguous()})
        )
    got = network(IMAGES.contiguous(memory_format=torch.channels_last))
    assert seen == {"conv": False, "norm": False, "conv2": False, "pool": True, "head": True}
    torch.testing.assert_close(got, expected)


def test_a_network_that_runs_anyway_gets_no_hooks():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    hooks = hooks_of(network)
    with layout_kept(network):
        use_channels_last(network, IMAGES, "student", trained=True)
        assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert hooks_of(network) == hooks
    assert network[0].weight.is_contiguous()


@pytest.mark.parametrize("form", ["program", "script"])
def test_teachers_without_code(form, tmp_path):
    network = Viewed().eval()
    if form == "script":
        teacher = torch.jit.trace(network, IMAGES)
    else:
        shapes = ({0: torch.export.Dim("N")},)
        teacher = from_export(torch.export.export(network, (IMAGES,), dynamic_shapes=shapes))
    config = make_config("custom", **settings(tmp_path))
    step = prepare(config, teacher, Viewed(), CPU, "fp32")
    logits, _ = step.teacher(IMAGES.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, network(IMAGES), rtol=1e-4, atol=1e-5)


def test_trying_out_leaves_no_trace():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(192, 5)
            self.norm = nn.BatchNorm1d(5)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("grows", torch.zeros(1))

        def forward(self, x):
            self.calls = self.calls + 1
            self.grows.resize_(self.grows.numel() + 1)
            return F.dropout(self.norm(self.head(x.flatten(1))), 0.5)

    network = Counts()
    buffers = dict(network.named_buffers())
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    network.head.weight.grad = torch.ones(5, 192)
    random = torch.random.get_rng_state()
    first, second = (try_out(network, IMAGES, trained=True) for _ in range(2))
    assert torch.equal(first[0], second[0])  # dropout draws the same numbers
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, buffer in network.named_buffers():
        assert buffer is buffers[name] and torch.equal(buffer, values[name]), name
    assert torch.equal(network.head.weight.grad, torch.ones(5, 192))
    assert network.head.bias.grad is None
    assert network.training


def test_a_student_that_runs_in_evaluation_only(tmp_path):
    class Evaluated(Viewed):
        def forward(self, x):
            if self.training:
                raise NotImplementedError("not for training")
            return super().forward(x)

    with pytest.raises(UserError, match="the student does not run forward and backward on a batch "
                       r"of shape \[2, 3, 8, 8\]: not for training"):  # fmt: skip
        distill(Viewed(), Evaluated(), **settings(tmp_path))


class FullPrecisionOnly(Viewed):
    def forward(self, x):
        y = self.norm(self.conv(x))
        if y.dtype != torch.float32:
            raise RuntimeError("expected scalar type Float but found BFloat16")
        return self.head(self.pool(self.conv2(y)).flatten(1))


def test_a_network_that_does_not_run_in_bf16(tmp_path, caplog):
    config = make_config("custom", **settings(tmp_path, precision="bf16"))
    teacher = FullPrecisionOnly().eval()
    step = prepare(config, teacher, Viewed(), CPU, "bf16")
    assert step.precision == "bf16"
    torch.testing.assert_close(step.teacher(IMAGES)[0], teacher(IMAGES), rtol=1e-4, atol=1e-5)
    assert "the teacher computes in fp32: in bfloat16 it does not run" in caplog.text
    step()
    step = prepare(config, Viewed(), FullPrecisionOnly(), CPU, "bf16")
    assert step.precision == "fp32" and step.teacher(IMAGES)[0].dtype == torch.float32
    assert (
        "the student does not run in bf16, so the run computes in fp32: expected scalar type Float "
        "but found BFloat16" in caplog.text
    )


class ReadsItsWeights(Viewed):
    """Its code multiplies by a weight itself, in an operation that autocast leaves alone."""

    def forward(self, x):
        y = self.pool(self.conv2(self.norm(self.conv(x)))).flatten(1)
        scale = torch.dot(self.head.weight[0], torch.ones(96))  # of one dtype only
        return self.head(y) * scale


def test_weights_that_the_code_reads_are_not_converted(tmp_path, caplog):
    teacher = ReadsItsWeights().eval()
    config = make_config("custom", **settings(tmp_path, precision="bf16"))
    step = prepare(config, teacher, Viewed(), CPU, "bf16")
    got = step.teacher(IMAGES)[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = teacher(IMAGES)
    torch.testing.assert_close(got, expected)
    assert {p.dtype for p in step.teacher.network.parameters()} == {torch.float32}
    assert not caplog.records


class LooksAtAClass(nn.Module):
    """Of two layers that become faster, one must not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.plain = nn.Conv2d(64, 64, 3, padding=1)
        self.other = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = self.plain(F.relu(self.first(x)))
        x = F.relu(self.other(x if type(self.plain) is nn.Conv2d else -x))
        return self.head(x.mean((2, 3)))


@NEEDS_FP32
def test_layers_are_made_faster_one_by_one_where_all_at_once_is_wrong(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    teacher, student = LooksAtAClass().eval(), LooksAtAClass()
    assert [becomes_faster(layer) for layer in teacher.children()] == [False, True, True, False]
    step = prepare(make_config("custom", **settings(tmp_path)), teacher, student, CPU, "fp32")
    for network in (step.teacher.network, step.student):
        kinds = {name: type(layer) for name, layer in network.named_modules()}
        assert kinds["plain"] is nn.Conv2d and kinds["other"] is WinogradConv2d
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(step.teacher(images)[0], teacher(images), rtol=1e-3, atol=1e-4)


def gradients_of_narrow_strided_convolutions():
    """In a process of its own: if oneDNN writes beyond its memory, the process ends."""
    for channels in (3, 8, 12, 16):
        network = nn.Sequential(nn.Conv2d(channels, 16, 1, 2), nn.BatchNorm2d(16))
        exact = copy.deepcopy(network).double()
        images = torch.randn(2, channels, 64, 64)
        use_channels_last(network, images, "student", trained=True)
        images = images.contiguous(memory_format=torch.channels_last)
        for _ in range(10):
            for one, x in ((network, images), (exact, images.double())):
                one.zero_grad()
                one(x)[:, :5].square().sum().backward()
            torch.testing.assert_close(
                network[0].weight.grad.double(), exact[0].weight.grad, rtol=1e-3, atol=1e-2
            )


def test_narrow_strided_convolutions():
    code = f"import {__name__} as t; t.gradients_of_narrow_strided_convolutions()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

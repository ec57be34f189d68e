"""Convolutions that add and apply ReLU themselves. cuDNN's two functions are played by PyTorch's
other ones here; what cuDNN makes of them, only a GPU can show (test_cuda.py)."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from dafl_fast.engine import fuse
from dafl_fast.engine.fuse import ConvReLU, cudnn_takes, fuse_relu
from dafl_fast.engine.teacher import FrozenTeacher
from dafl_fast.models import build

CALLS = []


def conv_relu(x, weight, bias, *geometry):
    CALLS.append("relu")
    return torch.conv2d(x, weight, bias, *geometry).relu()


def conv_add_relu(x, weight, z, alpha, bias, *geometry):
    CALLS.append("add")
    return (torch.conv2d(x, weight, bias, *geometry) + alpha * z).relu()


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    monkeypatch.setattr(fuse, "cudnn_takes", lambda *_: True)
    CALLS.clear()


def frozen(network):
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.2)
            nn.init.normal_(layer.bias)
    return FrozenTeacher(network.double())


def answers(teacher, images):
    x = images.clone().requires_grad_()
    logits, features = teacher(x)
    (grad,) = torch.autograd.grad(logits.square().sum() + features.sin().sum(), x)
    return logits.detach(), features.detach(), grad


def torchvision_network(name):
    torchvision = pytest.importorskip("torchvision")
    return getattr(torchvision.models, name)(num_classes=7)


@pytest.mark.parametrize(
    ("make", "convolutions", "additions"),
    [
        (lambda: build("ResNet8"), 3, 3),  # not the stem, of 3 channels
        (lambda: build("WRN-16-1"), 6, 0),
        (lambda: torchvision_network("resnet18"), 8, 8),
        (lambda: torchvision_network("resnet50"), 32, 16),
    ],
    ids=["ResNet8", "WRN-16-1", "resnet18", "resnet50"],
)
def test_answers_and_gradients_stay_the_same(make, convolutions, additions):
    torch.manual_seed(0)
    teacher, images = frozen(make()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = answers(teacher, images)
    assert fuse_relu(teacher.network, [images]) == convolutions + additions
    CALLS.clear()
    after = answers(teacher, images)
    assert (CALLS.count("relu"), CALLS.count("add")) == (convolutions, additions)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())
    assert fuse_relu(teacher.network, [images]) == 0  # again


class Awkward(nn.Module):
    """Convolutions whose outputs, or whose sums, are looked at by others, and one with a hook."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        a, b, c, d, e, f = self.convs
        x = self.norm(a(x))  # is folded
        y = b(x)
        y = F.relu(y) + y
        z = c(y) + x
        z = z.relu() * z
        u = F.relu(d(z) + 1.0)
        v = F.relu(e(u))
        w = torch.relu(f(v) + f(v))
        return self.head(w.mean((2, 3)))


def test_what_somebody_looks_at_is_left_alone():
    torch.manual_seed(0)
    network = Awkward()
    seen = []
    network.convs[4].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    teacher, images = frozen(network), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert fuse_relu(teacher.network, [images]) == 0


def test_hooks_of_the_user_and_of_the_features_see_what_they_saw():
    torch.manual_seed(0)
    network = build("ResNet8")
    seen = []
    network.layer2[0].conv1.register_forward_hook(lambda *_: seen.append(_[2].min().item()))
    teacher, images = frozen(network), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert fuse_relu(teacher.network, [images]) == 5
    seen.clear()
    teacher(images)
    assert len(seen) == 1 and seen[0] < 0


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(8, 8, 3).double().requires_grad_(False)
        self.inner = fx.symbolic_trace(nn.Sequential(conv, nn.ReLU(), nn.Flatten()))

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("fault", ["wrong", "refuses", "gradient"])
def test_a_network_that_would_answer_otherwise_is_left_as_it_is(fault, monkeypatch, caplog):
    network, images = Graph(), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    before, code = network(images), network.inner.code
    if fault == "wrong":
        monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *a: conv_relu(*a) * 2)
    elif fault == "gradient":
        monkeypatch.setattr(torch.ops.aten, "threshold_backward", None)
    else:

        def refuse(*_):
            raise RuntimeError("no engine")

        monkeypatch.setattr(torch, "cudnn_convolution_relu", refuse)
    with caplog.at_level(logging.WARNING):
        count = fuse_relu(network, [images])
    assert torch.equal(network(images), before)
    if fault == "refuses":  # the layers themselves are what is left
        assert count == 1 and "no engine" in caplog.text
    else:
        assert count == 0 and network.inner.code == code and "do not apply ReLU" in caplog.text
        assert not any(isinstance(layer, ConvReLU) for layer in network.modules())
        copy.deepcopy(network)


def test_cudnn_is_not_asked_on_a_cpu_nor_for_what_does_not_fit():
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1).bfloat16()
    x = torch.randn(2, 8, 9, 7).bfloat16()
    assert not cudnn_takes(conv, x, None)
    assert fuse._output_shape(conv, x) == conv(x).shape

"""FrozenTeacher: frozen, hooked, and wary of networks that would silently fail."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dafl_fast import FrozenTeacher
from dafl_fast.errors import UserError
from dafl_fast.models import LeNet5

from .published import PublishedLeNet5


def test_logits_features_and_image_gradient():
    network = LeNet5().double()
    witness = PublishedLeNet5().double().eval()
    witness.load_state_dict(network.state_dict())
    teacher = FrozenTeacher(network, "fc1")
    x = torch.randn(4, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    logits, features = teacher(x)
    expected_logits, expected_features = witness(y, out_feature=True)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(features, expected_features)
    (logits.sum() + features.abs().sum()).backward()
    (expected_logits.sum() + expected_features.abs().sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert all(p.grad is None for p in network.parameters())


def test_features_default_to_the_input_of_the_last_linear_layer():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 1, 2, 2)
    _, features = FrozenTeacher(network)(x)
    torch.testing.assert_close(features, network[:3](x))


def test_unknown_or_missing_feature_layer():
    with pytest.raises(UserError, match=r"no layer 'fc9'; it has .*fc1"):
        FrozenTeacher(LeNet5(), "fc9")
    with pytest.raises(UserError, match="no linear layer"):
        FrozenTeacher(nn.Sequential(nn.Conv2d(1, 10, 32), nn.Flatten()))


def sequential(*tail: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), *tail)


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (sequential(nn.Softmax(1)), "ends in softmax; the losses need logits"),
        (sequential(nn.LogSoftmax(1)), "ends in log-softmax; the losses need logits"),
        (sequential(nn.Unflatten(1, (2, 5))), r"must return logits \[N, C\], got \[16, 2, 5\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 10)), "does not take images of shape"),
    ],
)
def test_check_names_what_is_wrong(network, sentence):
    with pytest.raises(UserError, match=sentence):
        FrozenTeacher(network).check(torch.randn(16, 1, 32, 32))


@pytest.mark.parametrize(("layer", "name"), [("fc2", "logits"), ("conv3", "features")])
def test_check_finds_nan(layer, name):
    network = LeNet5()
    with torch.no_grad():
        network.get_submodule(layer).weight[0, 0] = float("nan")
        if layer == "conv3":  # the logits must not be what gives it away
            network.fc1.weight[:, 0] = 0
    with pytest.raises(UserError, match=f"{name if layer == 'fc2' else ''}.* hold NaN or infinity"):
        FrozenTeacher(network, "fc1").check(torch.randn(16, 1, 32, 32))


def test_check_accepts_an_honest_teacher():
    FrozenTeacher(sequential()).check(torch.randn(16, 1, 32, 32))
    FrozenTeacher(LeNet5(), "fc1").check(torch.randn(16, 1, 32, 32))


def test_fingerprint_follows_the_weights():
    network = LeNet5()
    before = FrozenTeacher(network, "fc1").fingerprint()
    assert before == FrozenTeacher(network, "fc1").fingerprint()
    with torch.no_grad():
        network.fc2.bias[0] += 1e-3
    assert FrozenTeacher(network, "fc1").fingerprint() != before

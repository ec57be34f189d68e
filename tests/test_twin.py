"""Twins: layers of their own, the same parameters; and a user's student that stays as it was."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from dafl_fast import distill
from dafl_fast.engine.evaluation import evaluation_mode, predictions
from dafl_fast.errors import UserError
from dafl_fast.models.twin import duplicate, twin

from .test_distill import Residual, settings


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def scaled(layer):
    return Scaled if type(layer) is nn.Linear else None


class Listed(nn.Module):
    """Refers to a layer by a plain list as well, and to one layer under two names."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.again = self.fc
        self.norm = nn.BatchNorm1d(4)
        self.plain = [self.fc, self.norm]

    def forward(self, x):
        for layer in self.plain:
            x = layer(x)
        return self.again(x)


def test_a_twin_shares_every_tensor_and_no_layer():
    network = Listed()
    other = twin(network, scaled)
    pairs = list(zip(network.state_dict(keep_vars=True).items(),
                     other.state_dict(keep_vars=True).items(), strict=True))  # fmt: skip
    assert len(pairs) == 9 and all(a == b and x is y for (a, x), (b, y) in pairs)
    assert not {*network.modules()} & {*other.modules()}
    assert type(network.fc) is nn.Linear and type(other.fc) is Scaled
    assert other.again is other.fc and other.plain == [other.fc, other.norm]
    x = torch.randn(3, 4)
    with evaluation_mode(network), evaluation_mode(other):
        with torch.no_grad():
            network.fc.weight.mul_(2)
        y = network.norm(network.fc(x) * 2)
        torch.testing.assert_close(other(x), (network.fc(y)) * 2)


def test_modes_are_each_ones_own_and_statistics_are_shared():
    network = Listed()
    other = twin(network).train()
    network.eval()
    assert other.training and other.norm.training
    other(torch.randn(5, 4))
    assert network.norm.num_batches_tracked == 1 and not network.norm.running_mean.eq(0).any()
    network.norm.running_mean = torch.full((4,), 7.0)  # assigned anew, as some networks do
    assert torch.equal(other.norm.running_mean, torch.full((4,), 7.0))


def test_hooks_report_to_whom_they_did():
    class Recorder:
        def __init__(self):
            self.seen = []

        def hook(self, layer, inputs):
            self.seen.append(type(layer))

    recorder, network = Recorder(), Listed()
    network.fc.register_forward_pre_hook(recorder.hook)
    twin(network, scaled)(torch.randn(2, 4))
    assert recorder.seen == [Scaled, Scaled]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("normed", [weight_norm, parametrizations.weight_norm], ids=["hook", "new"])
def test_computed_weights(normed):
    network = nn.Sequential(normed(nn.Linear(4, 3)))
    x = torch.randn(5, 4)
    before = network(x).detach()
    other, copied = twin(network), duplicate(network)
    assert [*map(id, other.parameters())] == [*map(id, network.parameters())]
    assert torch.equal(other(x), before) and torch.equal(copied(x), before)
    other(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    with torch.no_grad():
        next(network.parameters()).mul_(3)
    assert torch.equal(other(x), network(x)) and torch.equal(copied(x), before)


def test_a_recurrent_network():
    network = nn.LSTM(4, 3, batch_first=True)
    x = torch.randn(2, 5, 4)
    assert torch.equal(twin(network)(x)[0], network(x)[0])


def test_what_cannot_be_copied_is_said():
    network = nn.Sequential(nn.Linear(2, 2))
    network.lock = threading.Lock()
    with pytest.raises(UserError, match="the network Sequential cannot be copied .*lock"):
        twin(network)


# ---- A user's student ----------------------------------------------------------------------------


class Frozen(nn.Module):
    """A student of which one BatchNorm is frozen by its user."""

    def __init__(self, lazy: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, padding=1)
        self.b1 = nn.BatchNorm2d(64)
        self.conv2 = nn.LazyConv2d(64, 3, padding=1) if lazy else nn.Conv2d(64, 64, 3, padding=1)
        self.b2 = nn.BatchNorm2d(64)
        self.drop = nn.Dropout(0.1)
        self.head = nn.LazyLinear(5) if lazy else nn.Linear(64, 5)

    def forward(self, x):
        x = torch.relu(self.b2(self.conv2(torch.relu(self.b1(self.conv(x))))))
        return self.head(self.drop(x.mean((2, 3))))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("adversarial", [0.0, 1.0])
def test_frozen_layers_stay_frozen(tmp_path, ema_decay, adversarial):
    student = Frozen()
    with torch.no_grad():
        student.b1.running_mean.normal_()
    student.b1.eval()
    modes = {name: layer.training for name, layer in student.named_modules()}
    kinds = {name: type(layer) for name, layer in student.named_modules()}
    before = copy.deepcopy(student.state_dict())
    result = distill(
        Residual(), student,
        **settings(tmp_path, ema_decay=ema_decay, adversarial=adversarial, eval_every=1e-9),
    )  # fmt: skip
    assert {name: layer.training for name, layer in student.named_modules()} == modes
    assert {name: type(layer) for name, layer in student.named_modules()} == kinds
    assert {name: type(layer) for name, layer in result.student.named_modules()} == kinds
    after = student.state_dict()
    for name in ("b1.running_mean", "b1.running_var", "b1.num_batches_tracked"):
        assert torch.equal(after[name], before[name]), name
    assert not torch.equal(after["b2.running_mean"], before["b2.running_mean"])
    assert not torch.equal(after["b1.weight"], before["b1.weight"])  # only its statistics are


def test_a_student_in_evaluation_mode_is_trained_whole(tmp_path):
    student = Frozen().eval()
    before = student.b1.running_mean.clone()
    result = distill(Residual(), student, **settings(tmp_path))
    assert not any(layer.training for layer in student.modules())
    assert not torch.equal(student.b1.running_mean, before)
    assert torch.equal(result.student.b1.running_mean, student.b1.running_mean)


def test_a_lazy_student_gets_its_parameters_first(tmp_path):
    student = Frozen(lazy=True)
    student.b1.eval()
    result = distill(Residual(), student, **settings(tmp_path))
    assert student.head.weight.shape == (5, 64) and type(student.conv2) is nn.Conv2d
    assert student.training and not student.b1.training
    assert result.summary["student_parameters"] == sum(p.numel() for p in student.parameters())


def test_a_lazy_student_that_does_not_fit(tmp_path):
    student = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(UserError, match=r"the student has lazy layers.*\[2, 3, 8, 8\]"):
        distill(Residual(), student, **settings(tmp_path))


def test_evaluating_puts_every_mode_back():
    network = Frozen()
    network.b2.eval()
    modes = [layer.training for layer in network.modules()]
    predictions(network, torch.randn(3, 3, 4, 4))
    assert [layer.training for layer in network.modules()] == modes
    with evaluation_mode(network):
        assert not any(layer.training for layer in network.modules())
    with pytest.raises(RuntimeError):
        predictions(network, torch.randn(3, 4, 4, 4))
    assert [layer.training for layer in network.modules()] == modes

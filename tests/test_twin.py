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
from dafl_fast.models.twin import answers_alike, duplicate, give_back, twin

from .test_distill import Residual, settings


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def scaled(layer):
    return Scaled if type(layer) is nn.Linear else None


def same(layer):
    """A substitute that computes the same: for networks that must answer alike."""
    return Same if type(layer) is nn.Linear else None


class Same(nn.Linear):
    pass


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
    assert network.plain == [network.fc, network.norm]
    x = torch.randn(3, 4)
    with evaluation_mode(network), evaluation_mode(other), torch.no_grad():
        network.fc.weight.mul_(2)
        y = network.norm(network.fc(x) * 2)
        torch.testing.assert_close(other(x), (network.fc(y)) * 2)


def test_without_a_substitute_there_is_no_twin():
    network = Listed()
    assert twin(network, lambda layer: None) is network


def test_modes_are_each_ones_own_and_statistics_are_shared():
    network = Listed()
    other = twin(network, same).train()
    network.eval()
    assert other.training and other.norm.training
    other(torch.randn(5, 4))
    assert network.norm.num_batches_tracked == 1 and not network.norm.running_mean.eq(0).any()
    network.norm.running_mean = torch.full((4,), 7.0)  # assigned anew, as some networks do
    assert torch.equal(other.norm.running_mean, torch.full((4,), 7.0))


class Recorder:
    def __init__(self):
        self.seen = []

    def hook(self, layer, inputs):
        self.seen.append(type(layer))

    __call__ = hook


@pytest.mark.parametrize("kind", ["method", "object"])
def test_hooks_report_to_whom_they_did(kind):
    recorder, network = Recorder(), Listed()
    network.fc.register_forward_pre_hook(recorder.hook if kind == "method" else recorder)
    twin(network, scaled)(torch.randn(2, 4))
    assert recorder.seen == [Scaled, Scaled]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("normed", [weight_norm, parametrizations.weight_norm], ids=["hook", "new"])
def test_computed_weights(normed):
    network = nn.Sequential(normed(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 3))
    x = torch.randn(5, 4)
    before = network(x).detach()
    other, copied = twin(network, same), duplicate(network)
    assert [*map(id, other.parameters())] == [*map(id, network.parameters())]
    assert torch.equal(other(x), before) and torch.equal(copied(x), before)
    other(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    with torch.no_grad():
        next(network.parameters()).mul_(3)
    assert torch.equal(other(x), network(x)) and torch.equal(copied(x), before)


def test_a_traced_network():
    network = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    x = torch.randn(2, 4)
    other = twin(network, same)
    assert type(other.get_submodule("0")) is Same
    assert torch.equal(other(x), network(x))


def test_a_recurrent_network():
    network = nn.Sequential(nn.LSTM(4, 3, batch_first=True))
    network.add_module("last", nn.Identity())
    network.fc = nn.Linear(1, 1)
    x = torch.randn(2, 5, 4)
    assert torch.equal(twin(network, same)[0](x)[0], network[0](x)[0])


class Keeps(nn.Module):
    """A hook that holds on to the network itself."""

    def __init__(self, how: str):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.how = how
        if how == "closure hook":
            self.fc.register_forward_hook(lambda m, i, o: setattr(self, "kept", o))
        elif how == "own method":
            self.fc.register_forward_hook(self.keep)
        elif how == "function":
            self.functions = [lambda x: self.fc(x)]
        elif how == "forward":
            original = self.fc.forward
            self.fc.forward = lambda x: original(x)

    def keep(self, layer, inputs, output):
        self.kept = output

    def forward(self, x):
        y = self.functions[0](x) if self.how == "function" else self.fc(x)
        return self.head(self.kept if self.how in ("closure hook", "own method") else y)


@pytest.mark.parametrize("how", ["closure hook", "own method", "function", "none"])
def test_what_holds_on_to_the_network_is_noticed(how):
    network = Keeps(how)
    network(torch.randn(2, 4))  # leaves what a first run leaves
    other = twin(network, same)
    alike = answers_alike(network, other, [torch.randn(2, 4), torch.randn(3, 4)])
    assert alike == (how == "none")


def test_an_answer_that_is_no_number_is_another():
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float("nan")

    network = nn.Sequential(nn.Linear(4, 2))
    other = twin(network, lambda layer: Broken if type(layer) is nn.Linear else None)
    assert not answers_alike(network, other, [torch.randn(2, 4)])


def test_attributes_are_given_back():
    network = Listed()
    network.count, network.plain_list = 0, [1]
    other = twin(network, same)
    other.count, other.fc.note, other.plain_list = 3, "new", [2]
    give_back(network, other)
    assert (network.count, network.fc.note, network.plain_list) == (3, "new", [2])
    assert network.plain == [network.fc, network.norm] and network.again is network.fc


def test_what_cannot_be_copied_is_said():
    network = nn.Sequential(nn.Linear(2, 2))
    network.lock = threading.Lock()
    assert twin(network, same).lock is network.lock
    with pytest.raises(UserError, match="the network Sequential cannot be copied .*lock"):
        duplicate(network)


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


# ---- Students that are more than their layers ----------------------------------------------------


class Base(nn.Module):
    """With `wide`, a convolution that can be made faster."""

    def __init__(self, wide: bool = False):
        super().__init__()
        width = 64 if wide else 8
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def features(self, x):
        return torch.relu(self.norm(self.conv2(torch.relu(self.conv(x))))).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class FreezesItself(Base):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class Merges(Base):
    """Adds its low-rank part to the weight in evaluation mode, and takes it out in training."""

    def __init__(self, wide):
        super().__init__(wide)
        self.a, self.b = (
            nn.Parameter(torch.randn(5, 2) * 0.1),
            nn.Parameter(torch.zeros(2, 64 if wide else 8)),
        )
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.head.weight.data += (-1 if mode else 1) * (self.a @ self.b)
            self.merged = not mode
        return self

    def forward(self, x):
        y = self.features(x)
        return self.head(y) if self.merged else self.head(y) + y @ (self.a @ self.b).T


class ListsItsWeight(Base):
    def __init__(self, wide):
        super().__init__(wide)
        self.weights = [self.head.weight]

    def forward(self, x):
        return self.features(x) @ self.weights[0].T


class Remembers(Base):
    """State that is neither parameter nor buffer."""

    seen = torch.zeros(())
    calls = 0

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.seen = self.seen + x.detach().mean()
        return super().forward(x)


class KeepsByHook(Base):
    def __init__(self, wide):
        super().__init__(wide)
        self.norm.register_forward_hook(lambda m, i, o: setattr(self, "kept", o))

    def forward(self, x):
        self.features(x)
        return self.head(self.kept.mean((2, 3)))


class Locked(Base):
    def __init__(self, wide):
        super().__init__(wide)
        self.lock = threading.Lock()


KINDS = [FreezesItself, Merges, ListsItsWeight, Remembers, KeepsByHook, Locked]


@pytest.mark.parametrize("given", ["train", "eval"])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_students_that_are_more_than_their_layers(tmp_path, kind, wide, given):
    student = kind(wide)
    if given == "eval":
        student.eval()
    modes = [layer.training for layer in student.modules()]
    before = copy.deepcopy(student.state_dict())
    result = distill(Residual(), student, **settings(tmp_path, ema_decay=0.0))
    assert [layer.training for layer in student.modules()] == modes
    assert not torch.equal(student.head.weight, before["head.weight"])
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad(), evaluation_mode(student):
        expected = student(x)
    if result.student is not student:
        assert not result.student.training
        torch.testing.assert_close(result.student(x).detach(), expected, rtol=1e-3, atol=1e-4)
    if kind is FreezesItself:
        assert torch.equal(student.norm.running_mean, before["norm.running_mean"])
    elif kind is Merges:
        y = student.features(x) if given == "eval" else None
        assert student.merged == (given == "eval")
        if y is not None:
            torch.testing.assert_close(student.head(y), expected)
    elif kind is Remembers:
        assert student.calls == result.student.calls == 8 and student.seen != 0
    elif kind in (KeepsByHook, Locked):
        assert result.student is student  # a copy would not answer as it does


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_student_in_torchscript(tmp_path, decay):
    trained = []
    for name in "ab":
        torch.manual_seed(1)
        student = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
        before = copy.deepcopy(student.state_dict())
        if name == "b":
            student = torch.jit.script(student)
        distill(Residual(), student, **settings(tmp_path / name, ema_decay=decay))
        trained.append(student.state_dict()["1.weight"])
        assert not torch.equal(trained[-1], before["1.weight"])
    torch.testing.assert_close(*trained)


def test_an_interrupted_run_leaves_the_students_modes(tmp_path):
    student = Frozen()
    student.b1.eval()
    modes = [layer.training for layer in student.modules()]

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(Residual(), student.eval(), callbacks=[stop], **settings(tmp_path))
    assert not any(layer.training for layer in student.modules()) and any(modes)

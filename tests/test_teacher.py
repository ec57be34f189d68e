"""FrozenTeacher: frozen, folded, hooked, and wary of networks that would silently fail."""

from __future__ import annotations

import copy
import hashlib
import logging
import threading

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dafl_fast import FrozenTeacher, generator_loss
from dafl_fast.engine.distributed import World
from dafl_fast.engine.outputs import reading_of
from dafl_fast.engine.precision import computed_in
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
    assert all(p.grad is None for p in teacher.parameters())


def test_features_default_to_the_input_of_the_last_linear_layer():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 1, 2, 2)
    _, features = FrozenTeacher(network)(x)
    torch.testing.assert_close(features, network[:3](x))


def test_the_last_linear_layer_may_be_a_subclass_but_not_within_attention():
    class Head(nn.Linear):
        pass

    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.attention = Head(4, 3), nn.MultiheadAttention(4, 2)

        def forward(self, x):
            x = x.flatten(2)
            return self.head(self.attention(x, x, x)[0].mean(1))

    network = Attentive()
    x = torch.randn(5, 3, 2, 2)
    tokens = x.flatten(2)
    _, features = FrozenTeacher(network)(x)
    torch.testing.assert_close(features, network.attention(tokens, tokens, tokens)[0].mean(1))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_teacher_has_no_features(tmp_path):
    network = LeNet5()
    torch.jit.trace(network, torch.randn(16, 1, 32, 32)).save(tmp_path / "teacher.pt")
    teacher = FrozenTeacher(torch.jit.load(tmp_path / "teacher.pt"))
    x = torch.randn(16, 1, 32, 32, requires_grad=True)
    teacher.check(x)
    logits, features = teacher(x)
    assert features is None
    torch.testing.assert_close(logits, network(x))
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(network(x).sum(), x)[0])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(UserError, match="a TorchScript teacher does not show what enters"):
        FrozenTeacher(torch.jit.load(tmp_path / "teacher.pt"), "fc1")


def test_a_network_may_name_its_own_feature_layer():
    network, x = LeNet5(), torch.randn(2, 1, 32, 32)
    assert FrozenTeacher(network)(x)[1].shape == (2, 120)
    assert FrozenTeacher(network, "fc2")(x)[1].shape == (2, 84)
    network = nn.Sequential(nn.Flatten())  # a layer of that name is another thing
    network.feature_layer, network.head = nn.Linear(1024, 3), nn.Linear(3, 2)
    assert FrozenTeacher(network)(x)[1].shape == (2, 3)


def test_unknown_feature_layer():
    with pytest.raises(UserError, match=r"no layer 'fc9'; it has .*fc1"):
        FrozenTeacher(LeNet5(), "fc9")


def test_feature_layer_that_does_not_run():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    network[1].register_module("unused", nn.Linear(3, 3))
    teacher = FrozenTeacher(network, "1.unused")
    teacher._features = torch.zeros(1)  # what an earlier call may have left must not pass for it
    with pytest.raises(UserError, match="'1.unused' did not run"):
        teacher(torch.randn(2, 1, 2, 2))


def test_without_a_linear_layer_there_are_no_features(caplog):
    network = nn.Sequential(nn.Conv2d(1, 10, 32), nn.Flatten())
    teacher = FrozenTeacher(network)
    assert "the activation loss is off" in caplog.text
    x = torch.randn(16, 1, 32, 32)
    logits, features = teacher(x)
    assert features is None
    torch.testing.assert_close(logits, network(x))
    teacher.check(x)
    assert generator_loss(logits, features).activation == 0
    _, features = FrozenTeacher(network, "1")(x)
    torch.testing.assert_close(features, network[0](x).flatten(1))


# -- what becomes of BatchNorm ---------------------------------------------------------------------


class Residual(nn.Module):
    """As in the published code: features on demand, which a tracer must not stumble over."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.linear = nn.Linear(8, 5)

    def forward(self, x, out_feature=False):
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))
        feature = F.relu(y + self.shortcut(x)).mean((2, 3))
        x = self.linear(feature)
        return (x, feature) if out_feature else x


class Dense(nn.Module):
    """BatchNorm before its convolution, and outputs that more than BatchNorm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm3 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        x = self.conv0(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = self.norm3(self.conv2(F.relu(self.norm2(x))))
        return self.linear(x.amax((2, 3)))


class Shared(nn.Module):
    """One convolution run twice, one whose weight another reads, one normalisation of two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.twice, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.read, self.norm_read = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.tied, self.tied_too = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.tied_too.weight = self.tied.weight
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm(self.twice(x)))
        x = self.twice(x) + self.norm_read(self.read(x)) + F.conv2d(x, self.read.weight, padding=1)
        x = self.norm(self.tied(x)) + self.tied_too(x)
        return self.linear(x.mean((2, 3)))


class NormAct(nn.BatchNorm2d):
    """A class of its own with an activation, and a look at the shape, as in timm."""

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4D input")
        return F.relu6(
            F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                0.1, self.eps,
            )
        )  # fmt: skip


def conv(norm: nn.Module, *args, **options) -> tuple[nn.Module, ...]:
    return nn.Conv2d(*args, bias=False, **options), norm, nn.ReLU6()


def mobile() -> nn.Module:
    return nn.Sequential(
        *conv(nn.BatchNorm2d(8, momentum=None), 3, 8, 3, stride=2, padding=1),
        *conv(nn.BatchNorm2d(8, eps=0.8, momentum=0.9), 8, 8, 3, padding=1, groups=8),
        *conv(nn.BatchNorm2d(16, affine=False), 8, 16, 3, groups=2),
        *conv(nn.SyncBatchNorm(12), 16, 12, 1),
        *conv(NormAct(10), 12, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 5),
    )


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding_mode="reflect", padding=1), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 12), nn.BatchNorm1d(12), nn.ReLU(True),
        nn.Dropout(), nn.Linear(12, 7, bias=False), nn.BatchNorm1d(7),
    )  # fmt: skip


def every_dimension() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.Tanh(),
        nn.Unflatten(2, (2, 5)), nn.Conv3d(6, 4, 2, groups=2), nn.BatchNorm3d(4), nn.Tanh(),
        nn.ConvTranspose3d(4, 6, (1, 2, 2), groups=2, bias=False), nn.BatchNorm3d(6), nn.Flatten(2),
        nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), nn.Tanh(),
        nn.ConvTranspose1d(4, 8, 2, stride=2, groups=4), nn.BatchNorm1d(8), nn.Tanh(),
        nn.Flatten(), nn.Linear(768, 5),
    )  # fmt: skip


def left_alone() -> nn.Module:
    """BatchNorm of the batch, layers with hooks and parametrizations, BatchNorm after others."""
    convolutions = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)]
    nn.utils.spectral_norm(convolutions[1])
    nn.utils.parametrizations.weight_norm(convolutions[2])
    norms = [nn.BatchNorm2d(3) for _ in range(4)]
    norms[0] = nn.BatchNorm2d(3, track_running_stats=False)
    norms[3].register_forward_hook(lambda layer, inputs, output: output.sin())
    stages = [layer for pair in zip(convolutions, norms, strict=True) for layer in pair]
    return nn.Sequential(
        *stages, nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 5)
    )


def torchvision(name: str) -> nn.Module:
    network = getattr(pytest.importorskip("torchvision").models, name)(num_classes=7)
    # Smooth, because so many fp32 values may well have one that rounding moves across a kink.
    for parent in list(network.modules()):
        for child, layer in parent.named_children():
            if isinstance(layer, (nn.ReLU, nn.Hardswish)):
                setattr(parent, child, nn.GELU())
    return network


def randomised(network: nn.Module) -> nn.Module:
    """With statistics and affine parameters that are not those of a fresh BatchNorm."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if layer.running_mean is not None:
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.3, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                layer.weight.data[::3] *= -1
                nn.init.normal_(layer.bias, 0, 0.3)
    return network


class BatchNormRuns(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "batch_norm" in func.name()
        return func(*args, **(kwargs or {}))


def batch_norms_run(network: nn.Module, images: torch.Tensor) -> int:
    with BatchNormRuns() as runs, torch.no_grad():
        network(images)
    return runs.count


def assert_same_teacher(one: FrozenTeacher, two: FrozenTeacher, images, tolerance: float) -> None:
    """Logits, features and the gradient to the images agree, relative to their largest value."""
    results = []
    for teacher in (one, two):
        x = images.clone().requires_grad_()
        torch.manual_seed(1)
        logits, features = teacher(x)
        (gradient,) = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), x,
                                          retain_graph=True)  # fmt: skip
        (through_features,) = torch.autograd.grad(features.square().sum(), x)
        results.append((logits, features, gradient, through_features))
    for a, b in zip(*results, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


FOLDED = {  # network, BatchNorm runs before and after
    "residual": (Residual, 4, 0),
    "mobile": (mobile, 5, 0),
    "vgg": (vgg, 4, 1),  # not the one after the last linear layer, which carries the hook
    "dense": (Dense, 3, 2),
    "shared": (Shared, 4, 2),
    "every dimension": (every_dimension, 5, 0),
    "left alone": (left_alone, 5, 5),
    "resnet18": (lambda: torchvision("resnet18"), 20, 0),
    "mobilenet_v3_small": (lambda: torchvision("mobilenet_v3_small"), 34, 0),
}


@pytest.mark.parametrize(("build", "before", "after"), FOLDED.values(), ids=FOLDED)
def test_folding_changes_nothing_but_the_number_of_layers(build, before, after):
    network = randomised(build())
    untouched = copy.deepcopy(network)
    size = 32 if before > 10 else 8
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        network, untouched = network.to(dtype), untouched.to(dtype)
        x = torch.randn(3, 3, size, size, dtype=dtype)
        folded, plain = FrozenTeacher(network), FrozenTeacher(network, fold=False)
        assert batch_norms_run(plain.network, x) == before
        assert batch_norms_run(folded.network, x) == after
        assert_same_teacher(folded, plain, x, tolerance)
        expected = untouched.eval()(x)
        torch.testing.assert_close(folded.network(x), expected, rtol=0,
                                   atol=tolerance * expected.abs().max().item())  # fmt: skip
        assert folded.fingerprint() == plain.fingerprint()
    assert network.training and all(layer.training for layer in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    for (name, mine), (_, theirs) in zip(
        network.state_dict().items(), untouched.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(("layer", "after"), [
    ("conv3", 1),  # its own BatchNorm stays: a hooked layer is left as it is
    ("bn3", 1),  # features are what enters it, so it must not become part of conv3
    ("shortcut", 1),  # the hooked container stays whole
    ("conv1", 1),
])  # fmt: skip
def test_features_of_any_layer_survive_folding(layer, after):
    network = randomised(Residual()).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    folded = FrozenTeacher(network, layer)
    assert batch_norms_run(folded.network, x) == after
    assert_same_teacher(folded, FrozenTeacher(network, layer, fold=False), x, 1e-10)


def test_feature_layer_by_its_second_name():
    network = randomised(Residual()).double()
    network.head = network.linear
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert_same_teacher(FrozenTeacher(network, "head"), FrozenTeacher(network, "linear"), x, 0)


def test_without_batch_norm_the_network_stays_itself():
    teacher = FrozenTeacher(LeNet5(), "fc1")
    assert type(teacher.network) is LeNet5


class DataDependent(Residual):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


def test_untraceable_network_is_logged_and_not_folded(caplog):
    network = randomised(DataDependent()).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    teacher = FrozenTeacher(network)
    assert "BatchNorm is not folded, torch.fx cannot trace it" in caplog.text
    assert batch_norms_run(teacher.network, x) == 4
    expected = copy.deepcopy(network).eval()
    for images in (x, -x):
        torch.testing.assert_close(teacher(images)[0], expected(images))


def test_batch_norm_that_stays_in_training_mode_is_not_folded():
    class BatchStatistics(nn.Sequential):
        def train(self, mode=True):
            return super().train(True)

    network = randomised(BatchStatistics(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten()))
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(FrozenTeacher(network, "2")(x)[0], network(x))


def test_folding_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        FrozenTeacher(Dense())
    assert "folded 1 of the teacher's 3 BatchNorm layers" in caplog.text


def test_hooks_and_replaced_forward_of_the_network_itself():
    network = randomised(Residual()).double()
    network.register_forward_hook(lambda layer, inputs, output: 2 * output)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = copy.deepcopy(network).eval()
    torch.testing.assert_close(FrozenTeacher(network)(x)[0], expected(x))


def test_linear_layer_normalised_over_another_dimension():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.head = (
                nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)
            )  # fmt: skip

        def forward(self, x):  # [N, 1, 8, 8]: eight tokens of eight values
            return self.head(self.norm(self.linear(x.flatten(0, 1))).mean(1))

    network = randomised(Tokens())
    with pytest.raises(UserError, match="use fold=False"):
        FrozenTeacher(network).check(torch.randn(3, 1, 8, 8))
    FrozenTeacher(network, fold=False).check(torch.randn(3, 1, 8, 8))


def test_network_that_cannot_be_copied():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    network.lock = threading.Lock()
    with pytest.raises(UserError, match="the network Sequential cannot be copied .* such as locks"):
        FrozenTeacher(network)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_weights_that_a_hook_computes_are_copied():
    network = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(4, 3)))
    network.state = network[1].weight * 2
    x = torch.randn(5, 1, 2, 2)
    teacher = FrozenTeacher(network)
    torch.testing.assert_close(teacher(x)[0], network(x))
    assert teacher.network[1] is not network[1]


def test_weights_made_under_inference_mode():
    with torch.inference_mode():
        network = Residual()
    x = torch.randn(3, 3, 8, 8)
    taken = computed_in(torch.float32, network, "teacher", x)
    assert not any(t.is_inference() for t in (*taken.parameters(), *taken.buffers()))
    teacher = FrozenTeacher(taken, reading=reading_of(taken, x), watch=True)
    assert teacher.check(x) == 5
    with torch.no_grad():
        torch.testing.assert_close(teacher(x)[0], network.eval()(x))
    assert network.linear.weight.is_inference()


# -- which layer's input the features are ----------------------------------------------------------


class Parts(nn.Module):
    """Its layers are registered in an `order`, and run in another."""

    def __init__(self, order: str) -> None:
        super().__init__()
        made = {"stem": nn.Linear(12, 6), "gate": nn.Linear(6, 6), "classes": nn.Linear(6, 4),
                "aux": nn.Linear(6, 4)}  # fmt: skip
        for name in order.split():
            setattr(self, name, made[name])

    def vector(self, x):
        h = self.stem(x.flatten(1)).relu()
        return h * self.gate(h).sigmoid()

    def forward(self, x):
        h = self.vector(x)
        return (self.classes(h), self.aux(h)) if self.training else self.classes(h)


class AuxiliaryRuns(Parts):
    def forward(self, x):
        h = self.vector(x)
        z = self.classes(h)
        return {"logits": z, "aux": self.aux(h)}


@pytest.mark.parametrize("build", [Parts, AuxiliaryRuns])
@pytest.mark.parametrize(
    ("order", "told"),
    [("stem gate aux classes", False), ("stem aux classes gate", True),
     ("classes stem gate aux", True), ("stem gate classes aux", True)],
)  # fmt: skip
def test_the_features_are_those_that_the_logits_are_computed_from(build, order, told, caplog):
    network, x = build(order), torch.randn(16, 3, 2, 2)
    teacher = FrozenTeacher(network, reading=reading_of(network, x))
    teacher.check(x)
    torch.testing.assert_close(teacher(x)[1], network.vector(x))
    line = "the features are what enters the teacher's layer classes, the last linear one that its"
    assert (line in caplog.text) == told


@pytest.mark.parametrize("parametrized", [nn.utils.parametrizations.weight_norm,
                                          nn.utils.parametrizations.spectral_norm])  # fmt: skip
def test_features_before_a_last_layer_with_a_parametrization(parametrized):
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU()), torch.randn(16, 3, 2, 2)
    network.append(parametrized(nn.Linear(7, 5)))
    teacher = FrozenTeacher(network, reading=reading_of(network, x))
    torch.testing.assert_close(teacher(x)[1], network[:3](x))


def test_only_linear_layers_off_the_way_to_the_logits(caplog):
    network, x = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten()), torch.randn(16, 3, 2, 2)
    network[1].aux = nn.Linear(4, 4)
    teacher = FrozenTeacher(network, reading=reading_of(network, x))
    assert teacher(x)[1] is None and "the activation loss is off" in caplog.text


def test_a_layer_that_the_user_named_and_does_not_run():
    network, x = Parts("stem gate classes aux"), torch.randn(16, 3, 2, 2)
    teacher = FrozenTeacher(network, "aux", reading=reading_of(network, x))
    with pytest.raises(UserError) as raised:
        teacher.check(x)
    assert str(raised.value) == (
        "the teacher's layer 'aux' did not run; --feature-layer must name one that does, such as "
        "stem, gate, classes"
    )


def test_a_layer_that_the_network_names_and_does_not_have():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    network.feature_layer = "penultimate"
    with pytest.raises(UserError) as raised:
        FrozenTeacher(network)
    assert str(raised.value) == (
        "the teacher has no layer 'penultimate', which its attribute feature_layer names; it has "
        "0, 1"
    )


class Keywords(nn.Module):
    """Calls its layers with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(3), nn.Linear(12, 6)
        self.after, self.classes = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def vector(self, x):
        h = self.linear(input=self.norm(input=x).flatten(1))
        return self.after(input=h).relu()

    def forward(self, x):
        return self.classes(input=self.vector(x))


@pytest.mark.parametrize("watch", [False, True])
def test_layers_that_are_called_with_keywords(watch):
    network, x = randomised(Keywords()).eval(), torch.randn(16, 3, 2, 2)
    teacher = FrozenTeacher(network, watch=watch)
    teacher.check(x)
    torch.testing.assert_close(teacher(x)[1], network.vector(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher(x)[0], network(x), rtol=1e-4, atol=1e-5)
    if watch:
        hidden = network.linear(network.norm(x).flatten(1))[:, :, None, None]
        expected = distance(x, network.norm) + distance(hidden, network.after)
        torch.testing.assert_close(teacher.batch_norm_loss(World()), expected)
    else:
        assert teacher.folded


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.classes = nn.LSTM(24, 6), nn.Linear(6, 4)

    def forward(self, x):  # [N, 3, 8, 8]: eight rows, one after the other
        states, _ = self.lstm(x.permute(2, 0, 1, 3).flatten(2))
        return self.classes(states)[-1]


def test_features_must_have_a_row_for_each_image(caplog):
    network, x = TimeFirst(), torch.randn(16, 3, 8, 8)
    teacher = FrozenTeacher(network, reading=reading_of(network, x))
    assert teacher.check(x) == 4
    assert (
        "what enters the teacher's layer 'classes' has 8 rows for 16 images: the activation loss "
        "is off; --feature-layer names another layer"
    ) in caplog.messages
    logits, features = teacher(x)
    assert features is None
    torch.testing.assert_close(logits, network(x))
    with pytest.raises(UserError, match="has 8 rows for 16 images, but features need one for each"):
        FrozenTeacher(network, "classes").check(x)


def frozen_variants(kind: str) -> nn.Module:
    """BatchNorm whose weights and statistics are buffers, after convolutions and elsewhere."""
    if kind == "torchvision":
        norm = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d
    elif kind == "timm":
        norm = pytest.importorskip("timm").layers.FrozenBatchNormAct2d
    else:
        norm = WrittenOut
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), norm(6, eps=0.1), nn.Conv2d(6, 6, 3), nn.ReLU(),
        norm(6, eps=0.0), nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip
    for layer in network:
        if isinstance(layer, norm):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.3, 2)
            layer.weight.normal_(1, 0.5)
            layer.bias.normal_(0, 0.3)
    return network


class WrittenOut(nn.Module):
    """As detectors have it, down to names that differ in nothing else from other layers'."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            eps=self.eps)  # fmt: skip


class Otherwise(WrittenOut):
    """Has the tensors of a BatchNorm, and computes something else."""

    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize("kind", ["torchvision", "timm", "written out"])
def test_frozen_variants_of_batch_norm_are_folded(kind, caplog):
    network = frozen_variants(kind).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with caplog.at_level(logging.INFO):
        folded = FrozenTeacher(network)
    assert "folded 1 of the teacher's 2 BatchNorm layers" in caplog.text
    assert_same_teacher(folded, FrozenTeacher(network, fold=False), x, 1e-10)
    torch.testing.assert_close(folded(x)[0], network(x))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


@pytest.mark.parametrize("kind", ["torchvision", "timm", "written out"])
def test_frozen_variants_of_batch_norm_are_watched(kind):
    network = frozen_variants(kind).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    teacher = FrozenTeacher(network, watch=True)
    torch.testing.assert_close(teacher(x)[0], network(x))
    expected = sum(distance(network[:i](x), network[i]) for i in (1, 4))
    torch.testing.assert_close(teacher.batch_norm_loss(World()), expected)


def test_a_layer_that_is_only_named_like_batch_norm_stays(caplog):
    network = nn.Sequential(nn.Conv2d(3, 4, 8), Otherwise(4), nn.Flatten(), nn.Linear(4, 3))
    teacher = FrozenTeacher(network, watch=True)
    assert "the teacher has no BatchNorm layers" in caplog.text
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(teacher(x)[0], network(x))


# -- the statistics of what enters BatchNorm -------------------------------------------------------


def distance(x: torch.Tensor, norm) -> torch.Tensor:
    mean = (x.mean((0, 2, 3)) - norm.running_mean).norm()
    return mean + (x.var((0, 2, 3), unbiased=False) - norm.running_var).norm()


class Auxiliary(nn.Module):
    """A head that runs in training only, a layer that runs twice, and one after the other."""

    def __init__(self, twice=True) -> None:
        super().__init__()
        self.aux = nn.BatchNorm2d(4)
        self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.twice = twice

    def inputs(self, x):
        """What enters norm, norm again and last."""
        first = self.conv(x)
        second = self.norm(first).relu()
        return first, second, self.norm(second)

    def forward(self, x):
        if self.training:
            self.aux(self.conv(x))
        return self.linear(self.last(self.inputs(x)[2]).mean((2, 3)))


def test_layers_count_as_often_as_they_run():
    network = randomised(Auxiliary()).double()
    teacher = FrozenTeacher(network, watch=True)
    network.eval()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    teacher.check(x)
    teacher(x)
    teacher.network(2 * x)  # a direct call changes nothing
    loss = teacher.batch_norm_loss(World())
    norms = (network.norm, network.norm, network.last)
    expected = sum(distance(y, norm) for y, norm in zip(network.inputs(x), norms, strict=True))
    torch.testing.assert_close(loss, expected)
    for a, b in zip(*(torch.autograd.grad(value, x) for value in (loss, expected))):
        torch.testing.assert_close(a, b)


def test_the_batch_norm_loss_of_all_layers_is_that_of_each_bit_for_bit():
    network = randomised(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 7, 3),
                      nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(112, 5), nn.BatchNorm1d(5))
    )  # fmt: skip
    teacher = FrozenTeacher(network, watch=True)
    x = torch.randn(6, 3, 8, 8, requires_grad=True)

    def one_by_one():
        distances = []
        for layer, mean, variance in teacher._statistics:
            distances.append(torch.linalg.vector_norm(mean - layer.running_mean))
            distances.append(torch.linalg.vector_norm(variance - layer.running_var))
        return torch.stack(distances).sum()

    results = []
    for loss_of in (lambda: teacher.batch_norm_loss(World()), one_by_one):
        teacher(x)
        loss = loss_of()
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].abs().sum() > 0


def test_the_batch_norm_loss_keeps_the_digits_of_a_variance_far_below_the_mean():
    norm = nn.BatchNorm2d(1).double()
    norm.running_mean.fill_(120.0)
    norm.running_var.zero_()
    teacher = FrozenTeacher(
        nn.Sequential(norm, nn.Flatten(), nn.Linear(64, 2).double()), watch=True
    )
    x = 120 + 0.05 * torch.randn(32, 1, 8, 8, dtype=torch.float64)
    losses = []
    for dtype in (torch.float64, torch.float32):
        teacher.to(dtype)
        teacher(x.to(dtype))
        losses.append(float(teacher.batch_norm_loss(World())))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # of the mean, most of it


def test_batch_norm_that_never_runs_is_told(caplog):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    network[1].aux = nn.BatchNorm2d(3)
    teacher = FrozenTeacher(network, watch=True)
    teacher.check(torch.randn(16, 3, 2, 2))
    assert "the teacher runs none of its BatchNorm layers: the BatchNorm loss is off" in caplog.text
    assert not teacher.watching


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("freeze", [False, True])
def test_torchscript_does_not_show_its_batch_norm(freeze, caplog):
    program = torch.jit.trace(Residual().eval(), torch.randn(2, 3, 8, 8))
    FrozenTeacher(torch.jit.freeze(program) if freeze else program, watch=True)
    assert "a TorchScript teacher does not show its BatchNorm layers: the" in caplog.text
    assert "give it as a program of torch.export to use them" in caplog.text
    caplog.clear()
    FrozenTeacher(torch.jit.trace(LeNet5().eval(), torch.randn(2, 1, 32, 32)), watch=True)
    assert "the teacher has no BatchNorm layers" in caplog.text


# -- moving, casting, compiling --------------------------------------------------------------------


def test_moves_as_any_module():
    network = randomised(mobile())
    x = torch.randn(3, 3, 8, 8)
    logits, features = FrozenTeacher(network)(x)
    moved = FrozenTeacher(network).to("cpu").to(memory_format=torch.channels_last)
    weights = [p for p in moved.parameters() if p.dim() == 4]
    assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    for a, b in zip(moved(x.to(memory_format=torch.channels_last)), (logits, features)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    double = FrozenTeacher(network).double()(x.double())
    torch.testing.assert_close(double[0], logits.double(), rtol=1e-5, atol=1e-5)
    copied = copy.deepcopy(moved)
    for a, b in zip(copied(x), (logits, features)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [mobile, left_alone, Shared])
def test_cast_equals_autocast(build, dtype):
    network = randomised(build())
    x = torch.randn(3, 3, 8, 8)
    plain, cast = FrozenTeacher(network), FrozenTeacher(network).cast(dtype)
    kept = {p.dtype for p in cast.parameters()}
    assert dtype in kept
    results = []
    for teacher, outside in ((plain, True), (cast, False), (cast, True)):
        images = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=outside):
            logits, features = teacher(images)
        (logits.float().sum() + features.float().square().sum()).backward()
        results.append((logits, features, images.grad))
    for mine in results[1:]:
        for a, b in zip(mine, results[0]):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert cast.fingerprint() == plain.fingerprint()
    torch.testing.assert_close(cast.network(x), results[0][0], rtol=0, atol=0)


# The comparison goes backward twice, which donated buffers forbid.
@torch._functorch.config.patch(donated_buffer=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole_and_gives_the_features_of_this_call(dtype):
    network = randomised(Residual())
    teacher, compiled, inner = (FrozenTeacher(network) for _ in range(3))
    if dtype != torch.float32:
        for each in (teacher, compiled, inner):
            each.cast(dtype)
    compiled.compile(backend="aot_eager", fullgraph=True)
    inner.network.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(3, 3, 8, 8)
        for each in (compiled, inner):
            assert_same_teacher(each, teacher, x, 1e-6)
            each.network(torch.randn(2, 3, 8, 8))  # leaves nothing that the next call could meet


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_inside_a_cuda_graph(dtype):
    network = randomised(mobile()).cuda()
    teacher = FrozenTeacher(network).to(memory_format=torch.channels_last)
    if dtype != torch.float32:
        teacher.cast(dtype)
    images = torch.randn(3, 3, 8, 8, device="cuda", requires_grad=True)

    def run() -> tuple[torch.Tensor, ...]:
        logits, features = teacher(images)
        loss = logits.float().sum() + features.float().square().sum()
        return logits, features, *torch.autograd.grad(loss, images)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        images.copy_(torch.randn_like(images))
    graph.replay()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(captured, run()):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- what a look at the outputs finds --------------------------------------------------------------


def sequential(*tail: nn.Module, classes: int = 10, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, classes), *tail)
    network[1].weight.data *= scale
    return network


class Call(nn.Module):
    """A function of logits as a layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, t):
        return self.function(t)


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (sequential(nn.Softmax(1)), "returns probabilities of 10 classes; the losses need logits"),
        (sequential(nn.Softmax(1), classes=2), "returns probabilities of"),
        (sequential(nn.Softmax(1), scale=1e4), "returns probabilities of"),  # all of them 0 or 1
        (sequential(nn.Softmax(1)).bfloat16(), "returns probabilities of"),
        (sequential(nn.LogSoftmax(1)), "returns log-probabilities of 10 classes; the losses need"),
        (sequential(nn.LogSoftmax(1), classes=2), "returns log-probabilities of"),
        (sequential(nn.LogSoftmax(1), scale=1e4), "returns log-probabilities of"),
        (sequential(nn.LogSoftmax(1), classes=1000).bfloat16(), "returns log-probabilities of"),
        (sequential(nn.LogSoftmax(1)).half(), "returns log-probabilities of"),
        (sequential(nn.Unflatten(1, (2, 5))), r"must return logits \[N, C\], got \[16, 2, 5\]"),
        (sequential(nn.Sigmoid()), "returns a sigmoid for each of 10 classes, .*; the losses need"),
        (sequential(classes=1), "returns one logit, of the second of two classes; the losses need"),
        (sequential(Call(torch.Tensor.detach)), "gives no gradient to its images"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 10)), "does not take images of shape"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(4, 2)),
         "does not take images of shape .*: expected 2D or 3D input"),
    ],
)  # fmt: skip
def test_check_names_what_is_wrong(network, sentence):
    images = torch.randn(16, 1, 32, 32, dtype=next(network.parameters()).dtype)
    with pytest.raises(UserError, match=sentence):
        FrozenTeacher(network, fold=False).check(images)


@pytest.mark.parametrize(("layer", "name"), [("fc2", "logits"), ("conv3", "features")])
def test_check_finds_nan(layer, name):
    network = LeNet5()
    with torch.no_grad():
        network.get_submodule(layer).weight[0, 0] = float("nan")
        if layer == "conv3":  # the logits must not be what gives it away
            network.fc1.weight[:, 0] = 0
    with pytest.raises(UserError, match=f"{name if layer == 'fc2' else ''}.* hold NaN or infinity"):
        FrozenTeacher(network, "fc1").check(torch.randn(16, 1, 32, 32))


def masked(value: float) -> nn.Module:
    return sequential(Call(lambda t: t.masked_fill(torch.arange(10) == 3, value)))


def test_check_names_masked_classes():
    images = torch.randn(16, 1, 32, 32)
    with pytest.raises(UserError) as raised:
        FrozenTeacher(masked(float("-inf"))).check(images)
    assert str(raised.value) == (
        "the teacher's logits hold -inf, as those of masked classes, which the losses cannot take; "
        "mask them with a large negative number, such as -1e9"
    )
    teacher = FrozenTeacher(masked(-1e9))
    assert teacher.check(images) == 10
    x = images.clone().requires_grad_()
    loss = generator_loss(*teacher(x)).total
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_check_names_quantised_layers():
    network = torch.ao.quantization.quantize_dynamic(LeNet5().eval(), {nn.Linear})
    x = torch.randn(16, 1, 32, 32)
    teacher = FrozenTeacher(network)
    with pytest.raises(UserError, match=r"is quantised \(Linear\), which leaves no gradient"):
        teacher.check(x)
    assert teacher.check(x, to_images=False) == 10
    torch.testing.assert_close(teacher(x)[0], network(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "network",
    [
        sequential(),
        sequential(classes=2),
        sequential(classes=2, scale=1e-2),
        sequential(classes=1000),
        sequential(nn.ReLU()),
        sequential(Call(lambda t: t - t.mean(1, keepdim=True) + 0.1)),  # rows sum to 1, some < 0
        sequential(Call(lambda t: t - t.amax(1, keepdim=True))),  # none above 0, as log-softmax
        LeNet5(),
    ],
)
def test_check_accepts_an_honest_teacher(network, dtype, caplog):
    teacher = FrozenTeacher(network)
    if dtype != torch.float32:
        teacher.cast(dtype)
    teacher.check(torch.randn(16, 1, 32, 32))
    assert "sigmoid" not in caplog.text


def test_check_warns_of_what_may_be_a_sigmoid(caplog):
    handmade = sequential(Call(lambda t: 1 / (1 + torch.exp(-t))))
    FrozenTeacher(handmade).check(torch.randn(16, 1, 32, 32))
    assert "between 0 and 1, as those of a sigmoid" in caplog.text


def test_fingerprint_is_that_of_the_unfolded_weights():
    network = LeNet5()
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    teacher = FrozenTeacher(network).to(memory_format=torch.channels_last).cast(torch.bfloat16)
    assert teacher.fingerprint() == digest.hexdigest()


def test_fingerprint_follows_the_weights():
    network = Residual()
    before = FrozenTeacher(network).fingerprint()
    assert before == FrozenTeacher(network).fingerprint()
    for tensor in (network.linear.bias, network.bn1.running_mean, network.bn1.num_batches_tracked):
        with torch.no_grad():
            tensor.view(-1)[0] += 1
        after = FrozenTeacher(network).fingerprint()
        assert after != before
        before = after


class Extra(nn.Sequential):
    """Keeps more than tensors in its state."""

    def __init__(self, extra) -> None:
        super().__init__(nn.Flatten(), nn.Linear(4, 3))
        nn.init.ones_(self[1].weight), nn.init.ones_(self[1].bias)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_fingerprint_of_what_is_no_tensor():
    def of(extra):
        return FrozenTeacher(Extra(extra)).fingerprint()

    extras = [{"version": 1}, {"version": 2}, (torch.ones(2), "a"), (torch.zeros(2), "a"), [None]]
    prints = [of(extra) for extra in extras]
    assert len(set(prints)) == len(extras)
    assert [of(copy.deepcopy(extra)) for extra in extras] == prints
    assert of(threading.Event) == of(threading.Event)


@pytest.mark.filterwarnings("ignore")
def test_fingerprint_follows_quantised_weights():
    def of(value):
        network = Extra(None)
        nn.init.constant_(network[1].weight, value)
        return FrozenTeacher(torch.ao.quantization.quantize_dynamic(network)).fingerprint()

    assert of(1.0) == of(1.0) != of(2.0)

"""3x3 convolutions with fewer multiplications against torch's, in fp64 and by their rounding."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dafl_fast import _C
from dafl_fast.engine.teacher import FrozenTeacher
from dafl_fast.models import build, winograd
from dafl_fast.models.winograd import WinogradConv2d, accelerated

conv3x3 = torch.ops.dafl_fast.conv3x3
DOUBLE = torch.float64
# x and output channels. With (5, 3, 32, 33) the sums of the weight's gradient are cut.
CASES = [
    ((1, 1, 1, 1), 1),
    ((1, 3, 2, 2), 70),
    ((3, 5, 5, 7), 7),
    ((3, 70, 6, 9), 33),
    ((1, 64, 8, 8), 128),
    ((5, 3, 32, 33), 4),
]
IDS = ["x".join(map(str, (*shape, channels))) for shape, channels in CASES]
NEEDS_BF16 = pytest.mark.skipif(
    not _C.conv3x3_pays(torch.bfloat16), reason="no fast bf16 kernels for this processor"
)
NEEDS_FP32 = pytest.mark.skipif(
    not _C.conv3x3_pays(torch.float32), reason="no fast fp32 kernels for this processor"
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def fast(x, weight, bias):
    return conv3x3(x, weight, bias, None, None)


def direct(x, weight, bias):
    """In the dtype of x, as autocast does."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, padding=1)


def tensors(shape, channels, dtype=DOUBLE):
    """x, weight, bias and the gradient of the output, which `dtype` can hold (the parameters fp32
    where it is of 16 bits)."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(channels, shape[1], 3, 3, dtype=wide) / (9 * shape[1]) ** 0.5
    bias = torch.randn(channels, dtype=wide)
    return x, weight, bias, torch.randn(shape[0], channels, *shape[2:]).to(dtype)


def run(function, x, weight, bias, upstream, dtype):
    """Output and gradients as float64; activations are of `dtype`."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    leaves = [x.detach().to(dtype), weight.detach().to(wide), bias.detach().to(wide)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    y.backward(upstream.to(dtype))
    assert y.dtype == dtype
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    return [t.double() for t in (y.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize(
    "form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize(("shape", "channels"), CASES, ids=IDS)
def test_equals_the_convolution_in_fp64(shape, channels, form):
    x, weight, bias, upstream = tensors(shape, channels)
    x, weight = x.to(memory_format=form), weight.to(memory_format=form)
    ours = run(fast, x, weight, bias, upstream, DOUBLE)
    for mine, expected in zip(ours, run(direct, x, weight, bias, upstream, DOUBLE), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)


def norm_errors(values, oracle):
    return [
        ((mine - expected).norm() / expected.norm()).item()
        for mine, expected in zip(values, oracle, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "channels"), CASES[1:], ids=IDS[1:])
def test_rounds_at_most_three_times_as_much_as_a_direct_convolution(shape, channels, dtype):
    given = tensors(shape, channels, dtype)
    oracle = run(direct, *given, DOUBLE)
    ours = norm_errors(run(fast, *given, dtype), oracle)
    theirs = norm_errors(run(direct, *given, dtype), oracle)
    # fp32 sums differ in their order, too: in that of the weight's gradient we add long columns.
    allowance = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 0.25)
    for name, mine, direct_error in zip(("y", "x", "weight", "bias"), ours, theirs, strict=True):
        assert mine <= 3 * direct_error + allowance, (
            f"{name}: {mine:.2g}, direct {direct_error:.2g}"
        )


@pytest.mark.parametrize("isa", _C.build_info()["isa_available"])
def test_every_instruction_set(isa):
    if os.environ.get("DAFL_FAST_ISA") or isa == _C.build_info()["isa"]:
        pytest.skip("this whole run is on one, or it is what the other tests run on")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k",
         "rounds_at_most"],
        env={**os.environ, "DAFL_FAST_ISA": isa}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_any_strides_a_second_backward_and_no_bias():
    whole = torch.randn(3, 11, 6, 10, dtype=DOUBLE)
    x = whole[:, 1:-1, :, ::2].permute(0, 3, 2, 1).requires_grad_()  # [3, 5, 6, 9]
    weight = torch.randn(3, 3, 5, 7, dtype=DOUBLE).permute(3, 2, 1, 0).requires_grad_()
    y, expected = fast(x, weight, None), F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn(y.shape[::-1], dtype=DOUBLE).permute(3, 2, 1, 0)
    first = torch.autograd.grad(y, (x, weight), upstream, retain_graph=True)
    again = torch.autograd.grad(y, (x, weight), 2 * upstream)
    oracle = torch.autograd.grad(expected, (x, weight), upstream)
    torch.testing.assert_close(first, oracle, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(b, 2 * a) for a, b in zip(first, again, strict=True))


def test_only_the_gradients_that_are_wanted():
    x, weight, bias, upstream = tensors((2, 4, 5, 4), 3)
    oracle = run(direct, x, weight, bias, upstream, DOUBLE)[1:]
    for wanted in range(3):
        leaves = [x.clone(), weight.clone(), bias.clone()]
        leaves[wanted].requires_grad_()
        fast(*leaves).backward(upstream)
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i == wanted)
        torch.testing.assert_close(leaves[wanted].grad, oracle[wanted], rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, weight, bias), direct(x, weight, bias))


def test_an_empty_batch():
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    y = fast(x, weight, None)
    y.sum().backward()
    assert y.shape == (0, 5, 4, 4) and x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_second_derivatives_are_refused():
    x, weight, bias, _ = tensors((1, 2, 3, 3), 2)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(fast(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.randn(3, 4, 4), torch.randn(2, 3, 3, 3), None), "x must be"),
        ((torch.randn(1, 3, 4, 4), torch.randn(2, 4, 3, 3), None), "weight must be"),
        ((torch.randn(1, 3, 4, 4), torch.randn(2, 3, 5, 5), None), "weight must be"),
        ((torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3), torch.randn(3)), "bias must be"),
    ],
)
def test_errors_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=name):
        fast(*arguments)


def test_factors_of_other_channels_are_refused():
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3)
    wrong = torch.ops.dafl_fast.conv3x3_factors(torch.randn(2, 300, 3, 3), x.dtype, True)
    with pytest.raises(ValueError, match="factors"):
        conv3x3(x, weight, None, *wrong)


def test_same_bits_at_any_number_of_threads():
    given = tensors((9, 20, 32, 32), 33, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(fast, *given, torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))


def test_compiles_whole_and_gives_the_same():
    given = tensors((3, 5, 5, 7), 7)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    eager, traced = run(fast, *given, DOUBLE), run(compiled, *given, DOUBLE)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


# ---- Modules -----------------------------------------------------------------------------------


def test_other_convolutions_stay_what_they_are():
    class Own(nn.Conv2d):
        pass

    others = nn.Sequential(
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding="same"),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, (3, 1), padding=(1, 0)),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(3, 64, 3, padding=1),
        nn.Conv2d(64, 80, 3, padding=1),
        Own(64, 64, 3, padding=1),
    )
    before = [type(layer) for layer in others]
    assert [type(layer) for layer in accelerated(others, constant=True)] == before


def test_changes_nothing_but_the_class():
    network = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    parameters = list(network.parameters())
    state = copy.deepcopy(network.state_dict())
    fast = accelerated(network, constant=True)
    assert type(fast[0]) is WinogradConv2d and type(network[0]) is nn.Conv2d
    assert all(a is b for a, b in zip(parameters, fast.parameters(), strict=True))
    assert list(fast.state_dict()) == list(state)
    assert all(torch.equal(fast.state_dict()[name], state[name]) for name in state)
    network.load_state_dict(fast.state_dict())


def counted(monkeypatch):
    """The dtypes in which conv3x3 is called from now on."""
    calls = []

    class Ops:
        conv3x3_factors = torch.ops.dafl_fast.conv3x3_factors

        @staticmethod
        def conv3x3(x, *others):
            calls.append(x.dtype)
            return conv3x3(x, *others)

    monkeypatch.setattr(winograd, "_OPS", Ops)
    return calls


def layer_pair():
    plain = nn.Conv2d(64, 128, 3, padding=1)
    return plain, accelerated(copy.deepcopy(plain))


@NEEDS_FP32
def test_computes_directly_what_does_not_gain(monkeypatch):
    calls = counted(monkeypatch)
    plain, layer = layer_pair()
    small = torch.randn(3, 64, 6, 6)  # 27 tiles
    for x in (small, small[0], torch.randn(8, 64, 12, 12).double()):
        plain, layer = plain.to(x.dtype), layer.to(x.dtype)
        assert torch.equal(layer(x), plain(x))
    assert calls == []


@NEEDS_BF16
def test_follows_autocast(monkeypatch):
    calls = counted(monkeypatch)
    plain, layer = layer_pair()
    x = torch.randn(8, 64, 12, 12, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), plain(twin)
    assert y.dtype == torch.bfloat16 and calls == [torch.bfloat16]
    upstream = torch.randn_like(y)
    y.backward(upstream), expected.backward(upstream)
    pairs = [(x, twin), *zip(layer.parameters(), plain.parameters(), strict=True)]
    for mine, theirs in pairs:
        assert mine.grad.dtype == torch.float32
        assert norm_errors([mine.grad], [theirs.grad])[0] < 1e-2
    assert norm_errors([y], [expected])[0] < 1e-2


@NEEDS_FP32
def test_trained_weights_are_read_anew():
    plain, layer = layer_pair()
    x = torch.randn(8, 64, 12, 12)
    layer(x)
    with torch.no_grad():
        for twin in (plain, layer):
            twin.weight.mul_(-2)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, marks=NEEDS_BF16),
        pytest.param(torch.float32, marks=NEEDS_FP32),
    ],
    ids=str,
)
def test_a_frozen_teacher(dtype, monkeypatch):
    """Folded, cast, accelerated; also for a single image, since the factors are there."""
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    plain, teacher = FrozenTeacher(network), FrozenTeacher(network)
    if dtype != torch.float32:
        plain.cast(dtype), teacher.cast(dtype)
    teacher.network = accelerated(teacher.network, constant=True)
    calls = counted(monkeypatch)
    x = torch.randn(1, 3, 9, 8, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    (logits, features), (expected, _) = teacher(x), plain(twin)
    assert calls == [dtype] and features.shape == (1, 64)
    logits.float().square().sum().backward()
    expected.float().square().sum().backward()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert norm_errors([logits, x.grad], [expected, twin.grad])[0] < tolerance
    assert norm_errors([x.grad], [twin.grad])[0] < tolerance
    assert all(parameter.grad is None for parameter in teacher.parameters())


@NEEDS_FP32
def test_a_training_step_of_resnet18_agrees(monkeypatch):
    calls = counted(monkeypatch)
    plain = build("ResNet18").to(memory_format=torch.channels_last)
    network = accelerated(copy.deepcopy(plain))
    x = torch.randn(8, 3, 16, 16)
    losses = []
    for model in (network, plain):
        losses.append(F.cross_entropy(model(x), torch.arange(8)))
        losses[-1].backward()
    assert len(calls) == 10  # those of the first three stages; 2x2 images have too few tiles
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        # Far above rounding: where it turns a ReLU on or off, a gradient moves by about 1 %.
        assert norm_errors([mine.grad], [theirs.grad])[0] < 3e-2


@NEEDS_FP32
def test_a_module_compiles_whole():
    plain, layer = layer_pair()
    x = torch.randn(8, 64, 12, 12)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-3, atol=1e-3)

"""The networks' fast layers against the layers that they stand for, in plain PyTorch."""

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
from dafl_fast.models import functional
from dafl_fast.models.functional import conv_pool, image_conv, norm_activation, upsample_conv

DOUBLE = torch.float64
# Largest error relative to the largest value, and the dtype that activations are computed in.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def conv(ci: int, co: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(ci, co, kernel, padding=1 if kernel == 3 else 0).double()


def norm_of(channels: int, eps: float = 0.8) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=eps, momentum=0.3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


# Each layer as (fast, published), functions of x and modules; upsample_conv leaves out the bias.
LAYERS = {
    "upsample_conv": (
        upsample_conv,
        lambda x, c: F.conv2d(F.interpolate(x, scale_factor=2), c.weight, padding=1),
    ),
    "norm_activation": (
        lambda x, n: norm_activation(x, n, 0.2, None),
        lambda x, n: F.leaky_relu(n(x), 0.2),
    ),
    "image_conv": (image_conv, lambda x, c: c(x)),
    "conv_pool": (conv_pool, lambda x, c: F.relu(F.max_pool2d(c(x), 2))),
}
CASES = [
    ("upsample_conv", (1, 1, 1, 1), lambda: conv(1, 1)),
    ("upsample_conv", (3, 5, 4, 6), lambda: conv(5, 7)),
    ("upsample_conv", (2, 16, 7, 5), lambda: conv(16, 33)),
    ("upsample_conv", (5, 3, 1, 3), lambda: conv(3, 2)),
    ("upsample_conv", (37, 24, 8, 8), lambda: conv(24, 32)),
    ("norm_activation", (2, 1, 1, 1), lambda: norm_of(1)),
    ("norm_activation", (3, 5, 4, 3), lambda: norm_of(5)),
    ("norm_activation", (130, 19, 9, 7), lambda: norm_of(19, 1e-5)),
    ("norm_activation", (9, 32, 8, 8), lambda: norm_of(32)),
    ("image_conv", (1, 1, 1, 1), lambda: conv(1, 1)),
    ("image_conv", (3, 7, 2, 5), lambda: conv(7, 1)),
    ("image_conv", (40, 16, 17, 18), lambda: conv(16, 3)),
    ("image_conv", (2, 24, 32, 32), lambda: conv(24, 4)),
    ("conv_pool", (1, 1, 6, 6), lambda: conv(1, 1, 5)),
    ("conv_pool", (16, 1, 32, 32), lambda: conv(1, 3, 5)),
    ("conv_pool", (35, 3, 14, 14), lambda: conv(3, 8, 5)),
    ("conv_pool", (3, 6, 9, 12), lambda: conv(6, 17, 5)),
    ("conv_pool", (17, 5, 7, 6), lambda: conv(5, 2, 5)),
]
IDS = [f"{name}-{'x'.join(map(str, shape))}" for name, shape, _ in CASES]
channels_last = torch.channels_last


def run(layer, x, module, upstream, dtype=DOUBLE):
    """Output, gradients and running statistics of one training pass in `dtype`, as float64."""
    x = x.to(dtype).detach().requires_grad_()
    module = copy.deepcopy(module).to(torch.float32 if dtype.itemsize < 4 else dtype)
    y = layer(x, module)
    assert y.dtype == dtype
    y.backward(upstream.to(dtype))
    results = {"y": y.detach(), "x": x.grad}
    results.update((name, p.grad) for name, p in module.named_parameters())
    results.update((name, b) for name, b in module.named_buffers())
    return {name: t.double() for name, t in results.items() if t is not None}


def assert_close(ours, oracle, tolerance):
    assert ours.keys() >= oracle.keys()
    for name, expected in oracle.items():
        scale = max(expected.abs().max().item(), 1e-3)
        error = (ours[name] - expected).abs().max().item() / scale
        assert error <= tolerance, f"{name}: {error:.2g} of the largest value"


@pytest.mark.parametrize("form", [torch.contiguous_format, channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("name", "shape", "make"), CASES, ids=IDS)
def test_equals_the_layers_in_fp64(name, shape, make, form):
    fast, published = LAYERS[name]
    module = make()
    x = torch.randn(shape, dtype=DOUBLE).to(memory_format=form)
    upstream = torch.randn_like(published(x, copy.deepcopy(module)))
    oracle = run(published, x, module, upstream)
    if name == "upsample_conv":
        oracle.pop("bias", None)
    assert_close(run(fast, x, module, upstream), oracle, TOLERANCE[DOUBLE] * 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "shape", "make"), CASES, ids=IDS)
def test_rounds_no_more_than_stated(name, shape, make, dtype):
    """Inputs that the dtype can hold, so that only the computation rounds. Small integers: no two
    candidates of a maximum, and no value and zero, are closer than rounding without being equal."""
    fast, published = LAYERS[name]
    module = make()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_((p * 8).round() / 8)
    x = torch.randint(-3, 4, shape).double()
    upstream = torch.randint(-3, 4, published(x, copy.deepcopy(module)).shape).double()
    if name == "norm_activation":
        # Away from the kink of the activation, where a rounding error flips the slope.
        fast = lambda x, n: norm_activation(x, n, 1.0, None)  # noqa: E731
        published = lambda x, n: n(x)  # noqa: E731
    ours = run(fast, x, module, upstream, dtype)
    oracle = run(published, x, module, upstream)
    if name == "upsample_conv":
        oracle.pop("bias", None)
    assert_close(ours, oracle, TOLERANCE[dtype])


@pytest.mark.parametrize("name", LAYERS)
def test_any_strides_and_a_second_backward(name):
    _, shape, make = next(case for case in CASES if case[0] == name and case[1][0] > 1)
    fast, published = LAYERS[name]
    module = make()
    n, c, h, w = shape
    whole = torch.randn(n, w + 2, h, 2 * c, dtype=DOUBLE)
    x = whole[:, 1:-1, :, ::2].permute(0, 3, 2, 1).requires_grad_()
    y, expected = fast(x, copy.deepcopy(module)), published(x, copy.deepcopy(module))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    upstream = torch.randn(y.shape[::-1], dtype=DOUBLE).permute(3, 2, 1, 0)
    first = torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
    again = torch.autograd.grad(y, x, 2 * upstream)[0]
    oracle = torch.autograd.grad(expected, x, upstream)[0]
    torch.testing.assert_close(first, oracle, rtol=1e-9, atol=1e-10)
    assert torch.equal(again, 2 * first)


def test_an_empty_batch():
    for fast, module in ((upsample_conv, conv(3, 4)), (image_conv, conv(3, 1))):
        x = torch.empty(0, 3, 4, 4, dtype=DOUBLE, requires_grad=True)
        fast(x, module).sum().backward()
        assert x.grad.shape == x.shape and not module.weight.grad.any()
    x = torch.empty(0, 3, 8, 8, dtype=DOUBLE, requires_grad=True)
    module = conv(3, 2, 5)
    assert conv_pool(x, module).shape == (0, 2, 2, 2)
    conv_pool(x, module).sum().backward()
    assert x.grad.shape == x.shape and not module.weight.grad.any()


# ---- Pooling ------------------------------------------------------------------------------------


def identity_conv(bias: float = 0.0) -> nn.Conv2d:
    """Passes the middle of its window on."""
    module = conv(1, 1, 5)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[0, 0, 2, 2] = 1
        module.bias.fill_(bias)
    return module


def test_first_of_equal_maxima_gets_the_gradient():
    x = torch.zeros(20, 1, 8, 8, dtype=DOUBLE)
    x[:, 0, 2:6, 2:6] = torch.randint(1, 3, (20, 4, 4)).double()  # many ties
    upstream = torch.randn(20, 1, 2, 2, dtype=DOUBLE)
    module = identity_conv()
    oracle = run(LAYERS["conv_pool"][1], x, module, upstream)
    ours = run(conv_pool, x, module, upstream)
    for name, expected in oracle.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-12)
    assert ((ours["x"] != 0).sum((1, 2, 3)) == 4).all()


def test_relu_gives_no_gradient_at_zero_and_below():
    x = torch.zeros(2, 1, 6, 6, dtype=DOUBLE)
    for bias in (0.0, -1.0):
        ours = run(conv_pool, x, identity_conv(bias), torch.ones(2, 1, 1, 1, dtype=DOUBLE))
        assert not ours["y"].any() and not ours["bias"].any() and not ours["weight"].any()


@pytest.mark.parametrize("place", [(2, 2), (2, 3), (3, 2), (3, 3)])
def test_nan_wins_the_maximum(place):
    x = torch.ones(1, 1, 6, 6)
    x[0, 0, place[0], place[1]] = torch.nan
    module = identity_conv().float()
    assert conv_pool(x, module).isnan().all()


# ---- BatchNorm ----------------------------------------------------------------------------------


def test_bias_before_norm_shifts_only_the_running_mean():
    c, norm = conv(4, 6), norm_of(6)
    twin = copy.deepcopy(norm)
    x = torch.randn(5, 4, 6, 6, dtype=DOUBLE)
    for _ in range(2):
        y = norm_activation(upsample_conv(x, c), norm, 0.2, c.bias)
        expected = F.leaky_relu(twin(c(F.interpolate(x, scale_factor=2))), 0.2)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    for mine, theirs in zip(norm.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    norm.eval(), twin.eval()
    y = norm_activation(upsample_conv(x, c), norm, 0.2, c.bias)
    expected = F.leaky_relu(twin(c(F.interpolate(x, scale_factor=2))), 0.2)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)


def test_variance_survives_a_large_mean():
    x = (torch.randn(64, 8, 16, 16, dtype=DOUBLE) + 1000).float()
    norm = nn.BatchNorm2d(8)
    y = norm_activation(x, norm, 1.0, None)
    wide = x.double()
    mean, var = wide.mean((0, 2, 3), True), wide.var((0, 2, 3), correction=0, keepdim=True)
    expected = ((wide - mean) / (var + norm.eps).sqrt()).float()
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)
    unbiased = wide.var((0, 2, 3)).float()
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * unbiased, rtol=1e-5, atol=0)


def test_a_norm_of_another_kind_is_called():
    class Other(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 100

    assert (norm_activation(torch.randn(4, 3, 5, 5), Other(3), 0.2, None) > 50).all()


def test_one_value_per_channel_is_refused_as_torch_does():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_activation(torch.randn(1, 3, 1, 1), nn.BatchNorm2d(3), 0.2, None)


# ---- Errors, autocast, threads, instruction sets, compilation ------------------------------------


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: upsample_conv(torch.randn(2, 3, 4, 4), nn.Conv2d(4, 2, 3)), "weight"),
        (lambda: upsample_conv(torch.randn(3, 4, 4), nn.Conv2d(3, 2, 3)), "x must be"),
        (lambda: image_conv(torch.randn(2, 3, 4, 4), nn.Conv2d(3, 2, 5)), "weight"),
        (lambda: conv_pool(torch.randn(2, 3, 5, 9), nn.Conv2d(3, 2, 5)), "at least 6 rows"),
        (lambda: norm_activation(torch.randn(2, 3, 4, 4), nn.BatchNorm2d(2), 1.0, None), "weight"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_refused(name):
    _, shape, make = next(case for case in CASES if case[0] == name and case[1][0] > 1)
    x = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    y = LAYERS[name][0](x, make())
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_rounds_activations_not_parameters(name):
    _, shape, make = next(case for case in CASES if case[0] == name and case[1][0] > 2)
    module = make().float()
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = LAYERS[name][0](x, module)
    expected = LAYERS[name][0](x.bfloat16(), copy.deepcopy(module))
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert x.grad.dtype == module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_at_any_number_of_threads(name):
    fast = LAYERS[name][0]
    _, _, make = next(case for case in CASES if case[0] == name and case[1][0] > 2)
    module = make()
    channels = module.weight.shape[1] if module.weight.dim() == 4 else module.weight.shape[0]
    x = torch.randn(150, channels, 16, 16)
    upstream = torch.randn_like(fast(x, copy.deepcopy(module).float()).detach()).double()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(fast, x, module, upstream, torch.float32))
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    """This file's numerical tests again, each instruction set in a process of its own."""
    info = _C.build_info()
    if isa not in info["isa_available"] or isa == info["isa"]:
        pytest.skip("not here, or what the other tests run on")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k",
         "rounds_no_more or nhwc or maxim or large_mean"],
        env={**os.environ, "DAFL_FAST_ISA": isa}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_whole_and_gives_the_same(name):
    fast = LAYERS[name][0]
    _, shape, make = next(case for case in CASES if case[0] == name and case[1][0] > 2)
    module = make()
    x = torch.randn(shape, dtype=DOUBLE)
    upstream = torch.randn_like(fast(x, copy.deepcopy(module)).detach())
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    eager, traced = run(fast, x, module, upstream), run(compiled, x, module, upstream)
    assert all(torch.equal(eager[key], traced[key]) for key in eager)


@pytest.mark.parametrize("name", ["upsample_conv", "norm_activation", "image_conv", "conv_pool"])
def test_opcheck(name):
    operator = getattr(torch.ops.dafl_fast, name)
    x = torch.randn(3, 4, 8, 6, requires_grad=True)
    vector = torch.randn(4, requires_grad=True)
    arguments = {
        "upsample_conv": (x, torch.randn(5, 4, 3, 3, requires_grad=True)),
        "norm_activation": (x, vector, torch.randn(4, requires_grad=True), 0.8, 0.2),
        "image_conv": (x, torch.randn(4, 4, 3, 3, requires_grad=True), vector),
        "conv_pool": (x, torch.randn(4, 4, 5, 5, requires_grad=True), vector),
    }[name]
    torch.library.opcheck(operator, arguments)


def test_elsewhere_the_layers_themselves_run(monkeypatch):
    """The path of other devices, taken here by a tensor that says it is on one."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

    monkeypatch.setattr(functional, "_OPS", None)
    for name, (fast, published) in LAYERS.items():
        shape = next(s for n, s, _ in CASES if n == name and s[0] > 1)
        module = next(make for n, s, make in CASES if n == name and s[0] > 1)()
        x = torch.randn(shape, dtype=DOUBLE)
        y = fast(x.as_subclass(Elsewhere), copy.deepcopy(module)).as_subclass(torch.Tensor)
        torch.testing.assert_close(y, published(x, module), rtol=1e-10, atol=1e-11)

"""The networks' fast layers against the layers that they stand for, in plain PyTorch."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dafl_fast import _C
from dafl_fast.models import functional
from dafl_fast.models.functional import batch_norm, conv_pool, upsample_stage
from dafl_fast.models.norm import FastBatchNorm2d, with_fast_norms

from .conftest import NO_GPU

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


class Stage(nn.Module):
    """Modules of an upsampling stage: conv, norm and, with `image` channels, to_image."""

    def __init__(self, ci: int, co: int, image: int = 0, eps: float = 0.8):
        super().__init__()
        self.conv, self.norm = conv(ci, co), norm_of(co, eps)
        self.to_image = conv(co, image) if image else None


SLOPE = 0.2


def fast_stage(x, s, slope=SLOPE):
    return upsample_stage(x, s.conv, s.norm, slope, s.to_image)


def published_stage(x, s, slope=SLOPE):
    y = F.leaky_relu(s.norm(s.conv(F.interpolate(x, scale_factor=2))), slope)
    return y if s.to_image is None else s.to_image(y)


# Each as (fast, published), functions of x and a module.
LAYERS = {
    "upsample": (
        lambda x, c: torch.ops.dafl_fast.upsample_conv(x, c.weight)[0],
        lambda x, c: F.conv2d(F.interpolate(x, scale_factor=2), c.weight, padding=1),
    ),
    "norm": (batch_norm, lambda x, n: n(x)),
    "stage": (fast_stage, published_stage),
    "conv_pool": (conv_pool, lambda x, c: F.relu(F.max_pool2d(c(x), 2))),
}
CASES = [
    ("upsample", (1, 1, 1, 1), lambda: conv(1, 1)),
    ("upsample", (3, 5, 4, 6), lambda: conv(5, 7)),
    ("upsample", (2, 16, 7, 5), lambda: conv(16, 33)),
    ("upsample", (5, 3, 1, 3), lambda: conv(3, 2)),
    ("upsample", (300, 24, 8, 8), lambda: conv(24, 32)),
    ("norm", (2, 1, 1, 1), lambda: norm_of(1)),
    ("norm", (3, 5, 4, 3), lambda: norm_of(5)),
    ("norm", (130, 19, 9, 7), lambda: norm_of(19, 1e-5)),
    ("norm", (9, 32, 8, 8), lambda: norm_of(32)),
    ("stage", (1, 1, 1, 1), lambda: Stage(1, 1, 1)),
    ("stage", (3, 5, 4, 6), lambda: Stage(5, 7)),
    ("stage", (2, 16, 3, 5), lambda: Stage(16, 33, 2)),
    ("stage", (40, 4, 8, 9), lambda: Stage(4, 16, 3, 1e-5)),
    ("stage", (5, 8, 16, 16), lambda: Stage(8, 24, 4)),
    ("stage", (4, 3, 5, 4), lambda: Stage(3, 6, 1)),
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
    if isinstance(module, Stage):
        # While BatchNorm subtracts it again, its gradient is zero up to rounding, or not computed.
        assert module.conv.bias.grad is None or module.conv.bias.grad.abs().max() < 1e-9
        module.conv.bias.grad = None
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
    if name == "stage":
        # Without the kink of the activation, where a rounding error flips the slope.
        fast, published = (partial(layer, slope=1.0) for layer in (fast, published))
    ours = run(fast, x, module, upstream, dtype)
    oracle = run(published, x, module, upstream)
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


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_parameters_with_any_strides(case):
    name, shape, make = case
    fast, published = LAYERS[name]
    module = make().float()
    for layer in module.modules():
        for key, p in list(layer.named_parameters(recurse=False)):
            setattr(
                layer, key, nn.Parameter(torch.randn(p.shape[::-1]).permute(*range(p.dim())[::-1]))
            )
    x = torch.randn(shape)
    slope = {"slope": 1.0} if name == "stage" else {}  # no kink that rounding could cross
    y = fast(x, copy.deepcopy(module), **slope)
    expected = published(x, copy.deepcopy(module), **slope)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_an_empty_batch():
    for layer, x, module in (
        (LAYERS["upsample"][0], torch.empty(0, 3, 4, 4), conv(3, 4)),
        (conv_pool, torch.empty(0, 3, 8, 8), conv(3, 2, 5)),
    ):
        x = x.double().requires_grad_()
        layer(x, module).sum().backward()
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


@pytest.mark.parametrize("image", [0, 2])
def test_stage_in_training_then_evaluation(image):
    """The bias before BatchNorm shifts only the running mean, which evaluation then uses."""
    ours = Stage(4, 6, image)
    theirs = copy.deepcopy(ours)
    x = torch.randn(5, 4, 6, 6, dtype=DOUBLE)
    for mode in (True, True, False):
        y, expected = fast_stage(x, ours.train(mode)), published_stage(x, theirs.train(mode))
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_variance_survives_a_large_mean():
    x = (torch.randn(64, 8, 16, 16, dtype=DOUBLE) + 1000).float()
    norm = nn.BatchNorm2d(8)
    y = batch_norm(x, norm)
    wide = x.double()
    mean, var = wide.mean((0, 2, 3), True), wide.var((0, 2, 3), correction=0, keepdim=True)
    expected = ((wide - mean) / (var + norm.eps).sqrt()).float()
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)
    unbiased = wide.var((0, 2, 3)).float()
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * unbiased, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "kernels", ["ours", "torch's", pytest.param("a GPU's", marks=[pytest.mark.gpu, NO_GPU])]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 7, 4), (33, 16, 8, 8), (1, 1, 1, 2), (9, 5)], ids=str)
def test_moments_and_what_goes_on_share_a_gradient(shape, dtype, kernels, monkeypatch):
    if kernels == "torch's":  # as on a GPU
        if dtype in (torch.float16, torch.bfloat16):
            pytest.skip("on a CPU torch gives these moments in 16 bits, on a GPU in fp32")
        monkeypatch.setattr(functional, "operators_run", lambda x: False)
        with_moments = functional._Moments.apply
    else:
        with_moments = functional.with_moments
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=DOUBLE) * 2 + 1
    upstream = torch.randn(shape, dtype=DOUBLE)
    weights = torch.randn(2, shape[1], dtype=DOUBLE) * 30

    def run(x, moments):
        x = x.detach().to("cuda" if kernels == "a GPU's" else "cpu").requires_grad_()
        y, mean, variance = (part.cpu() for part in moments(x))
        loss = (y * upstream.to(y.dtype)).sum() + (torch.stack([mean, variance]) * weights).sum()
        loss.backward()
        return mean, variance, x.grad.cpu()

    def plain(x):
        over = [0, *range(2, x.dim())]
        mean = x.mean(over, keepdim=True)
        return x, mean.flatten(), (x - mean).square().mean(over)

    expected = run(x.to(dtype).double(), plain)
    for got, want in zip(run(x.to(dtype), with_moments), expected, strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=0, atol=TOLERANCE[dtype] * want.abs().max().item()
        )


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_the_kernel_of_the_transposed_convolution_is_made_of_sums_of_taps(dtype):
    x, conv = torch.randn(2, 3, 5, 4, dtype=dtype), nn.Conv2d(3, 4, 3, padding=1, bias=False)
    weight = conv.weight.detach().to(dtype).requires_grad_()
    got = functional._upsample_by_transposed_conv(x, weight)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2), weight, padding=1)
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn_like(got)
    grads = [torch.autograd.grad(y, weight, upstream)[0] for y in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_norm_of_another_kind_is_called():
    class Other(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 100

    assert (batch_norm(torch.randn(4, 3, 5, 5), Other(3)) > 50).all()
    stage = Stage(3, 4)
    expected = published_stage(torch.ones(2, 3, 4, 4, dtype=DOUBLE), copy.deepcopy(stage)) + 100
    stage.norm.__class__ = Other
    y = fast_stage(torch.ones(2, 3, 4, 4, dtype=DOUBLE), stage, slope=1.0)
    assert (y > 50).all() and y.shape == expected.shape


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}], ids=str)
def test_other_settings_of_the_norm(options):
    x = torch.randn(4, 3, 5, 5)
    mine, other = nn.BatchNorm2d(3, **options), nn.BatchNorm2d(3, **options)
    torch.testing.assert_close(batch_norm(x, mine), other(x))
    torch.testing.assert_close(mine.running_mean, other.running_mean)


def test_one_value_per_channel_is_refused_as_torch_does():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(torch.randn(1, 3, 1, 1), nn.BatchNorm2d(3))


# ---- Errors, autocast, threads, instruction sets, compilation ------------------------------------


@pytest.mark.parametrize(
    ("operator", "shapes", "message"),
    [
        ("upsample_conv", [(2, 3, 4, 4), (2, 4, 3, 3)], "weight must be"),
        ("upsample_conv", [(3, 4, 4), (2, 3, 3, 3)], "x must be"),
        ("conv_pool", [(2, 3, 5, 9), (2, 3, 5, 5), (2,)], "at least 6 rows"),
        ("conv_pool", [(2, 3, 8, 9), (2, 3, 5, 5), (3,)], "bias must be"),
        ("norm_activation", [(2, 3, 4, 4), (3,), (3,), (3,), (2,), 1.0, 0.2], "^bias must be"),
        ("norm_activation", [(2, 3, 4, 4), (3,), (3,), (3,), (3,), -1.0, 0.2], "eps"),
        (
            "norm_image_conv",
            [(2, 3, 4, 4), (3,), (3,), (3,), (3,), 1.0, 0.2, (1, 3, 5, 5), (1,)],
            "weight must be",
        ),
    ],
)
def test_errors_name_the_argument(operator, shapes, message):
    arguments = [torch.randn(s) if isinstance(s, tuple) else s for s in shapes]
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.dafl_fast, operator)(*arguments)


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_refused(name):
    _, shape, make = next(case for case in CASES if case[0] == name and case[1][0] > 1)
    x = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    y = LAYERS[name][0](x, make())
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["norm", "stage", "conv_pool"])
def test_autocast_rounds_activations_not_parameters(name):
    _, shape, make = next(case for case in CASES if case[0] == name and case[1][0] > 2)
    module = make().float()
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = LAYERS[name][0](x, module)
    expected = LAYERS[name][0](x.bfloat16(), copy.deepcopy(module))
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_at_any_number_of_threads(name):
    fast = LAYERS[name][0]
    _, _, make = next(case for case in CASES if case[0] == name and case[1][0] > 2)
    module = make()
    weight = next(module.parameters())
    channels = weight.shape[1] if weight.dim() == 4 else weight.shape[0]
    x = torch.randn(150, channels, 16, 16)
    upstream = torch.randn_like(fast(x, copy.deepcopy(module).float()).detach()).double()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(fast, x, module, upstream, torch.float32))
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


@pytest.mark.parametrize("isa", _C.build_info()["isa_available"])
def test_every_instruction_set(isa):
    """This file's numerical tests again, each instruction set in a process of its own."""
    if os.environ.get("DAFL_FAST_ISA") or isa == _C.build_info()["isa"]:
        pytest.skip("this whole run is on one, or it is what the other tests run on")
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


def test_opcheck():
    def randn(*shape):
        return torch.randn(shape, requires_grad=True)

    x, ops = randn(3, 4, 8, 6), torch.ops.dafl_fast
    norm = (*ops.moments(x.detach()), randn(4), randn(4), 0.8, 0.2)
    for operator, arguments in (
        (ops.upsample_conv, (x, randn(5, 4, 3, 3))),
        (ops.moments, (x.detach(),)),
        (ops.norm_activation, (x, *norm)),
        (ops.norm_image_conv, (x, *norm, randn(2, 4, 3, 3), randn(2))),
        (ops.conv_pool, (x, randn(5, 4, 5, 5), randn(5))),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("images", [1, 3, 8, 16, 20])
def test_conv_pool_writes_all_that_it_returns(images):
    """Also the bytes for vectors that the batch does not fill."""
    x, weight, bias = torch.randn(images, 4, 8, 6), torch.randn(5, 4, 5, 5), torch.randn(5)
    results = []
    for poison in (255, 7):
        spoilt = [torch.full((size,), poison, dtype=torch.uint8) for size in (160, 320)]
        del spoilt  # memory that the next call takes
        results.append(torch.ops.dafl_fast.conv_pool(x, weight, bias))
    for mine, again in zip(*results, strict=True):
        assert torch.equal(mine, again)


def test_elsewhere_the_layers_themselves_run(monkeypatch):
    """The path of other devices, taken here by a tensor that says it is on one."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

    monkeypatch.setattr(functional, "_OPS", None)
    for name, (fast, published) in LAYERS.items():
        if name == "upsample":
            continue  # the operator itself
        shape = next(s for n, s, _ in CASES if n == name and s[0] > 1)
        module = next(make for n, s, make in CASES if n == name and s[0] > 1)()
        x = torch.randn(shape, dtype=DOUBLE)
        y = fast(x.as_subclass(Elsewhere), copy.deepcopy(module)).as_subclass(torch.Tensor)
        torch.testing.assert_close(y, published(x, module), rtol=1e-10, atol=1e-11)


def test_one_channel_gets_the_strides_of_channels_last_without_a_copy():
    x = torch.randn(3, 1, 4, 5, requires_grad=True)
    y = functional.with_channel_last(x)
    assert y.stride() == (20, 1, 5, 1) and y.data_ptr() == x.data_ptr() and torch.equal(x, y)
    assert y.is_contiguous() and y.is_contiguous(memory_format=channels_last)
    (grad,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(grad, x) and grad.is_contiguous()


def test_a_network_with_fast_norms_trains_like_the_network():
    torch.manual_seed(0)
    network = nn.Sequential(
        conv(3, 8), norm_of(8), nn.ReLU(), conv(8, 5), nn.BatchNorm2d(5, momentum=None).double(),
        nn.BatchNorm2d(5, affine=False).double(),
    )  # fmt: skip
    network.append(network[1].__class__(5).double())
    ours = with_fast_norms(copy.deepcopy(network))
    fast = [isinstance(layer, FastBatchNorm2d) for layer in ours]
    assert fast == [False, True, False, False, True, True, True]
    assert ours.state_dict().keys() == network.state_dict().keys()
    x = torch.randn(6, 3, 5, 4, dtype=DOUBLE)
    for each in (network, ours):
        each(x).sin().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), network.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name, rtol=1e-9, atol=1e-9)
    for (name, a), (_, b) in zip(ours.named_buffers(), network.named_buffers()):
        torch.testing.assert_close(a, b, msg=name)
    ours.eval(), network.eval()
    assert torch.equal(ours(x), network(x)) or torch.allclose(ours(x), network(x), 1e-9, 1e-9)
    assert with_fast_norms(nn.Linear(2, 2)).__class__ is nn.Linear
    with pytest.raises(ValueError, match="expected 4D"):
        ours[1](x[0])


def test_a_linear_layer_makes_images_that_are_channels_last():
    torch.manual_seed(0)
    linear, z = nn.Linear(5, 4 * 3 * 2).double(), torch.randn(7, 5, dtype=DOUBLE)
    ours = functional.linear_image(z, linear, (4, 3, 2))
    expected = linear(z).view(7, 4, 3, 2)
    assert ours.is_contiguous(memory_format=channels_last)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        *(torch.autograd.grad(y, linear.parameters(), upstream) for y in (ours, expected))
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

"""The layers' CUDA kernels on the CPU, as test_cuda_emulated.py has those of the losses."""

import ctypes

import pytest
import torch

from tests import emulated
from tests.emulated import DTYPES, POINTER, SIZE, assert_close, pointers, randn

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++")
kernels = pytest.fixture(scope="module")(emulated.kernels)


def poisoned(*shape, dtype=torch.float32):
    """What was not written shows."""
    return torch.full(shape, torch.nan, dtype=dtype)


def conv_pool(kernels, x, weight, bias, grad):
    """Results of the emulated kernels: y, index, and the gradients to x, weight and bias."""
    N, channels, H, W = x.shape
    images = N + 3
    strides = (SIZE * 5)(*weight.stride(), *bias.stride())
    y = poisoned(*grad.shape, dtype=x.dtype)
    index = torch.full((images, *grad.shape[1:]), 77, dtype=torch.uint8)
    grads = [torch.full_like(tensor, torch.nan) for tensor in (x, weight, bias)]
    scratch = kernels.conv_pool_scratch(SIZE(N), SIZE(weight.numel() + bias.numel()))
    parts = poisoned(scratch + 8, dtype=torch.float64)
    kernels.conv_pool(
        SIZE(N), channels, H, W, len(bias), DTYPES[x.dtype], POINTER(x.data_ptr()),
        POINTER(weight.data_ptr()), POINTER(bias.data_ptr()), strides, DTYPES[weight.dtype],
        POINTER(y.data_ptr()), POINTER(index.data_ptr()), SIZE(images), POINTER(grad.data_ptr()),
        POINTER(grads[0].data_ptr()), POINTER(parts.data_ptr()),
        *[POINTER(each.data_ptr()) for each in grads[1:]],
    )  # fmt: skip
    assert parts[-8:].isnan().all() and (x.isnan().any() or not parts[:-8].isnan().any())
    assert (index[:N] <= 4).all() and not index[N:].any()
    return [y, index[:N], *grads]


def check_conv_pool(kernels, x, weight, bias):
    """Against float64 and the CPU's operator."""
    grad = randn(len(x), len(bias), (x.shape[2] - 4) // 2, (x.shape[3] - 4) // 2, seed=7).to(x)
    runs = []
    for reversed_order in (False, True):
        kernels.set_order(reversed_order)
        runs.append(conv_pool(kernels, x, weight, bias, grad))
    for a, b in zip(*runs):
        assert torch.equal(a, b), "the order in which threads run changes the result"
    y, index, *grads = runs[0]
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    convolved = torch.conv2d(*wide)
    expected = torch.relu(torch.max_pool2d(convolved, 2))
    expected.backward(grad.double())
    assert_close(y, expected)
    for ours, oracle in zip(grads, wide):
        assert_close(ours, oracle.grad)
    fast, _ = torch.ops.dafl_fast.conv_pool(x, weight, bias)
    assert torch.equal(index == 4, y == 0)
    assert (y.double() - fast.double()).abs().max() <= 2**-8 * expected.abs().max()


CONV_POOL = [  # N, in, H, W, out
    (2, 1, 32, 32, 6), (3, 6, 14, 14, 16), (1, 1, 6, 6, 1), (2, 3, 9, 12, 5), (2, 3, 7, 11, 9),
    (1, 3, 64, 64, 4), (1, 32, 12, 10, 32), (1, 5, 33, 40, 32), (5, 2, 8, 6, 3),
]  # fmt: skip


@pytest.mark.parametrize("shape", CONV_POOL, ids=str)
def test_conv_pool_matches_float64(kernels, shape):
    """Small integers: rounding makes no two candidates of a maximum equal, or parts them."""
    N, channels, H, W, out = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randint(-3, 4, size, generator=generator).double()
        for size in ((N, channels, H, W), (out, channels, 5, 5), (out,))
    )
    for dtype in DTYPES:
        last = torch.channels_last if dtype.itemsize == 2 else torch.contiguous_format
        of = torch.float64 if dtype == torch.float64 else torch.float32
        given = weight.to(of, memory_format=last)
        check_conv_pool(kernels, x.to(dtype), given, bias.repeat(2).to(of)[:out])
    check_conv_pool(kernels, x.float(), weight.bfloat16(), bias.bfloat16())


def test_conv_pool_of_many_images_adds_their_gradients(kernels):
    """More images than parts."""
    check_conv_pool(kernels, randn(1030, 1, 6, 6), randn(1, 1, 5, 5, seed=1), randn(1, seed=2))


def test_conv_pool_prefers_the_first_of_equals_and_any_nan(kernels):
    x = torch.zeros(1, 1, 8, 8)
    weight, bias = torch.zeros(1, 1, 5, 5), torch.ones(1)
    weight[0, 0, 0, 0] = 1
    x[0, 0, 0, 2] = x[0, 0, 1, 3] = -1
    x[0, 0, 2:4, :2] = -2
    x[0, 0, 7, 7] = torch.nan
    y, index, *_ = conv_pool(kernels, x, weight, bias, torch.ones(1, 1, 2, 2))
    fast, _ = torch.ops.dafl_fast.conv_pool(x, weight, bias)  # whose index has an order of its own
    torch.testing.assert_close(y, fast, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(y.flatten(), torch.tensor([1, 1, 0, torch.nan]), equal_nan=True)
    assert index.flatten().tolist() == [0, 1, 4, 3]


def norm(kernels, x, weight, bias, grad, eps=0.8, slope=0.2):
    """Mean, variance, y and the gradients to x, weight and bias of [rows, C] = x."""
    rows, C = x.shape
    parts = poisoned(kernels.norm_parts(SIZE(rows), C) * 2 * C + 8, dtype=torch.float64)
    mean, variance, factors = poisoned(C), poisoned(C), poisoned(2 * C)
    y, *grads = (torch.full_like(tensor, torch.nan) for tensor in (x, x, weight, bias))
    kernels.norm(
        SIZE(rows), C, DTYPES[x.dtype], POINTER(x.data_ptr()), ctypes.c_float(eps),
        ctypes.c_float(slope), POINTER(weight.data_ptr()), POINTER(bias.data_ptr()),
        DTYPES[weight.dtype],
        *[POINTER(each.data_ptr()) for each in (parts, mean, variance, y, grad, factors, *grads)],
    )  # fmt: skip
    assert parts[-8:].isnan().all() and (x.isnan().any() or not parts[:-8].isnan().any())
    return [mean, variance, y, *grads]


def check_norm(kernels, x, parameters=torch.float32):
    rows, C = x.shape
    weight, bias = (randn(C, seed=seed, dtype=parameters) for seed in (1, 2))
    grad = randn(rows, C, seed=3, dtype=x.dtype)
    runs = []
    for reversed_order in (False, True):
        kernels.set_order(reversed_order)
        runs.append(norm(kernels, x, weight, bias, grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs)), "the order of threads changes the result"
    wide = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    variance, mean = torch.var_mean(wide[0], 0, correction=0)
    normalised = torch.nn.functional.batch_norm(
        wide[0], None, None, wide[1], wide[2], training=True, eps=0.8
    )
    y = torch.nn.functional.leaky_relu(normalised, 0.2)
    # Close to the kink, rounding may take the other slope.
    clear = normalised.detach().abs() > 1e-4
    y.backward(grad.double() * clear)
    ours = norm(kernels, x, weight, bias, (grad * clear).contiguous())
    oracles = [mean, variance, y, *(each.grad for each in wide)]
    for result, oracle in zip(ours, oracles, strict=True):
        assert_close(result, oracle, 1e-5 if result.dtype == torch.float32 else 2**-8)


NORM = [(2, 3), (2, 8), (300, 64), (1100, 64), (600, 128), (37, 10), (65, 33), (5, 600), (70, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "C"), NORM, ids=str)
def test_norm_and_activation_match_float64(kernels, rows, C, dtype):
    check_norm(kernels, randn(rows, C, dtype=dtype))


def test_norm_of_other_parameters_and_of_rows_that_are_not_aligned(kernels):
    check_norm(kernels, randn(40, 16, dtype=torch.bfloat16), torch.bfloat16)
    check_norm(kernels, randn(40 * 16 + 1, dtype=torch.bfloat16)[1:].view(40, 16))


def test_the_variance_of_values_far_from_zero_does_not_cancel(kernels):
    x = 1000 + randn(2000, 8)
    _, variance, *_ = norm(kernels, x, torch.ones(8), torch.zeros(8), torch.ones_like(x))
    torch.testing.assert_close(
        variance.double(), x.double().var(0, correction=0), rtol=1e-4, atol=0
    )


def test_norm_does_not_hide_nan(kernels):
    x = randn(50, 16)
    x[7, 3] = torch.nan
    results = norm(kernels, x, torch.ones(16), torch.zeros(16), torch.ones_like(x))
    for result in results[:-1]:
        bad = result.isnan() if result.dim() == 1 else result.isnan().all(0)
        assert bad.nonzero().flatten().tolist() == [3]
    assert results[-1].isfinite().all()  # it does not depend on the values, but for their signs


IMAGES = [  # N, C, H, W
    (2, 64, 8, 8), (3, 10, 5, 7), (2, 3, 1, 1), (2, 128, 3, 6), (1, 33, 4, 300), (2, 6, 70, 20),
    (1030, 2, 1, 2), (1, 66, 1, 5),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_norm_activation_and_image_convolution_match_float64(kernels, shape, dtype):
    N, C, H, W = shape
    F, slope, eps = torch.nn.functional, 0.2, 0.8
    x = randn(N, H, W, C, dtype=dtype).permute(0, 3, 1, 2)
    strides = torch.channels_last if N % 2 else torch.contiguous_format
    parameters = [
        randn(C, seed=1), randn(C, seed=2),
        randn(1, C, 3, 3, seed=3).contiguous(memory_format=strides), randn(1, seed=4),
    ]  # fmt: skip
    grad = randn(N, 1, H, W, seed=5, dtype=dtype)
    wide = [each.detach().double().requires_grad_() for each in (x, *parameters)]
    variance, mean = torch.var_mean(wide[0].detach(), (0, 2, 3), correction=0)
    z = F.batch_norm(wide[0], None, None, wide[1], wide[2], training=True, eps=eps)
    y = F.conv2d(F.leaky_relu(z, slope), wide[3], wide[4], padding=1)
    y.backward(grad.double())
    assert z.detach().abs().min() > 1e-6  # none is at the kink, where rounding flips the slope
    runs = []
    for reversed_order in (False, True):
        kernels.set_order(reversed_order)
        results = [torch.full_like(each, torch.nan) for each in (grad, x, *parameters)]
        scratch = kernels.image_conv_scratch(SIZE(N), C, H, W)
        parts, factors = poisoned(scratch + 8, dtype=torch.float64), poisoned(2 * C)
        moments = [mean.float(), variance.float()]
        kernels.image_conv(
            SIZE(N), C, H, W, DTYPES[dtype], POINTER(x.data_ptr()), ctypes.c_float(eps),
            ctypes.c_float(slope), *[POINTER(each.data_ptr()) for each in moments],
            pointers(parameters), (SIZE * 4)(*parameters[2].stride()),
            *[POINTER(each.data_ptr()) for each in (results[0], grad, parts, factors, results[1])],
            pointers(results[2:]),
        )  # fmt: skip
        assert parts[-8:].isnan().all()
        runs.append(results)
    assert all(torch.equal(a, b) for a, b in zip(*runs)), "the order of threads changes the result"
    for result, oracle in zip(runs[0], [y, *(each.grad for each in wide)], strict=True):
        assert_close(result, oracle, 1e-4)

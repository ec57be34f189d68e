"""The CUDA kernels on the CPU: every thread a fiber (tests/emulation), against float64.

This finds wrong indexing, missing barriers, unwritten outputs and wrong sums in every regime of
the launch planner without a GPU. It shows nothing of speed, memory ordering or the hardware.
"""

import ctypes
import itertools
import os

import pytest
import torch

from dafl_fast import _C
from tests import emulated, exact
from tests.emulated import LOSSES, Case, assert_close, randn

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++")
BUILT = os.environ.get("DAFL_FAST_EMULATION")
kernels = pytest.fixture(scope="module")(emulated.kernels)


def assert_scalars(ours, oracle, rtol=1e-5):
    for a, b in zip(ours, oracle, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=rtol, abs=1e-12)


GPU, OLD_GPU = (8, 90), (8, 80)  # small: fewer threads that have nothing to do
ORDERS = (0, 1, 2)  # see tests/emulation/scheduler.h


def in_every_order(case, call, orders=ORDERS):
    """The results, the same bits in each order, in memory that is locked behind and before."""
    runs = []
    for order in orders:
        case.kernels.set_order(order)
        case.at_end = order != 1
        runs.append(call())
    for run in runs[1:]:
        for a, b in zip(runs[0], run):
            assert torch.equal(a, b), "the order in which threads run changes the result"
    return runs[0]


def check(kernels, logits, features, student, gpu, orders=ORDERS):
    for f64 in (False, True) if BUILT is None else ():
        size = kernels.scratch_bytes(*map(ctypes.c_int64, logits.shape), f64, *gpu)
        assert size == _C.plan(*logits.shape, f64, *gpu)["scratch"]
    case = Case(kernels, logits, features, student, gpu)
    generator, distill, grad_t, grad_f, grad_s, mean = case.oracle(1024.0)
    results = in_every_order(case, lambda: [*case.generator(), *case.distill()], orders)
    assert_scalars(results[:LOSSES], generator)
    stats, our_mean, our_grad_t, our_grad_f, *distilled, _, our_grad_s = results[LOSSES:]
    assert torch.equal(stats[2].long(), logits.double().argmax(1))
    assert_close(our_mean, mean)
    assert_close(our_grad_t, grad_t)
    assert_close(our_grad_f, grad_f)
    assert_scalars(distilled, distill)
    assert_close(our_grad_s, grad_s)


# N, C, (multiprocessors, capability): each regime, at its limits and at awkward sizes.
SHAPES = [
    (1, 1, (132, 90)), (49, 1, (132, 90)), (49, 1, (132, 80)), (3, 2, (132, 90)),
    (1024, 10, (132, 90)), (1000, 10, (132, 90)),
    (130, 32, (132, 90)), (37, 31, (132, 90)), (700, 10, (2, 80)), (1025, 7, (3, 90)),
    (1, 33, (132, 90)), (40, 33, (1, 90)), (21, 256, (1, 80)), (9, 401, (132, 90)),
    (70, 1000, (2, 90)), (5, 1024, (132, 90)),
    (3, 1025, (132, 90)), (5, 4096, (2, 90)), (3, 9001, (132, 90)), (2, 16384, (132, 90)),
    (3, 16385, (132, 90)), (2, 50257, (132, 90)), (1, 70000, (132, 90)), (2, 131072, (4, 90)),
    (2, 20000, (132, 80)),
    # Several rows for each block or cluster, one after the other.
    (9, 1500, (1, 90)), (7, 5000, (1, 90)), (19, 16500, (1, 90)), (33, 20000, (1, 80)),
]  # fmt: skip


@pytest.mark.parametrize(("N", "C", "gpu"), SHAPES, ids=str)
def test_regimes_match_float64(kernels, N, C, gpu):
    orders = ORDERS if C < 40_000 else (0, 3)
    check(kernels, randn(N, C), randn(N, 21, seed=1), randn(N, C, seed=2), gpu, orders)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("N", "C"), [(150, 10), (8, 9), (13, 100), (3, 2000)], ids=str)
def test_dtypes(kernels, N, C, dtype):
    a, b, c = (randn(N, width, seed=i, dtype=dtype) for i, width in enumerate((C, 8, C)))
    check(kernels, a, b, c, GPU)
    check(kernels, a.float(), b.double(), c, OLD_GPU)


@pytest.mark.parametrize("C", [16, 104, 1104])
def test_mixed_dtypes(kernels, C):
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for a, b, c in itertools.permutations(dtypes):
        logits, features, student = (
            randn(9, width, seed=seed, dtype=dtype)
            for seed, (width, dtype) in enumerate(((C, a), (24, b), (C, c)))
        )
        check(kernels, logits, features, student, GPU, orders=(0, 1))
        if C <= 32:
            check_joint(kernels, logits, features, student, GPU, orders=(0, 1))


@pytest.mark.parametrize("C", [10, 100, 1100])
def test_strides(kernels, C):
    layouts = [
        randn(C, 9).t(), randn(9, C + 3)[:, 1 : C + 1], randn(9, C * 2)[:, ::2],
        randn(18, C + 4)[::2, :C], randn(9 * C + 1)[1:].view(9, C), randn(1, C).expand(9, C),
        randn(9, C + 1)[:, :C],
    ]  # fmt: skip
    for layout in layouts:
        features = randn(12, 9, seed=1).t()
        check(kernels, layout, features, randn(9, C, seed=2), GPU)
        check(kernels, randn(9, C), None, layout, OLD_GPU)


# What may be read four or eight at a time, and what misses that by one condition.
@pytest.mark.parametrize("C", [16, 104, 1104])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alignments(kernels, C, dtype):
    def layouts(width):
        x = randn(9 * (width + 8) + 8, dtype=dtype)
        for offset in (1, 2, 4, 8):
            yield x[offset : offset + 9 * width].view(9, width)  # the pointer
        for more in (1, 2, 4, 8):
            yield x[: 9 * (width + more)].view(9, -1)[:, :width]  # the rows' distance
        yield x[: 9 * width].view(9, width)[:, : width - 2]  # the width
        yield randn(9, 2 * width, dtype=dtype)[:, ::2]  # the columns' distance

    for layout, features in zip(layouts(C), layouts(24)):
        other = randn(9, layout.shape[1], seed=2, dtype=dtype)
        check(kernels, layout, features, other, GPU, orders=(0, 1))
        check(kernels, other, None, layout, OLD_GPU, orders=(0, 1))
        if C <= 32:
            check_joint(kernels, layout, features, other, GPU, orders=(0, 1))


@pytest.mark.parametrize("C", [10, 100, 1100])
def test_features(kernels, C):
    x = randn(9 * 48, seed=3)
    x[::5] = 0
    layouts = [
        x[: 9 * 16].view(9, 16), x[: 9 * 32].view(9, 32)[:, :16], x[: 9 * 16].view(16, 9).t(),
        x.as_strided((9, 16), (16, 2)), x.as_strided((9, 16), (0, 1)),
        x.as_strided((9, 16), (1, 0)), x[1 : 9 * 16 + 1].view(9, 16), x[: 9 * 13].view(9, 13),
    ]  # fmt: skip
    for features in layouts:
        for dtype in (torch.float32, torch.float64):  # which keeps the strides where it is the same
            check(kernels, randn(9, C), features.to(dtype), randn(9, C, seed=2), GPU, (0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("C", "gpu"), [(10, (132, 90)), (10, (1, 80)), (100, (1, 80))], ids=str)
def test_many_features(kernels, C, gpu, dtype):
    """A thread has so many that their sum is none of fp32's numbers any more."""
    value = 2**17 + 1 if dtype == torch.float32 else 2**11 - 1
    features = torch.full((4, 400_000), value, dtype=dtype)
    features[:, 1::2] *= -1
    case = Case(kernels, randn(4, C), features, randn(4, C, seed=2), gpu)
    runs = [case.generator()[:LOSSES]] + ([case.joint()[:LOSSES]] if C <= 32 else [])
    for losses in runs:
        assert losses[-1].item() == pytest.approx(-value, rel=1e-7)


def tied(C, distances, dtype=torch.float32):
    """Rows whose maximum stands twice, at these distances, or three times."""
    rows = randn(2 * len(distances) + 1, C, dtype=dtype)
    for row, (distance, start) in zip(rows, itertools.product(distances, (0, 0.5))):
        first = int(start * (C - distance))
        row[[first, first + distance]] = 20
        row[min(first + 2 * distance, C - 1)] = 20
    rows[-1] = 1.25
    return rows


# In a quad, across a thread's quads, lanes, warps and blocks.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("C", "gpu", "distances"),
    [
        (20, (132, 90), [1, 3, 4, 8, 19]),
        (20, (1, 80), [1, 3, 4, 8, 19]),
        (1000, (132, 90), [1, 2, 3, 4, 5, 8, 64, 127, 128, 256, 512, 900]),
        (4096, (132, 90), [1, 4, 8, 32, 128, 256, 512, 1023, 1024, 2048, 4000]),
        (12000, (132, 90), [1, 4, 8, 128, 512, 1024, 2048, 4096, 8192, 11999]),
        (20000, (132, 90), [1, 4, 8, 128, 2048, 4096, 10000, 10004, 19999]),
        (40000, (132, 90), [10000, 20000, 39999]),  # a lane hears of two warps
        (20000, (132, 80), [1, 4, 32, 256, 1024, 10000, 19999]),
    ],
    ids=str,
)
def test_ties_go_to_the_lowest_class(kernels, C, gpu, distances, dtype):
    teacher = tied(C, distances, dtype)
    student = teacher.flip(1).roll(1, 0).contiguous()
    student[::2] = teacher[::2]
    student[4::4] += randn(C, seed=3, dtype=dtype).mul_(1e-3).sign().clamp(max=0)
    check(kernels, teacher, None, student, gpu, orders=(0, 1))
    if C <= 32 and dtype != torch.float64:
        check_joint(kernels, teacher, None, student, gpu)


@pytest.mark.parametrize("C", [10, 50, 2000])
def test_upstream_gradients(kernels, C):
    logits, student = randn(9, C), randn(9, C, seed=1)
    _, _, grad_t, _, grad_s, _ = Case(kernels, logits, None, student, GPU).oracle(0.5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        upstream = torch.tensor(0.5, dtype=dtype)
        case = Case(kernels, logits, None, student, GPU, upstream=upstream)
        assert_close(case.generator()[-2], grad_t)
        assert_close(case.distill()[-1], grad_s)
    case.upstream = torch.empty(0)  # none: 1
    assert_close(case.generator()[-2], 2 * grad_t)
    assert_close(case.distill()[-1], 2 * grad_s)


# ---- Beyond 2^31 elements: address space, of which little is touched ----------------------------

FAR = [(3, 10), (3, 40), (3, 64), (3, 1100), (3, 4096), (3, 18000)]


@pytest.mark.parametrize(("N", "C"), FAR, ids=str)
@pytest.mark.parametrize("gpu", [(132, 90), (132, 80)], ids=str)
def test_inputs_beyond_2_31_elements(kernels, N, C, gpu):
    rows = (2**31 + 8, 1)
    columns = (1, 2**32 // C // 8 * 8 + 8)
    for strides in (rows, columns):
        x, other = randn(N, C, dtype=torch.bfloat16), randn(N, C, seed=1, dtype=torch.bfloat16)
        far = emulated.sparse(x, strides)
        features = emulated.sparse(randn(N, 8, seed=2, dtype=torch.bfloat16), (2**31 + 8, 1))
        check(kernels, far, features, other, gpu, orders=(1,))
        check(kernels, other, None, far, gpu, orders=(1,))
        if C <= 32:
            check_joint(kernels, far, features, emulated.sparse(other, strides), gpu, orders=(1,))


def only_last_row(kernels, N, C, f64, gpu, call):
    """Calls with the blocks alone that may have row N - 1, a handful of a grid of thousands."""
    blocks = kernels.backward_blocks(ctypes.c_int64(N), ctypes.c_int64(C), f64, *gpu)
    segments = -(-C // 4096)
    last = N * segments - 1
    # From the last row on, by rows, by warps of rows; by segments, or warps of them.
    ranges = {(0, 0), ((N - 1) % blocks,) * 2, ((N - 1) // 32 % blocks,) * 2,
              ((last - segments + 1) % 2**16, last % 2**16), (last // 8 % 2**16,) * 2}  # fmt: skip
    for first, last in ranges:
        kernels.set_blocks(first, last)
        call()
    kernels.set_blocks(0, 2**62)


def zeros(rows, columns, dtype, more=0):
    """Of which no memory is taken before it is written; `more` between the rows."""
    width = columns + more
    size = rows * width * dtype.itemsize
    return emulated.pages(size)[:size].view(dtype).view(rows, width)[:, :columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("C", "capability"),
    [(32, 80), (31, 80), (64, 80), (1001, 80), (4096, 80), (12001, 80), (20000, 90), (20001, 80)],
)
def test_gradients_beyond_2_31_elements(kernels, C, capability, dtype):
    """The last row's, all rows alike."""
    N, gpu = 2**31 // C + 41, (100_000, capability)
    t, s = randn(1, C, dtype=dtype), randn(1, C, seed=1, dtype=dtype)
    one = Case(
        kernels, t, None, s, (1, capability), upstream=torch.tensor(1.0, dtype=torch.float64)
    )
    _, _, grad_t, _, grad_s, mean = one.oracle(1.0)
    *_, stats_t, _, _, _ = one.generator()
    *_, stats_s, _ = one.distill()
    S, f64 = stats_t.dtype, dtype == torch.float64
    upstream = torch.tensor(float(N), dtype=torch.float64)

    def last_row(call, stats):
        grad, all_stats = zeros(N, C, dtype), zeros(len(stats), N, S)
        all_stats[:, -1:] = stats
        only_last_row(kernels, N, C, f64, gpu, lambda: call(all_stats, grad))
        return grad[-1:]

    far_t, far_s = (emulated.matrix(x.expand(N, C)) for x in (t, s))
    class_mean = mean.to(S)
    common = [ctypes.c_int64(N), ctypes.c_int64(C)]
    up = [emulated.address(upstream), 1, f64, *gpu]
    ours = last_row(
        lambda stats, grad: kernels.generator_backward(
            *common, ctypes.c_int64(0), ctypes.byref(far_t), ctypes.byref(emulated.Matrix()),
            one.weights, *up, *map(emulated.address, (stats, class_mean, grad)), None,
        ),
        stats_t,
    )  # fmt: skip
    assert_close(ours, grad_t)
    ours = last_row(
        lambda stats, grad: kernels.distill_backward(
            *common, ctypes.byref(far_s), ctypes.byref(far_t),
            ctypes.c_double(emulated.TEMPERATURE), *up, *map(emulated.address, (stats, grad)),
        ),
        stats_s,
    )  # fmt: skip
    assert_close(ours, grad_s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("more", [0, 1])
def test_features_beyond_2_31_elements(kernels, dtype, more):
    C, F, sms = 10, 64, 10_000
    N = 2**31 // F + 41
    logits, features = randn(1, C).expand(N, C), zeros(N, F, dtype, more)
    features[-1] = randn(F, seed=1, dtype=dtype)
    grad, grad_logits = zeros(N, F, dtype), zeros(N, C, torch.float32)
    stats, mean = zeros(3, N, torch.float32), torch.full((C,), 0.1)
    upstream = torch.tensor(float(N), dtype=torch.float64)
    weights = Case(kernels, logits, None, None, None).weights
    matrices = emulated.matrix(logits), emulated.matrix(features)
    for size in (1, 4, 8):  # elements that a thread has at a time
        block = (N * F - 1) // size // 256 % (4 * sms)
        kernels.set_blocks(block, block)
        kernels.generator_backward(
            *map(ctypes.c_int64, (N, C, F)), *map(ctypes.byref, matrices), weights,
            emulated.address(upstream), 1, False, sms, 80,
            *map(emulated.address, (stats, mean, grad_logits, grad)),
        )  # fmt: skip
    kernels.set_blocks(0, 2**62)
    assert_close(grad[-1], -emulated.WEIGHTS["activation"] / F * features[-1].double().sign())


@pytest.mark.parametrize("C", [31, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joint_beyond_2_31_elements(kernels, C, dtype):
    N, sms = 2**31 // C + 41, 10_000
    t, s = randn(1, C, dtype=dtype), randn(1, C, seed=1, dtype=dtype)
    one = Case(kernels, t, None, s, None)
    grads = zeros(N, C, dtype), None, zeros(N, C, dtype)
    size = kernels.scratch_bytes(ctypes.c_int64(N), ctypes.c_int64(C), False, sms, 80)
    scratch, losses = emulated.pages(size), list(torch.zeros(LOSSES + 3))
    rows = (-(-N // (2 * sms)) + 31) // 32 * 32  # of a part
    far = [ctypes.byref(emulated.matrix(x.expand(N, C))) for x in (t, s)]  # rows alike
    for block in (-(-N // rows) - 1, (N - 1) // 32 % (4 * sms)):
        kernels.set_blocks(block, block)
        kernels.joint(
            *map(ctypes.c_int64, (N, C, 0)), *far, ctypes.byref(emulated.Matrix()), one.weights,
            ctypes.c_double(emulated.TEMPERATURE), sms, 80, emulated.pointers(losses),
            *map(emulated.address, (scratch, grads[0])), None, emulated.address(grads[2]),
        )  # fmt: skip
    kernels.set_blocks(0, 2**62)
    # A part's sums of p, where all parts' should be: a factor, which the slopes do not see.
    _, _, grad_t, _, grad_s, _ = one.oracle(1.0)
    assert_close(grads[0][-1:], grad_t / N, rtol=1e-4)
    assert_close(grads[2][-1:], grad_s / N)


def check_joint(kernels, logits, features, student, gpu, orders=ORDERS):
    case = Case(kernels, logits, features, student, gpu)
    generator, distill, grad_t, grad_f, grad_s, _ = case.oracle(1.0)
    results = in_every_order(case, case.joint, orders)
    assert_scalars(results[:-3], [*generator, *distill])
    for ours, oracle in zip(results[-3:], (grad_t, grad_f, grad_s)):
        assert_close(ours, oracle)


@pytest.mark.parametrize("gpu", [(132, 90), (2, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "C"), [(1, 1), (1024, 10), (517, 10), (300, 32)], ids=str)
def test_joint(kernels, N, C, dtype, gpu):
    logits, student = randn(N, C, dtype=dtype), randn(N, C, seed=2, dtype=dtype)
    check_joint(kernels, logits, randn(N, 84, seed=1, dtype=dtype), student, gpu)


# A shape of each regime; stream, too.
EVERY = [(10, GPU), (10, OLD_GPU), (50, GPU), (2000, GPU), (17000, GPU), (17000, OLD_GPU)]


@pytest.mark.parametrize(("C", "gpu"), EVERY, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_are_not_hidden(kernels, C, gpu, bad):
    logits = randn(9, C)
    logits[7, 4] = bad
    case = Case(kernels, logits, None, randn(9, C, seed=1), gpu)
    total, one_hot, entropy, *_, grad, _ = case.generator()
    assert total.isnan() and one_hot.isnan() and entropy.isnan() and grad[7].isnan().all()
    total, _, _, _, grad = case.distill()
    assert total.isnan() and grad[7].isnan().all() and grad[[6, 8]].isfinite().all()


@pytest.mark.parametrize("C", [10, 50, 2000])
def test_equal_logits_give_exactly_nothing(kernels, C):
    logits = randn(9, C)
    _, kl, agreement, _, grad = Case(kernels, logits, None, logits, GPU).distill()
    assert (kl.item(), agreement.item()) == (0, 1) and grad.count_nonzero() == 0


@pytest.mark.parametrize(("C", "gpu"), EVERY, ids=str)
def test_minus_infinity_is_probability_zero(kernels, C, gpu):
    logits = randn(9, C)
    logits[:, 2] = -torch.inf
    check(kernels, logits, None, randn(9, C, seed=1), gpu, orders=(0, 1))
    logits[3] = -torch.inf
    for no_number in (-torch.inf, torch.nan):
        logits[3] = no_number
        total, *_, stats, _, grad, _ = Case(kernels, logits, None, randn(9, C), gpu).generator()
        assert total.isnan() and grad[3].isnan().all()
        assert 0 <= stats[2, 3] < C, "an index that the backward pass can read at"


@pytest.mark.parametrize("deviation", [0.1, 5.0, 60.0])
def test_flat_and_saturated_logits_match_float64(kernels, deviation):
    """As in test_losses.py, against formulas that keep their digits."""
    shapes = [(3, 7, GPU), (49, 10, OLD_GPU), (21, 100, GPU), (9, 1000, GPU), (5, 3001, GPU),
              (2, 20001, GPU), (2, 17000, OLD_GPU)]  # fmt: skip
    for N, C, gpu in shapes:
        logits, student = (randn(N, C, seed=seed) * (deviation / 3) for seed in (1, 2))
        case = Case(kernels, logits, None, student, gpu, upstream=1.0)
        total, one_hot, entropy, *_, grad, _ = case.generator()
        weights = (emulated.WEIGHTS[name] for name in ("one_hot", "entropy", "log_base"))
        ours = [total, one_hot, entropy, grad]
        oracle = exact.generator_loss(logits, *weights)
        total, kl, *_, grad = case.distill()
        ours += [total, kl, grad]
        oracle += exact.distill_loss(student, logits, emulated.TEMPERATURE)
        for a, b in zip(ours, oracle, strict=True):
            error = (a.double() - b.reshape(a.shape)).abs().max()
            assert error <= 1e-5 * b.abs().max(), (N, C, a.shape)


@pytest.mark.parametrize(
    ("N", "C", "gpu"), [(70, 10, GPU), (9, 401, GPU), (3, 5000, GPU), (2, 131072, (4, 90))]
)
@pytest.mark.parametrize("argmax", [1e9, -1.0, -3e38, float("nan"), float("inf")])
def test_an_argmax_that_is_no_class_reads_nothing_outside(kernels, N, C, gpu, argmax):
    """It is taken for class 0: a GPU cannot refuse it without making the host wait."""
    gradients = []
    for told in (argmax, 0.0):
        case = Case(kernels, randn(N, C), None, randn(N, C, seed=1), gpu)
        case.argmax = told
        gradients.append(case.generator()[LOSSES + 2])
    assert torch.equal(*gradients)

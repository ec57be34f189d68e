"""The CUDA kernels on the CPU: every thread a fiber (tests/emulation), against float64.

This finds wrong indexing, missing barriers, unwritten outputs and wrong sums in every regime of
the launch planner without a GPU. It shows nothing of speed, memory ordering or the hardware.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dafl_fast import _C, reference
from dafl_fast.losses import DistillLoss, GeneratorLoss

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
WEIGHTS = {**reference.generator_loss.__kwdefaults__}
WEIGHTS.update(one_hot=0.7, entropy=3.0, activation=0.4, log_base=10.0)
LOSSES = len(GeneratorLoss._fields)
POINTER = ctypes.c_void_p
SIZE = ctypes.c_int64


class Matrix(ctypes.Structure):
    _fields_ = [("data", POINTER), ("row_stride", SIZE), ("col_stride", SIZE),
                ("dtype", ctypes.c_int)]  # fmt: skip


def matrix(x):
    return Matrix(x.data_ptr(), x.stride(0), x.stride(1), DTYPES[x.dtype])


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulation") / "kernels.so"
    sources = sorted((ROOT / "csrc" / "cuda").glob("*_loss*.cu"))
    emulation = ROOT / "tests" / "emulation"
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-w",
         f"-I{emulation}", "-o", library, emulation / "kernels.cpp", "-x", "c++", *sources],
        check=True, timeout=300,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    loaded.scratch_bytes.restype = SIZE
    return loaded


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def poisoned(*shape, dtype=torch.float32):
    """What was not written shows."""
    return torch.full(shape, torch.nan, dtype=dtype)


def pointers(tensors):
    return (POINTER * len(tensors))(*[x.data_ptr() for x in tensors])


def scratch_for(kernels, N, C, f64, gpu):
    size = kernels.scratch_bytes(SIZE(N), SIZE(C), f64, *gpu)
    assert size == _C.plan(N, C, f64, *gpu)["scratch"]
    guarded = poisoned(size // 8 + 64, dtype=torch.float64)
    return guarded, lambda: guarded[-64:].isnan().all()


class Case:
    """One call of each emulated operator, with the results by name."""

    def __init__(self, kernels, logits, features, student, gpu, upstream=1024.0):
        self.kernels, self.gpu = kernels, gpu
        self.logits, self.features, self.student = logits, features, student
        self.upstream = torch.tensor(upstream)
        self.N, self.C = logits.shape
        self.F = features.shape[1] if features is not None else 0
        self.f = matrix(features) if features is not None else Matrix()
        self.weights = (ctypes.c_double * len(WEIGHTS))(*WEIGHTS.values())

    def stats_dtype(self, *inputs):
        return torch.float64 if torch.float64 in [x.dtype for x in inputs] else torch.float32

    def grad_features(self):
        like = self.features if self.features is not None else torch.empty(0, 0)
        return poisoned(*like.shape, dtype=like.dtype)

    def generator(self):
        S = self.stats_dtype(self.logits)
        out = [poisoned(1, dtype=S) for _ in range(LOSSES)]
        stats, mean = poisoned(3, self.N, dtype=S), poisoned(self.C, dtype=S)
        grads = [poisoned(self.N, self.C, dtype=self.logits.dtype), self.grad_features()]
        f64 = torch.float64 == S
        scratch, intact = scratch_for(self.kernels, self.N, self.C, f64, self.gpu)
        self.kernels.generator(
            SIZE(self.N), SIZE(self.C), SIZE(self.F), ctypes.byref(matrix(self.logits)),
            ctypes.byref(self.f), self.weights, POINTER(self.upstream.data_ptr()), f64, *self.gpu,
            pointers(out), POINTER(stats.data_ptr()), POINTER(mean.data_ptr()),
            POINTER(scratch.data_ptr()), *[POINTER(g.data_ptr()) for g in grads],
        )  # fmt: skip
        assert intact()
        return [*out, stats, mean, *grads]

    def distill(self):
        S = self.stats_dtype(self.logits, self.student)
        out = [poisoned(1, dtype=S) for _ in range(3)]
        stats = poisoned(4, self.N, dtype=S)
        grad = poisoned(self.N, self.C, dtype=self.student.dtype)
        f64 = torch.float64 == S
        scratch, intact = scratch_for(self.kernels, self.N, self.C, f64, self.gpu)
        self.kernels.distill(
            SIZE(self.N), SIZE(self.C), ctypes.byref(matrix(self.student)),
            ctypes.byref(matrix(self.logits)), ctypes.c_double(2.0),
            POINTER(self.upstream.data_ptr()), f64, *self.gpu, pointers(out),
            POINTER(stats.data_ptr()), POINTER(scratch.data_ptr()), POINTER(grad.data_ptr()),
        )  # fmt: skip
        assert intact()
        return [*out, stats, grad]

    def joint(self):
        out = [poisoned(1) for _ in range(LOSSES + len(DistillLoss._fields))]
        grads = [
            poisoned(self.N, self.C, dtype=self.logits.dtype),
            self.grad_features(),
            poisoned(self.N, self.C, dtype=self.student.dtype),
        ]
        scratch, intact = scratch_for(self.kernels, self.N, self.C, False, self.gpu)
        self.kernels.joint(
            SIZE(self.N), SIZE(self.C), SIZE(self.F), ctypes.byref(matrix(self.logits)),
            ctypes.byref(matrix(self.student)), ctypes.byref(self.f), self.weights,
            ctypes.c_double(2.0), *self.gpu, pointers(out), POINTER(scratch.data_ptr()),
            *[POINTER(g.data_ptr()) for g in grads],
        )  # fmt: skip
        assert intact()
        return [*out, *grads]

    def oracle(self, upstream):
        t = self.logits.double().requires_grad_()
        f = None if self.features is None else self.features.double().requires_grad_()
        s = self.student.double().requires_grad_()
        generator = reference.generator_loss(t, f, **WEIGHTS)
        distill = reference.distill_loss(s, t, temperature=2.0)
        inputs = [t] if f is None else [t, f]
        grads = torch.autograd.grad(generator.total * upstream, inputs)
        grad_features = grads[1] if f is not None else torch.empty(0, 0)
        (grad_student,) = torch.autograd.grad(distill.total * upstream, s)
        mean = t.softmax(1).mean(0).detach()
        return generator, distill, grads[0], grad_features, grad_student, mean


def assert_close(ours, oracle, rtol=1e-5):
    if ours.dtype in (torch.bfloat16, torch.float16):
        rtol = 2**-8 if ours.dtype == torch.bfloat16 else 2**-10
    elif ours.dtype == torch.float64:
        rtol = 1e-12
    assert torch.isfinite(ours).all()
    largest = oracle.detach().abs().max().item() if oracle.numel() else 0.0
    torch.testing.assert_close(
        ours.double().reshape(oracle.shape), oracle.detach().double(), rtol=0, atol=largest * rtol
    )


def assert_scalars(ours, oracle, rtol=1e-5):
    for a, b in zip(ours, oracle, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=rtol, abs=1e-12)


def check(kernels, logits, features, student, gpu):
    case = Case(kernels, logits, features, student, gpu)
    generator, distill, grad_t, grad_f, grad_s, mean = case.oracle(1024.0)
    runs = []
    for reversed_order in (False, True):
        kernels.set_reversed(reversed_order)
        runs.append([*case.generator(), *case.distill()])
    results = runs[0]
    for a, b in zip(*runs):
        assert torch.equal(a, b), "the order in which threads run changes the result"
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
]  # fmt: skip


@pytest.mark.parametrize(("N", "C", "gpu"), SHAPES, ids=str)
def test_regimes_match_float64(kernels, N, C, gpu):
    check(kernels, randn(N, C), randn(N, 21, seed=1), randn(N, C, seed=2), gpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("N", "C"), [(150, 10), (13, 100), (3, 2000)], ids=str)
def test_dtypes(kernels, N, C, dtype):
    a, b, c = (randn(N, width, seed=i, dtype=dtype) for i, width in enumerate((C, 8, C)))
    check(kernels, a, b, c, (132, 90))
    check(kernels, a.float(), b.double(), c, (132, 80))


@pytest.mark.parametrize("C", [10, 100, 1100])
def test_strides(kernels, C):
    layouts = [
        randn(C, 9).t(), randn(9, C + 3)[:, 1 : C + 1], randn(9, C * 2)[:, ::2],
        randn(18, C + 4)[::2, :C], randn(9 * C + 1)[1:].view(9, C), randn(1, C).expand(9, C),
    ]  # fmt: skip
    for layout in layouts:
        features = randn(12, 9, seed=1).t()
        check(kernels, layout, features, randn(9, C, seed=2), (132, 90))
        check(kernels, randn(9, C), None, layout, (132, 80))


@pytest.mark.parametrize("gpu", [(132, 90), (2, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "C"), [(1, 1), (1024, 10), (517, 10), (300, 32)], ids=str)
def test_joint(kernels, N, C, dtype, gpu):
    logits, student = randn(N, C, dtype=dtype), randn(N, C, seed=2, dtype=dtype)
    features = randn(N, 84, seed=1, dtype=dtype)
    case = Case(kernels, logits, features, student, gpu)
    generator, distill, grad_t, grad_f, grad_s, _ = case.oracle(1.0)
    runs = []
    for reversed_order in (False, True):
        kernels.set_reversed(reversed_order)
        runs.append(case.joint())
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert_scalars(runs[0][:-3], [*generator, *distill])
    for ours, oracle in zip(runs[0][-3:], (grad_t, grad_f, grad_s)):
        if dtype == torch.float32 or oracle.numel() < 3000:
            assert_close(ours, oracle)


@pytest.mark.parametrize("C", [10, 50, 2000])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_are_not_hidden(kernels, C, bad):
    logits = randn(9, C)
    logits[7, 4] = bad
    case = Case(kernels, logits, None, randn(9, C, seed=1), (132, 90))
    total, one_hot, entropy, *_, grad, _ = case.generator()
    assert total.isnan() and one_hot.isnan() and entropy.isnan() and grad[7].isnan().all()
    total, _, _, _, grad = case.distill()
    assert total.isnan() and grad[7].isnan().all() and grad[[6, 8]].isfinite().all()


@pytest.mark.parametrize("C", [10, 50, 2000])
def test_equal_logits_give_exactly_nothing(kernels, C):
    logits = randn(9, C)
    _, kl, agreement, _, grad = Case(kernels, logits, None, logits, (132, 90)).distill()
    assert (kl.item(), agreement.item()) == (0, 1) and grad.count_nonzero() == 0


@pytest.mark.parametrize("C", [10, 50, 2000])
def test_minus_infinity_is_probability_zero(kernels, C):
    logits = randn(9, C)
    logits[:, 2] = -torch.inf
    check(kernels, logits, None, randn(9, C, seed=1), (132, 90))
    logits[3] = -torch.inf
    assert Case(kernels, logits, None, randn(9, C), (132, 90)).generator()[0].isnan()

"""The fused losses against plain PyTorch in float64: values, gradients, edges, errors."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from dafl_fast import _C, reference
from dafl_fast.losses import distill_loss, generator_loss
from tests import exact

SHAPES = [
    (1, 1), (5, 1), (1, 7), (3, 2), (17, 10), (512, 10), (1024, 10), (67, 16), (37, 31), (50, 32),
    (50, 33), (21, 64), (13, 129), (41, 401), (1024, 1000), (65536, 10),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WEIGHTS = reference.generator_loss.__kwdefaults__.values()
NAN, INF = math.nan, math.inf
ABOUT_THE_CPU = {
    "test_same_bits_at_any_number_of_threads", "test_threads_are_torchs_own",
    "test_errors_name_the_argument", "test_teacher_that_requires_grad_is_fine_without_autograd",
    "test_cuda_tensors_are_refused_with_a_sentence", "test_every_instruction_set",
    "test_instruction_set_is_the_one_asked_for",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _all_tensors_on(device, request):
    """Every test runs on every device there is, but for those that are about the CPU."""
    if device.type == "cuda" and request.function.__name__ in ABOUT_THE_CPU:
        pytest.skip("is about the CPU")
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def randn(*shape, scale=3.0, seed=0, dtype=torch.float32):
    """The same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * scale
    return x.to(dtype).to(torch.get_default_device())


def leaf(x):
    return x.detach().clone().requires_grad_()


def tolerance(dtype, rows):
    return 1e-12 if dtype == torch.float64 else 2e-5 if rows >= 65536 else 1e-5


def assert_scalar(ours, oracle, rtol):
    assert ours.shape == ()
    assert ours.item() == pytest.approx(oracle.item(), rel=rtol, abs=0)


def ulp_distance(a, b):
    """Representable numbers between a and b, both 16-bit floats."""
    a, b = a.view(torch.int16).int(), b.view(torch.int16).int()
    a, b = (torch.where(x < 0, -(x & 0x7FFF), x) for x in (a, b))
    return (a - b).abs().max().item() if a.numel() else 0


def assert_grad(ours, oracle, rtol):
    """In the input's dtype: 16-bit within one ulp, others relative to the gradient's size."""
    assert ours.shape == oracle.shape
    assert torch.isfinite(ours).all()
    if ours.dtype in (torch.bfloat16, torch.float16):
        # Where terms cancel, fp32 itself is exact only to the size of the terms.
        noise = (ours.double() - oracle).abs() <= oracle.abs().max() * rtol
        rounded = oracle.float().to(ours.dtype)
        assert ulp_distance(torch.where(noise, rounded, ours), rounded) <= 1
        return
    error = (ours.double() - oracle).norm() / oracle.norm().clamp_min(1e-300)
    assert error <= rtol
    largest = oracle.abs().max() if oracle.numel() else 0.0
    torch.testing.assert_close(ours.double(), oracle, rtol=0, atol=float(largest) * rtol)


def assert_exact(ours, oracle):
    """To 1e-5 of each tensor's largest number, down to where float32 ends."""
    for x, expected in zip(ours, oracle, strict=True):
        torch.testing.assert_close(
            x.double(), expected, rtol=0, atol=float(expected.abs().max()) * 1e-5 + 1e-37
        )


def check_generator(logits, features=None, upstream=1.0, rtol=None, **options):
    rtol = rtol or tolerance(logits.dtype, len(logits))
    pairs = []
    for function, cast in (
        (generator_loss, lambda x: x),
        (reference.generator_loss, torch.Tensor.double),
    ):
        # Of the test's own memory layout: gradients are taken with respect to the view.
        t = cast(logits).detach().requires_grad_()
        f = None if features is None else cast(features).detach().requires_grad_()
        loss = function(t, f, **options)
        inputs = [t] if f is None else [t, f]
        pairs.append((loss, torch.autograd.grad(loss.total * upstream, inputs)))
    (ours, ours_grads), (oracle, oracle_grads) = pairs
    expected = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for name in ours._fields:
        value = getattr(ours, name)
        assert value.dtype == expected
        assert value.requires_grad == (name == "total")
        assert_scalar(value, getattr(oracle, name), rtol)
    for x, grad, oracle_grad in zip((logits, features), ours_grads, oracle_grads):
        assert grad.dtype == x.dtype
        assert_grad(grad, oracle_grad, rtol)


def check_distill(student, teacher, upstream=1.0, rtol=None, **options):
    rtol = rtol or max(tolerance(x.dtype, len(x)) for x in (student, teacher))
    s = student.detach().requires_grad_()
    ours = distill_loss(s, teacher, **options)
    (grad,) = torch.autograd.grad(ours.total * upstream, s)
    s = student.detach().double().requires_grad_()
    oracle = reference.distill_loss(s, teacher.double(), **options)
    (oracle_grad,) = torch.autograd.grad(oracle.total * upstream, s)
    assert not ours.kl.requires_grad and not ours.agreement.requires_grad
    assert_scalar(ours.total, oracle.total, rtol)
    assert_scalar(ours.kl, oracle.kl, rtol)
    assert_scalar(ours.agreement, oracle.agreement, 1e-6)
    assert grad.dtype == student.dtype
    assert_grad(grad, oracle_grad, rtol)


# ---- The matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_generator_loss_matches_float64(shape, dtype):
    logits = randn(*shape, dtype=dtype)
    check_generator(logits)
    # fp16's gradients need a loss scale at large batches, as GradScaler gives them.
    features = randn(shape[0], 21, seed=1, dtype=dtype)
    check_generator(logits, features, upstream=1024.0, one_hot=0.7, entropy=3, activation=0.4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_distill_loss_matches_float64(shape, dtype):
    student, teacher = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    check_distill(student, teacher)
    check_distill(student, teacher, upstream=1024.0, temperature=4.0, scale_by_t2=False)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(DTYPES, 2)), ids=str)
@pytest.mark.parametrize("classes", [10, 100])
def test_dtypes_may_differ(first, second, classes):
    a, b = randn(33, classes, dtype=first), randn(33, classes, seed=1, dtype=second)
    rtol = 1e-5  # float32 computes unless both are float64
    check_generator(a, b, rtol=rtol)
    check_distill(a, b, rtol=rtol, temperature=2.0)


@pytest.mark.parametrize("log_base", [2, math.e, 10, 1.5])
def test_log_base(log_base):
    check_generator(randn(64, 10), log_base=log_base)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("scale_by_t2", [True, False])
@pytest.mark.parametrize("classes", [10, 100])
def test_temperature(temperature, scale_by_t2, classes):
    check_distill(randn(64, classes), randn(64, classes, seed=1), temperature=temperature,
                  scale_by_t2=scale_by_t2)  # fmt: skip


@pytest.mark.parametrize("scale", [0.1, 5.0, 60.0])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 7), (5, 65537), (5, 131072)], ids=str)
def test_flat_and_saturated_logits_match_float64(shape, scale):
    """Long sums of nearly equal terms, and gradients far below 1."""
    t, s = randn(*shape, scale=scale), randn(*shape, scale=scale, seed=1)
    for options in ({}, {"one_hot": 0.7, "entropy": 3.0}):
        x = leaf(t)
        loss = generator_loss(x, **options)
        assert_exact(
            (*loss[:3], *torch.autograd.grad(loss.total, x)), exact.generator_loss(t, **options)
        )
    for temperature in (1.0, 4.0):
        x = leaf(s)
        loss = distill_loss(x, t, temperature=temperature)
        assert_exact(
            (*loss[:2], *torch.autograd.grad(loss.total, x)), exact.distill_loss(s, t, temperature)
        )


# ---- Empty and degenerate sizes -----------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 10, 100])
def test_empty_batch(classes):
    t, f = leaf(torch.empty(0, classes)), leaf(torch.empty(0, 4))
    loss = generator_loss(t, f)
    assert not any(x.item() for x in loss)
    loss.total.backward()
    assert t.grad.shape == (0, classes) and f.grad.shape == (0, 4)
    s = leaf(torch.empty(0, classes))
    loss = distill_loss(s, torch.empty(0, classes))
    assert [x.item() for x in loss] == [0, 0, 0]
    loss.total.backward()
    assert s.grad.shape == (0, classes)


def test_one_class_has_no_one_hot_or_entropy_loss():
    t = leaf(randn(9, 1))
    loss = generator_loss(t)
    assert (loss.total.item(), loss.one_hot.item(), loss.entropy.item()) == (0, 0, 0)
    loss.total.backward()
    assert t.grad.count_nonzero() == 0


def test_no_features_to_average():
    t, f = leaf(randn(5, 3)), leaf(torch.empty(5, 0))
    loss = generator_loss(t, f)
    assert loss.activation.item() == 0
    loss.total.backward()
    assert f.grad.shape == (5, 0)
    assert torch.equal(loss.total, generator_loss(t).total)


# ---- Extreme values -----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 50])
def test_logits_of_100(classes):
    signs = torch.where(randn(40, classes) > 0, 100.0, -100.0)
    check_generator(signs + randn(40, classes, seed=2))
    check_distill(signs + randn(40, classes, seed=2), signs.roll(1, 0), temperature=3.0)


@pytest.mark.parametrize("classes", [10, 50])
@pytest.mark.parametrize("gap", [10.0, 18.0, 30.0, 80.0])
def test_confident_teacher_keeps_relative_accuracy(classes, gap):
    """exp(-18) is below the epsilon of float32: log(sum) would lose it."""
    t = leaf(randn(16, classes, scale=0.5).index_fill(1, torch.tensor(3), gap))
    loss = generator_loss(t, entropy=0.0)
    loss.total.backward()
    # The oracle is d' itself: plain formulas lose digits of it even in float64.
    e = (t.detach().double() - gap).exp()
    others = e.index_fill(1, torch.tensor(3), 0.0).sum(1)
    assert_scalar(loss.one_hot, others.log1p().mean(), 1e-5)
    expected = e / (1 + others[:, None]) / 16
    expected[:, 3] = -others / (1 + others) / 16
    torch.testing.assert_close(t.grad.double(), expected, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("classes", [4, 40])
def test_ties_go_to_the_lowest_index(classes):
    logits = torch.zeros(3, classes)
    logits[1, 2:] = 5.0
    logits[2, 1] = logits[2, classes - 1] = 7.0
    t = leaf(logits)
    generator_loss(t, entropy=0.0).total.backward()
    assert (t.grad < 0).nonzero().tolist() == [[0, 0], [1, 2], [2, 1]]
    check_generator(logits)
    student = torch.zeros(3, classes)
    student[0, 0] = student[1, 3] = student[2, 1] = 1.0
    assert distill_loss(student, logits).agreement.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("classes", range(1, 80))
def test_argmax_at_every_position(classes):
    """Each row's largest logit at another column; equal ones behind it."""
    logits = torch.full((classes, classes), -1.0)
    for row in range(classes):
        logits[row, row:] = 1.0
    assert distill_loss(torch.eye(classes), logits).agreement.item() == 1.0
    assert distill_loss(torch.eye(classes).roll(1, 1), logits).agreement.item() == (classes == 1)


@pytest.mark.parametrize("classes", [10, 50])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("column", [0, 4, -1])
def test_nan_and_inf_are_not_hidden(classes, bad, column):
    logits = randn(20, classes)
    logits[7, column] = bad
    t = leaf(logits)
    loss = generator_loss(t)
    assert loss.total.isnan() and loss.one_hot.isnan() and loss.entropy.isnan()
    loss.total.backward()
    assert t.grad[7].isnan().all()
    s = leaf(randn(20, classes, seed=1))
    loss = distill_loss(s, logits)
    assert loss.total.isnan()
    loss.total.backward()
    assert s.grad[7].isnan().all() and s.grad[[6, 8]].isfinite().all()
    assert distill_loss(logits, randn(20, classes, seed=1)).kl.isnan()


@pytest.mark.parametrize("classes", [10, 33, 50, 63, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_argmax_of_nothing_but_nan_is_a_class(classes, dtype):
    logits = torch.full((3, classes), NAN, dtype=dtype)
    row_stats = torch.ops.dafl_fast.generator_loss(logits, None, 1.0, 5.0, 0.1, 10.0)[4]
    assert ((row_stats[2] >= 0) & (row_stats[2] < classes)).all()  # the gradient is written there


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_features_are_not_hidden(bad):
    features = randn(20, 30)
    features[19, 29] = bad
    loss = generator_loss(randn(20, 10), features)
    assert torch.equal(loss.activation.isnan(), torch.tensor(math.isnan(bad)))
    assert not loss.total.isfinite()


@pytest.mark.parametrize("classes", [10, 50])
def test_minus_infinity_is_probability_zero(classes):
    masked = randn(20, classes)
    masked[3, 1] = masked[4, 0] = masked[4, classes - 1] = -INF
    masked[:, 2] = -INF  # no row's class: p_bar = 0, and 0 log 0 = 0
    check_generator(masked)
    check_distill(randn(20, classes, seed=1), masked, temperature=2.0)
    # Certain where the student says impossible: infinite, as in F.kl_div.
    assert distill_loss(masked, randn(20, classes, seed=1)).kl.item() == INF
    # Where both rule a class out it counts nothing, and the rest of the row is compared.
    keep = torch.arange(classes) != 2
    both = randn(20, classes, seed=1)
    both[:, 2] = -INF
    expected = distill_loss(both[:, keep], masked[:, keep]).kl.item()
    assert distill_loss(both, masked).kl.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("classes", [10, 50])
def test_row_of_minus_infinities_is_nan(classes):
    logits = torch.full((2, classes), -INF)
    assert generator_loss(logits).total.isnan()
    assert distill_loss(logits, torch.zeros(2, classes)).total.isnan()


def test_class_that_underflows_does_not_give_nan():
    """The published code's 0 log 0: NaN as soon as one class's mean probability is 0."""
    logits = torch.zeros(8, 10)
    logits[:, 5] = -300.0
    t = leaf(logits)
    loss = generator_loss(t)
    loss.total.backward()
    assert loss.entropy.item() == pytest.approx(-math.log10(9), rel=1e-6)
    assert t.grad.isfinite().all()


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_close_student_does_not_cancel(classes, distance):
    """KL is about distance^2 / 2: far below the rounding of the terms that make it up."""
    teacher = randn(64, classes)
    student = teacher + randn(64, classes, scale=distance, seed=1)
    s, d = leaf(student), leaf(student.double())
    ours, oracle = distill_loss(s, teacher), reference.distill_loss(d, teacher.double())
    ours.total.backward()
    oracle.total.backward()
    assert_scalar(ours.kl, oracle.kl, 1e-5)
    # Of the order of the distance, with the rounding of the log-sums (1e-7) in it.
    assert (s.grad.double() - d.grad).norm() / d.grad.norm() <= 5e-7 / distance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 100])
def test_equal_logits_give_exactly_nothing(classes, dtype):
    teacher = randn(64, classes, dtype=dtype)
    s = leaf(teacher)
    loss = distill_loss(s, teacher, temperature=3.0)
    loss.total.backward()
    assert (loss.kl.item(), loss.agreement.item()) == (0, 1)
    assert s.grad.count_nonzero() == 0


def test_16_bit_conversion_is_exact():
    """Every bf16 and fp16 number in; out as autograd of the activation loss."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        numbers = bits.view(dtype)
        numbers = numbers[numbers.isfinite()]
        # Largest first: each number against 0 makes d' = exp(-|x|).
        pairs = torch.stack([numbers, torch.zeros_like(numbers)], dim=1)
        for x in (pairs, pairs.repeat(1, 20)):
            ours = torch.ops.dafl_fast.generator_loss(x, None, *WEIGHTS)[-2]
            maximum, others, index = ours
            assert torch.equal(maximum, x.float().amax(1))
            assert torch.equal(index, x.argmax(1).float())
            d = (x.double() - x.double().amax(1, keepdim=True)).exp()
            d[torch.arange(len(d)), x.argmax(1)] = 0
            torch.testing.assert_close(others.double(), d.sum(1), rtol=1e-5, atol=2e-38)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [10, 100])
def test_16_bit_gradients_round_like_torch(classes, dtype):
    """From overflow to subnormals, by way of the upstream gradient."""
    t32 = randn(64, classes, dtype=dtype).float()
    for upstream in [2.0**k for k in range(-30, 40, 5)]:
        grads = []
        for t in (leaf(t32), leaf(t32.to(dtype))):
            (generator_loss(t).total * upstream).backward()
            grads.append(t.grad)
        if grads[0].is_cuda:  # 16 bytes are other columns, so sums have another order: one rounding
            finest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            torch.testing.assert_close(
                grads[1], grads[0].to(dtype), rtol=torch.finfo(dtype).eps, atol=finest
            )
        else:
            assert torch.equal(grads[0].to(dtype), grads[1])


# ---- Memory layouts -----------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda n, c: randn(c, n).t(),
    "row stride": lambda n, c: randn(n, c + 3)[:, 1 : c + 1],
    "column stride": lambda n, c: randn(n, c * 2)[:, ::2],
    "every other row": lambda n, c: randn(n * 2, c)[::2],
    "misaligned": lambda n, c: randn(n * c + 1)[1:].view(n, c),
    "one row for all": lambda n, c: randn(1, c).expand(n, c),
    "one column for all": lambda n, c: randn(n, 1).expand(n, c),
    "one number": lambda n, c: randn(1, 1).expand(n, c),
    "overlapping rows": lambda n, c: randn(n + c).as_strided((n, c), (1, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strides(layout, classes, dtype):
    # .to(dtype) keeps the strides of dense tensors only: the view is made after it.
    def view(columns):
        base = layout(35, columns)
        storage = torch.empty(0, dtype=base.dtype).set_(base.untyped_storage()).to(dtype)
        return storage.as_strided(base.shape, base.stride(), base.storage_offset())

    logits = view(classes)
    assert logits.stride() == layout(35, classes).stride()
    check_generator(logits, view(21))
    check_distill(logits, randn(35, classes, seed=1, dtype=dtype))
    check_distill(randn(35, classes, seed=1, dtype=dtype), logits)


# ---- Autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [6, 40])
def test_gradcheck(classes):
    t, f = leaf(randn(5, classes, dtype=torch.float64)), leaf(randn(5, 4, dtype=torch.float64))
    s = leaf(randn(5, classes, seed=1, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda t, f: generator_loss(t, f).total, (t, f))
    assert torch.autograd.gradcheck(
        lambda s: distill_loss(s, t.detach(), temperature=2.0).total, (s,)
    )


def test_second_backward_is_the_same():
    t, f, s = leaf(randn(33, 10)), leaf(randn(33, 7)), leaf(randn(33, 10, seed=1))
    for total, inputs in (
        (generator_loss(t, f).total, (t, f)),
        (distill_loss(s, t.detach(), temperature=2.0).total, (s,)),
    ):
        first = torch.autograd.grad(total * 3, inputs, retain_graph=True)
        again = torch.autograd.grad(total * 3, inputs, retain_graph=True)
        single = torch.autograd.grad(total, inputs)
        for a, b, c in zip(first, again, single):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c * 3, rtol=1e-5, atol=1e-8)


def test_not_the_last_layer():
    w = leaf(randn(12, 10, scale=0.3))
    x = randn(20, 12)
    (generator_loss(x @ w).total * 2 + distill_loss(x @ w, randn(20, 10)).total).backward()
    d = leaf(w.double())
    y = x.double() @ d
    loss = reference.generator_loss(y).total * 2
    (loss + reference.distill_loss(y, randn(20, 10).double()).total).backward()
    torch.testing.assert_close(w.grad.double(), d.grad, rtol=1e-5, atol=1e-5)


def test_gradient_for_features_alone():
    f = leaf(randn(6, 4))
    generator_loss(randn(6, 3), f, activation=2.0).total.backward()
    torch.testing.assert_close(f.grad, -2.0 * f.detach().sign() / 24)


def test_inputs_are_not_written():
    t, f = randn(33, 10), randn(33, 10, seed=1)
    before = t.clone(), f.clone()
    generator_loss(t.requires_grad_(), f.requires_grad_()).total.backward()
    distill_loss(t, f.detach()).total.backward()
    assert torch.equal(t, before[0]) and torch.equal(f, before[1])


def test_saved_inputs_changed_in_place_are_noticed():
    t = leaf(randn(4, 3)) * 1
    total = generator_loss(t).total
    t.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("which", ["generator", "distill"])
def test_double_backward_raises(which):
    x = leaf(randn(4, 3))
    total = (generator_loss(x) if which == "generator" else distill_loss(x, randn(4, 3))).total
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        grad.sum().backward()


def test_no_grad_and_inference_mode():
    x = leaf(randn(4, 3))
    expected = generator_loss(x).total.item()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = generator_loss(x)
            assert not loss.total.requires_grad and loss.total.item() == expected
            assert not distill_loss(x, x).total.requires_grad


# ---- Threads and instruction sets ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4097, 10), (1000, 300), (3, 20000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_at_any_number_of_threads(shape, dtype):
    def run():
        t, f = leaf(randn(*shape, dtype=dtype)), leaf(randn(shape[0], 50, seed=1, dtype=dtype))
        s = leaf(randn(*shape, seed=2, dtype=dtype))
        generator, distill = generator_loss(t, f), distill_loss(s, t.detach())
        generator.total.backward()
        distill.total.backward()
        return [x.detach() for x in (*generator, *distill, t.grad, f.grad, s.grad)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(single, run()))
    finally:
        torch.set_num_threads(before)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")
def test_threads_are_torchs_own():
    """One OpenMP runtime in the process: a second would ignore torch.set_num_threads."""
    code = """
import os, torch
from dafl_fast.losses import generator_loss
x = torch.ones(65536, 10)
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
generator_loss(x)
paths = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
print(len(paths), len(os.listdir("/proc/self/task")) - before)
"""
    result = run_python(code, OMP_NUM_THREADS="1")
    runtimes, started = map(int, result.stdout.split())
    assert (runtimes, started) == (1, 2)


@pytest.mark.parametrize("isa", _C.build_info()["isa_available"])
def test_every_instruction_set(isa):
    if os.environ.get("DAFL_FAST_ISA") or isa == _C.build_info()["isa"]:
        pytest.skip("this whole run is on one, or it is what the other tests run on")
    selected = "float64 or strides or argmax or nan or infinity or 16_bit or ties or close or equal"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__,
         "-k", f"({selected}) and not instruction and not 65536 and not 1024"],
        env={**os.environ, "DAFL_FAST_ISA": isa}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]


def test_instruction_set_is_the_one_asked_for():
    code = "from dafl_fast.losses import _C; print(_C.build_info()['isa'])"
    narrowest = _C.build_info()["isa_available"][0]
    assert run_python(code, DAFL_FAST_ISA=narrowest).stdout.strip() == narrowest
    result = run_python(code, DAFL_FAST_ISA="sse9")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "DAFL_FAST_ISA must be one of" in last and "got sse9" in last


def test_wrong_instruction_set_is_one_sentence_of_a_command():
    code = "import sys; from dafl_fast.info import main; sys.exit(main())"
    result = run_python(code, DAFL_FAST_ISA="sse9")
    assert result.returncode == 2
    assert result.stderr.startswith("error: DAFL_FAST_ISA must be one of the instruction sets")
    assert result.stderr.count("\n") == 1


# ---- Errors -------------------------------------------------------------------------------------

X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: generator_loss(torch.zeros(512)), ValueError,
         r"teacher_logits must be \[N, C\] with .* classes, got \[512\] on cpu"),
        (lambda: generator_loss(torch.zeros(2, 3, 4)), ValueError, r"got \[2, 3, 4\] on cpu"),
        (lambda: generator_loss(torch.zeros(4, 0)), ValueError, r"got \[4, 0\] on cpu"),
        (lambda: generator_loss(X, torch.zeros(5, 2)), ValueError,
         r"features must be \[N, F\] with the N .* of teacher_logits .*, got \[5, 2\] on cpu"),
        (lambda: generator_loss(X, torch.zeros(4)), ValueError, r"features must .* got \[4\]"),
        (lambda: generator_loss(X, torch.zeros(4, 2, device="meta")), ValueError,
         r"features must .* device of teacher_logits .*, got \[4, 2\] on meta"),
        (lambda: generator_loss(X.long()), TypeError,
         "teacher_logits must be float32, bfloat16, float16 or float64, got Long"),
        (lambda: generator_loss(X, X.int()), TypeError, "features must be float32"),
        (lambda: generator_loss(X, log_base=1), ValueError, "log_base must .* got 1"),
        (lambda: generator_loss(X, log_base=-2), ValueError, "log_base must .* got -2"),
        (lambda: generator_loss(X, log_base=INF), ValueError, "log_base must .* got inf"),
        (lambda: generator_loss(X, one_hot=NAN), ValueError, "one_hot must be .*, got nan"),
        (lambda: distill_loss(torch.zeros(512), X), ValueError,
         r"student_logits must be \[N, C\] on the same device as teacher_logits, "
         r"got \[512\] on cpu"),
        (lambda: distill_loss(X.to("meta"), X), ValueError, "student_logits .* on meta"),
        (lambda: distill_loss(torch.zeros(4, 2), X), ValueError,
         r"student_logits must be \[N, C\] like teacher_logits, which is \[4, 3\], got \[4, 2\]"),
        (lambda: distill_loss(X, torch.zeros(4)), ValueError, r"teacher_logits must be \[N, C\]"),
        (lambda: distill_loss(X, X.bool()), TypeError, "teacher_logits must be float32"),
        (lambda: distill_loss(X.to(torch.complex64), X), TypeError, "student_logits must be"),
        (lambda: distill_loss(X, X, temperature=0), ValueError, "temperature must .* got 0"),
        (lambda: distill_loss(X, X, temperature=-1), ValueError, "temperature must .* got -1"),
        (lambda: distill_loss(X, X, temperature=NAN), ValueError, "temperature must .* got nan"),
        (lambda: distill_loss(X, leaf(X)), ValueError,
         r"teacher_logits must not require grad.*teacher_logits.detach\(\)"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


def test_teacher_that_requires_grad_is_fine_without_autograd():
    with torch.no_grad():
        assert distill_loss(X, leaf(X)).kl.item() == 0


def test_cuda_tensors_are_refused_with_a_sentence():
    """Reached by its dispatch key, so that no GPU is needed."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    operator = torch.ops.dafl_fast.distill_loss.default
    if _C.build_info()["cuda"]:
        error, message = ValueError, "need tensors on a GPU, got .* on cpu"
    else:
        error, message = NotImplementedError, "has no CUDA kernels in this build"
    with pytest.raises(error, match=message):
        operator.redispatch(cuda, X, X, 1.0, True)

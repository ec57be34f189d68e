"""Properties of the losses that hold for any logits (hypothesis draws them)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dafl_fast import reference
from dafl_fast.losses import distill_loss, generator_loss

shapes = st.tuples(st.integers(1, 40), st.integers(1, 70))
scales = st.sampled_from([0.01, 1.0, 10.0, 100.0])
seeds = st.integers(0, 2**31)
temperatures = st.floats(0.1, 30.0)


def draw(shape, scale, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None, max_examples=200)
@given(shapes, scales, scales, seeds, temperatures)
def test_kl_is_not_negative(shape, student_scale, teacher_scale, seed, temperature):
    student, teacher = draw(shape, student_scale, seed), draw(shape, teacher_scale, seed + 1)
    loss = distill_loss(student, teacher, temperature=temperature)
    assert loss.kl.item() >= 0
    assert loss.total.item() == pytest.approx(temperature**2 * loss.kl.item(), rel=1e-6)
    # Also where both are so sure of the same class that the divergence leaves fp32's range.
    exact = reference.distill_loss(student.double(), teacher.double(), temperature=temperature)
    assert loss.kl.item() == pytest.approx(exact.kl.item(), rel=1e-4, abs=1e-12)


@settings(deadline=None, max_examples=200)
@given(shapes, scales, seeds, temperatures)
def test_kl_of_a_teacher_to_itself_is_exactly_0(shape, scale, seed, temperature):
    teacher = draw(shape, scale, seed)
    student = teacher.clone().requires_grad_()
    loss = distill_loss(student, teacher, temperature=temperature)
    loss.total.backward()
    assert (loss.total.item(), loss.kl.item(), loss.agreement.item()) == (0, 0, 1)
    assert student.grad.count_nonzero() == 0


@settings(deadline=None, max_examples=200)
@given(shapes, scales, seeds, st.integers(-64, 64))
def test_adding_to_a_row_changes_nothing(shape, scale, seed, shift):
    """Logits on a grid of 2^-8, so that the addition is exact and so must be the equality."""
    t, s = ((draw(shape, scale, seed + i) * 256).round() / 256 for i in range(2))
    assert [x.item() for x in generator_loss(t)] == [x.item() for x in generator_loss(t + shift)]
    expected = [x.item() for x in distill_loss(s, t)]
    assert [x.item() for x in distill_loss(s + shift, t)] == expected
    assert [x.item() for x in distill_loss(s, t + shift)] == expected


@settings(deadline=None, max_examples=200)
@given(shapes, scales, seeds, st.sampled_from([2.0, math.e, 10.0]))
def test_bounds_of_the_generator_loss(shape, scale, seed, log_base):
    features = draw((shape[0], 5), scale, seed + 1)
    loss = generator_loss(draw(shape, scale, seed), features, log_base=log_base)
    most = math.log(shape[1], log_base)  # of the entropy, when every class is as likely
    assert -most * (1 + 1e-6) - 1e-7 <= loss.entropy.item() <= 1e-7
    assert 0 <= loss.one_hot.item() <= math.log(shape[1]) * (1 + 1e-6)
    assert loss.activation.item() == pytest.approx(-features.double().abs().mean().item(), rel=1e-5)
    weighted = loss.one_hot + 5 * loss.entropy + 0.1 * loss.activation
    assert loss.total.item() == pytest.approx(weighted.item(), rel=1e-5, abs=1e-6)


@settings(deadline=None, max_examples=200)
@given(shapes, scales, seeds)
def test_order_of_rows_does_not_matter(shape, scale, seed):
    t, s = draw(shape, scale, seed).requires_grad_(), draw(shape, scale, seed + 1).requires_grad_()
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    fixed = t.detach()
    for x, totals in (
        (t, (generator_loss(t).total, generator_loss(t[order]).total)),
        (s, (distill_loss(s, fixed).total, distill_loss(s[order], fixed[order]).total)),
    ):
        grads = [torch.autograd.grad(total, x)[0] for total in totals]
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=200)
@given(shapes, scales, seeds)
def test_gradients_of_a_row_sum_to_0(shape, scale, seed):
    """Both losses are shift-invariant, so each row's gradient is orthogonal to ones."""
    t, s = draw(shape, scale, seed).requires_grad_(), draw(shape, scale, seed + 1).requires_grad_()
    generator_loss(t).total.backward()
    distill_loss(s, t.detach()).total.backward()
    for grad in (t.grad, s.grad):
        bound = 2e-6 * max(1.0, grad.abs().sum(1).max().item())
        assert grad.double().sum(1).abs().max().item() <= bound

"""Both losses with their gradients in one operator, against plain PyTorch in float64."""

import pytest
import torch

from dafl_fast import reference
from dafl_fast.losses import DaflLosses, dafl_losses, distill_loss, generator_loss

OPTIONS = dict(one_hot=0.7, entropy=3.0, activation=0.4, log_base=2.0, temperature=3.0)
WEIGHTS = reference.generator_loss.__kwdefaults__.values()
SHAPES = [(1, 1), (3, 2), (1024, 10), (1025, 10), (700, 32), (65, 33), (40, 1000), (3000, 10)]


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def inputs(N, C, device="cpu", dtype=torch.float32, F=21):
    return [
        randn(N, width, seed=seed, dtype=dtype).to(device)
        for seed, width in enumerate((C, F, C))
    ]  # fmt: skip


def scalars(losses):
    return [*losses.generator, *losses.distill]


def tensors(losses):
    grads = [losses.grad_teacher_logits, losses.grad_features, losses.grad_student_logits]
    return [*scalars(losses), *[g for g in grads if g is not None]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(device, shape, dtype):
    t, f, s = inputs(*shape, device, dtype)
    ours = dafl_losses(t, f, s, **OPTIONS)
    oracle = reference.dafl_losses(t.double(), f.double(), s.double(), **OPTIONS)
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-5)
    for a, b in zip(scalars(ours), scalars(oracle), strict=True):
        assert a.item() == pytest.approx(b.item(), rel=rtol)
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, rtol)
    for x, a, b in zip((t, f, s), tensors(ours)[-3:], tensors(oracle)[-3:], strict=True):
        assert a.dtype == x.dtype and a.is_contiguous() and a.isfinite().all()
        # fp16 gradients of large batches are subnormal: half their last bit is 3e-8.
        atol = b.abs().max().item() * rtol + (3e-8 if dtype == torch.float16 else 0)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)


def test_is_the_separate_losses(device):
    t, f, s = inputs(1024, 10, device)
    joint = dafl_losses(t, f, s, **OPTIONS)
    t, f, s = (x.requires_grad_() for x in (t, f, s))
    generator = generator_loss(t, f, **{k: v for k, v in OPTIONS.items() if k != "temperature"})
    distill = distill_loss(s, t.detach(), temperature=3.0)
    grads = torch.autograd.grad(generator.total, (t, f))
    (grad_student,) = torch.autograd.grad(distill.total, s)
    expected = [*generator, *distill, *grads, grad_student]
    for a, b in zip(tensors(joint), expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-8)


def test_nothing_is_differentiable_and_nothing_is_written(device):
    given = [x.requires_grad_() for x in inputs(33, 10, device)]
    before = [x.detach().clone() for x in given]
    losses = dafl_losses(*given)
    assert isinstance(losses, DaflLosses)
    assert not any(x.requires_grad for x in tensors(losses))
    assert all(torch.equal(a.detach(), b) for a, b in zip(given, before))


def test_without_features_and_without_rows(device):
    t, _, s = inputs(9, 10, device)
    losses = dafl_losses(t, None, s)
    assert losses.grad_features is None and losses.generator.activation.item() == 0
    losses = dafl_losses(t[:0], s[:0], s[:0])
    assert not any(x.item() for x in scalars(losses))
    assert losses.grad_teacher_logits.shape == losses.grad_features.shape == (0, 10)


@pytest.mark.parametrize("shape", [(1024, 10), (1500, 32), (60, 100)], ids=str)
def test_strides_and_mixed_dtypes(device, shape):
    N, C = shape
    t = randn(C, N).to(device).t()
    f = randn(N, 42, seed=1, dtype=torch.bfloat16).to(device)[:, ::2]
    s = randn(N, C + 3, seed=2, dtype=torch.float16).to(device)[:, 3:]
    ours, plain = dafl_losses(t, f, s), dafl_losses(*(x.contiguous() for x in (t, f, s)))
    for a, b in zip(tensors(ours), tensors(plain), strict=True):
        rtol = 1e-5 if a.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)


def test_gradients_can_be_handed_to_autograd(device):
    w = randn(12, 10).to(device).requires_grad_()
    x = randn(20, 12).to(device)
    t = x @ w
    losses = dafl_losses(t, None, randn(20, 10, seed=1).to(device))
    torch.autograd.backward([t], [losses.grad_teacher_logits])
    by_hand, w.grad = w.grad, None
    generator_loss(x @ w).total.backward()
    torch.testing.assert_close(by_hand, w.grad)


def test_compiles_and_passes_opcheck():
    t, f, s = inputs(33, 10)
    torch._dynamo.reset()
    compiled = torch.compile(dafl_losses, fullgraph=True, backend="aot_eager")(t, f, s)
    assert all(torch.equal(a, b) for a, b in zip(tensors(compiled), tensors(dafl_losses(t, f, s))))
    weights = (*WEIGHTS, 2.0, True)
    for features in (f, None):
        torch.library.opcheck(torch.ops.dafl_fast.dafl_losses, (t, features, s, *weights))


def test_differentiating_the_operator_itself_raises():
    t, f, s = inputs(4, 3)
    out = torch.ops.dafl_fast.dafl_losses(t.requires_grad_(), f, s, *WEIGHTS, 1.0, True)
    with pytest.raises(RuntimeError, match="not implemented"):
        out[0].backward()


def test_errors_name_the_argument():
    t, f, s = inputs(4, 3)
    with pytest.raises(ValueError, match="student_logits must be"):
        dafl_losses(t, f, s[:2])
    with pytest.raises(ValueError, match="features must be"):
        dafl_losses(t, f[:2], s)
    with pytest.raises(ValueError, match="temperature must"):
        dafl_losses(t, f, s, temperature=0)

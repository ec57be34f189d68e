"""The losses of :mod:`dafl_fast.losses` in plain PyTorch, to be read as formulas.

The tests compare the values of the fused losses with these in float64. The benchmarks compare the
times in float32. They run on any device that PyTorch knows, with batches of at least one row.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import DaflLosses, DistillLoss, GeneratorLoss


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def generator_loss(
    teacher_logits: Tensor,
    features: Tensor | None = None,
    *,
    one_hot: float = 1.0,
    entropy: float = 5.0,
    activation: float = 0.1,
    log_base: float = 10,
) -> GeneratorLoss:
    """What :func:`dafl_fast.generator_loss` computes, with ordinary differentiable operations."""
    t = _at_least_float32(teacher_logits)

    # L_oh: cross-entropy against the class that the teacher chooses.
    loss_one_hot = F.cross_entropy(t, t.argmax(dim=1))

    # L_ie: negative entropy of the batch's mean prediction, with 0 log 0 = 0.
    mean = t.softmax(dim=1).mean(dim=0)
    log_mean = torch.where(mean > 0, mean, 1).log()
    loss_entropy = (mean * log_mean).sum() / math.log(log_base)

    # L_a: real images give strong features.
    loss_activation = torch.zeros_like(loss_one_hot)
    if features is not None:
        loss_activation = -_at_least_float32(features).abs().mean().to(t.dtype)

    total = one_hot * loss_one_hot + entropy * loss_entropy + activation * loss_activation
    return GeneratorLoss(
        total, loss_one_hot.detach(), loss_entropy.detach(), loss_activation.detach()
    )


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> DistillLoss:
    """What :func:`dafl_fast.distill_loss` computes, with ordinary differentiable operations."""
    s, t = _at_least_float32(student_logits), _at_least_float32(teacher_logits.detach())
    kl = F.kl_div(
        F.log_softmax(s / temperature, dim=1),
        F.softmax(t / temperature, dim=1),
        reduction="batchmean",
    )
    total = temperature**2 * kl if scale_by_t2 else kl
    agreement = (s.argmax(dim=1) == t.argmax(dim=1)).to(kl.dtype).mean()
    return DistillLoss(total, kl.detach(), agreement)


def dafl_losses(
    teacher_logits: Tensor,
    features: Tensor | None,
    student_logits: Tensor,
    *,
    one_hot: float = 1.0,
    entropy: float = 5.0,
    activation: float = 0.1,
    log_base: float = 10,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> DaflLosses:
    """What :func:`dafl_fast.losses.dafl_losses` computes, with autograd's gradients."""
    with torch.enable_grad():
        t, s = (x.detach().requires_grad_() for x in (teacher_logits, student_logits))
        f = None if features is None else features.detach().requires_grad_()
        generator = generator_loss(
            t, f, one_hot=one_hot, entropy=entropy, activation=activation, log_base=log_base
        )
        distill = distill_loss(s, t, temperature=temperature, scale_by_t2=scale_by_t2)
        grads = torch.autograd.grad(generator.total, [t] if f is None else [t, f])
        (grad_student,) = torch.autograd.grad(distill.total, s)
    return DaflLosses(
        generator._replace(total=generator.total.detach()),
        distill._replace(total=distill.total.detach()),
        grads[0],
        None if f is None else grads[1],
        grad_student,
    )

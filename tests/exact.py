"""The losses and their gradients in float64, by formulas that keep their digits at any logits.

Autograd through a saturated softmax loses them even in float64: 1 - p is 0 for p = 1 - 1e-17.
"""

import math

import torch


def softmax(x):
    """p [N, C], d' [N, 1] (the sum of exp(x - max) without the argmax's 1) and argmax [N, 1]."""
    y = x.argmax(1, keepdim=True)
    e = (x - x.gather(1, y)).exp().scatter(1, y, 0)
    others = e.sum(1, keepdim=True)
    return e.scatter(1, y, 1) / (1 + others), others, y


def generator_loss(logits, one_hot=1.0, entropy=5.0, log_base=10):
    """total, one_hot, entropy, and the gradient of total [N, C]."""
    p, others, y = softmax(logits.double())
    mean = p.mean(0)
    logs = torch.where(mean > 0, mean, 1).log()
    top = mean.argmax()
    if mean[top] > 0.5:
        logs[top] = (-mean.index_fill(0, top, 0).sum()).log1p()
    loss_one_hot = others.log1p().mean()
    loss_entropy = (mean * logs).sum() / math.log(log_base)
    slope = logs * entropy / math.log(log_base)
    lead = slope - slope[y]  # the one of y is exactly 0, so that others keep their digits
    pull = p.scatter(1, y, -others / (1 + others))
    grad = one_hot * pull + p * (lead - (p * lead).sum(1, keepdim=True))
    total = one_hot * loss_one_hot + entropy * loss_entropy
    return total, loss_one_hot, loss_entropy, grad / len(logits)


def distill_loss(student, teacher, temperature=1.0):
    """total, kl, and the gradient of total [N, C], for scale_by_t2."""
    s, t = student.double() / temperature, teacher.double() / temperature
    q_s, others_s, _ = softmax(s)
    q_t, others_t, _ = softmax(t)
    shift = t.amax(1, keepdim=True) - s.amax(1, keepdim=True)
    a = ((t - s) - shift) - (others_t.log1p() - others_s.log1p())  # log(q_t / q_s)
    near = q_t * torch.where(
        a.abs() < 1e-3, a * a * (1 / 2 - a * (1 / 6 - a / 24)), a + (-a).expm1()
    )
    terms = torch.where(a.abs() < 1, near, q_t * (a - 1) + q_s)
    kl = torch.where(q_t == 0, q_s, terms).sum() / len(s)
    grad = torch.where(a.abs() < 1, q_t * (-a).expm1(), q_s - q_t)
    return temperature**2 * kl, kl, grad * temperature / len(s)

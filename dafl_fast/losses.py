"""The losses of data-free learning, each as one fused operator (Chen et al., ICCV 2019).

Logits and features may be float32, bfloat16, float16 or float64, with any strides, and need not
have the same dtype. Losses are accumulated and returned in float32 (float64 for float64 logits).
Gradients have the dtype of their input. Results are bit for bit the same with any number of
threads. There is no second derivative, and none in forward mode: computing one raises an error.

Notation: t, s teacher and student logits, f features, N rows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _C

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup
    from torch.nn.modules.batchnorm import _BatchNorm


class GeneratorLoss(NamedTuple):
    """Scalars. `total` is differentiable; its parts are detached, and not multiplied by weights."""

    total: Tensor
    one_hot: Tensor
    entropy: Tensor
    activation: Tensor


class DistillLoss(NamedTuple):
    """Scalars. `total` is differentiable; `kl` and `agreement` are detached."""

    total: Tensor
    kl: Tensor
    agreement: Tensor


class DaflLosses(NamedTuple):
    """Both losses of a step and their gradients; nothing here is differentiable."""

    generator: GeneratorLoss
    distill: DistillLoss
    grad_teacher_logits: Tensor
    grad_features: Tensor | None
    grad_student_logits: Tensor


def generator_loss(
    teacher_logits: Tensor,
    features: Tensor | None = None,
    *,
    one_hot: float = 1.0,
    entropy: float = 5.0,
    activation: float = 0.1,
    log_base: float = 10,
    group: ProcessGroup | None = None,
) -> GeneratorLoss:
    """The generator's loss, ``one_hot * L_oh + entropy * L_ie + activation * L_a`` (equation 5).

    - ``L_oh``: mean cross-entropy of t against its own argmax, the lowest index at ties
      (equation 2), in nats.
    - ``L_ie``: ``sum_c p_c log p_c`` with p the batch mean of softmax(t) and 0 log 0 = 0
      (equation 4), with the logarithm to ``log_base``, which is 10 in the published code.
    - ``L_a``: ``-mean |f|`` over batch and features, as in the published code (equation 3 has the
      sum over features).

    Args:
        teacher_logits: [N, C], C >= 1. Logits, not probabilities.
        features: [N, F], the input of the teacher's last layer; without them ``L_a`` is 0.
        one_hot, entropy, activation: weights of the three parts.
        log_base: base of the logarithm in ``L_ie``, greater than 1.
        group: processes that each have an equal share of one batch. p is then the mean over the
            whole batch. The mean of the processes' losses, and that of their gradients, is the loss
            and the gradient for the whole batch.

    Returns:
        ``GeneratorLoss(total, one_hot, entropy, activation)``: the differentiable total and the
        unweighted parts for logging. With N = 0 all are 0.

    Raises:
        ValueError: a shape, device, weight or base that does not fit.
        TypeError: a dtype that is not floating point, or a floating point type not named above.
    """
    weights = (one_hot, entropy, activation, log_base)
    if group is not None:
        return GeneratorLoss(
            *_SharedGeneratorLoss.apply(teacher_logits, features, weights, group)  # type: ignore
        )
    operator = _operators().generator_loss
    try:
        return GeneratorLoss(*operator(teacher_logits, features, *weights)[:4])
    except TypeError:
        tensors = {"teacher_logits": teacher_logits, "features": features}
        _check_types(tensors, dict(zip(_WEIGHTS, weights)))
        raise


def adversarial_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``-mean_i [argmax s_i = argmax t_i] KL(softmax(t_i) || softmax(s_i))``, for the generator.

    It rewards images for which the student chooses the teacher's class, but with very different
    probabilities: there the student can still learn something (Fang et al. 2019, with the mask of
    Fast-Datafree). It is written in plain PyTorch, because it runs only once a step.

    Both logits are [N, C] and differentiable; the loss is a scalar of at least fp32.
    """
    s, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in
            (student_logits, teacher_logits))  # fmt: skip
    agreed = (s.argmax(1) == t.argmax(1)).to(s.dtype)
    log_q, log_p = s.log_softmax(1), t.log_softmax(1)
    return -(agreed * (log_p.exp() * (log_p - log_q)).sum(1)).mean()


def diversity_loss(features: Tensor) -> Tensor:
    """``log(sum_k l_k^2 / (sum_k l_k)^2)`` of the eigenvalues l of the features' covariance.

    That is minus the logarithm of the number of directions in which the features of a batch
    differ, counted as the participation ratio. The entropy loss makes a batch equally many images
    of each class; this one makes them differ within a class as well, without which two classes are
    two kinds of images. It is written in plain PyTorch, without computing the eigenvalues.

    `features` are [N, F], and neither is 0. The scalar, of at least fp32, lies between
    -log(min(N - 1, F)) and 0. It is 0 if all rows are equal.

    Raises:
        ValueError: features of another shape.
    """
    if features.dim() != 2 or not features.numel():
        raise ValueError(f"features must be [N, F], not empty, got {list(features.shape)}")
    f = features.to(torch.promote_types(features.dtype, torch.float32))
    # The loss does not depend on the features' scale, so bring them where squares do not overflow:
    # first for the mean, then for what differs from it.
    least = torch.finfo(f.dtype).tiny
    f = f / f.detach().abs().amax().clamp_min(least)
    f = f - f.mean(0)
    f = f / f.detach().abs().amax().clamp_min(least)
    with torch.autocast(f.device.type, enabled=False):
        # The eigenvalues of F F^T and of F^T F differ in zeros only.
        products = f.T @ f if f.shape[0] > f.shape[1] else f @ f.T
    trace = products.diagonal().sum()
    # With `least` it is 0, not NaN, when the features are all equal.
    return (products.square().sum() + least).log() - 2 * (trace + least**0.5).log()


def batch_norm_loss(
    means: list[Tensor], variances: list[Tensor], norms: Sequence[_BatchNorm]
) -> Tensor:
    """``sum_l ||mean_l - running_mean_l||_2 + ||var_l - running_var_l||_2``, for the generator.

    Images like the teacher's training data give the statistics that its BatchNorm layers stored
    (Yin et al. 2020, "Dreaming to Distill", equation 4). It is written in plain PyTorch.

    `means` and biased `variances` [C_l] are those of the input of each layer in `norms`. These
    layers must have running statistics. The loss is a scalar.
    """
    values: list[Tensor] = []
    stored: list[Tensor] = []
    for mean, variance, norm in zip(means, variances, norms, strict=True):
        assert norm.running_mean is not None and norm.running_var is not None
        values += [mean, variance]
        stored += [norm.running_mean, norm.running_var]
    # All layers at once: a GPU would take longer to start a kernel for each than to run it.
    differences = torch.cat(values) - torch.cat(stored)
    norms_of = torch._foreach_norm(differences.split([len(value) for value in values]))
    return torch.stack(norms_of).sum()


class GeneratedBatch(NamedTuple):
    """What a generator loss in plain PyTorch may use.

    Attributes:
        images: [N, C, H, W], differentiable like all the others.
        logits, features: the teacher's, [N, C] and [N, F] or None.
        student: images -> the student's logits [N, C], in evaluation mode, its weights constant.
        batch_norm_loss: `batch_norm_loss` of the teacher's layers for this batch.
        gather: the rows of all processes, differentiable, of those of this one.
    """

    images: Tensor
    logits: Tensor
    features: Tensor | None
    student: Callable[[Tensor], Tensor]
    batch_norm_loss: Callable[[], Tensor]
    gather: Callable[[Tensor], Tensor]

    def diversity_loss(self) -> Tensor:
        """`diversity_loss` of the whole batch; 0 without features."""
        if self.features is None:
            return torch.zeros((), device=self.images.device)
        return diversity_loss(self.gather(self.features))


# The generator losses in plain PyTorch, by the setting that is their weight. They are added to the
# fused ones, and not computed if the weight is 0.
PLAIN_GENERATOR_LOSSES: dict[str, Callable[[GeneratedBatch], Tensor]] = {
    "bn_statistics": lambda batch: batch.batch_norm_loss(),
    "diversity": GeneratedBatch.diversity_loss,
    "adversarial": lambda batch: adversarial_loss(batch.student(batch.images), batch.logits),
}


class _SharedGeneratorLoss(torch.autograd.Function):
    """The fused forward and backward operators; in between, p is averaged over all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        teacher_logits: Tensor,
        features: Tensor | None,
        weights: tuple[float, float, float, float],
        group: ProcessGroup,
    ) -> tuple[Tensor, ...]:
        import torch.distributed as dist

        _, one_hot, entropy, activation, row_stats, mean = torch.ops.dafl_fast.generator_loss(
            teacher_logits, features, *weights
        )
        dist.all_reduce(mean, group=group)
        mean.div_(group.size())
        entropy = torch.special.entr(mean).sum().neg() / math.log(weights[3])
        total = weights[0] * one_hot + weights[1] * entropy + weights[2] * activation
        ctx.save_for_backward(teacher_logits, features, row_stats, mean)
        ctx.weights = weights
        ctx.mark_non_differentiable(one_hot, entropy, activation)
        return total, one_hot, entropy, activation

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_total: Tensor, *unused: Tensor
    ) -> tuple[Tensor | None, ...]:
        teacher_logits, features, row_stats, mean = ctx.saved_tensors
        grad_logits, grad_features = torch.ops.dafl_fast.generator_loss_backward(
            grad_total, teacher_logits, features, row_stats, mean, *ctx.weights
        )
        return grad_logits, None if features is None else grad_features, None, None


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> DistillLoss:
    """The student's loss, mean over rows of ``KL(softmax(t / T) || softmax(s / T))``.

    This is the paper's knowledge distillation term (equation 1) at temperature T. Without the
    factor T^2 its gradient would shrink as T grows (Hinton et al., 2015). The loss is never
    negative, and exactly 0 for equal logits. If t = -inf, the class has q_t = 0.

    Args:
        student_logits: [N, C], the only argument with a gradient.
        teacher_logits: [N, C], the targets.
        temperature: T > 0.
        scale_by_t2: whether ``total`` is ``T^2 * kl`` or ``kl``.

    Returns:
        ``DistillLoss(total, kl, agreement)``: the differentiable total, the KL divergence in nats
        without T^2, and the fraction of rows in which the lowest-index argmax of both is the same.
        With N = 0 all are 0.

    Raises:
        ValueError: a shape, device or temperature that does not fit, or ``teacher_logits`` that
            require grad.
        TypeError: a dtype that is not floating point, or a floating point type not named above.
    """
    operator = _operators().distill_loss
    try:
        return DistillLoss(*operator(student_logits, teacher_logits, temperature, scale_by_t2)[:3])
    except TypeError:
        tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
        _check_types(tensors, {"temperature": temperature, "scale_by_t2": scale_by_t2})
        raise


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
    """Both losses and all their gradients at once, for a training loop that applies them by hand.

    The values are those of :func:`generator_loss` and :func:`distill_loss`; the gradients are those
    of their totals for an upstream gradient of 1. On a GPU with up to 32 classes, teacher's and
    student's logits are read together and everything takes two launches, or only one for small
    batches from compute capability 9.0 on. Otherwise the separate operators run in turn.

    Pass the gradients to autograd with
    ``torch.autograd.backward([teacher_logits, features], [grad_teacher_logits, grad_features])``.
    With float16 inputs and a loss scale, use the separate losses: the gradients returned here are
    rounded to float16 before you could scale them.

    Args:
        teacher_logits: [N, C], C >= 1.
        features: [N, F] or None, as in :func:`generator_loss`.
        student_logits: [N, C].
        one_hot, entropy, activation, log_base: as in :func:`generator_loss`.
        temperature, scale_by_t2: as in :func:`distill_loss`.

    Returns:
        ``DaflLosses(generator, distill, grad_teacher_logits, grad_features,
        grad_student_logits)``: two named tuples of detached scalars, and contiguous gradients in
        the shapes and dtypes of their inputs; ``grad_features`` is None without features.

    Raises:
        ValueError, TypeError: as the separate losses.
    """
    settings = (one_hot, entropy, activation, log_base, temperature, scale_by_t2)
    try:
        t, s = teacher_logits.detach(), student_logits.detach()
        f = None if features is None else features.detach()
        results = _operators().dafl_losses(t, f, s, *settings)
    except (AttributeError, TypeError):
        tensors = {
            "teacher_logits": teacher_logits, "features": features,
            "student_logits": student_logits,
        }  # fmt: skip
        _check_types(tensors, dict(zip((*_WEIGHTS, "temperature", "scale_by_t2"), settings)))
        raise
    grad_t, grad_f, grad_s = results[7:]
    generator, distill = GeneratorLoss(*results[:4]), DistillLoss(*results[4:7])
    return DaflLosses(generator, distill, grad_t, None if f is None else grad_f, grad_s)


_WEIGHTS = ("one_hot", "entropy", "activation", "log_base")


def _check_types(tensors: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Says in one sentence what the extension would say in a page, after it has refused a call."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and not (name == "features" and value is None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}") from None
    for name, value in numbers.items():
        try:
            float(value + 0)  # text that is a number is none
        except (TypeError, ValueError, OverflowError):
            kind = type(value).__name__
            raise TypeError(f"{name} must be a number that fits a float, got {kind}") from None


def _operators() -> Any:
    """The extension's functions, or under torch.compile the operators, which it can trace."""
    return torch.ops.dafl_fast if torch.compiler.is_compiling() else _C

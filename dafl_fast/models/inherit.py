"""A student that begins with its teacher's weights, where both have the same layers.

A smaller network of the teacher's kind has layers that the teacher has too, or part of them: all of
ResNet-18's are among those of ResNet-34, and LeNet-5-Half's are halves of LeNet-5's. As in
DistilBERT (Sanh et al. 2019), the student takes them over.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Tensors = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module) -> int:
    """Copies into `student`, in place, parameters and buffers of `teacher` with the same names.

    Where the student's tensor has fewer channels it gets the first ones. As all layers take the
    first channels, these belong together. Kernels must be of the same size. Names may differ by a
    prefix that all of a network's parameters have, as within a wrapper.

    Returns:
        How many parameters, counted by number, the student has from the teacher now.
    """
    best = max(
        (_pairs(own, others) for own in _readings(student) for others in _readings(teacher)),
        key=_taken,
    )
    if _taken(best):  # else nothing but buffers, as constants of a formula
        for to, by in best:
            to.copy_(by[tuple(slice(size) for size in to.shape)])
    return _taken(best)


def _readings(network: nn.Module) -> list[Tensors]:
    """The tensors of a network by their names, and by these without a prefix that all parameters
    have in common."""
    tensors: Tensors = dict(network.named_parameters(remove_duplicate=False))
    prefix = ""
    for part in next(iter(tensors), "").split(".")[:-1]:
        longer = f"{prefix}{part}."
        if not all(name.startswith(longer) for name in tensors):
            break
        prefix = longer
    tensors |= dict(network.named_buffers(remove_duplicate=False))
    return [tensors, {name.removeprefix(prefix): one for name, one in tensors.items()}]


def _pairs(own: Tensors, others: Tensors) -> list[Pair]:
    """Those of a student's tensors that can have the values of a teacher's, each with that one."""
    named = [(own[name], others[name]) for name in own if name in others]
    return [(to, by) for to, by in named if _fits(to, by)]


def _fits(to: Tensor, by: Tensor) -> bool:
    if is_lazy(to) or is_lazy(by):
        return False
    plain = all(one.layout == torch.strided and not one.is_meta for one in (to, by))
    smaller = to.dim() == by.dim() and all(a <= b for a, b in zip(to.shape, by.shape))
    smaller = smaller and to.shape[2:] == by.shape[2:]  # a kernel's corner is no smaller kernel
    same_kind = to.is_floating_point() == by.is_floating_point()
    return plain and smaller and same_kind and not by.is_quantized


def _taken(pairs: list[Pair]) -> int:
    return sum(to.numel() for to, _ in pairs if isinstance(to, nn.Parameter))

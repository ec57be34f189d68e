"""Copies of a network, so that training can use faster layers and the user's network is unchanged.

The layers of a user's student keep their classes, modes and hooks. We train a twin of it, which has
its own layers, but the same parameters and buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import UserError, first_line

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def twin(
    network: nn.Module,
    substitute: Callable[[nn.Module], type[nn.Module] | None] = lambda layer: None,
) -> nn.Module:
    """A copy of `network` that shares its parameters and buffers, and nothing else.

    Args:
        network: left as it is.
        substitute: for a layer, the class that replaces its own in the twin; None keeps its own.
            That class must need no attributes other than those of the layer it replaces.

    Raises:
        UserError: the network cannot be copied.
    """
    memo = _memo(network)
    for layer in network.modules():
        for held in (layer._parameters, layer._buffers):
            memo[id(held)] = held
    replaced = [
        (layer, kind.__new__(kind)) for layer in network.modules() if (kind := substitute(layer))
    ]
    # Every reference to a layer in the copy becomes a reference to its substitute.
    memo.update({id(layer): new for layer, new in replaced})
    for layer, new in replaced:
        new.__dict__.update(copy.deepcopy(layer.__dict__, memo))
    return _deepcopy(network, memo)


def duplicate(network: nn.Module) -> nn.Module:
    """A copy of `network` with parameters and buffers of its own.

    Raises:
        UserError: the network cannot be copied.
    """
    return _deepcopy(network, _memo(network))


def _memo(network: nn.Module) -> dict[int, Any]:
    """What a deep copy must not copy: tensors that hooks compute anew at every call, because they
    cannot be copied, and objects outside the network whose methods are hooks in it."""
    layers = set(network.modules())
    memo: dict[int, Any] = {}
    for layer in layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
        for hook in (hook for name in _HOOKS for hook in getattr(layer, name, {}).values()):
            owner = getattr(hook, "__self__", None)
            if owner is not None and owner not in layers:
                memo[id(owner)] = owner
    return memo


def _deepcopy(network: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(network, memo)
    except Exception as error:  # any kind: it comes from an attribute
        raise UserError(
            f"the network {type(network).__name__} cannot be copied ({first_line(error)}); keep "
            "what cannot be copied, such as locks and open files, out of its attributes"
        ) from error

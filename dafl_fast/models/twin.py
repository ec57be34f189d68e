"""Twins of a network, in which some layers have faster classes, and copies.

A user's student is theirs: its layers keep their classes. Where none can be made faster it trains
itself; else a twin of it does, which has layers of its own and everything else in common with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line

# What a twin's layers have for themselves: what is in them, their mode, what compiling adds.
_OWN = {"_modules", "training", "_compiled_call_impl"}


def twin(
    network: nn.Module, substitute: Callable[[nn.Module], type[nn.Module] | None]
) -> nn.Module:
    """A network that shares with `network` its parameters, buffers, hooks and all else, but has
    layers of its own; `network` itself if nothing is to be substituted.

    Args:
        network: left as it is.
        substitute: for a layer, the class that takes its place in the twin; None keeps its own. An
            instance of that class must be told by the attributes of the layer that it replaces.
    """
    kinds = {layer: kind for layer in network.modules() if (kind := substitute(layer))}
    twins: dict[nn.Module, nn.Module] = {}

    def twin_of(layer: nn.Module) -> nn.Module:
        if isinstance(layer, torch.jit.ScriptModule):
            return layer  # one piece, in which nothing is substituted
        if layer not in twins:
            # Not by way of the class, which may do more: each fx.GraphModule makes itself another.
            twins[layer] = new = object.__new__(kinds.get(layer, type(layer)))
            new.__dict__.update({key: own(value) for key, value in vars(layer).items()})
        return twins[layer]

    known = set(network.modules())

    def own(value: Any) -> Any:
        """An attribute as the twin has it: layers of the network are replaced by their twins."""
        if isinstance(value, nn.Module):
            return twin_of(value) if value in known else value
        if type(value) in (list, tuple, dict):
            items = list(value.values() if isinstance(value, dict) else value)
            mine = [own(item) for item in items]
            if any(a is not b for a, b in zip(items, mine)):
                return dict(zip(value, mine)) if isinstance(value, dict) else type(value)(mine)
        return value

    return twin_of(network) if kinds else network


def answers_alike(network: nn.Module, other: nn.Module, batches: list[Tensor]) -> bool:
    """Whether a twin or copy, `other`, can stand for `network`: it gives the same outputs for
    `batches`, to rounding, and no layer of `network` takes part in them, as it would if functions
    in the network's attributes or hooks held on to it. In the mode that both are in."""
    own, seen = set(network.modules()) - set(other.modules()), []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, _: seen.append(m in own))
    try:
        with torch.no_grad():
            got = [other(batch) for batch in batches]
            handle.remove()
            wanted = [network(batch) for batch in reversed(batches)][::-1]
            # Faster layers round otherwise, in bf16 by some per cent; what is wrong is far off.
            near = [(a - b).abs().max() <= 0.1 * b.abs().max() for a, b in zip(got, wanted)]
        return all(near) and not any(seen)
    except Exception:  # whatever a network says that lacks what its hooks should have left
        return False
    finally:
        handle.remove()


def give_back(network: nn.Module, other: nn.Module) -> None:
    """Lets the layers of `network` have the plain attributes that those of its twin have by now."""
    for layer, mine in zip(network.modules(), other.modules(), strict=True):
        if layer is not mine:
            for key, value in vars(mine).items():
                if key not in _OWN and not _holds_layers(value):
                    layer.__dict__[key] = value


def _holds_layers(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        items = value.values() if isinstance(value, dict) else value
        return any(isinstance(item, nn.Module) for item in items)
    return isinstance(value, nn.Module)


def duplicate(network: nn.Module) -> nn.Module:
    """A copy of `network` with parameters and buffers of its own.

    Raises:
        UserError: the network cannot be copied.
    """
    layers = set(network.modules())
    # Not copied: tensors that hooks compute anew at every call, which cannot be, and owners of
    # hooks that are no part of the network, whom the hooks report to.
    memo: dict[int, Any] = {}
    for layer in layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
            for hook in value.values() if isinstance(value, Mapping) else ():
                owner = getattr(hook, "__self__", None)
                if owner is not None and owner not in layers:
                    memo[id(owner)] = owner
    try:
        return copy.deepcopy(network, memo)
    except Exception as error:  # whatever an attribute that cannot be copied says
        raise UserError(
            f"the network {type(network).__name__} cannot be copied ({first_line(error)}); keep "
            "what cannot be copied, such as locks and open files, out of its attributes"
        ) from error

"""Saves and restores everything that a training step changes: tensors, modules, optimizers, ...

`Step.live` is the complete list of these objects. Checkpoints, resuming, and the snapshot before a
CUDA graph is captured all use this list and the two functions here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Live = (
    Tensor
    | nn.Module
    | torch.optim.Optimizer
    | torch.Generator
    | torch.amp.GradScaler
    | list[torch.amp.GradScaler]
)


def state_of(live: Live) -> Any:
    """The state of `live`. Later steps change its tensors, so copy them if you keep the state."""
    if isinstance(live, Tensor):
        return live
    if isinstance(live, list):
        return [state_of(one) for one in live]
    if isinstance(live, torch.Generator):
        return live.get_state()
    state = live.state_dict()
    return state["state"] if isinstance(live, torch.optim.Optimizer) else state


def restore(live: Live, state: Any) -> None:
    """Restores the state in place, so that a CUDA graph finds every tensor at its address.

    Raises:
        ValueError: a tensor has another shape.
    """
    if isinstance(live, Tensor):
        state = torch.as_tensor(state)
        if state.shape != live.shape:  # which might be spread over it
            raise ValueError(f"a tensor should be {list(live.shape)}, got {list(state.shape)}")
        live.copy_(state)
    elif isinstance(live, list):
        for one, saved in zip(live, state, strict=True):
            restore(one, saved)
    elif isinstance(live, torch.Generator):
        live.set_state(state)
    elif isinstance(live, torch.optim.Optimizer):
        own = live.state_dict()["state"]
        for index, values in state.items():
            for key, value in values.items():
                restore(own[index][key], value)
    else:
        live.load_state_dict(state)


def misfit(network: nn.Module, saved: dict[str, Any]) -> str | None:
    """The first weight of another network, whose state dict was saved, that `network` has not like
    that; None if all fit."""
    own = network.state_dict()
    for name in (*own, *saved):
        if name not in saved:
            return f"it has no weight {name}, as yours has"
        if name not in own:
            return f"it has a weight {name}, and yours has none"
        theirs, mine = saved[name], own[name]
        if isinstance(mine, Tensor) and theirs.shape != mine.shape:
            return f"its weight {name} is {list(theirs.shape)}, that of yours {list(mine.shape)}"
    return None


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Lets the optimizer create its state now, so that later steps only write it in place."""
    (group,) = optimizer.param_groups
    for parameter in group["params"]:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    rate = group["lr"].clone()
    group["lr"].zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a capturable optimizer outside a capture
        optimizer.step()
    group["lr"].copy_(rate)
    optimizer.zero_grad(set_to_none=True)
    clear_state(optimizer)


def clear_state(optimizer: torch.optim.Optimizer) -> None:
    """Forgets, in place, what the optimizer has learned from earlier steps."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested dicts and lists in which `change` was applied to each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    return value


def copied(value: Any) -> Any:
    """Nested dicts and lists with copies of their tensors, on the same device."""
    return map_tensors(value, lambda tensor: tensor.detach().clone())

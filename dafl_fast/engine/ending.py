"""How is the softmax, log-softmax or sigmoid at a teacher's end taken off?

What is left must give logits of which that function makes what the teacher has returned.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch
from torch import fx, nn

from .fold import has_hooks, traced
from .outputs import SQUASHED, Reading, Squash


def without_last_layer(network: nn.Module, reading: Reading) -> Reading:
    """Takes off, in place, a layer of `network` that computes its softmax, log-softmax or sigmoid.

    It must be a layer that runs once, and what is left must give logits of which the function makes
    what `reading` has seen.

    Returns:
        How the network is read from now on; `reading` itself if nothing was taken off.
    """
    squash = SQUASHED.get(reading.kind)
    if squash is None or not reading.seen:
        return reading
    calls: list[nn.Module] = []
    layers = [layer for layer in network.modules() if type(layer) in squash.targets]
    layers = [layer for layer in layers if not has_hooks(layer)]
    handles = [layer.register_forward_hook(lambda one, *_: calls.append(one)) for layer in layers]
    try:
        with torch.no_grad(), suppress(Exception):  # a network may raise anything
            network(reading.seen[0][0])
    finally:
        for handle in handles:
            handle.remove()
    if not calls or calls.count(calls[-1]) > 1:
        return reading
    places = [
        (parent, name)
        for parent in network.modules()
        for name, child in parent._modules.items()
        if child is calls[-1]
    ]
    for parent, name in places:
        parent._modules[name] = nn.Identity()
    if _is_left(network, reading, squash):
        return _taken_off(reading)
    for parent, name in places:
        parent._modules[name] = calls[-1]
    return reading


def without_last_node(network: nn.Module, reading: Reading) -> tuple[nn.Module, Reading]:
    """As `without_last_layer`, of a function or operator that torch.fx finds in the network's code.

    Returns:
        A torch.fx module with the network's layers and how it is read; or both as they were given.
    """
    squash = SQUASHED.get(reading.kind)
    if squash is None or not reading.seen:
        return network, reading
    try:
        root, graph = traced(network)
    except Exception:  # the network's code may raise anything
        return network, reading
    for node in reversed(graph.nodes):
        target = node.target
        if node.op == "call_module":
            target = type(root.get_submodule(str(target)))
        if node.op.startswith("call") and target in squash.targets:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
            cut = fx.GraphModule(root, graph)
            if _is_left(cut, reading, squash):
                return cut, _taken_off(reading)
            break
    return network, reading


def _taken_off(reading: Reading) -> Reading:
    return replace(reading, kind="binary-logit" if reading.kind.startswith("binary") else "logits")


@torch.no_grad()
def _is_left(network: nn.Module, reading: Reading, squash: Squash) -> bool:
    """Whether `squash` of the network's numbers are those that were seen."""
    for images, expected in reading.seen:
        with suppress(Exception):  # a network may raise anything
            got = squash.function(reading.numbers(network(images)))
            near = max(1e-4, 2 * torch.finfo(expected.dtype).eps)
            if got.shape == expected.shape and torch.allclose(got, expected, near, near, True):
                continue
        return False
    return True

"""Which convolutions of a frozen network can add and apply ReLU before they write their results?

On a GPU, cuDNN computes relu(conv(x) + bias) and relu(conv(x) + bias + z) by one kernel. In PyTorch
these are two to four, each of which reads and writes the whole activation. The two functions have
no gradient in PyTorch; here they have those to x and z, which are all that a frozen network needs.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from ..errors import first_line
from .fold import has_hooks
from .layout import try_out

log = logging.getLogger(__name__)

# Tensor cores take channels by eights, of 16 bits.
_CHANNELS = 8
_DTYPES = (torch.bfloat16, torch.float16)
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADDS = (operator.add, operator.iadd, torch.add)


def fuse_relu(network: nn.Module, batches: list[Tensor]) -> int:
    """Lets convolutions of `network` add and apply ReLU, in place, if it then answers as before.

    It is done in the graphs of torch.fx in the network, where a convolution's output goes to
    nothing but the addition and ReLU, and where none of these has a hook.

    Args:
        network: frozen, in evaluation mode, on a GPU.
        batches: images to compare the answers for.

    Returns:
        The number of convolutions.
    """
    graphs = {part: part.graph for part in network.modules() if isinstance(part, fx.GraphModule)}
    if not any(True for part, graph in graphs.items() for _ in _chains(graph, part)):
        return 0
    with torch.no_grad():
        expected = [network(batch) for batch in batches]
    counts = {part: _fuse(part) for part in graphs}
    count = sum(counts.values())
    try:
        with torch.no_grad():
            got = [network(batch) for batch in batches]
        try_out(network, batches[0])
        # As other faster layers, these round otherwise.
        if all((a - b).abs().max() <= 0.1 * b.abs().max() for a, b in zip(got, expected)):
            log.info("%d of the teacher's convolutions apply ReLU themselves", count)
            return count
        reason = "it would answer differently"
    except Exception as error:  # a network may raise anything
        reason = first_line(error)
    for part, graph in graphs.items():
        part.graph = graph
        for k in range(counts[part]):
            part.delete_submodule(_name(k))
    log.warning("the teacher's convolutions do not apply ReLU themselves: %s", reason)
    return 0


class ConvReLU(nn.Module):
    """relu(conv(x)), or relu(conv(x) + z), of a convolution with bias that is not trained."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.refused = False  # by cuDNN, once

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        conv = self.conv
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not self.refused and cudnn_takes(conv, x, z):
            geometry = conv.stride, conv.padding, conv.dilation, conv.groups
            try:
                return _ConvReLU.apply(x, z, conv.weight, conv.bias, *geometry)
            except RuntimeError as error:
                log.warning("cuDNN does not fuse a convolution with ReLU: %s", first_line(error))
                self.refused = True
        y = conv(x)
        return F.relu(y if z is None else y + z, inplace=True)


def cudnn_takes(conv: nn.Conv2d, x: Tensor, z: Tensor | None) -> bool:
    """Whether `ConvReLU` should ask cuDNN, whose choice of kernels it cannot keep deterministic."""
    return (
        x.is_cuda
        and x.dim() == 4
        and x.numel() > 0
        and x.dtype in _DTYPES
        and x.dtype == conv.weight.dtype
        and x.is_contiguous(memory_format=torch.channels_last)
        and (z is None or (z.dtype == x.dtype and z.shape == _output_shape(conv, x)))
        and torch.backends.cudnn.is_available()
        and torch.backends.cudnn.enabled
        and not torch.backends.cudnn.deterministic
        and not torch.are_deterministic_algorithms_enabled()
    )


class _ConvReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, *geometry: Any
    ) -> Tensor:
        if z is None:
            y = torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        else:
            y = torch.cudnn_convolution_add_relu(x, weight, z, 1.0, bias, *geometry)
        ctx.save_for_backward(x, weight, y)
        ctx.geometry = geometry
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, y = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        aten = torch.ops.aten
        grad = aten.threshold_backward(grad, y, 0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x, _, _ = aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups,
                (True, False, False),
            )  # fmt: skip
        return grad_x, grad if ctx.needs_input_grad[1] else None, *[None] * 6


def _output_shape(conv: Any, x: Tensor) -> tuple[int, ...]:
    sides = [
        (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for side, padding, dilation, kernel, stride in zip(
            x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride
        )
    ]
    return (x.shape[0], conv.out_channels, *sides)


class _Chain(NamedTuple):
    """Nodes of a graph: relu(conv(x)), or relu(add(conv(x), z))."""

    conv: fx.Node
    relu: fx.Node
    add: fx.Node | None = None


def _fuse(part: fx.GraphModule) -> int:
    graph = copy.deepcopy(part.graph)
    chains = list(_chains(graph, part))
    for k, (conv, relu, add) in enumerate(chains):
        layer: Any = part.get_submodule(str(conv.target))
        part.add_submodule(_name(k), ConvReLU(layer))
        others = [] if add is None else [operand for operand in add.args if operand is not conv]
        # Where both operands of an addition are there.
        with graph.inserting_before(conv if add is None else add):
            fused = graph.call_module(_name(k), (conv.args[0], *others))
        relu.replace_all_uses_with(fused)
        for node in (relu, add, conv):
            if node is not None:
                graph.erase_node(node)
    if chains:
        part.graph = graph
    return len(chains)


def _name(k: int) -> str:
    return f"_dafl_fast_conv_relu_{k}"


def _chains(graph: fx.Graph, part: fx.GraphModule) -> Iterator[_Chain]:
    for relu in graph.nodes:
        if not _is_relu(relu, part):
            continue
        source = relu.args[0]
        if _is_conv(source, part):
            yield _Chain(source, relu)
        elif _is_add(source):
            # It then runs where the addition was, and nothing may change its input until then.
            convs = [one for one in source.args if _is_conv(one, part)]
            last = next((one for one in convs if len(one.args[0].users) == 1), None)
            if last is not None:
                yield _Chain(last, relu, source)


def _is_relu(node: fx.Node, part: fx.GraphModule) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        layer = part.get_submodule(str(node.target))
        return type(layer) is nn.ReLU and not has_hooks(layer)
    method = node.op == "call_method" and node.target in ("relu", "relu_")
    return method or (node.op == "call_function" and node.target in _RELUS)


def _is_add(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and node.target in _ADDS
        and len(node.users) == 1
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(operand, fx.Node) for operand in node.args)
        and node.args[0] is not node.args[1]
    )


def _is_conv(node: fx.Node, part: fx.GraphModule) -> bool:
    """Whether `node` is a convolution that cuDNN might fuse, and whose output goes to one node."""
    if node.op != "call_module" or len(node.users) != 1 or len(node.args) != 1:
        return False
    layer: Any = part.get_submodule(str(node.target))
    return (
        type(layer) is nn.Conv2d
        and not has_hooks(layer)
        and layer.bias is not None
        and not layer.weight.requires_grad
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and layer.in_channels % _CHANNELS == layer.out_channels % _CHANNELS == 0
    )

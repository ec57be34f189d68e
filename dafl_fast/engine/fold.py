"""Folds BatchNorm into the layer before it, in networks whose weights never change."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import UserError, first_line

log = logging.getLogger(__name__)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# The layers that autocast runs in low precision, and that BatchNorm folds into.
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Folds BatchNorm into the layers of `network`, which is frozen and in evaluation mode.

    For y = W x + b followed by gamma (y - mean) / sqrt(var + eps) + beta, with s = gamma /
    sqrt(var + eps) per output channel: W' = s W, b' = s (b - mean) + beta. Computed in float64 and
    rounded to the layer's own dtype.

    BatchNorm is folded if it has running statistics and directly follows a convolution, transposed
    convolution or linear layer that runs once and whose output is used nowhere else. It may also be
    an `F.batch_norm` in a user's module. Layers with hooks or parametrizations, and subclasses of
    these layers, are not changed. If torch.fx cannot trace the network, nothing is folded, and a
    warning is logged.

    Returns:
        A torch.fx module with the same layers, or `network` itself if nothing was folded. It takes
        the images only; other arguments of `network` have their default values.
    """
    norms = sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
    if norms == 0:
        return network
    try:
        root, graph = traced(network)
    except Exception as error:  # the network's code may raise anything
        log.warning(
            "the teacher's BatchNorm is not folded, torch.fx cannot trace it: %s",
            first_line(error),
        )
        return network
    runs: Counter[nn.Module] = Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            runs.update(root.get_submodule(node.target).modules())
        elif node.op == "get_attr":
            runs[root.get_submodule(node.target.rpartition(".")[0])] += 1
    folded = 0
    for node in list(graph.nodes):
        norm = _batch_norm(node, root)
        if norm is None or norm.source.op != "call_module":
            continue
        layer = root.get_submodule(str(norm.source.target))
        if (
            type(layer) in PRODUCTS
            and runs[layer] == 1
            and not has_hooks(layer)
            and _output_channels(layer) == len(norm.mean)
            and all(user is node or _reads_shape(user) for user in norm.source.users)
        ):
            _absorb(layer, norm)
            node.replace_all_uses_with(norm.source)
            inputs = node.all_input_nodes
            graph.erase_node(node)
            for unused in inputs:
                if unused.op == "get_attr" and not unused.users:
                    graph.erase_node(unused)
            folded += 1
    log.info("folded %d of the teacher's %d BatchNorm layers", folded, norms)
    return fx.GraphModule(root, graph) if folded else network


def traced(network: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """A container of `network`, and its graph for torch.fx. Raises whatever the network's code does
    when it is run with symbols in place of tensors."""
    # Inside a container the network is traced like any call of it: with its own hooks, and with
    # the default values of all arguments except the images.
    root = nn.Sequential(network)
    return root, _Tracer().trace(root)


def thaw_batch_norm(network: nn.Module) -> None:
    """Gives `network`, in place, nn.BatchNorm2d where it has a layer that computes the same with
    statistics and weights that are buffers, such as torchvision's FrozenBatchNorm2d. What such a
    layer runs afterwards, as timm's FrozenBatchNormAct2d does, remains. A layer is known by its
    tensors' names, and by computing the same; one with hooks is left as it is.
    """
    thawed: dict[nn.Module, nn.Module | None] = {}
    for parent in list(network.modules()):
        if isinstance(parent, torch.jit.ScriptModule):
            continue  # its layers cannot be replaced
        for name, layer in list(parent._modules.items()):
            if layer is not None:
                if layer not in thawed:
                    thawed[layer] = _thawed(layer)
                parent._modules[name] = thawed[layer] or layer


def _thawed(layer: Any) -> nn.Module | None:
    """The layer as nn.BatchNorm2d, followed by what it runs then; None if it is no BatchNorm."""
    names = ("running_mean", "running_var", "weight", "bias")
    values: dict[str, Any] = {name: getattr(layer, name, None) for name in names}
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) or has_hooks(layer):
        return None
    if not all(isinstance(value, Tensor) and value.dim() == 1 for value in values.values()):
        return None
    mean = values["running_mean"]
    eps = getattr(layer, "eps", 1e-5) or 1e-30  # PyTorch 2.11 refuses 0 on a GPU
    norm = nn.BatchNorm2d(len(mean), eps, device=mean.device).eval()
    for name, value in values.items():
        new = nn.Parameter(value, False) if name in ("weight", "bias") else value
        setattr(norm, name, new)
    made = nn.Sequential(norm, *layer.children()).eval() if layer._modules else norm
    x = torch.randn(2, len(mean), 3, 3, generator=torch.Generator().manual_seed(0)).double()
    try:
        with torch.no_grad():
            own, other = (
                copy.deepcopy(each).double()(x.to(mean.device, copy=True)) for each in (layer, made)
            )
            return made if torch.allclose(own, other, 1e-5, 1e-5) else None
    except Exception:  # whatever a layer says that is something else
        return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Hooks, such as that of the feature layer, must get tensors, not symbols.
        whole = type(m).__module__.startswith("onnx2torch")  # its code branches on shapes
        return whole or has_hooks(m) or super().is_leaf_module(m, module_qualified_name)


class _BatchNorm(NamedTuple):
    """What a BatchNorm in a graph computes, and the node that it normalises."""

    source: fx.Node
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _batch_norm(node: fx.Node, root: nn.Module) -> _BatchNorm | None:
    """The BatchNorm that `node` is, if it is one with fixed statistics."""
    if node.op == "call_module":
        layer: Any = root.get_submodule(str(node.target))
        if type(layer) not in BATCH_NORMS or has_hooks(layer) or layer.training:
            return None
        source = node.all_input_nodes[0]
        values = [layer.running_mean, layer.running_var, layer.weight, layer.bias]
        eps = layer.eps
    elif node.target is F.batch_norm:
        call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        source, *values, training, _, eps = call.arguments.values()
        if training is not False or isinstance(eps, fx.Node):
            return None
        for i, value in enumerate(values):
            if isinstance(value, fx.Node):
                if value.op != "get_attr":
                    return None
                values[i] = attrgetter(str(value.target))(root)
    else:
        return None
    mean, var, weight, bias = values
    if mean is None or var is None:
        return None
    return _BatchNorm(source, mean, var, weight, bias, eps)


def _absorb(layer: Any, norm: _BatchNorm) -> None:
    mean, var = norm.mean.double(), norm.var.double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = (0 if layer.bias is None else layer.bias.double()) - mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = layer.weight.double()
    ones = [1] * (weight.dim() - 2)
    if isinstance(layer, _TRANSPOSED):  # [in, out / groups, ...]: the groups divide the inputs
        by_group = weight.unflatten(0, (layer.groups, -1))
        weight = (by_group * scale.view(layer.groups, 1, -1, *ones)).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, 1, *ones)
    # New parameters, because another layer may also use the old ones.
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
    if weight.dim() < 4:
        layer.register_forward_pre_hook(_demand_channels_second, with_kwargs=True)


def input_of(inputs: tuple[Any, ...], others: dict[str, Any]) -> Any:
    """What enters a layer of one input, which a network may also give by its keyword."""
    return inputs[0] if inputs else next(iter(others.values()))


def _demand_channels_second(layer: Any, inputs: tuple[Any, ...], others: dict[str, Any]) -> None:
    # BatchNorm normalises a linear layer's output [N, L, F] over L. If L = F, only the ranks show
    # this: those of input and weight are equal if the second dimension is the channels.
    if input_of(inputs, others).dim() != layer.weight.dim():
        raise UserError(
            "the teacher normalises another dimension than its layer's output; use fold=False"
        )


def has_hooks(layer: nn.Module) -> bool:
    """Whether calling a layer does more, or other things, than its class says."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer))


def _output_channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _reads_shape(node: fx.Node) -> bool:
    """Whether a node only reads the shape of its input, which folding does not change."""
    if node.op == "call_method":
        return node.target in ("dim", "size")
    return node.target is getattr and node.args[1] in ("ndim", "shape")

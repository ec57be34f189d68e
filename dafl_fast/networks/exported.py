"""Reads programs of torch.export (.pt2 files) and turns them into networks of layers.

Such a file has a network's weights and operators, but not its Python code. So the owner of a
private classifier can pass it on. Gradients with respect to its images work as in the original.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

from ..convention import Convention
from ..errors import UserError
from .exported_check import check_exported

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
# By the number of dimensions of the input.
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_EXPORT_IT = (
    "torch.export.export(network.eval(), (images,), "
    'dynamic_shapes=({0: torch.export.Dim("N")},)) with two images or more'
)


def read_exported(path: Path, role: str) -> nn.Module:
    """The network that torch.export.save wrote to `path`; see `from_export`. Raises NeedsCode if
    reading it would mean running code that is in it; see `check_exported`."""
    check_exported(path)
    # Without this, torch unpickles some parts of a file without restriction. And its own `load`
    # would try again, if something fails, as with the files of old versions.
    with mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
        program = load_pt2(str(path)).exported_programs["model"]
    return from_export(program, role)


def from_export(program: ExportedProgram, role: str = "teacher") -> nn.Module:
    """An exported program, images [N, C, H, W] -> logits, as a network of layers.

    Convolutions, linear layers and BatchNorm become modules again, under their old names, so that
    features can be taken, BatchNorm folded and weights cast as in any network. Everything else
    remains exported operators. The program's mode and weights are fixed: it can be a teacher, but
    not a student.

    Raises:
        UserError: the program takes other inputs than images or batches of one size only, or it
            was exported in training mode.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    inputs = module.graph.find_nodes(op="placeholder")
    if len(inputs) != 1 or not isinstance(inputs[0].meta.get("val"), Tensor):
        raise UserError(
            f"the {role} must take the images and nothing else, the exported program has "
            f"{len(inputs)} inputs: {', '.join(node.name for node in inputs)}"
        )
    size = inputs[0].meta["val"].shape[0]
    if isinstance(size, int):
        raise UserError(
            f"the {role} was exported for batches of {size} only; leave the size open: {_EXPORT_IT}"
        )
    for node in module.graph.nodes:
        call = _arguments(node)
        if call.get("training", call.get("train")) is True:
            raise UserError(f"the {role} was exported in training mode; use {_EXPORT_IT}")
    network: Any = _with_layers(module)
    channels, *sides = inputs[0].meta["val"].shape[1:]
    if len(sides) == 2 and all(isinstance(n, int) for n in (channels, *sides)):
        network.convention = Convention(image_shape=(channels, *sides))
    return network


def _with_layers(program: fx.GraphModule) -> fx.GraphModule:
    graph = program.graph
    layers: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # under autocast it would demand fp32
            continue
        made = _layer(node, program)
        if made is None:
            continue
        name, layer = made
        if repr(layers.setdefault(name, layer)) != repr(layer):
            continue  # the same weights, with other settings
        with graph.inserting_before(node):
            called = graph.call_module(name, (node.args[0],))
        called.meta = node.meta
        node.replace_all_uses_with(called)
        weights = [other for other in node.all_input_nodes if other.op == "get_attr"]
        graph.erase_node(node)
        for weight in weights:
            if not weight.users:
                graph.erase_node(weight)
    for name, layer in layers.items():
        program.set_submodule(name, layer)
    # Not `program` itself: torch.export makes its train() and eval() raise an error.
    return fx.GraphModule(program, graph).eval()


def _layer(node: fx.Node, program: fx.GraphModule) -> tuple[str, nn.Module] | None:
    """The layer that computes an operator's node, and the name of the module with its weights."""
    call = _arguments(node)
    tensors = {
        name: str(value.target)
        for name, value in call.items()
        if isinstance(value, fx.Node) and value.op == "get_attr"
    }
    owner = next(iter(tensors.values()), "").rpartition(".")[0]
    if not owner or any(target != f"{owner}.{name}" for name, target in tensors.items()):
        return None
    own = program.get_submodule(owner).state_dict(keep_vars=True)
    layer: nn.Module
    with torch.device("meta"):
        if node.target is torch.ops.aten.linear.default and "weight" in tensors:
            outputs, inputs = own["weight"].shape
            layer = nn.Linear(inputs, outputs, "bias" in tensors)
        elif node.target in _CONVOLUTIONS and "weight" in tensors:
            outputs, inputs, *kernel = own["weight"].shape
            how = {name: call[name] for name in ("stride", "padding", "dilation", "groups")}
            inputs *= call["groups"]
            layer = nn.Conv2d(inputs, outputs, kernel, bias="bias" in tensors, **how)
        elif node.target is torch.ops.aten.batch_norm.default and "running_mean" in tensors:
            norm = _BATCH_NORMS[call["input"].meta["val"].dim()]
            layer = norm(len(own["running_mean"]), call["eps"], affine="weight" in tensors)
        else:
            return None
    if layer.state_dict().keys() != own.keys():
        return None
    layer.load_state_dict(own, assign=True)
    return owner, layer.eval()


def _arguments(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by name, with defaults; empty if `node` does not call an operator."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema.arguments
    values = {argument.name: argument.default_value for argument in schema}
    positional = dict(zip((argument.name for argument in schema), node.args))
    return {**values, **positional, **node.kwargs}

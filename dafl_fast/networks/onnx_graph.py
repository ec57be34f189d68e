"""Brings an ONNX graph into the form that onnx2torch converts, and what it made into layers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

# The newest version of ONNX's operators that onnx2torch knows all of.
_OPSET = 17


def prepared(model: Any) -> Any:
    """A copy of an onnx.ModelProto whose weights are initializers, in operators of `_OPSET` or
    newer."""
    import onnx

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    if _version(copied) < _OPSET:
        # What onnx itself cannot convert is left as it is: onnx2torch knows many old operators.
        with contextlib.suppress(Exception):
            copied = onnx.version_converter.convert_version(copied, _OPSET)
    return _with_initializers(copied)


def fixed(model: Any, shape: tuple[int, ...], outputs: list[str]) -> Any:
    """`model` for inputs of `shape` and these outputs alone, in operators that onnx2torch knows.
    What follows from the shape is computed."""
    import onnx
    from onnxscript import optimizer

    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, shape, strict=True):
        dim.Clear()
        dim.dim_value = size
    wanted = [value for value in model.graph.output if value.name in outputs]
    for value in wanted:
        value.type.tensor_type.ClearField("shape")
    del model.graph.output[:]
    model.graph.output.extend(wanted)
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    optimizer.remove_unused_nodes(model)
    model = onnx.shape_inference.infer_shapes(_with_initializers(model), data_prop=True)
    for turn in range(4):  # what an operator is defined by may need it too
        model = _with_known_operators(model, f"turn{turn}")
    _in_older_form(model)
    model = _sorted(model)
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _version(model: Any) -> int:
    return next((entry.version for entry in model.opset_import if not entry.domain), 1)


def _with_initializers(model: Any) -> Any:
    """`model`, changed: constant nodes become initializers, and these are no inputs."""
    import onnx

    kept = []
    for node in model.graph.node:
        value = {attribute.name: attribute for attribute in node.attribute}.get("value")
        if node.op_type != "Constant" or value is None:
            kept.append(node)
            continue
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value.t)
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    for field, values in ((model.graph.node, kept), (model.graph.input, inputs)):
        del field[:]
        field.extend(values)
    return model


def _sorted(model: Any) -> Any:
    """`model` with each node behind those that it needs, and with a name of its own."""
    import onnx_ir as ir

    graph = ir.serde.deserialize_model(model)
    graph.graph.sort()
    for index, node in enumerate(graph.graph):
        node.name = f"{node.op_type}_{index}"
    return ir.serde.serialize_model(graph)


def _with_known_operators(model: Any, domain: str) -> Any:
    """`model`, in which operators that onnx defines by simpler ones are replaced by these if
    onnx2torch does not know them. `domain` is one that no operator has."""
    import onnx
    import onnx.inliner
    from onnx2torch.node_converters import get_converter

    types = {
        value.name: value.type
        for part in (model.graph.value_info, model.graph.input, model.graph.output)
        for value in part
    }
    for tensor in model.graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
    version, functions = _version(model), []
    for index, node in enumerate(model.graph.node):
        try:
            get_converter(node.op_type, min(version, _OPSET), node.domain)
            continue
        except NotImplementedError:
            pass
        try:
            schema: Any = onnx.defs.get_schema(node.op_type, version, node.domain)
        except Exception:  # of another's domain
            continue
        function = onnx.FunctionProto()
        if schema.has_function:
            function.CopyFrom(schema.function_body)
        elif schema.has_context_dependent_function:
            given = [types[name].SerializeToString() if name else b"" for name in node.input]
            body = schema.get_context_dependent_function(node.SerializeToString(), given)
            function.ParseFromString(body)
        else:
            continue
        for entry in function.opset_import:  # else it is not put in place
            entry.version = version
        function.domain, function.name = domain, f"{node.op_type}_{index}"
        node.domain, node.op_type = function.domain, function.name
        functions.append(function)
    if not functions:
        return model
    model.functions.extend(functions)
    model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    return _with_initializers(onnx.inliner.inline_local_functions(model))


def _in_older_form(model: Any) -> None:
    """Writes in `_OPSET` what newer versions of operators write otherwise, in place. What else is
    new in them shows in the comparison with onnxruntime."""
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][2:]
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    for node in model.graph.node:
        named = {attribute.name: attribute for attribute in node.attribute}
        how = named["auto_pad"].s if "auto_pad" in named else b"NOTSET"
        if how in (b"SAME_UPPER", b"SAME_LOWER"):
            weights = constants[node.input[1]].dims[2:] if node.op_type == "Conv" else None
            pads = _pads(named, sizes[node.input[0]], weights, how)
            node.attribute.remove(named["auto_pad"])
            node.attribute.append(onnx.helper.make_attribute("pads", pads))
        axes = constants.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and axes is not None:
            values = onnx.numpy_helper.to_array(axes).tolist()
            del node.input[1:]
            node.attribute.append(onnx.helper.make_attribute("axes", values))
        elif node.op_type == "Reshape" and "allowzero" in named and axes is not None:
            if 0 not in onnx.numpy_helper.to_array(axes):
                node.attribute.remove(named["allowzero"])
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = min(entry.version, _OPSET)


def _pads(
    named: dict[str, Any], size: list[int], kernel: list[int] | None, how: bytes
) -> list[int]:
    """The padding of a convolution or pooling whose outputs are as many as its inputs, divided by
    the stride and rounded up: at the beginning of each dimension, then at the end."""
    ones = [1] * len(size)
    kernel = list(named["kernel_shape"].ints) if "kernel_shape" in named else list(kernel or ones)
    strides, dilations = (
        list(named[name].ints) if name in named else ones for name in ("strides", "dilations")
    )
    less, more = [], []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
        less.append(total // 2)
        more.append(total - total // 2)
    return more + less if how == b"SAME_LOWER" else less + more


def opened(
    network: fx.GraphModule, shape: tuple[int, ...], channels_last: bool, outputs: list[str]
) -> fx.GraphModule:
    """`network`, which onnx2torch made for one batch of `shape`, for any number of images, with
    PyTorch's layers for what it left as operations.

    Args:
        network: changed.
        channels_last: it takes [N, H, W, C]; what is returned takes [N, C, H, W] all the same.
        outputs: their names; what is returned gives several in a dict.
    """
    graph, count = network.graph, shape[0]
    layer: Any
    for layer in network.float().eval().modules():
        if type(layer).__name__ == "OnnxCast" and layer.torch_dtype.is_floating_point:
            layer.torch_dtype = torch.float32
    ShapeProp(network).propagate(torch.zeros(shape))
    images = next(iter(graph.nodes))
    with graph.inserting_after(images):
        size = graph.call_method("size", (images, 0))
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        made = _shape(node)
        layer = network.get_submodule(str(node.target))
        kind = type(layer).__name__
        if made is None:
            continue
        if kind == "OnnxReshape":
            # The dimension that is the batch, or that the batch is part of, grows with it.
            grows = [index for index, dim in enumerate(made) if dim == count]
            grows += [index for index, dim in enumerate(made) if dim % count == 0]
            dims = [-1 if [index] == grows[:1] else dim for index, dim in enumerate(made)]
            _replace(node, "reshape", node.args[0], *dims)
        elif kind == "OnnxExpand":
            one = (1,) * (len(made) - len(_shape(node.args[0]) or ())) + (
                _shape(node.args[0]) or ()
            )
            repeated = [size if m == count and n == 1 else m for m, n in zip(made, one)]
            _replace(node, "expand", node.args[0], *repeated)
        elif kind == "OnnxSoftmaxV1V11" and layer.axis in (-1, len(made) - 1):
            ending = nn.LogSoftmax(-1) if layer.is_log else nn.Softmax(-1)
            network.set_submodule(str(node.target), ending)
        elif kind == "OnnxMatMul":
            _as_linear(network, node)
        elif kind == "OnnxBinaryMathOperation" and layer.math_op_function is torch.add:
            _as_bias(network, node)
        elif kind == "OnnxConcat":
            for constant in node.args:
                _repeat(network, node, constant, count, size)
    if not size.users:
        graph.erase_node(size)
    if channels_last:
        with graph.inserting_after(images):
            turned = graph.call_method("permute", (images, 0, 2, 3, 1))
        images.replace_all_uses_with(turned, lambda user: user not in (turned, size))
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    if len(outputs) > 1:
        (answers,) = (node for node in graph.nodes if node.op == "output")
        answers.args = (dict(zip(outputs, answers.args[0], strict=True)),)
    graph.lint()
    return fx.GraphModule(network, graph)


def _shape(node: Any) -> tuple[int, ...] | None:
    told: Any = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return tuple(told.shape) if hasattr(told, "shape") else None


def _replace(node: fx.Node, method: str, *args: Any) -> None:
    with node.graph.inserting_before(node):
        called = node.graph.call_method(method, args)
    called.meta = node.meta
    node.replace_all_uses_with(called)
    node.graph.erase_node(node)


def _constant(network: fx.GraphModule, node: Any) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Tensor = network.get_buffer(str(node.target))
    return value


def _as_linear(network: fx.GraphModule, node: fx.Node) -> None:
    """A product with a constant matrix as a linear layer."""
    weight = _constant(network, node.args[1])
    if weight is None or weight.dim() != 2 or len(_shape(node.args[0]) or ()) < 2:
        return
    inputs, outputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight = nn.Parameter(weight.T.contiguous())
    network.set_submodule(str(node.target), layer)
    node.args = (node.args[0],)


def _as_bias(network: fx.GraphModule, node: fx.Node) -> None:
    """A sum with a constant per channel as the bias of the layer before it, if that has none."""
    for source, other in (node.args, node.args[::-1]):
        bias = _constant(network, other)
        if bias is None or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        layer: Any = network.get_submodule(str(source.target))
        if len(source.users) > 1 or type(layer) not in (nn.Linear, nn.Conv2d):
            continue
        linear = isinstance(layer, nn.Linear)
        channels = layer.out_features if linear else layer.out_channels
        last = bias.shape[-1] if linear else bias.shape[-3] if bias.dim() > 2 else 0
        if not bias.numel() == last == channels:
            continue
        value = bias.flatten() if layer.bias is None else layer.bias.detach() + bias.flatten()
        layer.bias = nn.Parameter(value.clone())
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
        return


def _repeat(
    network: fx.GraphModule, node: fx.Node, constant: Any, count: int, size: fx.Node
) -> None:
    """A constant that is there once for each image of the batch is repeated for as many as come."""
    value = _constant(network, constant)
    if value is None or len(value) != count or not bool((value == value[:1]).all()):
        return
    with node.graph.inserting_before(node):
        once = node.graph.call_method("narrow", (constant, 0, 0, 1))
        repeated = node.graph.call_method("expand", (once, size, *[-1] * (value.dim() - 1)))
    node.replace_input_with(constant, repeated)

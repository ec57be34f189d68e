"""Reads ONNX files and turns them into networks of PyTorch's layers.

onnx2torch converts, because it makes PyTorch's own layers. What it does not know, older and newer
operators and weights that are constant nodes, is brought into its form with onnx's own tools. No
conversion is trusted: the network must answer as onnxruntime does.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convention import Convention
from ..errors import UserError, first_line, require
from .onnx_graph import fixed, opened, prepared

log = logging.getLogger(__name__)

Shape = tuple[int, int, int]

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "onnx2torch")
# Largest difference from onnxruntime, of the largest answer. In half precision roundings differ.
_ROUNDING = {"float16": 2e-2}
# Where a file leaves height and width open, the first of these that the network takes.
_SIZES = (64, 96, 128, 224, 299, 32, 28)
_CLASSES = ("names", "classes", "class_names", "labels", "id2label")
_INSTEAD = "give the network in PyTorch, or as a program of torch.export"
_QUANTISED = re.compile("Quantize|^QLinear|Integer$")


def read_onnx(path: Path, role: str, image_shape: Shape | None = None) -> nn.Module:
    """The classifier in an ONNX file: images [N, C, H, W] in floating point -> its answers.

    Its layers are PyTorch's, and N is open, even if the file is for one batch size. If several
    outputs have a row of numbers for each image, it returns them in a dict. Its attribute
    `convention` tells how the file takes its images.

    Args:
        image_shape: C, H and W, for a file that leaves some of them open.

    Raises:
        UserError: the file is no classifier of images, it is quantised, an operator cannot be
            converted, or the network does not answer as onnxruntime does.
    """
    for package in PACKAGES:
        require(package, f"the {role} {path} (the extra dafl_fast[onnx])")
    import onnx

    model = onnx.load(path)
    quantised = sorted(filter(_QUANTISED.search, {node.op_type for node in model.graph.node}))
    if quantised:
        raise UserError(
            f"the {role} {path} is quantised ({quantised[0]}), which leaves no gradient to learn "
            "from; give the model in floating point that it was made from"
        )
    convention, batch = _convention(model, path, role)
    run = _Session(path, role, convention, batch)
    told = convention.image_shape or image_shape
    shapes = [told] if told else _guesses(model, convention)
    problems = []
    for shape in shapes:
        try:
            run.choose(shape)
            network = _with_outputs(model, run, shape)
            difference, count = _difference(network, run, shape)
            break
        except Exception as error:  # whatever onnx and the others say, of another size perhaps
            problems.append(error)
    else:
        if isinstance(problems[0], UserError):
            raise problems[0]
        raise UserError(_why(problems[0], path, role)) from problems[0]
    if not difference <= _ROUNDING.get(convention.dtype, 1e-4):
        raise UserError(
            f"the {role} {path} was converted, but its answers differ from onnxruntime's by "
            f"{difference:.2g} of the largest; {_INSTEAD}"
        )
    if told is None:
        log.warning(
            "the %s %s takes images of any size; --image-shape says which, else it is %s",
            role, path, " ".join(map(str, shape)),
        )  # fmt: skip
    log.warning(
        "the %s %s is converted to PyTorch: on %d random images its answers differ from "
        "onnxruntime's by at most %.2g of the largest", role, path, count, difference,
    )  # fmt: skip
    found: Any = network
    found.convention = replace(convention, image_shape=shape, output_name=run.outputs[0])
    return network


def _convention(model: Any, path: Path, role: str) -> tuple[Convention, int | None]:
    """How the file takes its images, and the batch size that it is for, None if that is open."""
    import onnx

    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    wanted = f"the {role} {path} must take the images and nothing else"
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise UserError(f"{wanted}, it has {len(inputs)} inputs: {names}")
    kind = inputs[0].type.tensor_type
    sizes = [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim]
    if len(sizes) != 4:
        raise UserError(
            f"{wanted}, in four dimensions, [N, C, H, W] or [N, H, W, C]; its input "
            f"{inputs[0].name} has {len(sizes)}"
        )
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if dtype not in ("float32", "float64", "float16", "uint8"):
        raise UserError(f"{wanted}, in floating point or uint8; its input is of {dtype}")
    last = sizes[3] in (1, 3, 4) and sizes[1] not in (1, 3, 4)
    channels, *size = (sizes[3], *sizes[1:3]) if last else sizes[1:]
    shape = (channels, *size) if None not in (channels, *size) else None
    convention = Convention(
        input_name=inputs[0].name, output_name=graph.output[0].name if graph.output else "",
        layout="NHWC" if last else "NCHW", dtype=dtype, image_shape=shape,  # type: ignore[arg-type]
        classes=_classes(model),
    )  # fmt: skip
    for output in graph.output:
        if not output.type.HasField("tensor_type"):
            raise UserError(
                f"the {role} {path} must return tensors, its output {output.name} is a sequence or "
                "a map; export it without them (zipmap=False)"
            )
    return convention, sizes[0]


def _classes(model: Any) -> tuple[str, ...]:
    """The names of the classes, where the file has them under a usual name."""
    told = {entry.key.lower(): entry.value for entry in model.metadata_props}
    for key in _CLASSES:
        if key not in told:
            continue
        names: Any = None
        for read in (json.loads, ast.literal_eval):
            try:
                names = read(told[key])
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
        if isinstance(names, dict):
            names = [names[index] for index in sorted(names, key=lambda index: int(index))]
        if names is None:
            names = [name.strip() for name in re.split(r"[\n,]", told[key]) if name.strip()]
        if isinstance(names, list) and len(names) > 1:
            return tuple(map(str, names))
    return ()


def _guesses(model: Any, convention: Convention) -> list[Shape]:
    """Shapes to try where the file leaves some of it open."""
    sides = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][1:]
    channels, *size = (sides[2], *sides[:2]) if convention.layout == "NHWC" else sides
    if channels <= 0:
        first = next((node for node in model.graph.node if node.op_type == "Conv"), None)
        weights = {tensor.name: tensor.dims for tensor in prepared(model).graph.initializer}
        channels = weights[first.input[1]][1] if first is not None else 3
    return [(channels, *(side if side > 0 else guess for side in size)) for guess in _SIZES]


def _with_outputs(model: Any, run: _Session, shape: Shape) -> nn.Module:
    """The network with the outputs that `run` has chosen, as far as they can be converted."""

    def converted(outputs: list[str]) -> nn.Module:
        return _converted(model, run.convention, shape, run.batch, outputs)

    def works(name: str) -> bool:
        with contextlib.suppress(Exception):
            converted([name])
            return True
        return False

    try:
        return converted(run.outputs)
    except Exception:  # whatever onnx and the others say
        kept = list(filter(works, run.outputs)) if len(run.outputs) > 1 else []
        if not kept:
            raise
    left_out = ", ".join(name for name in run.outputs if name not in kept)
    log.warning("the %s %s is read without its output %s, which cannot be converted to PyTorch",
                run.role, run.path, left_out)  # fmt: skip
    run.outputs = kept
    return converted(kept)


def _converted(
    model: Any, convention: Convention, shape: Shape, batch: int | None, outputs: list[str]
) -> nn.Module:
    """The network for images [N, C, H, W] of `shape`."""
    import onnx2torch

    # A number that shapes hardly have by themselves shows where the size of the batch has gone.
    channels, *size = shape
    last = convention.layout == "NHWC"
    whole = (batch or 11, *((*size, channels) if last else shape))
    graph = fixed(prepared(model), whole, outputs)
    return opened(onnx2torch.convert(graph), whole, last, outputs)


class _Session:
    """The file in onnxruntime."""

    def __init__(self, path: Path, role: str, convention: Convention, batch: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # its errors become exceptions
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            str(path), options, ["CPUExecutionProvider"],
            enable_fallback=0,  # which would print, and try the same again
        )  # fmt: skip
        self.path, self.role, self.convention, self.batch = path, role, convention, batch
        self.outputs = [output.name for output in self._session.get_outputs()]

    def choose(self, shape: Shape) -> None:
        """Keeps the outputs that have a row of numbers for each image."""
        count = self.batch or 3
        answers = self._run(torch.zeros(count, *shape), self.outputs)
        found = []
        alone = []  # of one image, a number without a dimension
        for name, answer in zip(self.outputs, answers):
            if getattr(answer, "dtype", None) is None or answer.dtype.kind != "f":
                continue
            if answer.ndim == 0 and count == 1:
                alone.append(name)
            elif answer.ndim and len(answer) == count and all(n == 1 for n in answer.shape[2:]):
                found.append(name)
        if not (found or alone):
            raise UserError(
                f"the {self.role} {self.path} is no classifier: none of its outputs is [N, classes]"
            )
        self.outputs = found or alone[:1]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Of each output that was chosen, the numbers for these images."""
        parts = images.split(self.batch or len(images))
        answers = zip(*(self._run(part, self.outputs) for part in parts))
        return [torch.cat([torch.atleast_1d(torch.as_tensor(one)) for one in answer])
                for answer in answers]  # fmt: skip

    def _run(self, images: Tensor, outputs: list[str]) -> list[Any]:
        given = images.permute(0, 2, 3, 1) if self.convention.layout == "NHWC" else images
        given = given.to(getattr(torch, self.convention.dtype)).contiguous()
        found: list[Any] = self._session.run(outputs, {self.convention.input_name: given.numpy()})
        return found


@torch.no_grad()
def _difference(network: nn.Module, run: _Session, shape: Shape) -> tuple[float, int]:
    """The largest difference from onnxruntime, of the largest answer, and on how many images. Of
    several outputs, it is that of the one that differs most."""
    draw, total = torch.Generator().manual_seed(0), 0
    gaps: list[list[float]] = []
    sizes: list[list[float]] = []
    for count in (1, 3, 4) if run.batch is None else (run.batch, 2 * run.batch):
        images = torch.randn(count, *shape, generator=draw)
        if run.convention.dtype == "uint8":
            images = torch.randint(256, (count, *shape), generator=draw).float()
        answer: Any = network(images)
        pairs = [
            (torch.atleast_1d(got.double()), expected.double())
            for got, expected in zip(
                answer.values() if isinstance(answer, dict) else [answer], run(images), strict=True
            )
        ]
        if any(got.shape != expected.shape for got, expected in pairs):
            return math.inf, total
        gaps.append([float((a - b).abs().max().nan_to_num(nan=math.inf)) for a, b in pairs])
        sizes.append([float(expected.abs().max()) for _, expected in pairs])
        total += count
    ratios = (max(gap) / max(1e-12, *size) for gap, size in zip(zip(*gaps), zip(*sizes)))
    return max(ratios), total


def _why(problem: Exception, path: Path, role: str) -> str:
    missing = re.search(r"operation_type='(\w+)'", str(problem))
    if missing:
        return (
            f"the {role} {path} has an operator that cannot be converted, {missing[1]}; {_INSTEAD}"
        )
    return f"the {role} {path} cannot be converted ({first_line(problem)}); {_INSTEAD}"

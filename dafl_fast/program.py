"""How does a student become a program, for any number of images? And why can some not?"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .arguments import uncompiled
from .errors import UserError, first_line

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(student: nn.Module) -> nn.Module:
    """The network inside of what torch.compile and parallel training put around it."""
    student = uncompiled(student)
    return unwrapped(student.module) if isinstance(student, _PARALLEL) else student


def as_program(student: nn.Module, images: Tensor) -> ExportedProgram:
    """The student as a program for any number of images."""
    export = partial(
        torch.export.export, student, (images,), dynamic_shapes=({0: torch.export.Dim("N")},)
    )
    with quietly():
        try:
            program = export()
        except Exception as error:  # whatever torch says of code that it cannot follow
            try:
                program = export(strict=True)  # len(images) is a constant to the usual way
            except Exception:
                raise UserError(f"the student cannot be exported: {_why_not(error)}") from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    return program


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the pages that torch prints and logs of a network; its errors tell the reason."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _why_not(error: Exception) -> str:
    """Why torch could not follow the student's code, for one who has written that."""
    text = str(error)
    if fixed := re.search(r"specialized it to be a constant \((\d+)\)", text):
        return (
            f"its code makes the number of images a constant ({fixed[1]}); take the number from "
            "x.shape[0], and let nothing else depend on it"
        )
    if "data-dependent" in text.lower():
        return (
            "its code goes one way or another by the values in a tensor; choose between two "
            "tensors with torch.where instead"
        )
    return first_line(error)


def why_not_onnx(error: BaseException) -> str:
    """Why torch could not write a program as ONNX."""
    while error.__cause__ is not None:  # the outer ones tell of steps and reports
        error = error.__cause__
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
    return f"ONNX has nothing for {missing[1]}" if missing else first_line(error)

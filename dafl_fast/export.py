"""`python -m dafl_fast.export RUN`: a run's student as one file for others, checked, with a card.

The file is written beside its destination, loaded again, compared with the student, and only then
moved into place. Programs (ONNX, torch.export) hold plain layers alone: they run where there is no
dafl_fast.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import torch
import tyro
from torch import Tensor, nn

from . import data
from .config import Config
from .convention import Convention
from .device import environment
from .distill import Result
from .drop_in import answer_shape, chosen, drop_in, given
from .engine.checks import logits_of
from .engine.folder import read_config, read_summary
from .errors import UserError, command, first_line, require
from .files import remove_leftovers, save_at_once, write_atomically, write_text, write_weights
from .models.pixels import Affine, Taking
from .models.twin import duplicate
from .networks import load_weights, open_run
from .networks.trust import Trust
from .program import as_program, quietly, unwrapped, why_not_onnx
from .recipes import make_config
from .records import shown
from .settings import Mark, marked
from .templates import render

log = logging.getLogger(__name__)

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Of the largest logit: other kernels add up in another order, and no more than that may differ.
ROUNDING = 1e-4
# Where a run took place and how it was watched is nobody else's business.
_NOT_LISTED = marked(Config, Mark.RESUMABLE) | marked(Config, Mark.ON_CARD)

Outputs = Literal["as-teacher", "logits"]


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's student as one file, check it against the student, and describe it."""

    run: tyro.conf.Positional[Path]
    """The folder of a run."""
    format: Annotated[FormatName, tyro.conf.arg(help=_HELP)] = "onnx"
    out: Path | None = None
    """The file; RUN/student.onnx and so on when not given. Its card is beside it, FILE.md."""
    outputs: Outputs | None = None
    """What a program answers with. as-teacher: what the teacher returned, such as probabilities.
    logits: [N, classes]. By default as-teacher; a file of weights has logits only."""
    data_dir: Path | None = None
    """Where the held-out images lie that the run was evaluated on; as in the run when not given."""
    trust_run: bool = False
    """Import the code that the folder names as the run's student."""


def export_student(
    student: nn.Module | Result,
    path: str | Path,
    format: FormatName = "onnx",
    *,
    run: Path | None = None,
    image_shape: tuple[int, int, int] | None = None,
    held_out: Tensor | None = None,
    classes: tuple[str, ...] = (),
    outputs: Outputs | None = None,
) -> dict[str, Any]:
    """Writes a network and its model card, `path`.md, if the file computes what the network does.

    A program takes the place of the run's teacher: its input has the teacher's name, order of
    dimensions and dtype, and it answers as the teacher does. Where nothing else is known of the
    teacher, it takes "images" [N, C, H, W], N being open, and returns "logits" [N, num_classes].

    Args:
        student: what distill() returned, or any classifier.
        path: the file.
        format: "onnx", "pt2" (torch.export) or "safetensors".
        run: the folder of the run that made the student, for the card; a Result knows its own.
        image_shape: C, H and W of the images; the run's when not given.
        held_out: images [N, C, H, W], as the network takes them, on which the file is compared as
            well as on 256 random ones.
        classes: names of the classes, for the card; the teacher's, if it has some, by default.
        outputs: "as-teacher", or "logits" [N, num_classes] whatever the teacher returned. By
            default as the teacher, if the file is a program; a file of weights has logits only.

    Returns:
        The check's figures: "random_images" and "held_out_images", on all of which the file chooses
        the student's class, and "max_difference", the largest absolute one between their outputs.

    Raises:
        UserError: the network cannot be exported, a package is missing, or the file does not
            compute the same; then there is no new file.
    """
    path = Path(path)
    if isinstance(student, Result):
        run = run or student.folder
        student = student.student
    if not isinstance(student, nn.Module):
        raise UserError(
            f"student must be a network or what distill() returned, got {student!r}; the student "
            "of a run's folder is load_network(FOLDER, role='model')"
        )
    if format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    if outputs not in (None, *get_args(Outputs)):
        raise UserError(f"--outputs must be as-teacher or logits, got {outputs!r}")
    if os.path.isdir(path):
        raise UserError(f"--out must be a file, {path} is a folder")
    config = None if run is None else Config(**read_config(run))
    if image_shape is None:
        if config is None:
            raise UserError("image_shape is needed, (C, H, W), where no run tells it")
        image_shape = config.shape
    _check_held_out(held_out, image_shape)
    # A copy, since the student's mode and device are the caller's.
    student = duplicate(unwrapped(student)).cpu().eval().requires_grad_(False)
    random = torch.randn(256, *image_shape, generator=torch.Generator().manual_seed(0))
    if config is not None and config.from_generated is not None:
        generated = random[:, :1] if config.grey else random
        random = Affine(*config.from_generated)(generated)
    example = random[:2].clone()  # two or more: one would fix the batch size
    num_classes = logits_of(student, example, "student").shape[1]
    if len(classes) not in (0, num_classes):
        raise UserError(
            f"classes must be the names of the student's {num_classes} classes, got {len(classes)}"
        )
    # Read now, so that a damaged one is told before there is a file without a card.
    summary = {} if run is None else read_summary(run)
    convention = _convention(summary, format, outputs)
    program = drop_in(student, convention)
    write, load = FORMATS[format].made(program, given(example, convention), convention)
    check: dict[str, Any] = {}
    card = path.with_name(f"{path.name}.md")

    def write_and_check(temporary: Path) -> None:
        write(temporary)
        check.update(_compare(program, load, temporary, random, held_out, convention))
        text = model_card(
            path.name, temporary.read_bytes(), format, config, shown(summary),
            name=type(student).__name__, image_shape=image_shape, num_classes=num_classes,
            classes=classes or convention.classes, check=check, convention=convention,
            answer_shape=answer_shape(convention, num_classes),
            first=student[0] if isinstance(student, Taking) and format == "safetensors" else None,
        )  # fmt: skip
        write_text(card, text)  # or there is no new file either

    remove_leftovers(path, card)
    write_atomically(path, write_and_check)
    return check


def _check_held_out(images: Any, image_shape: tuple[int, int, int]) -> None:
    if images is None:
        return
    got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if got[1:] != list(image_shape) or got[:1] == [0]:
        shape = ", ".join(map(str, image_shape))
        raise UserError(f"held_out must be a tensor of images [N, {shape}], got {got}")


def _convention(summary: dict[str, Any], format: FormatName, outputs: Outputs | None) -> Convention:
    """What the file that is to be written takes and returns."""
    convention = Convention.from_json(summary.get("convention", {}))
    if not FORMATS[format].program:
        if outputs == "as-teacher":
            raise UserError(
                f"--outputs as-teacher needs a program, and {format} has the weights alone, with "
                "which a network gives logits; choose another --format, or leave --outputs out"
            )
        return Convention(classes=convention.classes)
    if outputs != "logits":
        return convention
    name = convention.output_name if convention.outputs == "logits" else "logits"
    return replace(convention, outputs="logits", output_name=name, answer_shape=None)


_Network = Callable[[Tensor], Tensor]
_Made = tuple[Callable[[Path], object], Callable[[Path], _Network]]


def _as_safetensors(student: nn.Module, images: Tensor, convention: Convention) -> _Made:
    def load(path: Path) -> _Network:
        fresh = copy.deepcopy(student)
        with torch.no_grad():
            for tensor in fresh.state_dict().values():
                tensor.zero_()
        return load_weights(fresh, path, "exported")

    return lambda path: write_weights(path, student.state_dict()), load


def _as_pt2(student: nn.Module, images: Tensor, convention: Convention) -> _Made:
    program = as_program(student, images)

    def write(path: Path) -> None:
        save_at_once(torch.export.save, program, path)

    def load(path: Path) -> _Network:
        with path.open("rb") as file:
            return torch.export.load(file).module()

    return write, load


def _as_onnx(student: nn.Module, images: Tensor, convention: Convention) -> _Made:
    for package in _ONNX_PACKAGES:
        require(package, "exporting to ONNX (the extra dafl_fast[export])")
    import onnxruntime

    program = as_program(student, images)
    try:
        with quietly():
            made = torch.onnx.export(program, dynamo=True, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"the student cannot be exported to ONNX: {why_not_onnx(error)}") from error
    assert made is not None
    names = (convention.input_name, convention.output_name)
    _name(made.model.graph, *names)

    def load(path: Path) -> _Network:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(names[1:], {names[0]: x.numpy()})[0])

    return lambda path: made.save(str(path), external_data=False), load


def _name(graph: Any, input_name: str, output_name: str) -> None:
    """Gives the input and the output of an ONNX graph their names, and what has one of these
    already, such as the output of a layer, another."""
    outputs = [value for node in graph for value in node.outputs]
    inner = [*outputs, *graph.initializers.values()]
    taken = {value.name for value in inner} | {input_name, output_name}
    for value in inner:
        if value.name in (input_name, output_name):
            while value.name in taken:
                value.name += "_"
            taken.add(value.name)
    graph.inputs[0].name, graph.outputs[0].name = input_name, output_name


class ExportFormat(NamedTuple):
    """A format of exported files.

    Attributes:
        made: from the student, two images and what they are named, what writes a file and what
            loads it again.
        library: what the Hugging Face hub calls it.
        use: Python that loads {file} and runs it on images named {input}, for the card.
        help: for the command line.
        packages: that it takes, whose versions the card tells.
        program: whether it runs by itself, and so may take images and answer as the teacher.
    """

    made: Callable[[nn.Module, Tensor, Convention], _Made]
    library: str
    use: str
    help: str
    packages: tuple[str, ...] = ()
    program: bool = True


# A new format is a new row.
FORMATS = {
    "safetensors": ExportFormat(
        _as_safetensors, "safetensors",
        'network.load_state_dict(safetensors.torch.load_file("{file}"))', "the weights alone",
        program=False,
    ),
    "onnx": ExportFormat(
        _as_onnx, "onnx",
        'onnxruntime.InferenceSession("{file}").run(None, {{"{input}": images}})[0]',
        "runs in onnxruntime and most engines for inference", _ONNX_PACKAGES,
    ),
    "pt2": ExportFormat(
        _as_pt2, "pytorch", 'torch.export.load("{file}").module()(images)',
        "a program for torch.export.load",
    ),
}  # fmt: skip
_HELP = " ".join(f"{name}: {kind.help}." for name, kind in FORMATS.items())
if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]


@torch.no_grad()
def _compare(
    student: nn.Module,
    load: Callable[[Path], _Network],
    path: Path,
    random: Tensor,
    held_out: Tensor | None,
    convention: Convention,
) -> dict[str, Any]:
    """The figures of `export_student`; raises UserError if the file computes something else."""
    # One image by itself, and a last batch of another size: any number must do.
    batches = [random[:1], random[1:], *(() if held_out is None else held_out.split(1000))]
    count = differ = 0
    difference = largest = 0.0
    try:
        network = load(path)
        for images in batches:
            images = given(images, convention)
            expected, got = student(images), network(images)
            count += len(images)
            differ += int((chosen(got, convention) != chosen(expected, convention)).sum())
            largest = max(largest, expected.abs().max().item())
            gap = (got - expected).abs().max().nan_to_num(nan=float("inf")).item()
            difference = max(difference, gap)
    except Exception as error:  # whatever onnxruntime or torch say of a file that they refuse
        raise UserError(
            f"the file that was written does not run, and is not kept: {first_line(error)}"
        ) from error
    if differ or difference > ROUNDING * largest:
        raise UserError(
            f"the file that was written does not compute what the student does, and is not kept: "
            f"other classes on {differ:,} of {count:,} images, outputs differ by up to "
            f"{difference:.3g} (the largest is {largest:.3g})"
        )
    return {
        "random_images": len(random),
        "held_out_images": 0 if held_out is None else len(held_out),
        "max_difference": difference,
    }


def model_card(
    file: str,
    content: bytes,
    format: FormatName,
    config: Config | None,
    summary: dict[str, Any],
    **student: Any,
) -> str:
    """The card of `file`, which has that content, in the style of the Hugging Face hub: from the
    run's settings and summary and what else is known of the student: name, image_shape,
    num_classes, classes, check, what it takes and returns, and its first layer if that is not in
    the file."""
    teacher = summary.get("teacher", config and config.teacher)  # it may be a file
    here = environment()
    versions = {name: here[name] for name in ("dafl_fast", "torch", "python")}
    versions |= {package: version(package) for package in FORMATS[format].packages}
    card = {
        "file": file,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "date": datetime.date.today(),
        "format": format,
        "library": FORMATS[format].library,
        "use": FORMATS[format].use.format(file=file, input=student["convention"].input_name),
        "config": config,
        "changed": {} if config is None else _changed(config),
        "summary": summary,
        "teacher": Path(str(teacher)).name,
        "versions": versions,
        **student,
    }
    return render("card.md.j2", card) + "\n"


def _changed(config: Config) -> dict[str, Any]:
    """The settings that differ from those of the run's preset and recipe, but for `_NOT_LISTED`."""
    usual = vars(make_config(config.preset, config.recipe))
    return {
        name: value
        for name, value in vars(config).items()
        if name not in _NOT_LISTED and value != usual[name]
    }


def _held_out(config: Config) -> tuple[Tensor | None, tuple[str, ...]]:
    """The images that a run was evaluated on, if they can be had, and the names of the classes."""
    if config.eval == "none":
        return None, ()
    form = config.image_format
    try:
        images, _, classes = data.load(
            config.eval, "test", config.data_dir, False, form.image_size, form.stored_channels
        )
        return data.normalise(images, form), classes
    except UserError as error:
        log.warning("compared on random images only: %s", error)
        return None, ()


@command
def main() -> None:
    arguments = tyro.cli(ExportConfig, prog="python -m dafl_fast.export")
    student = open_run(arguments.run, Trust(run=arguments.trust_run)).built()
    config = Config(**read_config(arguments.run))
    if arguments.data_dir is not None:
        config = replace(config, data_dir=arguments.data_dir)
    images, classes = _held_out(config)
    if len(classes) != read_summary(arguments.run).get("num_classes", config.num_classes):
        classes = ()  # those of other data
    path = arguments.out or arguments.run / f"student.{arguments.format}"
    check = export_student(
        student, path, arguments.format, run=arguments.run, held_out=images, classes=classes,
        outputs=arguments.outputs,
    )  # fmt: skip
    held_out = check["held_out_images"]
    print(
        f"{path}: the student's class on all of {check['random_images'] + held_out:,} images "
        f"({held_out:,} held out), outputs differ by at most {check['max_difference']:.2g}\n"
        f"{path}.md: its model card"
    )


if __name__ == "__main__":
    sys.exit(main())

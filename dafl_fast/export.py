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
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from torch import Tensor, nn
from torch.export import ExportedProgram

from . import data
from .config import Config
from .device import environment
from .distill import Result
from .engine.checks import logits_of
from .engine.folder import read_config, read_summary
from .errors import UserError, command, first_line, require
from .files import save_weights, write_atomically, write_text
from .networks import load_weights, open_run
from .recipes import make_config
from .settings import Mark, marked

log = logging.getLogger(__name__)

FormatName = Literal["safetensors", "onnx", "pt2"]
# Of the largest logit: other kernels add up in another order, and no more than that may differ.
ROUNDING = 1e-4
# Where a run took place and how it was watched is nobody else's business.
_NOT_LISTED = marked(Config, Mark.RESUMABLE) | marked(Config, Mark.ON_CARD)


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's student as one file, check it against the student, and describe it."""

    run: tyro.conf.Positional[Path]
    """The folder of a run."""
    format: FormatName = "onnx"
    """onnx: runs in onnxruntime and most engines for inference. pt2: a program for
    torch.export.load. safetensors: the weights alone."""
    out: Path | None = None
    """The file; RUN/student.onnx and so on when not given. Its card is beside it, FILE.md."""
    data_dir: Path | None = None
    """Where the held-out images lie that the run was evaluated on; as in the run when not given."""


def export_student(
    student: nn.Module | Result,
    path: str | Path,
    format: FormatName = "onnx",
    *,
    run: Path | None = None,
    image_shape: tuple[int, int, int] | None = None,
    held_out: Tensor | None = None,
    classes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Writes a network and its model card, `path`.md, if the file computes what the network does.

    A program takes "images" [N, C, H, W], N being open, and returns "logits" [N, num_classes].

    Args:
        student: what distill() returned, or any classifier.
        path: the file.
        format: "onnx", "pt2" (torch.export) or "safetensors".
        run: the folder of the run that made the student, for the card; a Result knows its own.
        image_shape: C, H and W of the images; the run's when not given.
        held_out: images [N, C, H, W], normalised, on which the file is compared as well as on 256
            random ones.
        classes: names of the classes, for the card.

    Returns:
        The check's figures: "random_images" and "held_out_images", on all of which the file chooses
        the student's class, and "max_difference", the largest absolute one between their logits.

    Raises:
        UserError: the network cannot be exported, a package is missing, or the file does not
            compute the same; then there is no new file.
    """
    path = Path(path)
    if isinstance(student, Result):
        run = run or student.folder
        student = student.student
    if format not in get_args(FormatName):
        raise UserError(
            f"--format must be one of {', '.join(get_args(FormatName))}, got {format!r}"
        )
    if path.is_dir():
        raise UserError(f"--out must be a file, {path} is a folder")
    config = None if run is None else Config(**read_config(run))
    if image_shape is None:
        if config is None:
            raise UserError("image_shape is needed, (C, H, W), where no run tells it")
        image_shape = config.image_shape
    # A copy, since the student's mode and device are the caller's.
    student = copy.deepcopy(student).cpu().eval().requires_grad_(False)
    random = torch.randn(256, *image_shape, generator=torch.Generator().manual_seed(0))
    example = random[:2].clone()  # two or more: one would fix the batch size
    num_classes = logits_of(student, example, "student").shape[1]
    write, load = _FORMATS[format](student, example)
    check: dict[str, Any] = {}
    if run is not None:
        read_summary(run)  # the card needs it: say so before there is a file without a card

    def write_and_check(temporary: Path) -> None:
        write(temporary)
        check.update(_compare(student, load, temporary, random, held_out))

    write_atomically(path, write_and_check)
    text = model_card(path, format, student, image_shape, num_classes, check, run, classes)
    write_text(path.with_name(f"{path.name}.md"), text)
    return check


_Write = Callable[[Path], object]
_Network = Callable[[Tensor], Tensor]


def _as_safetensors(
    student: nn.Module, images: Tensor
) -> tuple[_Write, Callable[[Path], _Network]]:
    def load(path: Path) -> _Network:
        fresh = copy.deepcopy(student)
        with torch.no_grad():
            for tensor in fresh.state_dict().values():
                tensor.zero_()
        return load_weights(fresh, path, "exported")

    return lambda path: save_weights(path, student.state_dict()), load


def _as_program(student: nn.Module, images: Tensor) -> tuple[_Write, Callable[[Path], _Network]]:
    program = _program(student, images)

    def write(path: Path) -> None:
        with path.open("wb") as file:  # a path would have to end in .pt2
            torch.export.save(program, file)

    def load(path: Path) -> _Network:
        with path.open("rb") as file:
            return torch.export.load(file).module()

    return write, load


def _as_onnx(student: nn.Module, images: Tensor) -> tuple[_Write, Callable[[Path], _Network]]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "exporting to ONNX (the extra dafl_fast[export])")
    import onnxruntime

    try:
        made = torch.onnx.export(
            _program(student, images), dynamo=True, verbose=False,
            input_names=["images"], output_names=["logits"],
        )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"the student cannot be exported to ONNX: {first_line(error)}") from error
    assert made is not None

    def load(path: Path) -> _Network:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    return lambda path: made.save(str(path), external_data=False), load


_FORMATS = {"safetensors": _as_safetensors, "onnx": _as_onnx, "pt2": _as_program}


def _program(student: nn.Module, images: Tensor) -> ExportedProgram:
    """The student as a program for any number of images."""
    shapes = ({0: torch.export.Dim("N")},)
    try:
        program = torch.export.export(student, (images,), dynamic_shapes=shapes)
    except Exception as error:  # whatever torch says of code that it cannot follow
        raise UserError(f"the student cannot be exported: {first_line(error)}") from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    return program


@torch.no_grad()
def _compare(
    student: nn.Module,
    load: Callable[[Path], _Network],
    path: Path,
    random: Tensor,
    held_out: Tensor | None,
) -> dict[str, Any]:
    """The figures of `export_student`; raises UserError if the file computes something else."""
    # One image by itself, and a last batch of another size: any number must do.
    batches = [random[:1], random[1:], *(() if held_out is None else held_out.split(1000))]
    count = differ = 0
    difference = largest = 0.0
    try:
        network = load(path)
        for images in batches:
            expected, got = student(images), network(images)
            count += len(images)
            differ += int((got.argmax(1) != expected.argmax(1)).sum())
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
            f"other classes on {differ:,} of {count:,} images, logits differ by up to "
            f"{difference:.3g} (the largest is {largest:.3g})"
        )
    return {
        "random_images": len(random),
        "held_out_images": 0 if held_out is None else len(held_out),
        "max_difference": difference,
    }


def model_card(
    path: Path,
    format: FormatName,
    student: nn.Module,
    image_shape: tuple[int, int, int],
    num_classes: int,
    check: dict[str, Any],
    run: Path | None,
    classes: tuple[str, ...] = (),
) -> str:
    """A model card in the style of the Hugging Face hub; see `export_student`."""
    config = None if run is None else Config(**read_config(run))
    summary = {} if run is None else read_summary(run)
    content = path.read_bytes()
    name = summary.get("student", type(student).__name__)
    channels, height, width = image_shape
    library = {"onnx": "onnx", "pt2": "pytorch", "safetensors": "safetensors"}[format]
    how = {
        "onnx": f'onnxruntime.InferenceSession("{path.name}").run(None, {{"images": images}})[0]',
        "pt2": f'torch.export.load("{path.name}").module()(images)',
        "safetensors": f'network.load_state_dict(safetensors.torch.load_file("{path.name}"))',
    }[format]
    held_out = f"{check['held_out_images']:,} held-out images"
    lines = [
        "---",
        "license: unknown",
        f"library_name: {library}",
        "pipeline_tag: image-classification",
        "tags: [knowledge-distillation, data-free, dafl]",
        "---",
        "",
        f"# {name}, distilled without data",
        "",
        f"`{path.name}`, {format}, {len(content):,} bytes, sha256 "
        f"`{hashlib.sha256(content).hexdigest()}`, exported on {datetime.date.today()}.",
        "",
        "## Use",
        "",
        "```python",
        how,
        "```",
        "",
        f"- Input: images [N, {channels}, {height}, {width}], float32, any N.",
        f"- Preprocessing: {_preprocessing(config, image_shape)}",
        f"- Output: logits [N, {num_classes}]; softmax gives probabilities, the largest is the "
        "class.",
        f"- Classes: {_class_names(classes, num_classes)}",
        "",
        "## Origin",
        "",
        *(_origin(config, summary) if config else ["It is not recorded which run made it."]),
        "",
        "## Check",
        "",
        f"Loaded again and compared with the student in PyTorch on {check['random_images']:,} "
        f"random images{' and ' + held_out if check['held_out_images'] else ''}: the same class on "
        f"all of them, logits differ by at most {check['max_difference']:.2g}.",
        "",
        "## Versions",
        "",
        ", ".join(f"{package} {number}" for package, number in _versions(format).items()),
        "",
        "## Licence",
        "",
        "None is stated. Whoever publishes this file chooses it; terms of the teacher may reach "
        "its student.",
        "",
    ]
    return "\n".join(lines)


def _preprocessing(config: Config | None, image_shape: tuple[int, int, int]) -> str:
    channels, height, width = image_shape
    start = (
        f"{'grey' if channels == 1 else f'{channels} channels'}, brought to {height}x{width} "
        "pixels (bilinear, antialiased), values 0..255 divided by 255, then "
    )
    if config is None or config.mean is None or config.std is None:
        return start + "normalised as the teacher's training data were, which is not recorded here."
    return start + (
        f"(x - mean) / std per channel, mean {list(config.mean)}, std {list(config.std)}."
    )


def _class_names(classes: tuple[str, ...], num_classes: int) -> str:
    if len(classes) != num_classes:
        return f"0 to {num_classes - 1}, in the teacher's order; their names are not recorded here."
    return f"{', '.join(classes)}, in this order."


def _origin(config: Config, summary: dict[str, Any]) -> list[str]:
    usual = asdict(make_config(config.preset, config.recipe))
    changed = {
        name: value
        for name, value in asdict(config).items()
        if name not in _NOT_LISTED and value != usual[name]
    }
    teacher = Path(summary.get("teacher", str(config.teacher))).name  # it may be a file
    settings = ", ".join(f"{name} {value}" for name, value in changed.items())
    lines = [
        "Distilled from its teacher by data-free learning (Chen et al., ICCV 2019): no image of "
        "the teacher's training data was used.",
        "",
        f"- Teacher: {teacher}, sha256 of its weights "
        f"`{summary.get('teacher_sha256', 'not recorded')}`.",
        f"- Recipe: {config.recipe} of the preset {config.preset}; settings that differ from it: "
        f"{settings or 'none'}.",
    ]
    if not summary:
        return [*lines, "- The run has left no summary."]
    lines += [
        f"- Training: {summary['steps']:,} steps, {summary['train_seconds']:.0f} s on "
        f"{summary['device']} in {summary['precision']}"
        f"{', interrupted' if summary['interrupted'] else ''}.",
        f"- Agreement with the teacher on generated images: {summary['agreement_fresh']:.2%}.",
    ]
    if summary["student_accuracy"] is None:
        return [*lines, "- Accuracy: not measured, no held-out images were given."]
    held_out = "" if summary["eval_set"] == "none" else f" ({summary['eval_set']})"
    return [
        *lines,
        f"- Accuracy: {summary['student_accuracy']:.2%}, the teacher's "
        f"{summary['teacher_accuracy']:.2%}, on {summary['eval_count']:,} held-out images"
        f"{held_out}, none of which took part in the training of the student.",
    ]


def _versions(format: FormatName) -> dict[str, str]:
    packages = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    here = environment()
    return {
        **{name: here[name] for name in ("dafl_fast", "torch", "python")},
        **{package: version(package) for package in packages},
    }


def _held_out(config: Config) -> tuple[Tensor | None, tuple[str, ...]]:
    """The images that a run was evaluated on, if they can be had, and the names of the classes."""
    if config.eval == "none":
        return None, ()
    form = config.image_format
    try:
        images, _, classes = data.load(
            config.eval, "test", config.data_dir, False, form.image_size, form.channels
        )
        return data.normalise(images, form), classes
    except UserError as error:
        log.warning("compared on random images only: %s", error)
        return None, ()


@command
def main() -> int:
    arguments = tyro.cli(ExportConfig, prog="python -m dafl_fast.export")
    logging.basicConfig(format="%(message)s")
    student, config = open_run(arguments.run).built(), Config(**read_config(arguments.run))
    if arguments.data_dir is not None:
        config = replace(config, data_dir=arguments.data_dir)
    held_out, classes = _held_out(config)
    path = arguments.out or arguments.run / f"student.{arguments.format}"
    check = export_student(
        student, path, arguments.format, run=arguments.run, held_out=held_out, classes=classes
    )
    count = check["random_images"] + check["held_out_images"]
    print(
        f"{path}: the student's class on all of {count:,} images "
        f"({check['held_out_images']:,} held out), logits differ by at most "
        f"{check['max_difference']:.2g}\n{path}.md: its model card"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The one way from what a user names to a network: `open_network`, and `open_file` for files.

What is built by name stands in `names`, what is read from files in `formats`.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..config import Config
from ..convention import Convention, OutputKind, normalisation, sized
from ..data import ImageSize, sides, size_of
from ..engine.folder import read_config, read_summary
from ..engine.outputs import reading_of
from ..engine.precision import computed_in
from ..errors import UserError
from ..files import read_json, reading
from ..models import GREY_SIZES, NETWORKS, build, identify
from ..models.pixels import Taking
from ..recipes import PRESETS
from . import huggingface
from .formats import ENDINGS, check_finite, load_weights, read_program, read_weights, recognise
from .names import OTHERS, Sizes, build_named, draws_its_weights, is_code, knows_nothing
from .trust import NO_TRUST, Trust


@dataclass(frozen=True)
class Opened:
    """A network that was named, and what is known of it before it has seen an image.

    Attributes:
        name: of the network, or what kind of program it is.
        role: "teacher", "student" or "model", for messages.
        file: with its weights, if there is one.
        network: itself; None while it must be built for the images, as named ones must.
        classes, channels, image_size: that it takes; None if asking it will tell.
        mean, std: it takes (pixel - mean) / std of pixels in 0..1, with these per channel, if they
            are known.
        grey: whether its channels are all equal, those of a grey image.
    """

    name: str
    role: str
    file: Path | None = None
    network: nn.Module | None = None
    classes: int | None = None
    channels: int | None = None
    image_size: ImageSize | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    grey: bool = False

    def built(
        self,
        num_classes: int | None = None,
        channels: int | None = None,
        image_size: ImageSize | None = None,
    ) -> nn.Module:
        """The network, made for such images if that was still to be done; see `Sizes`."""
        if self.network is not None:
            return self.network
        if image_size is not None:
            image_size = size_of(*sides(image_size))
        sizes = Sizes(self.classes or num_classes, self.channels or channels, image_size)
        network = build_named(self.name, self.role, sizes)
        return network if self.file is None else load_weights(network, self.file, self.role)


def open_network(
    name: str | Path,
    weights: str | Path | None,
    role: str,
    weights_for: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
    trust: Trust = NO_TRUST,
) -> Opened:
    """What `load_network` takes, opened. A teacher's file of weights alone is one of the network
    that they or the note beside it tell, else of `weights_for`, and refused without any.
    `image_shape` is for files that leave it open.

    Raises:
        UserError: a file cannot be read or does not suit the role.
    """
    name, path = str(name), Path(name)
    if name.startswith(huggingface.PREFIX) and (weights is None or role == "student"):
        return open_folder(name, role, weights)
    if name.endswith(".py"):
        raise UserError(
            f"the {role} {name} must also name the class or function in it: {name}:CALLABLE"
        )
    whole = os.path.exists(path) or name.endswith(ENDINGS) or name.startswith(huggingface.PREFIX)
    if name in NETWORKS or not whole:
        return Opened(name, role, None if weights is None else Path(weights))
    if weights is not None:
        raise UserError(f"the {role} {name} brings its weights along; leave {weights} out")
    if os.path.isfile(path) and recognise(path, role).weights is not None:
        state = read_weights(path, role)  # weights in truth, or a pickled module?
        if role != "student" and ("name" in _note_beside(path) or identify(state) is not None):
            weights_for = None
        elif weights_for is None:
            raise UserError(
                f"the {role} file {path} holds weights only; name their network as well: "
                f"--{role} NETWORK --{role}-weights {path}"
            )
    return open_file(path, role, weights_for, image_shape, trust)


def open_file(
    path: Path,
    role: str,
    weights_for: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
    trust: Trust = NO_TRUST,
) -> Opened:
    """What `path` holds: a run's student, a program, or weights.

    Weights are of the network `weights_for`; those of `NETWORKS` are known by names and shapes, and
    some others by the note beside them.

    Raises:
        UserError: the file cannot be read, or which network its weights are for is not known.
    """
    if str(path).startswith(huggingface.PREFIX):
        return open_folder(str(path), role)
    if os.path.isdir(path):  # of which a name of any length may be asked
        if (path / "config.json").exists() and not (path / "config.yaml").exists():
            raise UserError(
                f"there is no run in {path}, but a config.json; if save_pretrained wrote it, name "
                f"it {huggingface.PREFIX}{path}"
            )
        return open_run(path, trust, weights_for)
    note = _note_beside(path)
    program = read_program(path, role, image_shape, trust)
    if program is not None:
        if role == "student":
            raise UserError(
                f"the student cannot be the program {path}, which has one mode, that of "
                "evaluation; name a network that can be trained"
            )
        note["name"] = recognise(path, role).name
        told = getattr(program, "convention", Convention()).image_shape
        if told is not None:
            note["channels"] = told[0]
            if note["name"] != "ONNX":  # which may leave the size open, and be read for any
                note["image_size"] = size_of(*told[1:])
        return Opened(role=role, file=path, network=program, **note)
    state = read_weights(path, role)  # weights in truth, or a pickled module?
    if weights_for is not None:
        return Opened(role=role, file=path, **{**note, "name": weights_for})
    found = identify(state)
    if found is None and "name" in note:
        return Opened(role=role, file=path, **note)
    if found is None:
        flag = "network" if role == "model" else f"{role}-network"
        raise UserError(
            f"the {role} file {path} holds none of the networks {', '.join(NETWORKS)}; say which "
            f"one it is for with --{flag} {', '.join(OTHERS[:-1])} or {OTHERS[-1]}"
        )
    name, classes, channels = found
    note |= {"name": name, "classes": classes, "channels": channels}
    note["image_size"] = GREY_SIZES.get(name) or note.get("image_size")
    network = load_weights(build(*found), path, role)
    return Opened(role=role, file=path, network=network, **note)


def open_folder(name: str, role: str, weights: str | Path | None = None) -> Opened:
    """What `transformers:FOLDER` means, with other weights than its own if there are some; see
    `huggingface.read_transformers`."""
    network: Any = huggingface.read_transformers(name, role, weights is not None)
    if weights is not None:
        load_weights(network, weights, role)
    check_finite(network, f"{role} {name}")
    folder = Path(name.removeprefix(huggingface.PREFIX)).expanduser()
    file = next(iter(sorted(folder.glob("*.safetensors"))), folder / "config.json")
    file = file if weights is None else Path(weights)
    channels, *size = network.convention.image_shape or (network.config.num_channels, None)
    image_size = size_of(*size) if len(size) == 2 else None
    mean, std = huggingface.normalisation(folder) or (None, None)
    known = (network.config.num_labels, channels, image_size, mean, std)
    return Opened(name, role, file, network, *known)


def open_run(path: Path, trust: Trust = NO_TRUST, same: str | None = None) -> Opened:
    """The student that the run in `path` has left. If it is of code of its own, `trust` must allow
    that, or the user has given the `same` name.

    Raises:
        UserError: there is no run, it has left no student yet, or no name says which network the
            student is; or code would be run that only the folder names.
    """
    config = Config(**read_config(path))
    weights = path / "student.safetensors"
    if config.student is None:
        raise UserError(
            f"the student of {path} has no name, since it was given to distill() as a module: "
            "export it from Python with dafl_fast.export.export_student(result, FILE)"
        )
    if not weights.is_file():
        raise UserError(
            f"the run in {path} has left no student yet; go on with it: "
            f"python -m dafl_fast.train --resume {path}"
        )
    if is_code(config.student) and not trust.run and config.student != same:
        raise _only_named(path, "student", config.student)
    channels, *size = config.shape
    sizes = (read_summary(path).get("num_classes", config.num_classes), channels, size_of(*size))
    student = open_network(config.student, weights, "student").built(*sizes)
    student = _student_for_pixels(config, student).eval()
    known = (*sizes, *(config.units or (None, None)), config.grey)
    return Opened(config.student, "student", weights, student, *known)


def _only_named(path: Path, role: str, name: str, remedy: str = "") -> UserError:
    return UserError(
        f"the {role} of the run in {path} is the code {name}, which is not imported just because a "
        f"folder names it; if you trust that code, add {remedy}--trust-run"
    )


def _note_beside(path: Path) -> dict[str, Any]:
    """What the note that train_teacher wrote beside the weights in `path` says of the network and
    of its images, as `Opened` has it; nothing if what lies there is another file. Raises UserError
    if it is damaged."""
    file = path.with_suffix(".json")
    if not os.path.exists(file) or not {"mean", "std"} <= (note := read_json(file, "note")).keys():
        return {}
    with reading(file, "note", "is damaged"):
        mean, std = normalisation(note["mean"], note["std"])
        size = note.get("image_size")
        told: dict[str, Any] = {
            "mean": mean,
            "std": std,
            "image_size": size if size is None else sized(size),
        }
        # Of files of weights only, and never code that only a note names.
        if isinstance(name := note.get("network"), str) and knows_nothing(name):
            told["name"] = name
            for field, key, most in (
                ("classes", "num_classes", 2**16),
                ("channels", "channels", 64),
            ):
                told[field] = count = note.get(key)
                if count is not None and not (type(count) is int and 1 <= count <= most):
                    raise ValueError(f"its {key} cannot be {count!r}")
        return told


def load_network(
    name: str | Path,
    weights: str | Path | None = None,
    *,
    role: str,
    num_classes: int | None = None,
    channels: int | None = None,
    image_size: ImageSize | None = None,
    trust_run: bool = False,
    trust_teacher: bool = False,
) -> nn.Module:
    """The network that `name` means, freshly initialised or with the weights given.

    | name | network |
    | --- | --- |
    | `LeNet5`, `ResNet34`, `WRN-40-2`, ... | one of `dafl_fast.models.NETWORKS` |
    | `timm:NAME`, `torchvision:NAME` | a classifier of that package, never downloaded |
    | `transformers:FOLDER` | the image classifier that save_pretrained wrote to a folder |
    | `package.module:callable`, `/path/nets.py:callable` | what your own function or class returns,
      called with those of num_classes, channels or in_chans, image_size or img_size that its
      signature names |
    | a file of torch.export.save, TorchScript or ONNX | the program in it, with its weights |
    | the folder of a run | its student, with its weights |
    | a teacher's file of weights | the one of `NETWORKS` that it fits, or that its note names |

    Args:
        name: see above; files are told apart by their content.
        weights: safetensors, or a checkpoint that `torch.load(weights_only=True)` reads.
        role: "teacher" or "student", for messages. A student is trained, which rules out programs.
        num_classes, channels, image_size: of the images and their labels, handed to whatever can
            be built for them; None leaves the network's own default. The size is height and
            width, or one number for both, which is what a network gets for squares.
        trust_run: import the code that the folder of a run names as its student.
        trust_teacher: load TorchScript that does more than compute on tensors.

    Raises:
        UserError: there is no such network, it does not fit the weights or the channels, a package
            is missing, or a file is not readable without running code that is in it.
    """
    shape = None
    if channels is not None and image_size is not None:
        shape = (channels, *sides(image_size))
    trust = Trust(trust_run, trust_teacher)
    opened = open_network(name, weights, role, image_shape=shape, trust=trust)
    return opened.built(num_classes, channels, image_size)


def bundled_weights(preset: str) -> Path | None:
    """The file of the teacher that comes with the package for `preset`, if there is one."""
    name = PRESETS[preset].bundled_teacher
    return None if name is None else Path(str(files("dafl_fast") / "assets" / name))


def bundled_teacher() -> nn.Module:
    """LeNet-5, trained on 55,000 of MNIST's images with `python -m dafl_fast.train_teacher`.

    It takes images [N, 1, 32, 32], normalised with `dafl_fast.data.FORMATS["mnist"]`.
    """
    return load_network("LeNet5", bundled_weights("mnist"), role="teacher")


def load_networks(config: Config) -> tuple[Config, nn.Module, nn.Module]:
    """The teacher with its weights and the student that `config` names; and `config`, completed by
    what the teacher's file tells of its images where nothing else does.

    Raises:
        UserError: one is not named, not to be had, or does not fit its weights.
    """
    name, weights, student_name = config.teacher, config.teacher_weights, config.student
    if name is None or student_name is None:
        role = "teacher" if name is None else "student"
        if config.resume is not None:
            raise UserError(
                f"the {role} of {config.resume} has no name, since the run was begun in Python "
                "with modules; resume it there: distill(teacher, student, ..., resume=FOLDER)"
            )
        raise UserError(
            f"--{role} must name a network for the preset {config.preset}: see docs/networks.md"
        )
    if os.path.isdir(student_name):  # the run would not say which network its student is
        raise UserError(
            f"--student must name a network, got the folder {student_name}; to go on with the "
            "student in it, name its network, and its student.safetensors with --student-weights"
        )
    trust = Trust(config.trust_run, config.trust_teacher)
    if config.resume is not None and not trust.run:
        both = {"teacher": name, "student": student_name}
        codes = {role: network for role, network in both.items() if is_code(network)}
        if codes:
            named = " ".join(f"--{role} {network}" for role, network in codes.items())
            raise _only_named(config.resume, *next(iter(codes.items())), f"{named} or ")
    usual = PRESETS[config.preset].networks.get("teacher")
    if weights is None and name == usual:
        weights = bundled_weights(config.preset)
        if weights is None:
            raise UserError(
                f"the preset {config.preset} has no bundled teacher: train one with `python -m "
                f"dafl_fast.train_teacher {config.preset}` and name its file with --teacher"
            )
    if weights is None and knows_nothing(name):
        raise UserError(f"--teacher-weights is needed: without weights {name} knows nothing")
    opened = open_network(name, weights, "teacher", usual, config.image_shape, trust)
    config = _completed(config, opened)
    channels, size = config.shape[0], config.shape[1:]
    teacher = opened.built(config.num_classes, channels, size)
    if opened.network is None and opened.file is None:  # the user's own code
        again = functools.partial(opened.built, config.num_classes, channels, size)
        if draws_its_weights(teacher, again):
            raise UserError(
                f"--teacher-weights is needed: {name} draws its weights anew each time it is "
                "called, so it has learned nothing"
            )
    example = torch.zeros(2, *config.shape)
    teacher = computed_in(example.dtype, teacher, "teacher", example)
    how = (config.teacher_output, config.teacher_output_name, config.num_classes)
    classes = outputs_of(teacher, config.shape, *how)
    torch.manual_seed(config.seed)
    opened = open_network(student_name, config.student_weights, "student")
    student = opened.built(classes, channels, size)
    if config.student_start == "auto":
        unlearned = config.student_weights is None and knows_nothing(student_name)
        config = replace(config, student_start="teacher" if unlearned else "own")
    return config, teacher, _student_for_pixels(config, student)


def is_for_mnist(teacher: str) -> bool:
    """Whether a teacher that is named without a preset belongs to the preset mnist: a network of
    its kind, or a file of weights for its teacher."""
    path = Path(teacher)
    # A file of code is none to read: `open_network` says what is missing in its name.
    if not os.path.isfile(path) or path.suffix == ".py":
        return teacher in GREY_SIZES
    if recognise(path, "teacher").weights is None:
        return False
    found = identify(read_weights(path, "teacher"))
    return found is not None and found[0] == PRESETS["mnist"].networks["teacher"]


def _completed(config: Config, teacher: Opened) -> Config:
    """`config` with what is known of the teacher's images in place of what is not."""
    told: dict[str, Any] = {}
    convention = getattr(teacher.network, "convention", Convention())
    size = GREY_SIZES.get(teacher.name) or teacher.image_size
    if config.image_shape is None:
        channels = teacher.channels or (1 if teacher.name in GREY_SIZES else None)
        known = None if channels is None or size is None else (channels, *sides(size))
        told["image_shape"] = convention.image_shape or known
    if config.mean is None and config.std is None and config.pixels == "normalised":
        told |= {"mean": teacher.mean, "std": teacher.std}
    if convention.dtype == "uint8" and config.pixels == "normalised":
        told["pixels"] = "0..255"  # nothing else is a whole number
    elif convention.dtype == "uint8" and config.pixels != "0..255":
        raise UserError(
            f"--pixels must be 0..255 for {config.teacher}, which takes uint8, got {config.pixels}"
        )
    return replace(config, **{name: value for name, value in told.items() if value is not None})


def _student_for_pixels(config: Config, student: nn.Module) -> nn.Module:
    """The named student that `config` needs: of pixels in 0..255 a network made for normalised
    images learns badly, so it gets a layer in front that normalises them. The user's own code is
    left to do what it wants."""
    assert config.student is not None
    own = not knows_nothing(config.student) and not config.student.startswith(huggingface.PREFIX)
    if config.pixels != "0..255" or own:
        return student
    assert config.from_generated is not None
    return Taking(student, *config.from_generated)


def outputs_of(
    teacher: nn.Module,
    image_shape: tuple[int, int, int],
    outputs: OutputKind | Literal["auto"] = "auto",
    name: str | None = None,
    classes: int | None = None,
) -> int:
    """The teacher's number of classes, found by asking it; see `reading_of`."""
    images = torch.randn(2, *image_shape)
    return reading_of(teacher.eval(), images, outputs, name=name, classes=classes).classes

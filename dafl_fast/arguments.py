"""What callers give `distill`: objects of Python where commands have names and files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import UserError

# Settings that say where commands find what callers of `distill` give as it is.
_OF_COMMANDS = {
    "teacher_weights": "load them into the teacher",
    "student_weights": "load them into the student",
    "eval": "give eval_loader",
    "data_dir": "give eval_loader",
    "download": "give eval_loader",
    "trust_run": "the networks are here already",
    "trust_teacher": "the networks are here already",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError if one of the settings would be ignored."""
    for name, instead in _OF_COMMANDS.items():
        if settings.get(name) not in (None, False, "none"):
            raise UserError(f"{name} is for commands, distill() takes no notice of it: {instead}")


def check_networks(teacher: Any, student: Any, generator: Any) -> None:
    """Raises UserError unless these are modules with weights, and the student's are its own."""
    roles = {"teacher": teacher, "student": student, "generator": generator}
    for role, network in roles.items():
        if role == "generator" and network is None:
            continue
        if not isinstance(network, nn.Module):
            raise UserError(f"{role} must be an nn.Module, got {_told(network)}")
        for name, parameter in network.named_parameters():
            if parameter.is_meta:
                raise UserError(
                    f"{role} has no weights: {name} is on the device 'meta'; make it on another one"
                )
    if teacher is student:
        raise UserError("teacher and student must be two networks, got the same twice")
    theirs = {id(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())}
    trained = [(name, one) for name, one in student.named_parameters() if one.requires_grad]
    # Of buffers, those of BatchNorm, unless it is frozen. Others may be constants of both.
    norms = [
        (f"{layer_name}.{name}".lstrip("."), buffer)
        for layer_name, layer in student.named_modules()
        if hasattr(layer, "running_mean") and (layer.training or not student.training)
        for name, buffer in layer.named_buffers(recurse=False)
    ]
    for name, tensor in (*trained, *norms):
        if id(tensor) in theirs:
            raise UserError(
                f"the student's {name} is the teacher's own, which training would change; make the "
                "student of copy.deepcopy(layer)"
            )


def uncompiled(network: nn.Module) -> nn.Module:
    """What torch.compile(network) wraps: the wrapper changes the names of the weights, and compiles
    anew for each look at the network. `compile=True` compiles the networks of a run."""
    inner = getattr(network, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else network


def _told(value: Any) -> str:
    """What was given instead of a module, and what to do about it."""
    if isinstance(value, (str, Path)):
        return f"{str(value)!r}; dafl_fast.load_network(name, role=...) opens names and files"
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"the class {value.__name__}; give an instance, {value.__name__}(...)"
    if isinstance(value, dict):
        return "a dict; build the network and load it with load_state_dict"
    return "None" if value is None else f"{type(value).__name__}"


def checked_shape(shape: Any) -> tuple[int, int, int]:
    """Channels, height and width; raises UserError for another number of values."""
    sides = () if isinstance(shape, str) or not isinstance(shape, Iterable) else tuple(shape)
    if len(sides) == 3:
        return sides
    raise UserError(
        f"image_shape must be channels, height and width, as in (3, 32, 32), got {shape!r}"
    )


def checked_callbacks(callbacks: Any) -> list[Callable[[dict[str, Any]], None]]:
    """Functions of a row, of which one may be given alone; raises UserError for anything else."""
    given = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    if not all(map(callable, given)):
        raise UserError(f"callbacks must be functions that take a row, got {callbacks!r}")
    return given


def checked_images(images: Any) -> Tensor | Sequence[Path | str]:
    """A tensor, or paths, of which one may be given alone; raises UserError for anything else."""
    if isinstance(images, Tensor):
        return images
    if images is None:
        return ()
    if isinstance(images, (str, Path)):
        return (images,)
    paths = list(images) if isinstance(images, Iterable) else [images]
    if not all(isinstance(one, (str, Path)) for one in paths):
        raise UserError(
            "images must be paths of photographs, folders or .npz files, or one tensor [N, C, "
            f"H, W], got {type(images).__name__}"
        )
    return paths

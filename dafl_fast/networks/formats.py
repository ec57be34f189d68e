"""Files that hold a network or its weights: how each is recognised, read and called.

`FORMATS` is all that the rest of the package knows of them: a new format is a new row.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import UserError, first_line
from ..files import load_tensors, reading
from .exported import read_exported
from .onnx_file import read_onnx
from .script_check import check_script
from .trust import NO_TRUST, NeedsCode, Trust

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Shape = tuple[int, int, int]
# Under what a checkpoint keeps its state dict, besides the network's role.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "network", "net")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAVE_IT = (
    "save its weights with safetensors.torch.save_file(network.state_dict(), "
    '"weights.safetensors"), or all of it with torch.export.save'
)


@dataclass(frozen=True)
class FileFormat:
    """A kind of file; it has either `program` or `weights`.

    Attributes:
        name: what a network in such a file is called, where it has no other name.
        wanted: what it is called to those whose file is of no format.
        endings: a name with one of these means a file, whether it exists or not.
        recognised: tells it by the first bytes and, of a zip archive, the names in its folder.
        program: reads the whole network; like `weights` from the path and the network's role, and
            from C, H and W of the images, which may be None.
        weights: reads a state dict.
        check: raises NeedsCode if a program does more than compute; asked unless its author is
            trusted.
    """

    name: str
    wanted: str
    endings: tuple[str, ...]
    recognised: Callable[[bytes, set[str]], bool]
    program: Callable[[Path, str, Shape | None], nn.Module] | None = None
    weights: Callable[[Path, str], State] | None = None
    check: Callable[[Path], None] | None = None


def recognise(path: Path, role: str) -> FileFormat:
    """The format of a file, by its content: endings mean little (.pt is used for three of them).

    Raises:
        UserError: no such file, or none of the formats; `role` names it in messages.
    """
    members: set[str] = set()
    with reading(path, f"{role} file"), path.open("rb") as file:
        head = file.read(9)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                members = {name.partition("/")[2] for name in archive.namelist()}
    for known in FORMATS:
        if known.recognised(head, members):
            return known
    *others, last = (known.wanted for known in FORMATS)
    raise UserError(
        f"the {role} file {path} is no model that can be read: wanted are {', '.join(others)}, "
        f"or {last}"
    )


def read_program(
    path: Path, role: str, image_shape: Shape | None = None, trust: Trust = NO_TRUST
) -> nn.Module | None:
    """The network in a file, on the CPU; None if the file holds weights only. `image_shape` is for
    files that are for images of any size.

    Raises:
        UserError: the file cannot be read without running code that is in it, it does more than
            compute, or see `from_export`.
    """
    known = recognise(path, role)
    if known.check is not None and not trust.program:
        try:
            known.check(path)
        except NeedsCode as error:
            raise UserError(
                f"the {role} file {path} is not loaded, because its program {error}; if you trust "
                "its author, add --trust-teacher"
            ) from error
        except Exception as error:  # whatever torch says of a damaged file
            raise UserError(
                f"the {role} file {path} cannot be read: {first_line(error)}"
            ) from error
    if known.program is None:
        return None
    network: nn.Module = _read(known.program, path, role, image_shape)
    check_finite(network, f"{role} file {path}")
    return network


def read_weights(path: Path, role: str) -> State:
    """The state dict in a file; see `load_weights`."""
    weights = recognise(path, role).weights
    if weights is None:
        raise UserError(
            f"the {role} weights {path} are a whole program; name it as the network itself: "
            f"--{role} {path}"
        )
    state: State = _read(weights, path, role)
    for name, tensor in state.items():
        if odd := _odd(tensor):
            raise UserError(
                f"the {role} file {path} has {odd} tensor, {name}: save the weights as plain ones"
            )
    return state


def _odd(tensor: Tensor) -> str | None:
    """What a tensor is that is none of numbers in memory."""
    kinds = {
        "a nested": tensor.is_nested, "a quantised": tensor.is_quantized,
        "a sparse": tensor.layout != torch.strided, "a complex": tensor.is_complex(),
        "an empty": tensor.device.type != "cpu",
    }  # fmt: skip
    return next((kind for kind, is_it in kinds.items() if is_it), None)


def check_finite(network: nn.Module, what: str) -> None:
    """Raises UserError if a weight of `network` is infinite or not a number, or a buffer is not a
    number; in those infinity may mask something. `what` names the network."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor) or tensor.dtype not in _FLOATS or tensor.layout != torch.strided:
            continue
        good = tensor.isfinite() if isinstance(tensor, nn.Parameter) else ~tensor.isnan()
        if not bool(good.all()):
            raise UserError(f"the {what} is damaged: {name} has values that are not finite")


def _read(read: Callable[..., Any], path: Path, role: str, *more: Any) -> Any:
    try:
        return read(path, role, *more)
    except UserError:
        raise
    except Exception as error:  # whatever torch says of a damaged file
        if not isinstance(error, NeedsCode) and "Weights only load failed" not in str(error):
            raise UserError(
                f"the {role} file {path} cannot be read: {first_line(error)}"
            ) from error
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = str(error) if isinstance(error, NeedsCode) else "the objects in it"
        raise UserError(
            f"the {role} file {path} is not loaded, because reading "
            f"{named[1] if named else what} can run any code; {_SAVE_IT}"
        ) from error


def load_weights(network: nn.Module, path: str | Path, role: str) -> nn.Module:
    """Fills `network` in place and returns it; `role` ("teacher") names it in messages.

    The file is safetensors, or a checkpoint that `torch.load(weights_only=True)` reads. The state
    dict may lie under a usual key of it ("state_dict", "model", ...), and the network's names may
    have a prefix, as DataParallel's "module.", torch.compile's "_orig_mod." and whatever attribute
    of a LightningModule it is. What has another prefix is left out, and a warning names it.

    Raises:
        UserError: the file cannot be read without running code that is in it, or holds the
            weights of another network, or of several.
    """
    path = Path(path)
    own = network.state_dict()
    # BatchNorm's counter is younger than many a checkpoint, and of no use here.
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    state = _without_prefix(read_weights(path, role), {name: own[name] for name in needed}, role)
    missing, extra = sorted(needed - state.keys()), sorted(state.keys() - own.keys())
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    others = [
        key
        for key in sorted(needed & state.keys())
        if own[key].is_floating_point() != state[key].is_floating_point()
    ]
    if others and not wrong:
        detail = (
            f"{others[0]} should be {own[others[0]].dtype}, the file has {state[others[0]].dtype}"
        )
    elif wrong:
        want, got = list(own[wrong[0]].shape), list(state[wrong[0]].shape)
        detail = f"{wrong[0]} should be {want}, the file has {got}"
    elif missing:
        detail = f"{missing[0]} is missing"
    elif extra:
        detail = f"{extra[0]} is not part of it"
    else:
        network.load_state_dict(state, strict=False)
        check_finite(network, f"{role} file {path}")
        return network
    raise UserError(
        f"the weights in {path} do not fit the {role} {type(network).__name__}: {detail}"
    )


def _without_prefix(state: State, own: State, role: str) -> State:
    """The part of `state` that has the names of `own`, all with one prefix, without this prefix."""
    some = max(own, key=len, default="")
    prefixes = {name.removesuffix(some) for name in state if name.endswith(some)}
    whole = [
        prefix
        for prefix in sorted(prefixes)
        if prefix[-1:] in ("", ".") and all(prefix + name in state for name in own)
    ]
    fitting = [
        prefix
        for prefix in whole
        if all(state[prefix + name].shape == own[name].shape for name in own)
    ]
    if not whole:  # it does not fit; what all names begin with shall not hide why
        while len({name.partition(".")[0] for name in state}) == 1 and all("." in n for n in state):
            state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
        return state
    chosen = _choose(fitting, state, own, role) if fitting else whole[0]
    others = tuple(prefix for prefix in whole if prefix not in ("", chosen))
    mine = {
        name
        for name in state
        if name.startswith(chosen) and not (chosen == "" and others and name.startswith(others))
    }
    if ignored := sorted(state.keys() - mine):
        more = f" and {len(ignored) - 4} more" if len(ignored) > 4 else ""
        log.warning(
            "of the %s's weights, those that begin with %r are used; left out: %s%s",
            role, chosen, ", ".join(ignored[:4]), more,
        )  # fmt: skip
    return {name.removeprefix(chosen): state[name] for name in mine}


def _choose(prefixes: list[str], state: State, own: State, role: str) -> str:
    """The prefix of the network for `role`, of several that could be its."""
    first, *others = prefixes
    for wanted in (role, "model"):
        named = [prefix for prefix in prefixes if wanted in prefix.split(".")]
        if len(named) == 1:
            return named[0]
    if first == "" or all(state[p + n].equal(state[first + n]) for p in others for n in own):
        return first  # beside its own names, or the same under each
    raise UserError(
        f"the {role}'s weights are there several times, under {', '.join(map(repr, prefixes))}; "
        f"save the one that is meant by itself, or under {role + '.'!r}"
    )


class _Ignored(list):  # type: ignore[type-arg]
    """Stands where an object of an unknown class was: keeps nothing, and runs nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def _new_dict(*args: Any) -> dict[Any, Any]:
    return {}


def _read_around_objects(path: Path) -> Any:
    """A checkpoint's content with `_Ignored` where it has objects of other classes than tensors, as
    the settings in Lightning's checkpoints. None of their code is imported."""
    known = {"collections.defaultdict": _new_dict}
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins: list[Any] = [(known.get(name, _Ignored), name) for name in unknown]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_checkpoint(path: Path, role: str) -> State:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = _find_state(content, role)
    except Exception as error:
        try:
            content = _read_around_objects(path)
            found = _find_state(content, role)
        except Exception:
            found = None
        if found is None:
            raise error
    if found is None:
        raise UserError(
            f"the {role} file {path} holds no state dict, neither by itself nor under one of "
            f"{', '.join((role, *_STATE_KEYS))}{_what_is_there(content)}"
        )
    taken, state = found
    if taken not in ("", role):
        others = [key for key, other in _states(content).items() if other.keys() == state.keys()]
        _say_what_is_taken(path, role, taken, tuple(key for key in others if key != taken))
    return state


def _find_state(content: Any, role: str) -> tuple[str, State] | None:
    """The state dict in a checkpoint, and the key under which it lies; "" if it is all of it."""
    if not isinstance(content, dict):
        return None
    if content and all(isinstance(value, Tensor) for value in content.values()):
        if not all(isinstance(name, str) for name in content):
            raise ValueError("it has weights without a name")
        return "", content
    for key in (role, *_STATE_KEYS):
        if (found := _find_state(content.get(key), role)) is not None:
            return key, found[1]
    others = _states(content)
    return next(iter(others.items())) if len(others) == 1 else None


def _states(content: dict[Any, Any]) -> dict[str, State]:
    """All values that are state dicts themselves, by their keys."""
    return {
        str(key): value
        for key, value in content.items()
        if isinstance(value, dict) and value
        if all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    }


def _what_is_there(content: Any) -> str:
    if not isinstance(content, dict) or not content:
        return ""
    keys = list(map(repr, content))
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return f"; it has {', '.join(keys[:8])}{more}"


@functools.cache  # once of each file, however often it is read
def _say_what_is_taken(path: Path, role: str, taken: str, others: tuple[str, ...]) -> None:
    if others:
        log.warning(
            "of the %s file %s, the weights under %r are taken; others for the same network are "
            "there under %s", role, path, taken, ", ".join(map(repr, others)),
        )  # fmt: skip


def _read_onnx(path: Path, role: str, image_shape: Shape | None) -> nn.Module:
    # Of onnx2torch, in every forward pass; PyTorch goes on to do what is meant.
    warnings.filterwarnings("ignore", "Using a non-tuple sequence", module="onnx2torch")
    return read_onnx(path, role, image_shape)


def _read_torchscript(path: Path, role: str, image_shape: Shape | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        return torch.jit.load(path, map_location="cpu")


FORMATS = (
    FileFormat(
        "safetensors", "safetensors", (".safetensors",),
        lambda head, members: head[8:] == b"{",  # after the length of the header
        weights=load_tensors,
    ),
    FileFormat(
        "checkpoint", "a state dict saved by torch.save", (".pt", ".pth", ".ckpt", ".bin", ".pkl"),
        # A bare pickle is what torch.save wrote before version 1.6.
        lambda head, members: (
            ("data.pkl" in members and "constants.pkl" not in members) or head[:1] == b"\x80"
        ),
        weights=_read_checkpoint,
    ),
    FileFormat(
        "exported program", "a program saved by torch.export.save", (".pt2",),
        lambda head, members: "models/model.json" in members,
        program=lambda path, role, image_shape: read_exported(path, role),
    ),
    FileFormat(
        "TorchScript", "TorchScript", (".pt",),
        lambda head, members: "constants.pkl" in members,
        program=_read_torchscript,
        check=check_script,
    ),
    FileFormat(
        "ONNX", "ONNX", (".onnx",),
        # Two numbered fields of its protobuf: the version, then one that may follow it.
        lambda head, members: head[:1] == b"\x08" and head[2:3] in b"\x12\x1a\x22\x28\x32\x3a\x42",
        program=_read_onnx,
    ),
)  # fmt: skip
ENDINGS = tuple(ending for known in FORMATS for ending in known.endings)

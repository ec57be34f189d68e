"""Where networks come from: what a user names, as an nn.Module with its weights."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line, require
from ..files import load_tensors
from ..models import NETWORKS, build
from ..recipes import PRESETS
from .exported import kind_of, load_program, refuse_code

_ENDINGS = (".safetensors", ".pt", ".pth", ".pt2", ".ckpt", ".bin", ".pkl")
# Under what a checkpoint keeps its state dict, besides the network's role.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "network", "net")


def load_network(
    name: str | Path,
    weights: str | Path | None = None,
    *,
    role: str,
    num_classes: int | None = None,
    channels: int | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """The network that `name` means, freshly initialised or with the weights given.

    | name | network |
    | --- | --- |
    | `LeNet5`, `ResNet34`, `WRN-40-2`, ... | one of `dafl_fast.models.NETWORKS` |
    | `timm:NAME`, `torchvision:NAME` | a classifier of that package, never downloaded |
    | `package.module:callable` | what your own function or class returns, called with those of
      num_classes, channels or in_chans, image_size or img_size that its signature names |
    | a file of torch.export.save or TorchScript | the program in it, with its weights |

    Args:
        name: see above; files are told apart by their content.
        weights: safetensors, or a checkpoint that `torch.load(weights_only=True)` reads.
        role: "teacher" or "student", for messages. A student is trained, which rules out programs.
        num_classes, channels, image_size: of the images and their labels, handed to whatever can
            be built for them; None leaves the network's own default.

    Raises:
        UserError: there is no such network, it does not fit the weights or the channels, a package
            is missing, or a file is not readable without running code that is in it.
    """
    name = str(name)
    source, colon, rest = name.partition(":")
    if name in NETWORKS:
        network = build(name, 10 if num_classes is None else num_classes, channels)
    elif Path(name).is_file() or name.endswith(_ENDINGS):
        return _from_file(Path(name), weights, role)
    elif colon and source == "timm":
        network = _timm(rest, role, num_classes, channels, image_size)
    elif colon and source == "torchvision":
        network = _torchvision(rest, role, num_classes, channels)
    elif colon:
        settings = {
            "num_classes": num_classes, "channels": channels, "in_chans": channels,
            "image_size": image_size, "img_size": image_size,
        }  # fmt: skip
        network = _own(source, rest, role, settings)
    else:
        raise UserError(
            f"unknown {role} {name!r}: name one of {', '.join(NETWORKS)}, timm:NAME, "
            "torchvision:NAME, package.module:callable, or a file saved by torch.export.save"
        )
    return network if weights is None else load_weights(network, weights, role)


def bundled_teacher() -> nn.Module:
    """LeNet-5, trained on 55,000 of MNIST's images with `python -m dafl_fast.train_teacher`.

    It takes images [N, 1, 32, 32], normalised with `dafl_fast.data.FORMATS["mnist"]`.
    """
    name = PRESETS["mnist"].bundled_teacher
    return load_network("LeNet5", str(files("dafl_fast") / "assets" / str(name)), role="teacher")


def _from_file(path: Path, weights: str | Path | None, role: str) -> nn.Module:
    kind = kind_of(path, role)
    if kind not in ("export", "torchscript"):
        if kind == "checkpoint":
            _read_checkpoint(path, role)  # weights in truth, or a pickled module?
        raise UserError(
            f"the {role} file {path} holds weights only; name their network as well: "
            f"--{role} NETWORK --{role}-weights {path}"
        )
    if role == "student":
        raise UserError(
            f"the student cannot be the program {path}, which has one mode, that of evaluation; "
            "name a network that can be trained"
        )
    if weights is not None:
        raise UserError(f"the {role} {path} brings its weights along; leave {weights} out")
    return load_program(path, kind, role)


def _timm(
    name: str, role: str, num_classes: int | None, channels: int | None, image_size: int | None
) -> nn.Module:
    require("timm", f"the {role} timm:{name}")
    import timm

    if not timm.is_model(name):  # neither are names that timm would look up on a server
        raise UserError(_unknown(role, "timm", name, timm.list_models()))
    settings = _given(num_classes=num_classes, in_chans=channels, img_size=image_size)
    try:
        return timm.create_model(name, pretrained=False, **settings)
    except TypeError as error:
        if "img_size" not in str(error):
            raise _not_built(role, f"timm:{name}", error) from error
        del settings["img_size"]  # takes images of any size
    except Exception as error:  # whatever the package says of these sizes
        raise _not_built(role, f"timm:{name}", error) from error
    return timm.create_model(name, pretrained=False, **settings)


def _torchvision(name: str, role: str, num_classes: int | None, channels: int | None) -> nn.Module:
    require("torchvision", f"the {role} torchvision:{name}")
    from torchvision import models

    # Detection and segmentation networks, in submodules, load a backbone's weights.
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(_unknown(role, "torchvision", name, known))
    if channels not in (None, 3):
        raise UserError(f"the {role} torchvision:{name} takes three channels, got {channels}")
    return models.get_model(name, weights=None, **_given(num_classes=num_classes))


def _own(module: str, attribute: str, role: str, settings: dict[str, int | None]) -> nn.Module:
    name = f"{module}:{attribute}"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:  # whatever the user's code raises while it is imported
        raise UserError(
            f"the {role} {name} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UserError(
            f"the {role} {name} must be an nn.Module or a callable that returns one, got "
            f"{type(found).__name__}"
        )
    network = _call(found, settings, name, role)
    if not isinstance(network, nn.Module):
        raise UserError(f"the {role} {name} must return an nn.Module, got {type(network).__name__}")
    return network


def _call(make: Callable[..., Any], settings: dict[str, int | None], name: str, role: str) -> Any:
    try:
        accepted = inspect.signature(make).parameters
        return make(**_given(**{key: settings[key] for key in settings if key in accepted}))
    except Exception as error:  # whatever the user's code raises
        raise _not_built(role, name, error) from error


def _given(**settings: int | None) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _unknown(role: str, package: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"the {role} {package}:{name} is no classifier of {package}{hint}"


def _not_built(role: str, name: str, error: Exception) -> UserError:
    return UserError(
        f"the {role} {name} cannot be built: {type(error).__name__}: {first_line(error)}"
    )


def load_weights(network: nn.Module, path: str | Path, role: str) -> nn.Module:
    """Fills `network` from a file; `role` ("teacher") names it in messages.

    The state dict may lie under a usual key of a checkpoint ("state_dict", "model", ...), and all
    its names may have a prefix, as DataParallel's "module." and torch.compile's "_orig_mod.".

    Args:
        network: filled in place.
        path: safetensors, or a checkpoint that `torch.load(weights_only=True)` reads.

    Returns:
        `network`.

    Raises:
        UserError: the file cannot be read without running code that is in it, or holds the
            weights of another network.
    """
    path = Path(path)
    state = read_state(path, role)
    own = network.state_dict()
    while not state.keys() & own.keys():
        prefixes = {name.partition(".")[0] for name in state}
        if len(prefixes) != 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    # BatchNorm's counter is younger than many a checkpoint, and of no use here.
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    missing, extra = sorted(needed - state.keys()), sorted(state.keys() - own.keys())
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if wrong:
        want, got = list(own[wrong[0]].shape), list(state[wrong[0]].shape)
        detail = f"{wrong[0]} should be {want}, the file has {got}"
    elif missing:
        detail = f"{missing[0]} is missing"
    elif extra:
        detail = f"{extra[0]} is not part of it"
    else:
        network.load_state_dict(state, strict=False)
        return network
    raise UserError(
        f"the weights in {path} do not fit the {role} {type(network).__name__}: {detail}"
    )


def read_state(path: Path, role: str) -> dict[str, Tensor]:
    """The state dict in a file, safetensors or a checkpoint; see `load_weights`."""
    kind = kind_of(path, role)
    if kind == "safetensors":
        return load_tensors(path, role)
    if kind == "checkpoint":
        return _read_checkpoint(path, role)
    raise UserError(
        f"the {role} weights {path} are a whole program; name it as the network itself: "
        f"--{role} {path}"
    )


def _read_checkpoint(path: Path, role: str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch says of a damaged file
        if "Weights only load failed" in str(error):
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = named[1] if named else "the objects in it"
            raise refuse_code(path, role, what) from error
        raise UserError(f"the {role} file {path} cannot be read: {first_line(error)}") from error
    state = _find_state(content, role)
    if state is None:
        raise UserError(
            f"the {role} file {path} holds no state dict, neither by itself nor under one of "
            f"{', '.join((role, *_STATE_KEYS))}"
        )
    return state


def _find_state(content: Any, role: str) -> dict[str, Tensor] | None:
    if not isinstance(content, dict):
        return None
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return content
    for key in (role, *_STATE_KEYS):
        if (state := _find_state(content.get(key), role)) is not None:
            return state
    return None

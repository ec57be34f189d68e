"""Networks without a file of their own: those here, of timm and torchvision, and a user's code."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..data import ImageSize
from ..errors import UserError, first_line, require
from ..models import NETWORKS, build
from .own import imported


class Sizes(NamedTuple):
    """For what a network is built; None leaves its own default. `image_size` is height and width,
    and one number if they are equal."""

    num_classes: int | None = None
    channels: int | None = None
    image_size: ImageSize | None = None


def build_named(name: str, role: str, sizes: Sizes) -> nn.Module:
    """The network that `name` means; its weights are new, unless the user's own code gives it some.

    Raises:
        UserError: there is no such network, it cannot be built for them, or a package is missing.
    """
    source, colon, rest = name.partition(":")
    if name in NETWORKS:
        return build(name, 10 if sizes.num_classes is None else sizes.num_classes, sizes.channels)
    if colon and source in _PACKAGES:
        return _PACKAGES[source](rest, role, sizes)
    if colon:
        return _own(name, role, sizes)
    raise UserError(
        f"unknown {role} {name!r}: name one of {', '.join((*NETWORKS, *OTHERS))}, or a file saved "
        "by torch.export.save"
    )


def knows_nothing(name: str) -> bool:
    """Whether `build_named` gives a network that has learned nothing yet."""
    return name in NETWORKS or name.partition(":")[0] in _PACKAGES


def is_code(name: str) -> bool:
    """Whether `build_named` imports a user's own code for it. A file of that name is no code."""
    source, colon, _ = name.partition(":")
    others = (*_PACKAGES, "transformers")
    return bool(colon) and source not in others and not os.path.exists(name)


def draws_its_weights(network: nn.Module, again: Callable[[], nn.Module]) -> bool:
    """Whether a user's own code, which has returned `network`, gives another one new weights.

    `again` calls it once more, here with another seed. Code that loads weights returns the same
    again, or the network itself.
    """
    with torch.random.fork_rng([]):
        torch.random.default_generator.manual_seed(torch.initial_seed() + 1)
        another = again()
    weights, others = dict(network.named_parameters()), dict(another.named_parameters())
    if any(map(is_lazy, weights.values())):
        return True
    return weights.keys() != others.keys() or any(
        weights[key].shape != others[key].shape or not weights[key].equal(others[key])
        for key in weights
    )


def _timm(name: str, role: str, sizes: Sizes) -> nn.Module:
    require("timm", f"the {role} timm:{name}")
    import timm

    if not timm.is_model(name):  # neither are names that timm would look up on a server
        raise UserError(_unknown(role, "timm", name, timm.list_models()))
    classes, channels, size = sizes
    settings = _given(num_classes=classes, in_chans=channels, img_size=size)
    try:
        return timm.create_model(name, pretrained=False, **settings)
    except TypeError as error:
        if "img_size" not in str(error):
            raise _not_built(role, f"timm:{name}", error) from error
        del settings["img_size"]  # takes images of any size
    except Exception as error:  # whatever the package says of these sizes
        raise _not_built(role, f"timm:{name}", error) from error
    return timm.create_model(name, pretrained=False, **settings)


def _torchvision(name: str, role: str, sizes: Sizes) -> nn.Module:
    require("torchvision", f"the {role} torchvision:{name}")
    from torchvision import models

    # Detection and segmentation networks, in submodules, load a backbone's weights.
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(_unknown(role, "torchvision", name, known))
    if sizes.channels not in (None, 3):
        raise UserError(f"the {role} torchvision:{name} takes three channels, got {sizes.channels}")
    return models.get_model(name, weights=None, **_given(num_classes=sizes.num_classes))


def _own(name: str, role: str, sizes: Sizes) -> nn.Module:
    try:
        found = imported(name)
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
    try:
        accepted = inspect.signature(found).parameters
        classes, channels, size = sizes
        settings = _given(num_classes=classes, channels=channels, in_chans=channels)
        settings |= _given(image_size=size, img_size=size)
        network = found(**{key: value for key, value in settings.items() if key in accepted})
    except Exception as error:  # whatever the user's code raises
        raise _not_built(role, name, error) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"the {role} {name} must return an nn.Module, got {type(network).__name__}")
    return network


def _given(**settings: ImageSize | None) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _unknown(role: str, package: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"the {role} {package}:{name} is no classifier of {package}{hint}"


def _not_built(role: str, name: str, error: Exception) -> UserError:
    what = f"{type(error).__name__}: {first_line(error)}"
    return UserError(f"the {role} {name} cannot be built: {what}")


_PACKAGES = {"timm": _timm, "torchvision": _torchvision}
# What can be named besides `NETWORKS`, for messages.
OTHERS = (
    *(f"{package}:NAME" for package in _PACKAGES), "transformers:FOLDER",
    "package.module:callable", "/path/nets.py:callable",
)  # fmt: skip

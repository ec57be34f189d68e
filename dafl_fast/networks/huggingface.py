"""Reads a folder that `save_pretrained` of the package transformers wrote: `transformers:FOLDER`.

Nothing is downloaded, and no code that lies in such a folder is run.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..convention import Convention
from ..convention import normalisation as checked
from ..errors import UserError, first_line, require
from ..files import read_json, reading

log = logging.getLogger(__name__)

PREFIX = "transformers:"
SPARE = 2**20  # weights that a student may have beyond those in its files
MOST = 2**24  # a number of config.json; with one much larger a network would never be built


def read_transformers(name: str, role: str, fresh: bool = False) -> nn.Module:
    """The image classifier in the folder that `name`, `transformers:FOLDER`, means, in fp32.

    Its attribute `convention` says for which images and classes it is. A student may come without
    weights, which are then new.

    Args:
        role: "teacher", "student" or "model"; only a student may lack weights.
        fresh: leave its weights unread, because others are loaded.

    Raises:
        UserError: there is no such folder, it holds code, pickled weights or no classifier, or the
            package is missing.
    """
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    content = _checked(name, folder, role, fresh)
    require("transformers", f"the {role} {name}")
    import huggingface_hub.constants
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.utils import logging as messages

    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    bar = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()
    missing: list[str] = []
    try:
        # A configuration can name others, which would be looked up on a server.
        with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
            config = AutoConfig.from_pretrained(folder, **safe)
            if fresh or not _weights(folder):
                network = AutoModelForImageClassification.from_config(config)
            else:
                _check_size(AutoModelForImageClassification, config, folder)
                network, info = AutoModelForImageClassification.from_pretrained(
                    folder, config=config, use_safetensors=True, output_loading_info=True, **safe
                )
                missing = sorted(info["missing_keys"])
        convention = _convention(config, content)
    except Exception as error:  # whatever the package says of such a folder
        raise UserError(
            f"the {role} {name} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        if bar:
            messages.enable_progress_bar()
    if missing and role != "student":
        raise UserError(
            f"the {role} {name} is no trained classifier: {folder} has no weights for {missing[0]}"
        )
    if missing:
        log.warning("the student %s has no weights for %s: they are new", name, missing[0])
    network.float().convention = convention
    return network


def normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation per channel, of images in [0, 1], that the folder's image
    processor normalises with; None if there is none."""
    file = folder / "preprocessor_config.json"
    content = _json(file)
    if not {"image_mean", "image_std"} <= content.keys():
        return None
    with reading(file, "file", "is damaged"):
        one = 255 * content.get("rescale_factor", 1 / 255)
        one = one if content.get("do_rescale", True) else 255
        mean, std = content["image_mean"], content["image_std"]
        if not content.get("do_normalize", True):
            mean, std = [0.0] * len(mean), [1.0] * len(std)
        return checked(tuple(value / one for value in mean), tuple(value / one for value in std))


def _checked(name: str, folder: Path, role: str, fresh: bool) -> dict[str, Any]:
    """What config.json in `folder` says, if the folder can be used."""
    if not os.path.isdir(folder):
        raise UserError(
            f"the {role} {name} must name a folder on this machine, as save_pretrained writes it; "
            f"there is none at {folder}, and nothing is downloaded"
        )
    content = _json(folder / "config.json")
    if "model_type" not in content:
        raise UserError(f"the {role} {name} has no config.json that names a model_type")
    if "auto_map" in content:
        raise UserError(
            f"the {role} {name} needs code of its own (auto_map in config.json), which is not run; "
            "export the network with torch.export.save"
        )
    if _largest(content) > MOST:
        raise UserError(
            f"the {role} {name} cannot be: its config.json has the number {_largest(content)}, and "
            f"no size of a network is more than {MOST:,}"
        )
    if content.get("problem_type") not in (None, "single_label_classification"):
        raise UserError(
            f"the {role} {name} is for {content['problem_type']}; only a choice between classes "
            "that exclude each other can be distilled"
        )
    if not (fresh or role == "student" or _weights(folder)):
        raise UserError(
            f"the {role} {name} has no *.safetensors; write it again with "
            "network.save_pretrained(FOLDER, safe_serialization=True)"
        )
    if not fresh and not _weights(folder) and list(folder.glob("*.bin")):
        raise UserError(
            f"the {role} {name} has pickled weights only, which can run any code; write it again "
            "with network.save_pretrained(FOLDER, safe_serialization=True)"
        )
    return {**_json(folder / "preprocessor_config.json"), **content}


def _check_size(kind: Any, config: Any, folder: Path) -> None:
    """Raises ValueError if the network of a configuration cannot have come from the folder's
    weights: it is drawn up without memory first."""
    try:
        with torch.device("meta"):
            count = sum(weight.numel() for weight in kind.from_config(config).parameters())
    except Exception:  # not every network can be drawn up so, and what is wrong shows again
        return
    stored = sum(file.stat().st_size for file in _weights(folder))
    if count > 2 * stored + SPARE:  # a weight takes a byte at least
        raise ValueError(
            f"config.json describes a network of {count:,} weights, and the files of weights have "
            f"{stored:,} bytes"
        )


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _largest(value: Any) -> int:
    """The largest whole number in nested lists and dicts."""
    largest, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, int):
            largest = max(largest, one)
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return largest


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _convention(config: Any, content: dict[str, Any]) -> Convention:
    names = [config.id2label[index] for index in sorted(config.id2label)]
    if names == [f"LABEL_{index}" for index in range(len(names))]:
        names = []  # those that transformers gives where there are none
    size = getattr(config, "image_size", None)
    if size is None:
        cropped = content.get("do_center_crop") and content.get("crop_size")
        size = cropped or content.get("size")
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    shape = None if height is None or width is None else (channels, height, width)
    if shape is not None and not all(isinstance(side, int) and 0 < side < 2**20 for side in shape):
        raise ValueError(f"images of {shape}")
    return Convention("pixel_values", "logits", image_shape=shape, classes=tuple(names))

"""The settings that make a preset and a recipe. They are values: no code asks for a recipe's name.

A preset names the networks and the images; a recipe names the algorithm.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .config import Config
from .data import FORMATS
from .errors import UserError

Values = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """Networks and images of one experiment of the paper, and its settings per recipe."""

    networks: Values
    recipes: dict[str, Values]
    bundled_teacher: str | None = None


# 200 epochs of 120 steps (DAFL-train.py and its README).
_PUBLISHED_MNIST: Values = {"steps": 24_000}

# For networks without BatchNorm, found by measurement on MNIST and two CPU cores with the bundled
# teacher, batches of 128 with another one; see docs/recipes.md.
WITHOUT_BATCH_NORM: Values = {
    "generator_width": 32, "batch_size": 128, "generator_lr": 2e-2, "generator_beta1": 0.5,
    "generator_restart_every": 60,
    "one_hot": 1.0, "entropy": 5.0, "activation": 0.1, "log_base": 10.0, "bn_statistics": 0.0,
    "diversity": 1.0,
    "student_source": "bank", "student_updates": 12, "student_batch_size": 256,
    "student_lr": 4e-3, "student_schedule": "cosine", "temperature": 4.0, "ema_decay": 0.999,
    "bank_images": 400_000, "bank_dtype": "bf16", "bank_crop": 0, "bank_flip": False,
    "bank_held_out": 32, "dead_leaves": 0,
}  # fmt: skip

# Ten classes and a teacher trained with noise need no diversity loss. All else was found with
# batches of 256.
_FAST_MNIST = {
    "max_seconds": 120.0, **WITHOUT_BATCH_NORM, "batch_size": 256, "diversity": 0.0,
    "student_start": "auto",
}  # fmt: skip

# 2000 epochs of 120 steps (DAFL-train.py and its README); CIFAR-100 has other loss weights.
_PUBLISHED_CIFAR10: Values = {
    "steps": 240_000,
    "latent_dim": 1000, "batch_size": 1024, "generator_lr": 0.02,
    "one_hot": 0.05, "entropy": 5.0, "activation": 0.01,
    "student_optimizer": "sgd", "student_lr": 0.1, "student_weight_decay": 5e-4,
    "student_schedule": "multistep",
}  # fmt: skip
_PUBLISHED_CIFAR100 = {**_PUBLISHED_CIFAR10, "one_hot": 0.5, "entropy": 20.0, "activation": 0.1}

# For networks with BatchNorm, whose statistics say more of the data than anything else; found by
# measurement on CIFAR-10 and two CPU cores, see docs/recipes.md.
_FAST_CIFAR: Values = {
    "max_seconds": 600.0,
    "generator_width": 64, "batch_size": 128, "generator_lr": 2e-3, "generator_beta1": 0.5,
    "generator_restart_every": 100,
    "one_hot": 0.5, "entropy": 5.0, "activation": 0.01, "log_base": math.e, "bn_statistics": 1.0,
    "student_start": "auto", "student_source": "bank", "student_after": 5_000,
    "student_updates": 12, "student_batch_size": 128,
    "student_lr": 3e-3, "student_schedule": "cosine", "temperature": 8.0, "ema_decay": 0.998,
    "bank_images": 60_000, "bank_dtype": "uint8", "bank_crop": 4, "bank_flip": True,
    "bank_held_out": 32, "dead_leaves": 6,
}  # fmt: skip


def _preset(networks: Values, fast: Values, published: Values, file: str | None = None) -> Preset:
    paper = {**published, "student_source": "fresh"}
    return Preset(networks, {"fast": fast, "published": published, "paper": paper}, file)


def _images(name: str, num_classes: int = 10) -> Values:
    return {"num_classes": num_classes, "mean": FORMATS[name].mean, "std": FORMATS[name].std}


_MNIST = {**_images("mnist"), "eval": "mnist-5k"}
_LENET = {"teacher": "LeNet5", "student": "LeNet5Half", "image_shape": (1, 32, 32)}
_HINTON = {"teacher": "HintonNet1200", "student": "HintonNet800", "image_shape": (1, 28, 28)}
_RESNET = {"teacher": "ResNet34", "student": "ResNet18", "image_shape": (3, 32, 32)}
PRESETS: dict[str, Preset] = {
    "mnist": _preset(_MNIST | _LENET, _FAST_MNIST, _PUBLISHED_MNIST, "lenet5-mnist.safetensors"),
    # Its teacher has ten megabytes, too many for a bundle.
    "hintonnet": _preset(_MNIST | _HINTON, _FAST_MNIST | {"temperature": 8.0}, _PUBLISHED_MNIST),
    "cifar10": _preset(_images("cifar10") | _RESNET, _FAST_CIFAR, _PUBLISHED_CIFAR10),
    "cifar100": _preset(_images("cifar10", 100) | _RESNET, _FAST_CIFAR, _PUBLISHED_CIFAR100),
    "custom": _preset({"image_shape": None}, _FAST_CIFAR | {"adapt": True}, _PUBLISHED_CIFAR10),
}


def make_config(preset: str = "mnist", recipe: str = "fast", **overrides: Any) -> Config:
    """A Config with the preset's settings for `recipe`, changed by `overrides`.

    A length given as `steps` or `max_seconds` replaces the recipe's own length.

    Raises:
        UserError: an unknown preset, recipe or setting, or a value out of range.
    """
    if preset not in list(PRESETS):  # a list: it may be anything
        raise UserError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    recipes = PRESETS[preset].recipes
    if recipe not in list(recipes):
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(recipes)}")
    unknown = overrides.keys() - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise UserError(f"unknown setting {sorted(unknown)[0]!r}; see --help for all of them")
    values = {**PRESETS[preset].networks, **recipes[recipe]}
    shape, count = overrides.get("image_shape"), len(values.get("mean") or ())
    if isinstance(shape, (tuple, list)) and shape and not overrides.get("grey"):
        if count not in (0, shape[0]):  # the preset's data have other channels
            values |= {"mean": None, "std": None}
    length = {name: overrides.pop(name, None) for name in ("steps", "max_seconds")}
    if any(value is not None for value in length.values()):
        values |= length
    return Config(**{**values, **overrides, "preset": preset, "recipe": recipe})

"""The settings: every one is explained, checked, and told by `--help`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from dafl_fast import train as command
from dafl_fast.config import Config, PresetName, RecipeName
from dafl_fast.engine.folder import RunFolder, check_resumed, read_config
from dafl_fast.errors import UserError
from dafl_fast.recipes import PRESETS, make_config
from dafl_fast.settings import Mark, marked
from dafl_fast.train_teacher import TeacherConfig
from dafl_fast.train_teacher import parse as parse_teacher

NAN, INF = math.nan, math.inf
# A bound, in the words of messages and --help; for each setting under it, what it takes and what
# it does not.
BOUNDS: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    "at least 2 (BatchNorm needs two images)": {
        "batch_size": ([2, 512], [1, 0, -2]),
        "student_batch_size": ([None, 2], [1, 0]),
    },
    "auto, or 1 to 4096": {"threads": (["auto", 1, 64], [0, -1, 4097])},
    "greater than 0 and less than 1": {"images_share": ([1e-9, 0.5], [0.0, 1.0, -0.1])},
    "at least 4 (a quarter is kept)": {"images_candidates": ([None, 4, 256], [3, 0])},
    "0 to 64": {"dead_leaves": ([0, 6, 64], [-1, 65, 10**9])},
    "at least 2": {"num_classes": ([None, 2, 1000], [1, 0])},
    "positive": {
        "steps": ([None, 1], [0, -1]),
        "max_seconds": ([None, 1e-9], [0.0, -1.0]),
        "latent_dim": ([1], [0, -1]),
        "student_updates": ([1], [0, -1]),
        "log_every": ([1], [0, -1]),
        **{
            name: ([1e-9, 5.0], [0.0, -0.1])
            for name in ("generator_lr", "student_lr", "temperature", "save_every")
        },
    },
    "zero or positive": {
        "generator_restart_every": ([0, 1], [-1]),
        "adversarial_after": ([0, 1], [-1]),
        "student_after": ([0, 1], [-1]),
        "bank_images": ([0, 1], [-1]),
        "bank_crop": ([0, 1], [-1]),
        "eval_every": ([0.0, 1.5], [-0.1]),
        "stall_seconds": ([0.0, 1.5], [-0.1]),
        "student_weight_decay": ([0.0, 1.5], [-1e-9]),
        **dict.fromkeys(
            ("one_hot", "entropy", "activation", "bn_statistics", "diversity", "adversarial"),
            ([0.0, 1.5], [-1e-9]),
        ),
    },
    "0 or at least 2": {"bank_held_out": ([0, 2, 32], [1, -1])},
    "in [0, 1)": {
        "ema_decay": ([0.0, 0.999], [-0.1, 1.0, 2.0]),
        "generator_beta1": ([0.0, 0.999], [-0.1, 1.0, 2.0]),
    },
    "between -2^32 and 2^32": {"seed": ([-(2**32), 0, 2**32], [-(2**32) - 1, 2**40])},
    "greater than 1": {"log_base": ([1.01, math.e, 10.0], [1.0, 0.5, -10.0])},
    "an even number of channels": {"generator_width": ([2, 128], [0, -2, 3])},
    "channels (1 to 64), height and width (at least 4 each)": {
        "image_shape": (
            [(1, 4, 4), (64, 224, 224), (3, 28, 30), (1, 48, 192), (3, 640, 480), (2, 9, 13)],
            [(0, 8, 8), (65, 8, 8), (-1, 8, 8), (3, 8, 3), (3, 3, 8), (3, 0, 0), (3, -4, -4)],
        ),
    },
}
NUMBERS = {
    "a whole number": (
        "steps", "seed", "num_classes", "generator_width", "latent_dim", "batch_size",
        "generator_restart_every", "adversarial_after", "student_updates", "student_after",
        "student_batch_size",
        "bank_images", "bank_held_out", "bank_crop", "log_every", "threads",
    ),
    "a finite number": (
        "max_seconds", "generator_lr", "generator_beta1", "one_hot", "entropy", "activation",
        "log_base", "bn_statistics", "diversity", "adversarial", "student_lr",
        "student_weight_decay", "temperature", "ema_decay", "eval_every", "save_every",
        "stall_seconds",
    ),
}  # fmt: skip


def refusal(**settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        Config(**settings)
    return str(raised.value)


def shown(monkeypatch, capsys, parse) -> str:
    """What --help prints, in one line."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(["--help"])
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("words", BOUNDS)
def test_bounds(words):
    for name, (good, bad) in BOUNDS[words].items():
        for value in good:
            assert getattr(Config(**{name: value}), name) == value
        for value in bad:
            flag = "--" + name.replace("_", "-")
            assert refusal(**{name: value}) == f"{flag} must be {words}, got {value}"


@pytest.mark.parametrize("words", NUMBERS)
def test_a_number_is_a_number(words):
    for name in NUMBERS[words]:
        wrong = [
            "3",
            True,
            [1],
            *([1.0, NAN] if words == "a whole number" else [NAN, INF, -INF, 10**400]),
        ]
        for value in wrong:
            flag = "--" + name.replace("_", "-")
            assert refusal(**{name: value}) == f"{flag} must be {words}, got {value!r}"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch_size": None}, "--batch-size must be a whole number, got None"),
        ({"compile": "no"}, "--compile must be true or false, got 'no'"),
        ({"bank_flip": 1}, "--bank-flip must be true or false, got 1"),
        ({"eval": 5}, "--eval must be text, got 5"),
        ({"out_dir": 5}, "--out-dir must be a path, got 5"),
        ({"image_shape": (1, 32)}, "--image-shape must be 3 values, got (1, 32)"),
        ({"image_shape": (1, 32, 32.0)}, "--image-shape must be a whole number, got 32.0"),
        ({"mean": 0.5}, "--mean must be a list of values, got 0.5"),
        ({"std": (0.5, NAN)}, "--std must be a finite number, got nan"),
        ({"preset": "imagenet"}, "--preset must be one of mnist, hintonnet, cifar10, cifar100, "
                                 "custom, got 'imagenet'"),
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"cuda_graph": False}, "--cuda-graph must be one of auto, on, off, got False"),
        ({"student_source": "bank", "batch_size": 8, "bank_images": 7},
         "--bank-images must be at least the batch size, 8, for --student-source bank, got 7"),
        ({"student_updates": 3}, "--student-updates 3 with --student-source same would train on "
                                 "one batch over and over; use --student-source bank or fresh"),
    ],
)  # fmt: skip
def test_mistakes(settings, sentence):
    assert refusal(**settings) == sentence


def test_values_come_in_the_types_of_their_fields():
    config = Config(
        generator_lr=1, batch_size=np.int64(8), temperature=np.float32(2), out_dir="runs/a",
        eval=Path("images.npz"), image_shape=[3, 8, 8], mean=[0, 0.5, 1],
    )  # fmt: skip
    assert yaml.safe_load(yaml.safe_dump([config.generator_lr, config.batch_size])) == [1.0, 8]
    assert [type(value) for value in (config.generator_lr, config.temperature)] == [float, float]
    assert (config.out_dir, config.eval) == (Path("runs/a"), "images.npz")
    assert (config.image_shape, config.mean) == ((3, 8, 8), (0.0, 0.5, 1.0))


def test_the_normalisation_is_one_of_the_images_channels():
    with pytest.raises(UserError, match="--mean and --std are needed to evaluate on real images"):
        _ = Config(mean=(0.5,)).image_format
    with pytest.raises(UserError) as raised:
        _ = Config(mean=(0.5, 0.5), std=(1.0,)).image_format
    assert str(raised.value) == "--mean must be 1 number, got (0.5, 0.5)"
    with pytest.raises(UserError) as raised:
        _ = Config(mean=(0.5,), std=(0.0,)).image_format
    assert str(raised.value) == "--std must be 1 positive number, got (0.0,)"


def test_it_is_looked_at_before_a_run_that_does_not_need_it():
    """Else a student that nobody can evaluate or export is trained to its end."""
    for given in ({"mean": (0.1, 0.2), "std": (0.3,)}, {"mean": (0.1,), "std": (0.3, 0.3)}):
        with pytest.raises(UserError, match="must be 1 (positive )?number, got"):
            make_config("custom", image_shape=(1, 8, 8), **given)
    assert make_config("custom", image_shape=(1, 8, 8), mean=(0.1,), std=(0.3,)).mean == (0.1,)


@pytest.mark.parametrize("kind", [Config, TeacherConfig])
def test_every_setting_has_a_docstring(kind):
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body)
    documented = {
        field.target.id
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert documented == {field.name for field in dataclasses.fields(kind)}


def test_help_tells_bound_and_default_of_every_setting(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, command.parse)
    assert "The preset, when given, comes first" in text
    bounds: dict[str, list[str]] = {}
    for words, names in BOUNDS.items():
        for name in names:
            bounds.setdefault(name, []).append(words)
    pieces = re.split(r"(?<!,) (?=--[a-z0-9-]+(?:, --no-| \{| [A-Z]))", text)
    entries = {piece.split()[0].strip(","): piece for piece in pieces}
    for name, value in vars(make_config()).items():
        entry = entries["--" + name.replace("_", "-")]
        default = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words = "; ".join(bounds.get(name, []))
        ending = (f"Must be {words}. " if words else "") + f"(default: {default})"
        assert re.search(r"[.)] " + re.escape(ending), entry), entry
        assert words or "Must be" not in entry, entry
    assert "--preset {mnist,hintonnet,cifar10,cifar100,custom}" in text


def test_the_teachers_help_tells_its_bounds(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, parse_teacher)
    assert "Train a teacher network on labelled images." in text
    assert "Must be at least 2 (BatchNorm needs two images). (default: 256)" in text
    assert "Passes over the training images. Must be positive. (default: 10.0)" in text


def test_what_may_change_when_a_run_is_resumed():
    assert marked(Config, Mark.RESUMABLE) == {
        "steps", "max_seconds", "out_dir", "resume", "device", "cuda_graph", "compile", "teacher",
        "teacher_weights", "eval", "data_dir", "download", "eval_every", "save_every", "log_every",
        "tensorboard", "stall_seconds", "threads", "trust_run", "trust_teacher", "adapt",
        "images",
    }  # fmt: skip
    assert marked(TeacherConfig, Mark.RESUMABLE) == {
        "data_dir", "download", "eval", "out", "resume", "device", "save_every", "log_every",
        "threads",
    }  # fmt: skip


def test_what_files_leave_out():
    assert marked(Config, Mark.OWN_FOLDER) == {
        "out_dir", "resume", "trust_run", "trust_teacher",
    }  # fmt: skip
    assert marked(Config, Mark.ON_CARD) == {
        "preset", "recipe", "student", "student_weights", "num_classes", "image_shape", "pixels",
        "grey", "mean", "std",
    }  # fmt: skip


def test_every_preset_and_recipe_has_its_settings():
    assert get_args(PresetName) == tuple(PRESETS)
    for preset in PRESETS:
        assert tuple(PRESETS[preset].recipes) == get_args(RecipeName)
        for recipe in get_args(RecipeName):
            config = make_config(preset, recipe)
            assert (config.preset, config.recipe) == (preset, recipe)


def test_a_length_replaces_the_recipes_own():
    def lengths(**settings):
        config = make_config("mnist", "fast", **settings)
        return config.steps, config.max_seconds

    assert lengths() == lengths(steps=None, max_seconds=None) == (None, 120.0)
    assert lengths(steps=5) == (5, None)
    assert lengths(steps=5, max_seconds=3) == (5, 3.0)
    with pytest.raises(UserError, match="--steps must be positive, got 0"):
        lengths(steps=0)


def test_a_configuration_is_read_as_it_was_written(tmp_path):
    config = make_config("cifar10", teacher="t.safetensors", data_dir="data", out_dir=tmp_path)
    RunFolder(tmp_path).write_config(config)
    assert Config(**read_config(tmp_path), out_dir=tmp_path) == config
    check_resumed(dataclasses.replace(config, resume=tmp_path, steps=3, save_every=1.0))


# As a run of 0.1.0.dev wrote it, shortened.
WRITTEN = """\
preset: mnist
recipe: fast
steps: null
max_seconds: 120.0
cuda_graph: auto
compile: false
teacher: LeNet5
teacher_weights: null
num_classes: 10
image_shape:
- 1
- 32
- 32
mean:
- 0.1307
std:
- 0.3081
batch_size: 256
generator_lr: 0.02
student_source: bank
bank_images: 400000
data_dir: null
"""


def test_a_configuration_of_the_current_format(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(WRITTEN)
    config = command.parse(["--resume", str(tmp_path)])
    assert (config.image_shape, config.mean, config.generator_lr) == ((1, 32, 32), (0.1307,), 0.02)
    for line, sentence in (
        ("generator_lr: 2e-2", "--generator-lr must be a finite number, got '2e-2'"),
        ("batch_size: 256.0", "--batch-size must be a whole number, got 256.0"),
        ("cuda_graph: off", "--cuda-graph must be one of auto, on, off, got False"),
    ):
        name = line.split(":")[0]
        file.write_text(re.sub(f"^{name}: .*$", line, WRITTEN, flags=re.M))
        with pytest.raises(UserError) as raised:
            command.parse(["--resume", str(tmp_path)])
        assert str(raised.value) == f"--resume: {sentence}"

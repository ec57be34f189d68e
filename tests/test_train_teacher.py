"""Teacher training: it learns, it resumes exactly, and its augmentation is what it says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dafl_fast import data
from dafl_fast import train_teacher as command
from dafl_fast.engine.lock import locked
from dafl_fast.engine.schedule import one_cycle
from dafl_fast.errors import TrainingStopped, UserError
from dafl_fast.models import build
from dafl_fast.networks import load_weights, open_file
from dafl_fast.train_teacher import TeacherConfig, Training, make_config, parse, train


def quadrants(path: Path, count: int, channels: int = 3, seed: int = 0) -> str:
    """An .npz of noisy 12x12 images: in those of class k the k-th quadrant is brighter."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 4, count)
    images = draw.integers(0, 180, (count, 12, 12, channels))
    for image, label in zip(images, labels, strict=True):
        top, left = 6 * (label // 2), 6 * (label % 2)
        image[top : top + 6, left : left + 6] += 35
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return str(path)


def tiny(folder: Path, **overrides) -> TeacherConfig:
    settings = dict(
        network="ResNet8", data=quadrants(folder / "train.npz", 256), batch_size=32, lr=0.05,
        epochs=4, flip=False, shift=1, noise=0.1, ema_decay=0.9, out=folder / "t.safetensors",
        device="cpu", precision="fp32",
    )  # fmt: skip
    return make_config("imagefolder", **{**settings, **overrides})


def test_it_learns_and_writes_what_it_learned(tmp_path, capsys):
    test = quadrants(tmp_path / "test.npz", 200, seed=1)
    note = train(tiny(tmp_path, epochs=8, eval=test))
    accuracy = note["accuracy"][test]
    assert accuracy >= 0.9  # chance is 0.25
    assert json.loads((tmp_path / "t.json").read_text()) == json.loads(json.dumps(note))
    expected = {"network": "ResNet8", "num_classes": 4, "channels": 3, "image_size": 12,
                "training_images": 256, "epochs": 8.0}  # fmt: skip
    assert {name: note[name] for name in expected} == expected
    assert "100%  epoch 8.0: loss" in capsys.readouterr().out
    assert not (tmp_path / "t.checkpoint").exists()

    # The accuracy is that of the weights that were saved, on images normalised as the note says.
    network = load_weights(build("ResNet8", 4), tmp_path / "t.safetensors", "teacher").eval()
    images, labels, _ = data.load(test, "test")
    mean, std = (np.float32(note[name]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        classes = network((images / 255 - torch.from_numpy(mean)) / torch.from_numpy(std)).argmax(1)
    assert (classes == labels).float().mean().item() == pytest.approx(accuracy, abs=0.006)


def test_it_learns_from_a_folder_of_images_in_bf16(tmp_path):
    draw = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for name, hue in (("reddish", (90, 0, 0)), ("greenish", (0, 90, 0))):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = draw.integers(0, 160, (10 + number % 3, 14, 3)) + hue
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.png")
    note = train(
        tiny(tmp_path, data="imagefolder", data_dir=tmp_path / "pictures", image_size=8,
             network="WRN-16-1", epochs=6, batch_size=16, precision="bf16", flip=True)
    )  # fmt: skip
    assert note["classes"] == ("greenish", "reddish")
    assert note["image_size"] == 8
    assert note["accuracy"]["imagefolder"] >= 0.9  # chance is 0.5


def test_images_need_not_be_square(tmp_path):
    draw = np.random.default_rng(0)
    labels = np.arange(64) % 2
    images = draw.integers(0, 99, (64, 9, 14, 3)) + 99 * labels[:, None, None, None]
    np.savez(tmp_path / "wide.npz", images=images.astype(np.uint8), labels=labels)
    settings = dict(data=str(tmp_path / "wide.npz"), batch_size=16, epochs=1)
    note = train(tiny(tmp_path, **settings))
    assert note["image_size"] == (9, 14)
    assert open_file(tmp_path / "t.safetensors", "teacher").image_size == (9, 14)
    assert train(tiny(tmp_path, **settings, image_size=(8, 12)))["image_size"] == (8, 12)
    assert parse(["imagefolder", "--image-size", "8", "12"]).image_size == (8, 12)
    assert parse(["imagefolder", "--image-size", "8"]).image_size == 8
    with pytest.raises(UserError, match=r"--image-size must be positive, got \(8, 0\)"):
        tiny(tmp_path, image_size=(8, 0))


def test_mnist_teacher_without_the_held_out_images(tmp_path, data_dir):
    note = train(
        make_config(
            "mnist",
            exclude="mnist-5k",
            data_dir=data_dir,
            epochs=0.3,
            out=tmp_path / "t.safetensors",
        )
    )
    assert note["training_images"] == 55_000
    assert note["accuracy"].keys() == {"mnist", "mnist-5k"}
    assert min(note["accuracy"].values()) > 0.8  # chance is 0.1; 11,000 images seen
    assert (note["mean"], note["std"], note["image_size"]) == ((0.1307,), (0.3081,), 32)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_training_gives_the_identical_network(tmp_path, monkeypatch, optimizer):
    settings = dict(optimizer=optimizer, lr=0.01, log_every=2, save_every=1e-9)
    train(tiny(tmp_path, **settings, out=tmp_path / "whole.safetensors"))
    step = Training._step

    def dying_at(death: int):
        def dying(self, index):
            if self.steps == death:
                raise Killed
            return step(self, index)

        return dying

    for death, resume in ((7, False), (8, True), (29, True)):  # 8 steps an epoch, 32 in all
        monkeypatch.setattr(Training, "_step", dying_at(death))
        with pytest.raises(Killed):
            train(tiny(tmp_path, **settings, resume=resume))
    monkeypatch.setattr(Training, "_step", step)
    train(tiny(tmp_path, **settings, resume=True))
    whole, parts = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "t"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_kill_9_and_resume_from_the_command_line(tmp_path):
    arguments = [
        "imagefolder", "--network", "ResNet8", "--data", quadrants(tmp_path / "train.npz", 256),
        "--batch-size", "32", "--epochs", "15", "--device", "cpu", "--precision", "fp32",
    ]  # fmt: skip
    train(parse([*arguments, "--out", str(tmp_path / "whole.safetensors")]))
    arguments += ["--out", str(tmp_path / "t.safetensors")]
    often = ["--log-every", "1", "--save-every", "1e-9"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dafl_fast.train_teacher", *arguments, *often],
        stdout=subprocess.DEVNULL,
    )
    while not (tmp_path / "t.checkpoint").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    note = train(parse([*arguments, "--resume"]))
    assert note["epochs"] == 15
    whole, parts = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "t"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_a_training_goes_on_on_another_kind_of_device(tmp_path):
    """Whose random numbers have a state of another size: on a GPU it is 16 bytes."""
    train(tiny(tmp_path))
    config = tiny(tmp_path, resume=True)
    training = training_of(config)
    elsewhere = {**training.state_dict(), "random": torch.zeros(16, dtype=torch.uint8)}
    torch.save(elsewhere, tmp_path / "t.checkpoint")
    (tmp_path / "t.safetensors").unlink()
    train(config)
    assert (tmp_path / "t.safetensors").exists()


def test_a_teacher_is_trained_by_one_process_at_a_time(tmp_path):
    (tmp_path / "new").mkdir()
    config = tiny(tmp_path / "new")
    with locked(tmp_path / "new" / ".t.safetensors.lock", "another is being trained"):
        said = f"the teacher {config.out} is being trained by process {os.getpid()} on this machine"
        with pytest.raises(UserError, match=re.escape(said)):
            train(config)
        assert not config.out.exists()
    train(config)
    assert {path.name for path in config.out.parent.iterdir()} == {
        "t.safetensors", "t.json", "train.npz"
    }  # fmt: skip


def test_resume_wants_its_own_checkpoint(tmp_path):
    config = tiny(tmp_path, resume=True)
    with pytest.raises(UserError, match=r"there is no checkpoint .*t\.checkpoint"):
        train(config)
    training = training_of(config)
    torch.save({**training.state_dict()}, tmp_path / "t.checkpoint")
    with pytest.raises(
        UserError, match="--lr cannot change when resuming: the checkpoint has 0.05"
    ):
        train(tiny(tmp_path, resume=True, lr=0.06))


def training_of(config: TeacherConfig) -> Training:
    images, labels, _ = data.load(config.data, "train")
    form = data.Format(12, 3, (0.3, 0.4, 0.5), (0.2, 0.25, 0.3))
    torch.manual_seed(config.seed)
    return Training(build(config.network, 4), images, labels, form, config)


def test_a_length_in_seconds_is_kept(tmp_path):
    training = training_of(tiny(tmp_path, max_seconds=0.5, epochs=None))
    training.run(tmp_path / "checkpoint")
    assert 0.5 <= training.seconds < 1.5
    assert training.steps > 1
    # What comes first ends the training.
    training = training_of(tiny(tmp_path, max_seconds=100, epochs=0.5))
    training.run(tmp_path / "checkpoint")
    assert training.steps == 4


def test_batches_are_crops_mirrored_and_normalised(tmp_path):
    """Against NumPy, from the same random numbers."""
    training = training_of(tiny(tmp_path, shift=2, flip=True, noise=0.5, seed=7))
    index = torch.tensor([3, 200, 17, 3, 90])
    got = training._batch(index)
    draw = torch.Generator().manual_seed(7)
    moves = torch.randint(0, 5, (2, 5), generator=draw).tolist()
    mirrored = torch.randint(0, 2, (5, 1, 1, 1), generator=draw).flatten().tolist()
    noise = torch.randn(5, 3, 12, 12, generator=draw)
    assert 0 < sum(mirrored) < 5
    assert len({*moves[0], *moves[1]}) > 2
    images = np.load(training.config.data)["images"]
    for place, number in enumerate(index.tolist()):
        dy, dx = moves[0][place], moves[1][place]
        image = np.pad(images[number], ((2, 2), (2, 2), (0, 0)), "reflect")
        image = image[dy : dy + 12, dx : dx + 12]
        image = image[:, ::-1] if mirrored[place] else image
        expected = (image / 255 - [0.3, 0.4, 0.5]) / [0.2, 0.25, 0.3]
        torch.testing.assert_close(
            got[place].double() - 0.5 * noise[place],
            torch.from_numpy(expected).permute(2, 0, 1),
            atol=1e-5,
            rtol=0,
        )


def test_every_epoch_sees_every_image_once_in_a_new_order(tmp_path):
    training = training_of(tiny(tmp_path))
    first, second = training._order(0), training._order(1)
    assert first.sort().values.tolist() == list(range(256))
    assert second.sort().values.tolist() == list(range(256))
    assert not torch.equal(first, second)
    assert torch.equal(first, training._order(0))


def test_one_cycle_rises_and_falls():
    assert one_cycle(0) == pytest.approx(0.04)
    assert one_cycle(0.1) == pytest.approx(0.52)
    assert one_cycle(0.2) == pytest.approx(1)
    assert one_cycle(0.6) == pytest.approx(0.5)
    assert one_cycle(1) == pytest.approx(0)


def test_the_first_step_is_the_optimizers(tmp_path):
    """SGD with Nesterov momentum moves first by lr (1 + 0.9) (gradient + decay)."""
    config = tiny(tmp_path, shift=0, noise=0, weight_decay=0.01, epochs=1, label_smoothing=0.1)
    training, witness = training_of(config), training_of(config).network
    index = training._order(0)[:32]
    logits = witness(training._batch(index))
    target = 0.9 * nn.functional.one_hot(training.labels[index], 4) + 0.1 / 4
    loss = -(target * logits.log_softmax(1)).sum(1).mean()
    loss.backward()
    before = witness.linear.weight.detach().clone()
    for group in training.optimizer.param_groups:
        group["lr"] = 0.02
    got = training._step(index)
    assert got[0].item() == pytest.approx(loss.item(), rel=1e-5)
    expected = before - 0.02 * 1.9 * (witness.linear.weight.grad + 0.01 * before)
    torch.testing.assert_close(training.network.linear.weight, expected, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_it(tmp_path):
    with pytest.raises(TrainingStopped, match="the loss is not finite at step"):
        train(tiny(tmp_path, lr=1e30, log_every=3))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["imagenet"], "unknown preset 'imagenet': choose one of mnist, hintonnet, cifar10"),
        (["cifar10", "--network", "VGG11"], "unknown network 'VGG11': choose one of LeNet5"),
        (["cifar10", "--data-dir", "nowhere"], "CIFAR-10 was not found in nowhere"),
        (["imagefolder", "--data-dir", "nowhere"], "the image folder nowhere does not exist"),
        (["imagefolder", "--data-dir", "."], "there are no images in ."),
        (["mnist", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["mnist", "--ema-decay", "1"], "--ema-decay must be in [0, 1), got 1.0"),
        (["cifar10", "--shift", "40", "--data", "data.npz"], "--shift must be smaller than"),
        (["mnist", "--data", "data.npz"], "the network LeNet5 takes images of one channel, got 3"),
        (["cifar10", "--data", "data.npz", "--eval", "grey.npz"], "the images have 1 channel(s)"),
        (["cifar10", "--data", "data.npz", "--eval", "five.npz"], "the data have label 4"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, tmp_path, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    quadrants(tmp_path / "data.npz", 40)
    quadrants(tmp_path / "grey.npz", 8, channels=1)
    images = np.zeros((1, 12, 12, 3), np.uint8)
    np.savez(tmp_path / "five.npz", images=images, labels=np.array([4]))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["train_teacher", *arguments, "--epochs", "1"])
    assert command.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_line_chooses_the_presets_defaults():
    config = parse(["cifar100", "--lr", "0.3"])
    assert (config.network, config.data, config.lr, config.flip) == (
        "ResNet34", "cifar100", 0.3, True,
    )  # fmt: skip
    assert (config.epochs, config.max_seconds) == (60, None)
    config = parse(["cifar10", "--max-seconds=9"])
    assert (config.epochs, config.max_seconds) == (None, 9.0)
    config = parse(["mnist", "--max-seconds", "9", "--epochs", "3"])
    assert (config.epochs, config.max_seconds) == (3.0, 9.0)
    assert parse([]) == make_config("mnist")


def test_statistics_are_those_of_images_as_they_are(tmp_path):
    """Not of shifted and noisy ones: nobody will ask the teacher about those."""
    training = training_of(tiny(tmp_path, noise=3.0, shift=2, epochs=10))
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
    for epoch in range(10):
        for index in training._order(epoch).split(32):
            training._step(index)
    images = np.load(training.config.data)["images"]
    plain = (images / 255 - [0.3, 0.4, 0.5]) / [0.2, 0.25, 0.3]
    x = torch.from_numpy(plain).float().permute(0, 3, 1, 2)
    hidden = training.average.module.conv1(x)
    norm = training.average.module.bn1
    torch.testing.assert_close(norm.running_mean, hidden.mean((0, 2, 3)), rtol=0.05, atol=0.02)
    torch.testing.assert_close(norm.running_var, hidden.var((0, 2, 3)), rtol=0.05, atol=0.0)
    assert (training.network.bn1.running_var > 3 * norm.running_var).all()

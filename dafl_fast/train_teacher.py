"""`python -m dafl_fast.train_teacher mnist`: a teacher trained on real, labelled images.

Only for making teachers to try the package with; whoever brings a teacher never needs this. The
images stay on the device as uint8 and are cropped, flipped and normalised there, batch by batch.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from . import data
from .data import ImageSize
from .device import keep_freed_memory, pick_device, pick_precision, pick_threads, threads
from .engine.ema import Average
from .engine.evaluation import accuracy
from .engine.layout import use_channels_last
from .engine.lock import locked
from .engine.schedule import one_cycle
from .errors import TrainingStopped, UserError, command
from .files import (
    check_destination,
    load_checkpoint,
    reading,
    remove_leftovers,
    save_checkpoint,
    save_weights,
    write_json,
)
from .models import GREY_SIZES, NETWORKS
from .networks import load_network
from .settings import (
    BATCH,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    THREADS,
    Bound,
    Mark,
    check,
    check_unchanged,
    from_arguments,
    plain,
)

SIZE = Bound("positive", lambda size: min(data.sides(size)) > 0)


@dataclass(frozen=True)
class TeacherConfig:
    """Train a teacher network on labelled images. The first argument chooses the other defaults."""

    preset: tyro.conf.Positional[str] = "mnist"
    """mnist, hintonnet, cifar10, cifar100, or imagefolder (any images of your own)."""
    network: str = "LeNet5"
    """The network by its name: LeNet5, HintonNet1200, ResNet34, ResNet20, WRN-40-2, ..."""

    # --- data ---------------------------------------------------------------------------------
    data: str = "mnist"
    """Training images: mnist, fashion-mnist, usps, cifar10, cifar100; the path of a folder,
    <class>/*.jpg or train/<class>/*.jpg and test/<class>/*.jpg; the path of an .npz file with
    'images' and 'labels'; or imagefolder, which is the folder --data-dir."""
    data_dir: Annotated[Path | None, Mark.RESUMABLE] = None
    """Where the data lie, in torchvision's layout; default: the environment variable DAFL_DATA."""
    download: Annotated[bool, Mark.RESUMABLE] = False
    """Allow torchvision to download into --data-dir."""
    exclude: Literal["none", "mnist-5k"] = "none"
    """Leave these images out of training, so that they stay held out."""
    eval: Annotated[str | None, Mark.RESUMABLE] = None
    """Images on which the finished teacher is evaluated, named as in --data, or none; the test
    split of --data, if there is one, when not given."""
    image_size: Annotated[ImageSize | None, SIZE] = None
    """Height and width that images are brought to, or one number for both; their own, or the
    network's, when not given."""

    # --- where and how long -------------------------------------------------------------------
    out: Annotated[Path, Mark.RESUMABLE] = Path("teacher.safetensors")
    """Where the weights go; a note with the same name and the ending .json is written beside, and
    while training runs a .checkpoint."""
    resume: Annotated[bool, Mark.RESUMABLE] = False
    """Go on from the checkpoint beside --out that an interrupted training left."""
    epochs: Annotated[float | None, POSITIVE] = 10
    """Passes over the training images."""
    max_seconds: Annotated[float | None, POSITIVE] = None
    """Stop after this many seconds of training; saving and evaluation are not counted."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Mark.RESUMABLE] = "auto"
    """auto: the GPU when there is one."""
    threads: Annotated[Literal["auto"] | int, THREADS, Mark.RESUMABLE] = "auto"
    """Threads of the CPU. auto: one for each core, or as OMP_NUM_THREADS says."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network. auto: bf16 where the processor has it."""
    seed: Annotated[int, SEED] = 0
    """Seed of initialisation, order and augmentation."""
    save_every: Annotated[float, POSITIVE, Mark.RESUMABLE] = 20.0
    """Seconds of training between checkpoints."""
    log_every: Annotated[int, POSITIVE, Mark.RESUMABLE] = 50
    """Steps between two looks at the losses; the device is never waited for in between."""

    # --- optimization -------------------------------------------------------------------------
    batch_size: Annotated[int, BATCH] = 256
    """Images per update."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    lr: Annotated[float, POSITIVE] = 2e-3
    """Peak of the one-cycle learning rate."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight decay of all parameters."""
    label_smoothing: Annotated[float, BELOW_ONE] = 0.0
    """Share of the target probability that is spread over all classes. It makes a teacher less
    teachable (docs/teachers.md), therefore none by default."""
    ema_decay: Annotated[float, BELOW_ONE] = 0.998
    """Decay of the moving average of the weights that is saved."""

    # --- augmentation -------------------------------------------------------------------------
    shift: Annotated[int, NOT_NEGATIVE] = 0
    """Images are moved by up to this many pixels in each direction (a random crop after padding
    by reflection)."""
    flip: bool = False
    """Mirror every other image, left to right."""
    noise: Annotated[float, NOT_NEGATIVE] = 1.0
    """Standard deviation of Gaussian noise added to images, in normalised units. A teacher that
    has seen noise teaches better without data (docs/teachers.md)."""

    def __post_init__(self) -> None:
        check(self)
        if self.network not in NETWORKS:
            names = ", ".join(NETWORKS)
            raise UserError(f"unknown network {self.network!r}: choose one of {names}")
        if self.out.suffix.lower() in (".checkpoint", ".json"):
            raise UserError(
                f"--out must not end in {self.out.suffix}, as what is written beside the weights "
                f"does; name them {self.out.with_suffix('.safetensors')}"
            )
        if self.epochs is None and self.max_seconds is None:
            raise UserError("say how long to train: --epochs or --max-seconds")


MEASURED = 8  # steps between two measurements of the average's BatchNorm statistics
# Images of natural things: crops and flips show the network what it would see anyway. The learning
# rate is 0.8 per 1,000 images of a batch, as usual for SGD on CIFAR.
_COLOUR: dict[str, Any] = {
    "network": "ResNet34", "epochs": 60, "optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-4,
    "shift": 4, "flip": True, "noise": 0.0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "mnist": {},
    "hintonnet": {"network": "HintonNet1200"},
    "cifar10": {**_COLOUR, "data": "cifar10"},
    "cifar100": {**_COLOUR, "data": "cifar100"},
    "imagefolder": {**_COLOUR, "data": "imagefolder", "network": "ResNet18"},
}
# The presets' normalisations; that of other images is measured.
_FORMATS = {**data.FORMATS, "hintonnet": data.FORMATS["mnist"]}
# From images [N, C, H, W] in normalised units, the network's logits [N, classes] and the labels [N]
# to the loss, and to the share of answers that are right.
Objective = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def make_config(preset: str = "mnist", **overrides: Any) -> TeacherConfig:
    """A TeacherConfig with the preset's defaults, changed by `overrides`.

    A length given as `max_seconds` replaces the preset's epochs.

    Raises:
        UserError: an unknown preset, or a value out of range.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if "max_seconds" in overrides:
        overrides.setdefault("epochs", None)
    return TeacherConfig(**{**PRESETS[preset], **overrides, "preset": preset})


class Training:
    """A fresh network in training on images [N, C, H, W] uint8 and labels [N] int64.

    All that moves is in `state_dict`, so that it can be resumed exactly. `form` is the images'
    normalisation, `objective` cross-entropy with the labels if None.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        form: data.Format,
        config: TeacherConfig,
        objective: Objective | None = None,
    ) -> None:
        self.config = config
        self.objective = objective or self._cross_entropy
        self.device = pick_device(config.device)
        self.bf16 = pick_precision(config.precision, self.device) == "bf16"
        self.network = network.to(self.device).train()
        example = data.Normaliser(form)(images[:4]).to(self.device)
        use_channels_last(self.network, example, "network", trained=True)
        self.average = Average(self.network, config.ema_decay, example)
        settings: dict[str, Any] = dict(lr=config.lr, weight_decay=config.weight_decay, fused=True)
        weights = self.network.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(weights, momentum=0.9, nesterov=True, **settings)
            if config.optimizer == "sgd"
            else torch.optim.AdamW(weights, **settings)
        )
        size = tuple(images.shape[2:])
        if config.shift >= min(size):
            raise UserError(f"--shift must be smaller than the image, got {config.shift}")
        padded = F.pad(images, (config.shift,) * 4, mode="reflect")
        padded = padded.to(self.device, memory_format=torch.channels_last)
        # [N, C, 2 shift + 1, 2 shift + 1, H, W]: every crop of every image, as a view.
        self.crops = padded.unfold(2, size[0], 1).unfold(3, size[1], 1)
        self.labels = labels.to(self.device)
        self.normaliser = data.Normaliser(form).to(self.device)
        self.batch_size = min(config.batch_size, len(images))
        self.steps_per_epoch = len(images) // self.batch_size
        self.random = torch.Generator(self.device).manual_seed(config.seed)
        self.steps = 0
        self.seconds = 0.0

    def run(self, checkpoint: Path) -> None:
        """Trains to the end, saving to `checkpoint` now and then; raises TrainingStopped when the
        loss is not finite."""
        config = self.config
        start = time.perf_counter() - self.seconds
        saved = printed = self.seconds
        since, order, seen = self.steps, Tensor(), torch.zeros(2, device=self.device)
        while (done := self._done()) < 1:
            epoch, place = divmod(self.steps, self.steps_per_epoch)
            if place == 0 or not len(order):
                order = self._order(epoch)
            index = order[place * self.batch_size : (place + 1) * self.batch_size]
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * one_cycle(done)
            seen += self._step(index)
            self.seconds = time.perf_counter() - start
            if self.steps % config.log_every and self._done() < 1:
                continue
            loss, right = (seen / (self.steps - since)).tolist()
            self.seconds = time.perf_counter() - start
            if not math.isfinite(loss):
                raise TrainingStopped(
                    f"the loss is not finite at step {self.steps}; try a lower --lr"
                )
            if self.seconds - printed >= 5 or self._done() >= 1:
                print(
                    f"{self.seconds:7.1f} s  {self._done():4.0%}  epoch "
                    f"{self.steps / self.steps_per_epoch:.1f}: loss {loss:.4f}, right {right:.2%}, "
                    f"{self.steps * self.batch_size / self.seconds:,.0f} images/s",
                    flush=True,
                )
                printed = self.seconds
            since = self.steps
            seen.zero_()
            if self.seconds - saved >= config.save_every:
                save_checkpoint(checkpoint, self.state_dict())
                start = time.perf_counter() - self.seconds  # saving is not training
                saved = self.seconds

    def _done(self) -> float:
        """Share of the training that is behind us, by epochs or by time, whichever is further."""
        done = [0.0]
        if self.config.epochs is not None:
            total = max(1, round(self.config.epochs * self.steps_per_epoch))
            done.append(self.steps / total)
        if self.config.max_seconds is not None:
            done.append(self.seconds / self.config.max_seconds)
        return max(done)

    def _order(self, epoch: int) -> Tensor:
        """The order of the images in that epoch, the same in a resumed training."""
        draw = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.labels), generator=draw).to(self.device)

    def _batch(self, index: Tensor) -> Tensor:
        """Images number `index` [N], augmented and in normalised units: [N, C, H, W] fp32."""
        config, n = self.config, len(index)
        draw: dict[str, Any] = {"device": self.device, "generator": self.random}
        dy, dx = torch.randint(0, 2 * config.shift + 1, (2, n), **draw)
        x = self.crops[index, :, dy, dx]
        if config.flip:
            coin = torch.randint(0, 2, (n, 1, 1, 1), **draw).bool()
            x = torch.where(coin, x.flip(3), x)
        x = self.normaliser(x)
        if config.noise:
            x.add_(torch.randn(x.shape, **draw), alpha=config.noise)
        return x

    def _cross_entropy(self, x: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)
        return loss, (logits.detach().argmax(1) == y).float().mean()

    def _step(self, index: Tensor) -> Tensor:
        """One update with the images number `index`; returns [loss, share of right answers]."""
        x, y = self._batch(index), self.labels[index]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.network(x)
        loss, right = self.objective(x, logits.float(), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.ramp(self.steps, self.steps // MEASURED)
        self.average.update(self.network)
        if self.average.layers and self.steps % MEASURED == 0:
            # On images as they are when the network is used.
            plain = self.crops[index, :, self.config.shift, self.config.shift]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                self.average.measure(self.normaliser(plain))
        self.steps += 1
        return torch.stack([loss.detach(), right])

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs."""
        return {
            "settings": plain(self.config, without=Mark.RESUMABLE),
            "network": self.network.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint; raises UserError if it is damaged or had other settings."""
        state = load_checkpoint(path)
        with reading(path, "checkpoint", "is damaged"):
            self.load_state_dict(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; raises UserError if that had other settings, and
        anything if it is damaged."""
        check_unchanged(state["settings"], self.config, " when resuming: the checkpoint has")
        self.network.load_state_dict(state["network"])
        self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        random = state["random"]
        if random.shape != self.random.get_state().shape:  # of another kind of device
            random = self.random.manual_seed(self.config.seed + state["steps"]).get_state()
        self.random.set_state(random)
        for parameter, kept in self.optimizer.state.items():
            for value in kept.values():
                if value.dim() and value.shape != parameter.shape:
                    raise ValueError("the optimizer's state is of other weights")
        self.steps, self.seconds = state["steps"], float(state["seconds"])
        if type(self.steps) is not int or self.steps < 0 or not 0 <= self.seconds < math.inf:
            raise ValueError("its steps or seconds")


def train(config: TeacherConfig) -> dict[str, Any]:
    """Trains (or resumes) the teacher that `config` describes, writes it, and returns its note.

    Raises:
        UserError: something in `config`, the data or the checkpoint is not usable.
        TrainingStopped: the loss is not finite.
    """
    check_destination(config.out)  # not after an hour
    lock = config.out.with_name(f".{config.out.name}.lock")
    with locked(lock, f"the teacher {config.out} is being trained"):
        return _train(config)


def _train(config: TeacherConfig) -> dict[str, Any]:
    keep_freed_memory()
    grey = config.network in GREY_SIZES or config.preset in ("mnist", "hintonnet")
    known = _FORMATS.get(config.preset)
    size = config.image_size or GREY_SIZES.get(config.network)
    size = known.image_size if size is None and known else size
    reading = (config.data_dir, config.download, size, 1 if grey else 3)
    images, labels, classes = data.load(config.data, "train", *reading)
    names = [config.eval, config.exclude]
    if config.eval is None and data.has_test_split(config.data, config.data_dir):
        names[0] = config.data
    held_out = {n: data.load(n, "test", *reading) for n in names if n and n != "none"}
    if config.exclude != "none":
        images, labels = data.without(images, labels, held_out[config.exclude].images)
    if size is None:
        size = data.size_of(*images.shape[2:])
    images = data.resized(images, size)
    mean, std = (known.mean, known.std) if known else data.statistics(images)
    form = data.Format(size, images.shape[1], mean, std)
    for x, y, _ in held_out.values():
        data.check_channels(x, form.channels)
        data.check_labels(y, len(classes))

    torch.manual_seed(config.seed)
    network = load_network(
        config.network, role="teacher", num_classes=len(classes), channels=form.channels
    )
    training = Training(network, images, labels, form, config)
    checkpoint = config.out.with_suffix(".checkpoint")
    remove_leftovers(config.out, config.out.with_suffix(".json"), checkpoint)
    if config.resume:
        training.restore(checkpoint)
    print(f"{config.network} on {len(images):,} images of {len(classes)} classes", flush=True)
    with threads(pick_threads(config.threads)):
        training.run(checkpoint)
    network = training.average.module
    whole = nn.Sequential(training.normaliser, network)
    note = {
        "network": config.network,
        "num_classes": len(classes),
        "classes": classes,
        "image_size": form.image_size,
        "channels": form.channels,
        "mean": form.mean,
        "std": form.std,
        "command": " ".join(["python -m dafl_fast." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "seed": config.seed,
        "torch": torch.__version__,
        "training_images": len(images),
        "epochs": round(training.steps / training.steps_per_epoch, 2),
        "train_seconds": round(training.seconds, 1),
        "accuracy": {
            name: accuracy(whole, data.resized(x, size), y) for name, (x, y, _) in held_out.items()
        },
    }
    save_weights(config.out, network.state_dict())
    write_json(config.out.with_suffix(".json"), note)
    checkpoint.unlink(missing_ok=True)
    return note


def parse(arguments: list[str]) -> TeacherConfig:
    """The TeacherConfig for a command line: the preset chooses the defaults of all the rest."""
    preset = arguments[0] if arguments and not arguments[0].startswith("-") else "mnist"
    flags = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    timed = {"max_seconds": 60.0} if "--max-seconds" in flags else {}  # 60 stands for what is given
    default = make_config(preset, **timed)
    return from_arguments(TeacherConfig, default, arguments, "python -m dafl_fast.train_teacher")


@command
def main() -> None:
    print(json.dumps(train(parse(sys.argv[1:])), indent=2))


if __name__ == "__main__":
    sys.exit(main())

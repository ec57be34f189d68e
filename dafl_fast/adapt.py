"""Which settings suit a teacher that nobody has tuned them for?

Only settings that stand as the recipe has them are changed, and each choice is said in one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Collection
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .data import Normaliser
from .device import pick_threads, threads
from .engine.distributed import World
from .engine.estimate import FEW_CLASSES
from .engine.evaluation import buffers_kept, evaluation_mode, predictions
from .engine.fold import input_of, thaw_batch_norm
from .engine.outputs import as_classifier, reading_of
from .engine.prepare import random_images
from .engine.teacher import hides_batch_norm, layers_with_statistics
from .losses import batch_norm_loss
from .models.twin import duplicate
from .recipes import WITHOUT_BATCH_NORM, make_config
from .sketches import sketches

log = logging.getLogger(__name__)

DIVERSITY = 3.0  # of few classes
MANY_CLASSES = 32  # a batch of 128, found for two and ten classes, has too few of each of more
# What a run bounded by time should at least come to, and the smallest batch made smaller for it.
STEPS, SMALLEST = 300, 16
# A generator's update runs the teacher forward, and backward to the images: about three forward
# passes.
PASSES = 3
TIMES = 3  # that its speed is measured; the first pass is often slow
# Mirrored images count as images of the same classes if the teacher says so more often than by
# chance: in this share of the cases in which chance would not. It is 0.35 for a ResNet-20 that
# learned from mirrored photographs, and 0.1 or less for two networks that tell digits apart.
MIRRORED, GRAINS, LOOKED_AT = 0.2, (2, 4, 8), 64
# Sketches are drawn if a teacher tells so much of their classes, of 1: 0.54 to 0.74 if it knows
# MNIST's digits, 0.44 to 0.62 those of 8x8 pixels; others that we have, 0.42 at most. It is asked
# about so many of each kind, of large ones about fewer.
STROKES, ASKED, FEW, BYTES_ASKED = 0.48, 128, 32, 2**25
# The BatchNorm loss of noise for the ResNet-20 for which the recipe's weight was found.
BATCH_NORM = 72.0
# Of no use without a generator, so not chosen then.
OF_GENERATOR = {
    "generator_width", "generator_lr", "generator_beta1", "generator_restart_every", "one_hot",
    "entropy", "activation", "log_base", "bn_statistics", "diversity",
}  # fmt: skip
# All that may be chosen; of the bank's size also for want of memory.
ADAPTED = {*WITHOUT_BATCH_NORM, "student_after", "sketches"}


def adapted(
    config: Config,
    teacher: nn.Module,
    device: torch.device,
    world: World,
    chosen: Collection[str] = (),
) -> Config:
    """`config` with settings that suit the teacher, in place of those of its recipe.

    Args:
        config: of a new run. Without `adapt` it is returned as it is.
        teacher: the user's network; it is run in evaluation mode, and not changed.
        device: where the run will be. On a CPU also the teacher's speed counts.
        world: the processes of this job, which all choose what the first one does.
        chosen: names of settings that the user gave; those that differ from the recipe's count as
            given, too.

    Raises:
        UserError: see `reading_of`.
    """
    if not config.adapt or config.resume is not None:
        return config
    choices = world.decide(lambda: _choices(config, teacher, device, world.size, chosen))
    return dataclasses.replace(config, **choices)


def _choices(
    config: Config,
    teacher: nn.Module,
    device: torch.device,
    processes: int,
    chosen: Collection[str],
) -> dict[str, Any]:
    """The settings that `adapted` changes, of a run in so many processes."""
    usual = make_config(config.preset, config.recipe)
    choices: dict[str, Any] = {}
    kept = {*chosen, *(OF_GENERATOR if config.generator == "none" else ())}

    def choose(why: str, **values: Any) -> None:
        left = {name: value for name, value in values.items()
                if getattr(config, name) == getattr(usual, name) != value
                and name not in kept and choices.get(name) != value}  # fmt: skip
        choices.update(left)
        if left:
            log.warning("%s: %s", why, ", ".join(_flag(*one) for one in left.items()))

    images = random_images(config, 16).to(next(teacher.parameters(), torch.empty(0)).device)
    reading = reading_of(
        teacher, images, config.teacher_output, name=config.teacher_output_name,
        classes=config.num_classes,
    )  # fmt: skip
    normed = _with_batch_norm(teacher)
    if not layers_with_statistics(normed):
        more = {"batch_size": 256} if reading.classes > MANY_CLASSES else {}
        why = "chosen for a teacher without BatchNorm"
        if hides_batch_norm(teacher):
            why = (
                "chosen for a TorchScript teacher, which does not show its BatchNorm layers, as a "
                "program of torch.export does"
            )
        choose(why, **{**WITHOUT_BATCH_NORM, **more})
    else:
        choose(
            "chosen for the size of the teacher's BatchNorm loss",
            bn_statistics=_weight_of_batch_norm(normed, images, usual.bn_statistics),
        )
    flips = dataclasses.replace(config, **choices).bank_flip
    if flips and not _knows_mirrored(as_classifier(teacher, reading), config):
        choose(
            "chosen for a teacher that takes mirrored images for others",
            bank_flip=False, dead_leaves=0,
        )  # fmt: skip
    if config.shape[0] not in (1, 3):
        choose(f"chosen for images of {config.shape[0]} channels", dead_leaves=0)
    # Whoever asks for drawn pictures or sketches gets just these.
    own_pictures = config.dead_leaves > 0 and (
        "dead_leaves" in kept or config.dead_leaves != usual.dead_leaves
    )
    own_sketches = "sketches" in kept or config.sketches != usual.sketches
    may_draw = not own_pictures and not own_sketches
    if (
        may_draw
        and config.student_source == "bank"
        and config.drawn_format.stored_channels in (1, 3)
    ):
        kind = _strokes_that_tell(as_classifier(teacher, reading), config)
        if kind != "none":
            choose("chosen for a teacher that tells strokes apart", sketches=kind, dead_leaves=0)
    if reading.classes <= FEW_CLASSES:
        choose(f"chosen for {reading.classes} classes", diversity=DIVERSITY)
    # A run of so many steps must not depend on how busy the machine is.
    if config.max_seconds is not None and config.steps is None and device.type == "cpu":
        now = dataclasses.replace(config, **choices)
        batch = now.batch_size
        # The processes share each batch, and the cores of the machine.
        of_one = _seconds_of_one(teacher, images) / (processes * pick_threads(config.threads))
        cut = now.candidates / now.batch_size * bool(now.draws or now.images)
        passes = PASSES * (now.generator != "none") + cut
        while batch > SMALLEST and passes * of_one * batch * STEPS > config.max_seconds:
            batch //= 2
        if batch < now.batch_size:
            student = now.student_batch_size or now.batch_size
            choose(
                f"chosen for a teacher that takes {1000 * of_one:.2g} ms for an image",
                batch_size=batch,
                student_batch_size=max(SMALLEST, student * batch // now.batch_size),
            )
    return choices


def _flag(name: str, value: Any) -> str:
    """A setting as it is typed."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def _with_batch_norm(teacher: nn.Module) -> nn.Module:
    """A copy of a teacher with nn.BatchNorm2d where it computes BatchNorm in another way; itself
    if it cannot be copied."""
    with contextlib.suppress(Exception):  # a network may raise anything
        copied = duplicate(teacher)
        thaw_batch_norm(copied)
        return copied
    return teacher


@torch.no_grad()
def _weight_of_batch_norm(teacher: nn.Module, images: Tensor, usual: float) -> float:
    """Of the BatchNorm loss, with two digits; the `usual` one if it is right to a factor of two."""
    statistics: list[tuple[Any, Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...], others: dict[str, Any]) -> None:
        x = input_of(inputs, others).float()
        variance, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
        statistics.append((layer, mean, variance))

    handles = [
        layer.register_forward_pre_hook(keep, with_kwargs=True)
        for layer in layers_with_statistics(teacher)
    ]
    try:
        with evaluation_mode(teacher), buffers_kept(teacher):
            teacher(images)
    finally:
        for handle in handles:
            handle.remove()
    if not statistics:  # none of them runs
        return usual
    layers, means, variances = (list(part) for part in zip(*statistics, strict=True))
    value = float(batch_norm_loss(means, variances, layers))
    if not (math.isfinite(value) and value > 0):
        return usual
    factor = BATCH_NORM / value
    return usual if 0.5 <= factor <= 2 else float(f"{factor * usual:.2g}")


@torch.no_grad()
def _knows_mirrored(classifier: nn.Module, config: Config) -> bool:
    """Whether a teacher, images -> logits, gives mirrored images the classes of the images."""
    shares = []
    for grain in GRAINS:
        images = random_images(config, LOOKED_AT, grain)
        classes, mirrored = (predictions(classifier, x, 16) for x in (images, images.flip(3)))
        same = (classes == mirrored).float().mean()
        chance = sum((classes == one).float().mean() * (mirrored == one).float().mean()
                     for one in classes.unique())  # fmt: skip
        if chance < 0.9:  # else it gives nearly all of these images one class, which tells nothing
            shares.append(float((same - chance) / (1 - chance)))
    return not shares or fmean(shares) >= MIRRORED


@torch.no_grad()
def _strokes_that_tell(classifier: nn.Module, config: Config) -> str:
    """Which sketches a teacher, images -> logits, tells apart better, "light" or "dark"; "none" if
    it does not tell either.

    The measure is the mutual information of a sketch and its class, of the most that there can be.
    It is that of DAFL's losses: each answer should be sure (one-hot), all together balanced
    (entropy). A teacher that is sure of one class for all sketches tells nothing.
    """
    form, told = config.drawn_format, {"none": STROKES}
    height, width = config.shape[1:]
    count = max(FEW, min(ASKED, BYTES_ASKED // (height * width)))
    prepared, device = Normaliser(form), next(classifier.parameters(), torch.empty(0)).device
    for kind in ("light", "dark"):
        drawn = sketches(count, 1, height, width, light=kind == "light")
        with evaluation_mode(classifier), buffers_kept(classifier):
            logits = [classifier(prepared(part).to(device)) for part in drawn.split(16)]
        shares = torch.cat(logits).double().softmax(1)
        doubt, variety = (torch.special.entr(each).sum(1).mean()
                          for each in (shares, shares.mean(0, keepdim=True)))  # fmt: skip
        told[kind] = float((variety - doubt) / math.log(shares.shape[1]))
    return max(told, key=lambda kind: told[kind])


@torch.no_grad()
def _seconds_of_one(teacher: nn.Module, images: Tensor) -> float:
    """How long a forward pass takes for one image of a batch on one thread: of the processor's
    time, whatever other programs run."""
    taken = []
    with evaluation_mode(teacher), buffers_kept(teacher), threads(1):
        for _ in range(TIMES):
            begun = time.thread_time()
            teacher(images)
            taken.append(time.thread_time() - begun)
    return min(taken) / len(images)

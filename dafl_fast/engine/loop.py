"""The training loop: schedule, looking at losses, evaluation, checkpoints, a clean end."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..config import PRESETS, Config, make_config
from ..data import eval_set
from ..errors import TrainingStopped, UserError, require
from ..models import NETWORKS, Generator
from ..models.winograd import accelerate
from ..networks import load_network
from ..pictures import save_samples
from .checkpoint import save_weights
from .distributed import World, is_lost_contact
from .evaluation import accuracy_on
from .folder import RunFolder, check_resumed
from .graph import make_ready, why_not
from .step import AUTOCAST, STATISTICS, Step
from .teacher import FrozenTeacher, logits_of
from .tensorboard import TensorBoard
from .watchdog import Watchdog

log = logging.getLogger(__name__)

# A batch whose classes carry less than this share of the largest possible entropy has collapsed
# to one class; training stops after so many steps of it (a young generator may pass through).
COLLAPSED_ENTROPY, COLLAPSED_STEPS = 0.02, 300


@dataclass
class Result:
    """What a run leaves.

    Attributes:
        student: the one that was given, trained, in evaluation mode; its weights are their moving
            average if the recipe keeps one.
        history: the rows of metrics.jsonl that this call added.
        summary: what summary.json holds.
        folder: of the run.
    """

    student: nn.Module
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    folder: Path


def distill(
    teacher: nn.Module,
    student: nn.Module,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
    generator: nn.Module | None = None,
    feature_layer: str | None = None,
    recipe: str = "fast",
    steps: int | None = None,
    max_seconds: float | None = None,
    eval_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    preset: str = "custom",
    **settings: Any,
) -> Result:
    """Distils `teacher` into `student` without data.

    SIGINT and SIGTERM end it after the current step with everything saved; `resume` goes on.

    Args:
        teacher: any classifier, images [N, C, H, W] in the units it was trained with -> logits
            [N, num_classes]. It is copied and not changed, but for the device it is on.
        student: any network from such images to as many logits; trained in place.
        image_shape: C, H and W; H = W, a multiple of 4.
        num_classes: checked against the teacher's outputs when given.
        generator: from noise [N, latent_dim] to images; the published one, with as many stages as
            the image size asks for, when not given. One with a method `reset`, which draws its
            parameters anew, is restarted as the recipe says; others are kept for the whole run.
        feature_layer: name of the teacher's layer whose input is the feature vector of the
            activation loss; its last linear layer when not given.
        recipe: "fast", "published" or "paper"; see docs/recipes.md.
        steps, max_seconds: when to stop; the recipe's own length when neither is given.
        eval_loader: batches of held-out images [N, C, H, W], in the teacher's units, and labels
            [N]. Only for reporting accuracy.
        callbacks: each is called with every row of metrics.
        preset: whose settings the recipe's are: "custom", "mnist", "cifar10", ...
        settings: any other field of `Config`: out_dir, seed, batch_size, device, resume, ...

    Raises:
        UserError: a setting, a network or the folder is not usable.
        TrainingStopped: the generator collapsed, a loss is not finite, or another process is gone;
            the run's last good checkpoint is kept.
    """
    if generator is not None and not hasattr(generator, "reset"):
        settings.setdefault("generator_restart_every", 0)
    config = make_config(
        preset,
        recipe,
        **{
            **dict(image_shape=tuple(image_shape), feature_layer=feature_layer, eval="none"),
            **dict(teacher=None, student=None, num_classes=num_classes),
            **({"steps": steps} if steps is not None else {}),
            **({"max_seconds": max_seconds} if max_seconds is not None else {}),
            **settings,
        },
    )
    if config.resume is not None:
        check_resumed(config)
    return _run(config, teacher, student, generator, eval_loader, callbacks)


def train(config: Config, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Runs (or resumes) the run that `config` describes, and returns its summary.

    As `distill`, with networks and held-out images by name. Under torchrun every process calls it,
    each trains on its share of the batches, and the first one writes.

    Args:
        config: all settings.
        report: called with each row of metrics.jsonl.
    """
    teacher, student = load_networks(config)
    held_out = None
    if config.eval != "none" and os.environ.get("RANK", "0") == "0":
        classes = outputs_of(teacher, config.image_shape)
        images, labels = eval_set(
            config.eval, config.image_format, classes, config.data_dir, config.download
        )
        held_out = list(zip(images.split(1000), labels.split(1000), strict=True))
    return _run(config, teacher, student, None, held_out, [report] if report else []).summary


def _run(
    config: Config,
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module | None,
    held_out: Iterable[tuple[Tensor, Tensor]] | None,
    callbacks: Sequence[Callable[[dict[str, Any]], None]],
) -> Result:
    if config.steps is None and config.max_seconds is None:
        raise UserError("--steps or --max-seconds must say when to stop")
    if config.tensorboard:
        require("tensorboard", "--tensorboard")
    device = pick_device(config.device)
    keep_freed_memory()
    world = World.join(device)
    precision = pick_precision(config.precision, device)
    # What is handed back is made of the layers that it was given with, not of faster ones.
    classes = [type(module) for module in student.modules()]
    why_not(config, device, world)
    networks = {student}
    board = None
    try:
        step = prepare(config, teacher, student, device, precision, generator, world)
        networks.add(step.result)
        path = config.resume
        if path is None and world.first:
            path = RunFolder.create(config)
        folder = RunFolder(Path(world.decide_text(str(path))))
        loop = _Loop(config, step, folder, teacher, held_out, callbacks)
        if config.tensorboard and world.first:
            board = TensorBoard(folder, step)
            loop.callbacks.append(board)
        summary = loop.run()
    finally:
        if board is not None:
            board.close()
        for network in networks:
            for module, given in zip(network.modules(), classes, strict=True):
                module.__class__ = given
    world.leave()
    student.load_state_dict(step.result.state_dict())
    return Result(student.eval(), loop.history, summary, folder.path)


def load_networks(config: Config) -> tuple[nn.Module, nn.Module]:
    """The teacher with its weights and the student that `config` names.

    Raises:
        UserError: one is not named, not to be had, or does not fit its weights.
    """
    preset = PRESETS[config.preset]
    for role in ("teacher", "student"):
        if getattr(config, role) is None:
            raise UserError(
                f"--{role} must name a network for the preset {config.preset}: see docs/networks.md"
            )
    assert config.teacher is not None and config.student is not None
    channels, size, _ = config.image_shape
    name, weights = config.teacher, config.teacher_weights
    if _is_usual_teacher(config):
        if name.endswith(".safetensors"):
            name, weights = preset.networks["teacher"], Path(name)
        elif weights is None and preset.bundled_teacher is not None:
            weights = Path(str(files("dafl_fast") / "assets" / preset.bundled_teacher))
        elif weights is None:
            raise UserError(
                f"the preset {config.preset} has no bundled teacher: train one with `python -m "
                f"dafl_fast.train_teacher {config.preset}` and name its file with --teacher"
            )
    elif weights is None and (name in NETWORKS or name.startswith(("timm:", "torchvision:"))):
        raise UserError(f"--teacher-weights is needed: without weights {name} knows nothing")
    form: dict[str, Any] = {"channels": channels, "image_size": size}
    teacher = load_network(name, weights, role="teacher", num_classes=config.num_classes, **form)
    classes = outputs_of(teacher, config.image_shape)
    torch.manual_seed(config.seed)
    student = load_network(
        config.student, config.student_weights, role="student", num_classes=classes, **form
    )
    return teacher, student


def _is_usual_teacher(config: Config) -> bool:
    """Whether the teacher is the preset's network, with whatever weights."""
    usual, name = PRESETS[config.preset].networks.get("teacher"), str(config.teacher)
    return usual is not None and (name == usual or name.endswith(".safetensors"))


@torch.no_grad()
def outputs_of(teacher: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """The teacher's number of classes, found by asking it."""
    return logits_of(teacher.eval(), torch.randn(2, *image_shape)).shape[1]


def prepare(
    config: Config,
    teacher: nn.Module,
    student: nn.Module,
    device: torch.device,
    precision: str,
    generator: nn.Module | None = None,
    world: World | None = None,
) -> Step:
    """Networks and generator, checked against each other, as a Step on `device`.

    Args:
        config: all settings.
        teacher: the classifier; a frozen copy of it is used.
        student: to train; moved to `device`.
        device, precision: see `pick_device` and `pick_precision`.
        generator: the published one if None.
        world: the processes of this job.

    Raises:
        UserError: a network does not take such images, or they differ in the number of classes.
    """
    torch.manual_seed(config.seed)
    channels, size, _ = shape = config.image_shape
    if generator is None:
        generator = Generator(config.latent_dim, size, channels, config.generator_width)
    frozen = freeze(teacher, config, torch.randn(16, *shape))
    for module in (generator, student, frozen):
        # Convolutions are faster with the channels innermost, on CPUs and on GPUs.
        module.to(device).to(memory_format=torch.channels_last)
    num_classes = frozen.check(torch.randn(16, *shape, device=device))
    if config.num_classes not in (None, num_classes):
        raise UserError(
            f"--num-classes is {config.num_classes}, but the teacher tells {num_classes} apart"
        )
    check_student(student, torch.randn(2, *shape, device=device), num_classes)
    check_generator(generator, torch.randn(2, config.latent_dim, device=device), shape)
    if config.generator_restart_every and not hasattr(generator, "reset"):
        raise UserError(
            "--generator-restart-every needs a generator with a method reset() that draws its "
            "parameters anew; give it one, or set it to 0"
        )
    if precision in AUTOCAST:
        frozen.cast(AUTOCAST[precision])
    if device.type == "cpu":
        accelerate(frozen, constant=True)
        accelerate(student)
    # Shapes never change, so it pays to look for the fastest convolutions once.
    torch.backends.cudnn.benchmark = True
    if config.compile:
        for module in (generator, student, frozen):
            module.compile()
    return Step(config, generator, frozen, student, num_classes, device, precision, world)


@torch.no_grad()
def freeze(teacher: nn.Module, config: Config, images: Tensor) -> FrozenTeacher:
    """A FrozenTeacher, its BatchNorm folded unless it would then answer differently.

    torch.fx can misread a network whose code asks what kind of tensor it is given.
    """
    frozen = FrozenTeacher(teacher, config.feature_layer, watch=config.bn_statistics != 0)
    if not frozen.folded:
        return frozen
    unfolded = copy.deepcopy(teacher).eval()
    images = images.to(next(teacher.parameters(), images).device)
    with contextlib.suppress(RuntimeError):  # the check will say more of images that do not fit
        expected, got = unfolded(images), frozen.network(images)
        if not torch.allclose(got, expected, 1e-3, 1e-3 * expected.abs().max().item(), True):
            log.warning("the teacher's BatchNorm is not folded: it would answer differently")
            return FrozenTeacher(teacher, config.feature_layer, fold=False)
    return frozen


@torch.no_grad()
def check_generator(generator: nn.Module, noise: Tensor, image_shape: tuple[int, ...]) -> None:
    """Tries a generator on noise [N, latent_dim], before anything is trained.

    Raises:
        UserError: it does not make images of that shape.
    """
    training = generator.training
    images = generator.eval()(noise)
    generator.train(training)
    if tuple(images.shape) != (len(noise), *image_shape):
        raise UserError(
            f"the generator must make images {[len(noise), *image_shape]} of noise "
            f"{list(noise.shape)}, got {list(images.shape)}"
        )


@torch.no_grad()
def check_student(student: nn.Module, images: Tensor, num_classes: int) -> None:
    """Tries the student on a batch, so that a misfit shows before anything is trained.

    Raises:
        UserError: it does not take the images, or does not return logits [N, num_classes].
    """
    shape = list(images.shape)
    training = student.training
    try:
        logits = student.eval()(images)
    except Exception as error:  # whatever the network says of images that do not fit
        raise UserError(
            f"the student does not take images of shape {shape}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        student.train(training)
    if list(logits.shape) != [len(images), num_classes]:
        raise UserError(
            f"the student must return logits {[len(images), num_classes]} for images {shape}, as "
            f"many classes as the teacher, got {list(logits.shape)}"
        )


def pick_device(name: str) -> torch.device:
    """The device for `--device`; raises UserError for cuda without a usable GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but PyTorch sees no CUDA GPU here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        # torchrun numbers the processes of a machine; each has a GPU of its own.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """The precision for `--precision`: auto is bf16 where the processor computes in it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory: a step frees and takes the same hundreds of megabytes.

    By default every large tensor is mapped anew, and the kernel clears its pages each time, about
    a sixth of the MNIST step on two cores.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_mmap_max = -1, -4
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The most memory this process has held so far, in bytes: on the host and on the device."""
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peak_host_bytes": on_host * (1 if sys.platform == "darwin" else 1024),
        "peak_device_bytes": (
            torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        ),
    }


class Clock:
    """Seconds of training: runs except inside `paused(what)`, whose seconds are kept apart."""

    def __init__(
        self, seconds: float, device: torch.device, apart: dict[str, float] | None = None
    ) -> None:
        self._device = device
        self._before = seconds
        self._since: float | None = time.perf_counter()
        self.apart = {"evaluation": 0.0, "saving": 0.0, **(apart or {})}

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before + running

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._before, self._since = self.seconds, None
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since = time.perf_counter()
            self.apart[what] += self._since - start


class _Loop:
    """One run of the training loop; see `train`."""

    def __init__(
        self,
        config: Config,
        step: Step,
        folder: RunFolder,
        teacher: nn.Module,
        held_out: Iterable[tuple[Tensor, Tensor]] | None,
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
    ) -> None:
        self.config, self.step, self.folder, self.teacher = config, step, folder, teacher
        self.world = step.world
        self.held_out, self.callbacks = held_out, [*callbacks]
        self.history: list[dict[str, Any]] = []
        self.wall_start = time.perf_counter()
        self.teacher_hash = step.teacher.fingerprint()
        progress = folder.restore(step) or {}
        if self.world.largest(step.steps)[0] != step.steps:
            raise UserError(
                f"process {self.world.rank} does not see the checkpoint in {folder.path}: all "
                "processes need the run's folder to resume"
            )
        if config.resume is not None and self.world.first:
            folder.write_config(config)  # its length may be another now
        if progress.get("teacher", self.teacher_hash) != self.teacher_hash:
            raise UserError(f"the run in {folder.path} was begun with another teacher")
        self.wall_before: float = progress.get("wall_seconds", 0.0)
        self.collapsed_steps: int = progress.get("collapsed_steps", 0)
        self.logged = progress.get("logged", step.steps)  # steps up to the last look at the losses
        self.signalled = threading.Event()
        self.lost_contact = False
        self.watchdog = Watchdog(config.stall_seconds)
        self.no_graph = make_ready(step)
        self.clock = Clock(
            progress.get("train_seconds", 0.0), step.device, progress.get("seconds_apart")
        )
        self.logged_at = self.saved_at = self.evaluated_at = self.clock.seconds

    def run(self) -> dict[str, Any]:
        # Until the very end: torchrun sends its signal while the report of a lost run is written.
        with self._stop_on_signals():
            try:
                with self.watchdog:
                    return self._finish(self._train())
            except TrainingStopped as error:
                if self.world.first:  # for the report
                    now = {"step": self.step.steps, "train_seconds": round(self.clock.seconds, 3)}
                    self.folder.append_metrics({**now, "stopped": str(error)})
                raise
            except RuntimeError as error:
                if self.world.size == 1 or not is_lost_contact(error):
                    raise
                self.lost_contact = True
                raise TrainingStopped(
                    f"process {self.world.rank} of {self.world.size} has lost contact with another "
                    f"one at step {self.step.steps}; start again with --resume {self.folder.path}"
                    f"{self._kept()}"
                ) from error
            finally:
                self.folder.close()
                if self.world.first and self.folder.metrics.exists():
                    self._report()

    def _report(self) -> None:
        """Writes report.html, of runs that were stopped too; a run never fails for its report."""
        try:
            from ..report import write_report  # needs packages that training does not

            write_report(self.folder.path)
        except Exception as error:
            log.warning("no report of the run could be made: %s", error)

    def _train(self) -> bool:
        """Steps until the run is over; whether it was a signal that ended it."""
        config, step, world = self.config, self.step, self.world
        while True:
            # The first process's clock counts, and any process's signal.
            done, signalled = world.largest(
                self._done() if world.first else 0.0, self.signalled.is_set()
            )
            if done >= 1 or signalled:
                return done < 1
            self.watchdog.beat(f"step {step.steps + 1}")
            step.set_student_lr(config.student_lr * self._schedule(done))
            step()
            # A stop shows the losses early and must not change when later rows are written.
            if step.steps % config.log_every == 0:
                self._log(done)
                if world.first and self.clock.seconds - self.saved_at >= config.save_every:
                    self._save()
                due = self.clock.seconds - self.evaluated_at >= config.eval_every
                if world.first and config.eval_every and due:
                    self._evaluate()
                    self.evaluated_at = self.clock.seconds

    def _done(self) -> float:
        """Share of the run that is behind us, by steps or by time, whichever is further."""
        config = self.config
        shares = [0.0]
        if config.steps is not None:
            shares.append(self.step.steps / config.steps)
        if config.max_seconds is not None:
            shares.append(self.clock.seconds / config.max_seconds)
        return max(shares)

    def _schedule(self, done: float) -> float:
        """Factor on the student's learning rate when the share `done` of the run is over."""
        if self.config.student_schedule == "constant":
            return 1.0
        if self.config.student_schedule == "multistep":
            return 1.0 if done < 0.4 else 0.1 if done < 0.8 else 0.01
        warm_up = min(1.0, done / 0.02 + 0.01)
        return warm_up * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def _progress(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher_hash,
            "train_seconds": self.clock.seconds,
            "wall_seconds": self._wall_seconds(),
            "seconds_apart": self.clock.apart,
            "collapsed_steps": self.collapsed_steps,
            "logged": self.logged,
        }

    def _wall_seconds(self) -> float:
        return self.wall_before + time.perf_counter() - self.wall_start

    def _log(self, done: float) -> None:
        """Reads the statistics off the device, judges them, and writes a row of metrics."""
        step = self.step
        count = step.steps - self.logged
        if count == 0:
            return
        self.watchdog.beat(f"the end of step {step.steps}")
        means = dict(
            zip(STATISTICS, self.world.mean(step.statistics / count).tolist(), strict=True)
        )
        step.statistics.zero_()
        self.logged = step.steps
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise TrainingStopped(
                f"{broken[0]} is not finite at step {step.steps}; try a lower learning rate or "
                f"--precision fp32{self._kept()}"
            )
        self._check_weights()
        self._watch_for_collapse(means["entropy"], count)
        seconds = self.clock.seconds
        images = count * self._images_per_step()
        row = {
            "step": step.steps,
            "train_seconds": round(seconds, 3),
            **{name: round(value, 6) for name, value in means.items()},
            "steps_per_second": round(count / max(seconds - self.logged_at, 1e-9), 3),
            "images_per_second": round(images / max(seconds - self.logged_at, 1e-9), 1),
            "done": round(done, 4),
        }
        self.logged_at = seconds
        self._write_row(row)

    def _watch_for_collapse(self, entropy: float, count: int) -> None:
        classes = self.step.num_classes
        if self.config.entropy == 0:
            return
        share = -entropy * math.log(self.config.log_base) / math.log(classes)
        self.collapsed_steps = self.collapsed_steps + count if share < COLLAPSED_ENTROPY else 0
        if self.collapsed_steps >= COLLAPSED_STEPS:
            raise TrainingStopped(
                f"the generator has collapsed: for {self.collapsed_steps} steps nearly all images "
                "belong to one class; try a larger --entropy, a lower --generator-lr or another "
                f"--seed{self._kept()}"
            )

    def _check_weights(self) -> None:
        if not self.step.is_finite():
            raise TrainingStopped(
                f"weights are not finite after step {self.step.steps}; try a lower learning rate "
                f"or --precision fp32{self._kept()}"
            )

    def _write_row(self, row: dict[str, Any]) -> None:
        if self.world.first:
            self.folder.append_metrics(row)
            self.history.append(row)
            for callback in self.callbacks:
                callback(row)

    def _kept(self) -> str:
        self.folder.close()
        if not self.folder.checkpoint.exists():
            return ""
        return f" (the last good checkpoint is kept: {self.folder.checkpoint})"

    def _images_per_step(self) -> int:
        config = self.config
        count = config.student_batch_size or config.batch_size
        return config.batch_size + config.student_updates * count

    def _save(self) -> None:
        self.watchdog.beat(f"saving after step {self.step.steps}")
        with self.clock.paused("saving"):
            self.folder.save(self.step, self._progress())
        self.saved_at = self.clock.seconds

    def _evaluate(self) -> float | None:
        """Accuracy of the student that would be saved now, if there are images to measure it on;
        what the newest generated images are like, with a grid of them."""
        step = self.step
        self.watchdog.beat(f"evaluating after step {step.steps}")
        with self.clock.paused("evaluation"):
            images, logits = (tensor.clone() for tensor in step.newest)
            path = self.folder.samples(step.steps)
            self.folder.later(lambda: save_samples(path, images, logits), step.device)
            student = None
            if self.held_out is not None:
                student, _ = accuracy_on(step.result, self.held_out)
            agreement = step.agreement(images, logits)
            counts = logits.argmax(1).bincount(minlength=step.num_classes).tolist()
        row = {
            "step": step.steps,
            "train_seconds": round(self.clock.seconds, 3),
            **({"accuracy": student} if student is not None else {}),
            "agreement_newest": agreement,
            "class_counts": counts,
        }
        self._write_row(row)
        return student

    def _finish(self, interrupted: bool) -> dict[str, Any]:
        step, config, folder = self.step, self.config, self.folder
        if not interrupted:
            self._log(1.0)
        self._check_weights()
        # An interrupted run is saved as it stands, statistics included: the resumed run looks at
        # them when the uninterrupted one would have.
        if self.world.first:
            self._save()
        train_seconds = self.clock.seconds
        step.newest = step.fresh()
        agreement = step.fresh_agreement()
        student = teacher = None
        count = 0
        if self.world.first:
            save_weights(folder.path / "student.safetensors", step.result.state_dict())
            student = self._evaluate()
            folder.flush()
            if self.held_out is not None:
                teacher, count = accuracy_on(self.teacher.to(step.device), self.held_out)
        generator_images = step.steps * config.batch_size
        images = step.steps * self._images_per_step()
        summary = {
            "preset": config.preset,
            "teacher": config.teacher or type(self.teacher).__name__,
            "student": config.student or type(step.student).__name__,
            "recipe": config.recipe,
            "device": step.device.type,
            "precision": step.precision,
            "processes": self.world.size,
            "cuda_graph": self.no_graph is None,
            "seed": config.seed,
            "steps": step.steps,
            "generator_images": generator_images,
            "student_images": images - generator_images,
            "wall_seconds": round(self._wall_seconds(), 2),
            "train_seconds": round(train_seconds, 4),
            **{f"{what}_seconds": round(value, 4) for what, value in self.clock.apart.items()},
            "images_per_second": round(images / max(train_seconds, 1e-9), 1),
            "teacher_accuracy": teacher,
            "student_accuracy": student,
            "agreement": agreement,
            "eval_set": config.eval,
            "eval_count": count,
            "num_classes": step.num_classes,
            "teacher_parameters": _parameters(self.teacher),
            "student_parameters": _parameters(step.student),
            "bank_bytes": step.bank.bytes if step.bank is not None else 0,
            **peak_memory(step.device),
            "teacher_sha256": self.teacher_hash,
            "interrupted": interrupted,
            "run": str(folder.path),
            "version": __version__,
        }
        if self.world.first:
            folder.write_json("summary.json", summary)
        return summary

    @contextlib.contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A second signal gets the default behaviour, so that nobody is locked in.
        previous: dict[signal.Signals, Any] = {}

        def on_signal(number: int, frame: object) -> None:
            self.signalled.set()
            for known, handler in previous.items():
                signal.signal(known, handler)

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, on_signal)
        try:
            yield
        finally:
            # After lost contact torchrun's signal may still be on its way, and what this process
            # has to say is not printed yet: the first signal stays without effect.
            if not self.lost_contact:
                for number, handler in previous.items():
                    signal.signal(number, handler)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

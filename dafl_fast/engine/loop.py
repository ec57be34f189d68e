"""The training loop: schedule, looking at losses, evaluation, checkpoints, a clean end."""

from __future__ import annotations

import contextlib
import ctypes
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..config import PRESETS, Config, Preset
from ..data import eval_set
from ..errors import TrainingStopped, UserError
from ..models import Generator, build
from ..report import save_samples
from .checkpoint import load_weights, save_weights
from .evaluation import accuracy
from .folder import RunFolder
from .step import STATISTICS, Step
from .teacher import FrozenTeacher

# A batch whose classes carry less than this share of the largest possible entropy has collapsed
# to one class; training stops after so many steps of it (a young generator may pass through).
COLLAPSED_ENTROPY, COLLAPSED_STEPS = 0.02, 300


def train(config: Config, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Runs (or resumes) the run that `config` describes, and returns its summary.

    SIGINT and SIGTERM end it after the current step with everything saved.

    Args:
        config: all settings.
        report: called with each row of metrics.jsonl.

    Raises:
        UserError: something in `config`, the teacher or the folder is not usable.
        TrainingStopped: the generator collapsed or a loss is not finite; the run's last good
            checkpoint is kept.
    """
    preset = PRESETS[config.preset]
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    keep_freed_memory()
    held_out = eval_set(config.eval, preset, config.data_dir, config.download)
    step = prepare(config, preset, device, precision)
    folder = RunFolder(config.resume) if config.resume else RunFolder.create(config)
    return _Loop(config, preset, step, folder, held_out, report).run()


def prepare(config: Config, preset: Preset, device: torch.device, precision: str) -> Step:
    """Teacher, student and generator of `config`, checked against each other, as a Step."""
    torch.manual_seed(config.seed)
    generator = Generator(
        config.latent_dim, preset.image_size, preset.channels, config.generator_width
    )
    student = build(preset.student)
    network = load_weights(build(preset.teacher), teacher_path(config, preset), "teacher")
    teacher = FrozenTeacher(network, preset.feature_layer)
    for module in (generator, student, teacher):
        # Convolutions are faster with the channels innermost, on CPUs and on GPUs.
        module.to(device).to(memory_format=torch.channels_last)
    shape = (preset.channels, preset.image_size, preset.image_size)
    teacher.check(torch.randn(16, *shape, device=device))
    return Step(config, generator, teacher, student, preset.num_classes, device, precision)


def teacher_path(config: Config, preset: Preset) -> Path:
    """The teacher's weights: the user's file or the bundled one."""
    if config.teacher is not None:
        return config.teacher
    if preset.bundled_teacher is None:
        raise UserError(
            f"the preset {config.preset} has no bundled teacher: train one with "
            f"`python -m dafl_fast.train_teacher {config.preset}` and name it with --teacher"
        )
    return Path(str(files("dafl_fast") / "assets" / preset.bundled_teacher))


def pick_device(name: str) -> torch.device:
    """The device for `--device`; raises UserError for cuda without a usable GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but PyTorch sees no CUDA GPU here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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


class Clock:
    """Seconds of training: runs except inside `paused()`."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._device = device
        self._before = seconds
        self._since: float | None = time.perf_counter()

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before + running

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.perf_counter()


class _Loop:
    """One run of the training loop; see `train`."""

    def __init__(
        self,
        config: Config,
        preset: Preset,
        step: Step,
        folder: RunFolder,
        held_out: tuple[Tensor, Tensor] | None,
        report: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.config, self.preset, self.step, self.folder = config, preset, step, folder
        self.held_out, self.report = held_out, report or (lambda row: None)
        self.wall_start = time.perf_counter()
        self.teacher_hash = step.teacher.fingerprint()
        progress = folder.restore(step) or {}
        if progress.get("teacher", self.teacher_hash) != self.teacher_hash:
            raise UserError(f"the run in {folder.path} was begun with another teacher")
        self.wall_before: float = progress.get("wall_seconds", 0.0)
        self.collapsed_steps: int = progress.get("collapsed_steps", 0)
        self.logged = progress.get("logged", 0)  # steps up to the last look at the losses
        self.stop = threading.Event()
        self.clock = Clock(progress.get("train_seconds", 0.0), step.device)
        self.logged_at = self.saved_at = self.evaluated_at = self.clock.seconds

    def run(self) -> dict[str, Any]:
        config, step = self.config, self.step
        with self._stop_on_signals():
            while self._done() < 1 and not self.stop.is_set():
                step.set_student_lr(config.student_lr * self._schedule(self._done()))
                step()
                # A stop shows the losses early and must not change when later rows are written.
                if step.steps % config.log_every == 0:
                    self._log()
                    if self.clock.seconds - self.saved_at >= config.save_every:
                        self._save()
                    due = self.clock.seconds - self.evaluated_at >= config.eval_every
                    if config.eval_every and due:
                        with self.clock.paused():
                            self._evaluate()
                        self.evaluated_at = self.clock.seconds
            return self._finish()

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
        warm_up = min(1.0, done / 0.02 + 0.01)
        return warm_up * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def _progress(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher_hash,
            "train_seconds": self.clock.seconds,
            "wall_seconds": self._wall_seconds(),
            "collapsed_steps": self.collapsed_steps,
            "logged": self.logged,
        }

    def _wall_seconds(self) -> float:
        return self.wall_before + time.perf_counter() - self.wall_start

    def _log(self) -> None:
        """Reads the statistics off the device, judges them, and writes a row of metrics."""
        step = self.step
        count = step.steps - self.logged
        if count == 0:
            return
        means = dict(zip(STATISTICS, (step.statistics / count).tolist(), strict=True))
        step.statistics.zero_()
        self.logged = step.steps
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise TrainingStopped(
                f"{broken[0]} is not finite at step {step.steps}; try a lower learning rate or "
                f"--precision fp32{self._kept()}"
            )
        self._watch_for_collapse(means["entropy"], count)
        seconds = self.clock.seconds
        images = count * self._images_per_step()
        row = {
            "step": step.steps,
            "train_seconds": round(seconds, 3),
            **{name: round(value, 6) for name, value in means.items()},
            "steps_per_second": round(count / max(seconds - self.logged_at, 1e-9), 3),
            "images_per_second": round(images / max(seconds - self.logged_at, 1e-9), 1),
            "done": round(self._done(), 4),
        }
        self.logged_at = seconds
        self.folder.append_metrics(row)
        self.report(row)

    def _watch_for_collapse(self, entropy: float, count: int) -> None:
        classes = self.preset.num_classes
        if classes < 2 or self.config.entropy == 0:
            return
        share = -entropy * math.log(self.config.log_base) / math.log(classes)
        self.collapsed_steps = self.collapsed_steps + count if share < COLLAPSED_ENTROPY else 0
        if self.collapsed_steps >= COLLAPSED_STEPS:
            raise TrainingStopped(
                f"the generator has collapsed: for {self.collapsed_steps} steps nearly all images "
                "belong to one class; try a larger --entropy, a lower --generator-lr or another "
                f"--seed{self._kept()}"
            )

    def _kept(self) -> str:
        if not self.folder.checkpoint.exists():
            return ""
        return f" (the last good checkpoint is kept: {self.folder.checkpoint})"

    def _images_per_step(self) -> int:
        config = self.config
        count = config.student_batch_size or config.batch_size
        return config.batch_size + config.student_updates * count

    def _save(self) -> None:
        with self.clock.paused():
            self.folder.save(self.step, self._progress())
        self.saved_at = self.clock.seconds

    def _evaluate(self) -> float | None:
        """Accuracy of the student that would be saved now, and a grid of the newest images."""
        step = self.step
        images, logits = step.newest
        save_samples(self.folder.path / "samples" / f"step-{step.steps:07d}.png", images, logits)
        if self.held_out is None:
            return None
        student = accuracy(step.result, *self.held_out)
        row = {
            "step": step.steps,
            "train_seconds": round(self.clock.seconds, 3),
            "accuracy": student,
            "agreement_fresh": step.agreement(images, logits),
        }
        self.folder.append_metrics(row)
        self.report(row)
        return student

    def _finish(self) -> dict[str, Any]:
        step, config, folder = self.step, self.config, self.folder
        interrupted = self.stop.is_set()
        if interrupted:
            # Saved as it stands, statistics included: the resumed run looks at them when the
            # uninterrupted one would have.
            self._save()
        else:
            self._log()
            self._save()
        train_seconds = self.clock.seconds
        if not torch.stack([p.isfinite().all() for p in step.result.parameters()]).all():
            raise TrainingStopped("the student's weights are not finite" + self._kept())
        save_weights(folder.path / "student.safetensors", step.result.state_dict())
        step.newest = step.fresh()
        student = self._evaluate()
        teacher = accuracy(step.teacher.network, *self.held_out) if self.held_out else None
        generator_images = step.steps * config.batch_size
        images = step.steps * self._images_per_step()
        summary = {
            "preset": config.preset,
            "recipe": config.recipe,
            "device": step.device.type,
            "precision": step.precision,
            "seed": config.seed,
            "steps": step.steps,
            "generator_images": generator_images,
            "student_images": images - generator_images,
            "wall_seconds": round(self._wall_seconds(), 2),
            "train_seconds": round(train_seconds, 4),
            "images_per_second": round(images / max(train_seconds, 1e-9), 1),
            "teacher_accuracy": teacher,
            "student_accuracy": student,
            "agreement": step.fresh_agreement(),
            "eval_set": config.eval,
            "eval_count": len(self.held_out[1]) if self.held_out else 0,
            "teacher_parameters": _parameters(step.teacher),
            "student_parameters": _parameters(step.student),
            "bank_bytes": step.bank.bytes if step.bank else 0,
            "teacher_sha256": self.teacher_hash,
            "interrupted": interrupted,
            "run": str(folder.path),
            "version": __version__,
        }
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
            self.stop.set()
            for known, handler in previous.items():
                signal.signal(known, handler)

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, on_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

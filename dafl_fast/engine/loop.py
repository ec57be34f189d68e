"""The training loop: learning rate schedule, logging, evaluation, checkpoints, orderly end."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import __version__
from ..config import Config
from ..device import peak_memory
from ..errors import TrainingStopped, UserError
from ..pictures import save_samples
from .clock import Clock, Watchdog
from .distributed import is_lost_contact
from .estimate import Estimate
from .evaluation import accuracy_on
from .folder import RunFolder
from .graph import compile_and_capture
from .outputs import as_classifier, convention_of
from .schedule import Schedule
from .signals import noticed
from .step import STUDENTS, Step
from .threads import Threads

log = logging.getLogger(__name__)

# Below this share of the largest possible entropy, a batch counts as images of one class only.
# After this many such steps in a row training stops; a new generator may go through a few.
COLLAPSED_ENTROPY, COLLAPSED_STEPS = 0.02, 300
LATEST = 0.1  # of a run, after which the student learns however few images there are
# Of the user's images, from so many of the newest the pictures of a grid are chosen.
SHOWN = 256


class Loop:
    """One run of the training loop in `folder`, from its last checkpoint if there is one.

    Args:
        config: all settings.
        step: the training step.
        folder: the folder for the run's files.
        teacher: the user's network, to report its accuracy at the end.
        held_out: batches of images [N, C, H, W] and labels [N], to report the accuracy.
        callbacks: each is called with every row of metrics.
        at_end: called when everything is written, even if the run failed.
    """

    def __init__(
        self,
        config: Config,
        step: Step,
        folder: RunFolder,
        teacher: nn.Module,
        held_out: Iterable[tuple[Tensor, Tensor]] | None,
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.step, self.folder, self.teacher = config, step, folder, teacher
        self.world = step.world
        self.held_out, self.callbacks, self.at_end = held_out, callbacks, at_end
        self.history: list[dict[str, Any]] = []
        self.wall_start = time.perf_counter()
        self.teacher_hash = step.teacher.fingerprint()
        progress = folder.restore(step) or {}
        if self.world.all_reduce_max(step.steps)[0] != step.steps:
            raise UserError(
                f"process {self.world.rank} does not see the checkpoint in {folder.path}: all "
                "processes need the run's folder to resume"
            )
        self.wall_before: float = progress.get("wall_seconds", 0.0)
        self.collapsed_steps: int = progress.get("collapsed_steps", 0)
        self.logged = progress.get("logged", step.steps)  # the step at which losses were last read
        self.logged_learned = progress.get("logged_learned", self.logged)
        self.schedule = Schedule(config, progress.get("schedule"))
        self.signalled = threading.Event()
        self.lost_contact = False
        self.watchdog = Watchdog(config.stall_seconds)
        self.no_graph = compile_and_capture(step)
        self.clock = Clock(
            progress.get("train_seconds", 0.0), step.device, progress.get("seconds_apart")
        )
        self.threads = Threads.for_run(config, step, self.clock.seconds)
        self.logged_at = self.saved_at = self.evaluated_at = self.clock.seconds
        if config.resume is not None and self.world.first:  # last, when nothing refuses it any more
            folder.write_config(config)  # the length of the run may have changed

    def run(self) -> dict[str, Any]:
        # Also at the end: torchrun may send its signal while the report of a failed run is written,
        # and after lost contact before this process has printed its message.
        with noticed(self.signalled, also_after=lambda: self.lost_contact):
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
                    self.at_end()

    def _train(self) -> bool:
        """Trains until the run is over. Returns whether a signal ended it."""
        config, step, world = self.config, self.step, self.world
        while True:
            # The first process's clock decides, and a signal to any process.
            share = self._share() if world.first else 0.0
            done, factor, learn, signalled = world.all_reduce_max(
                self.schedule.done(share) if world.first else 0.0,
                self.schedule.factor(share) if world.first else 0.0,
                self._learns() if world.first else 0.0,
                self.signalled.is_set(),
            )
            if done >= 1 or signalled:
                return done < 1
            self.watchdog.beat(f"step {step.steps + 1}")
            step.set_student_lr(config.student_lr * factor)
            step(learn > 0)
            if self.threads is not None and step.learned:  # steps before are shorter
                self.threads.after_step(self.clock.seconds)
            # After a stop, the resumed run must write its rows at the same steps.
            if step.steps % config.log_every == 0:
                self._log(done)
                due = self.clock.seconds - self.evaluated_at >= config.eval_every
                if world.first and config.eval_every and due:
                    self._evaluate()
                    self.evaluated_at = self.clock.seconds
                if world.first and self.clock.seconds - self.saved_at >= config.save_every:
                    self._save()  # last: where the checkpoint is, there is all of before

    def _learns(self) -> bool:
        """Whether the student learns in the next step: the bank has enough images by now."""
        config, step = self.config, self.step
        return (
            step.learned > 0
            or step.bank is None
            or step.steps * config.batch_size >= config.student_after
            or self._share(ahead=1) > LATEST
        )

    def _share(self, ahead: int = 0) -> float:
        """Of the run's longest length, by steps or by time, whichever is larger; or that share a
        number of steps `ahead`."""
        config = self.config
        done = [0.0]
        if config.steps is not None:
            done.append((self.step.steps + ahead) / config.steps)
        if config.max_seconds is not None:
            done.append(self.clock.seconds / config.max_seconds)
        return max(done)

    def _progress(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher_hash,
            "images": self.step.found and self.step.found.fingerprint,
            "train_seconds": self.clock.seconds,
            "wall_seconds": self._wall_seconds(),
            "seconds_apart": self.clock.apart,
            "collapsed_steps": self.collapsed_steps,
            "logged": self.logged,
            "logged_learned": self.logged_learned,
            "schedule": self.schedule.state(),
        }

    def _wall_seconds(self) -> float:
        return self.wall_before + time.perf_counter() - self.wall_start

    def _log(self, done: float) -> None:
        """Reads the statistics from the device, checks them, and writes a row of metrics."""
        step = self.step
        count = step.steps - self.logged
        if count == 0:
            return
        self.watchdog.beat(f"the end of step {step.steps}")
        learned = step.learned - self.logged_learned
        values = self.world.mean(step.take_means(count, learned)).tolist()
        means = dict(zip(step.names, values, strict=True))
        if not learned:
            for name in step.names[-STUDENTS:]:
                del means[name]
        self.logged, self.logged_learned = step.steps, step.learned
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise TrainingStopped(
                f"{broken[0]} is not finite at step {step.steps}; try a lower learning rate or "
                f"--precision fp32{self._kept()}"
            )
        self._check_weights()
        if "entropy" in means:
            self._watch_for_collapse(means["entropy"], count)
        seconds = self.clock.seconds
        images = count * self._generated_per_step() + learned * self._learned_per_step()
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
        of_largest = -entropy * math.log(self.config.log_base) / math.log(classes)
        self.collapsed_steps = self.collapsed_steps + count if of_largest < COLLAPSED_ENTROPY else 0
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
                callback(dict(row))

    def _kept(self) -> str:
        """What an error says of the checkpoint, when that is written."""
        self.folder.close()
        if not self.folder.checkpoint.exists():
            return ""
        return f" (the last good checkpoint is kept: {self.folder.checkpoint})"

    def _learned_per_step(self) -> int:
        config = self.config
        return config.student_updates * (config.student_batch_size or config.batch_size)

    def _generated_per_step(self) -> int:
        return self.config.batch_size if self.config.generator != "none" else 0

    def _save(self) -> None:
        self.watchdog.beat(f"saving after step {self.step.steps}")
        with self.clock.paused("saving"):
            self.folder.save(self.step, self._progress())
        self.saved_at = self.clock.seconds

    def _evaluate(self) -> tuple[float | None, Estimate | None]:
        """Writes a row with the student's accuracy (if there are held-out images), its agreement on
        the newest generated batch and the classes of that batch, and saves a grid of the images.
        Returns the accuracy, and the estimate of the agreement."""
        step = self.step
        self.watchdog.beat(f"evaluating after step {step.steps}")
        with self.clock.paused("evaluation"):
            images, logits = (tensor.clone() for tensor in step.newest)
            path = self.folder.samples(step.steps)
            self.folder.later(lambda: save_samples(path, images, logits), step.device)
            student = None
            if self.held_out is not None:
                student, _ = accuracy_on(step.averaged_student, self.held_out)
            agreement = step.agreement(images, logits)
            estimate = step.estimate()
            counts = logits.argmax(1).bincount(minlength=step.num_classes).tolist()
            found = self._evaluate_found()
        row = {
            "step": step.steps,
            "train_seconds": round(self.clock.seconds, 3),
            **({"accuracy": student} if student is not None else {}),
            "agreement_newest": agreement,
            **({} if estimate is None else estimate.as_row()),
            "class_counts": counts,
            **found,
        }
        self._write_row(row)
        if estimate is not None and step.learned and estimate.enough:
            self.schedule.note(estimate.held_out, self._share())
        return student, estimate

    def _evaluate_found(self) -> dict[str, Any]:
        """Saves a grid of the images that were given. Returns how many of each class are drawn
        from."""
        found = self.step.found
        if found is None:
            return {}
        images, logits = found.bank.newest(SHOWN)
        path = self.folder.images_grid
        self.folder.later(lambda: save_samples(path, images, logits), self.step.device)
        return {"images_class_counts": found.bank.counts.tolist()}

    def _finish(self, interrupted: bool) -> dict[str, Any]:
        step, folder = self.step, self.folder
        if not interrupted:
            self._log(1.0)
        self._check_weights()
        # An interrupted run is saved with its statistics: the resumed run writes them at the same
        # step as an uninterrupted one.
        if self.world.first:
            self._save()
        train_seconds = self.clock.seconds
        step.newest = step.fresh()
        agreement = step.fresh_agreement()
        student = teacher = estimate = None
        count = 0
        if self.world.first:
            folder.save_student(step.averaged_student.state_dict())
            student, estimate = self._evaluate()
            folder.flush()
            if self.held_out is not None:
                network = as_classifier(self.teacher.to(step.device), step.teacher.reading)
                teacher, count = accuracy_on(network, self.held_out)
        summary = {
            **self._summary(train_seconds),
            "teacher_accuracy": teacher,
            "student_accuracy": student,
            "agreement_fresh": agreement,
            **({} if estimate is None else estimate.as_row()),
            "eval_count": count,
            "interrupted": interrupted,
        }
        if self.world.first:
            folder.write_json("summary.json", summary)
        return summary

    def _summary(self, train_seconds: float) -> dict[str, Any]:
        """What is known of the run without looking at the student again."""
        step, config = self.step, self.config
        generator_images = step.steps * self._generated_per_step()
        images = generator_images + step.learned * self._learned_per_step()
        return {
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
            "eval_set": config.eval,
            "num_classes": step.num_classes,
            "convention": convention_of(self.teacher, step.teacher.reading, config.shape).as_json(),
            "teacher_parameters": parameters_of(self.teacher),
            "student_parameters": parameters_of(step.student),
            "bank_bytes": sum(bank.bytes for bank, *_ in step.sources),
            **(step.found.summary() if step.found is not None else {}),
            **peak_memory(step.device),
            "teacher_sha256": self.teacher_hash,
            "run": str(self.folder.path),
            "version": __version__,
        }


def parameters_of(network: nn.Module) -> int:
    """The number of its parameters."""
    return sum(parameter.numel() for parameter in network.parameters())

"""One training step for all recipes: one generator update, then K student updates.

    z = randn(N, latent_dim)   x = G(z)   t, f = T(x)
    G:  one_hot L_oh(t) + entropy L_ie(t) + activation L_a(f)
        (+ bn_statistics L_bn(x) + diversity L_div(f) + adversarial L_adv(S(x), t), which the paper
        does not have)
    S:  L_KD(S(x'), t') on images x' with teacher logits t', K times

Recipes differ in x': the images of this step's generator update (`published`), freshly generated
images (`paper`), or images drawn from the replay bank (`fast`). All else is numbers. A share of
x' may be real images that are not the data; without a generator, all of it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..device import AUTOCAST, autocast
from ..errors import UserError
from ..losses import (
    PLAIN_GENERATOR_LOSSES,
    GeneratedBatch,
    GeneratorLoss,
    distill_loss,
    generator_loss,
)
from ..unlabelled import Given
from .bank import ReplayBank
from .distributed import World
from .ema import Average
from .estimate import FEW_CLASSES, Estimate, estimate
from .evaluation import accuracy, answers_to_images, training_mode
from .images import Found, Sources, draw_from, held_out_of, sources_of
from .live import Live, clear_state, misfit, restore, state_of
from .optimizers import generator_optimizer, student_optimizer
from .teacher import FrozenTeacher

HELD_OUT = 2048  # images at most, on which the agreement is measured
# The fused terms of the generator loss, each named like its weight in Config.
_FUSED = GeneratorLoss._fields[1:]
# The values that `Step.statistics` adds up, in this order.
STATISTICS = (
    "generator_loss", *_FUSED, *PLAIN_GENERATOR_LOSSES, "distill_loss", "agreement_training",
)  # fmt: skip
STUDENTS = 2  # of them, at the end
# And of runs that were begun before checkpoints told them.
_FIRST_STATISTICS = (
    "generator_loss", "one_hot", "entropy", "activation", "bn_statistics", "adversarial",
    "distill_loss", "agreement_training",
)  # fmt: skip


class Step:
    """Has everything that a training step reads and writes. Calling it runs one step.

    Shapes are static, and a step returns nothing to the host. `statistics` adds up the values named
    in `STATISTICS` until the caller clears it. The student's values are means over its updates.

    What the host decides for a step (learning rate, weight of the moving average, a new generator)
    is written into tensors on the device before the step. So `body`, the step itself, can be
    captured as a CUDA graph: see `graph`.

    Args:
        config: sizes, weights and rates. Recipes differ in nothing else.
        generator, teacher, student: on `device`, in the dtype to train in.
        device: the device of all tensors.
        precision: "fp32" (no autocast; also right for fp64 networks), "bf16" or "fp16".
        world: the processes that share each batch; all hold the same networks and the same bank.
        given: images that are not the data, for the student.
    """

    def __init__(
        self,
        config: Config,
        generator: nn.Module,
        teacher: FrozenTeacher,
        student: nn.Module,
        num_classes: int,
        device: torch.device,
        precision: str = "fp32",
        world: World | None = None,
        given: Given | None = None,
    ) -> None:
        self.config, self.device, self.precision = config, device, precision
        self.num_classes = num_classes
        self.world = world = world or World()
        training_mode(generator)
        training_mode(student)
        self.teacher = teacher
        self.generator = world.share_statistics(generator, "generator")
        self.student = world.share_statistics(student, "student")
        # All processes draw the same noise and entries for the whole batch; each uses its rows.
        self._count = config.student_batch_size or config.batch_size
        self._rows = world.rows_of_batch("batch-size", config.batch_size)
        self._student_rows = world.rows_of_batch("student-batch-size", self._count)
        self._generator = world.average_gradients(self.generator)
        self._student = world.average_gradients(self.student)
        self.bank: ReplayBank | None = None
        if config.student_source == "bank" and config.generator != "none":
            self.bank = ReplayBank(
                config.bank_images, config.shape, num_classes, config.bank_dtype, device,
                config.bank_held_out,
            )  # fmt: skip
        self._adversarial = torch.zeros((), device=device)
        self.generator_optimizer = generator_optimizer(config, generator, device)
        self.student_optimizer, self._student_lr = student_optimizer(config, student, device)
        # bf16 has fp32's range; only fp16 gradients need scaling.
        self.scalers = [
            torch.amp.GradScaler(device.type, enabled=precision == "fp16") for _ in range(2)
        ]
        self.random = torch.Generator(device).manual_seed(config.seed)
        self.dtype = next(generator.parameters()).dtype
        decay, example = config.ema_decay, torch.zeros(2, *config.shape, device=device)
        self.average = Average(student, decay, example.to(self.dtype)) if decay else None
        # The names of the values in `statistics`: without a generator, those of the student.
        self.names = STATISTICS if config.generator != "none" else STATISTICS[-STUDENTS:]
        self.statistics = torch.zeros(len(self.names), device=device)
        # In fp16, how many steps each value is missing from: it overflowed, and scalers skip them.
        self.overflows = torch.zeros(len(self.names), device=device)
        # Everything that `body` changes, except the bank's entries. What is missing here is not
        # saved, not resumed and not restored after a warm-up; test_live.py checks the list.
        self.live: dict[str, Live] = {
            "generator": self.generator,
            "student": self.student,
            "generator_optimizer": self.generator_optimizer,
            "student_optimizer": self.student_optimizer,
            "scalers": self.scalers,
            "random": self.random,
            # Dropout in a user's student draws from the global random generators.
            "global_random": torch.default_generator,
            "statistics": self.statistics,
        }
        if precision == "fp16":
            self.live["overflows"] = self.overflows
        if self.average is not None:
            self.live["average"] = self.average.module
        if self.bank is not None:
            self.live["bank_added"] = self.bank.count
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.live["cuda_random"] = torch.cuda.default_generators[index]
        # The last generated batch, or without a generator what was found last, with its logits.
        self.newest = (torch.empty(0), torch.empty(0))
        self.found: Found | None = None
        if given is not None:
            self.found = Found(config, given, num_classes, self.random, world, self._answered)
            self.live |= self.found.live
            if self.found.cutter is None:
                self.newest = self.found.bank.newest(config.batch_size)
        # What a student's batch is drawn from, and one that BatchNorm's statistics are measured on:
        # drawn pictures are nearer to real images than generated ones are.
        self.sources = sources_of(self.found, self.bank, self._count, self._student_rows)
        others = None if self.found is not None and self.found.drawn else self.bank
        self._measured = sources_of(self.found, others, self._count, self._student_rows)
        self.steps = self.learned = 0  # steps so far, and those in which the student learned
        # The function that runs a step: `body`, or the replay of its CUDA graph.
        self.run: Callable[[], None] = self.body

    def __call__(self, learn: bool = True) -> None:
        """Runs one step; without `learn` the generator's part only."""
        every = self.config.generator_restart_every
        if every and self.config.generator != "none" and self.steps and self.steps % every == 0:
            self._restart_generator()
        if self.average is not None:
            self.average.ramp(self.learned * self.config.student_updates, self.learned)
        begun = self.steps >= self.config.adversarial_after
        self._adversarial.fill_(begun * self.config.adversarial)
        if learn:
            self.run()
            self.learned += 1
        else:
            self.body(learn=False)
        self.steps += 1

    def body(self, learn: bool = True) -> None:
        """The step itself: work for the device only, and the same operations every time."""
        config = self.config
        parts: list[Tensor] = []
        if self.found is not None and self.found.cutter is not None:
            self.newest = self.found.renew()
        if config.generator != "none":
            images, logits, parts = self._update_generator()
            self.newest = (images, logits)
        if self.bank is not None:
            self.bank.add(*self._finite(self.world.gather(images), self.world.gather(logits)))
        learned = torch.zeros(2, device=self.device)
        for _ in range(config.student_updates if learn else 0):
            learned += torch.stack(self._update_student(*self._draw(config.bank_crop)))
        if learn and self.average is not None and self.average.layers:
            with self._autocast():  # shifted images have other statistics, and cost a point
                images = self._draw(0, self._measured)[0].to(self.dtype)
                self.average.measure(self.world.gather(images))
        values = torch.cat([*(part.view(1) for part in parts), learned / config.student_updates])
        if self.precision == "fp16":
            finite = values.isfinite()
            self.overflows += ~finite
            values = torch.where(finite, values, 0.0)
        self.statistics += values

    def _draw(self, crop: int, sources: Sources | None = None) -> tuple[Tensor, Tensor]:
        """Images [n, C, H, W] for the student, and the teacher's logits for them: this process's
        rows. Those from a bank that were not cut are shifted by up to `crop` pixels."""
        config = self.config
        if self.sources:
            return draw_from(sources or self.sources, self.random, crop, config.bank_flip)
        if config.student_source == "fresh":
            with torch.no_grad(), self._autocast():
                images = self.generator(self.noise(self._count)[self._student_rows])
                return images, self.teacher(images)[0]
        return self.newest

    @torch.no_grad()
    def _answered(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] in the dtype of training, and the teacher's logits for them."""
        images = images.to(self.dtype, memory_format=torch.channels_last)
        with self._autocast():
            return self._finite(images, self.teacher.network(images))

    @property
    def banks(self) -> dict[str, tuple[ReplayBank, int]]:
        """The banks that a step changes, by the names of their folders, and how many images a step
        adds to each."""
        banks: dict[str, tuple[ReplayBank, int]] = {}
        if self.bank is not None:
            banks["bank"] = (self.bank, self.config.batch_size)
        if self.found is not None and self.found.cutter is not None:
            banks["images"] = (self.found.bank, self.found.kept)
        return banks

    def take_means(self, count: int, learned: int) -> Tensor:
        """The means of the values in `names` over the last `count` steps, which are forgotten; in
        `learned` of them the student learned. A value that overflowed in all of them is NaN."""
        counts = torch.full_like(self.statistics, count)
        counts[-STUDENTS:] = learned
        means = self.statistics / (counts - self.overflows)
        self.statistics.zero_()
        self.overflows.zero_()
        return means

    def _finite(self, images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The batch, with rows of others in place of those for which the teacher overflowed in
        fp16. The bank would give them out again and again."""
        if self.precision != "fp16":
            return images, logits
        good = images.flatten(1).isfinite().all(1) & logits.isfinite().all(1)
        rows = torch.arange(len(good), device=self.device)
        rows = torch.where(good, rows, good.int().argmax())
        return images[rows], logits[rows]

    def noise(self, count: int) -> Tensor:
        """z [count, latent_dim], drawn on the device; the same in all processes."""
        return torch.randn(
            count, self.config.latent_dim, device=self.device, dtype=self.dtype,
            generator=self.random,
        )  # fmt: skip

    def set_student_lr(self, lr: float) -> None:
        """Sets the learning rate for the student's next updates."""
        self._student_lr.fill_(lr)

    @property
    def averaged_student(self) -> nn.Module:
        """The student to evaluate and save: its moving average, if there is one."""
        return self.average.module if self.average else self.student

    def agreement(self, images: Tensor, logits: Tensor) -> float:
        """The share of images [N, C, H, W] for which the student chooses the class of `logits`."""
        return accuracy(self.averaged_student, images.to(self.dtype), logits.argmax(1))

    def estimate(self) -> Estimate | None:
        """Told from images that the student never learns from, if any. Waits for the device."""
        if not self.sources:
            return None
        made, both = self.config.generator != "none", len(self.sources) > 1
        banks = (self.bank.held_out(HELD_OUT),) if both and self.bank is not None else ()
        pairs = (held_out_of(self.sources, HELD_OUT), *banks)
        judged = [(images.to(self.dtype), logits) for images, logits in pairs]
        told = estimate(self.averaged_student, self.teacher.network, *judged, made=made)
        few = self.num_classes <= FEW_CLASSES and not self.config.diversity
        if told and (few if made else self.found is not None and not self.found.tells):
            return told._replace(real=None, between=None)  # images of a class may be all alike
        return told

    @torch.no_grad()
    def fresh(self) -> tuple[Tensor, Tensor]:
        """A freshly generated batch, or without a generator freshly cut images, and the teacher's
        logits for it. It draws noise, so call it only after the last checkpoint of a run, and in
        all processes."""
        if self.config.generator == "none":
            assert self.found is not None
            return self.found.fresh()
        with self._autocast():
            images = self.generator(self.noise(self.config.batch_size)[self._rows])
            logits = self.teacher(images)[0]
        return self.world.gather(images), self.world.gather(logits)

    def fresh_agreement(self, batches: int = 8) -> float:
        """The agreement on freshly generated images, which needs no data: `agreement_fresh`."""
        return sum(self.agreement(*self.fresh()) for _ in range(batches)) / batches

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.device, self.precision)

    def _update_generator(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        config = self.config
        with self._autocast():
            images = self._generator(self.noise(config.batch_size)[self._rows])
            logits, features = self.teacher(images)
            loss = generator_loss(
                logits,
                features,
                **{name: getattr(config, name) for name in _FUSED},
                log_base=config.log_base,
                group=self.world.group,
            )
            total, *parts = loss
            batch = GeneratedBatch(
                images, logits, features, self._student_for_images, self._batch_norm_loss,
                self.world.gather_differentiably,
            )  # fmt: skip
            for name, loss_of in PLAIN_GENERATOR_LOSSES.items():
                weight = getattr(config, name)
                parts.append(loss_of(batch) if weight else torch.zeros_like(total))
                if weight:
                    # The host writes this weight before each step.
                    weight = self._adversarial if name == "adversarial" else weight
                    total = total + weight * parts[-1]
        self._descend(total, self.generator_optimizer, self.scalers[0])
        parts = [part.detach().float() for part in (total, *parts)]
        return images.detach(), logits.detach(), parts

    def _batch_norm_loss(self) -> Tensor:
        if not self.teacher.watching:
            return torch.zeros((), device=self.device)
        return self.teacher.batch_norm_loss(self.world)

    def _student_for_images(self, images: Tensor) -> Tensor:
        return answers_to_images(self.student, images)

    def _update_student(self, images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        if self.precision not in AUTOCAST:
            images = images.to(self.dtype)  # the bank may store a narrower dtype
        with self._autocast():
            loss = distill_loss(
                self._student(images),
                logits,
                temperature=config.temperature,
                scale_by_t2=config.scale_by_t2,
            )
        self._descend(loss.total, self.student_optimizer, self.scalers[1])
        if self.average is not None:
            self.average.update(self.student)
        return loss.total.detach().float(), loss.agreement.float()

    @staticmethod
    def _descend(
        loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def _restart_generator(self) -> None:
        """Initialises the generator anew, in place, and clears the state of its optimizer."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self._seed_at_this_step())
            self.generator.reset()  # type: ignore[operator]
        clear_state(self.generator_optimizer)

    def is_finite(self) -> bool:
        """Whether all weights are finite. Waits for the device."""
        networks = {self.generator, self.student, self.averaged_student}
        weights = [p.detach() for network in networks for p in network.parameters() if p.numel()]
        largest: list[Tensor] = []
        # By dtype, since a list of one dtype is read by one kernel. The largest absolute value
        # cannot overflow, and is NaN if any is.
        for dtype in {p.dtype for p in weights if p.is_floating_point()}:
            largest += torch._foreach_norm([p for p in weights if p.dtype == dtype], math.inf)
        return bool(torch.stack(largest).isfinite().all())

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, except the bank's entries, which are saved separately."""
        state = {name: state_of(live) for name, live in self.live.items()}
        return {
            **state,
            "statistics_of": self.names,
            "steps": self.steps,
            "learned": self.learned,
            "bank_added": self.bank.added if self.bank else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores, in place, what `state_dict` returned; raises UserError if it is of another
        student, and anything if it is damaged."""
        if other := misfit(self.student, state["student"]):
            raise UserError(f"the run has another student: {other}")
        self.steps = state["steps"]
        if type(self.steps) is not int or self.steps < 0:
            raise ValueError(f"steps cannot be {self.steps!r}")
        self.learned = state.get("learned", self.steps)
        saved = list(state.get("statistics_of", _FIRST_STATISTICS))
        for name in ("statistics", "overflows"):
            if name in state:
                # What is new since then was off in that run.
                values = dict(zip(saved, torch.as_tensor(state[name]).tolist(), strict=True))
                state = {**state, name: torch.tensor([values.get(one, 0.0) for one in self.names])}
        for name, live in self.live.items():
            if name == "random" and state[name].shape != self.random.get_state().shape:
                # The run began on another kind of device, whose random numbers differ anyway.
                self.random.manual_seed(self._seed_at_this_step())
            elif name in state or name not in ("cuda_random", "overflows", "half_turns"):
                restore(live, state[name])

    def _seed_at_this_step(self) -> int:
        """A seed that depends only on the run's seed and the step, so that a resumed run draws the
        same. With the large prime factor, runs with different seeds get different ones."""
        return self.config.seed * 1_000_003 + self.steps

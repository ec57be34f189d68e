"""One training step for all recipes: one generator update, then K student updates.

    z = randn(N, latent_dim)   x = G(z)   t, f = T(x)
    G:  one_hot L_oh(t) + entropy L_ie(t) + activation L_a(f)
    S:  L_KD(S(x'), t') on images x' with teacher logits t', K times

What x' is decides the method, and nothing else does: this step's own images (the published code),
freshly drawn ones (the paper's text), or draws from the replay bank (`fast`).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..losses import distill_loss, generator_loss
from ..models import Generator
from .bank import ReplayBank
from .ema import Average
from .teacher import FrozenTeacher

# What `Step.statistics` sums up, in this order.
STATISTICS = ("generator_loss", "one_hot", "entropy", "activation", "distill_loss", "agreement")

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Step:
    """Everything that a training step reads and writes; calling it runs one step.

    Shapes are static and nothing returns to the host. `statistics` [6] accumulates the values
    named in `STATISTICS` (those of the student averaged over its updates) until the caller
    clears it.

    Args:
        config: sizes, weights and rates; the only thing in which recipes differ.
        generator, teacher, student: on `device`, in the dtype to train in.
        device: of all tensors.
        precision: "fp32" (no autocast; also right for fp64 networks), "bf16" or "fp16".
    """

    def __init__(
        self,
        config: Config,
        generator: Generator,
        teacher: FrozenTeacher,
        student: nn.Module,
        num_classes: int,
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        self.config, self.device, self.precision = config, device, precision
        self.generator, self.teacher, self.student = generator.train(), teacher, student.train()
        self.average = Average(student, config.ema_decay) if config.ema_decay else None
        self.bank: ReplayBank | None = None
        if config.student_source == "bank":
            self.bank = ReplayBank(
                config.bank_images, generator.image_shape, num_classes, config.bank_dtype, device
            )
        self.generator_optimizer = torch.optim.Adam(
            generator.parameters(),
            lr=config.generator_lr,
            betas=(config.generator_beta1, 0.999),
            fused=True,
        )
        self.student_optimizer = torch.optim.Adam(
            student.parameters(), lr=config.student_lr, fused=True
        )
        # bf16 has fp32's range; only fp16 gradients need scaling.
        self.scalers = [
            torch.amp.GradScaler(device.type, enabled=precision == "fp16") for _ in range(2)
        ]
        self.random = torch.Generator(device).manual_seed(config.seed)
        self.dtype = next(generator.parameters()).dtype
        self.statistics = torch.zeros(len(STATISTICS), device=device)
        # The last generated batch and the teacher's logits for it.
        self.newest = (torch.empty(0), torch.empty(0))
        self.steps = 0

    def __call__(self) -> None:
        config = self.config
        every = config.generator_restart_every
        if every and self.steps and self.steps % every == 0:
            self._restart_generator()
        images, logits, parts = self._update_generator()
        self.newest = (images, logits)
        if self.bank is not None:
            self.bank.add(images, logits)
        count = config.student_batch_size or config.batch_size
        learned = torch.zeros(2, device=self.device)
        for _ in range(config.student_updates):
            if self.bank is not None:
                images, logits = self.bank.draw(count, self.random)
            elif config.student_source == "fresh":
                with torch.no_grad(), self._autocast():
                    images = self.generator(self.noise(count))
                    logits, _ = self.teacher(images)
            loss, agreement = self._update_student(images, logits)
            learned += torch.stack([loss, agreement])
        self.statistics += torch.cat([torch.stack(parts), learned / config.student_updates])
        self.steps += 1

    def noise(self, count: int) -> Tensor:
        """z [count, latent_dim], drawn on the device."""
        return torch.randn(
            count, self.config.latent_dim, device=self.device, dtype=self.dtype,
            generator=self.random,
        )  # fmt: skip

    def set_student_lr(self, lr: float) -> None:
        """Sets the learning rate for the student's next updates."""
        for group in self.student_optimizer.param_groups:
            group["lr"] = lr

    @property
    def result(self) -> nn.Module:
        """The student to evaluate and save: its average if there is one."""
        return self.average.module if self.average else self.student

    @torch.no_grad()
    def agreement(self, images: Tensor, logits: Tensor) -> float:
        """Share of images [N, C, H, W] for which the result chooses the class of logits [N, C]."""
        agree = self.result(images.to(self.dtype)).argmax(1) == logits.argmax(1)
        return agree.float().mean().item()

    @torch.no_grad()
    def fresh(self) -> tuple[Tensor, Tensor]:
        """A newly generated batch and the teacher's logits for it. Draws noise, so it belongs at
        the end of a run, after the last checkpoint."""
        images = self.generator(self.noise(self.config.batch_size))
        return images, self.teacher(images)[0]

    def fresh_agreement(self, batches: int = 8) -> float:
        """`agreement` on newly generated images: the signal that needs no data."""
        return sum(self.agreement(*self.fresh()) for _ in range(batches)) / batches

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision not in _AUTOCAST:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, _AUTOCAST[self.precision])

    def _update_generator(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        config, (scaler, _) = self.config, self.scalers
        with self._autocast():
            images = self.generator(self.noise(config.batch_size))
            logits, features = self.teacher(images)
            loss = generator_loss(
                logits,
                features,
                one_hot=config.one_hot,
                entropy=config.entropy,
                activation=config.activation,
                log_base=config.log_base,
            )
        self._descend(loss.total, self.generator_optimizer, scaler)
        return images.detach(), logits.detach(), [part.detach().float() for part in loss]

    def _update_student(self, images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        config, (_, scaler) = self.config, self.scalers
        if self.precision not in _AUTOCAST:
            images = images.to(self.dtype)  # the bank may store fewer bits
        with self._autocast():
            loss = distill_loss(
                self.student(images),
                logits,
                temperature=config.temperature,
                scale_by_t2=config.scale_by_t2,
            )
        self._descend(loss.total, self.student_optimizer, scaler)
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
        """A fresh generator in the same memory, with its optimizer's memory wiped."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # Seeded by the step, so that a resumed run draws the same new generator.
            torch.manual_seed(self.config.seed * 1_000_003 + self.steps)
            self.generator.reset()
        for state in self.generator_optimizer.state.values():
            for value in state.values():
                value.zero_()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs but the bank's contents, which are saved incrementally."""
        state = {
            "generator": self.generator.state_dict(),
            "student": self.student.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "student_optimizer": self.student_optimizer.state_dict(),
            "scalers": [scaler.state_dict() for scaler in self.scalers],
            "random": self.random.get_state(),
            # Dropout in a student of the user's own draws from the global generators.
            "global_random": torch.get_rng_state(),
            "statistics": self.statistics,
            "steps": self.steps,
            "bank_added": self.bank.added if self.bank else 0,
        }
        if self.average:
            state["average"] = self.average.module.state_dict()
            state["average_updates"] = self.average.updates
        if self.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.generator.load_state_dict(state["generator"])
        self.student.load_state_dict(state["student"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.student_optimizer.load_state_dict(state["student_optimizer"])
        for scaler, saved in zip(self.scalers, state["scalers"], strict=True):
            scaler.load_state_dict(saved)
        self.random.set_state(state["random"])
        torch.set_rng_state(state["global_random"])
        self.statistics.copy_(state["statistics"])
        self.steps = state["steps"]
        if self.bank is not None:
            self.bank.added = state["bank_added"]
        if self.average:
            self.average.module.load_state_dict(state["average"])
            self.average.updates = state["average_updates"]
        if self.device.type == "cuda" and "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"], self.device)

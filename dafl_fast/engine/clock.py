"""The clock of a run: evaluation and saving are timed apart from training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


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

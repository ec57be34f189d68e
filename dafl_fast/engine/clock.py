"""Measures how long a run trains, and warns when it hangs."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import torch

log = logging.getLogger(__name__)


class Clock:
    """Counts the seconds of training. Those inside `paused(what)` are counted separately."""

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


class Watchdog:
    """A thread that runs inside `with`. If there is no `beat` for `seconds`, it logs one warning,
    and another one for each later stall. With 0 seconds it never does."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._watched = threading.get_ident()
        self._beat = ("the start", time.monotonic())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="dafl_fast-watchdog")

    def beat(self, where: str) -> None:
        """Tells the watchdog that the run has reached `where` ("step 12")."""
        self._beat = (where, time.monotonic())

    def __enter__(self) -> Watchdog:
        self.beat("the start")
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        warned = None
        while not self._ended.wait(self._seconds / 4):
            beat = where, since = self._beat
            if time.monotonic() - since >= self._seconds and beat != warned:
                warned = beat
                stack = traceback.extract_stack(sys._current_frames()[self._watched])
                log.warning(
                    "nothing has moved for %.0f s: the run stands at %s, in %s (%s:%d)",
                    time.monotonic() - since, where, stack[-1].name, stack[-1].filename,
                    stack[-1].lineno or 0,
                )  # fmt: skip

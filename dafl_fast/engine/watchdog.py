"""A thread that says where a run stands when it no longer moves."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback

log = logging.getLogger(__name__)


class Watchdog:
    """Between `with` and its end, warns when no `beat` came for `seconds`; once for each stall.

    Args:
        seconds: how long nothing may happen; 0 switches it off.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._watched = threading.get_ident()
        self._beat = ("the start", time.monotonic())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="dafl_fast-watchdog")

    def beat(self, where: str) -> None:
        """The watched thread has come to `where` ("step 12")."""
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

"""An orderly end: after the first signal a run finishes its step and saves, the second ends it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def noticed(event: threading.Event, also_after: Callable[[], bool]) -> Iterator[None]:
    """Inside, the first SIGINT, SIGTERM or SIGHUP sets `event`, and a second one has its usual
    effect. SIGHUP stays ignored under nohup. Outside of the main thread there are no signals.

    Args:
        also_after: whether the first signal shall have no effect afterwards either.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[signal.Signals, Any] = {}

    def usual() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: object) -> None:
        event.set()
        usual()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before = signal.getsignal(number)
        # One that a program in C has set is None, and could not be set again.
        if before is not None and not (number == signal.SIGHUP and before == signal.SIG_IGN):
            previous[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        if not also_after():
            usual()

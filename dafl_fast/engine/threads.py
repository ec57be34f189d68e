"""How many threads does a run use, and when another number?

Beside another program, threads that wait for each other are slower than fewer threads would be: all
wait for the one that has no core. `Threads` measures the steps, and keeps what is faster.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config
from ..device import may_change_threads, pick_threads, usable_cpus
from .folder import read_environment
from .step import Step

log = logging.getLogger(__name__)

# A look at the steps takes this many and this long; it ends after LONGEST seconds anyway.
STEPS, SHORTEST, LONGEST = 3, 0.5, 2.0
# What makes it try another number: steps that take so much longer than they did; so many threads
# that wait for a core, on average, while others use as much; so many cores that nobody uses.
SLOWER, WAITING, IDLE = 1.5, 0.25, 0.75
# It goes on with the other number if steps take less than this share of the time.
FASTER = 0.9
# At least so many seconds lie between two trials, and a trial in vain may cost this share of the
# time to the next one.
PAUSE, COST = 5.0, 0.01


@dataclass(frozen=True)
class Load:
    """How busy the machine has been. Seconds are counted from some moment in the past.

    Attributes:
        at: when this was read.
        waited: what the threads of this process have waited for a core, all together; None if the
            system does not tell.
        idle: what the processors that this process may use have been idle, likewise.
        others: what other programs have used of them, likewise.
    """

    at: float
    waited: float | None
    idle: float | None
    others: float | None

    @classmethod
    def read(cls) -> Load:
        return cls(time.monotonic(), _waited(), *_idle_and_others())

    def since(self, before: Load) -> tuple[float | None, float | None, float | None]:
        """Threads that waited, cores that were idle and cores that others used since `before`, on
        average."""
        seconds = max(self.at - before.at, 1e-9)

        def rate(new: float | None, old: float | None) -> float | None:
            return None if new is None or old is None else max(0.0, (new - old) / seconds)

        return (
            rate(self.waited, before.waited),
            rate(self.idle, before.idle),
            rate(self.others, before.others),
        )


def _waited() -> float | None:
    """The kernel counts for each thread how long it was ready but did not run."""
    nanoseconds = []
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError, IndexError, ValueError):  # it may have just ended
                nanoseconds.append(int((task / "schedstat").read_text().split()[1]))
    return sum(nanoseconds) / 1e9 if nanoseconds else None


def _idle_and_others() -> tuple[float | None, float | None]:
    idle, busy, usable = 0, 0, {f"cpu{cpu}" for cpu in usable_cpus()}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/stat").read_text().splitlines():
            name, *counts = line.split()
            if name in usable:
                # user, nice, system, idle, iowait, irq, softirq, steal
                ticks = [int(count) for count in counts[:8]]
                idle += sum(ticks[3:5])
                busy += sum(ticks[:3] + ticks[5:])
    if idle + busy == 0:  # no Linux, or a sandbox that shows zeros
        return None, None
    second = os.sysconf("SC_CLK_TCK")
    return idle / second, busy / second - time.process_time()


def threads_of_run(config: Config) -> int:
    """The number of threads that a run begins with. A resumed one with `--steps` has those that it
    was begun with, so that it goes on exactly, unless several processes share the cores now."""
    threads = pick_threads(config.threads)
    folder = config.resume if config.steps is not None and config.threads == "auto" else None
    if folder is None or os.environ.get("WORLD_SIZE", "1") != "1":
        return threads
    kept = read_environment(folder).get("threads")
    return kept if isinstance(kept, int) and 0 < kept <= 8 * (os.cpu_count() or 1) else threads


@dataclass(frozen=True)
class Look:
    """What some steps in a row have shown: the seconds of a step, and how busy the machine was."""

    step: float
    waiting: float | None
    idle: float | None
    others: float | None


@dataclass(frozen=True)
class Trial:
    """Another number of threads is being tried.

    Attributes:
        before: the number before it.
        look: the steps with that.
        since: the second of training in which it began.
        reason: why fewer or more threads may be faster.
    """

    before: int
    look: Look
    since: float
    reason: str


class Threads:
    """Finds the number of threads with which steps are fastest, again and again.

    Args:
        most: the number that the run begins with.
        seconds: how long the run is. It tries fewer threads without a reason if the trial is short
            against that.
        begun: the seconds of training so far.
        use: sets the number of threads.
        load: reads how busy the machine is.
    """

    def __init__(
        self,
        most: int,
        seconds: float,
        begun: float = 0.0,
        use: Callable[[int], None] = torch.set_num_threads,
        load: Callable[[], Load] = Load.read,
    ) -> None:
        self.most = self.number = most
        self._seconds, self._use, self._load = seconds, use, load
        self._trial: Trial | None = None
        self._usual: float | None = None  # the seconds of a step, at the best, with this number
        self._exploring = True
        self._fewer_after = self._more_after = 0.0  # seconds of training
        self._times: list[float] = []
        self._settling = True  # the next step is the first one with this number: it may prepare
        self._last = begun
        self._before = load()

    @classmethod
    def for_run(cls, config: Config, step: Step, begun: float) -> Threads | None:
        """For a run that has trained for `begun` seconds. None if the number must stay as it is:
        with `--steps`, so that the run can be resumed exactly; in several processes, which wait for
        each other; with compiled networks, which are compiled for a number."""
        threads = torch.get_num_threads()
        if config.steps is not None or config.max_seconds is None or config.compile:
            return None
        if step.device.type != "cpu" or step.world.size > 1 or threads == 1:
            return None
        if not may_change_threads(config.threads):
            return None
        return cls(threads, config.max_seconds, begun)

    def after_step(self, seconds: float) -> None:
        """Called after each step, with the seconds of training so far."""
        took, self._last = seconds - self._last, seconds
        settling, self._settling = self._settling, False
        if settling and took < LONGEST:
            self._before = self._load()
            return
        self._times.append(took)
        total = sum(self._times)
        if (len(self._times) < STEPS or total < SHORTEST) and total < LONGEST:
            return
        now = self._load()
        look = Look(statistics.median(self._times), *now.since(self._before))
        self._times, self._before = [], now
        if self._trial is None:
            self._consider(look)
        else:
            self._judge(look, self._trial)

    def _consider(self, look: Look) -> None:
        """Begins a trial with another number of threads if there is a reason."""
        now, waiting = self._last, look.waiting or 0.0
        # A thread of this process that writes a file also makes the others wait, but not for long.
        contended = waiting > WAITING and (look.others is None or look.others > WAITING)
        slow = self._usual is not None and look.step > SLOWER * self._usual
        # One trial only looks whether the network is too small for so many threads. The first
        # steps are no measure for it.
        cheap = self._takes(look) <= COST * self._seconds
        exploring = self._exploring and cheap and self._usual is not None
        self._usual = look.step if self._usual is None else min(self._usual, look.step)
        if self.number > 1 and now >= self._fewer_after and (contended or slow or exploring):
            fewer = self.number - math.ceil(waiting) if contended else self.number // 2
            reason = ", because other programs use the cores" if contended else ""
            self._try(max(1, fewer), look, reason)
        elif self.number < self.most and now >= self._more_after:
            if look.idle is None or look.idle > IDLE:
                reason = ", because cores are free again" if look.idle is not None else ""
                self._try(min(self.most, 2 * self.number), look, reason)

    def _takes(self, look: Look) -> float:
        """The seconds of a trial, if its steps take as long as those of `look`."""
        return look.step + max(look.step, min(LONGEST, max(SHORTEST, STEPS * look.step)))

    def _try(self, number: int, look: Look, reason: str) -> None:
        self._trial = Trial(self.number, look, self._last, reason)
        self._change(number)

    def _change(self, number: int) -> None:
        self._use(number)
        self.number, self._settling = number, True
        self._before = self._load()

    def _judge(self, look: Look, trial: Trial) -> None:
        """Ends a trial: keeps its number if steps were faster, else goes back."""
        self._trial = None
        if look.step < FASTER * trial.look.step:
            log.warning(
                "with %s a step takes %.1f times as long as with %d%s: going on with %s",
                _count(trial.before), trial.look.step / look.step, self.number, trial.reason,
                _count(self.number),
            )  # fmt: skip
            self._usual = look.step
            self._exploring &= not trial.reason
            fewer = self.number < trial.before
            self._more_after = self._last + (PAUSE if fewer else 0.0)
            self._fewer_after = self._last
            return
        tried = self.number
        self._change(trial.before)
        self._usual = trial.look.step
        if self._exploring and not trial.reason:
            self._exploring = False
            return
        steps = (self._last - trial.since) / look.step
        lost = steps * (look.step - trial.look.step)
        again = self._last + max(PAUSE, lost / COST)
        if tried < trial.before:
            self._fewer_after = again
        else:
            self._more_after = again


def _count(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"

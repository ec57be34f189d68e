"""When is a run over, and what is the student's learning rate until then?"""

from __future__ import annotations

import math
from typing import Any

from ..config import Config
from ..errors import UserError, first_line

WARM_UP = 0.02  # of the run's length
# With --until-flat the learning rate stays at its peak until the estimate has not risen by more
# than RISE for PATIENCE evaluations. Then it falls for as long again as a third of the time so far.
RISE, PATIENCE, DECAY = 0.002, 4, 1 / 3


class Schedule:
    """The learning rate's schedule. With `until_flat` it also decides how long the run is.

    All shares are of the longest length that the run may have, by steps or by time.

    Raises:
        UserError: `state`, that of a checkpoint, is damaged.
    """

    def __init__(self, config: Config, state: dict[str, Any] | None = None) -> None:
        self.config = config
        self._longest = [config.steps, config.max_seconds]
        # Shares of another length mean nothing: a run that is made longer looks anew.
        longest = state.get("longest", self._longest) if isinstance(state, dict) else self._longest
        if state is None or longest != self._longest:
            state = {"estimates": [], "decay_from": None}
        try:
            estimates, decay_from = list(map(float, state["estimates"])), state["decay_from"]
            self._estimates: list[float] = estimates
            self._decay_from = None if decay_from is None else float(decay_from)
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"the checkpoint's schedule is damaged: {first_line(error)}") from error

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "estimates": list(self._estimates),
            "decay_from": self._decay_from,
            "longest": self._longest,
        }

    def note(self, estimate: float, share: float) -> None:
        """Takes notice of how good the student is after `share` of the longest length."""
        if not self.config.until_flat or self._decay_from is not None:
            return
        self._estimates.append(estimate)
        before, lately = self._estimates[:-PATIENCE], self._estimates[-PATIENCE:]
        if before and max(lately) <= max(before) + RISE:
            self._decay_from = share

    def done(self, share: float) -> float:
        """The share of the run that is done after `share` of its longest length; 1 at its end."""
        return share / self._length(share) if self.config.until_flat else share

    def factor(self, share: float) -> float:
        """On the student's peak learning rate, after `share` of the longest length."""
        config = self.config
        warm_up = min(1.0, share / WARM_UP + 0.01)
        if config.until_flat:
            begun = self._length(share) / (1 + DECAY)
            return warm_up * _cosine(max(0.0, share - begun) / (DECAY * begun))
        if config.student_schedule == "constant":
            return 1.0
        if config.student_schedule == "multistep":
            return 1.0 if share < 0.4 else 0.1 if share < 0.8 else 0.01
        return warm_up * _cosine(share)

    def _length(self, share: float) -> float:
        """Of the run, so far as it is known after `share`."""
        if self._decay_from is None and share >= 1 / (1 + DECAY):
            self._decay_from = 1 / (1 + DECAY)  # at the latest, to end with the longest length
        return 1.0 if self._decay_from is None else (1 + DECAY) * self._decay_from


def one_cycle(done: float) -> float:
    """Factor on the learning rate when the share `done` of the training is over: a fifth of it
    rises by half a cosine from 1/25, the rest falls by half a cosine to zero."""
    if done < 0.2:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * done / 0.2))
    return 0.5 * (1 + math.cos(math.pi * (done - 0.2) / 0.8))


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

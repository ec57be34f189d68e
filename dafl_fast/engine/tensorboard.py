"""The metrics of a run as TensorBoard events."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..errors import first_line
from ..pictures import open_image
from .folder import RunFolder
from .step import Step

log = logging.getLogger(__name__)


class TensorBoard:
    """A callback that writes each row's numbers, and each grid of images, to RUN/tensorboard.

    When a run is resumed, old events of steps after `step` are removed.
    """

    def __init__(self, folder: RunFolder, step: Step) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._device, self._broken = folder, step.device, False
        self._writer = SummaryWriter(  # type: ignore[no-untyped-call]
            str(folder.path / "tensorboard"), purge_step=step.steps + 1
        )

    def __call__(self, row: dict[str, Any]) -> None:
        step = row["step"]
        self._write(lambda: self._add_scalars(row))
        if "class_counts" in row:
            # The grid is already in the writing thread's queue.
            self._folder.later(lambda: self._write(lambda: self._add_grid(step)), self._device)

    def _add_scalars(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def _add_grid(self, step: int) -> None:
        import numpy as np

        with open_image(self._folder.samples(step), ("PNG",)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image("generated", pixels, step, dataformats="HWC")

    def _write(self, write: Callable[[], object]) -> None:
        """Calls `write`. If that fails, the run does not fail with it."""
        if self._broken:
            return
        try:
            write()
        except Exception as error:  # such as a full disk or a missing picture
            self._broken = True
            log.warning("no more TensorBoard events are written: %s", first_line(error))

    def close(self) -> None:
        """Writes what has not been written yet."""
        self._write(self._writer.close)

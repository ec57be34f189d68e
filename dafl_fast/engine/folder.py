"""The folder of one run: what lies where, and how it is written and read again.

config.yaml  metrics.jsonl  summary.json  environment.json  checkpoint.pt  bank/*.safetensors
student.safetensors  samples/*.png
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import __version__, build_info
from ..config import Config
from ..errors import UserError
from .bank import ReplayBank
from .checkpoint import (
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    save_weights,
    write_text,
)
from .step import Step

# What may differ when a run is resumed: how long it lasts and how it is watched.
RESUMABLE = (
    "steps", "max_seconds", "resume", "device", "eval", "data_dir", "download", "eval_every",
    "save_every", "log_every", "teacher",
)  # fmt: skip


class RunFolder:
    """Paths and files of a run.

    Every file is replaced atomically, metrics.jsonl is only appended to, and the checkpoint names
    the bank files that belong to it: whenever a run is killed, the last checkpoint is complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.jsonl"
        # Bank entries that are on disk, as (first, last + 1) numbers of addition.
        self._shards: list[tuple[int, int]] = []

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """A folder for a new run.

        Raises:
            UserError: there is a run in it already, or it cannot be made.
        """
        path = config.out_dir
        try:
            if path is None:
                path = _next_free(Path("runs"), f"{config.preset}-{config.recipe}")
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out-dir {path} cannot be made: {error.strerror}") from error
        if (path / "config.yaml").exists():
            raise UserError(
                f"--out-dir {path} holds another run; choose another folder, or go on with that "
                f"run: --resume {path}"
            )
        folder = cls(path)
        folder.write_config(config)
        folder.write_json("environment.json", environment())
        return folder

    def write_config(self, config: Config) -> None:
        """Writes config.yaml, from which a run can be resumed."""
        values = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(config).items()
            if name not in ("resume", "out_dir")
        }
        write_text(self.path / "config.yaml", yaml.safe_dump(values, sort_keys=False))

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file of the run, atomically."""
        write_text(self.path / name, json.dumps(value, indent=2) + "\n")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"could not write {self.metrics}: {error.strerror}") from error

    def save(self, step: Step, progress: dict[str, Any]) -> None:
        """Writes the checkpoint, and before it only those bank entries that are new."""
        if step.bank is not None:
            self._save_bank(step.bank)
        state = {"step": step.state_dict(), "progress": progress, "bank_shards": self._shards}
        save_checkpoint(self.checkpoint, state)
        self._remove_other_shards()

    def restore(self, step: Step) -> dict[str, Any] | None:
        """Loads the last checkpoint into `step`; None when the run had not yet written one."""
        for path in self.path.glob(".*"):
            path.unlink()  # what a killed process was about to write
        if not self.checkpoint.exists():
            self.metrics.unlink(missing_ok=True)
            return None
        state = load_checkpoint(self.checkpoint)
        step.load_state_dict(state["step"])
        self._shards = [(start, stop) for start, stop in state["bank_shards"]]
        if step.bank is not None:
            for start, stop in self._shards:
                step.bank.restore(start, load_tensors(self._shard(start, stop), "replay bank"))
        self._remove_other_shards()
        if self.metrics.exists():
            # Rows after the checkpoint (and a half-written last one) will be written again.
            rows = [line for line in self.metrics.read_text().splitlines() if line.endswith("}")]
            kept = [row for row in rows if json.loads(row)["step"] <= step.steps]
            write_text(self.metrics, "".join(row + "\n" for row in kept))
        progress: dict[str, Any] = state["progress"]
        return progress

    def _shard(self, start: int, stop: int) -> Path:
        return self.path / "bank" / f"{start:09d}-{stop:09d}.safetensors"

    def _save_bank(self, bank: ReplayBank) -> None:
        oldest = bank.added - len(bank)
        saved = self._shards[-1][1] if self._shards else 0
        start = max(saved, oldest)
        self._shards = [shard for shard in self._shards if shard[1] > oldest]
        if bank.added > start:
            save_weights(self._shard(start, bank.added), bank.span(start, bank.added))
            self._shards.append((start, bank.added))

    def _remove_other_shards(self) -> None:
        wanted = {self._shard(*shard) for shard in self._shards}
        for path in (self.path / "bank").glob("*"):
            if path not in wanted:
                path.unlink(missing_ok=True)


def read_config(path: Path) -> dict[str, Any]:
    """The settings of the run in `path`, as keyword arguments of Config.

    Raises:
        UserError: there is no run in that folder.
    """
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError(f"--resume {path}: there is no run in that folder (no config.yaml)")
    try:
        values = yaml.safe_load(file.read_text())
        known = {field.name for field in dataclasses.fields(Config)}
        if not isinstance(values, dict) or not values.keys() <= known:
            raise ValueError("unknown settings")
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{file} is not the configuration of a run: {error}") from error
    for name in ("teacher", "data_dir"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    return values


def environment() -> dict[str, Any]:
    """Versions and machine, for environment.json and bug reports."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "dafl_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "build": build_info(),
    }


def _next_free(parent: Path, stem: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / f"{stem}-{number:03d}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1

"""The folder of a run: its files, and how they are written and read.

config.yaml  metrics.jsonl  summary.json  environment.json  checkpoint.pt  bank/*.safetensors
images/*.safetensors  student.safetensors  samples/*.png  report.html  tensorboard/  .lock
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..device import environment
from ..errors import UserError
from ..files import (
    check_file,
    discard,
    load_checkpoint,
    load_tensors,
    read_json,
    read_text,
    reading,
    save_checkpoint,
    save_weights,
    write_json,
    write_text,
)
from ..settings import Mark, check_unchanged, marked, plain
from .bank import ReplayBank
from .live import copied, map_tensors
from .step import Step

log = logging.getLogger(__name__)

# Only what has these names is ever removed: temporary folders (see `write_atomically`),
_LEFTOVER = re.compile(r"\.[\w-]+\.(pt2?|yaml|jsonl?|safetensors|png|onnx|html)(\.md)?\.\w{8}")
# and files with entries of the replay bank.
_SHARD = re.compile(r"\d{9,}-\d{9,}\.safetensors")
# Of the progress in a checkpoint.
_NUMBERS = ("train_seconds", "wall_seconds", "collapsed_steps", "logged", "logged_learned")
_LONGEST_ROW = 2**20  # bytes; one with the counts of 20,000 classes has a tenth of that
# What the package computes with of a summary, and what kind of value it is.
_SUMMARY: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("train_seconds", "images_per_second", "agreement_fresh"), (int, float)),
    **dict.fromkeys(("student_accuracy", "teacher_accuracy"), (int, float, NoneType)),
    **dict.fromkeys(("steps", "num_classes"), (int,)),
    **dict.fromkeys(("student_parameters", "teacher_parameters"), (int,)),
    "interrupted": (bool,),
    "convention": (dict,),
    **dict.fromkeys(("estimated_between", "images_class_counts"), (list, NoneType)),
}

# The folders of banks, named as in `Step.banks`.
_BANKS = ("bank", "images")


class RunFolder:
    """Paths and files of a run.

    Every file is replaced atomically, metrics.jsonl is only appended to, and the checkpoint names
    the bank files that belong to it. So the last checkpoint is complete, whenever a run is killed.
    A separate thread writes large files while training continues.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.jsonl"
        # The banks' entries that are on disk, by the bank's name: (start, stop) counts of added
        # images, for each file.
        self._shards: dict[str, list[tuple[int, int]]] = {name: [] for name in _BANKS}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="dafl_fast-writer")
        self._pending: list[Future[None]] = []

    @classmethod
    def create(cls, config: Config) -> Path:
        """Makes the folder for a new run.

        Raises:
            UserError: the folder is not empty, or cannot be made.
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
        if not all(_LEFTOVER.fullmatch(one.name) for one in path.iterdir()):
            raise UserError(f"--out-dir {path} is not empty; choose a new folder")
        cls(path).write_config(config)
        return path

    def samples(self, step: int) -> Path:
        """The grid of images generated at `step`."""
        return self.path / "samples" / f"step-{step:07d}.png"

    @property
    def images_grid(self) -> Path:
        """The grid of images that the user gave."""
        return self.path / "samples" / "images.png"

    def write_config(self, config: Config) -> None:
        """Writes config.yaml, from which a run can be resumed, and environment.json if there is
        none yet."""
        import yaml

        values = plain(config, without=Mark.OWN_FOLDER)
        write_text(self.path / "config.yaml", yaml.safe_dump(values, sort_keys=False))
        if not (self.path / "environment.json").exists():  # killed before, or new
            write_json(self.path / "environment.json", environment())

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file of the run, atomically."""
        self._check_it_is_there()
        write_json(self.path / name, value)

    def save_student(self, state: dict[str, Tensor]) -> None:
        """Writes the student's weights, atomically, when all of before is written: a run with a
        student and no checkpoint cannot go on."""
        self.flush()
        self._check_it_is_there()
        save_weights(self.path / "student.safetensors", state)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        self._check_it_is_there()
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"could not write {self.metrics}: {error.strerror}") from error

    def later(self, write: Callable[[], None], device: torch.device) -> None:
        """Lets the writing thread call `write`, when `device` has done everything queued so far.

        `write` may read only tensors that are never changed again.
        """

        def write_if_there() -> None:
            self._check_it_is_there()
            try:
                write()
            except UserError:
                self._check_it_is_there()  # which would be the reason
                raise

        if device.type != "cuda":
            self._pending.append(self._writer.submit(write_if_there))
            return
        queued = torch.cuda.current_stream(device).record_event()

        def write_on_side_stream() -> None:
            with torch.cuda.stream(torch.cuda.Stream(device)):
                queued.wait()
                write_if_there()

        self._pending.append(self._writer.submit(write_on_side_stream))

    def flush(self) -> None:
        """Waits until everything is written; raises UserError if writing failed."""
        while self._pending:
            self._pending.pop(0).result()

    def close(self) -> None:
        """Waits until everything is written or has failed."""
        self._writer.shutdown()

    def save(self, step: Step, progress: dict[str, Any]) -> None:
        """Copies the step's state and the new bank entries, on the device. The writing thread
        writes the copies while training continues.

        Raises:
            UserError: an earlier file could not be written.
        """
        self.flush()
        entries: dict[Path, dict[str, Tensor]] = {}
        for name, (bank, _) in step.banks.items():
            entries |= self._new_entries(name, bank)
        shards = {f"{name}_shards": shards for name, shards in self._shards.items()}
        state = copied({"step": step.state_dict(), "progress": progress, **shards})

        def write() -> None:
            for shard, tensors in entries.items():
                save_weights(shard, tensors)
            self._check_it_is_there()
            save_checkpoint(self.checkpoint, map_tensors(state, Tensor.cpu))
            self._remove_other_shards(state)

        self.later(write, step.device)

    def restore(self, step: Step) -> dict[str, Any] | None:
        """Loads the last checkpoint into `step`, and returns its progress; None without one.

        Raises:
            UserError: there is none although the run has got further, it cannot be read, the run
                had another teacher, or other images that are not the data, or a part of the folder
                is a link to another place.
        """
        first = step.world.first
        inside = [self.path / name for name in (*_BANKS, "samples")]
        for part in (*inside, self.metrics, self.path / "tensorboard"):
            if part.is_symlink():
                raise UserError(
                    f"{part} is a link, and the run would change what it leads to; put a copy of "
                    "that in its place"
                )
        if first:
            for folder in (self.path, *inside):
                for path in folder.glob(".*"):
                    if _LEFTOVER.fullmatch(path.name):
                        discard(path)  # left by a killed process
        if not self.checkpoint.exists():
            for name in ("student.safetensors", "summary.json"):
                if (self.path / name).exists():
                    raise UserError(
                        f"the run in {self.path} cannot go on: it has no checkpoint.pt, and to "
                        f"start again would replace its {name}; start a new one with --out-dir"
                    )
            if first:
                self.metrics.unlink(missing_ok=True)
            return None
        state = load_checkpoint(self.checkpoint)
        with reading(self.checkpoint, "checkpoint", "is damaged"):
            progress = _checked_progress(state["progress"])
            if progress.get("images") != (step.found and step.found.fingerprint):
                begun = f"the run in {self.path} was begun with other images, or without"
                raise UserError(f"{begun}; give the same with --images")
            if progress.get("teacher") not in (None, step.teacher.fingerprint()):
                raise UserError(f"the run in {self.path} was begun with another teacher")
            for name in _BANKS:
                shards = state.get(f"{name}_shards", [])
                state[f"{name}_shards"] = [(int(start), int(stop)) for start, stop in shards]
            step.load_state_dict(state["step"])
            for name, (bank, _) in step.banks.items():
                self._shards[name] = state[f"{name}_shards"]
                self._restore_bank(name, bank)
        if first:
            self._remove_other_shards(state)
        if first and self.metrics.exists():
            # Rows after the checkpoint, and a half-written last row, will be written again.
            kept = [row for row in _rows(self.metrics) if row["step"] <= step.steps]
            write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        return progress

    def _restore_bank(self, name: str, bank: ReplayBank) -> None:
        """Reads the entries of the ring; raises ValueError if the files' are not all of them."""
        shards = self._shards[name]
        stops = [bank.added - len(bank), *(stop for _, stop in shards)]
        starts = [start for start, _ in shards]
        if stops[-1] != bank.added or starts[:1] > stops[:1] or starts[1:] != stops[1:-1]:
            raise ValueError(f"its {name}_shards are not the entries of the replay bank")
        for start, stop in shards:
            shard = self._shard(name, start, stop)
            entries = load_tensors(shard, "replay bank")
            with reading(shard, "replay bank file", "is damaged"):
                if len(entries["images"]) != stop - start:
                    raise ValueError(f"it should have {stop - start} entries")
                bank.restore(start, entries)

    def _check_it_is_there(self) -> None:
        """Raises UserError if somebody has removed the folder, which would be made anew."""
        if not (self.path / "config.yaml").is_file():
            raise UserError(
                f"the run's folder {self.path} was removed or moved while the run went on; nothing "
                "more is written there"
            )

    def _shard(self, name: str, start: int, stop: int) -> Path:
        return self.path / name / f"{start:09d}-{stop:09d}.safetensors"

    def _new_entries(self, name: str, bank: ReplayBank) -> dict[Path, dict[str, Tensor]]:
        """The file for the entries that are not on disk yet, and copies of them."""
        oldest = bank.added - len(bank)
        shards = self._shards[name]
        start = max(shards[-1][1] if shards else 0, oldest)
        self._shards[name] = shards = [shard for shard in shards if shard[1] > oldest]
        if bank.added == start:
            return {}
        shards.append((start, bank.added))
        return {self._shard(name, start, bank.added): bank.span(start, bank.added)}

    def _remove_other_shards(self, state: dict[str, Any]) -> None:
        """Removes the entries that a checkpoint does not name."""
        for name in _BANKS:
            wanted = {self._shard(name, *shard) for shard in state.get(f"{name}_shards", [])}
            for path in (self.path / name).glob("*.safetensors"):
                if path not in wanted and _SHARD.fullmatch(path.name):
                    path.unlink(missing_ok=True)


def read_config(path: Path) -> dict[str, Any]:
    """The settings of the run in `path`, as keyword arguments of Config.

    Raises:
        UserError: there is no run in that folder.
    """
    import yaml

    file = path / "config.yaml"
    if not os.path.exists(file):
        raise UserError(f"there is no run in {path} (no config.yaml)")
    with reading(file, "file", "is not the configuration of a run"):
        text, depth = read_text(file, longest=2**16), 0
        for event in yaml.parse(text, yaml.SafeLoader):
            # All values are simple, or lists of such: aliases and merges have nothing to multiply.
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > 2 or (depth == 2 and isinstance(event, yaml.MappingStartEvent)):
                raise ValueError("values in values")
        values = yaml.safe_load(text)
        known = {field.name for field in dataclasses.fields(Config)}
        known -= marked(Config, Mark.OWN_FOLDER)  # a folder does not say that it is to be trusted
        if not isinstance(values, dict) or not values.keys() <= known:
            raise ValueError("unknown settings")
    return values


def read_environment(path: Path) -> dict[str, Any]:
    """The content of environment.json of the run in `path`, empty without one; raises UserError if
    it is damaged."""
    file = path / "environment.json"
    return read_json(file) if file.exists() else {}


def read_summary(path: Path) -> dict[str, Any]:
    """The content of summary.json of the run in `path`; empty if there is none.

    Raises:
        UserError: it is damaged.
    """
    file = path / "summary.json"
    if not file.exists():
        return {}
    values = _renamed(read_json(file), "agreement_fresh")
    for name, value in values.items():
        if not _is_a(value, _SUMMARY.get(name, (bool, int, float, str, NoneType))):
            raise UserError(f"the file {file} is damaged: {name} cannot be {value!r}")
    measured = {values.get(f"{role}_accuracy") is None for role in ("student", "teacher")}
    if len(measured) > 1:
        raise UserError(f"the file {file} is damaged: it has one accuracy of two")
    return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in the folder `path`. A damaged one is left out with a warning; a
    last one that is half written, as of a run that goes on, without."""
    file = path / "metrics.jsonl"
    found = _rows(file) if file.exists() else ()
    return [_renamed(row, "agreement_training") for row in found]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows that can be read, one at a time."""
    check_file(file, "file")
    lost = 0
    with file.open("rb") as lines:
        while line := lines.readline(_LONGEST_ROW):
            row: Any = None
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
            if line.endswith(b"\n") or len(line) == _LONGEST_ROW:  # else one is being written
                lost += not _is_row(row)
            while len(line) == _LONGEST_ROW and not line.endswith(b"\n"):
                line = lines.readline(_LONGEST_ROW)  # the rest of it
            if _is_row(row):
                yield row
    if lost:
        log.warning("%s damaged rows of %s are left out", lost, file)


def _is_row(row: Any) -> bool:
    """Whether it has a step and a time, and all its values are such as the package writes."""
    if not isinstance(row, dict) or not {"step", "train_seconds"} <= row.keys():
        return False
    for name, value in row.items():
        counts = name.endswith("class_counts")
        if name == "stopped" or (value is None and name.startswith("estimated_")):
            right = isinstance(value, (str, NoneType))
        elif counts or name == "estimated_between":
            kinds = (int,) if counts else (int, float)
            right = isinstance(value, list) and all(_is_a(n, kinds) and n >= 0 for n in value)
        else:
            right = _is_a(value, (int, float))
        if not right:
            return False
    return True


def _is_a(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether `value` has one of the types, and is finite."""
    number = type(value) in (int, float)
    return type(value) in kinds and (not number or abs(value) < 2**63)


def _checked_progress(progress: dict[str, Any]) -> dict[str, Any]:
    """`progress` of a checkpoint; raises ValueError if a value has another type than was saved."""
    numbers = {name: progress[name] for name in _NUMBERS if name in progress}
    for name, value in {**numbers, **progress.get("seconds_apart", {})}.items():
        if not _is_a(value, (int, float)):
            raise ValueError(f"{name} cannot be {value!r}")
    return progress


def _renamed(values: dict[str, Any], agreement: str) -> dict[str, Any]:
    """Values of a run, with "agreement", its name in old runs, renamed to `agreement`."""
    return {agreement if key == "agreement" else key: value for key, value in values.items()}


def check_resumed(config: Config) -> None:
    """Checks that `config` can resume the run in `config.resume`.

    Raises:
        UserError: there is no such run, or a setting differs that must not change.
    """
    assert config.resume is not None
    before = plain(Config(**read_config(config.resume)), without=Mark.RESUMABLE)
    for name in ("teacher_output_name", "feature_layer"):  # once chosen by rules that have changed
        before[name] = before[name] or getattr(config, name)
    check_unchanged(before, config, f" when resuming: the run in {config.resume} has")


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

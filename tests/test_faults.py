"""Full disks, closed pipes, full memory, signals and odd names: a sentence, and nothing lost."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dafl_fast import data, errors, files, train_teacher
from dafl_fast import train as train_command
from dafl_fast.distill import train
from dafl_fast.engine.distributed import World
from dafl_fast.engine.lock import locked
from dafl_fast.errors import UserError, command, first_line, printable
from dafl_fast.evaluate import show
from dafl_fast.export import export_student
from dafl_fast.models import LeNet5
from dafl_fast.networks import load_network, load_weights, open_file
from dafl_fast.pages import write_report
from dafl_fast.pictures import save_samples
from dafl_fast.recipes import make_config
from dafl_fast.reproduce import ReproduceConfig
from dafl_fast.train_teacher import TeacherConfig

from . import test_kept_runs
from .hostile import Small

TINY = {**test_kept_runs.TINY, "eval": "none"}

# -- writing ---------------------------------------------------------------------------------------

STATE = {"weight": torch.arange(10_000.0)}
WRITES = {
    "text": lambda path: files.write_text(path, "x" * 9000),
    "json": lambda path: files.write_json(path, {"x": ["y"] * 9000}),
    "weights": lambda path: files.save_weights(path, STATE),
    "checkpoint": lambda path: files.save_checkpoint(path, STATE),
    "samples": lambda path: save_samples(path, torch.randn(40, 3, 32, 32), torch.randn(40, 5)),
    "export": lambda path: export_student(LeNet5(), path, "safetensors", image_shape=(1, 32, 32)),
    "program": lambda path: export_student(LeNet5(), path, "pt2", image_shape=(1, 32, 32)),
}


def test_a_lock_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    said = r"lock .*\.lock cannot be written: No space left"
    with (
        pytest.raises(UserError, match=said),
        locked(tmp_path / ".lock", "the run is being trained"),
    ):
        pytest.fail("it is not held")
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_student_before_there_is_a_checkpoint(tmp_path, monkeypatch):
    """Or a disk that becomes full at the end of a short run would leave one that cannot go on."""

    def full(*given):
        raise UserError("could not write")

    settings = {**TINY, "out_dir": tmp_path / "run", "save_every": 1e9}
    with monkeypatch.context() as patch:
        patch.setattr("dafl_fast.engine.folder.save_checkpoint", full)
        with pytest.raises(UserError, match="could not write"):
            train(make_config("mnist", **settings), progress="off")
    assert not (tmp_path / "run" / "student.safetensors").exists()
    train(train_command.parse(["--resume", str(tmp_path / "run")]), progress="off")
    assert (tmp_path / "run" / "student.safetensors").exists()


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The operating system refuses to write beyond that many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", WRITES)
def test_what_does_not_fit_leaves_the_old_file_and_no_litter(kind, tmp_path):
    path = tmp_path / "a.file"
    path.write_bytes(b"old")
    with files_of_at_most(2000), pytest.raises(UserError, match=f"could not write {path}: ") as e:
        WRITES[kind](path)
    assert "what was there before is kept" in str(e.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.file"]


_NO_MOUNT = 77
_PRIVATE, _REMOUNT, _NEW_MOUNTS, _NEW_USER = 0x44000, 0x20, 0x20000, 0x10000000
# Processes that have not used autograd, which does not go with a fork.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload([__name__])


def mount(place: Path, options: str, how: int = 0) -> None:
    """Puts a file system of its own upon a folder, or changes that."""
    if ctypes.CDLL(None).mount(
        b"tmpfs", os.fsencode(place), b"tmpfs", how, options.encode() or None
    ):
        os._exit(_NO_MOUNT)


def _work_among_own_mounts(work: Callable[[Path], object], place: Path) -> None:
    ids = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(_NEW_MOUNTS | (_NEW_USER if ids[0] else 0)):
        os._exit(_NO_MOUNT)
    with contextlib.suppress(PermissionError):  # then it cannot mount either
        for name, own in zip(("uid_map", "gid_map"), ids) if ids[0] else ():
            if name == "gid_map":
                Path("/proc/self/setgroups").write_text("deny")
            Path(f"/proc/self/{name}").write_text(f"0 {own} 1")
    mount(Path("/"), "", _PRIVATE)
    torch.set_num_threads(1)
    said = pickle.dumps(work(place / "disk"))
    (place / "said").write_bytes(said)


def among_own_mounts(work: Callable[[Path], object], place: Path) -> Any:
    """What `work` returns in a process that may `mount` upon the empty folder that it is given.
    Skips where that is not allowed."""
    (place / "disk").mkdir()
    process = CLEAN.Process(target=_work_among_own_mounts, args=(work, place))
    process.start()
    process.join()
    if process.exitcode == _NO_MOUNT:
        pytest.skip("no file systems can be mounted here")
    assert process.exitcode == 0
    return pickle.loads((place / "said").read_bytes())


def said_by(call: Callable[[Path], object], path: Path) -> str:
    """What it says to the user who is to put something right."""
    with pytest.raises(UserError) as caught:
        call(path)
    return str(caught.value)


def write_on_full_disks(disk: Path) -> dict[Any, Any]:
    path, found = disk / "a.file", {}
    for options in ("size=8k", "size=1m,nr_inodes=2"):
        for kind, write in WRITES.items():
            mount(disk, options)
            path.write_bytes(b"old")
            said = said_by(write, path)
            left = [p.name for p in disk.iterdir()], path.read_bytes()
            mount(disk, "size=10m,nr_inodes=100", _REMOUNT)
            write(path)
            found[options, kind] = said.replace(str(path), "PATH"), left, path.stat().st_size
    return found


@pytest.mark.slow
def test_full_disks(tmp_path):
    found = among_own_mounts(write_on_full_disks, tmp_path)
    assert len(found) == 2 * len(WRITES)
    for said, left, size in found.values():
        assert said.startswith("could not write PATH: ") and "No space left on device" in said
        assert left == (["a.file"], b"old")
        assert size > 8192


def begin(run: Path) -> None:
    settings = {**TINY, "steps": 6, "save_every": 1e-9, "eval_every": 1e-9, "threads": 1}
    train(make_config("mnist", **settings, out_dir=run), progress="off")


def resume(run: Path) -> bytes:
    train(train_command.parse(["--resume", str(run)]), progress="off")
    return (run / "student.safetensors").read_bytes()


def run_on_full_disks(disk: Path) -> list[Any]:
    run, found = disk / "run", []
    for pages in (10, 40, 80, 120):
        mount(disk, f"size={pages * 4096}")
        said = said_by(begin, run)
        hidden = [path.name for path in run.rglob(".*")]
        mount(disk, "size=100m", _REMOUNT)
        found.append((said, hidden, resume(run)))
    mount(disk, "", _REMOUNT | 1)
    return [*found, said_by(resume, run), said_by(begin, disk / "new")]


@pytest.mark.slow
def test_a_run_whose_disk_becomes_full_goes_on_when_there_is_space(tmp_path):
    """It ends alike, whatever it could not write. One that cannot be written at all is named."""
    *full, read_only, new = among_own_mounts(run_on_full_disks, tmp_path)
    begin(tmp_path / "whole")
    for said, hidden, student in full:
        assert "could not write" in said and "No space left on device" in said
        assert hidden == []
        assert student == (tmp_path / "whole" / "student.safetensors").read_bytes()
    assert "Read-only file system" in read_only and "Read-only file system" in new


@pytest.mark.parametrize("kind", WRITES)
def test_a_file_takes_no_place_of_a_pipe(kind, tmp_path):
    """Nor of a device: as root one would make a file of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        path = tmp_path / name
        with pytest.raises(UserError, match=f"write {path}: it is a pipe or a device, and must be"):
            WRITES[kind](path)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_a_teacher_is_not_trained_where_it_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=f"could not write {tmp_path}: it is a folder"):
        train_teacher.train(TeacherConfig(data="none at all", out=tmp_path))


def test_an_export_whose_card_fails_leaves_no_file(tmp_path):
    (tmp_path / "s.safetensors.md").mkdir()
    with pytest.raises(UserError, match=r"could not write .*\.md: it is a folder, and must be a"):
        export_student(Small(), tmp_path / "s.safetensors", "safetensors", image_shape=(3, 16, 16))
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors.md"]


@pytest.mark.parametrize(
    ("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o177, 0o600)]
)
def test_files_have_the_mode_that_the_umask_leaves(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        files.save_weights(tmp_path / "w", STATE)
        files.write_text(tmp_path / "t", "x")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "wt"] == [mode, mode]


def test_a_name_is_on_the_disk_before_the_write_is_over(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle)))
    files.write_text(tmp_path / "t", "x")
    now = [os.stat(path) for path in (tmp_path / "t", tmp_path)]
    assert [one.st_ino for one in synced] == [one.st_ino for one in now]


def test_temporary_files_can_be_read_by_nobody_else(tmp_path):
    seen = []

    def write(temporary):
        (place,) = tmp_path.iterdir()
        seen.extend([stat.S_IMODE(place.stat().st_mode), temporary.parent == place])

    before = os.umask(0o177)  # which leaves no folder that one can enter
    try:
        files.write_atomically(tmp_path / "a", write)
    finally:
        os.umask(before)
    assert seen == [0o700, True]


@pytest.mark.parametrize("name", ["a\0b", "", "..", "/"])
def test_odd_names_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="could not write "):
        files.write_text(Path(name), "x")
    assert list(tmp_path.iterdir()) == []


def test_long_names_are_written(tmp_path):
    files.write_text(tmp_path / ("x" * 250), "whole")
    assert (tmp_path / ("x" * 250)).read_text() == "whole"
    with pytest.raises(UserError, match="File name too long"):
        files.write_text(tmp_path / ("x" * 256), "whole")


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    left = ".a.file.0123abcd"
    kept = [
        ".a.file.0123abc",
        ".a.file.0123abcg",
        ".a.file.0123abcd.e",
        ".b.file.0123abcd",
        "a.file",
    ]
    for name in (left, *kept):
        (tmp_path / name).write_text("x")
    (tmp_path / f"{left[:-1]}e").mkdir()
    (tmp_path / f"{left[:-1]}e" / ".tmpAbCdEf").write_text("of a library")
    files.remove_leftovers(tmp_path / "a.file", tmp_path / "none" / "a.file")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_run_that_was_killed_at_its_very_start_is_begun_or_resumed(tmp_path):
    """There is what it had begun to write, but no config.yaml, or that alone."""
    (tmp_path / ".config.yaml.0123abcd").mkdir()
    (tmp_path / ".config.yaml.0123abcd" / "new").write_text("steps:")
    summary = train(make_config("mnist", **TINY, out_dir=tmp_path), progress="off")
    assert summary["steps"] == TINY["steps"]
    assert not list(tmp_path.glob(".config*"))
    for path in tmp_path.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(train_command.parse(["--resume", str(tmp_path)]), progress="off")
    assert (tmp_path / "environment.json").exists() and (tmp_path / "summary.json").exists()


# -- reading ---------------------------------------------------------------------------------------


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, sentence in {
        tmp_path / "pipe": "is a pipe or a device, and must be a file",
        Path("/dev/zero"): "is a pipe or a device, and must be a file",
        tmp_path: "is a folder, and must be a file",
        tmp_path / "none": "does not exist",
        tmp_path / ("x" * 300): "cannot be read: File name too long",
    }.items():
        with pytest.raises(UserError, match=sentence):
            files.load_tensors(path, "teacher")
        with pytest.raises(UserError, match=sentence):
            files.read_text(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    state = LeNet5().state_dict()
    state["fc1.bias"][3] = value
    files.save_weights(tmp_path / "w.safetensors", state)
    with pytest.raises(UserError, match=r"is damaged: fc1\.bias has values that are not finite"):
        load_weights(LeNet5(), tmp_path / "w.safetensors", "teacher")


def test_weights_in_whole_numbers_are_refused(tmp_path):
    state = LeNet5().state_dict()
    state["fc1.bias"] = state["fc1.bias"].to(torch.int8)
    files.save_weights(tmp_path / "w.safetensors", state)
    with pytest.raises(UserError, match=r"fc1\.bias should be torch\.float32, the file has torch"):
        load_weights(LeNet5(), tmp_path / "w.safetensors", "teacher")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"std": [0.0]}, r"the mean \[0.1\] cannot have the deviation \[0.0\]"),
        ({"std": [0.2, 0.3]}, ".* cannot have the deviation"),
        ({"mean": "x"}, "a mean or deviation cannot be 'x'"),
        ({"mean": [float("nan")]}, "a mean or deviation cannot be"),
        ({"image_size": [32, "x"]}, "an image size cannot be"),
    ],
)
def test_a_damaged_note_is_refused(change, sentence, tmp_path):
    files.save_weights(tmp_path / "w.safetensors", LeNet5().state_dict())
    files.write_json(tmp_path / "w.json", {"mean": [0.1], "std": [0.2], **change})
    with pytest.raises(UserError, match=f"the note .*w.json is damaged: {sentence}"):
        open_file(tmp_path / "w.safetensors", "model")
    files.write_json(tmp_path / "w.json", {"some": "other file"})
    assert open_file(tmp_path / "w.safetensors", "model").std is None


# -- commands --------------------------------------------------------------------------------------


def test_a_reader_that_goes_ends_a_command_quietly():
    script = (
        "import sys; from dafl_fast.errors import command; "
        "sys.exit(command(lambda: [print('x' * 999) for _ in range(9999)] and None)())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(20) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (">/dev/full", 2, "error: the output could not be written: No space left on device\n"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_an_output_that_cannot_be_written(end, code, said):
    script = (
        "import sys; from dafl_fast.errors import command; "
        "sys.exit(command(lambda: print('x' * 99))())"
    )
    done = subprocess.run(
        ["sh", "-c", f'"$0" "$@" {end}', sys.executable, "-c", script],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, said)


def test_letters_that_a_terminal_lacks(monkeypatch):
    @command
    def main():
        print("rü", os.fsdecode(b"\xff"))

    for encoding, printed in (("ascii", rb"r\xfc \udcff"), ("utf-8", "rü ".encode() + rb"\udcff")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert main() == 0
        assert sys.stdout.buffer.getvalue() == printed + b"\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_full_memory_is_a_sentence(error, capsys):
    @command
    def main():
        raise error

    assert main() == 2
    assert "error: the memory is full (" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_full_memory():
    @command
    def main():
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        main()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_goes_ends_a_run_in_order(ignored, tmp_path):
    """Under nohup, which ignores the signal, it goes on."""
    sent = []

    def hang_up(row):
        if not sent:  # a second one has its usual effect
            sent.append(row)
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        config = make_config("mnist", **TINY, out_dir=tmp_path / "run")
        summary = train(config, hang_up, progress="off")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert summary["interrupted"] is not ignored
    assert (tmp_path / "run" / "checkpoint.pt").exists()


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: make_config("mnist", temperature=float("inf")), "--temperature must be a finite"),
        (lambda: make_config("mnist", stall_seconds=float("inf")), "--stall-seconds must be a fin"),
        (lambda: make_config("mnist", seed=2**70), "--seed must be a whole number of 64 bits, got"),
        (lambda: make_config("mnist", steps=2**63), "--steps must be a whole number of 64 bits"),
        (lambda: make_config("mnist", threads=2**40), "--threads must be auto, or 1 to 4096"),
        (lambda: make_config("mnist", std=(0.0,)), "--std must be 1 positive number, got"),
        (lambda: make_config("mnist", std=()), "--std must be 1 positive number, got"),
        (lambda: TeacherConfig(seed=2**70), "--seed must be a whole number of 64 bits"),
        (lambda: TeacherConfig(seed=2**40), r"--seed must be between -2\^32 and 2\^32"),
        (lambda: TeacherConfig(lr=float("nan")), "--lr must be a finite number"),
        (lambda: ReproduceConfig("mnist", seeds=(0, 2**40)), r"--seeds must be between -2\^32"),
        (lambda: ReproduceConfig("mnist", max_seconds_per_run=float("inf")), "a finite number"),
    ],
)
def test_settings_out_of_all_bounds(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.parametrize("value", ["x", "", "-1", "1e3", "9" * 30])
def test_what_torchrun_says_must_be_a_number(value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match="the environment variable WORLD_SIZE must be a number"):
        World.join(torch.device("cpu"))


def test_processes_that_do_not_find_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="the processes do not find each other: .*torchrun"):
        World.join(torch.device("cpu"))


# -- words -----------------------------------------------------------------------------------------


class Mute(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError(""), "ValueError"),
        (ValueError(" \n\n "), "ValueError"),
        (ValueError("\n  one \n two"), "one"),
        (Mute(), "Mute"),
        (RuntimeError("Weights only load failed. ... set `weights_only=False` ...\n\t(1) do it\n"
                      "\tWeightsUnpickler error: Unsupported global: GLOBAL a.b\n\nCheck"),
         "Unsupported global: GLOBAL a.b"),
        (RuntimeError("set `weights_only` to False, it will likely succeed"),
         "it holds more than tensors"),
    ],
)  # fmt: skip
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line


def test_a_message_is_one_printable_line():
    assert printable("as it is: é × p̄ 中 [/]") == "as it is: é × p̄ 中 [/]"
    assert printable("a\nb\x1b[2J\x07\u202e\udcff") == r"a b\x1b[2J\x07\u202e\udcff"
    assert str(UserError("a\nb\x1b[2J")) == r"a b\x1b[2J"
    long = printable("begin " + "x" * 10**6 + " end")
    assert len(long) < 1100 and long.startswith("begin ") and long.endswith(" end")


def test_warnings_are_printable_lines(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging, "lastResort", logging.StreamHandler())
    errors.log_to_stderr()
    stream = io.StringIO()
    logging.root.handlers[0].setStream(stream)
    logging.getLogger("dafl_fast.some").warning("the file %s\nand", "a\x1b[2J")
    assert stream.getvalue() == "the file a\\x1b[2J\nand\n"


def test_names_are_no_markup_in_a_table(capsys):
    name = "[red]x[/red][/]\x1b[2J"
    figures = {
        "network": name, "accuracy": 0.5, "parameters": 1, "bytes": 1, "latency_ms_1": 1.0,
        "latency_ms_256": 1.0, "class_accuracy": {name: 0.5},
    }  # fmt: skip
    show(
        {"count": 1, "data": name, "split": "test", "image_shape": [1, 2, 3], "device": "cpu",
         "threads": 1, "model": figures}
    )  # fmt: skip
    said = capsys.readouterr().out
    assert said.count(r"[red]x[/red][/]\x1b[2J") == 3 and "\x1b[2J" not in said


class Silent(nn.Module):
    def forward(self, x):
        raise ValueError


def test_a_student_that_fails_without_a_word():
    from dafl_fast.engine.checks import check_student

    with pytest.raises(UserError, match=r"the student does not take .*: ValueError$"):
        check_student(Silent(), torch.zeros(2, 1, 8, 8), 3)


LONG = "x" * 300


@pytest.mark.parametrize(
    "read",
    [
        lambda: load_network(LONG, role="teacher"),
        lambda: load_network(f"{LONG}.pt2", role="teacher"),
        lambda: load_network(f"{LONG}:x", role="teacher"),
        lambda: load_network(f"transformers:{LONG}", role="teacher"),
        lambda: load_network("LeNet5", f"{LONG}.safetensors", role="teacher"),
        lambda: load_network("LeNet5\0", role="teacher"),
        lambda: open_file(Path(LONG), "model"),
        lambda: data.load(LONG, "test"),
        lambda: data.load(f"{LONG}.npz", "test"),
        lambda: train_command.parse(["--resume", LONG]),
        lambda: train(train_command.parse(["--teacher", LONG, "--student", "LeNet5"])),
        lambda: train(make_config("mnist", **TINY, out_dir=Path(LONG))),
        lambda: write_report(Path(LONG)),
        lambda: export_student(LeNet5(), LONG, "safetensors", image_shape=(1, 32, 32)),
    ],
)
def test_long_names_end_in_a_sentence(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        read()
    assert len(str(caught.value)) < 1100
    assert list(tmp_path.iterdir()) == []

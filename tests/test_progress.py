"""What a run says while it lasts: on a terminal, in a notebook, in a pipe."""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dafl_fast import distill, progress
from dafl_fast import train as command
from dafl_fast.distill import train
from dafl_fast.engine.distributed import World
from dafl_fast.errors import UserError
from dafl_fast.progress import Progress, figures, headline, outcome
from dafl_fast.recipes import make_config

SMALL = dict(
    image_shape=(1, 8, 8), batch_size=16, generator_width=8, student_batch_size=16,
    student_updates=1, bank_images=64, log_every=1, precision="fp32", bn_statistics=0.0,
)  # fmt: skip
ROW = {
    "step": 1240, "train_seconds": 30.0, "generator_loss": -4.6123, "distill_loss": 0.0314,
    "agreement_training": 0.973, "steps_per_second": 41.26, "images_per_second": 9e3, "done": 0.25,
}  # fmt: skip
SUMMARY = {
    "steps": 4321, "train_seconds": 120.04, "agreement_fresh": 0.9712, "student_accuracy": 0.9812,
    "teacher_accuracy": 0.9901, "interrupted": False, "run": "runs/x",
}  # fmt: skip


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


class Terminal(io.StringIO):
    """A terminal, as far as rich asks."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The seconds that a display sees."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def open_terminal(monkeypatch) -> Terminal:
    """Makes stderr a terminal. No fixture could: pytest takes stderr again before the test."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_the_figures_of_a_row():
    assert figures(ROW, None) == (
        "0:01:30 left · agreement 97.3% · step 1,240 · 41.3 steps/s · generator loss -4.612 · "
        "student loss 0.031"
    )
    assert "agreement 97.3% · accuracy 96.12% · step" in figures(ROW, 0.9612)
    for done in (0.0, 1.0, 1.01):  # nothing to go by, and nothing left
        assert "left" not in figures({**ROW, "done": done}, None)


def test_what_is_about_to_happen(monkeypatch):
    teacher, student = nn.Linear(2000, 10), nn.Linear(10, 10, bias=False)
    step = SimpleNamespace(
        student=student, device=torch.device("cpu"), precision="bf16", world=World(), found=None
    )
    torch.set_num_threads(2)
    config = make_config("mnist", max_seconds=120)
    assert headline(config, teacher, step) == (
        "distilling LeNet5 (20,010 parameters) into LeNet5Half (100) on the CPU, bf16, 2 threads, "
        "120 s"
    )
    # Networks of `distill` are called by their class; a run may have two limits.
    config = make_config("custom", image_shape=(1, 8, 8), steps=24_000, max_seconds=0.5)
    step.world = World(0, 4)
    torch.set_num_threads(1)
    assert headline(config, teacher, step) == (
        "distilling Linear (20,010 parameters) into Linear (100) on the CPU, bf16, 1 thread, "
        "4 processes, 24,000 steps or 0.5 s"
    )
    step.found = SimpleNamespace(words="1 photograph")
    assert headline(config, teacher, step).endswith("24,000 steps or 0.5 s, with 1 photograph")
    step.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert "into Linear (100) on NVIDIA H100, bf16, 4 processes, " in headline(
        config, teacher, step
    )


def test_what_has_come_of_it():
    said = "4,321 steps in 120.0 s, agreement 97.12%, accuracy 98.12% (teacher 99.01%), runs/x"
    assert outcome(SUMMARY) == said
    assert outcome({**SUMMARY, "interrupted": True}) == f"interrupted after {said}"
    assert "accuracy" not in outcome({**SUMMARY, "student_accuracy": None})


def test_a_pipe_gets_a_plain_line_now_and_then(monkeypatch, capsys, clock):
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes anything for a terminal
    said = []
    with Progress() as shown:
        for second in range(1, 601):
            clock.now = 1000.0 + second
            shown({**ROW, "step": second, "done": second / 600, "train_seconds": second})
            if second == 20:
                shown({"step": 20, "class_counts": [1], "accuracy": 0.5})
            if printed := capsys.readouterr().err:
                said.append((second, printed))
        shown.end(SUMMARY)
    seconds = [second for second, _ in said]
    assert seconds[:6] == [5, 10, 15, 20, 27, 36]
    assert max(b - a for a, b in itertools.pairwise(seconds)) == 60
    assert 15 < len(seconds) < 25
    first = "1% · 0:09:55 left · agreement 97.3% · step 5 · 41.3 steps/s · generator loss -4.612"
    assert said[0][1] == f"{first} · student loss 0.031\n"
    assert "accuracy" not in said[3][1] and "agreement 97.3% · accuracy 50.00% ·" in said[4][1]
    assert capsys.readouterr().err == outcome(SUMMARY) + "\n"
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", "".join(text for _, text in said))


def test_a_run_of_a_few_seconds_says_one_line(tmp_path, capsys):
    settings = {**SMALL, "steps": 4}
    distill(network(), network(), out_dir=tmp_path / "on", **settings)
    assert re.fullmatch(
        r"distilling Sequential \(325 parameters\) into Sequential \(325\) on the CPU, fp32, "
        r"\d+ threads?, 4 steps\n",
        capsys.readouterr().err,
    )
    for number, off in enumerate(("off", False)):
        distill(network(), network(), out_dir=tmp_path / str(number), progress=off, **settings)
    config = make_config(
        "mnist", steps=2, out_dir=tmp_path / "train", eval="none",
        **{**SMALL, "image_shape": (1, 32, 32)},
    )  # fmt: skip
    train(config, progress="off")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError, match='progress must be "auto", "on" or "off", got \'loud\''):
        distill(network(), network(), progress="loud", **settings)


def test_a_run_goes_on_when_nobody_reads_its_log(tmp_path, monkeypatch, clock):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())

    def later(row):
        clock.now += 10  # so that every row is due

    result = distill(
        network(), network(), steps=3, out_dir=tmp_path / "run", callbacks=[later], **SMALL
    )
    assert result.summary["steps"] == 3


def test_a_terminal_has_one_line_and_what_others_print_above_it(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", terminal)
    result = distill(
        network(), network(), steps=3, out_dir=tmp_path / "run",
        callbacks=[lambda row: print("mine:", row["step"])], **SMALL,
    )  # fmt: skip
    printed = terminal.getvalue()
    for said in ("preparing", "distilling Sequential (325 parameters)", "mine: 3", "distilled",
                 "100 %", f"3 steps in {result.summary['train_seconds']:.1f} s"):  # fmt: skip
        assert said in re.sub(r"\x1b\[[\d;?]*\w", "", printed), said
    assert printed.rindex("\x1b[?25h") > printed.rindex("\x1b[?25l"), "the cursor is back"
    assert sys.stderr is terminal and sys.stdout is terminal


def test_what_is_printed_into_a_file_stays_out_of_the_terminal(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    distill(
        network(), network(), steps=2, out_dir=tmp_path / "run",
        callbacks=[lambda row: print("mine:", row["step"])], **SMALL,
    )  # fmt: skip
    assert "mine: 2" in sys.stdout.getvalue()
    assert "mine" not in terminal.getvalue()


def test_a_failed_run_leaves_a_terminal_clean(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    with pytest.raises(UserError, match="the student has nothing to train"):
        distill(network(), nn.Flatten(), steps=2, out_dir=tmp_path / "run", **SMALL)
    printed = terminal.getvalue()
    assert printed.rindex("\x1b[2K") > printed.rindex("preparing"), "the line is erased"
    assert printed.rindex("\x1b[?25h") > printed.rindex("\x1b[?25l")
    assert sys.stderr is terminal


def test_a_notebook_has_an_output_that_is_rewritten(tmp_path, monkeypatch, capsys, clock):
    shown = []
    handle = SimpleNamespace(update=lambda data, raw: shown.append(data["text/html"]))
    module = SimpleNamespace(display=lambda data, raw, display_id: handle)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=module))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)

    class Odd(nn.Sequential):
        pass

    Odd.__name__ = "<b>Odd"

    def later(row):
        clock.now += 0.4

    settings = {**SMALL, "steps": 8, "callbacks": [later]}
    distill(Odd(*network()), network(), out_dir=tmp_path / "run", **settings)
    assert "<b>Odd" not in shown[0] and "distilling &lt;b&gt;Odd (325 parameters)" in shown[0]
    bars = [re.search(r"<progress[^>]*>", page)[0] for page in shown]
    # Two outputs of a second at most: rows are 0.4 s apart here.
    values = [float(bar.split('"')[1]) for bar in bars[2:]]
    assert bars[:2] == ["<progress>"] * 2 and values[-1] == 1 and len(values) == 5
    assert values == sorted(values)
    assert "8 steps in" in shown[-1]
    assert capsys.readouterr() == ("", "")

    def broken(row):
        raise KeyError

    with pytest.raises(KeyError):
        distill(
            network(), network(), out_dir=tmp_path / "broken",
            **{**settings, "callbacks": [broken]},
        )  # fmt: skip
    assert "stopped" in shown[-1] and "<progress" not in shown[-1]


def test_the_command_speaks_on_stderr_and_its_warnings_stand_above_the_line(tmp_path):
    """In a process of its own: pytest has a say in logging."""
    arguments = ["train", "mnist", "--steps", "2", "--out-dir", str(tmp_path / "run"), "--eval",
                 "none", "--batch-size", "8", "--generator-width", "8", "--student-batch-size",
                 "8", "--bank-images", "16", "--student-updates", "1", "--student-start",
                 "own"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; from {command.__name__} import main; "
         f"sys.argv = {arguments}; sys.exit(main())"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 steps in")
    warning, line = done.stderr.splitlines()
    assert warning.startswith("a batch of 8 images cannot show all of 10 classes")
    assert line.startswith("distilling LeNet5 (61,706 parameters) into LeNet5Half (15,738) on ")

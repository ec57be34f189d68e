"""The command as its users meet it: runs, resumes, kills, mistakes."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dafl_fast import train as command
from dafl_fast.config import Config
from dafl_fast.distill import distill, train
from dafl_fast.engine import loop
from dafl_fast.engine.clock import Clock
from dafl_fast.engine.folder import read_metrics
from dafl_fast.engine.prepare import freeze, prepare
from dafl_fast.engine.step import Step
from dafl_fast.errors import TrainingStopped, UserError
from dafl_fast.files import save_weights
from dafl_fast.models import LeNet5
from dafl_fast.recipes import make_config

TINY = ["--batch-size", "16", "--generator-width", "8", "--student-batch-size", "16",
        "--student-updates", "2", "--bank-images", "160", "--log-every", "2"]  # fmt: skip


def tiny(out: Path, **overrides) -> Config:
    settings = {
        "batch_size": 16, "generator_width": 8, "student_batch_size": 16, "student_updates": 2,
        "bank_images": 160, "log_every": 2, "eval": "none", "steps": 12, "save_every": 1e-9,
        "precision": "fp32",
    }  # fmt: skip
    return make_config("mnist", "fast", **{**settings, "out_dir": out, **overrides})


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    try:
        code = command.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def student_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student.safetensors")


@contextlib.contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """As if somebody pressed Ctrl-C in that step of a run."""
    original = Step.__call__

    def interrupting(self, *arguments):
        original(self, *arguments)
        if self.steps == steps:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", interrupting)
        yield


def assert_same_student(one: Path, two: Path, tolerance: float = 0) -> None:
    a, b = student_of(one), student_of(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)


def test_a_run_folder_is_complete(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    code, printed, _ = run(
        monkeypatch, capsys, "mnist", "--steps", "5", "--eval", "mnist-5k", "--seed", "3",
        "--out-dir", str(out), *TINY,
    )  # fmt: skip
    assert code == 0
    summary = json.loads((out / "summary.json").read_text())
    expected = {
        "preset": "mnist", "recipe": "fast", "device": "cpu", "seed": 3, "steps": 5,
        "generator_images": 80, "student_images": 160, "eval_set": "mnist-5k",
        "eval_count": 5000, "interrupted": False,
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    assert summary["teacher_accuracy"] >= 0.99
    assert 0 < summary["student_accuracy"] < 1
    assert 0 <= summary["agreement_fresh"] <= 1
    assert summary["wall_seconds"] > summary["train_seconds"] > 0
    assert summary["images_per_second"] == pytest.approx(240 / summary["train_seconds"], rel=0.05)
    assert f"{summary['student_accuracy']:.2%}" in printed

    # The accuracy is that of the weights that were saved.
    from dafl_fast.data import FORMATS
    from dafl_fast.engine.evaluation import accuracy_on, eval_set
    from dafl_fast.models import LeNet5Half

    student = LeNet5Half()
    student.load_state_dict(student_of(out))
    held_out = eval_set("mnist-5k", FORMATS["mnist"], 10)
    assert accuracy_on(student, held_out)[0] == summary["student_accuracy"]

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "generator_loss" in row]
    assert steps == [2, 4, 5]
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"]["steps"] == 5
    assert (out / "samples" / "step-0000005.png").read_bytes()[1:4] == b"PNG"
    assert "preset: mnist" in (out / "config.yaml").read_text()
    assert json.loads((out / "environment.json").read_text())["torch"] == torch.__version__


def test_the_clock_stands_still_while_paused():
    start = time.perf_counter()
    clock = Clock(5.0, torch.device("cpu"), {"saving": 1.0})
    time.sleep(0.02)
    with clock.paused("evaluation"):
        before = clock.seconds
        time.sleep(0.05)
        assert clock.seconds == before
    time.sleep(0.01)
    assert 5.02 <= before <= clock.seconds - 0.01
    assert clock.seconds <= 5.0 + (time.perf_counter() - start) - 0.05
    assert clock.apart["saving"] == 1.0
    assert 0.05 <= clock.apart["evaluation"] <= time.perf_counter() - start - 0.03


def test_a_stalled_step_is_named(tmp_path, caplog):
    original = Step.body

    def stalling(self, *arguments):
        if self.steps == 2:
            time.sleep(0.4)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "body", stalling)
        train(tiny(tmp_path / "stalls", steps=4, stall_seconds=0.2, student_start="own"))
    # On a busy machine writing the last files can take as long, too.
    (message,) = [line for line in caplog.messages if "saving after step 4" not in line]
    assert message.startswith("nothing has moved for 0 s: the run stands at step 3, in stalling (")
    caplog.clear()
    train(tiny(tmp_path / "runs", steps=4, stall_seconds=60, student_start="own"))
    assert caplog.records == []


def test_compiled_training_learns_the_same(tmp_path):
    for name, compiled in (("eager", False), ("compiled", True)):
        train(tiny(tmp_path / name, steps=3, compile=compiled, generator_lr=1e-3))
    assert_same_student(tmp_path / "eager", tmp_path / "compiled", 1e-4)
    step = json.loads((tmp_path / "compiled" / "summary.json").read_text())["train_seconds"]
    assert step < 5, "compiling is not training"


class AsksForTensors(torch.nn.Module):
    """Takes another way when torch.fx shows it a symbol instead of a tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(1, 10, 32), torch.nn.BatchNorm2d(10)

    def forward(self, x):
        y = self.norm(self.conv(x)).flatten(1)
        return y if isinstance(x, torch.Tensor) else -y


def test_a_teacher_that_folding_would_change_is_not_folded(caplog):
    teacher, images = AsksForTensors(), torch.randn(4, 1, 32, 32)
    frozen = freeze(teacher, make_config("mnist", feature_layer=None), images)
    torch.testing.assert_close(frozen(images)[0], teacher.eval()(images))
    assert "it would answer differently" in caplog.text


@pytest.mark.parametrize(
    ("student", "sentence"),
    [
        (LeNet5(num_classes=7), "logits [2, 10] for images [2, 1, 32, 32], as many classes as"),
        (torch.nn.Linear(3, 10), "the student does not take images of shape [2, 1, 32, 32]"),
    ],
)
def test_a_student_that_does_not_fit(student, sentence):
    config = make_config("mnist", "published")
    with pytest.raises(UserError, match=re.escape(sentence)):
        prepare(config, LeNet5(), student, torch.device("cpu"), "fp32")


def test_a_runs_folder_is_no_student(tmp_path):
    """Its name would be all that the new run knows of its student's network."""
    config = make_config("mnist", student=str(tmp_path), out_dir=tmp_path / "new", steps=1)
    with pytest.raises(UserError, match="--student must name a network, got the folder "):
        train(config)


def test_same_seed_same_student(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny(tmp_path / name, seed=seed, steps=4))
    assert_same_student(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(
        student_of(tmp_path / "a")["fc2.weight"], student_of(tmp_path / "c")["fc2.weight"]
    )


def interrupted(config: Config, stop_at: int) -> None:
    """Trains until a signal comes in step `stop_at`."""
    original = Step.__call__

    def interrupting(self, *arguments):
        original(self, *arguments)
        if self.steps == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", interrupting)
        summary = train(config)
    assert summary["interrupted"] and summary["steps"] == stop_at


@pytest.mark.parametrize("recipe", ["fast", "published", "paper"])
@pytest.mark.parametrize("stop_at", [1, 5, 6])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, recipe, stop_at):
    settings = {} if recipe == "fast" else {"student_updates": 1, "bank_images": 0}
    if recipe == "fast":
        settings["generator_restart_every"] = 5
    base = tiny(tmp_path / "whole").__dict__ | settings | {"recipe": recipe}
    base["student_source"] = {"fast": "bank", "published": "same", "paper": "fresh"}[recipe]
    whole = Config(**base)
    train(whole)

    interrupted(Config(**{**base, "out_dir": tmp_path / "broken"}), stop_at)
    resumed = command.parse(["--resume", str(tmp_path / "broken")])
    assert train(resumed)["steps"] == 12
    assert_same_student(tmp_path / "whole", tmp_path / "broken")
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken")]
    losses = [
        [(row["step"], row["generator_loss"]) for row in map(json.loads, text.splitlines())
         if "generator_loss" in row]
        for text in metrics
    ]  # fmt: skip
    assert losses[0] == losses[1]


def run_in_process(config: Config) -> None:
    torch.set_num_threads(1)
    train(config)


@pytest.mark.slow
def test_kill_nine_at_twenty_random_moments(tmp_path):
    """The process is killed without warning, again and again, before the run gets through."""
    settings = dict(steps=150, generator_restart_every=25, eval_every=1e-9)
    torch.set_num_threads(1)
    train(tiny(tmp_path / "whole", **settings))
    context = multiprocessing.get_context("forkserver")
    out, draw = tmp_path / "killed", random.Random(0)
    checkpoint, kills, at = out / "checkpoint.pt", 0, []
    while not (out / "summary.json").exists():
        begun = (out / "config.yaml").exists()
        config = tiny(out, **settings)
        if begun:
            config = command.parse(["--resume", str(out)])
        process = context.Process(target=run_in_process, args=(config,))
        process.start()
        if kills < 20:
            before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            limit, starting = time.monotonic() + 30, draw.random() < 0.25
            # One in four dies while starting, the others soon after they have saved something.
            while time.monotonic() < limit and not starting:
                time.sleep(0.002)
                if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                    break
            time.sleep(draw.random() * 0.1)
            process.kill()
            kills += 1
            process.join()
            assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
            at.append(torch.load(checkpoint)["step"]["steps"] if checkpoint.exists() else 0)
        else:
            process.join(60)
            assert process.exitcode == 0
    assert kills == 20
    assert len(set(at)) > 10, f"killed at too few different moments: {at}"
    assert_same_student(tmp_path / "whole", out)
    leftovers = {p.name for p in out.iterdir()}
    assert leftovers == {"config.yaml", "metrics.jsonl", "summary.json", "environment.json",
                         "checkpoint.pt", "bank", "student.safetensors", "samples",
                         "report.html"}  # fmt: skip


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "dafl_fast.train", "mnist", "--max-seconds", "60", "--eval", "none",
         "--student-start", "own", "--out-dir", str(out), *TINY],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    limit = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    process.terminate()
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted; go on with: python -m dafl_fast.train --resume {out}" in printed
    assert errors.startswith("distilling ")
    assert all("steps/s" in line or "interrupted" in line for line in errors.splitlines()[1:])
    assert json.loads((out / "summary.json").read_text())["interrupted"]
    assert (out / "student.safetensors").exists()


def test_resume_may_extend_but_not_change_the_run(tmp_path, monkeypatch, capsys):
    train(tiny(tmp_path / "run", steps=4))
    resume = ("--resume", str(tmp_path / "run"))
    code, _, error = run(monkeypatch, capsys, *resume, "--batch-size", "32")
    assert code == 2
    assert "--batch-size cannot change when resuming" in error
    assert "has 16, got 32" in error
    code, _, _ = run(monkeypatch, capsys, *resume, "--steps", "6")
    assert code == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("images", "steps", "after"),
    [(40, 40, 3), (1000, 40, 4), (0, 40, 0), (1000, 9, 0), (17, 40, 2)],
)
def test_the_student_begins_when_there_are_images(tmp_path, images, steps, after):
    """After so many images, of 16 a step, but at most a tenth of the run."""
    summary = train(tiny(tmp_path / "run", steps=steps, student_after=images, log_every=1))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "generator_loss" in row]
    begun = ["distill_loss" in row for row in rows]
    assert begun == [False] * after + [True] * (steps - after)
    assert summary["generator_images"] == 16 * steps
    assert summary["student_images"] == 32 * (steps - after)


def test_a_run_too_short_to_learn_says_so(tmp_path, monkeypatch, caplog):
    words = "the student has learned nothing: the run ended at step {}, before it began"
    short = dict(steps=None, eval_every=0.0)
    summary = train(tiny(tmp_path / "none", max_seconds=1e-9, **short))
    assert summary["steps"] == summary["student_images"] == 0
    assert words.format(0) + "; --max-seconds 1e-09 is too short" in caplog.messages
    # A first step in which the student still waits for images, and no time for a second.
    taken = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *given: (taken(*given), time.sleep(1.1))[0])
    summary = train(tiny(tmp_path / "one", max_seconds=1.0, student_after=10**6, **short))
    assert summary["steps"] == 1 and summary["student_images"] == 0
    assert words.format(1) + "; --max-seconds 1 is too short" in caplog.messages
    caplog.clear()
    assert train(tiny(tmp_path / "two", steps=1))["student_images"] > 0
    assert "learned nothing" not in caplog.text


@pytest.mark.parametrize("stop_at", [2, 3, 4, 5])
def test_a_run_that_is_resumed_before_its_student_begins(tmp_path, stop_at):
    """Also in the middle of a row: of its three steps, two are the student's."""
    settings = dict(steps=40, student_after=64, log_every=3, save_every=1e-9)
    train(tiny(tmp_path / "whole", **settings))
    interrupted(tiny(tmp_path / "broken", **settings), stop_at)
    train(command.parse(["--resume", str(tmp_path / "broken")]))
    assert_same_student(tmp_path / "whole", tmp_path / "broken")
    whole, broken = (
        [row["distill_loss"] for row in read_metrics(tmp_path / name) if "distill_loss" in row]
        for name in ("whole", "broken")
    )
    assert whole == broken


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = train(tiny(tmp_path / "run", steps=3))
    before = student_of(tmp_path / "run")
    again = train(command.parse(["--resume", str(tmp_path / "run")]))
    assert again["steps"] == 3
    assert again["agreement_fresh"] == first["agreement_fresh"]
    for name, tensor in student_of(tmp_path / "run").items():
        assert torch.equal(tensor, before[name])


def test_the_preset_of_a_resumed_run_may_be_named(tmp_path):
    train(tiny(tmp_path / "run", steps=2))
    resume = ["--resume", str(tmp_path / "run")]
    assert command.parse(["mnist", *resume]) == command.parse(resume)
    with pytest.raises(UserError, match="--preset cannot change when resuming: .* mnist, got cif"):
        command.parse(["cifar10", *resume])


def _flat(width: int) -> torch.nn.Module:
    layers = [torch.nn.Linear(1024, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)]
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)


@pytest.mark.parametrize(
    ("student", "sentence"),
    [
        (_flat(7), r"its weight 1.weight is \[6, 1024\], that of yours \[7, 1024\]"),
        (
            torch.nn.Sequential(*_flat(6), torch.nn.Linear(10, 10)),
            "it has no weight 4.weight, as y",
        ),
        (
            torch.nn.Sequential(*_flat(6)[:2], torch.nn.ConstantPad1d((0, 4), 0.0)),
            "it has a weight 3.weight, and yours has none",
        ),
    ],
)
def test_resume_refuses_another_student(student, sentence, tmp_path):
    teacher, settings = LeNet5(), dict(image_shape=(1, 32, 32), steps=2, **_SMALL)
    distill(teacher, _flat(6), out_dir=tmp_path, **settings)
    with pytest.raises(UserError, match=f"^the run has another student: {sentence}"):
        distill(teacher, student, resume=tmp_path, **settings)
    with pytest.raises(UserError, match=r"begun in Python with modules; .*, resume=FOLDER\)"):
        train(command.parse(["--resume", str(tmp_path)]))


_SMALL = {"batch_size": 16, "generator_width": 8, "student_batch_size": 16, "bank_images": 160,
          "precision": "fp32", "adapt": False}  # fmt: skip


def test_resume_refuses_another_teacher(tmp_path):
    train(tiny(tmp_path / "run", steps=2))
    save_file(LeNet5().state_dict(), tmp_path / "other.safetensors")
    config = command.parse(
        ["--resume", str(tmp_path / "run"), "--teacher", str(tmp_path / "other.safetensors")]
    )
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="was begun with another teacher"):
        train(config)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == files  # so the run goes on as before


def test_what_a_run_chose_by_itself_may_be_named_when_it_goes_on(tmp_path):
    """The rules by which it chose may have changed since."""
    train(tiny(tmp_path / "run", steps=2))
    resume = ["--resume", str(tmp_path / "run"), "--steps", "3"]
    config = command.parse([*resume, "--feature-layer", "fc2"])
    assert config.feature_layer == "fc2" and train(config)["steps"] == 3
    with pytest.raises(UserError, match="--feature-layer cannot change when resuming: .* has fc2"):
        command.parse([*resume, "--feature-layer", "fc1"])


@pytest.mark.parametrize(
    ("arguments", "preset", "recipe"),
    [
        (["mnist", "--recipe", "fast", "--recipe", "paper"], "mnist", "paper"),
        (["mnist", "--recipe=paper", "--recipe=fast"], "mnist", "fast"),
        (["mnist", "--preset", "cifar10"], "cifar10", "fast"),
        (["--preset", "cifar10", "--preset=mnist", "--recipe", "published"], "mnist", "published"),
    ],
)
def test_the_last_of_several_presets_and_recipes_counts(arguments, preset, recipe):
    assert command.parse(arguments) == make_config(preset, recipe)


def test_collapse_stops_the_run_with_the_checkpoint_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "COLLAPSED_STEPS", 6)
    state = LeNet5().state_dict()
    state["fc2.bias"][3] = 60.0  # to this teacher everything is a three
    save_file(state, tmp_path / "one-class.safetensors")
    config = tiny(tmp_path / "run", teacher=str(tmp_path / "one-class.safetensors"))
    with pytest.raises(TrainingStopped, match="collapsed: for 6 steps .* one class.*checkpoint"):
        train(config)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"]["steps"] == 4


def test_non_finite_loss_stops_the_run_with_the_checkpoint_kept(tmp_path):
    original, calls = Step.__call__, 0

    def poisoned(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 6:
            with torch.no_grad():
                self.generator.l1[0].weight[0, 0] = float("nan")
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", poisoned)
        with pytest.raises(TrainingStopped, match="generator_loss is not finite at step 6.*kept"):
            train(tiny(tmp_path / "run"))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"]["steps"] == 4
    assert saved["step"]["generator"]["l1.0.weight"].isfinite().all()


def test_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    original, saves = torch.save, 0

    def filling(state, path):
        nonlocal saves
        saves += 1
        if saves > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(state, path)

    monkeypatch.setattr(torch, "save", filling)
    out = tmp_path / "run"
    code, _, error = run(
        monkeypatch, capsys, "mnist", "--steps", "6", "--eval", "none", "--save-every", "1e-9",
        "--out-dir", str(out), *TINY,
    )  # fmt: skip
    assert code == 2
    assert "checkpoint.pt: No space left on device" in error
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"]["steps"] == 2


def test_non_finite_weights_are_never_saved(tmp_path):
    original, calls = Step.__call__, 0

    def poisoned(self, *arguments):
        nonlocal calls
        calls += 1
        original(self, *arguments)
        if calls == 6:  # after the step whose losses are looked at
            with torch.no_grad():
                self.student.fc1.weight[0, 0] = float("inf")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", poisoned)
        with pytest.raises(TrainingStopped, match="weights are not finite after step 6.*kept"):
            train(tiny(tmp_path / "run"))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"]["steps"] == 4
    assert saved["step"]["student"]["fc1.weight"].isfinite().all()


def test_files_of_the_user_are_never_touched(tmp_path):
    out = tmp_path / "run"
    train(tiny(out, steps=2))
    mine = [out / ".gitignore", out / "bank" / "notes.safetensors", out / "samples" / ".hidden.png"]
    litter = [out / ".checkpoint.pt.abcd1234", out / "samples" / ".step-0000002.png.abcd1234"]
    for path in (*mine, *litter):
        path.write_text("x")
    (out / ".ipynb_checkpoints").mkdir()
    train(command.parse(["--resume", str(out), "--steps", "4"]))
    assert all(path.read_text() == "x" for path in mine)
    assert not any(path.exists() for path in litter)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="full is not empty; choose a new folder"):
        train(tiny(tmp_path / "full"))


def test_a_longer_run_replaces_the_length_it_was_begun_with(tmp_path):
    out = tmp_path / "run"
    train(tiny(out, steps=None, max_seconds=0.3))
    config = command.parse(["--resume", str(out), "--steps", "100000"])
    assert (config.steps, config.max_seconds) == (100000, None)
    done = json.loads((out / "summary.json").read_text())["steps"]
    assert (
        train(command.parse(["--resume", str(out), "--steps", str(done + 3)]))["steps"] == done + 3
    )
    # And what it was lengthened to is what a later resume goes on with.
    assert command.parse(["--resume", str(out)]).steps == done + 3
    with pytest.raises(UserError, match="--steps or --max-seconds must say when to stop"):
        train(Config(**{**tiny(tmp_path / "endless").__dict__, "steps": None}))


def test_tied_weights_are_saved(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    network[1].weight = network[0].weight
    save_weights(tmp_path / "tied.safetensors", network.state_dict())
    found = load_file(tmp_path / "tied.safetensors")
    assert torch.equal(found["0.weight"], found["1.weight"])


def _save(path: Path, state: dict[str, torch.Tensor]) -> str:
    save_file(state, path)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--steps", "5", "mnist"],
            "the preset mnist must come first, and be the only one: python -m dafl_fast.train m",
        ),
        (["--no-adapt", "custom", "--steps", "5"], "the preset custom must come first"),
        (
            ["--teacher", "net.py", "--student", "LeNet5Half"],
            "the teacher net.py must also name the class or function in it: net.py:CALLABLE",
        ),
        (
            ["--teacher", "hf", "--student", "LeNet5Half"],
            "there is no run in hf, but a config.json; if save_pretrained wrote it, name it "
            "transformers:hf",
        ),
        (
            ["--teacher", "own.safetensors", "--student", "ResNet8Slim"],
            "holds weights only; name their network as well: --teacher NETWORK --teacher-weights",
        ),
        (
            ["imagenet"],
            "unknown preset 'imagenet': choose one of mnist, hintonnet, cifar10, cifar100, custom",
        ),
        (
            ["mnist", "--teacher", "nowhere.safetensors"],
            "nowhere.safetensors does not exist",
        ),
        (
            ["hintonnet"],
            "no bundled teacher: train one with `python -m dafl_fast.train_teacher",
        ),
        (["cifar10"], "the preset cifar10 has no bundled teacher"),
        (["custom"], "--teacher must name a network for the preset custom: see docs/networks.md"),
        (["mnist", "--teacher", "timm:test_resnet"], "--teacher-weights is needed"),
        (["mnist", "--teacher", "HintonNet1200"], "--teacher-weights is needed"),
        (["mnist", "--student", "Lenet"], "unknown student 'Lenet'"),
        (
            ["mnist", "--student", "ResNet8", "--image-shape", "3", "32", "32"],
            "takes images of one channel, got 3",
        ),
        (
            ["mnist", "--image-shape", "1", "30", "3"],
            "--image-shape must be channels (1 to 64), height and",
        ),
        (["mnist", "--batch-size", "0"], "--batch-size must be at least 2"),
        (["mnist", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["mnist", "--temperature", "0"], "--temperature must be positive, got 0"),
        (["mnist", "--log-base", "1"], "--log-base must be greater than 1"),
        (["mnist", "--bank-images", "3"], "--bank-images must be at least the batch size"),
        (["mnist", "--resume", "nowhere"], "--resume: there is no run in nowhere"),
        (["mnist", "--eval", "mnist", "--data-dir", "nowhere"], "MNIST was not found in nowhere"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, tmp_path, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("")
    Path("hf").mkdir()
    Path("hf/config.json").write_text("{}")
    _save("own.safetensors", torch.nn.Conv2d(3, 4, 3).state_dict())
    code, printed, error = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert printed == ""
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_cuda(monkeypatch, capsys):
    code, _, error = run(monkeypatch, capsys, "mnist", "--device", "cuda")
    assert (code, error) == (
        2, "error: --device cuda was asked for, but PyTorch sees no CUDA GPU here\n",
    )  # fmt: skip


def test_teacher_files_that_do_not_serve(monkeypatch, capsys, tmp_path):
    (tmp_path / "corrupt.safetensors").write_bytes(os.urandom(200))
    misfit = {**LeNet5().state_dict(), "fc2.weight": torch.zeros(7, 84)}
    _save(tmp_path / "misfit.safetensors", misfit)
    poisoned = {**LeNet5().state_dict(), "fc2.bias": torch.full((10,), float("nan"))}
    _save(tmp_path / "nan.safetensors", poisoned)
    for name, sentence in (
        ("corrupt", "is no model that can be read"),
        ("misfit", "fc2.weight should be [10, 84], the file has [7, 84]"),
        ("nan", "is damaged: fc2.bias has values that are not finite"),
    ):
        path = str(tmp_path / f"{name}.safetensors")
        code, _, error = run(monkeypatch, capsys, "mnist", "--eval", "none", "--teacher", path)
        assert code == 2
        assert sentence in error
        assert error.count("\n") == 1


def test_out_dir_with_another_run(monkeypatch, capsys, tmp_path):
    train(tiny(tmp_path / "run", steps=2))
    before = (tmp_path / "run" / "summary.json").read_text()
    code, _, error = run(
        monkeypatch, capsys, "mnist", "--eval", "none", "--out-dir", str(tmp_path / "run")
    )
    assert code == 2
    assert "holds another run" in error
    assert f"--resume {tmp_path / 'run'}" in error
    assert (tmp_path / "run" / "summary.json").read_text() == before


def test_unknown_recipe_or_option(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "mnist", "--recipe", "slow")[0] == 2
    assert run(monkeypatch, capsys, "mnist", "--no-such-option", "1")[0] == 2


def test_a_mistake_in_a_real_process_has_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dafl_fast.train", "nosuch"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    known = "mnist, hintonnet, cifar10, cifar100, custom"
    assert done.stderr == f"error: unknown preset 'nosuch': choose one of {known}\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_hintonnet_distils_at_its_own_image_size(tmp_path):
    from dafl_fast.models import build

    save_file(build("HintonNet1200").state_dict(), tmp_path / "teacher.safetensors")
    config = make_config(
        "hintonnet", "fast", **{
            **{name: getattr(tiny(tmp_path / "run"), name) for name in (
                "batch_size", "generator_width", "student_batch_size", "student_updates",
                "bank_images", "log_every", "eval", "out_dir", "precision")},
            "steps": 2, "teacher": str(tmp_path / "teacher.safetensors"),
        }
    )  # fmt: skip
    summary = train(config)
    assert (summary["teacher_parameters"], summary["student_parameters"]) == (2_395_210, 1_276_810)
    assert student_of(tmp_path / "run")["fc1.weight"].shape == (800, 28 * 28)

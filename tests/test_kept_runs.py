"""What a run has left is not lost: by going on twice, without a checkpoint or through links."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dafl_fast import train as command
from dafl_fast.distill import train
from dafl_fast.engine.folder import read_metrics
from dafl_fast.engine.lock import locked
from dafl_fast.errors import UserError
from dafl_fast.recipes import make_config
from dafl_fast.train_teacher import TeacherConfig

TINY = {
    "batch_size": 4, "generator_width": 4, "latent_dim": 4, "bank_images": 16, "precision": "fp32",
    "student_batch_size": 4, "student_updates": 1, "steps": 2, "device": "cpu", "log_every": 1,
    "student": "LeNet5Half",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(make_config("mnist", **TINY, out_dir=out))
    return out


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run's folder."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def resumed(folder: Path, steps: int = 3) -> dict:
    return train(command.parse(["--resume", str(folder), "--steps", str(steps)]))


# -- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["student.safetensors", "summary.json"])
def test_a_finished_run_without_a_checkpoint_is_not_begun_again(kept, folder):
    for name in {"checkpoint.pt", "student.safetensors", "summary.json"} - {kept}:
        (folder / name).unlink()
    before = content(folder)
    sentence = f"cannot go on: it has no checkpoint.pt, and to start again would replace its {kept}"
    with pytest.raises(UserError, match=sentence):
        resumed(folder)
    assert content(folder) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(folder):
    for name in ("checkpoint.pt", "student.safetensors", "summary.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "bank")
    assert resumed(folder)["steps"] == 3


def test_a_damaged_row_of_metrics_is_left_out(folder, caplog):
    file = folder / "metrics.jsonl"
    before = file.read_text().splitlines()
    good = [json.loads(line) for line in before]
    bad = ['{"step": "x", "train_seconds": 1}', "{", "[]", '{"step": 1, "train_seconds": NaN}',
           '{"step": 1, "train_seconds": 1, "accuracy": "x"}', "[" * 10**5]  # fmt: skip
    file.write_bytes("\n".join([*bad, *before]).encode() + b"\n\xff\n" + b"x" * 3_000_000)
    assert read_metrics(folder) == good
    assert f"{len(bad) + 2} damaged rows of {file} are left out" in caplog.text
    assert resumed(folder)["steps"] == 3
    assert [row for row in read_metrics(folder) if row["step"] <= 2] == good


@pytest.mark.parametrize("change", ["surplus", "missing", "another dtype", "other images"])
def test_a_bank_of_other_entries_is_refused(change, folder):
    (file,) = (folder / "bank").iterdir()
    entries = load_file(file)
    if change == "other images":
        entries["images"] = entries["images"][:, :-1].contiguous()
    elif change == "another dtype":
        entries["images"] = entries["images"].float()
    else:
        rows = entries["logits"][:1]
        entries["logits"] = (
            torch.cat([entries["logits"], rows]) if change == "surplus" else entries["logits"][1:]
        )
    save_file(entries, file)
    with pytest.raises(UserError, match="the replay bank file .* is damaged: "):
        resumed(folder)


def test_a_tensor_of_a_checkpoint_is_not_spread(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    optimizer = next(value for name, value in state["step"].items() if "optimizer" in name)
    averages = next(iter(optimizer.values()))
    averages["exp_avg"] = averages["exp_avg"].flatten()[:1].clone()
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint.pt is damaged: a tensor should be \["):
        resumed(folder)


# -- the lock --------------------------------------------------------------------------------------


def _locked(folder):
    return locked(folder / ".lock", f"the run in {folder} is being trained")


def test_of_two_that_go_on_one_is_refused_and_the_other_undisturbed(folder, monkeypatch, capsys):
    before = content(folder)
    with _locked(folder):
        held = (folder / ".lock").read_text()
        assert json.loads(held)["process"] == os.getpid()
        monkeypatch.setattr(sys, "argv", ["train", "--resume", str(folder), "--steps", "3"])
        assert command.main() == 2
        said = capsys.readouterr().err
        sentence = f"the run in {folder} is being trained by process {os.getpid()} on this machine"
        assert sentence in said and "Traceback" not in said
        assert (folder / ".lock").read_text() == held
    assert content(folder) == before  # and the lock is gone
    assert resumed(folder)["steps"] == 3
    assert not (folder / ".lock").exists()


def test_the_lock_of_a_killed_process_is_taken(tmp_path):
    child = os.fork()
    if child == 0:
        with _locked(tmp_path):
            (tmp_path / "ready").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"by process {child} on this machine"), _locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    with _locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


def test_the_lock_of_another_machine_is_respected(tmp_path):
    (tmp_path / ".lock").write_text('{"process": 7, "machine": "far\\u001b[2J"}')
    before = (tmp_path / ".lock").read_text()
    with pytest.raises(UserError) as caught, _locked(tmp_path):
        pass
    assert r"by process 7 on the machine 'far\x1b[2J'; if that has ended, rem" in str(caught.value)
    assert (tmp_path / ".lock").read_text() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"process": "x"}', "\0" * 9000])
def test_a_damaged_lock_is_taken(text, tmp_path):
    (tmp_path / ".lock").write_text(text)
    with _locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="lock .* cannot be made"), _locked(tmp_path / "run"):
        pass
    assert (tmp_path / "other").read_text() == "kept"


def test_a_lock_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match="lock .* is no file; remove it"), _locked(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for process in (os.getppid(), 2**22 + 1, 2**70):  # one that lives, and two that there are not
        (tmp_path / ".lock").write_text(json.dumps({"process": process}))
        if process == os.getppid():
            with pytest.raises(UserError, match=f"by process {process} on"), _locked(tmp_path):
                pass
            continue
        with _locked(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert (
        "has no locks (No locks available): see that no other process writes there" in caplog.text
    )


def test_a_new_run_holds_its_lock_while_it_lasts(tmp_path):
    seen = []
    config = make_config("mnist", **TINY, out_dir=tmp_path / "run")
    train(config, report=lambda row: seen.append((tmp_path / "run" / ".lock").exists()))
    assert seen and all(seen) and not (tmp_path / "run" / ".lock").exists()


# -- links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bank", "samples"])
def test_nothing_is_changed_through_a_link(name, folder, finished, tmp_path):
    other = Path(shutil.copytree(finished / name, tmp_path / "other"))
    (other / "000000900-000000904.safetensors").write_bytes(b"another run's")
    shutil.rmtree(folder / name)
    (folder / name).symlink_to(other)
    before = content(other)
    with pytest.raises(UserError, match=f"run/{name} is a link, and the run would change what it"):
        resumed(folder)
    assert content(other) == before


@pytest.mark.parametrize("name", ["tensorboard", "metrics.jsonl"])
def test_nothing_is_made_through_a_link(name, folder, tmp_path):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=f"run/{name} is a link, and the run would change what it"):
        resumed(folder)
    assert not (tmp_path / "other").exists()


# -- a folder that goes away -----------------------------------------------------------------------


@pytest.mark.parametrize("moved", [False, True])
def test_a_folder_that_is_removed_while_the_run_goes_on(moved, tmp_path):
    folder = tmp_path / "run"

    def remove(row):
        if row["step"] == 2 and folder.exists():
            folder.rename(tmp_path / "elsewhere") if moved else shutil.rmtree(folder)

    more = {"steps": 9, "save_every": 1e-9 if moved else 99.0}
    config = make_config("mnist", **{**TINY, **more}, out_dir=folder)
    with pytest.raises(UserError, match="run was removed or moved while the run went on"):
        train(config, report=remove)
    assert not folder.exists()


# -- teachers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.checkpoint", "t.json", "t.JSON"])
def test_weights_do_not_have_the_name_of_what_is_beside_them(name, tmp_path):
    sentence = (
        r"--out must not end in \.\w+, as what is written beside .* name them .*t.safetensors"
    )
    with pytest.raises(UserError, match=sentence):
        TeacherConfig(out=tmp_path / name)
    TeacherConfig(out=tmp_path / "t.checkpoint.safetensors")

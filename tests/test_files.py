"""Files are whole or not there; weights that do not fit are named."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from dafl_fast import files
from dafl_fast.errors import UserError
from dafl_fast.models import LeNet5


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"could not write .*a\.txt: No space left on device"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_while_saving_a_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    files.save_checkpoint(path, {"step": 1})

    def full(state, name):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device; what was there before is kept"):
        files.save_checkpoint(path, {"step": 2})
    assert files.load_checkpoint(path) == {"step": 1}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write .*weights: (Not a directory|File exists)"):
        files.write_text(tmp_path / "file" / "weights", "x")


def test_weights_round_trip_exactly(tmp_path):
    state = LeNet5().state_dict()
    files.save_weights(tmp_path / "w.safetensors", state)
    read = files.load_tensors(tmp_path / "w.safetensors", "teacher")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_missing_and_corrupt_files(tmp_path):
    with pytest.raises(UserError, match="the replay bank file .* does not exist"):
        files.load_tensors(tmp_path / "none.safetensors", "replay bank")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights at all, not in the least")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        files.load_tensors(tmp_path / "bad.safetensors", "replay bank")
    (tmp_path / "bad.pt").write_bytes(b"nor is this")
    with pytest.raises(UserError, match="the checkpoint .* cannot be read"):
        files.load_checkpoint(tmp_path / "bad.pt")

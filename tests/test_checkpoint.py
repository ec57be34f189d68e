"""Files are whole or not there; weights that do not fit are named."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from dafl_fast.engine import checkpoint as files
from dafl_fast.errors import UserError
from dafl_fast.models import HintonNet, LeNet5, LeNet5Half


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
    one, two = LeNet5(), LeNet5()
    files.save_weights(tmp_path / "w.safetensors", one.state_dict())
    files.load_weights(two, tmp_path / "w.safetensors", "teacher")
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (LeNet5Half(), r"conv1\.weight should be \[3, 1, 5, 5\], the file has \[6, 1, 5, 5\]"),
        (HintonNet(8), r"do not fit the teacher HintonNet"),
    ],
)
def test_weights_of_another_network(tmp_path, network, sentence):
    files.save_weights(tmp_path / "w.safetensors", LeNet5().state_dict())
    with pytest.raises(UserError, match=sentence):
        files.load_weights(network, tmp_path / "w.safetensors", "teacher")


def test_missing_and_corrupt_files(tmp_path):
    with pytest.raises(UserError, match="the teacher file .* does not exist"):
        files.load_weights(LeNet5(), tmp_path / "none.safetensors", "teacher")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights at all, not in the least")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        files.load_weights(LeNet5(), tmp_path / "bad.safetensors", "teacher")
    (tmp_path / "bad.pt").write_bytes(b"nor is this")
    with pytest.raises(UserError, match="the checkpoint .* cannot be read"):
        files.load_checkpoint(tmp_path / "bad.pt")

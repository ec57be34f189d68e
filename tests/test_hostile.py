"""Every reader refuses hostile files in one sentence, and runs nothing that is in them."""

from __future__ import annotations

import mmap
import os
import random
import re
import time
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import hostile
from .hostile import READERS, flipped, folder_of_files, spoiled, tried

# Of slow readers some of the inputs, always the same ones; `make hostile` tries all.
MOST = {
    "config": 12, "config of a student": 20, "metrics of a report": 15, "summary": 25,
    "environment": 12, "student": 15, "sample": 12, "checkpoint of a run": 40, "bank": 25,
    "metrics": 25, "checkpoint of a teacher": 40, "exported": 50, "TorchScript": 60, "model": 40,
    "transformers": 12, "transformers' weights": 6, "transformers' images": 6, "ONNX": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(os, "fsync", lambda handle: None)
        place = tmp_path_factory.mktemp("hostile")
        patch.setenv("HOSTILE_CANARY", str(place / hostile.CANARY))
        yield folder_of_files(place)


@pytest.mark.parametrize("name", READERS)
def test_hostile_files_end_in_a_sentence(name, folder):
    reader = READERS[name]
    cases = list(spoiled(folder / reader.file, folder))
    assert len(cases) > 50
    if name in MOST:
        cases = random.Random(1).sample(cases, MOST[name])
    ends = tried(reader, folder, iter(cases))
    assert [(case, said) for case, how, said, _ in ends if how == "bad"] == []
    assert not (folder / hostile.CANARY).exists(), "code in a file was run"


def touched(size):
    """Takes memory from the system, as malloc need not where it has some left from others."""
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda: touched(2**27), r"it took 0\.1 GB"),
        (lambda: touched(2**25), ""),
        (lambda: time.sleep(2), "it took more than 1 s"),
    ],
)
def test_what_an_input_takes_is_measured(read, fault, monkeypatch):
    monkeypatch.setattr(hostile, "SECONDS", 1)
    monkeypatch.setattr(hostile, "BYTES", 2**26)
    for _ in range(2):  # the second is not hidden by the first
        how, said, cost = hostile.measured(read)
        assert how == ("bad" if fault else "read")
        assert re.fullmatch(fault, said)
        assert fault or 0.7 * 2**25 < cost.memory < 1.3 * 2**25


@pytest.mark.parametrize("name", ["weights", "checkpoint", "npz", "image", "note", "lock", "MNIST"])
def test_fuzz(name, folder):
    """A few of what `make fuzz` tries."""
    reader = READERS[name]
    good = (folder / reader.file).read_bytes()

    @settings(
        max_examples=25, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=False), st.integers(0, 4))
    def broken(draw, more):
        content = good
        for _ in range(1 + more):
            content = flipped(content, draw)
        for _, how, said, _ in tried(reader, folder, iter([hostile.content("fuzz", content)])):
            assert how != "bad", said

    broken()

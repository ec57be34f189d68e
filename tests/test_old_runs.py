"""A run that version 0.1 began goes on: the folder of a small one is kept, after 6 of 12 steps."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dafl_fast.config import Config
from dafl_fast.distill import train
from dafl_fast.engine.folder import RunFolder, check_resumed, read_config
from dafl_fast.engine.prepare import prepare
from dafl_fast.engine.step import STATISTICS
from dafl_fast.files import load_checkpoint
from dafl_fast.networks import load_networks
from dafl_fast.report import write_report

from .test_graph import leaves

DATA = Path(__file__).resolve().parent / "data"
STATISTICS_THEN = (
    "generator_loss", "one_hot", "entropy", "activation", "bn_statistics", "adversarial",
    "distill_loss", "agreement_training",
)  # fmt: skip
AFTER_12_STEPS = DATA / "run-0.1-after-12-steps.safetensors"


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(DATA / "run-0.1", tmp_path / "run"))


def config_of(run: Path) -> Config:
    return Config(**{**read_config(run), "resume": run, "steps": 12})


def test_every_tensor_of_its_checkpoint_arrives(run):
    config = config_of(run)
    step = prepare(*load_networks(config), torch.device("cpu"), "fp32")
    RunFolder(run).restore(step)
    saved, restored = (dict(leaves(s)) for s in (load_checkpoint(run / "checkpoint.pt")["step"],
                                                 step.state_dict()))  # fmt: skip
    del saved[".statistics"], restored[".statistics"], restored[".statistics_of"]
    assert restored.pop(".learned") == step.steps  # from the first step on, then
    assert saved.keys() == restored.keys()
    for path, value in saved.items():
        same = (
            torch.equal(value, restored[path])
            if torch.is_tensor(value)
            else value == restored[path]
        )
        assert same, path
    (shard,) = (run / "bank").iterdir()
    assert step.bank is not None and step.bank.added == 48
    for name, values in load_file(shard).items():
        assert torch.equal(step.bank.span(24, 48)[name], values), name


def test_its_sums_of_losses_find_their_places(run):
    """Losses that came since were off in that run."""
    config = config_of(run)
    step = prepare(*load_networks(config), torch.device("cpu"), "fp32")
    state = load_checkpoint(run / "checkpoint.pt")["step"]
    state["statistics"] = torch.arange(1.0, 9.0)
    step.load_state_dict(state)
    now = dict(zip(STATISTICS, step.statistics.tolist(), strict=True))
    assert now.pop("diversity") == 0
    assert now == dict(zip(STATISTICS_THEN, range(1, 9), strict=True))


def test_it_ends_as_it_would_have(run):
    """To rounding: kernels have changed since, and machines differ. That a run of today's goes on
    bit for bit is tested with today's (test_train.py)."""
    config = config_of(run)
    check_resumed(config)
    torch.set_num_threads(1)
    summary = train(config)
    assert summary["steps"] == 12 and not summary["interrupted"]
    expected, student = load_file(AFTER_12_STEPS), load_file(run / "student.safetensors")
    assert student.keys() == expected.keys()
    before = load_checkpoint(DATA / "run-0.1" / "checkpoint.pt")["step"]["average"]
    for name, tensor in expected.items():
        # What other kernels change in six steps is far below what the steps change.
        moved = (tensor - before[name]).norm()
        assert (student[name] - tensor).norm() < 0.2 * moved, name
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 12
    assert "12" in write_report(run).read_text()


def test_its_settings_are_all_known(run):
    settings = read_config(run)
    assert settings.keys() <= {field.name for field in dataclasses.fields(Config)}
    assert config_of(run).recipe == "fast"

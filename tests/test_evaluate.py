"""The evaluation command: its figures against plain counting, and its mistakes in one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dafl_fast import evaluate as command
from dafl_fast.models import NETWORKS, build, identify


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(command, "latency", lambda network, batch: float(len(batch)))
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    code = command.main()
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def save(path, network) -> str:
    save_file(network.state_dict(), path)
    return str(path)


def write_data(path, count=60, classes=4, channels=3, size=12) -> str:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, size, size, channels), np.uint8)
    np.savez(path, images=images, labels=draw.integers(0, classes, count))
    return str(path)


def test_figures_are_those_of_plain_counting(monkeypatch, capsys, tmp_path):
    note = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    (tmp_path / "s.json").write_text(json.dumps(note))
    write_data(tmp_path / "d.npz")
    file = np.load(tmp_path / "d.npz")
    x = (file["images"] / 255 - note["mean"]) / note["std"]
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float()
    labels = torch.from_numpy(file["labels"])
    student, teacher = build("ResNet8", 5).eval(), build("WRN-16-1", 5).eval()
    with torch.no_grad():  # every class gets its share
        student.linear.bias -= student(x).mean(0)
        teacher.fc.bias -= teacher(x).mean(0)
    path = save(tmp_path / "s.safetensors", student)
    code, printed, _ = run(
        monkeypatch, capsys, path, "--data", str(tmp_path / "d.npz"), "--device", "cpu",
        "--teacher", save(tmp_path / "t.safetensors", teacher), "--json",
    )  # fmt: skip
    assert code == 0
    result = json.loads(printed)
    chosen = {}
    for role, network in (("model", student), ("teacher", teacher)):
        with torch.no_grad():
            chosen[role] = network(x).argmax(1)
        right = chosen[role] == labels
        got = result[role]
        assert got["accuracy"] == pytest.approx(right.float().mean().item())
        assert got["class_accuracy"] == pytest.approx(
            {str(k): right[labels == k].float().mean().item() for k in range(4)}
        )
        assert got["parameters"] == sum(p.numel() for p in network.parameters())
        assert got["bytes"] == Path(got["file"]).stat().st_size > 4 * got["parameters"]
        assert (got["latency_ms_1"], got["latency_ms_256"]) == (1.0, 256.0)
    assert len(set(chosen["model"].tolist())) > 1
    agreement = (chosen["model"] == chosen["teacher"]).float().mean().item()
    assert result["agreement"] == pytest.approx(agreement)
    assert 0 < agreement < 1
    assert (result["count"], result["image_shape"]) == (60, [3, 12, 12])


def test_table_of_the_bundled_teacher(monkeypatch, capsys, tmp_path):
    from importlib.resources import files

    path = str(files("dafl_fast") / "assets" / "lenet5-mnist.safetensors")
    code, printed, _ = run(monkeypatch, capsys, path, "--data", "mnist-5k", "--teacher", path)
    assert code == 0
    assert "5,000 images of mnist-5k (test), 1x32x32" in printed
    rows = {
        cells[0]: cells[1:]
        for line in printed.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")])
        > 1
    }
    stated = json.loads(Path(path).with_suffix(".json").read_text())["accuracy"]["mnist-5k"]
    assert float(rows["accuracy"][0].rstrip("%")) / 100 == pytest.approx(stated, abs=3e-4)
    assert rows["accuracy"][0] == rows["accuracy"][1]
    assert rows["parameters"] == ["61,706"] * 2
    assert rows["agreement"][0] == "100.00%"
    assert rows[""] == ["model LeNet5", "teacher LeNet5"]
    digits = [float(rows[str(digit)][0].rstrip("%")) for digit in range(10)]
    assert sum(digits) / 1000 == pytest.approx(stated, abs=3e-4)  # 500 images of each


def test_latency_is_the_median_after_warming_up(monkeypatch):
    """With a clock that only the network moves: 9 s while it warms up, then 1, 2 and 3 s."""
    now, takes = [0.0], iter([9.0, 9.0, 9.0, 1.0, 3.0, 2.0, 1.0, 3.0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def network(batch):
        assert torch.is_inference_mode_enabled()
        now[0] += next(takes)

    assert command.latency(network, torch.zeros(1)) == 2000.0


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_known_by_its_weights(name):
    channels = 1 if name in ("LeNet5", "LeNet5Half", "HintonNet1200", "HintonNet800") else 2
    with torch.device("meta"):
        state = build(name, 7, channels).state_dict()
    assert identify(dict(sorted(state.items()))) == (name, 7, channels)


def test_other_weights_are_not_taken_for_a_network():
    state = build("ResNet8").state_dict()
    assert identify({**state, "linear.bias": torch.zeros(3)}) is None
    assert identify({**state, "more": torch.zeros(3)}) is None
    assert identify({}) is None


def test_mistakes_are_one_sentence(monkeypatch, capsys, tmp_path):
    data = write_data(tmp_path / "d.npz")
    grey = write_data(tmp_path / "grey.npz", channels=1)
    many = write_data(tmp_path / "many.npz", classes=9)
    model = save(tmp_path / "m.safetensors", build("ResNet8", 4))
    lenet = save(tmp_path / "lenet.safetensors", build("LeNet5", 4))
    other = save(tmp_path / "other.safetensors", torch.nn.Linear(3, 4))
    more = save(tmp_path / "more.safetensors", build("ResNet8", 5))
    cifar = ("--normalise", "cifar10")
    for arguments, sentence in (
        (["none.safetensors"], "the model file none.safetensors does not exist"),
        ([other], "holds none of the networks LeNet5, LeNet5Half, HintonNet1200"),
        ([model, "--data", data], "there is no note beside"),
        ([model, "--data", data, "--normalise", "mnist"], "channel(s), the normalisation is for 1"),
        ([model, "--data", grey, *cifar], "the images have 1 channel(s), the network takes 3"),
        ([model, "--data", many, *cifar], "the network's 4 classes are 0 to 3"),
        (
            [model, "--data", data, *cifar, "--teacher", more],
            "image size] [5, 3, 12], the model [4, 3, 12]",
        ),
        (
            [model, "--data", data, *cifar, "--teacher", lenet],
            "image size] [4, 1, 32], the model [4, 3, 12]",
        ),
    ):
        code, printed, error = run(monkeypatch, capsys, *arguments)
        assert (code, printed) == (2, "")
        assert error.startswith("error: ")
        assert sentence in error
        assert error.count("\n") == 1

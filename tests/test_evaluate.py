"""The evaluation command: its figures against plain counting, and its mistakes in one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dafl_fast import data
from dafl_fast import evaluate as command
from dafl_fast.engine.folder import RunFolder
from dafl_fast.models import NETWORKS, build, identify
from dafl_fast.networks import load_network
from dafl_fast.recipes import make_config


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


@pytest.mark.parametrize("kind", ["pt2", "torchscript", "checkpoint", "run"])
def test_any_file_of_one_network_gives_the_same_figures(kind, monkeypatch, capsys, tmp_path):
    """The data are 28x28, the network wants 32: found by asking."""
    images, labels = np.random.default_rng(0).integers(0, 256, (80, 28, 28), np.uint8), [0, 9] * 40
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    network = build("LeNet5Half").eval()
    (tmp_path / "run").mkdir()
    weights = save(tmp_path / "run" / "student.safetensors", network)
    batch, path = torch.randn(2, 1, 32, 32), tmp_path / "file"
    if kind == "pt2":
        open_batch = ({0: torch.export.Dim("N")},)
        program = torch.export.export(network, (batch,), dynamic_shapes=open_batch)
        path = tmp_path / "file.pt2"
        torch.export.save(program, path)
    elif kind == "torchscript":
        torch.jit.trace(network, batch).save(path)
    elif kind == "checkpoint":
        torch.save({"state_dict": network.state_dict()}, path)
    else:
        path = tmp_path / "run"
        RunFolder(path).write_config(make_config("mnist"))
    monkeypatch.setitem(data.FORMATS, str(tmp_path / "d.npz"), data.FORMATS["mnist"])
    results = []
    for model, teacher in ((weights, str(path)), (str(path), weights)):
        code, printed, error = run(
            monkeypatch, capsys, model, "--teacher", teacher, "--data", str(tmp_path / "d.npz"),
            "--device", "cpu", "--json",
        )  # fmt: skip
        assert (code, error) == (0, "")
        results.append(json.loads(printed))
    for result in results:
        assert result["image_shape"] == [1, 32, 32]
        assert result["agreement"] == 1
        for figure in ("accuracy", "class_accuracy", "parameters"):
            assert result["model"][figure] == result["teacher"][figure]
        assert result["model"]["parameters"] == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_program_tells_the_size_of_its_images(kind, monkeypatch, capsys, tmp_path):
    """The folder's images are of other sizes, those of the .npz file of another one."""
    layers = [torch.nn.Conv2d(1, 4, 5, stride=2), torch.nn.Flatten(), torch.nn.Linear(4 * 81, 2)]
    network, path = torch.nn.Sequential(*layers).eval(), tmp_path / f"m.{kind}"
    batch, open_batch = torch.randn(2, 1, 21, 21), ({0: torch.export.Dim("N")},)
    if kind == "onnx":
        pytest.importorskip("onnx2torch")
        torch.onnx.export(network, (batch,), path, dynamo=False, dynamic_axes={"x": {0: "N"}},
                          input_names=["x"])  # fmt: skip
    else:
        torch.export.save(torch.export.export(network, (batch,), dynamic_shapes=open_batch), path)
    if kind == "pt2":
        for name, size in (("a", 30), ("b", 34)):
            (tmp_path / "d" / name).mkdir(parents=True)
            for index in range(2):
                picture = np.full((size, size), 80 * index, np.uint8)
                Image.fromarray(picture).save(tmp_path / "d" / name / f"{index}.png")
        images = str(tmp_path / "d")
    else:
        images = write_data(tmp_path / "d.npz", classes=2, channels=1, size=30)
    norm = ["--mean", "0.5", "--std", "0.25", "--json"]
    code, printed, error = run(monkeypatch, capsys, str(path), "--data", images, *norm)
    assert code == 0, error
    assert json.loads(printed)["image_shape"] == [1, 21, 21]


def test_the_run_says_what_it_is_evaluated_on(monkeypatch, capsys, tmp_path):
    save(tmp_path / "student.safetensors", build("LeNet5Half"))
    images, labels = np.zeros((20, 32, 32), np.uint8), [0, 9] * 10
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    config = make_config("mnist", eval=str(tmp_path / "d.npz"))
    RunFolder(tmp_path).write_config(config)
    code, printed, error = run(monkeypatch, capsys, str(tmp_path), "--json")
    assert code == 0, error
    assert json.loads(printed)["data"] == str(tmp_path / "d.npz")


def test_mean_and_deviation_on_the_command_line(monkeypatch, capsys, tmp_path):
    """As in the note beside the weights."""
    images = write_data(tmp_path / "d.npz")
    path = save(tmp_path / "m.safetensors", build("ResNet8", 4).eval())
    given = ["--mean", "0.4", "0.5", "0.6", "--std", "0.1", "0.2", "0.3"]
    command_line = [path, "--data", images, "--json"]
    code, printed, error = run(monkeypatch, capsys, *command_line, *given)
    assert code == 0, error
    note = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    (tmp_path / "m.json").write_text(json.dumps(note))
    assert run(monkeypatch, capsys, *command_line)[1] == printed


def test_weights_of_networks_of_other_packages(monkeypatch, capsys, tmp_path):
    """Built for the classes and channels of the data."""
    data_file = write_data(tmp_path / "d.npz", size=32)
    file = np.load(data_file)
    network = load_network(
        "timm:test_resnet", role="student", num_classes=int(file["labels"].max()) + 1, channels=3
    ).eval()
    path = save(tmp_path / "m.safetensors", network)
    x = (file["images"] / 255 - data.FORMATS["cifar10"].mean) / data.FORMATS["cifar10"].std
    with torch.no_grad():
        chosen = network(torch.from_numpy(x).permute(0, 3, 1, 2).float()).argmax(1)
    command_line = [path, "--data", data_file, "--normalise", "cifar10", "--json"]
    timm = ["--network", "timm:test_resnet"]
    code, printed, error = run(
        monkeypatch, capsys, *command_line, *timm, "--teacher", path,
        "--teacher-network", "timm:test_resnet",
    )  # fmt: skip
    assert (code, error) == (0, "")
    result = json.loads(printed)
    accuracy = (chosen.numpy() == file["labels"]).mean()
    assert result["model"]["accuracy"] == result["teacher"]["accuracy"] == pytest.approx(accuracy)
    assert result["model"]["network"] == "timm:test_resnet"
    small = write_data(tmp_path / "small.npz", classes=3)
    for arguments, sentence in (
        (command_line, "which one it is for with --network timm:NAME"),
        ([*command_line, "--network", "timm:test_vit"], "do not fit the model VisionTransformer"),
        (
            [*command_line, *timm, "--data", small],
            "do not fit the model ResNet: fc.weight should be",
        ),
    ):
        code, printed, error = run(monkeypatch, capsys, *arguments)
        assert (code, printed) == (2, "")
        assert sentence in error
        assert error.count("\n") == 1


def test_programs_that_do_not_fit_are_one_sentence(monkeypatch, capsys, tmp_path):
    """Asked with the data's own size and the usual one."""
    grey = write_data(tmp_path / "grey.npz", channels=1)
    torch.jit.trace(build("LeNet5").eval(), torch.randn(2, 1, 32, 32)).save(tmp_path / "lenet.pt")
    torch.jit.trace(torch.nn.ReLU(), torch.randn(2, 1, 4, 4)).save(tmp_path / "images.pt")
    resnet = save(tmp_path / "resnet.safetensors", build("ResNet8", 4, 1))
    as_mnist = ["--data", grey, "--normalise", "mnist"]
    for arguments, sentence in (
        ([str(tmp_path / "lenet.pt"), *as_mnist], "the model does not take images of shape [8, 1,"),
        ([str(tmp_path / "images.pt"), *as_mnist], "the model must return logits [N, C], got [8, "),
        ([resnet, *as_mnist, "--teacher", str(tmp_path / "lenet.pt")], "the teacher does not take"),
        ([str(tmp_path)], "there is no run in"),
    ):
        code, printed, error = run(monkeypatch, capsys, *arguments)
        assert (code, printed) == (2, "")
        assert sentence in error
        assert error.count("\n") == 1


def test_mistakes_are_one_sentence(monkeypatch, capsys, tmp_path):
    images = write_data(tmp_path / "d.npz")
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
        ([model, "--data", images], "with --normalise, or give --mean and --std"),
        ([model, "--data", images, "--std", "1"], "--mean and --std must be given for each"),
        ([model, "--mean", "1", "--std", "1", *cifar], "--mean, --std exclude each other"),
        (
            [model, "--data", images, "--normalise", "mnist"],
            "channel(s), the normalisation is for 1",
        ),
        ([model, "--data", grey, *cifar], "the images have 1 channel(s), the network takes 3"),
        ([model, "--data", many, *cifar], "the network's 4 classes are 0 to 3"),
        (
            [model, "--data", images, *cifar, "--teacher", more],
            "image size] [5, 3, 12], the model [4, 3, 12]",
        ),
        (
            [model, "--data", images, *cifar, "--teacher", lenet],
            "image size] [4, 1, 32], the model [4, 3, 12]",
        ),
    ):
        code, printed, error = run(monkeypatch, capsys, *arguments)
        assert (code, printed) == (2, "")
        assert error.startswith("error: ")
        assert sentence in error
        assert error.count("\n") == 1

"""Exported students: the same answers elsewhere and a card that says what is true, or no file."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import dafl_fast
from dafl_fast import export as command
from dafl_fast.data import FORMATS
from dafl_fast.distill import train
from dafl_fast.engine.evaluation import eval_set
from dafl_fast.errors import UserError
from dafl_fast.export import export_student
from dafl_fast.models import LeNet5, LeNet5Half, build
from dafl_fast.models.winograd import WinogradConv2d, accelerated
from dafl_fast.networks import load_network, open_file
from dafl_fast.recipes import make_config

from .conftest import joined

BUNDLED = Path(str(files("dafl_fast") / "assets" / "lenet5-mnist.safetensors"))
TINY = {"batch_size": 16, "generator_width": 8, "student_batch_size": 32, "student_updates": 4,
        "bank_images": 160, "log_every": 10, "precision": "fp32"}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a short run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(make_config("mnist", "fast", **TINY, steps=20, seed=3, out_dir=out))
    return out


def main(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    code = command.main()
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def onnx_logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@torch.no_grad()
def test_the_onnx_student_chooses_as_pytorch_does_on_all_held_out_images(
    run, monkeypatch, capsys, tmp_path
):
    out = tmp_path / "s.onnx"
    code, printed, error = main(monkeypatch, capsys, str(run), "--out", str(out))
    assert (code, error) == (0, "")
    assert "the student's class on all of 5,256 images (5,000 held out)" in printed
    images, _ = joined(eval_set("mnist-5k", FORMATS["mnist"], 10))
    student = LeNet5Half().eval()
    student.load_state_dict(load_file(run / "student.safetensors"))
    chosen = student(images).argmax(1)
    assert len(chosen) == 5000
    assert len(chosen.unique()) > 1
    assert torch.equal(onnx_logits(out, images).argmax(1), chosen)


@torch.no_grad()
@pytest.mark.parametrize("name", ["LeNet5", "ResNet8", "timm:test_resnet"])
def test_onnx_files_hold_nothing_of_ours(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    shape = (1 if name == "LeNet5" else 3, 32, 32)
    weights = BUNDLED if name == "LeNet5" else None
    network = load_network(name, weights, role="student", num_classes=10, channels=shape[0])
    check = export_student(network, tmp_path / "s.onnx", image_shape=shape)
    model = onnx.load(tmp_path / "s.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    content = (tmp_path / "s.onnx").read_bytes()
    assert str(Path.cwd()).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content
    images = torch.randn(7, *shape)
    difference = (onnx_logits(tmp_path / "s.onnx", images) - network.eval()(images)).abs().max()
    assert difference < 1e-4
    assert check["held_out_images"] == 0
    assert check["max_difference"] < 1e-4


@torch.no_grad()
def test_a_program_for_torch_export_is_the_student(tmp_path):
    network = load_network("LeNet5", BUNDLED, role="student").train()
    images, labels = joined(eval_set("mnist-5k", FORMATS["mnist"], 10))
    path = tmp_path / "s.pt2"
    check = export_student(network, path, "pt2", image_shape=(1, 32, 32), held_out=images[::10])
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert path.stat().st_size < 400_000  # weights of 247 kB
    program = torch.export.load(path)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {target.namespace for target in called} == {"aten"}
    images, labels = images[::10], labels[::10]
    logits = program.module()(images)
    assert (logits.argmax(1) == labels).double().mean() > 0.99
    assert check["held_out_images"] == 500
    assert (logits - network.eval()(images)).abs().max() <= check["max_difference"] + 1e-6
    opened = open_file(path, "model")  # and this package reads it again
    torch.testing.assert_close(opened.network(images[:9]), logits[:9])


def test_fast_convolutions_become_plain_ones(tmp_path):
    layers = [nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = accelerated(nn.Sequential(*layers, nn.Linear(64, 3)))
    assert isinstance(network[0], WinogradConv2d)
    export_student(network, tmp_path / "s.pt2", "pt2", image_shape=(64, 8, 8))
    program = torch.export.load(tmp_path / "s.pt2")
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.aten.conv2d.default in called
    assert {target.namespace for target in called} == {"aten"}


@torch.no_grad()
def test_weights_of_a_student_without_a_name(tmp_path):
    """From a module: BatchNorm's statistics are part of it."""
    network = build("ResNet8", 5).train()
    network(torch.randn(64, 3, 16, 16))
    check = export_student(network, tmp_path / "s", "safetensors", image_shape=(3, 16, 16))
    state = load_file(tmp_path / "s")
    assert check["max_difference"] == 0
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    assert "logits [N, 5]" in (tmp_path / "s.md").read_text()


def test_the_card_says_what_the_run_says(run, monkeypatch, capsys, tmp_path):
    code, _, error = main(
        monkeypatch, capsys, str(run), "--format", "safetensors", "--out", str(tmp_path / "s")
    )
    assert (code, error) == (0, "")
    card = (tmp_path / "s.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "unknown"
    assert head["pipeline_tag"] == "image-classification"
    for said in (
        hashlib.sha256((tmp_path / "s").read_bytes()).hexdigest(),
        summary["teacher_sha256"],
        f"{summary['student_accuracy']:.2%}, the teacher's {summary['teacher_accuracy']:.2%}, on "
        "5,000 held-out images (mnist-5k)",
        f"generated images: {summary['agreement_fresh']:.2%}",
        "Recipe: fast of the preset mnist; settings that differ from it: precision fp32, seed 3, "
        "student_start teacher, generator_width 8, batch_size 16,",
        "images [N, 1, 32, 32], float32",
        "mean [0.1307], std [0.3081]",
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, in this order",
        "256 random images and 5,000 held-out images",
        f"dafl_fast {dafl_fast.__version__}, torch {torch.__version__}, python",
    ):
        assert said in card
    assert str(run) not in card


def test_a_result_of_distill_exports_itself(tmp_path):
    """A module has no name: Python exports it, the command says so."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = dafl_fast.distill(
        teacher, student, image_shape=(1, 8, 8), out_dir=tmp_path / "run", steps=2, **TINY
    )
    check = export_student(result, tmp_path / "s.pt2", "pt2")
    assert check["random_images"] == 256
    card = (tmp_path / "s.pt2.md").read_text()
    assert "images [N, 1, 8, 8]" in card
    assert result.summary["teacher_sha256"] in card
    assert "which is not recorded here" in card
    assert "Accuracy: not measured" in card
    with pytest.raises(UserError, match=r"run has no name, .*export_student\(result, FILE\)"):
        open_file(result.folder, "model")


class Other(nn.Module):
    """Computes something else in a program."""

    def __init__(self, amount: float):
        super().__init__()
        self.linear, self.amount = nn.Linear(64, 4), amount

    def forward(self, x):
        y = self.linear(x.flatten(1))
        return y * self.amount if torch.compiler.is_exporting() else y


@pytest.mark.parametrize(("amount", "classes"), [(1.001, "0"), (-1, r"2\d\d"), (float("nan"), "")])
def test_a_file_that_computes_something_else_is_not_kept(amount, classes, tmp_path):
    (tmp_path / "s.pt2").write_text("older")
    with pytest.raises(UserError, match=f"not compute .*, and is not kept: other .* on {classes}"):
        export_student(Other(amount), tmp_path / "s.pt2", "pt2", image_shape=(1, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt2"]
    assert (tmp_path / "s.pt2").read_text() == "older"


class Asks(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :4] if x.sum() > 0 else x.flatten(1)[:, 4:8]


class ByLen(nn.Module):
    """As many write it."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 64)), nn.Linear(128, 5)

    def forward(self, x):
        token = self.token.expand(len(x), -1, -1)
        return self.head(torch.cat([token, x.view(len(x), 1, -1)], 1).view(len(x), -1))


@torch.no_grad()
@pytest.mark.parametrize(
    "wrap",
    [lambda network: network, torch.compile, nn.DataParallel],
    ids=["plain", "compile", "dp"],
)
def test_students_that_ask_for_len_and_wrapped_ones(wrap, tmp_path):
    network = ByLen()
    export_student(wrap(network), tmp_path / "s.pt2", "pt2", image_shape=(1, 8, 8))
    images = torch.randn(7, 1, 8, 8)
    got = torch.export.load(tmp_path / "s.pt2").module()(images)
    torch.testing.assert_close(got, network(images))
    assert "# ByLen, distilled" in (tmp_path / "s.pt2.md").read_text()


class Two(nn.Module):
    def forward(self, x):
        return (x.view(2, -1) if x.shape[0] == 2 else x.flatten(1))[:, :4]


class NoOnnx(nn.Module):
    def forward(self, x):
        return torch.linalg.matrix_exp(x[:, 0, :4, :4]).sum(1)


@pytest.mark.parametrize(
    ("network", "format", "sentence"),
    [
        (Two(), "pt2", r"code makes the number of images a constant \(2\); .* x\.shape\[0\]"),
        (Asks(), "onnx", "by the values in a tensor; .* torch.where instead$"),
        (NoOnnx(), "onnx", "to ONNX: ONNX has nothing for aten.linalg_matrix_exp$"),
    ],
)
def test_why_a_student_cannot_be_exported(network, format, sentence, capfd, tmp_path):
    with pytest.raises(UserError, match=sentence):
        export_student(network, tmp_path / "s", format, image_shape=(1, 8, 8))
    assert capfd.readouterr() == ("", "")  # no pages of its code
    assert list(tmp_path.iterdir()) == []


def test_names_in_the_card_are_text(tmp_path):
    names = ("<b>cat</b>", "a_dog_", "[x](y)\n\n# z", "`")
    export_student(ByFour(), tmp_path / "s", "pt2", image_shape=(1, 8, 8), classes=names)
    card = (tmp_path / "s.md").read_text()
    assert r"Classes: \<b\>cat\</b\>, a\_dog\_, \[x\](y) # z, \`, in this order." in card


class ByFour(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :4]


def test_mistakes_in_python(monkeypatch, tmp_path):
    shape = {"image_shape": (1, 32, 32)}
    for network, arguments, sentence in (
        (LeNet5(), {}, "image_shape is needed"),
        (LeNet5(), {**shape, "format": "tflite"}, "--format must be one of safetensors, onnx, pt2"),
        (
            LeNet5(),
            {"image_shape": (3, 32, 32)},
            r"does not take images of shape \[2, 3, 3",
        ),
        ("runs/x", {}, "student must be a network .*, got 'runs/x'; .* load_network"),
        (LeNet5(), {**shape, "classes": ("a", "b")}, "names of the student's 10 classes, got 2"),
        (
            LeNet5(),
            {**shape, "held_out": torch.zeros(4, 3, 32, 32)},
            r"held_out must be a tensor of images \[N, 1, 32, 32\], got \[4, 3, 32, 32\]",
        ),
        (
            LeNet5(),
            {**shape, "held_out": np.zeros((4, 1, 32, 32), "f4")},
            r"held_out must be a tensor of images \[N, 1, 32, 32\], got ndarray",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            export_student(network, tmp_path / "s", **arguments)
    with pytest.raises(UserError, match="--out must be a file"):
        export_student(LeNet5(), tmp_path, **shape)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"ONNX \(the extra dafl_fast\[export\]\) needs .*'onnx"):
        export_student(LeNet5(), tmp_path / "s", **shape)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_on_the_command_line_are_one_sentence(run, monkeypatch, capsys, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text((run / "config.yaml").read_text())
    for arguments, sentence in (
        ([str(tmp_path)], "there is no run in"),
        ([str(tmp_path / "begun")], "has left no student yet; go on with it: python -m dafl"),
    ):
        code, printed, error = main(monkeypatch, capsys, *arguments)
        assert (code, printed) == (2, "")
        assert error.startswith("error: ")
        assert sentence in error
        assert error.count("\n") == 1


def test_held_out_images_that_are_not_here_are_left_out(run, monkeypatch, capsys, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("student.safetensors", "summary.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    config = yaml.safe_load((run / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "eval": "mnist"}))
    code, printed, _ = main(
        monkeypatch, capsys, str(folder), "--format", "safetensors", "--data-dir", str(tmp_path)
    )
    assert code == 0
    assert "256 images (0 held out)" in printed
    assert "compared on random images only: MNIST was not found in" in caplog.text

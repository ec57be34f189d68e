"""Teachers as people have them, from the command line, with no code written for them.

Each trains a student for a few steps, is exported, and the file is used as the teacher was.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dafl_fast import export, train
from dafl_fast.networks import load_network

TINY = [
    "--steps", "4", "--batch-size", "8", "--generator-width", "8", "--student-batch-size", "8",
    "--student-updates", "2", "--bank-images", "64", "--log-every", "2", "--latent-dim", "10",
]  # fmt: skip

NETS = """
import torch
from dataclasses import dataclass
from torch import nn


class Base(nn.Module):
    channels, classes = 3, 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(self.channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(96, self.classes)

    def z(self, x):
        return self.head(self.pool(self.norm(self.conv(x)).relu()).flatten(1))

    def forward(self, x):
        return self.z(x)


class Dict(Base):
    def forward(self, x):
        return {"features": self.conv(x), "logits": self.z(x)}


class Tuple(Base):
    def forward(self, x):
        return self.z(x), self.conv(x)


class Softmax(Base):
    def forward(self, x):
        return self.z(x).softmax(1)


class LogSoftmax(Base):
    def __init__(self):
        super().__init__()
        self.last = nn.LogSoftmax(dim=1)

    def forward(self, x):
        return self.last(self.z(x))


class OneLogit(Base):
    classes = 1


class OneSigmoid(Base):
    classes = 1

    def forward(self, x):
        return torch.sigmoid(self.z(x))


class View(Base):
    def z(self, x):
        y = self.pool(self.norm(self.conv(x)).relu())
        return self.head(y.view(y.size(0), -1))


class ManyChannels(Base):
    channels = 13


def student(num_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""

# name: the class in nets.py, the shape of the images, and what comes out.
FOUND = {
    "dict": ("Dict", (3, 16, 16), "logits"),
    "tuple": ("Tuple", (3, 16, 16), "logits"),
    "softmax": ("Softmax", (3, 16, 16), "probabilities"),
    "log-softmax": ("LogSoftmax", (3, 16, 16), "log-probabilities"),
    "one logit": ("OneLogit", (3, 16, 16), "binary-logit"),
    "one sigmoid": ("OneSigmoid", (3, 16, 16), "binary-probability"),
    ".view": ("View", (3, 16, 16), "logits"),
    "48x192": ("Base", (3, 48, 192), "logits"),
    "30x50": ("View", (3, 30, 50), "logits"),
    "13 channels": ("ManyChannels", (13, 16, 16), "logits"),
    "half precision": ("Base", (3, 16, 16), "logits"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    return tmp_path


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location("found_nets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(monkeypatch, capsys, module, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
        code = module.main() or 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def distilled(monkeypatch, capsys, *arguments, shape=None) -> dict:
    """The summary of a short run."""
    said = [] if shape is None else ["--image-shape", *shape]
    line = ["--student", "nets.py:student", *arguments, *said, *TINY, "--out-dir", "run"]
    code, err = command(monkeypatch, capsys, train, *line)
    assert code == 0, err
    return json.loads(Path("run/summary.json").read_text())


def answers_of_export(monkeypatch, capsys, inputs: dict[str, np.ndarray], output: str):
    import onnxruntime

    code, err = command(monkeypatch, capsys, export, "run", "--format", "onnx", "--trust-run")
    assert code == 0, err
    session = onnxruntime.InferenceSession("run/student.onnx")
    return session.run([output], inputs)[0]


@pytest.mark.parametrize("name", FOUND)
def test_networks_in_python(name, here, monkeypatch, capsys):
    kind, shape, outputs = FOUND[name]
    teacher = getattr(module_of(here / "nets.py"), kind)()
    teacher.norm.running_mean.normal_(), teacher.norm.running_var.uniform_(0.5, 2)
    if name == "half precision":
        teacher.half()
    save_file(teacher.state_dict(), "teacher.safetensors")
    summary = distilled(
        monkeypatch, capsys, "--teacher", f"nets.py:{kind}",
        "--teacher-weights", "teacher.safetensors", shape=shape,
    )  # fmt: skip
    assert summary["steps"] == 4 and summary["convention"]["outputs"] == outputs
    images, convention = torch.randn(3, *shape), summary["convention"]
    inputs = {convention["input_name"]: images.numpy()}
    exported = answers_of_export(monkeypatch, capsys, inputs, convention["output_name"])
    got = torch.from_numpy(exported)
    answers = teacher.float().eval()(images)
    answers = answers["logits"] if kind == "Dict" else answers[0] if kind == "Tuple" else answers
    assert got.shape == answers.shape
    if outputs == "probabilities":
        torch.testing.assert_close(got.sum(1), torch.ones(3))
    elif outputs == "log-probabilities":
        torch.testing.assert_close(got.logsumexp(1), torch.zeros(3), atol=1e-5, rtol=0)
    elif outputs == "binary-probability":
        assert ((got > 0) & (got < 1)).all()
    # And it is the student that was trained.
    student = load_network("run", role="model", trust_run=True).eval()
    logits = student(images)
    expected = {
        "logits": logits,
        "probabilities": logits.softmax(1),
        "log-probabilities": logits.log_softmax(1),
        "binary-logit": logits[:, 1:] - logits[:, :1],
        "binary-probability": torch.sigmoid(logits[:, 1:] - logits[:, :1]),
    }[outputs]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_network_exported_to_onnx(here, monkeypatch, capsys):
    nets = module_of(here / "nets.py")
    teacher = nets.Softmax().eval()
    torch.onnx.export(
        teacher, (torch.randn(1, 3, 24, 40),), "teacher.onnx", dynamo=False, opset_version=12,
        input_names=["pixels"], output_names=["p"],
    )  # fmt: skip
    summary = distilled(monkeypatch, capsys, "--teacher", "teacher.onnx")
    assert summary["convention"]["image_shape"] == [3, 24, 40]
    images = np.random.default_rng(0).standard_normal((5, 3, 24, 40), dtype=np.float32)
    got = answers_of_export(monkeypatch, capsys, {"pixels": images}, "p")
    assert got.shape == (5, 4)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)


def test_an_onnx_file_with_channels_last(here, monkeypatch, capsys):
    """As Keras' exporters write them: NHWC, and whole numbers."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = module_of(here / "nets.py").Base()

        def forward(self, x):
            return self.network(x.permute(0, 3, 1, 2).float() / 255)

    images = torch.randint(256, (2, 16, 20, 3), dtype=torch.uint8)
    torch.onnx.export(
        Last().eval(), (images,), "teacher.onnx", dynamo=False, opset_version=13,
        input_names=["input_1"], output_names=["dense"], dynamic_axes={"input_1": {0: "N"}},
    )  # fmt: skip
    line = ["--teacher", "teacher.onnx", "--student", "nets.py:student", *TINY]
    code, err = command(monkeypatch, capsys, train, *line, "--pixels", "0..1")
    assert code == 2 and "--pixels must be 0..255 for teacher.onnx, which takes uint8" in err
    summary = distilled(monkeypatch, capsys, "--teacher", "teacher.onnx")
    convention = summary["convention"]
    assert (convention["layout"], convention["dtype"]) == ("NHWC", "uint8")
    assert convention["image_shape"] == [3, 16, 20]
    got = answers_of_export(monkeypatch, capsys, {"input_1": images.numpy()}, "dense")
    assert got.shape == (2, 4) and np.isfinite(got).all()


def test_the_orientation_of_text_lines(here, monkeypatch, capsys):
    """A file of the package rapidocr: three channels, 48x192, -1 to 1, softmax over two classes."""
    found = importlib.util.find_spec("rapidocr")
    if found is None:
        pytest.skip("pip install --no-deps rapidocr")
    file = Path(found.origin).parent / "models" / "ch_ppocr_mobile_v2.0_cls_mobile.onnx"
    summary = distilled(monkeypatch, capsys, "--teacher", file, shape=(3, 48, 192))
    convention = summary["convention"]
    assert convention["image_shape"] == [3, 48, 192]
    assert convention["outputs"] == "probabilities"
    assert summary["student_parameters"] * 5 < summary["teacher_parameters"]
    import onnxruntime

    theirs = onnxruntime.InferenceSession(str(file))
    names = theirs.get_inputs()[0].name, theirs.get_outputs()[0].name
    assert names == (convention["input_name"], convention["output_name"])
    images = np.random.default_rng(0).uniform(-1, 1, (4, 3, 48, 192)).astype(np.float32)
    wanted = theirs.run([names[1]], {names[0]: images})[0]
    got = answers_of_export(monkeypatch, capsys, {names[0]: images}, names[1])
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)
    # The file leaves height and width open; with nothing said, some are taken, which one line says.
    shutil.rmtree("run")
    summary = distilled(monkeypatch, capsys, "--teacher", file)
    assert summary["convention"]["image_shape"] == [3, 64, 64]


def test_a_program_tells_its_images(here, monkeypatch, capsys):
    program = torch.export.export(
        module_of(here / "nets.py").View().eval(), (torch.randn(2, 3, 16, 20),),
        dynamic_shapes=({0: torch.export.Dim("N")},),
    )  # fmt: skip
    torch.export.save(program, "teacher.pt2")
    summary = distilled(monkeypatch, capsys, "--teacher", "teacher.pt2")
    assert summary["convention"]["image_shape"] == [3, 16, 20]


def test_a_pickled_network_is_not_loaded(here, monkeypatch, capsys):
    torch.save(torch.nn.Linear(3, 2), "teacher.pt")
    line = ["--teacher", "teacher.pt", "--image-shape", 3, 16, 16, "--student", "nets.py:student"]
    code, err = command(monkeypatch, capsys, train, *line, *TINY)
    assert code == 2 and "can run any code" in err


def test_a_digit_classifier_from_a_package(here, monkeypatch, capsys):
    """digit-recognizer-py: a class that flattens with view, and a checkpoint beside it."""
    found = importlib.util.find_spec("digit_recognizer")
    if found is None:
        pytest.skip("pip install --no-deps digit-recognizer-py")
    weights = Path(found.origin).parent / "models" / "handwriting_model.pth"
    summary = distilled(
        monkeypatch, capsys, "--teacher", "digit_recognizer.model:CNN",
        "--teacher-weights", weights, shape=(1, 28, 28),
    )  # fmt: skip
    assert summary["num_classes"] == 10 and summary["steps"] == 4

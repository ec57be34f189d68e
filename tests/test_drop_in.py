"""Students in the place of teachers that return other things than logits."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dafl_fast import Config, distill
from dafl_fast import evaluate as evaluation
from dafl_fast import export as command
from dafl_fast import train as training
from dafl_fast.convention import Convention, as_answers
from dafl_fast.distill import train
from dafl_fast.engine.folder import read_config
from dafl_fast.errors import UserError
from dafl_fast.export import export_student

from .test_outputs import KINDS, TINY, Network, network

SHAPE = (2, 8, 8)
FORMS = {  # an answer that is no more than two dimensions, and its shape for one image
    "[N]": ("binary-probability", lambda z: z.sigmoid().squeeze(1), ()),
    "[N, 1]": ("binary-logit", lambda z: z, (1,)),
    "[N, C, 1, 1]": ("probabilities", lambda z: z.softmax(1)[:, :, None, None], (5, 1, 1)),
}


def student(classes: int) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(128, classes),
    )  # fmt: skip


def distilled(teacher: nn.Module, out: Path, steps: int = 2, **settings):
    classes = 2 if teacher.head.out_features == 1 else 5
    given = {**TINY, "image_shape": SHAPE, "steps": steps, "progress": "off", **settings}
    result = distill(teacher, student(classes), out_dir=out, **given)
    result.student.requires_grad_(False)
    return result


def run_onnx(path: Path, images: np.ndarray) -> tuple[str, str, Tensor]:
    """The names of its input and output, and what it returns."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,), (got,) = session.get_inputs(), session.get_outputs()
    return given.name, got.name, torch.from_numpy(session.run([got.name], {given.name: images})[0])


# -- exported students -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_answers_as_its_teacher(kind, tmp_path):
    teacher = network(kind)
    result = distilled(teacher, tmp_path / "run")
    assert result.summary["convention"]["outputs"] == kind
    images = torch.randn(7, *SHAPE)
    logits, file = result.student(images), tmp_path / "s.onnx"
    expected = {
        "logits": logits,
        "probabilities": logits.softmax(1),
        "log-probabilities": logits.log_softmax(1),
        "sigmoids": logits.softmax(1),
        "binary-logit": logits[:, 1:] - logits[:, :1],
        "binary-probability": logits.softmax(1)[:, 1:],
    }[kind]
    check = export_student(result, file)
    assert check["random_images"] == 256 and check["max_difference"] < 1e-4
    names = run_onnx(file, images.numpy())
    assert names[:2] == ("images", kind.replace("-", "_"))
    torch.testing.assert_close(names[2], expected, rtol=1e-4, atol=1e-5)
    assert names[2].shape == teacher(images).shape
    card = (tmp_path / "s.onnx.md").read_text()
    assert f"its name is `{kind.replace('-', '_')}`" in card
    export_student(result, tmp_path / "s.pt2", "pt2")
    program = torch.export.load(tmp_path / "s.pt2").module()
    torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_shape_of_an_answer_is_given_back(form, tmp_path):
    kind, end, shape = FORMS[form]
    outputs = 1 if kind.startswith("binary") else 5
    teacher = Network(outputs, end).eval()
    result = distilled(teacher, tmp_path / "run")
    images, file = torch.randn(3, *SHAPE), tmp_path / "s"
    export_student(result, file, "onnx" if form == "[N]" else "pt2")
    if form == "[N]":
        *_, got = run_onnx(file, images.numpy())
    else:
        got = torch.export.load(file).module()(images)
    assert got.shape == teacher(images).shape == (3, *shape)
    expected = as_answers(result.student(images), kind, shape)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    printed = ", ".join(["N", *map(str, shape)])
    assert f" [{printed}]" in (tmp_path / "s.md").read_text()


def test_logits_if_they_are_wanted(tmp_path):
    teacher = Network(1, lambda z: {"spam": z.sigmoid()}).eval()
    result = distilled(teacher, tmp_path / "run")
    images, file = torch.randn(3, *SHAPE), tmp_path / "s.onnx"
    export_student(result, file)
    assert run_onnx(file, images.numpy())[:2] == ("images", "spam")
    export_student(result, file, outputs="logits")
    *names, got = run_onnx(file, images.numpy())
    assert names == ["images", "logits"]
    torch.testing.assert_close(got, result.student(images), rtol=1e-4, atol=1e-5)
    assert "Output: logits [N, 2], float32; its" in (tmp_path / "s.onnx.md").read_text()


# Also names that values inside the file have already.
@pytest.mark.parametrize("names", [("pixels", "p"), ("relu", "linear")])
def test_names_are_those_of_the_teacher(names, tmp_path):
    teacher = network("probabilities")
    teacher.convention = Convention(*names, classes=("ant", "bee", "cat", "dog", "eel"))
    result = distilled(teacher, tmp_path / "run")
    export_student(result, tmp_path / "s.onnx")
    images = torch.randn(4, *SHAPE)
    got = run_onnx(tmp_path / "s.onnx", images.numpy())
    assert got[:2] == names
    torch.testing.assert_close(got[2], result.student(images).softmax(1), rtol=1e-4, atol=1e-5)
    card = (tmp_path / "s.onnx.md").read_text()
    assert "ant, bee, cat, dog, eel, in this order" in card
    assert f'run(None, {{"{names[0]}": images}})' in card
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    kept = Convention.from_json(summary["convention"])
    assert kept == Convention(*names, outputs="probabilities", image_shape=SHAPE,
                              classes=teacher.convention.classes)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "dtype", "format"),
    [("NHWC", "float32", "pt2"), ("NHWC", "uint8", "onnx"), ("NCHW", "uint8", "pt2"),
     ("NCHW", "float64", "pt2"), ("NHWC", "float16", "onnx")],
)  # fmt: skip
def test_images_are_taken_as_the_teacher_takes_them(layout, dtype, format, tmp_path):
    teacher = network("probabilities")
    teacher.convention = Convention("input_1", "dense", layout, dtype)
    pixels = "0..255" if dtype == "uint8" else "normalised"
    result = distilled(teacher, tmp_path / "run", pixels=pixels)
    export_student(result, tmp_path / "s", format)
    images = torch.randn(6, *SHAPE)
    if dtype == "uint8":
        images = (images * 60 + 120).clamp(0, 255).round()
    given = images.permute(0, 2, 3, 1) if layout == "NHWC" else images
    given = given.contiguous().to(getattr(torch, dtype))
    if format == "onnx":
        *names, got = run_onnx(tmp_path / "s", given.numpy())
        assert names == ["input_1", "dense"]
    else:
        got = torch.export.load(tmp_path / "s").module()(given)
    expected = result.student(images if dtype == "uint8" else images.to(given.dtype).float())
    torch.testing.assert_close(got, expected.softmax(1), rtol=1e-3, atol=1e-4)
    card = (tmp_path / "s.md").read_text()
    shape = "8, 8, 2] (N, height, width, channels)" if layout == "NHWC" else "2, 8, 8]"
    assert f"images [N, {shape}, {dtype}, any N" in card


def test_an_interrupted_run_is_exported_alike(tmp_path):
    teacher = network("binary-probability")
    rows = []

    def stop(row):
        rows.append(row)
        if len(rows) == 1:
            signal.raise_signal(signal.SIGINT)

    result = distilled(teacher, tmp_path / "run", 100, log_every=1, callbacks=[stop])
    assert result.summary["interrupted"] and result.summary["steps"] < 100
    export_student(result, tmp_path / "s.onnx")
    images = torch.randn(3, *SHAPE)
    *_, got = run_onnx(tmp_path / "s.onnx", images.numpy())
    torch.testing.assert_close(got, result.student(images).softmax(1)[:, 1:],
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_what_cannot_be_exported_so(tmp_path):
    result = distilled(network("probabilities"), tmp_path / "run")
    with pytest.raises(UserError, match="--outputs as-teacher needs a program, and safetensors"):
        export_student(result, tmp_path / "s", "safetensors", outputs="as-teacher")
    with pytest.raises(UserError, match="--outputs must be as-teacher or logits, got 'softmax'"):
        export_student(result, tmp_path / "s", outputs="softmax")
    assert not (tmp_path / "s").exists()
    export_student(result, tmp_path / "s", "safetensors")
    card = (tmp_path / "s.md").read_text()
    assert "Output: logits [N, 5]. Softmax gives probabilities" in card


def test_a_run_of_an_older_version_has_logits(tmp_path):
    """Its summary says nothing of a convention."""
    result = distilled(network("logits"), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    del summary["convention"]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    export_student(result, tmp_path / "s.onnx")
    assert run_onnx(tmp_path / "s.onnx", torch.randn(2, *SHAPE).numpy())[:2] == ("images", "logits")


def test_the_command_knows_outputs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "as-teacher: what the teacher returned, such as probabilities" in printed


# -- training --------------------------------------------------------------------------------------


class Steep(nn.Module):
    """A teacher that a student of its kind learns soon."""

    def __init__(self, outputs: int, end) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.head, self.end = nn.Conv2d(2, 6, 5, 2), nn.Linear(24, outputs), end
        with torch.no_grad():
            self.head.weight *= 12

    def forward(self, x: Tensor):
        return self.end(self.head(self.conv(x).tanh().flatten(1)))


def taught(outputs: int, end, out: Path):
    torch.manual_seed(2)
    student = nn.Sequential(
        nn.Conv2d(2, 16, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(64, max(2, outputs))
    )
    return distill(
        Steep(outputs, end), student, out_dir=out, image_shape=SHAPE, steps=60, progress="off",
        **{**TINY, "batch_size": 64, "student_batch_size": 128, "student_updates": 8,
           "bank_images": 2048, "generator_lr": 0.02, "student_lr": 0.01, "adapt": False,
           "student_after": 0, "dead_leaves": 0, "seed": 1},  # a seed that does not hang by a bit
    )  # fmt: skip


LEARNED = {  # outputs, what is made of logits, and logits of the same probabilities
    "softmax": (5, lambda z: z.softmax(1), lambda z: z),
    "softmax by hand": (5, lambda z: z.exp() / z.exp().sum(1, keepdim=True), lambda z: z),
    "dict": (5, lambda z: {"features": z[:, :2], "scores": z.softmax(1)}, lambda z: z),
    "one logit": (1, lambda z: z, lambda z: torch.cat([torch.zeros_like(z), z], 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_a_student_learns_as_from_logits(name, tmp_path):
    outputs, end, plain = LEARNED[name]
    result, witness = (taught(outputs, f, tmp_path / str(f is end)) for f in (end, plain))
    first, second = result.history[0], witness.history[0]
    for loss in ("generator_loss", "distill_loss"):
        assert first[loss] == pytest.approx(second[loss], rel=1e-2)
    assert first["agreement_training"] < 0.7
    assert result.summary["agreement_fresh"] > first["agreement_training"] + 0.2
    assert result.summary["agreement_fresh"] == pytest.approx(
        witness.summary["agreement_fresh"], abs=0.05
    )


@pytest.mark.parametrize("kind", ["binary-logit", "binary-probability", "sigmoids"])
def test_the_accuracy_of_the_teacher_is_measured(kind, tmp_path):
    teacher = network(kind, scale=8.0)
    images = torch.randn(60, *SHAPE)
    z = teacher.z(images)
    labels = (z > 0).long().flatten() if z.shape[1] == 1 else z.argmax(1)
    labels[:15] = (labels[:15] + 1) % 2 if z.shape[1] == 1 else (labels[:15] + 1) % 5
    result = distilled(teacher, tmp_path / "run", eval_loader=[(images, labels)])
    assert result.summary["teacher_accuracy"] == 0.75
    assert result.summary["num_classes"] == (5 if kind == "sigmoids" else 2)


def test_the_setting_belongs_to_the_run(tmp_path):
    teacher = Network(5, torch.sigmoid, bias=2.0).eval()
    with pytest.raises(UserError, match="which cannot be distilled"):
        distilled(teacher, tmp_path / "refused")
    distilled(teacher, tmp_path / "run", teacher_output="sigmoids")
    assert Config(**read_config(tmp_path / "run")).teacher_output == "sigmoids"
    resumed = {"resume": tmp_path / "run", "teacher_output": "sigmoids"}
    result = distill(teacher, student(5), **{**TINY, **resumed}, image_shape=SHAPE, steps=4,
                     progress="off")  # fmt: skip
    assert result.summary["steps"] == 4
    assert result.summary["convention"]["outputs"] == "sigmoids"
    with pytest.raises(UserError, match="--teacher-output cannot change when resuming"):
        distill(teacher, student(5), **TINY, resume=tmp_path / "run", image_shape=SHAPE, steps=6,
                progress="off")  # fmt: skip
    with pytest.raises(UserError, match="--teacher-output must be one of auto, logits, probab"):
        distilled(teacher, tmp_path / "other", teacher_output="softmax")


class TwoHeads(Network):
    """An answer of five classes and one of three."""

    def __init__(self) -> None:
        super().__init__(5, None)
        self.other = nn.Linear(5, 3)

    def forward(self, x):
        z = self.z(x)
        return {"classes": {"kind": z, "colour": self.other(z.detach())}}


def test_the_output_that_is_chosen_belongs_to_the_run(tmp_path):
    teacher = TwoHeads().eval()
    images = torch.randn(40, *SHAPE)
    labels = teacher(images)["classes"]["kind"].argmax(1)
    with pytest.raises(UserError, match="classes/kind .* and classes/colour .*: choose one with"):
        distilled(teacher, tmp_path / "refused")
    chosen = {"teacher_output_name": "classes/kind", "eval_loader": [(images, labels)]}
    result = distilled(teacher, tmp_path / "run", **chosen)
    assert (result.summary["num_classes"], result.summary["teacher_accuracy"]) == (5, 1.0)
    assert result.summary["convention"]["output_name"] == "kind"
    export_student(result, tmp_path / "s.onnx")
    assert run_onnx(tmp_path / "s.onnx", images[:2].numpy())[1] == "kind"
    again = {**TINY, "resume": tmp_path / "run", "image_shape": SHAPE, "progress": "off"}
    result = distill(teacher, student(5), **again, **chosen, steps=4)
    assert (result.summary["steps"], result.summary["teacher_accuracy"]) == (4, 1.0)
    with pytest.raises(UserError, match="--teacher-output-name cannot change when resuming"):
        distill(teacher, student(5), **again, steps=6, teacher_output_name="colour")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flags", [["--num-classes", "3"], ["--teacher-output-name", "colour"]])
def test_the_output_that_is_chosen_on_a_command_line(flags, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx2torch")
    torch.onnx.export(
        TwoHeads().eval(), (torch.randn(2, *SHAPE),), tmp_path / "t.onnx", dynamo=False,
        input_names=["x"], output_names=["kind", "colour"], dynamic_axes={"x": {0: "N"}},
    )  # fmt: skip
    arguments = [
        "--teacher", str(tmp_path / "t.onnx"), "--student", "ResNet8Slim", "--steps", "1",
        "--device", "cpu", "--batch-size", "8", "--student-batch-size", "8", "--bank-images", "16",
        "--generator-width", "8", "--dead-leaves", "0", "--out-dir", str(tmp_path / "run"), *flags,
    ]  # fmt: skip
    config = training.parse(arguments)
    summary = train(config, progress="off")
    assert summary["num_classes"] == 3
    assert summary["convention"]["output_name"] == "colour"


# -- evaluation ------------------------------------------------------------------------------------


class AsIs(nn.Module):
    """A function of images."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(12, 3), function

    def forward(self, x):
        return self.function(self.layer(x.mean(3).flatten(1)[:, :12]))


def test_evaluation_reads_any_answer(tmp_path, monkeypatch, capsys):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (50, 8, 8, 3), np.uint8)
    labels = draw.integers(0, 2, 50)
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    monkeypatch.setattr(evaluation, "latency", lambda network, batch: 1.0)
    functions = {
        "dict": lambda z: {"probs": z[:, :2].softmax(1)},
        "one": lambda z: torch.sigmoid(z[:, 1] - z[:, 0]),
        "logit": lambda z: z[:, 1:2] - z[:, :1],
        "two": lambda z: (z, z[:, :2] * 2),
    }
    torch.manual_seed(0)
    weights = nn.Linear(12, 3).state_dict()
    files = {}
    for name, function in functions.items():
        model = AsIs(function).eval()
        model.layer.load_state_dict(weights)
        with torch.no_grad():
            model.layer.weight *= 3
        program = torch.export.export(
            model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("N")},)
        )
        files[name] = str(tmp_path / f"{name}.pt2")
        torch.export.save(program, files[name])
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        z = model.layer(x.mean(3).flatten(1)[:, :12])[:, :2]
    accuracy = (z.argmax(1).numpy() == labels).mean()
    assert 0 < accuracy < 1
    for model, teacher in (("dict", "one"), ("one", "logit"), ("logit", "dict"),
                           ("two", "one")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [
            "evaluate", files[model], "--teacher", files[teacher], "--data",
            str(tmp_path / "d.npz"), "--normalise", "0..1", "--json", "--device", "cpu",
        ])  # fmt: skip
        assert evaluation.main() == 0, capsys.readouterr().err
        result = json.loads(capsys.readouterr().out)
        assert result["model"]["accuracy"] == pytest.approx(accuracy)
        assert result["teacher"]["accuracy"] == pytest.approx(accuracy)
        assert result["agreement"] == 1

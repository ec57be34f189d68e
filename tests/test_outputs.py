"""What a teacher returns: found out, turned into the logits that it was made of, given back."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dafl_fast import FrozenTeacher
from dafl_fast.config import Config
from dafl_fast.convention import Convention, as_answers
from dafl_fast.engine.outputs import (
    Reading,
    as_classifier,
    convention_of,
    reading_of,
)
from dafl_fast.engine.prepare import freeze, prepare
from dafl_fast.errors import UserError
from dafl_fast.networks import from_export, load_network, outputs_of
from dafl_fast.recipes import make_config

SHAPE = (2, 8, 8)
TINY = {"batch_size": 16, "generator_width": 8, "student_batch_size": 16, "student_updates": 2,
        "bank_images": 64, "log_every": 5, "precision": "fp32", "latent_dim": 10}  # fmt: skip

# For each kind: the number of outputs, what the network makes of them, and the same as a layer.
KINDS = {
    "logits": (5, lambda z: z, None),
    "probabilities": (5, lambda z: z.softmax(1), nn.Softmax(1)),
    "log-probabilities": (5, lambda z: F.log_softmax(z, 1), nn.LogSoftmax(1)),
    "sigmoids": (5, torch.sigmoid, nn.Sigmoid()),
    "binary-logit": (1, lambda z: z, None),
    "binary-probability": (1, lambda z: z.sigmoid(), nn.Sigmoid()),
}
SQUASHED = [kind for kind in KINDS if KINDS[kind][2] is not None]


class Network(nn.Module):
    """Returns `end` of its logits `z`."""

    def __init__(self, outputs: int, end, bias: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(24, outputs)
        self.end = end
        self.norm.running_mean.normal_(0, 0.3)
        self.norm.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            self.head.weight *= scale
            self.head.bias += bias

    def z(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.norm(self.conv(x)).tanh(), 2)
        return self.head(x.flatten(1))

    def forward(self, x: Tensor):
        return self.end(self.z(x))


class Untraceable(Network):
    def forward(self, x: Tensor):
        return self.end(self.z(x if x.abs().max() < 1e6 else -x))


def network(kind: str, way: str = "function", dtype=torch.float32, scale: float = 4.0) -> Network:
    """A teacher of this kind; its sigmoids are seldom above one half together."""
    torch.manual_seed(1)
    outputs, function, layer = KINDS[kind]
    end = copy.deepcopy(layer) if way == "layer" and layer is not None else function
    made = (Untraceable if way == "untraceable" else Network)(
        outputs, end, bias=-3.0 if kind == "sigmoids" else 0.0, scale=scale
    )
    return made.to(dtype).eval()


def as_given(teacher: Network, way: str) -> nn.Module:
    images = torch.randn(3, *SHAPE, dtype=teacher.head.weight.dtype)
    if way == "program":
        open_batch = ({0: torch.export.Dim("N")},)
        return from_export(torch.export.export(teacher, (images,), dynamic_shapes=open_batch))
    if way == "torchscript":
        return torch.jit.trace(teacher, images)
    return teacher


def images_for(dtype=torch.float32, count: int = 16) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(count, *SHAPE, generator=draw, dtype=torch.float64).to(dtype)


def true_logits(teacher: Network, images: Tensor) -> Tensor:
    z = teacher.z(images)
    return torch.cat([torch.zeros_like(z), z], 1) if z.shape[1] == 1 else z


def gradient(logits: Tensor, images: Tensor) -> Tensor:
    """Of something that does not see a number that is added to all logits, as the losses."""
    weights = torch.linspace(-1, 2, logits.shape[1]).to(logits.dtype).square()
    loss = (logits.log_softmax(1) * weights).sum() + logits.softmax(1).square().sum()
    return torch.autograd.grad(loss, images)[0]


# -- every kind, however it is computed ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["layer", "function", "untraceable", "program", "torchscript"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_and_their_gradient_are_those_inside(kind, way, dtype):
    teacher, images = network(kind, way, dtype), images_for(dtype)
    given = as_given(teacher, way)
    reading = reading_of(given, images)
    assert (reading.kind, reading.path) == (kind, ())
    assert reading.classes == (2 if kind.startswith("binary") else 5)
    frozen = FrozenTeacher(given, None if way == "torchscript" else "head", reading=reading)
    hidden = way in ("untraceable", "torchscript")
    assert (frozen.read_as.kind == kind) == (hidden or kind not in SQUASHED)
    mine, theirs = (images[:7].clone().requires_grad_() for _ in range(2))
    logits, features = frozen(mine)
    expected = true_logits(teacher, theirs)
    assert logits.shape == expected.shape
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(logits.log_softmax(1), expected.log_softmax(1), atol=tolerance,
                               rtol=tolerance)  # fmt: skip
    wanted = gradient(expected, theirs)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(gradient(logits, mine), wanted, rtol=0,
                               atol=tolerance * wanted.abs().max().item())  # fmt: skip
    if way != "torchscript":
        hooked = F.adaptive_avg_pool2d(teacher.norm(teacher.conv(theirs)).tanh(), 2).flatten(1)
        torch.testing.assert_close(features, hooked, rtol=1e-4, atol=1e-5)
    assert frozen.check(images) == reading.classes
    torch.testing.assert_close(as_classifier(given, reading)(images).log_softmax(1),
                               true_logits(teacher, images).log_softmax(1),
                               atol=tolerance, rtol=tolerance)  # fmt: skip


@pytest.mark.parametrize("way", ["layer", "function", "untraceable"])
@pytest.mark.parametrize("kind", SQUASHED)
def test_saturated_outputs_leave_everything_finite(kind, way):
    teacher, images = network(kind, way, scale=3e4), images_for()
    reading = reading_of(teacher, images, kind)
    frozen = FrozenTeacher(teacher, reading=reading)
    x = images.clone().requires_grad_()
    logits, _ = frozen(x)
    assert frozen.reading.numbers(teacher(images)).max() <= 1
    assert logits.isfinite().all() and gradient(logits, x).isfinite().all()
    if kind != "sigmoids" or way != "untraceable":  # of those several are then equally large
        assert torch.equal(logits.argmax(1), true_logits(teacher, images).argmax(1))


def test_a_probability_down_to_the_floor_gives_its_logit_and_gradient():
    """Far below what differs from zero beside 1."""
    z = torch.tensor([[0.0, -20.0, -60.0, -80.0]], requires_grad=True)
    logits = Reading("probabilities", shape=(4,)).logits(z.softmax(1))
    torch.testing.assert_close(logits[0, :3], z[0, :3].detach(), rtol=1e-5, atol=1e-5)
    assert logits[0, 3].item() == pytest.approx(-69.08, abs=0.01)  # log 1e-30
    for index, own in ((1, 1.0), (2, 1.0), (3, 0.0)):
        (got,) = torch.autograd.grad(logits[0, index], z, retain_graph=True)
        assert got[0, index].item() == pytest.approx(own)


def test_a_sigmoid_that_rounds_to_one_gives_a_finite_logit():
    z = torch.tensor([[-80.0, -30.0, 0.0, 12.0, 40.0]], requires_grad=True)
    logits = Reading("sigmoids", shape=(5,)).logits(z.sigmoid())
    torch.testing.assert_close(logits[0, 1:4], z[0, 1:4].detach(), rtol=0, atol=0.01)
    assert logits[0, 4].item() == pytest.approx(16.64, abs=0.01)  # log of 2^24 - 1
    (got,) = torch.autograd.grad(logits.sum(), z)
    torch.testing.assert_close(got[0], torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]), atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["function", "untraceable"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision(kind, way, dtype):
    teacher, images = network(kind, way, scale=2.0), images_for()
    expected = true_logits(teacher, images).log_softmax(1)
    low = copy.deepcopy(teacher).to(dtype)
    for given, x, cast in ((low, images.to(dtype), False), (teacher, images, True)):
        reading = reading_of(given, x)
        assert reading.kind == kind
        frozen = FrozenTeacher(given, reading=reading)
        if cast:
            frozen.cast(dtype)
        x = x.clone().requires_grad_()
        logits, _ = frozen(x)
        coarse = 0.3 if kind in ("sigmoids", "binary-probability") else 0.1
        difference = (logits.float().log_softmax(1) - expected).abs().max().item()
        assert difference < coarse
        assert gradient(logits.float(), x).isfinite().all()


def test_a_training_in_bf16_keeps_what_needs_it_in_fp32():
    """A sigmoid above 0.998 is 1 in bf16."""
    for way, kept in (("function", False), ("untraceable", True)):
        teacher = network("binary-probability", way)
        settings = {**TINY, "precision": "bf16"}
        config = make_config("custom", image_shape=(2, 8, 8), steps=1, **settings)
        student = nn.Sequential(nn.Flatten(), nn.Linear(128, 2))
        step = prepare(config, teacher, student, torch.device("cpu"), "bf16")
        assert step.teacher.network.enabled is not kept
        logits, _ = step.teacher(images_for())
        close = (logits - true_logits(teacher, images_for())).abs().max()
        assert close < (1e-4 if kept else 0.2)


# -- what is taken off -----------------------------------------------------------------------------


class Attentive(nn.Module):
    """One softmax layer, for attention and at the end."""

    def __init__(self, own_end: bool) -> None:
        super().__init__()
        self.soft, self.head = nn.Softmax(-1), nn.Linear(8, 4)
        self.end = nn.Softmax(1) if own_end else None

    def z(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)  # [N, 16, 8]
        return self.head((self.soft(x @ x.transpose(1, 2)) @ x).mean(1)) * 5

    def forward(self, x: Tensor) -> Tensor:
        return self.soft(self.z(x)) if self.end is None else self.end(self.z(x))


@pytest.mark.parametrize("own_end", [True, False])
def test_a_softmax_that_also_serves_attention_stays_there(own_end):
    teacher, images = Attentive(own_end).eval(), images_for()
    frozen = FrozenTeacher(teacher, reading=reading_of(teacher, images))
    assert frozen.read_as.kind == "logits"
    torch.testing.assert_close(frozen.network(images), teacher.z(images))
    assert isinstance(teacher.soft, nn.Softmax)
    torch.testing.assert_close(teacher(images).sum(1), torch.ones(16))


ENDS = {  # what is done to the logits, whether it can be taken off, and the factor on the logits
    "temperature": (lambda z: (3 * z).softmax(1), True, 3),
    "squeezed": (lambda z: z.unsqueeze(2).softmax(1).squeeze(2), True, 1),
    "dtype": (lambda z: F.softmax(z, dim=1, dtype=torch.float32), True, 1),
    "images": (lambda z: z[:, :, None, None].softmax(1), True, 1),
    "by hand": (lambda z: z.exp() / z.exp().sum(1, keepdim=True), False, 1),
    "clamped": (lambda z: z.softmax(1).clamp(1e-7, 1), False, 1),
    "twice": (lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2, False, None),
}


@pytest.mark.parametrize("end", ENDS)
def test_softmax_in_other_words(end):
    function, off, factor = ENDS[end]
    teacher, images = Network(5, function).eval(), images_for()
    reading = reading_of(teacher, images)
    assert reading.kind == "probabilities"
    frozen = FrozenTeacher(teacher, reading=reading)
    assert (frozen.read_as.kind == "logits") == off
    logits = frozen.network(images)
    torch.testing.assert_close(logits.softmax(1), teacher(images).flatten(1))
    if factor:
        expected = (factor * teacher.z(images)).log_softmax(1)
        torch.testing.assert_close(logits.log_softmax(1), expected, rtol=1e-4, atol=1e-4)


def test_fold_false_leaves_the_code_as_it_is():
    """As for all that has to be traced."""
    teacher, images = network("probabilities"), images_for()
    frozen = FrozenTeacher(teacher, fold=False, reading=reading_of(teacher, images))
    assert frozen.read_as.kind == "probabilities"
    torch.testing.assert_close(frozen.network(images), teacher(images).log())


def test_hooks_on_the_last_layer_keep_it():
    teacher, images = network("probabilities", "layer"), images_for()
    teacher.end.register_forward_hook(lambda layer, inputs, output: output.flip(1))
    frozen = FrozenTeacher(teacher, fold=False, reading=reading_of(teacher, images))
    assert isinstance(frozen.network.network.end, nn.Softmax)
    torch.testing.assert_close(frozen.network(images).softmax(1), teacher(images))


def test_a_plain_teacher_is_not_wrapped():
    teacher, images = network("logits"), images_for()
    reading = reading_of(teacher, images)
    assert reading.plain and as_classifier(teacher, reading) is teacher
    frozen, before = FrozenTeacher(teacher, reading=reading), FrozenTeacher(teacher)
    assert str(frozen.network) == str(before.network)
    assert torch.equal(frozen.network(images), before.network(images))
    assert frozen.fingerprint() == before.fingerprint()
    assert frozen.reading.seen == frozen.read_as.seen == ()
    assert torch.equal(images, images_for())


def test_looking_leaves_the_network_as_it_is():
    teacher = network("probabilities", "layer").train()
    teacher.conv.eval()
    state = copy.deepcopy(teacher.state_dict())
    reading_of(teacher, images_for())
    assert teacher.training and teacher.norm.training and not teacher.conv.training
    assert all(torch.equal(a, state[name]) for name, a in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    FrozenTeacher(teacher, reading=reading_of(teacher, images_for()))
    assert isinstance(teacher.end, nn.Softmax)


def test_batch_norm_folds_into_what_is_left(caplog):
    teacher, images = network("probabilities"), images_for()
    frozen = freeze(teacher, Config(image_shape=(2, 8, 8), steps=1), images)
    assert frozen.folded
    assert "not folded" not in caplog.text
    torch.testing.assert_close(frozen.network(images), teacher.z(images), rtol=1e-4, atol=1e-5)
    assert caplog.text.count("the teacher returns probabilities of 5 classes; its last layer is "
                             "taken off; if they are something else, name it with "
                             "--teacher-output") == 1  # fmt: skip


@pytest.mark.parametrize("way", ["function", "untraceable"])
def test_batch_norm_statistics_are_watched_beside(way):
    teacher, images = network("binary-probability", way), images_for()
    frozen = FrozenTeacher(teacher, watch=True, reading=reading_of(teacher, images))
    assert frozen.check(images) == 2 and frozen.watching
    assert len(frozen._statistics) == 1


@pytest.mark.parametrize("way", ["function", "untraceable"])
def test_it_compiles_whole(way):
    teacher, images = network("binary-probability"), images_for()
    teacher.end = (lambda z: {"p": z.sigmoid()}) if way == "function" else (
        lambda z: {"p": 1 / (1 + torch.exp(-z))}
    )  # fmt: skip
    reading = reading_of(teacher, images)
    frozen, compiled = (FrozenTeacher(teacher, reading=reading) for _ in range(2))
    compiled.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), frozen(images))


# -- structures ------------------------------------------------------------------------------------


@dataclass
class Answer:
    features: Tensor
    logits: Tensor
    loss: Tensor | None = None


class Named(NamedTuple):
    features: Tensor
    scores: Tensor


class ModelOutput(OrderedDict):
    """As transformers has it: also with attributes."""

    def __getattr__(self, name):
        return self[name]


def rest(z: Tensor) -> Tensor:
    return torch.stack([z.flatten(1).mean(1), z.flatten(1).amax(1)], 1)


STRUCTURES = {
    "dict": (lambda z: {"features": rest(z), "logits": z}, ("logits",)),
    "dict of one": (lambda z: {"anything": z}, ("anything",)),
    "dict of others": (lambda z: {"classes": z.argmax(1), "loss": z.mean(), "y": z}, ("y",)),
    "embedding first": (lambda z: {"embedding": rest(z), "head": z}, ("head",)),
    "nested": (lambda z: ({"aux_logits": rest(z), "out": z}, rest(z)), (0, "out")),
    "tuple": (lambda z: (z, rest(z)), (0,)),
    "list": (lambda z: [z.mean(), z], (1,)),
    "uncertainty": (lambda z: (z.amax(1), z), (1,)),
    "dataclass": (lambda z: Answer(rest(z), z), ("logits",)),
    "NamedTuple": (lambda z: Named(rest(z), z), ("scores",)),
    "ModelOutput": (lambda z: ModelOutput(hidden=(rest(z),), logits=z), ("logits",)),
    "numbered": (lambda z: {"other": rest(z), "output_1": z}, ("output_1",)),
}


@pytest.mark.parametrize("squash", [None, nn.Softmax(1)])
@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name, squash):
    pack, path = STRUCTURES[name]
    function = squash or (lambda z: z)
    teacher, images = Network(5, lambda z: pack(function(z))).eval(), images_for()
    reading = reading_of(teacher, images)
    assert (reading.path, reading.shape) == (path, (5,))
    assert reading.kind == ("logits" if squash is None else "probabilities")
    frozen = FrozenTeacher(teacher, reading=reading)
    assert frozen.check(images) == 5
    logits = frozen(images)[0].log_softmax(1)
    torch.testing.assert_close(logits, teacher.z(images).log_softmax(1), rtol=1e-4, atol=1e-4)
    last = path[-1]
    named = convention_of(teacher, reading, SHAPE).output_name
    assert named == (last if isinstance(last, str) else "out" if name == "nested" else reading.kind)


def test_a_transformers_output():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=2, embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3,
        layer_type="basic",
    )  # fmt: skip
    teacher = transformers.ResNetForImageClassification(config).eval()
    images = torch.randn(4, 2, 32, 32)
    reading = reading_of(teacher, images)
    assert (reading.kind, reading.path, reading.classes) == ("logits", ("logits",), 3)
    torch.testing.assert_close(as_classifier(teacher, reading)(images), teacher(images).logits)


def test_a_program_that_returns_a_dict():
    teacher = Network(5, lambda z: {"features": rest(z), "probs": z.softmax(1)}).eval()
    program, images = as_given(teacher, "program"), images_for()
    reading = reading_of(program, images)
    assert (reading.kind, reading.path) == ("probabilities", ("probs",))
    frozen = FrozenTeacher(program, reading=reading)
    assert frozen.read_as.kind == "logits"
    torch.testing.assert_close(frozen.network(images), teacher.z(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("kind", SQUASHED)
def test_the_end_of_an_onnx_file_is_taken_off(kind, opset, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx2torch")
    teacher, images = network(kind), images_for()
    torch.onnx.export(
        teacher, (images,), tmp_path / "t.onnx", dynamo=False, opset_version=opset,
        input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "N"}},
    )  # fmt: skip
    program = load_network(tmp_path / "t.onnx", role="teacher")
    reading = reading_of(program, images)
    frozen = FrozenTeacher(program, reading=reading)
    assert reading.kind == kind
    assert frozen.read_as.kind == ("binary-logit" if kind.startswith("binary") else "logits")
    torch.testing.assert_close(frozen.network(images).log_softmax(1),
                               true_logits(teacher, images).log_softmax(1))  # fmt: skip
    convention = convention_of(program, reading, SHAPE)
    assert (convention.input_name, convention.output_name) == ("x", "y")


class Embedding(Network):
    """Ten classes from an embedding of eight numbers, and what `end` makes of both."""

    def __init__(self, end) -> None:
        super().__init__(8, end, scale=4.0)
        self.classifier, self.other = nn.Linear(8, 10), nn.Linear(8, 10)

    def forward(self, x: Tensor):
        h = self.z(x).relu()
        return self.end(h, self.classifier(h), self.other(h))


EMBEDDINGS = {
    "class_logits": (lambda h, z, o: {"emb": h, "class_logits": z}, ("class_logits",)),
    "y": (lambda h, z, o: {"feat": h, "y": z}, ("y",)),
    "y_hat": (lambda h, z, o: {"x": h, "y_hat": z}, ("y_hat",)),
    "main": (lambda h, z, o: {"repr": h, "main": z}, ("main",)),
    "head": (lambda h, z, o: {"backbone": h, "head": z}, ("head",)),
    "classLogits": (lambda h, z, o: {"out": h, "classLogits": z}, ("classLogits",)),
    "tuple": (lambda h, z, o: (h, z), (1,)),
    "out": (lambda h, z, o: {"out": h, "z": z}, ("z",)),
    "normalised": (lambda h, z, o: (F.normalize(h), h, z), (2,)),
    "normalised alone": (lambda h, z, o: (F.normalize(h), z), (1,)),
    "another relu": (lambda h, z, o: (z, (h - 1).relu()), (0,)),
    "token": (lambda h, z, o: {"cls_token_logits": z, "final_norm": F.normalize(h)},
              ("cls_token_logits",)),
    "stages": (lambda h, z, o: {"stages": [h, h + 1], "classifier": z}, ("classifier",)),
    "probabilities too": (lambda h, z, o: (z, z.softmax(1), h), (0,)),
    "auxiliary": (lambda h, z, o: {"aux_logits": o, "main_logits": z}, ("main_logits",)),
}  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_embedding_is_not_taken_for_the_classes(name, frozen):
    """By the parts of names, or by the layer that makes classes of it."""
    pack, path = EMBEDDINGS[name]
    teacher, images = Embedding(pack).eval().requires_grad_(not frozen), images_for()
    reading = reading_of(teacher, images)
    assert (reading.path, reading.classes) == (path, 10)
    expected = teacher.classifier(teacher.z(images).relu())
    torch.testing.assert_close(as_classifier(teacher, reading)(images), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_it_is_found_in_torchscript_however_often_that_ran():
    images = images_for()
    program = torch.jit.trace(Embedding(EMBEDDINGS["tuple"][0]).eval(), images)
    assert {reading_of(program, images).path for _ in range(4)} == {(1,)}


def test_of_tensors_that_could_all_be_meant_it_takes_the_first_and_says_so():
    teacher, images = Embedding(lambda h, z, o: (z, o)).eval(), images_for()
    reading = reading_of(teacher, images)
    assert reading.path == (0,)
    assert reading.describe(reading) == (
        "the teacher returns logits of 10 classes, as item 0 of its answer; item 1 [N, 10] could "
        "be meant too: --teacher-output-name chooses another"
    )
    teacher.end = lambda h, z, o: {"emb": h, "logits": z}
    reading = reading_of(teacher, images)
    assert reading.describe(reading) == (
        "the teacher returns logits of 10 classes, as logits of its answer; --teacher-output-name "
        "chooses another: emb [N, 8]"
    )


def test_tensors_of_several_widths_that_could_all_be_meant_are_refused():
    teacher, images = Embedding(lambda h, z, o: {"a": z, "b": [o[:, :7]]}).eval(), images_for()
    with pytest.raises(UserError) as raised:
        reading_of(teacher, images)
    assert str(raised.value) == (
        "the teacher returns several tensors that could be its answer, a [N, 10] and b/0 [N, 7]: "
        "choose one with --teacher-output-name, or by --num-classes"
    )
    assert reading_of(teacher, images, classes=7).path == ("b", 0)
    assert reading_of(teacher, images, classes=10).path == ("a",)
    with pytest.raises(UserError, match="several tensors"):
        reading_of(teacher, images, classes=3)


@pytest.mark.parametrize("wide", [12, 3])
def test_what_is_made_of_logits_is_not_taken_for_them(wide):
    """By a decoder, as of a capsule network, or a coarser head."""
    images, further = images_for(), nn.Linear(10, wide)
    teacher = Embedding(lambda h, z, o: (z, further(z).relu())).eval()
    assert reading_of(teacher, images, classes=10).path == (0,)
    with pytest.raises(UserError, match=r"item 0 \[N, 10\] and item 1 .*, or by --num-classes$"):
        reading_of(teacher, images)
    teacher.end = lambda h, z, o: {"fine": z, "coarse": further(z)}
    assert reading_of(teacher, images, name="fine").classes == 10
    same = nn.Linear(10, 10)
    teacher.end = lambda h, z, o: (z, same(z))
    assert reading_of(teacher, images).path == (0,)


@pytest.mark.parametrize(
    ("name", "path"), [("1", (1,)), ("2/heads/main", (2, "heads", "main")),
                       ("heads/main", (2, "heads", "main")), ("main", (2, "heads", "main"))],
)  # fmt: skip
def test_an_output_is_chosen_by_its_name(name, path, caplog):
    teacher = Embedding(lambda h, z, o: (z, h, {"heads": {"main": o, "b": z}})).eval()
    config = Config(image_shape=(2, 8, 8), steps=1, teacher_output_name=name)
    frozen = freeze(teacher, config, images_for())
    assert frozen.reading.path == path
    assert "--teacher-output-name" not in caplog.text
    expected = teacher.z(images_for()).relu()
    expected = expected if path == (1,) else teacher.other(expected)
    torch.testing.assert_close(frozen.network(images_for()), expected, rtol=1e-4, atol=1e-4)


def test_a_name_must_be_that_of_an_output():
    teacher, images = Embedding(lambda h, z, o: {"a": z, "b": (h, o)}).eval(), images_for()
    with pytest.raises(UserError) as raised:
        reading_of(teacher, images, name="c")
    assert str(raised.value) == "--teacher-output-name must be one of a, b/0, b/1, got 'c'"
    teacher.end = lambda h, z, o: z
    with pytest.raises(UserError, match="must be left out where one tensor is returned, got '0'"):
        reading_of(teacher, images, name="0")
    teacher.convention = Convention(output_name="y")  # as of an ONNX file with one output
    assert reading_of(teacher, images, name="y").path == ()


def test_the_kind_that_is_wanted_chooses_among_outputs():
    teacher = Embedding(lambda h, z, o: {"pred": h, "p": z[:, :1].sigmoid()}).eval()
    assert reading_of(teacher, images_for()).path == ("pred",)
    assert reading_of(teacher, images_for(), "binary-probability").path == ("p",)


SHAPES = {
    "[N, 1]": (1, lambda z: z, (1,)),
    "[N]": (1, lambda z: z.squeeze(1), ()),
    "[N, 1, 1, 1]": (1, lambda z: z[:, :, None, None], (1, 1, 1)),
    "[N, C]": (5, lambda z: z, (5,)),
    "[N, C, 1, 1]": (5, lambda z: z[:, :, None, None], (5, 1, 1)),
    "[N, 1, C]": (5, lambda z: z[:, None], (1, 5)),
}


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_the_way_back(name, squash):
    outputs, form, shape = SHAPES[name]
    function = (lambda z: z.sigmoid() if outputs == 1 else z.softmax(1)) if squash else lambda z: z
    teacher, images = Network(outputs, lambda z: form(function(z)), scale=3.0).eval(), images_for()
    reading = reading_of(teacher, images)
    assert reading.shape == shape
    frozen = FrozenTeacher(teacher, reading=reading)
    logits = frozen.network(images)
    assert logits.shape == (16, max(2, outputs))
    expected = true_logits(teacher, images).log_softmax(1)
    torch.testing.assert_close(logits.log_softmax(1), expected, rtol=1e-4, atol=1e-4)
    convention = convention_of(teacher, reading, SHAPE)
    assert Convention.from_json(convention.as_json()) == convention
    back = as_answers(logits, reading.kind, convention.answer_shape)
    torch.testing.assert_close(back, teacher(images), rtol=1e-4, atol=1e-4)


# -- kinds that look alike, and what the user says -------------------------------------------------


def test_logits_between_0_and_1_stay_logits(caplog):
    """Without a sigmoid in sight, as before."""
    teacher = Network(5, lambda z: z.tanh().square()).eval()
    reading = reading_of(teacher, images_for())
    assert reading.kind == "logits" and reading.plain
    freeze(teacher, Config(image_shape=(2, 8, 8), steps=1), images_for())
    assert "they all lie between 0 and 1, as those of a sigmoid" in caplog.text
    caplog.clear()
    config = Config(image_shape=(2, 8, 8), steps=1, teacher_output="sigmoids")
    frozen = freeze(teacher, config, images_for())
    assert frozen.read_as.kind == "sigmoids"
    torch.testing.assert_close(frozen.network(images_for()).sigmoid(), teacher(images_for()))


@pytest.mark.parametrize("way", ["function", "program", "torchscript"])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_comes_straight_from_a_layer_is_logits(way):
    """Even if it lies between 0 and 1, or adds up to 1."""
    images = images_for()
    one = as_given(Network(1, lambda z: z, bias=0.5, scale=0.01).eval(), way)
    assert reading_of(one, images).kind == "binary-logit"
    several = Network(4, lambda z: z, scale=0.0).eval()
    nn.init.constant_(several.head.bias, 0.25)
    reading = reading_of(as_given(several, way), images)
    assert (reading.kind, reading.doubts) == ("logits", ())
    several.end = lambda z: z.relu()  # as before
    assert reading_of(several, images).kind == "probabilities"


def test_a_plain_teacher_is_not_worth_a_warning(caplog):
    with caplog.at_level(logging.INFO):
        freeze(network("logits"), Config(image_shape=(2, 8, 8), steps=1), images_for())
    (record,) = [r for r in caplog.records if "the teacher returns" in r.message]
    assert (record.levelno, record.message) == (
        logging.INFO, "the teacher returns logits of 5 classes"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "wanted", "sentence"),
    [
        ("logits", "probabilities", "probabilities, .* that are not negative and add up to 1"),
        ("logits", "log-probabilities", "log-probabilities, .* exponentials add up to 1"),
        ("logits", "sigmoids", "sigmoids, .* all between 0 and 1, but the teacher returns 5"),
        ("logits", "binary-logit", "binary-logit, which are one number"),
        ("probabilities", "binary-probability", "but the teacher returns 5 for each image"),
        ("probabilities", "log-probabilities", "exponentials add up to 1"),
        ("sigmoids", "probabilities", "add up to 1"),
        ("binary-logit", "logits", "several numbers for each image, but the teacher returns 1"),
        ("binary-logit", "binary-probability", "one number for each image, between 0 and 1"),
    ],
)
def test_what_is_wanted_must_be_possible(teacher, wanted, sentence):
    with pytest.raises(UserError, match=f"^--teacher-output says .*{sentence}"):
        reading_of(network(teacher), images_for(), wanted)


@pytest.mark.parametrize(
    ("teacher", "wanted"),
    [("probabilities", "logits"), ("probabilities", "sigmoids"), ("sigmoids", "logits"),
     ("log-probabilities", "logits"), ("binary-probability", "binary-logit")],
)  # fmt: skip
def test_what_is_wanted_is_what_it_is(teacher, wanted):
    made, images = network(teacher), images_for()
    reading = reading_of(made, images, wanted)
    assert reading.kind == wanted
    frozen = FrozenTeacher(made, reading=reading)
    numbers = reading.repeated(frozen.network(images))
    torch.testing.assert_close(numbers, made(images), rtol=1e-4, atol=1e-5)


def test_labels_that_do_not_exclude_each_other_are_refused():
    teacher, images = Network(5, torch.sigmoid, bias=2.0).eval(), images_for()
    config = Config(image_shape=(2, 8, 8), steps=1)
    with pytest.raises(UserError, match="do not exclude each other, which cannot be distilled"):
        freeze(teacher, config, images)
    frozen = freeze(teacher, Config(**{**vars(config), "teacher_output": "sigmoids"}), images)
    torch.testing.assert_close(frozen.network(images), teacher.z(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("end", "got"),
    [
        (lambda z: z.argmax(1), r"\[4\] of torch.int64"),
        (lambda z: z[:, :, None].repeat(1, 1, 3), r"\[4, 5, 3\] of torch.float32"),
        (lambda z: z.mean(), r"\[\] of torch.float32"),
        (lambda z: "cat", "str"),
        (lambda z: {"logits": z[:1]}, "dict"),
        (lambda z: SimpleNamespace(logits=z), "SimpleNamespace"),
    ],
)
def test_what_has_no_numbers_for_each_image_is_refused(end, got):
    with pytest.raises(UserError, match=rf"must return logits \[N, C\], got {got} for 4 images; "):
        reading_of(Network(5, end).eval(), images_for(count=4))


def test_the_number_of_classes_is_that_of_the_kind():
    assert outputs_of(network("binary-probability"), SHAPE) == 2
    assert outputs_of(network("sigmoids"), SHAPE) == 5
    with pytest.raises(UserError, match="--teacher-output says sigmoids"):
        outputs_of(network("logits"), SHAPE, "sigmoids")

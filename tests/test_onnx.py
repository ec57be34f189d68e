"""ONNX files as teachers: networks of PyTorch's layers that answer as onnxruntime does."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision import models

from dafl_fast.engine.fold import fold_batch_norm
from dafl_fast.engine.outputs import convention_of, reading_of
from dafl_fast.engine.teacher import FrozenTeacher
from dafl_fast.errors import UserError
from dafl_fast.models.winograd import becomes_faster
from dafl_fast.networks import load_network, onnx_file

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx2torch")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

ARCHITECTURES = {
    "ResNet": (lambda: models.resnet18(num_classes=10), 32),
    "MobileNetV3": (lambda: models.mobilenet_v3_small(num_classes=10), 32),
    "EfficientNet": (lambda: models.efficientnet_b0(num_classes=10), 32),
    "VGG": (lambda: nn.Sequential(models.vgg11_bn().features[:15], nn.Flatten(),
                                  nn.Linear(256 * 16, 10)), 32),
    "ViT": (lambda: models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), 32),
    "timm's ViT": (lambda: timm.create_model("test_vit", num_classes=10, img_size=32), 32),
    "ConvNeXt": (lambda: timm.create_model("test_convnext", num_classes=10), 32),
    "DenseNet": (lambda: models.DenseNet(8, (2, 2), 16, num_classes=10), 32),
    "ShuffleNet": (lambda: models.shufflenet_v2_x0_5(num_classes=10), 32),
    "RegNet": (lambda: models.regnet_y_400mf(num_classes=10), 32),
}  # fmt: skip


def stirred(network):
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1), layer.running_var.uniform_(0.5, 1.5)
    return network.eval()


def runs(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


# One exporter is slow.
@pytest.mark.parametrize(
    ("name", "exporter"),
    [(name, "script") for name in ARCHITECTURES]
    + [(name, "dynamo") for name in ("ResNet", "ViT", "ConvNeXt")],
)
@pytest.mark.filterwarnings("ignore")
def test_architectures(name, exporter, tmp_path, caplog):
    make, size = ARCHITECTURES[name]
    network, path = stirred(make()), tmp_path / "teacher.onnx"
    images = torch.randn(2, 3, size, size)
    if exporter == "dynamo":
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(network, (images,), path, dynamo=True, verbose=False,
                          external_data=False, dynamic_shapes=shapes)  # fmt: skip
    else:
        torch.onnx.export(network, (images,), path, dynamo=False, input_names=["a.b/c:0"],
                          dynamic_axes={"a.b/c:0": {0: "?"}})  # fmt: skip
    caplog.set_level(logging.WARNING)
    teacher = load_network(path, role="teacher")
    for count in (1, 3, 7):
        images = torch.randn(count, 3, size, size)
        expected = runs(path, images)
        torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-3)
    assert teacher.convention.image_shape == (3, size, size)
    assert re.search(r"on 8 random images its answers differ from onnxruntime's by at most [\d.e-]+"
                     " of the largest", caplog.text)  # fmt: skip
    # Gradients to the images are those of the network that was exported.
    images.requires_grad_()
    grads = [torch.autograd.grad(n(images).square().sum(), images)[0] for n in (teacher, network)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * grads[1].abs().max().item())
    logits, features = FrozenTeacher(teacher)(images)
    assert logits.shape == (7, 10) and features is not None


# -- graphs made by hand ---------------------------------------------------------------------------


def tensor(name: str, *shape: int, seed: int = 0, dtype=np.float32):
    values = np.random.default_rng(seed + len(name)).standard_normal(shape) * 0.3
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def written(
    path: Path, nodes, weights, shape, *, opset=17, dtype=onnx.TensorProto.FLOAT, classes=5,
    outputs=None, inputs=(), properties=None, constants=False,
) -> Path:  # fmt: skip
    """A file with this graph, from "x" to "y"."""
    if constants:
        nodes = [helper.make_node("Constant", [], [w.name], value=w) for w in weights] + nodes
        weights = []
    out = onnx.TensorProto.FLOAT if dtype == onnx.TensorProto.UINT8 else dtype
    outputs = outputs or [helper.make_tensor_value_info("y", out, [shape[0], classes])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", dtype, shape), *inputs], outputs, weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(model, properties or {})
    onnx.save(model, path)
    return path


def plain(opset=17, dtype=np.float32, channels=3, ending="Softmax", size=8):
    """Convolution, BatchNorm, ReLU, mean, flatten by a Reshape for one image, Gemm, softmax."""
    weights = [
        tensor("w", 6, channels, 3, 3, dtype=dtype), tensor("b", 6, dtype=dtype),
        *(tensor(name, 6, dtype=dtype) for name in ("gamma", "beta", "mean")),
        numpy_helper.from_array(np.full(6, 0.7, dtype), "var"),
        tensor("fc", 6, 5, dtype=dtype), tensor("fcb", 5, dtype=dtype),
        numpy_helper.from_array(np.array([1, 6], np.int64), "to"),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Reshape", ["p", "to"], ["f"]),
        helper.make_node("Gemm", ["f", "fc", "fcb"], ["z"]),
        helper.make_node(ending, ["z"], ["y"], **({"axis": 1} if ending == "Softmax" else {})),
    ]
    return nodes, weights


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22])
def test_versions_and_a_batch_of_one(opset, constants, tmp_path):
    nodes, weights = plain()
    path = written(tmp_path / "t.onnx", nodes, weights, [1, 3, 8, 8], opset=opset,
                   constants=constants)  # fmt: skip
    teacher = load_network(path, role="teacher")
    images = torch.randn(5, 3, 8, 8)
    expected = torch.cat([runs(path, image[None]) for image in images])
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)
    assert [type(layer) for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d)] == [
        nn.BatchNorm2d
    ]
    kinds = [type(layer) for layer in teacher.children()]
    assert kinds[-1] is nn.Softmax and nn.Linear in kinds and nn.Conv2d in kinds
    frozen = FrozenTeacher(teacher)
    logits, features = frozen(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert frozen.folded and features.shape == (5, 6)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_precisions(dtype, tmp_path):
    half = dtype == "float16"
    nodes, weights = plain(dtype=np.float16 if half else np.float32)
    if not half:  # onnxruntime has no convolution in float64
        nodes.insert(0, helper.make_node("Cast", ["x"], ["f32"], to=onnx.TensorProto.FLOAT))
        nodes[1].input[0] = "f32"
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.DOUBLE
    out = helper.make_tensor_value_info("y", kind if half else onnx.TensorProto.FLOAT, [1, 5])
    path = written(tmp_path / "t.onnx", nodes, weights, [1, 3, 8, 8], dtype=kind, outputs=[out])
    teacher = load_network(path, role="teacher")
    assert teacher.convention.dtype == dtype
    images = torch.randn(2, 3, 8, 8)
    got = teacher(images)
    assert got.dtype == torch.float32
    expected = torch.cat([runs(path, image[None].to(getattr(torch, dtype))) for image in images])
    tolerance = 1e-2 if half else 1e-5
    torch.testing.assert_close(got, expected.float(), rtol=tolerance, atol=tolerance)


def test_a_graph_for_one_image_that_takes_more(tmp_path):
    """Its batch is open, and its Reshape makes one row of all."""
    nodes, weights = plain()
    path = written(tmp_path / "t.onnx", nodes, weights, ["N", 3, 8, 8])
    with pytest.raises(UserError, match=r"the teacher .*t.onnx cannot be converted|cannot be read"):
        load_network(path, role="teacher")


def test_channels_last_and_whole_numbers(tmp_path):
    """As Keras' exporter writes it: a Transpose first, and biases by themselves."""
    nodes, weights = plain()
    weights[1] = numpy_helper.from_array(numpy_helper.to_array(weights[1]).reshape(1, 6, 1, 1), "b")
    weights[-1] = numpy_helper.from_array(np.array([-1, 6], np.int64), "to")
    weights.append(numpy_helper.from_array(np.float32(255), "scale"))
    nodes[0] = helper.make_node("Conv", ["t", "w"], ["c0"], pads=[1, 1, 1, 1])
    nodes[5] = helper.make_node("MatMul", ["f", "fc"], ["m"])
    nodes = [
        helper.make_node("Cast", ["x"], ["f32"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["f32", "scale"], ["d"]),
        helper.make_node("Transpose", ["d"], ["t"], perm=[0, 3, 1, 2]),
        nodes[0],
        helper.make_node("Add", ["c0", "b"], ["c"]),
        *nodes[1:6],
        helper.make_node("Add", ["m", "fcb"], ["z"]),
        nodes[6],
    ]
    path = written(tmp_path / "t.onnx", nodes, weights, ["unk__123", 8, 12, 3], opset=13,
                   dtype=onnx.TensorProto.UINT8)  # fmt: skip
    teacher = load_network(path, role="teacher")
    convention = teacher.convention
    assert (convention.layout, convention.dtype) == ("NHWC", "uint8")
    assert convention.image_shape == (3, 8, 12)
    images = torch.randint(256, (4, 8, 12, 3), dtype=torch.uint8)
    got = teacher(images.permute(0, 3, 1, 2).float())
    torch.testing.assert_close(got, runs(path, images), rtol=1e-4, atol=1e-5)
    # The biases are in the layers, so that BatchNorm can be folded.
    assert FrozenTeacher(teacher).folded
    linear = next(layer for layer in teacher.modules() if isinstance(layer, nn.Linear))
    np.testing.assert_allclose(linear.bias.detach(), numpy_helper.to_array(weights[7]))


@pytest.mark.parametrize("how", ["SAME_UPPER", "SAME_LOWER"])
def test_padding_that_follows_from_the_size(how, tmp_path):
    nodes, weights = plain()
    nodes[0] = helper.make_node("Conv", ["x", "w", "b"], ["c"], auto_pad=how, strides=[2, 2])
    nodes[2] = helper.make_node("MaxPool", ["n"], ["r"], auto_pad=how, kernel_shape=[2, 3])
    path = written(tmp_path / "t.onnx", nodes, weights, [1, 3, 9, 12])
    images = torch.randn(1, 3, 9, 12)
    got = load_network(path, role="teacher")(images)
    torch.testing.assert_close(got, runs(path, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["{0: 'cat', 1: 'dog', 2: 'a', 3: 'b', 4: 'c'}",
                                  '["cat", "dog", "a", "b", "c"]', "cat,dog,a,b,c",
                                  "cat\ndog\na\nb\nc"])  # fmt: skip
def test_names_of_the_classes(text, tmp_path):
    nodes, weights = plain()
    path = written(tmp_path / "t.onnx", nodes, weights, [1, 3, 8, 8], properties={"names": text})
    assert load_network(path, role="teacher").convention.classes == ("cat", "dog", "a", "b", "c")


class Slices(nn.Module):
    def forward(self, x):
        return x[:, 0, ::2, ::2].flatten(1)[:, :4]


def test_onnx2torch_does_not_warn(tmp_path, recwarn):
    file = tmp_path / "t.onnx"
    torch.onnx.export(Slices(), (torch.randn(1, 1, 8, 8),), file, dynamo=False)
    recwarn.clear()
    load_network(file, role="teacher")(torch.randn(3, 1, 8, 8))
    assert [str(one.message) for one in recwarn] == []


def test_a_renamed_file(tmp_path):
    nodes, weights = plain()
    path = written(tmp_path / "teacher.bin", nodes, weights, [1, 3, 8, 8])
    assert load_network(path, role="teacher").convention.input_name == "x"


def test_any_size(tmp_path, caplog):
    nodes, weights = plain()
    path = written(tmp_path / "t.onnx", nodes, weights, [1, 3, "?", "?"])
    teacher = load_network(path, role="teacher")
    assert teacher.convention.image_shape == (3, 64, 64)
    assert "takes images of any size; --image-shape says which, else it is 3 64 64" in caplog.text
    teacher = load_network(path, role="teacher", channels=3, image_size=(9, 20))
    assert teacher.convention.image_shape == (3, 9, 20)


def test_weights_beside_the_file(tmp_path):
    nodes, weights = plain()
    inside = written(tmp_path / "inside.onnx", nodes, weights, [1, 3, 8, 8])
    model = onnx.load(inside)
    onnx.save(model, tmp_path / "t.onnx", save_as_external_data=True, location="t.bin",
              size_threshold=60)  # fmt: skip
    images = torch.randn(1, 3, 8, 8)
    teacher = load_network(tmp_path / "t.onnx", role="teacher")
    torch.testing.assert_close(teacher(images), runs(inside, images), rtol=1e-4, atol=1e-5)
    (tmp_path / "t.bin").unlink()
    with pytest.raises(UserError, match=r"the teacher file .*t.onnx cannot be read"):
        load_network(tmp_path / "t.onnx", role="teacher")


def test_weights_of_others_are_not_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(np.zeros(1000, np.float32).tobytes())
    nodes, weights = plain()
    for weight in weights[:1]:
        size = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "../secret"), ("offset", "0"), ("length", str(size))):
            weight.external_data.add(key=key, value=value)
    folder = tmp_path / "folder"
    folder.mkdir()
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", 1, [1, 5])], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (folder / "t.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="cannot be read"):
        load_network(folder / "t.onnx", role="teacher")


def test_more_outputs_than_one(tmp_path):
    nodes, weights = plain()
    outputs = [
        helper.make_tensor_value_info("r", 1, [1, 6, 8, 8]),
        helper.make_tensor_value_info("y", 1, [1, 5]),
    ]
    path = written(tmp_path / "t.onnx", nodes, weights, [1, 3, 8, 8], outputs=outputs)
    teacher = load_network(path, role="teacher")
    assert teacher.convention.output_name == "y" and teacher(torch.randn(2, 3, 8, 8)).shape == (
        2,
        5,
    )


def test_the_logits_among_several_outputs(tmp_path):
    nodes, weights = plain()
    nodes[5].output[0] = nodes[6].input[0] = "my_logits"
    nodes.append(helper.make_node("ArgMax", ["my_logits"], ["label"], axis=1, keepdims=0))
    outputs = [
        helper.make_tensor_value_info("label", onnx.TensorProto.INT64, [1]),
        helper.make_tensor_value_info("y", 1, [1, 5]),
        helper.make_tensor_value_info("my_logits", 1, [1, 5]),
    ]
    path = written(tmp_path / "t.onnx", nodes, weights, [1, 3, 8, 8], outputs=outputs)
    teacher = load_network(path, role="teacher")
    images = torch.randn(1, 3, 8, 8)
    answers = teacher(images)
    assert list(answers) == ["y", "my_logits"]
    for name, answer in answers.items():
        wanted = onnxruntime.InferenceSession(str(path)).run([name], {"x": images.numpy()})[0]
        np.testing.assert_allclose(answer.detach(), wanted, rtol=1e-4, atol=1e-5)
    reading = reading_of(teacher, torch.randn(3, 3, 8, 8))
    assert reading.path == ("my_logits",)
    assert convention_of(teacher, reading, (3, 8, 8)).output_name == "my_logits"
    assert reading_of(teacher, torch.randn(3, 3, 8, 8), name="y").kind == "probabilities"


@pytest.mark.parametrize("name", ["my_logits", "output"])
def test_an_output_that_cannot_be_converted_does_not_hide_the_classes(tmp_path, name, caplog):
    nodes, weights = plain()
    nodes[5].output[0] = nodes[6].input[0] = name
    nodes.append(helper.make_node("Det", ["n"], ["d"]))
    outputs = [helper.make_tensor_value_info(name, 1, [1, size])
               for name, size in (("d", 6), (name, 5))]  # fmt: skip
    path = written(tmp_path / "t.onnx", nodes, weights, [1, 3, 8, 8], outputs=outputs)
    teacher = load_network(path, role="teacher")
    assert teacher.convention.output_name == name
    assert "is read without its output d, which cannot be converted" in caplog.text
    images = torch.randn(1, 3, 8, 8)
    wanted = onnxruntime.InferenceSession(str(path)).run([name], {"x": images.numpy()})[0]
    np.testing.assert_allclose(teacher(images).detach(), wanted, rtol=1e-4, atol=1e-5)
    assert reading_of(teacher, torch.randn(3, 3, 8, 8), name=name).path == ()


class Several(nn.Module):
    """Features, an auxiliary head and classes, whose names an export to ONNX loses."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.classes, self.aux = nn.Linear(8, 10), nn.Linear(8, 4)

    def forward(self, x):
        h = self.norm(self.conv(x)).relu().mean((2, 3))
        return {"features": h, "logits": self.classes(h), "aux": self.aux(h).tanh()}


@pytest.mark.filterwarnings("ignore")
def test_an_output_that_others_are_made_from_is_not_the_classes(tmp_path):
    network, path, images = Several().eval(), tmp_path / "t.onnx", torch.randn(4, 3, 8, 8)
    torch.onnx.export(network, (images,), path, dynamo=False, output_names=["m", "l", "t"],
                      dynamic_axes={"x": {0: "N"}}, input_names=["x"])  # fmt: skip
    teacher = load_network(path, role="teacher")
    expected = network(images)
    for settings, name in ((dict(classes=10), "logits"), (dict(name="l"), "logits"),
                           (dict(name="t"), "aux"), (dict(name="m"), "features")):  # fmt: skip
        reading = reading_of(teacher, images, **settings)
        frozen = FrozenTeacher(teacher, reading=reading)
        torch.testing.assert_close(frozen.network(images), expected[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"its answer, l \[N, 10\] and t \[N, 4\]: choose one"):
        reading_of(teacher, images)


class Scalars(nn.Module):
    """One number for each image, or the logits, and always a mean of the batch, which comes first
    or last."""

    def __init__(self, squeezed: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 1))
        self.squeezed = squeezed

    def forward(self, x):
        y = self.layers(x)
        return y.squeeze() if self.squeezed else (x.mean(), y)


@pytest.mark.parametrize("batch", ["open", "one"])
@pytest.mark.parametrize("squeezed", [True, False], ids=["squeezed", "and a mean"])
@pytest.mark.filterwarnings("ignore")
def test_outputs_without_a_dimension(squeezed, batch, tmp_path):
    network, path = Scalars(squeezed).eval(), tmp_path / "t.onnx"
    count = 1 if batch == "one" else 2
    axes = {} if batch == "one" else {"dynamic_axes": {"x": {0: "N"}}}
    torch.onnx.export(network, (torch.randn(count, 3, 8, 8),), path, dynamo=False,
                      input_names=["x"], **axes)  # fmt: skip
    images = torch.randn(4, 3, 8, 8)
    teacher = load_network(path, role="teacher")
    answers = teacher(images).detach().flatten()
    torch.testing.assert_close(answers, network.layers(images).detach().flatten())


def refused(name: str, folder: Path) -> tuple[Path, str]:
    """A file that cannot be a teacher, and what the sentence must say."""
    nodes, weights = plain()
    path = folder / "t.onnx"
    if name == "two inputs":
        other = helper.make_tensor_value_info("mask", 1, [1, 3, 8, 8])
        written(path, nodes, weights, [1, 3, 8, 8], inputs=[other])
        return path, "must take the images and nothing else, it has 2 inputs: x, mask"
    if name == "no images":
        nodes = [helper.make_node("Gemm", ["x", "fc", "fcb"], ["y"])]
        written(path, nodes, weights, [1, 6])
        return path, "in four dimensions, [N, C, H, W] or [N, H, W, C]; its input x has 2"
    if name == "integers":
        nodes.insert(0, helper.make_node("Cast", ["x"], ["f32"], to=1))
        nodes[1].input[0] = "f32"
        written(path, nodes, weights, [1, 3, 8, 8], dtype=onnx.TensorProto.INT64)
        return path, "in floating point or uint8; its input is of int64"
    if name == "quantised":
        zero = numpy_helper.from_array(np.uint8(0), "zero")
        scale = numpy_helper.from_array(np.float32(0.1), "s")
        nodes[0].input[0] = "dq"
        quantise = helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["q"])
        nodes = [quantise, helper.make_node("DequantizeLinear", ["q", "s", "zero"], ["dq"]), *nodes]
        written(path, nodes, [*weights, zero, scale], [1, 3, 8, 8])
        return path, "is quantised (QuantizeLinear), which leaves no gradient to learn from; give"
    if name == "an operator":
        nodes[2] = helper.make_node("Det", ["n"], ["r0"])
        nodes.insert(3, helper.make_node("Expand", ["r0", "big"], ["r"]))
        big = numpy_helper.from_array(np.array([1, 6, 8, 6], np.int64), "big")
        written(path, nodes[:3], [*weights, big], [1, 3, 8, 8],
                outputs=[helper.make_tensor_value_info("r0", 1, [1, 6])])  # fmt: skip
        return path, "has an operator that cannot be converted, Det; give the network in PyTorch"
    if name == "no classifier":
        written(path, nodes, weights, [1, 3, 8, 8],
                outputs=[helper.make_tensor_value_info("r", 1, [1, 6, 8, 8])])  # fmt: skip
        return path, "is no classifier: none of its outputs is [N, classes]"
    if name == "cut short":
        written(path, nodes, weights, [1, 3, 8, 8])
        path.write_bytes(path.read_bytes()[:-40])
        return path, "cannot be read"
    assert name == "junk"
    path.write_bytes(bytes(range(256)))
    return path, "is no model that can be read: wanted are safetensors"


@pytest.mark.parametrize("name", ["two inputs", "no images", "integers", "quantised",
                                  "an operator", "no classifier", "cut short", "junk"])  # fmt: skip
def test_refused_in_one_sentence(name, tmp_path):
    path, sentence = refused(name, tmp_path)
    with pytest.raises(UserError) as caught:
        load_network(path, role="teacher")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_conversion_is_noticed(tmp_path, monkeypatch):
    nodes, weights = plain()
    path = written(tmp_path / "t.onnx", nodes, weights, [1, 3, 8, 8])
    right = onnx_file.opened

    def wrong(*arguments):
        network = right(*arguments)
        next(m for m in network.modules() if isinstance(m, nn.Linear)).bias.data += 0.05
        network.get_submodule(
            next(n for n, m in network.named_modules() if "Linear" in str(type(m)))
        )
        next(m for m in network.modules() if isinstance(m, nn.Conv2d)).weight.data *= 1.2
        return network

    monkeypatch.setattr(onnx_file, "opened", wrong)
    with pytest.raises(UserError, match="its answers differ from onnxruntime's by 0.0"):
        load_network(path, role="teacher")


def test_the_layers_are_those_that_are_made_faster(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    path = tmp_path / "t.onnx"
    torch.onnx.export(network, (torch.randn(1, 3, 8, 8),), path, dynamo=False)
    teacher = load_network(path, role="teacher")
    assert sum(map(becomes_faster, teacher.modules())) == 1
    images = torch.randn(4, 3, 8, 8)
    frozen = FrozenTeacher(teacher).cast(torch.bfloat16)
    torch.testing.assert_close(frozen(images)[0].float(), network(images), rtol=0.05, atol=0.05)


def test_the_orientation_of_text_lines(tmp_path):
    """A file of Paddle: its weights are constant nodes, its sizes open, it ends in softmax."""
    found = importlib.util.find_spec("rapidocr")
    if found is None:
        pytest.skip("pip install --no-deps rapidocr")
    path = Path(found.origin).parent / "models" / "ch_ppocr_mobile_v2.0_cls_mobile.onnx"
    teacher = load_network(path, role="teacher", channels=3, image_size=(48, 192))
    images = torch.rand(3, 3, 48, 192) * 2 - 1
    expected = runs(path, images)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in teacher.modules())
    assert norms == 35 == len(FrozenTeacher(teacher, watch=True).watched)
    folded = fold_batch_norm(FrozenTeacher(teacher, fold=False).network)
    torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-5)
    frozen = FrozenTeacher(teacher)
    assert frozen.folded and frozen(images)[1].shape == (3, 200)

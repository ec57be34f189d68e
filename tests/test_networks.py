"""Networks by name, from files and from programs: the same values, or one sentence why not."""

from __future__ import annotations

import functools
import io
import json
import logging
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from dafl_fast import FrozenTeacher
from dafl_fast.engine.evaluation import accuracy
from dafl_fast.engine.folder import RunFolder
from dafl_fast.errors import UserError
from dafl_fast.models import LeNet5, LeNet5Half, ResNet, build
from dafl_fast.networks import formats, from_export, load_network, load_networks, load_weights
from dafl_fast.recipes import make_config

from .published import PublishedLeNet5
from .test_teacher import FOLDED, assert_same_teacher, batch_norms_run, randomised

DYNAMIC = ({0: torch.export.Dim("N")},)


def pickled(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def exported(path: Path, network: nn.Module, images, dynamic_shapes=DYNAMIC) -> Path:
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=dynamic_shapes), path)
    return path


def scripted(path: Path, network: nn.Module, images, freeze=False) -> Path:
    program = torch.jit.trace(network.eval(), images)
    (torch.jit.freeze(program) if freeze else program).save(path)
    return path


# -- by name ---------------------------------------------------------------------------------------


def timm_model(name: str, **settings) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=7, **settings)


NAMED = {
    "LeNet5Half": (lambda: LeNet5Half(7), 1),
    "ResNet8": (lambda: ResNet((1, 1, 1), 16, 7), 3),
    "timm:test_resnet": (lambda: timm_model("test_resnet", in_chans=2), 2),
    "timm:test_vit": (lambda: timm_model("test_vit", img_size=32), 3),
    "torchvision:mobilenet_v3_small": (
        lambda: pytest.importorskip("torchvision").models.mobilenet_v3_small(num_classes=7), 3,
    ),
    "tests.test_networks:Own": (lambda: Own(7), 3),
    "tests.test_networks:Own.wide": (lambda: Own(7, width=9), 3),
    "tests.test_networks:INSTANCE": (lambda: Own(7), 3),
}  # fmt: skip


class Own(nn.Module):
    """A network as a user may write it."""

    def __init__(self, num_classes, width=4, *, in_chans=3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_chans, width, 8, 8), nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 16, num_classes)

    @classmethod
    def wide(cls, num_classes):
        return cls(num_classes, 9)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


INSTANCE = Own(7)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_network_with_its_weights(name, tmp_path):
    make, channels = NAMED[name]
    network = randomised(make()).eval()
    weights = tmp_path / "w.safetensors"
    save_file(network.state_dict(), weights)
    loaded = load_network(
        name, weights, role="teacher", num_classes=7, channels=channels, image_size=32
    )
    x = torch.randn(3, channels, 32, 32)
    assert torch.equal(loaded.eval()(x), network(x))


def test_without_weights_a_network_is_fresh_and_its_sizes_are_its_own():
    torch.manual_seed(3)
    one = load_network("LeNet5", role="student")
    torch.manual_seed(3)
    assert torch.equal(one.fc2.weight, LeNet5().fc2.weight)
    assert load_network("torchvision:squeezenet1_1", role="teacher").num_classes == 1000
    assert load_network("timm:test_resnet", role="teacher").num_classes == 1000


def test_a_module_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_nets.py").write_text(
        "import torch\ndef net(channels, *, image_size, **others):\n"
        "    assert not others\n    return torch.nn.Linear(channels, image_size)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    network = load_network(
        "my_own_nets:net", role="teacher", num_classes=7, channels=2, image_size=28
    )
    assert (network.in_features, network.out_features) == (2, 28)


def number() -> int:
    return 7


def failing():
    raise KeyError("conv1")


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("LeNet6", {}, "unknown teacher 'LeNet6': name one of LeNet5, "),
        ("LeNet5", {"channels": 3}, "the network LeNet5 takes images of one channel, got 3"),
        ("timm:test_resnett", {}, "timm:test_resnett is no classifier of timm; did you mean test_"),
        ("timm:hf-hub:timm/resnet18", {}, "timm:hf-hub:timm/resnet18 is no classifier of timm"),
        ("timm:resnet18.nope", {}, "timm:resnet18.nope cannot be built: RuntimeError: Invalid"),
        ("torchvision:resnet19", {}, "is no classifier of torchvision; did you mean resnet1"),
        ("torchvision:fcn_resnet50", {}, "torchvision:fcn_resnet50 is no classifier of torchv"),
        ("torchvision:resnet18", {"channels": 1}, "resnet18 takes three channels, got 1"),
        ("no.such:net", {}, "no.such:net cannot be imported: ModuleNotFoundError: No module"),
        ("tests.test_networks:Nope", {}, "Nope cannot be imported: AttributeError: module"),
        ("tests.test_networks:NAMED", {}, "must be an nn.Module or a callable that returns one"),
        ("tests.test_networks:number", {}, "number must return an nn.Module, got int"),
        ("tests.test_networks:failing", {}, "failing cannot be built: KeyError: 'conv1'"),
        ("none.pt2", {}, "the teacher file none.pt2 does not exist"),
    ],
)
def test_names_that_mean_no_network(name, settings, sentence):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_network(name, role="teacher", **settings)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_package(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"the teacher {package}:resnet18 needs .*pip install"):
        load_network(f"{package}:resnet18", role="teacher")


# -- weights ---------------------------------------------------------------------------------------


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


FORMATS = {
    "safetensors": lambda path, state: save_file(state, path),
    "torch": lambda path, state: torch.save(state, path),
    "old torch": lambda path, state: torch.save(
        state, path, _use_new_zipfile_serialization=False
    ),
    "nested": lambda path, state: torch.save(
        {"epoch": 3, "optimizer": {"state": {}}, "state_dict": state}, path
    ),
    "by role": lambda path, state: torch.save(
        {"model": {"student": LeNet5().state_dict(), "teacher": state}}, path
    ),
    "DataParallel": lambda path, state: torch.save(
        {"net": prefixed(state, "module._orig_mod.")}, path
    ),
    "prefix": lambda path, state: save_file(prefixed(state, "model."), path),
    "no counters": lambda path, state: save_file(
        {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}, path
    ),
    "another key": lambda path, state: torch.save({"epoch": 3, "params": state}, path),
    "half": lambda path, state: save_file({name: t.half() for name, t in state.items()}, path),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_weights_in_every_form(form, tmp_path):
    network = randomised(Own(7)).eval()
    network.load_state_dict({name: t.half().to(t) for name, t in network.state_dict().items()})
    path = tmp_path / "weights"  # told apart by content
    FORMATS[form](path, network.state_dict())
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(load_weights(Own(7), path, "teacher").eval()(x), network(x))


def test_a_single_layer_keeps_its_name(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    save_file(network.state_dict(), tmp_path / "w")
    load_weights(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), tmp_path / "w", "teacher")
    with pytest.raises(UserError, match="do not fit the teacher Linear: weight should be"):
        load_weights(nn.Linear(5, 3), tmp_path / "w", "teacher")


@pytest.mark.parametrize(
    ("network", "state", "sentence"),
    [
        (LeNet5Half(), LeNet5().state_dict(),
         "fit the student LeNet5Half: conv1.weight should be [3, 1, 5, 5], the file has [6, 1, 5,"),
        (Own(7), LeNet5().state_dict(), "do not fit the student Own: conv.bias is missing"),
        (nn.Linear(2, 3), {**nn.Linear(2, 3).state_dict(), "scale": torch.ones(1)},
         "do not fit the student Linear: scale is not part of it"),
        (LeNet5(), {"epoch": 3}, "holds no state dict, neither by itself nor under one of student"),
        (LeNet5(), {"epoch": 3}, "model_state_dict, model, network, net; it has 'epoch'"),
        (LeNet5(), {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, "; it has 'a', 'b'"),
        (LeNet5(), [torch.ones(2)], "holds no state dict"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(network, state, sentence, tmp_path):
    path = pickled(tmp_path / "w.pt", state)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_weights(network, path, "student")


@pytest.mark.parametrize(("taken", "other"), [("state_dict", "state_dict_ema"), ("model", "ema")])
def test_of_two_state_dicts_it_is_said_which_is_taken(taken, other, tmp_path, caplog):
    network = randomised(Own(7))
    states = {
        other: Own(7).state_dict(),
        taken: network.state_dict(),
        "rng": {"cpu": torch.ones(1)},
    }
    path = pickled(tmp_path / "w.pt", states)
    for _ in range(2):
        loaded = load_weights(Own(7), path, "teacher")
        assert torch.equal(loaded.head.weight, network.head.weight)
    (said,) = caplog.messages
    assert f"the weights under {taken!r} are taken; others for the same" in said
    assert said.endswith(f"there under {other!r}")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_with_the_remedy(zipped, tmp_path):
    path = tmp_path / "network.pt"
    torch.save(LeNet5(), path, _use_new_zipfile_serialization=zipped)
    for load in (
        lambda: load_network(str(path), role="teacher"),
        lambda: load_weights(LeNet5(), path, "teacher"),
    ):
        with pytest.raises(UserError) as caught:
            load()
        assert "reading dafl_fast.models.lenet.LeNet5 can run any code" in str(caught.value)
        assert "save its weights with safetensors.torch.save_file" in str(caught.value)
        assert "or all of it with torch.export.save" in str(caught.value)


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "text.pt").write_text("not a model, not in the least")
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("photos/cat.jpeg", b"")
    (tmp_path / "empty.pt").touch()
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=f"{path.name} is no model that can be read: wanted"):
            load_network(str(path), role="teacher")
    whole = pickled(tmp_path / "whole.pt", LeNet5().state_dict()).read_bytes()
    (tmp_path / "cut.pt").write_bytes(b"\x80\x02" + whole[:100])
    with pytest.raises(UserError, match="cut.pt"):
        load_network("LeNet5", tmp_path / "cut.pt", role="teacher")


def test_a_file_of_weights_is_no_network_and_a_program_no_weights(tmp_path):
    weights = pickled(tmp_path / "w.pt", Own(7).state_dict())
    with pytest.raises(UserError, match="--teacher NETWORK --teacher-weights .*w.pt"):
        load_network(str(weights), role="teacher")
    with pytest.raises(UserError, match="--student NETWORK --student-weights .*l.pt"):
        load_network(str(pickled(tmp_path / "l.pt", LeNet5().state_dict())), role="student")
    program = exported(tmp_path / "p.pt2", LeNet5().eval(), torch.randn(2, 1, 32, 32))
    with pytest.raises(UserError, match="are a whole program; name it as .*: --teacher .*p.pt2"):
        load_network("LeNet5", program, role="teacher")
    with pytest.raises(UserError, match="brings its weights along; leave .*w.pt out"):
        load_network(str(program), weights, role="teacher")
    with pytest.raises(UserError, match="the student cannot be the program .*p.pt2"):
        load_network(str(program), role="student")


def test_a_new_file_format_is_one_row(tmp_path, monkeypatch):
    made = Own(7).eval()
    row = formats.FileFormat(
        "ours", "our own", (".own",), lambda head, members: head[:3] == b"OWN",
        program=lambda path, role, image_shape: made,
    )  # fmt: skip
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, row))
    (tmp_path / "file").write_bytes(b"OWN")
    assert load_network(tmp_path / "file", role="teacher") is made
    (tmp_path / "file").write_bytes(b"other")
    with pytest.raises(UserError, match="by torch.export.save, TorchScript, ONNX, or our own$"):
        load_network(tmp_path / "file", role="teacher")


def test_a_run_is_its_student_and_weights_alone_are_the_usual_teacher(tmp_path):
    student, teacher = randomised(LeNet5Half()).eval(), randomised(LeNet5()).eval()
    RunFolder(tmp_path).write_config(make_config("mnist"))
    with pytest.raises(UserError, match="has left no student yet; go on with it"):
        load_network(tmp_path, role="teacher")
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    weights, x = pickled(tmp_path / "t.pt", teacher.state_dict()), torch.randn(2, 1, 32, 32)
    for name, expected in ((tmp_path, student), (weights, teacher)):
        config = make_config("mnist", teacher=str(name))
        assert torch.equal(load_networks(config)[1](x), expected(x))


@pytest.mark.parametrize("preset", ["custom", "cifar10"])
@pytest.mark.parametrize("name", ["ResNet8Slim", "timm:test_resnet"])
def test_a_file_of_train_teacher_is_enough(name, preset, tmp_path):
    """By its weights, or by the note beside them."""
    teacher = randomised(load_network(name, role="teacher", num_classes=5, channels=3)).eval()
    save_file(teacher.state_dict(), tmp_path / "t.safetensors")
    note = {"network": name, "num_classes": 5, "channels": 3, "image_size": [24, 40],
            "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(note))
    named = {"teacher": str(tmp_path / "t.safetensors"), "student": "ResNet8Slim"}
    config, loaded, student = load_networks(make_config(preset, **named))
    if preset == "custom":
        assert (config.image_shape, config.mean) == ((3, 24, 40), (0.1, 0.2, 0.3))
    x = torch.randn(2, *config.shape)
    assert torch.equal(loaded(x), teacher(x))
    assert student(x).shape == (2, 5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_classes": -1}, "is damaged: its num_classes cannot be -1"),
        ({"channels": "3"}, "is damaged: its channels cannot be '3'"),
        ({"network": "nets.py:net"}, "holds weights only"),  # a note runs no code
    ],
)
def test_a_note_that_does_not_serve(change, sentence, tmp_path):
    save_file(Own(5).state_dict(), tmp_path / "t.safetensors")
    note = {"network": "timm:x", "num_classes": 5, "channels": 3, "mean": [0.0], "std": [1.0]}
    (tmp_path / "t.json").write_text(json.dumps({**note, **change}))
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_network(tmp_path / "t.safetensors", role="teacher")


# -- programs --------------------------------------------------------------------------------------


def logits_and_gradient(network: nn.Module, images: torch.Tensor):
    x = images.clone().requires_grad_()
    logits = network(x)
    return logits, torch.autograd.grad(logits.square().sum(), x)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("save", [exported, scripted])
def test_a_program_is_the_network_that_it_was(save, tmp_path):
    network, images = LeNet5().eval(), torch.randn(5, 1, 32, 32)
    path = save(tmp_path / "teacher.bin", network, images[:2])
    program = load_network(str(path), role="teacher")
    for mine, original in zip(
        logits_and_gradient(program, images), logits_and_gradient(network, images)
    ):
        torch.testing.assert_close(mine, original, rtol=1e-5, atol=1e-6)
    operators = str(program.inlined_graph if save is scripted else program.graph)
    assert "max_pool2d" in operators
    assert "conv_pool" not in operators  # it must run where this package is not installed
    assert accuracy(program, images, network(images).argmax(1)) == 1
    program.train()
    assert FrozenTeacher(program).check(torch.randn(16, 1, 32, 32)) == 10


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("save", [exported, scripted, functools.partial(scripted, freeze=True)])
def test_a_program_runs_in_low_precision(save, tmp_path):
    network, images = PublishedLeNet5().eval(), torch.randn(16, 1, 32, 32)
    path = save(tmp_path / "teacher.pt", network, images)
    teacher = FrozenTeacher(load_network(str(path), role="teacher")).cast(torch.bfloat16)
    for count in (16, 16, 16, 5):  # TorchScript optimises itself after two calls
        x = images[:count]
        mine = logits_and_gradient(lambda y: teacher(y)[0], x)
        assert mine[0].dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            original = logits_and_gradient(network, x)
        # The network's own layers round elsewhere, so both are held against fp32.
        for a, b, exact in zip(mine, original, logits_and_gradient(network, x)):
            assert (a - exact).norm() < 2 * (b - exact).norm()
            assert (b - exact).norm() < 0.4 * exact.norm()
    assert accuracy(teacher.network, images, network(images).argmax(1)) > 0.8


@pytest.mark.parametrize(("name", "after"), [
    ("residual", 0), ("mobile", 0), ("vgg", 1), ("dense", 2),
    ("shared", 3),  # one more than in Python: of tied weights the program keeps one name
])  # fmt: skip
def test_an_exported_network_is_folded_like_any_other(name, after, tmp_path):
    make, before, _ = FOLDED[name]
    network = randomised(make()).double().eval()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    program = load_network(str(exported(tmp_path / "t.pt2", network, x[:2])), role="teacher")
    assert batch_norms_run(program, x) == before
    teacher = FrozenTeacher(program)
    assert batch_norms_run(teacher.network, x) == after
    assert_same_teacher(teacher, FrozenTeacher(network, fold=False), x, 1e-10)


class Odd(nn.Module):
    """Weights that no layer computes with, or that are used in two ways, and a cast."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same", dilation=2, bias=False)
        self.norm, self.batch = nn.BatchNorm1d(4), nn.BatchNorm2d(4, affine=False)
        self.inner = nn.ParameterDict({"w": torch.randn(6, 4)})
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))

    def forward(self, x):
        weight = self.conv.weight
        x = self.batch(self.conv(x) + F.conv2d(x, weight, padding=1))
        x = F.conv2d(x, weight.transpose(0, 1), stride=2).relu() + weight.mean()
        x = self.conv(x).float().mean((2, 3)) * self.scale
        return self.head(F.linear(self.norm(x), self.inner["w"]).sigmoid()) + x.sum(1, keepdim=True)


def test_operators_that_are_no_layers_stay_operators(tmp_path):
    network = randomised(Odd()).eval()
    x = torch.randn(3, 3, 8, 8)
    program = load_network(str(exported(tmp_path / "t.pt2", network, x[:2])), role="teacher")
    for mine, original in zip(logits_and_gradient(program, x), logits_and_gradient(network, x)):
        torch.testing.assert_close(mine, original)
    layers = {type(layer) for layer in program.modules()}
    assert {nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d} <= layers
    assert nn.Linear not in layers
    teacher = FrozenTeacher(program)
    torch.testing.assert_close(teacher(x)[0], network(x))
    assert teacher.cast(torch.bfloat16)(x)[0].isfinite().all()  # the casts insist on nothing


@pytest.mark.parametrize(
    ("export", "sentence"),
    [
        (lambda: torch.export.export(LeNet5().eval(), (torch.randn(4, 1, 32, 32),)),
         "was exported for batches of 4 only; leave the size open: torch.export.export(netw"),
        (lambda: torch.export.export(build("ResNet8"), (torch.randn(2, 3, 8, 8),), None,
                                     dynamic_shapes=DYNAMIC),
         "was exported in training mode; use torch.export.export(network.eval()"),
        (lambda: torch.export.export(nn.Sequential(nn.Dropout(), nn.Linear(4, 2)),
                                     (torch.randn(2, 4),), dynamic_shapes=DYNAMIC),
         "was exported in training mode"),
        (lambda: torch.export.export(nn.Bilinear(2, 3, 4), (torch.randn(5, 2), torch.randn(5, 3))),
         "the exported program has 2 inputs: input1, input2"),
    ],
)  # fmt: skip
def test_programs_that_cannot_be_teachers(export, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        from_export(export())


def test_images_of_another_size_than_the_exported_one():
    program = torch.export.export(
        LeNet5().eval(), (torch.randn(2, 1, 32, 32),), dynamic_shapes=DYNAMIC
    )
    with pytest.raises(UserError, match=r"does not take images of shape \[16, 1, 28, 28\]: Guard"):
        FrozenTeacher(from_export(program)).check(torch.randn(16, 1, 28, 28))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["sample_inputs/model.pt", "constants/opaque_obj_0"])
def test_code_in_a_program_is_not_run(part, tmp_path):
    path = exported(tmp_path / "t.pt2", LeNet5().eval(), torch.randn(2, 1, 32, 32))
    buffer = io.BytesIO()
    torch.save(((Evil(tmp_path / "ran"),), {}), buffer)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as target:
        for name in source.namelist():
            if not name.endswith(part):
                target.writestr(name, source.read(name))
        target.writestr(f"t/data/{part}", buffer.getvalue())
    with pytest.raises(UserError, match="evil.pt2 is not loaded, because .* can run any code"):
        load_network(str(tmp_path / "evil.pt2"), role="teacher")
    assert not (tmp_path / "ran").exists()


# -- as teachers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "folded"), [("test_resnet", 15), ("test_vit", 0)])
def test_features_of_timm_networks(name, folded, caplog):
    network = randomised(load_network(
        f"timm:{name}", role="teacher", num_classes=7, channels=3, image_size=32
    )).eval()  # fmt: skip
    x = torch.randn(16, 3, 32, 32, requires_grad=True)
    expected = network.forward_head(network.forward_features(x), pre_logits=True)
    with caplog.at_level(logging.INFO):
        teacher = FrozenTeacher(network)
    assert f"folded {folded} of" in caplog.text or not folded
    assert teacher.check(x) == 7
    logits, features = teacher(x)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * expected.abs().max().item()}
    torch.testing.assert_close(features, expected, **tolerance)
    (mine,) = torch.autograd.grad(features.square().sum(), x)
    (original,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(mine, original, rtol=0, atol=1e-3 * original.abs().max().item())
    torch.testing.assert_close(logits, network(x), rtol=1e-4, atol=1e-4)


def test_a_teacher_that_returns_more_than_logits():
    class Several(LeNet5):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(UserError, match=r"must return logits \[N, C\] alone, got tuple"):
        FrozenTeacher(Several()).check(torch.randn(2, 1, 32, 32))

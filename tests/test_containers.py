"""In what networks come: folders, checkpoints of other packages, files of code, any precision."""

from __future__ import annotations

import argparse
import collections
import copy
import json
import logging
import pathlib
import re
import socket
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dafl_fast import FrozenTeacher, distill
from dafl_fast.convention import Convention
from dafl_fast.engine.precision import computed_in
from dafl_fast.errors import UserError
from dafl_fast.models import LeNet5
from dafl_fast.networks import from_export, load_network, load_networks, load_weights
from dafl_fast.networks.opener import open_file, open_network
from dafl_fast.recipes import make_config

from .test_networks import DYNAMIC, Own
from .test_teacher import randomised

# -- folders of transformers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that writes a tiny classifier to a folder, and returns both."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    common = {"num_labels": 5, "num_channels": 3}
    made = {
        "resnet": lambda **other: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
                **common, **other,
            )
        ),
        "vit": lambda **other: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                image_size=32, patch_size=8, **common, **other,
            )
        ),
    }  # fmt: skip

    def write(kind: str, **other):
        torch.manual_seed(0)
        network = randomised(made[kind](**other)).eval()
        folder = tmp_path_factory.mktemp(kind)
        network.save_pretrained(folder)
        return network, folder

    return write


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def change(path: pathlib.Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_folder_of_transformers_is_its_network(kind, folders, no_network):
    network, folder = folders(kind)
    x = torch.randn(3, 3, 32, 32)
    loaded = load_network(f"transformers:{folder}", role="teacher", num_classes=10)
    assert torch.equal(loaded(x).logits, network(x).logits)
    shape = (3, 32, 32) if kind == "vit" else None
    assert loaded.convention == Convention("pixel_values", "logits", image_shape=shape)
    opened = open_file(pathlib.Path(f"transformers:{folder}"), "model")
    assert (opened.classes, opened.channels) == (5, 3)
    assert opened.image_size == (32 if kind == "vit" else None)
    assert opened.file == folder / "model.safetensors"
    assert opened.mean is None


def test_what_a_folder_says_of_images_and_classes(folders):
    names = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
    _, folder = folders("resnet", id2label=names, label2id={v: k for k, v in names.items()})
    processor = folder / "preprocessor_config.json"
    processor.write_text(json.dumps({
        "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1],
        "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 24},
        "do_center_crop": True, "rescale_factor": 1 / 255,
    }))  # fmt: skip
    opened = open_network(f"transformers:{folder}", None, "teacher")
    assert opened.network.convention.classes == tuple(names.values())
    assert opened.network.convention.image_shape == (3, 32, 24)
    assert opened.mean == pytest.approx((0.5, 0.4, 0.3))
    assert opened.std == pytest.approx((0.2, 0.2, 0.1))
    change(processor, rescale_factor=1 / 127.5, do_center_crop=False)
    opened = open_network(f"transformers:{folder}", None, "teacher")
    # (2 x - mean) / std, which is (x - mean / 2) / (std / 2)
    assert opened.mean == pytest.approx((0.25, 0.2, 0.15))
    assert opened.std == pytest.approx((0.1, 0.1, 0.05))
    assert opened.network.convention.image_shape == (3, 40, 40)
    change(processor, do_rescale=False, do_normalize=False)
    opened = open_network(f"transformers:{folder}", None, "teacher")
    assert opened.mean == (0, 0, 0)
    assert opened.std == pytest.approx([1 / 255] * 3)


def test_half_precision_in_a_folder_is_read_as_float32(folders):
    network, folder = folders("resnet")
    half = copy.deepcopy(network).half()
    half.save_pretrained(folder)
    loaded = load_network(f"transformers:{folder}", role="teacher")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x).logits, half.float()(x).logits)


def test_a_student_of_transformers(folders, tmp_path):
    network, folder = folders("resnet")
    x, name = torch.randn(2, 3, 32, 32), f"transformers:{folder}"
    student = load_network(name, role="student")
    assert torch.equal(student(x).logits, network(x).logits)
    assert all(parameter.requires_grad for parameter in student.parameters())
    # The run's own weights, when its student is opened later.
    with torch.no_grad():
        student.classifier[1].bias += 1
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    later = load_network(name, tmp_path / "student.safetensors", role="student").eval()
    torch.testing.assert_close(later(x).logits, network(x).logits + 1)
    (folder / "model.safetensors").unlink()  # new weights, then
    assert load_network(name, role="student").config.num_labels == 5


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: change(folder / "config.json", auto_map={"AutoConfig": "own.Config"}),
         "needs code of its own (auto_map in config.json), which is not run"),
        (lambda folder: change(folder / "config.json", model_type="of the future"),
         "cannot be read: ValueError: The checkpoint you are trying to load"),
        (lambda folder: change(folder / "config.json", hidden_sizes=[8, 4096]),
         "config.json describes a network of 151,"),
        (lambda folder: change(folder / "config.json", model_type="bert"),
         "cannot be read: ValueError: Unrecognized configuration class"),
        (lambda folder: change(folder / "config.json", problem_type="multi_label_classification"),
         "is for multi_label_classification; only a choice between classes that exclude each"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json that names a model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors; write it"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
         "save_pretrained(FOLDER, safe_serialization=True)"),
        (lambda folder: save_file({"x": torch.zeros(1)}, folder / "model.safetensors",
                                  {"format": "pt"}),
         "is no trained classifier"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(spoil, sentence, folders, no_network):
    _, folder = folders("resnet")
    spoil(folder)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_network(f"transformers:{folder}", role="teacher")


def test_nothing_is_downloaded_and_nothing_given_twice(folders, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is none at google/vit, and nothing is downloaded"):
        load_network("transformers:google/vit", role="teacher")
    _, folder = folders("resnet")
    with pytest.raises(UserError, match="brings its weights along; leave w.safetensors out"):
        load_network(f"transformers:{folder}", "w.safetensors", role="teacher")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="has pickled weights only, which can run any code"):
        load_network(f"transformers:{folder}", role="student")


def test_transformers_is_missing(folders, monkeypatch):
    _, folder = folders("resnet")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="the teacher transformers:.* needs .*pip install"):
        load_network(f"transformers:{folder}", role="teacher")


# -- checkpoints of LightningModules ---------------------------------------------------------------


def prefixed(**networks) -> dict[str, torch.Tensor]:
    return {
        f"{prefix.replace('__', '.')}.{name}": tensor
        for prefix, network in networks.items()
        for name, tensor in network.state_dict().items()
    }


class Settings:
    """A class of the user's, as it lies in hyper_parameters; it would tell if it was made."""

    made = 0

    def __init__(self):
        self.rate = 0.1

    def __setstate__(self, state):
        Settings.made += 1


def lightning(path, state, **hyper_parameters):
    torch.save(
        {"pytorch-lightning_version": "2.6.6", "epoch": 3, "callbacks": {"EarlyStopping": {}},
         "state_dict": state, "hyper_parameters": hyper_parameters}, path,
    )  # fmt: skip
    return path


def test_a_lightning_checkpoint_with_settings_of_any_class(tmp_path, caplog):
    network = randomised(Own(7)).eval()
    state = prefixed(model=network) | {"criterion.weight": torch.ones(7), "seen": torch.ones(1)}
    path = lightning(
        tmp_path / "a.ckpt", state, args=argparse.Namespace(rate=0.1), own=Settings(),
        folder=pathlib.Path("data"), activation=nn.ReLU, rate=np.float64(0.1), some={1, 2},
        lists=collections.defaultdict(list, a=[1]), last=collections.deque([1, 2]),
    )  # fmt: skip
    loaded = load_weights(Own(7), path, "teacher").eval()
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(x), network(x))
    assert Settings.made == 0
    assert (
        "of the teacher's weights, those that begin with 'model.' are used; left out: "
        "criterion.weight, seen"
    ) in caplog.text


def test_a_checkpoint_that_lightning_wrote(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, args):
            super().__init__()
            self.save_hyperparameters()
            self.net = Own(7)
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(7))

        def training_step(self, batch, index):
            return self.criterion(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4))
    module = Module(argparse.Namespace(rate=0.1))
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    logging.disable()
    try:
        trainer.fit(module, torch.utils.data.DataLoader(data, 4))
    finally:
        logging.disable(logging.NOTSET)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_weights(Own(7), tmp_path / "a.ckpt", "teacher").eval()
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(x), module.net.eval()(x))


def test_of_several_networks_the_one_of_that_role_or_the_model_is_taken(tmp_path):
    one, two, three = (randomised(Own(7)).eval() for _ in range(3))
    x = torch.randn(3, 3, 32, 32)
    for networks, role, expected in (
        ({"student": one, "teacher": two}, "teacher", two),
        ({"student": one, "teacher": two}, "student", one),
        ({"model": one, "ema": two, "best": three}, "teacher", one),
        ({"lit__model": one, "lit__teacher": two}, "teacher", two),
        ({"net": one, "wide": Own(7, 9)}, "teacher", one),  # of other shapes
        ({"net": one, "backbone": one}, "teacher", one),  # under two names
    ):
        path = lightning(tmp_path / "a.ckpt", prefixed(**networks))
        assert torch.equal(load_weights(Own(7), path, role).eval()(x), expected(x))
    # Beside the network's own names, an average of them.
    path = lightning(tmp_path / "a.ckpt", {**one.state_dict(), **prefixed(ema=two)})
    assert torch.equal(load_weights(Own(7), path, "teacher").eval()(x), one(x))
    path = lightning(tmp_path / "a.ckpt", prefixed(net=one, ema=two))
    with pytest.raises(UserError, match="are there several times, under 'ema.', 'net.'; save the"):
        load_weights(Own(7), path, "teacher")


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (prefixed(model=LeNet5(), criterion=nn.BatchNorm2d(3)), "conv.bias is missing"),
        (prefixed(model=Own(7, 9)), "conv.weight should be [4, 3, 8, 8], the file has [9, 3, 8,"),
        ({**Own(7).state_dict(), "scale": torch.ones(1)}, "scale is not part of it"),
        (prefixed(net=Own(7)) | {"net.scale": torch.ones(1)}, "scale is not part of it"),
    ],
)
def test_checkpoints_that_do_not_fit(state, sentence, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"do not fit the teacher Own: {sentence}")):
        load_weights(Own(7), lightning(tmp_path / "a.ckpt", state), "teacher")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = lightning(tmp_path / "a.ckpt", prefixed(net=Own(7)), evil=Evil(tmp_path / "ran"))
    load_weights(Own(7), path, "teacher")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": Own(7)}, tmp_path / "b.ckpt")  # a pickled network is still refused
    with pytest.raises(UserError, match="reading tests.test_networks.Own can run any code"):
        load_weights(Own(7), tmp_path / "b.ckpt", "teacher")


# -- a user's own code -----------------------------------------------------------------------------

CODE = """
import torch
from torch import nn
from blocks import WIDTH

class Net(nn.Module):
    def __init__(self, num_classes, channels):
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, WIDTH, 8, 8), nn.Linear(WIDTH * 16, num_classes)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))

    @classmethod
    def loaded(cls, num_classes, channels):
        network = cls(num_classes, channels)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0, 0.1, generator=generator)
        return network

INSTANCE = Net(10, 1)
"""


def test_a_callable_in_a_file(tmp_path, monkeypatch):
    paths = sys.path[:]
    for folder, width in (("a:b", 3), ("b", 6)):  # each with a blocks.py of its own
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "nets.py").write_text(CODE)
        (tmp_path / folder / "blocks.py").write_text(f"WIDTH = {width}")
        name = f"{tmp_path / folder}/nets.py:Net"
        network = load_network(name, role="teacher", num_classes=7, channels=2)
        assert network.conv.weight.shape == (width, 2, 8, 8)
        assert network.head.out_features == 7
    monkeypatch.chdir(tmp_path / "b")
    for name in ("nets.py:Net.loaded", "./nets.py:Net", "../b/nets.py:INSTANCE"):
        assert load_network(name, role="teacher", num_classes=10, channels=1).conv.out_channels == 6
    assert sys.path == paths


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none.py:Net", "none.py:Net cannot be imported: FileNotFoundError: [Errno 2] No such"),
        ("nets.py:Nope", "nets.py:Nope cannot be imported: AttributeError: module"),
        ("nets.py", "nets.py must also name the class or function in it: nets.py:CALLABLE"),
        ("broken.py:Net", "broken.py:Net cannot be imported: SyntaxError:"),
        ("nets.py:WIDTH", "nets.py:WIDTH must be an nn.Module or a callable that returns one"),
    ],
)
def test_files_that_give_no_network(name, sentence, tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(CODE)
    (tmp_path / "blocks.py").write_text("WIDTH = 3")
    (tmp_path / "broken.py").write_text("def")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_network(name, role="teacher")


def test_own_code_without_weights_must_have_learned_something(tmp_path):
    (tmp_path / "nets.py").write_text(CODE)
    (tmp_path / "blocks.py").write_text("WIDTH = 3")
    file = f"{tmp_path}/nets.py"
    before = torch.random.get_rng_state()
    for name in ("Net.loaded", "INSTANCE"):
        torch.random.set_rng_state(before)
        config = make_config("mnist", teacher=f"{file}:{name}", teacher_weights=None)
        _, teacher, _ = load_networks(config)
        assert teacher(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    config = make_config("mnist", teacher=f"{file}:Net")
    with pytest.raises(UserError, match="--teacher-weights is needed: .*nets.py:Net draws its w"):
        load_networks(config)
    save_file(load_network(f"{file}:INSTANCE", role="teacher").state_dict(), tmp_path / "w")
    load_networks(make_config("mnist", teacher=f"{file}:Net", teacher_weights=tmp_path / "w"))


# -- any precision ---------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class CastsItself(Small):
    def forward(self, x):
        return super().forward(x.to(self.head.weight.dtype)).float()


class CastsInside(Small):
    def forward(self, x):
        y = self.norm(self.conv(x)).float().sigmoid().to(x.dtype)
        return self.head(y.mean((2, 3), dtype=x.dtype) + torch.zeros(1, dtype=x.dtype))


def as_module(network, images):
    return network


def as_program(network, images):
    return from_export(torch.export.export(network, (images,), dynamic_shapes=DYNAMIC))


def as_script(network, images):
    return torch.jit.trace(network, images)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("kind", "form"),
    [(Small, as_module), (Small, as_program), (Small, as_script), (CastsInside, as_program)],
)
def test_weights_of_another_precision_are_computed_in_fp32(kind, form, dtype, caplog):
    network = randomised(kind()).eval().to(dtype)
    x = torch.randn(4, 3, 8, 8)
    program = form(network, x.to(dtype)[:2])
    converted = computed_in(torch.float32, program, "teacher", x)
    expected = copy.deepcopy(network).float()(x)
    torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(x.to(dtype)).float(), expected, rtol=0.05, atol=0.05)
    assert {p.dtype for p in program.parameters()} == {dtype}  # what was given stays
    name = str(dtype).removeprefix("torch.")
    assert f"the teacher's weights are {name}; it is computed in float32" in caplog.text
    teacher = FrozenTeacher(converted)
    assert teacher.check(x) == 5
    cast = FrozenTeacher(converted).cast(torch.bfloat16)
    torch.testing.assert_close(cast(x)[0].float(), expected, rtol=0.1, atol=0.1)


def test_what_takes_fp32_is_left_alone(caplog):
    x = torch.randn(4, 3, 8, 8)
    for network in (Small(), CastsItself().half(), CastsItself().double()):
        assert computed_in(torch.float32, network, "teacher", x) is network
    assert caplog.text == ""


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_precision_that_code_insists_on():
    network, x = CastsInside().eval().half(), torch.randn(4, 3, 8, 8)
    for program in (
        torch.jit.trace(network, x.half()), torch.jit.freeze(torch.jit.trace(network, x.half())),
    ):  # fmt: skip
        with pytest.raises(UserError, match="takes images in float16 only, and its code or const"):
            computed_in(torch.float32, program, "teacher", x)
    wrong = Small().half()  # images of the wrong shape are another matter, which is told elsewhere
    with pytest.raises(UserError, match="does not take images of shape .*expected input.*channels"):
        FrozenTeacher(computed_in(torch.float32, wrong, "teacher", x[:, :1])).check(x[:, :1])


def run(teacher, student, tmp_path, **others):
    settings = {
        "image_shape": (3, 32, 32), "steps": 4, "batch_size": 4, "latent_dim": 4,
        "generator_width": 4, "bank_images": 16, "device": "cpu", "out_dir": tmp_path / "run",
        "adapt": False, "student_updates": 6, "student_lr": 2e-3,
    }  # fmt: skip
    return distill(teacher, student, **(settings | others))


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("form", [as_module, as_script])
def test_a_teacher_in_fp16_is_distilled_and_evaluated(form, tmp_path):
    teacher = form(randomised(Small()).eval().half(), torch.randn(2, 3, 32, 32).half())
    images = torch.randn(50, 3, 32, 32)
    labels = teacher(images.half()).argmax(1)
    result = run(teacher, Small(), tmp_path, eval_loader=[(images, labels)])
    assert result.summary["teacher_accuracy"] > 0.95
    assert next(teacher.parameters()).dtype == torch.float16


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_frozen_script_is_evaluated(tmp_path):
    # Freezing leaves no parameters and no mode.
    teacher = torch.jit.freeze(torch.jit.trace(Small().eval(), torch.randn(2, 3, 32, 32)))
    images = torch.randn(10, 3, 32, 32)
    labels = teacher(images).argmax(1)
    result = run(teacher, Small(), tmp_path, eval_loader=[(images, labels)])
    assert result.summary["teacher_accuracy"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nn.Module.bfloat16, "weights must be float32 to be trained, got bfloat16 for conv.weight"),
        (nn.Module.double, "weights must be float32 to be trained, got float64 for conv.weight"),
    ],
)  # fmt: skip
def test_students_that_cannot_be_trained_are_refused(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        run(Small(), change(Small()), tmp_path)
    assert not (tmp_path / "run").exists()


def test_what_the_program_around_has_as_defaults_does_not_matter(tmp_path):
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.device("cpu"):
            teacher, student = randomised(Small()).eval(), Small().float()
            held_out = [(torch.randn(20, 3, 32, 32), torch.arange(20) % 4)]
        result = run(teacher, student, tmp_path, eval_loader=held_out)
        assert (torch.get_default_dtype(), torch.empty(()).device.type) == (torch.float64, "meta")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert result.summary["student_images"] > 0 and result.summary["eval_count"] == 20
    assert next(result.student.parameters()).dtype == torch.float32
    assert next(teacher.parameters()).dtype == torch.float64

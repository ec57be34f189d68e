"""What files and folders from somebody else may do: compute, and nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.export import Dim

from dafl_fast import evaluate, export
from dafl_fast import train as command
from dafl_fast.distill import train
from dafl_fast.engine.folder import read_config
from dafl_fast.errors import UserError
from dafl_fast.networks import load_network, load_networks, open_run
from dafl_fast.networks.exported_check import check_formula
from dafl_fast.networks.trust import NeedsCode, Trust
from dafl_fast.progress import describe
from dafl_fast.recipes import make_config

RAN = "__import__('pathlib').Path({!r}).touch()"


# -- programs of torch.export ----------------------------------------------------------------------


class Net(nn.Module):
    """Its sizes depend on the images'."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 5)
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, x):
        y = nn.functional.interpolate(self.conv(x), scale_factor=2.0)
        y = y[:, :, : y.shape[2] // 2 + x.shape[2] % 3 + 1]
        return self.head(y.reshape(y.shape[0], 4, -1).mean(-1) * self.scale + torch.ones(4))


BATCH = {0: Dim("N")}
SHAPES = {
    "batch": BATCH,
    "range": {0: Dim("N", min=2, max=99), 2: Dim("h", min=8, max=64), 3: Dim("w", min=8, max=64)},
    "derived": {0: Dim("N"), 2: 4 * Dim("q", min=2, max=16)},
    "auto": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A file with a program of torch.export for any number of images."""
    return written(tmp_path_factory.mktemp("program") / "t.pt2", SHAPES["range"])


def written(path: Path, shapes: dict | None) -> Path:
    torch.manual_seed(0)
    dynamic = None if shapes is None else (shapes,)
    made = torch.export.export(Net().eval(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=dynamic)
    torch.export.save(made, path)
    return path


def changed(source: Path, target: Path, change) -> Path:
    """A copy of an archive, in which `change` has changed a dict from names to contents."""
    with zipfile.ZipFile(source) as archive:
        root = archive.namelist()[0].partition("/")[0]
        entries = {n.removeprefix(f"{root}/"): archive.read(n) for n in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"{root}/{name}", content)
    return target


@pytest.mark.parametrize("shapes", SHAPES)
def test_ordinary_programs_are_read(shapes, tmp_path):
    path = written(tmp_path / "t.pt2", SHAPES[shapes])
    network, expected = load_network(path, role="teacher"), torch.export.load(path).module()
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(network(x), expected(x))


class Measured(nn.Module):
    """A size that depends on the data gives the program assertions, with messages."""

    def forward(self, x):
        count = x[0, 0, 0, 0].round().to(torch.int64).item()
        torch._check(count >= 2, lambda: 'it\'s "small"')
        torch._check(count <= 4)
        return torch.einsum("nchw->nc", x[:, :, :count]).softmax(1)


def test_a_program_with_assertions_is_read(tmp_path):
    x = torch.full((2, 3, 8, 8), 3.0)
    made = torch.export.export(Measured(), (x,), dynamic_shapes=(BATCH,))
    torch.export.save(made, tmp_path / "t.pt2")
    torch.testing.assert_close(load_network(tmp_path / "t.pt2", role="teacher")(x), Measured()(x))


def test_a_program_for_one_batch_size_is_read_and_refused_for_that(tmp_path):
    path = written(tmp_path / "t.pt2", None)
    with pytest.raises(UserError, match="was exported for batches of 2 only"):
        load_network(path, role="teacher")


MODEL = "models/model.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(((Evil(path),), {}), buffer)
    return buffer.getvalue()


def in_json(name: str, change):
    """A change of what is in the entry `name`."""

    def in_entries(entries):
        values = json.loads(entries[name])
        change(values)
        entries[name] = json.dumps(values).encode()

    return in_entries


def every(value, key: str):
    """All dicts in a JSON value that have `key`."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list)):
            yield from every(item, key)
    if isinstance(value, dict) and key in value:
        yield value


def first(key: str, new):
    def change(model):
        next(found for found in every(model, key) if found[key])[key] = new

    return in_json(MODEL, change)


def constant(path_name: str, use_pickle: bool, entry: str, content: bytes):
    def change(entries):
        values = json.loads(entries[CONSTANTS])
        named = {"path_name": path_name, "is_param": False, "use_pickle": use_pickle}
        values["config"]["lifted_tensor_0"] = named | {"tensor_meta": None}
        entries[CONSTANTS] = json.dumps(values).encode()
        entries[entry] = content

    return change


def attacks(ran: Path) -> dict[str, object]:
    """Changes of a program, each of which makes torch touch the file `ran`, or is much like one
    that does."""
    code, content, saved = RAN.format(str(ran)), pickle.dumps(Evil(ran)), pickled(ran)
    spec = '[1, {"type": "builtins.tuple", "context": "%s", "children_spec": []}]'
    enum = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"}).replace('"', '\\"')
    return {
        "opaque": constant("opaque_obj_0", True, "data/constants/opaque_obj_0", content),
        "OPAQUE": constant("opaque_obj_0", True, "data/constants/OPAQUE_OBJ_0", content),
        "by another name": constant("opaque_obj_0", True, "data/constants/tensor_7", content),
        "in the folder above": constant("../opaque_obj_0", True, "data/opaque_obj_0", content),
        "custom": constant("custom_obj_0", True, "data/constants/custom_obj_0", content),
        "pickled tensor": constant("tensor_7", True, "data/constants/tensor_7", saved),
        "compiled": lambda entries: entries.update({"data/aotinductor/model/a.so": b"x"}),
        "COMPILED": lambda entries: entries.update({"Data/AOTInductor/model/a.so": b"x"}),
        "another model": lambda entries: entries.update({"models/other.json": entries[MODEL]}),
        "a second MODEL": lambda entries: entries.update({"models/MODEL.json": entries[MODEL]}),
        "guard": in_json(MODEL, lambda model: model.update(guards_code=[code])),
        "later guard": in_json(MODEL, lambda model: model["guards_code"].append(f"1 or {code}")),
        "guard's index": in_json(
            MODEL, lambda model: model.update(guards_code=[f"L['x'].size()[{code}] > 0"])
        ),
        "expression": first("expr_str", code),
        "inner expression": first("expr_str", f"Add(Integer(2), {code})"),
        "keyword": first("expr_str", f"Symbol('s0', positive={code})"),
        "range": in_json(MODEL, lambda model: model["range_constraints"].update({code: {}})),
        "operator": first("target", "torch.os.system"),
        "operator of a file": first("target", "torch.ops.aten.from_file.default"),
        "operator's alias": first("target", "torch.hub.load"),
        "extension": first("target", "#x:y"),
        "name": first("as_name", f"x={code}"),
        "tensor's name": first("name", f"x={code}"),
        "input's name": first("forward_arg_names", [f"x'+{code}+'"]),
        "parameter's name": first("parameter_name", f"a\"]+{code}+[\""),
        "text": in_json(
            MODEL,
            lambda model: next(every(model, "as_tensor")).update(as_string=f"'+{code}+'"),
        ),
        "class": first("in_spec", spec % enum),
        "object": first("as_tensor", {"class_fqn": "x", "name": "y"}),
    }  # fmt: skip


@pytest.mark.parametrize("attack", attacks(Path()))
def test_no_code_of_a_program_is_run(attack, program, tmp_path):
    path = changed(program, tmp_path / "evil.pt2", attacks(tmp_path / "ran")[attack])
    with pytest.raises(UserError, match="evil.pt2 is not loaded, because reading .* can run any"):
        load_network(path, role="teacher")
    assert not (tmp_path / "ran").exists()


def test_attacks_would_succeed_without_the_check(program, tmp_path):
    """So that the attacks above stay ones."""
    for name in ("opaque", "OPAQUE", "guard", "expression"):
        ran = tmp_path / name
        path = changed(program, tmp_path / f"{name}.pt2", attacks(ran)[name])
        with contextlib.suppress(Exception):
            torch.export.load(path).module()(torch.zeros(2, 3, 16, 16))
        assert ran.exists()


@pytest.mark.parametrize(
    "formula",
    [
        "Symbol('s77', positive=True, integer=True)", "4*s83", "Float('2.5', precision=53)",
        "Add(Mul(Integer(-1), Pow(Symbol('s0'), Integer(2))), FloorDiv(Symbol('s0'), Integer(2)))",
        "Max(Integer(1), Mod(Symbol('s53', integer=True), Integer(3)))", "Pow(s0, Rational(1, 2))",
        "2 + (((-3) + L['x'].size()[2]) // 2) >= 0 and L['x'].size()[2] % 3 <= 2**4",
        "(torch.sym_max(1, L['flat_args'][0].size()[3])) != 1", "not (Eq(u0, 1)) or s1 < int_oo",
    ],
)  # fmt: skip
def test_formulas_of_sizes(formula):
    check_formula(formula)


@pytest.mark.parametrize(
    "formula",
    [
        "exec('1')", "exec", "s0.func", "().__class__", "L['x'].__class__", "L['x'].size(s0)[0]",
        "L[s0]", "Symbol('a b')", "Symbol(exec('1'))", "[1][0]", "lambda: 0", "(x := 1)", "f'{1}'",
        "'a'", "s0!", "Integer('exec')", "Add(1, evaluate=s0)", "torch.hub.load(1)", "s0; s1", "",
        "math.factorial(9)", "s0 if s1 else exec", "2**99999999", "Pow(Integer(9), Integer(9**9))",
        "Pow(9, s0)", "Pow(Pow(Pow(Pow(2, 16), 16), 16), 16)", "LShift(1, 10**9)", "1" * 99,
        "(" * 9999 + ")" * 9999, "1+" * 20_000 + "1", "*s0", "s0 @ s1", "await s0", "ſ0",
    ],
)  # fmt: skip
def test_what_is_no_formula(formula):
    with pytest.raises(NeedsCode, match="the formula"):
        check_formula(formula)


# -- TorchScript -----------------------------------------------------------------------------------


class Scripted(nn.Module):
    """What is usual in scripts: other modes, and loops that end."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)])
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        if self.training:
            x = x * 2
        parts = [x, x]
        for part in parts:
            if bool(part.sum() > 1e9):
                return self.head(part.mean((2, 3)))
        for i in range(x.dim()):
            if i > 2:
                break
            x = x + i
        count = 0
        while count < 3:
            count += 1
        assert x.dim() == 4, "images"
        return self.head(torch.einsum("nchw->nc", x))


def script(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(path)
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning")
def test_ordinary_scripts_are_read(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    network = Scripted().eval()
    scripted, traced = torch.jit.script(network), torch.jit.trace(network, x, check_trace=False)
    for program in (scripted, traced, torch.jit.freeze(scripted)):
        program.save(tmp_path / "t.pt")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "TypedStorage")
            read = load_network(tmp_path / "t.pt", role="teacher")
        torch.testing.assert_close(read(x), network(x))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning")
def test_quantised_scripts_are_read(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    small = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
    x = torch.randn(2, 3, 2, 2)
    read = load_network(script(small, tmp_path / "q.pt"), role="teacher")
    torch.testing.assert_close(read(x), small(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121", "resnet18", "googlenet"])
def test_scripts_of_torchvision_are_read(name, tmp_path):
    models = pytest.importorskip("torchvision").models
    more = {"init_weights": False} if name == "googlenet" else {}
    network = models.get_model(name, weights=None, **more).eval()
    load_network(script(network, tmp_path / "t.pt"), role="teacher")


class Saves(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = str(path)

    def forward(self, x):
        torch.save(x, self.path)
        return x


class Inside(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), Saves(path))

    def forward(self, x):
        return self.layers(x)


class MapsFile(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = str(path)

    def forward(self, x):
        return x + torch.from_file(self.path, True, 4)


class Unpacks(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = str(path)

    @torch.jit.export
    def __getstate__(self):
        return self.path

    @torch.jit.export
    def __setstate__(self, state: str):
        self.path = state
        self.training = False

    def forward(self, x):
        return x


class Endless(nn.Module):
    def __init__(self, path):
        super().__init__()

    def forward(self, x):
        count = 0
        while count < 3:
            count += 1
            if bool(x.sum() < 1e9):
                count = 0
        return x


class Growing(nn.Module):
    def __init__(self, path):
        super().__init__()

    def forward(self, x):
        count, end = 0, 3
        while count < end:
            count += 1
            end += 1
        return x


class Long(nn.Module):
    def __init__(self, path):
        super().__init__()

    def forward(self, x):
        for _ in range(1 << 40):
            x = x + 1
        return x


class Forks(nn.Module):
    def __init__(self, path):
        super().__init__()

    def forward(self, x):
        return torch.jit.wait(torch.jit.fork(torch.relu, x))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Saves, "calls 'torch.save'"), (Inside, "calls 'torch.save'"),
        (MapsFile, "calls 'torch.from_file'"), (Unpacks, "runs code while it is loaded (__"),
        (Endless, "has a loop without a bound"), (Growing, "has a loop without a bound"),
        (Long, "passes"), (Forks, "calls 'fork'"),
    ],
)  # fmt: skip
def test_scripts_that_do_more_than_compute(kind, what, tmp_path):
    path = script(kind(tmp_path / "ran"), tmp_path / "evil.pt")
    with pytest.raises(UserError, match=f"evil.pt is not loaded.*{re.escape(what)}.*--trust-teach"):
        load_network(path, role="teacher")
    assert not (tmp_path / "ran").exists()
    load_network(path, role="teacher", trust_teacher=True)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("ops.image.write_file('a', x)", "uses 'ops.image.write_file'"),
        ("(ops) . image . write_file('a', x)", "uses 'ops.image.write_file'"),
        ("y = torch", "uses 'torch'"), ("y = ops.aten", "uses 'ops.aten'"),
        ("y = x.save('a')", "calls 'x.save'"),
        ("y = __torch__.torch.classes.dist.Worker(1)", "uses '__torch__.torch.classes.dist"),
        ("y = torch.relu(", "cannot be checked"), ("y = torch.relu(x\0)", "cannot be checked"),
    ],
)  # fmt: skip
def test_source_of_a_script_that_nobody_can_write_in_python(line, what, tmp_path):
    source = script(Scripted().eval(), tmp_path / "t.pt")

    def change(entries):
        name = "code/__torch__/tests/test_trust.py"
        entries["CODE/__torch__/tests/test_trust.PY"] = re.sub(
            rb"( +)(return .*\n)", lambda m: m[1] + line.encode() + b"\n" + m[0], entries.pop(name)
        )

    path = changed(source, tmp_path / "evil.pt", change)
    with pytest.raises(UserError, match=f"evil.pt is not loaded.*{re.escape(what)}"):
        load_network(path, role="teacher")


def test_entries_whose_names_differ_in_case_only(tmp_path):
    source = script(Scripted().eval(), tmp_path / "t.pt")
    path = changed(source, tmp_path / "evil.pt", lambda entries: entries.update({"Version": b"3"}))
    with pytest.raises(UserError, match="evil.pt is not loaded.*entries of equal names"):
        load_network(path, role="teacher")


# -- folders of runs -------------------------------------------------------------------------------

CODE = """
import pathlib
import dafl_fast.models

pathlib.Path({ran!r}).touch()

def make(num_classes=10, channels=1):
    return dafl_fast.models.build("LeNet5Half", num_classes, channels)
"""
TINY = {
    "batch_size": 4, "generator_width": 4, "latent_dim": 4, "bank_images": 16, "precision": "fp32",
    "student_batch_size": 4, "student_updates": 1, "steps": 2, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A run's folder, the code that is its student, and the file that shows that the code ran."""
    folder = tmp_path_factory.mktemp("own")
    code, ran = folder / "nets.py", folder / "ran"
    code.write_text(CODE.format(ran=str(ran)))
    train(make_config("mnist", **TINY, student=f"{code}:make", out_dir=folder / "run"))
    assert ran.exists()
    return folder / "run", f"{code}:make", ran


@pytest.fixture
def strange(own_run):
    """The same, as in a process that has not imported the code."""
    folder, name, ran = own_run
    for module in [module for module in sys.modules if module.startswith("dafl_fast_nets_")]:
        del sys.modules[module]
    ran.unlink(missing_ok=True)
    return folder, name, ran


def test_a_folder_that_names_code(strange, tmp_path, monkeypatch, capsys):
    folder, name, ran = strange
    images = tmp_path / "images.npz"
    np.savez(images, images=np.zeros((4, 32, 32), np.uint8), labels=np.arange(4))
    commands = [
        (command, ["--resume", str(folder), "--steps", "3"], f"--student {name} or "),
        (command, ["mnist", "--teacher", str(folder), "--steps", "2"], ""),
        (export, [str(folder), "--format", "safetensors", "--out", str(tmp_path / "s")], ""),
        (evaluate, [str(folder), "--data", str(images)], ""),
        (evaluate, [str(folder), "--data", str(images), "--network", "torch.hub:load"], ""),
    ]
    for module, arguments, remedy in commands:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        assert module.main() == 2
        said = capsys.readouterr().err
        assert f"is the code {name}, which is not imported just because a folder names it" in said
        assert said.endswith(f"add {remedy}--trust-run\n")
        assert not ran.exists()
    for call in (
        lambda: open_run(folder),
        lambda: load_network(folder, role="teacher"),
        lambda: train(make_config("mnist", **TINY, student=name, resume=folder)),
    ):
        with pytest.raises(UserError, match="just because a folder names it"):
            call()
    assert not ran.exists()


def test_all_code_of_a_run_is_to_be_named(strange, tmp_path, monkeypatch, capsys):
    """Naming one of two networks would be answered by the same sentence again."""
    folder, name, ran = strange
    both = tmp_path / "run"
    shutil.copytree(folder, both)
    settings = (both / "config.yaml").read_text()
    other = name.replace(":make", ":other")
    (both / "config.yaml").write_text(
        "\n".join(f"teacher: {other}" if line.startswith("teacher:") else line
                  for line in settings.splitlines())
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train", "--resume", str(both), "--teacher", other])
    assert command.main() == 2
    said = capsys.readouterr().err
    assert said.endswith(f"add --teacher {other} --student {name} or --trust-run\n")
    assert not ran.exists()


@pytest.mark.parametrize(("student", "more"), [("nets:make", " --trust-run"), ("LeNet5Half", "")])
def test_the_hint_after_an_interruption_can_be_used(own_run, student, more):
    summary = json.loads((own_run[0] / "summary.json").read_text())
    said = describe({**summary, "student": student, "interrupted": True, "run": "runs/mine"})
    assert said.endswith(f"go on with: python -m dafl_fast.train --resume runs/mine{more}")


def test_a_folder_that_is_trusted(strange, tmp_path, monkeypatch):
    folder, name, ran = strange
    assert open_run(folder, Trust(run=True)).built() is not None
    assert load_network(folder, role="teacher", trust_run=True) is not None
    config = evaluate.EvaluateConfig(folder, network=name)
    assert evaluate._open(folder, name, "model", config).network is not None
    monkeypatch.setattr(sys, "argv", ["export", str(folder), "--trust-run", "--format",
                                      "safetensors", "--out", str(tmp_path / "s")])  # fmt: skip
    assert export.main() == 0
    assert ran.exists()


@pytest.mark.parametrize("word", ["--trust-run", "--student="])
def test_a_run_of_own_code_goes_on(word, strange):
    folder, name, _ = strange
    word = word + name if word.endswith("=") else word
    steps = 1 + json.loads((folder / "summary.json").read_text())["steps"]
    config = command.parse(["--resume", str(folder), "--steps", str(steps), word])
    assert train(config)["steps"] == steps
    assert "trust_run" not in (folder / "config.yaml").read_text()


def test_a_folder_cannot_trust_itself(strange, tmp_path):
    folder, *_ = strange
    values = yaml.safe_load((folder / "config.yaml").read_text())
    for word in ("trust_run", "trust_teacher", "resume"):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | {word: True}))
        with pytest.raises(UserError, match="is not the configuration of a run"):
            read_config(tmp_path)


def test_both_networks_must_be_named(strange, tmp_path):
    folder, name, ran = strange
    values = yaml.safe_load((folder / "config.yaml").read_text()) | {"teacher": "antigravity:x"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config = command.parse(["--resume", str(tmp_path), "--student", name])
    with pytest.raises(UserError, match="the teacher of the run in .* is the code antigravity:x"):
        load_networks(config)
    assert not ran.exists() and "antigravity" not in sys.modules


# -- sizes of tensors ------------------------------------------------------------------------------


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(60.0).view(5, 12))

    def forward(self, x):
        return x.flatten(1)[:, :12] @ self.weight.t()


@pytest.mark.parametrize("how", ["empty", "short", "larger", "offset", "stride"])
def test_a_script_whose_tensor_is_larger_than_its_file_is_not_loaded(how, tmp_path):
    """torch would read what lies behind it in memory, or crash."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Held()), tmp_path / "good.pt")

    def change(entries):
        numbers = {
            "empty": lambda: entries.update({"data/0": b""}),
            "short": lambda: entries.update({"data/0": entries["data/0"][:-4]}),
            # As integers of one byte in the pickle: sizes (5, 12), strides (12, 1).
            "larger": lambda: replaced(b"K\x05K\x0c", b"K\x05K\x7f"),
            "offset": lambda: replaced(b"K\x00(K\x05K\x0c", b"K\x01(K\x05K\x0c"),
            "stride": lambda: replaced(b"K\x0cK\x01", b"K\x7fK\x01"),
        }

        def replaced(old, new):
            assert old in entries["data.pkl"]
            entries["data.pkl"] = entries["data.pkl"].replace(old, new)

        numbers[how]()

    assert load_network(tmp_path / "good.pt", role="teacher") is not None
    path = changed(tmp_path / "good.pt", tmp_path / "t.pt", change)
    with pytest.raises(UserError, match=r"cannot be read: data\.pkl in it is damaged"):
        load_network(path, role="teacher")

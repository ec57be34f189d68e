"""The documents keep their word: what they print runs, their links and flags exist.

Every `sh` line and every `python` block of the documents is a test. Python runs as printed, and so
do the commands, but for shorter training, smaller batches and stand-ins for data sets that are not
there (`SHORTER`). A line that no rule below covers fails.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributed.run import parse_args

from dafl_fast import data, train
from dafl_fast.files import save_weights
from dafl_fast.models import NETWORKS, build
from dafl_fast.networks import load_network

from .conftest import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# What is appended to a command, where it overrides what was printed: the first entry that fits.
# Modules that are not named here run as printed.
_TINY = (
    "--generator-width 8 --batch-size 16 --student-batch-size 16 --student-updates 2 "
    "--bank-images 160"
)
SHORTER = {
    "train --resume": "--steps 6",
    "train --recipe": "--steps 2 --generator-width 8 --batch-size 16",
    "train": f"--steps 2 {_TINY}",
    "train_teacher": "--max-seconds 0.2 --batch-size 8",
    "reproduce ablation": "--max-seconds-per-run 0.2 --seeds 0 --only all",
    "reproduce": "--max-seconds-per-run 0.2 --seeds 0 --only dafl",
}
# Flags whose value is a data set: stand-ins in the workshop, or images that come with a package.
STAND_INS = {
    ("--eval", "mnist"): "mnist-5k",
    ("--eval", "cifar10"): "photos",
    ("--data", "cifar10"): "photos",
}
# Flags of other programs, and of tools, that the documents mention.
FOREIGN = {"--no-build-isolation", "--nproc-per-node", "--benchmark-only", "--seconds"}
# Commands that only a GPU, or a minute of compiling, could carry out are parsed and no more.
NOT_HERE = {"--compile", "--device cuda", "--cuda-graph on"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its document, the line where its text begins, its language and text."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text()
    return [
        Block(document, text.count("\n", 0, found.start()) + 2, found[1], found[2])
        for found in BLOCK.finditer(text)
    ]


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def commands() -> list:
    """Every line of every `sh` block, with its place as the test's name."""
    found = []
    for block in BLOCKS:
        if block.language != "sh":
            continue
        for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
            words = shlex.split(line, comments=True)
            if words:
                place = block.line + [*block.text.splitlines(), line].index(line)
                name = f"{block.document.name}:{place} {shlex.join(words)}"
                found.append(pytest.param(words, id=name))
    return found


# -- a folder in which the documents' files exist --------------------------------------------------


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Iterator[Path]:
    """The current directory of somebody who reads the documents: networks, data, a finished run."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DAFL_DATA", str(folder / "data"))
        # Its text file takes longer to read than the rest of a command here.
        patch.setattr(data, "_mnist_5k", functools.cache(data._mnist_5k))
        for block in PYTHON:  # "# mynets.py, in the current directory" is that file
            if name := re.match(r"# (\w+\.py)\b", block.text):
                Path(name[1]).write_text(block.text)
        for name in ("cat", "dog"):
            for split in ("train", "test"):
                Path("photos", split, name).mkdir(parents=True)
                for number in range(8):
                    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
                    Image.fromarray(pixels).save(Path("photos", split, name, f"{number}.png"))
        write_mnist(Path("data/MNIST/raw"))
        finished = "mnist --steps 4 --out-dir runs/mnist-fast-001 " + _TINY
        assert call("train", finished.split()) == 0
        yield folder


def write_mnist(folder: Path) -> None:
    """A tiny MNIST in its own format: digits of the bundled 5,000, each with one more grey pixel,
    so that none is taken for held out."""
    images, labels, _ = data.load("mnist-5k", "test")
    index = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:96]
    images, labels = images[index, 0].clone(), labels[index]
    images[:, 0, 0] = 1
    folder.mkdir(parents=True)
    for split, part in (("train", slice(0, 64)), ("t10k", slice(64, 96))):
        for name, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            sizes = np.array(array.shape, dtype=">i4").tobytes()
            head = bytes([0, 0, 8, array.dim()]) + sizes
            body = array.to(torch.uint8).numpy().tobytes()
            (folder / f"{split}-{name}-ubyte").write_bytes(head + body)


@pytest.fixture
def here(workshop, monkeypatch) -> Path:
    monkeypatch.chdir(workshop)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return workshop


@functools.cache
def run_python(block: Block) -> None:
    """Runs a block once, however many tests need it; trainings last a second instead."""
    if not re.match(r"# \w+\.py\b", block.text):
        for name in FOUND:
            if f'"{name}"' in block.text:
                provide(name)
        text = re.sub(r"max_seconds=\d+", "max_seconds=1", block.text)
        exec(compile(text, str(block), "exec"), {"__name__": "__main__"})


def found(name: str) -> None:
    """Makes what the readers of docs/teachers-found.md hold."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2),
        nn.Softmax(1),
    ).eval()  # fmt: skip
    if name == "bird-classifier":
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
        ResNetForImageClassification(config).save_pretrained(name)
        Path(name, "preprocessor_config.json").write_text(
            '{"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5], '
            '"image_std": [0.2, 0.2, 0.2]}'
        )
    elif name == "spam.safetensors":
        save_weights(Path(name), load_network("spam.py:Detector", role="student").state_dict())
    elif name == "gate.pt":
        torch.jit.trace(network, torch.randn(2, 3, 32, 32)).save(name)
    elif name == "pretrained.safetensors":
        timm = pytest.importorskip("timm")
        network = timm.create_model("test_resnet", num_classes=10)
        save_weights(Path(name), network.state_dict())
    else:
        pytest.importorskip("onnx")
        torch.onnx.export(network, (torch.randn(1, 3, 48, 192),), name, dynamo=False,
                          input_names=["x"], dynamic_axes={"x": {0: "N"}})  # fmt: skip


FOUND = ("bird-classifier", "spam.safetensors", "gate.pt", "pretrained.safetensors",
         "orientation.onnx", "student.onnx")  # fmt: skip


def provide(argument: str) -> None:
    """Makes the file that an argument names, if it is one that the documents take for granted."""
    argument = argument.removeprefix("transformers:")
    path = Path(argument)
    if argument.startswith("-") or path.exists():
        return
    if argument in FOUND:
        found(argument)
        return
    if path.parts[:1] == ("runs",):
        finished, run = Path("runs/mnist-fast-001"), Path(*path.parts[:2])
        if not run.exists():
            shutil.copytree(finished, run)
    elif path.suffix == ".jpg":
        Image.fromarray(torch.randint(256, (96, 128, 3), dtype=torch.uint8).numpy()).save(path)
    elif path.suffix == ".safetensors" and path.stem.startswith(("teacher", "my-")):
        assets = files("dafl_fast") / "assets"
        for suffix in (".safetensors", ".json"):
            shutil.copy(str(assets / "lenet5-mnist.safetensors").replace(".safetensors", suffix),
                        path.with_suffix(suffix))  # fmt: skip
    elif path.suffix in (".safetensors", ".pt", ".pt2"):
        known = {name.lower(): name for name in NETWORKS}
        if path.stem in known:
            save_weights(path, build(known[path.stem]).state_dict())
            return
        for block in PYTHON:  # the one that writes it
            if f'"{argument}"' in block.text:
                run_python(block)
                return
        pytest.fail(f"nothing in the documents makes {argument}, and no fixture does")


def call(module: str, arguments: list[str]) -> int:
    """`python -m dafl_fast.MODULE ARGUMENTS` in this process: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            code = importlib.import_module(f"dafl_fast.{module}").main()
        except SystemExit as stop:
            code = stop.code
    return code or 0


# -- one rule for each program ---------------------------------------------------------------------


def run_own(module: str, arguments: list[str]) -> None:
    """A command of this package, with less to do."""
    if "--help" in arguments:
        assert call(module, arguments) == 0
        return
    line = " ".join(arguments)
    if any(flag in line for flag in NOT_HERE):
        assert importlib.import_module(f"dafl_fast.{module}").parse(arguments)
        return
    for (flag, value), stand_in in STAND_INS.items():
        for index, argument in enumerate(arguments[:-1]):
            if (argument, arguments[index + 1]) == (flag, value):
                arguments = [*arguments[: index + 1], stand_in, *arguments[index + 2 :]]
    given_out = [arguments[i + 1] for i, word in enumerate(arguments) if word.startswith("--out")]
    for argument in arguments:
        if argument not in given_out:
            provide(argument)
    if given_out:  # so that no example spoils another's files
        elsewhere = tempfile.mkdtemp(dir=".")
        arguments = [f"{elsewhere}/{a}" if a in given_out else a for a in arguments]
    for which, shorter in SHORTER.items():
        name, *flag = which.split()
        if name == module and set(flag) <= set(arguments):
            arguments = [*arguments, *shorter.split()]
            break
    code = call(module, arguments)
    assert code == 0, shlex.join(arguments)


def run_torchrun(words: list[str]) -> None:
    """torchrun takes the line, and one process does what it starts; test_distributed has two."""
    parsed = parse_args(words[1:])
    assert parsed.module and parsed.training_script.startswith("dafl_fast.")
    run_own(parsed.training_script.removeprefix("dafl_fast."), parsed.training_script_args)


def check_make(words: list[str]) -> None:
    """make knows the target; it is not carried out."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    command = ["make", "-n", "-C", ROOT, "VENV=", f"PYTHON={sys.executable}", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def check_pip(words: list[str]) -> None:
    """pip is asked for this package with extras that it has, or for what it depends on."""
    project = (ROOT / "pyproject.toml").read_text()
    for word in words[2:]:
        if word.startswith("-"):
            assert word in FOREIGN, word
            continue
        name, _, extra = word.rstrip("]").partition("[")
        assert name in (".", "dafl_fast") or f'"{name}' in project, word
        for one in extra.split(",") if extra else []:
            assert re.search(rf"^{re.escape(one)} = \[", project, re.MULTILINE), word


def check(words: list[str]) -> None:
    """Finds the rule for a command line and applies it."""
    if words[:2] == ["python", "-m"] and words[2].startswith("dafl_fast."):
        run_own(words[2].removeprefix("dafl_fast."), words[3:])
    elif words[0] == "torchrun":
        run_torchrun(words)
    elif words[0] == "make":
        check_make(words)
    elif words[:2] == ["pip", "install"]:
        check_pip(words)
    elif words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[0] == "python" and (ROOT / words[1]).is_file():
        compile((ROOT / words[1]).read_text(), words[1], "exec")  # a script of the repository
    else:
        pytest.fail(f"no rule says how to check {shlex.join(words)!r}")


@pytest.mark.parametrize("words", commands())
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_command(words, here, monkeypatch):
    while "=" in words[0]:  # VARIABLE=value in front
        monkeypatch.setenv(*words[0].split("=", 1))
        words = words[1:]
    check(words)


def test_no_command_goes_unchecked():
    with pytest.raises(pytest.fail.Exception, match="no rule"):
        check(["curl", "https://example.org"])


@pytest.mark.parametrize("block", PYTHON, ids=str)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_python(block, here):
    run_python(block)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_exported_teachers_are_the_network(here):
    for path in ("teacher.safetensors", "teacher.pt2", "teacher-script.pt"):
        provide(path)
    x = torch.randn(16, 1, 32, 32)
    expected = load_network("LeNet5", "teacher.safetensors", role="teacher")(x)
    for path in ("teacher.pt2", "teacher-script.pt"):
        torch.testing.assert_close(load_network(path, role="teacher")(x), expected)


# -- what is said in passing -----------------------------------------------------------------------


@functools.cache
def known_flags() -> set[str]:
    """Flags of all commands of the package, by their help, and of the scripts beside it."""
    flags = set(FOREIGN)
    for path in (ROOT / "dafl_fast").glob("*.py"):
        if "def main(" in path.read_text():
            flags |= flags_of_command(path.stem)
    for path in [*(ROOT / "bench").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        flags |= set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text()))
    return flags


def flags_of_command(module: str) -> set[str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert call(module, ["--help"]) == 0
    return set(re.findall(r"--[a-z][\w-]*", printed.getvalue()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_exist(document):
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text()))
    assert mentioned <= known_flags()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = BLOCK.sub("", document.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    for target in {a or b for a, b in targets}:
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name) if name else document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_named_in_passing_exists(document):
    text = BLOCK.sub("", document.read_text())
    for target in re.findall(r"`make ([a-z][a-z-]*)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for module in re.findall(r"python -m dafl_fast\.(\w+)", text):
        assert (ROOT / "dafl_fast" / f"{module}.py").is_file(), module
    for path in re.findall(r"`((?:csrc|docs|bench|tests|tools|dafl_fast)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_every_block_has_a_language_that_is_checked():
    assert {block.language for block in BLOCKS} <= {"sh", "python", "math", ""}


def test_a_command_line_is_made_shorter():
    config = train.parse(["--steps", "2400", *SHORTER["train"].split()])
    assert (config.steps, config.batch_size) == (2, 16)

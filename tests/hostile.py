"""Hostile files, generated: every way of spoiling a file that we know, for every reader of files.

`folder_of_files` makes a folder with one good file of each kind. `READERS` says by name which file
of it a reader reads, and how. `spoiled` gives what may lie in that file's place. A new reader is
one more row of `READERS`, and meets everything at once.

    python -m tests.hostile [READER ...]               each input that does not end as it should
    python -m tests.hostile --fuzz SECONDS [READER ...]      good files changed at random
"""

from __future__ import annotations

import argparse
import ctypes
import io
import itertools
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

from dafl_fast import data
from dafl_fast import train as command
from dafl_fast.distill import train
from dafl_fast.engine.folder import RunFolder
from dafl_fast.engine.lock import locked
from dafl_fast.engine.loop import Loop
from dafl_fast.engine.prepare import prepare
from dafl_fast.engine.step import Step
from dafl_fast.errors import TrainingStopped, UserError, memory_is_full
from dafl_fast.export import export_student
from dafl_fast.files import save_checkpoint, save_weights, write_json
from dafl_fast.models import LeNet5
from dafl_fast.networks import load_network, load_networks, load_weights, open_file, open_run
from dafl_fast.pages import write_report
from dafl_fast.recipes import make_config
from dafl_fast.reproduce import ReproduceConfig, Reproduction
from dafl_fast.settings import Mark, plain
from dafl_fast.train_teacher import TeacherConfig, Training
from dafl_fast.train_teacher import train as train_teacher
from dafl_fast.unlabelled import read_images

SECONDS, BYTES = 10, 2**30  # that an input may take, beyond what it needs
TINY = {
    "batch_size": 4, "generator_width": 4, "latent_dim": 4, "bank_images": 16, "precision": "fp32",
    "student_batch_size": 4, "student_updates": 1, "steps": 2, "device": "cpu", "log_every": 1,
    "student": "LeNet5Half", "eval": "none",
}  # fmt: skip
CANARY = "canary"  # what code in a file would leave behind

# -- good files ------------------------------------------------------------------------------------


class Small(nn.Module):
    """A classifier with one layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def folder_of_files(folder: Path) -> Path:
    """Writes one good file of each kind that the package reads into `folder`."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    state = LeNet5().state_dict()
    save_weights(folder / "t.safetensors", state)
    write_json(folder / "t.json", {"mean": [0.1307], "std": [0.3081], "image_size": 32})
    torch.save({"state_dict": state, "epoch": 3}, folder / "t.pt")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    small, images = Small().eval(), torch.zeros(2, 3, 16, 16)
    shapes = ({0: torch.export.Dim("N")},)
    torch.export.save(
        torch.export.export(small, (images,), dynamic_shapes=shapes), folder / "t.pt2"
    )
    torch.jit.save(torch.jit.trace(small, images), folder / "script.pt")
    export_student(small, folder / "t.onnx", "onnx", image_shape=(3, 16, 16))
    pixels, labels = rng.integers(0, 256, (4, 32, 32), np.uint8), np.arange(4)
    np.savez(folder / "data.npz", images=pixels, labels=labels)
    for name in "ab":
        (folder / "images" / name).mkdir(parents=True)
        Image.fromarray(pixels[0]).save(folder / "images" / name / "0.png")
    train(make_config("mnist", **TINY, out_dir=folder / "run"), progress="off")
    _checkpoint_of_a_teacher(folder)
    _folder_of_transformers(folder / "hf")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 2, 28, 28) + bytes(1568))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 2) + bytes(2))
    write_json(folder / "run" / ".lock", {"process": 2**22 + 1, "machine": socket.gethostname()})
    result = {
        "accuracy": 0.5, "train_seconds": 1.0, "wall_seconds": 1.0, "images": 10, "row": "teacher",
        "seed": 0, "date": "2020-01-01", "precision": "fp32",
        "environment": {"gpu": None, "cpu": "some", "threads": 1, "torch": "2"},
    }  # fmt: skip
    write_json(folder / "reproduced" / "results" / "teacher-0.json", result)
    settings = plain(reproduced(folder), Mark.RESUMABLE)
    write_json(folder / "reproduced" / "settings.json", settings)
    return folder


def _checkpoint_of_a_teacher(folder: Path) -> None:
    config = teacher(folder)
    images, labels, _ = data.load(config.data, "train")
    form = data.FORMATS["mnist"]
    training = Training(LeNet5(), images, labels, form, config)
    save_checkpoint(folder / "teacher.checkpoint", training.state_dict())


def reproduced(folder: Path) -> ReproduceConfig:
    return ReproduceConfig(
        "mnist", only=("teacher",), out=folder / "reproduced", device="cpu", precision="fp32"
    )


def _folder_of_transformers(folder: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3,
        layer_type="basic",
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    write_json(
        folder / "preprocessor_config.json",
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size, "do_normalize": True},
    )


def teacher(folder: Path, resume: bool = False) -> TeacherConfig:
    """The training of a teacher, with a checkpoint beside its weights."""
    return TeacherConfig(
        data=str(folder / "data.npz"), out=folder / "teacher.safetensors", epochs=1, batch_size=2,
        save_every=1e-9, log_every=1, device="cpu", precision="fp32", eval="none", resume=resume,
        network="LeNet5",
    )  # fmt: skip


# -- readers ---------------------------------------------------------------------------------------


class Reader(NamedTuple):
    """A reader of `file`, which lies in the folder that it is given."""

    file: str
    read: Callable[[Path], object]


def _finite(network: nn.Module) -> None:
    for name, value in network.named_parameters():
        assert bool(value.isfinite().all()), f"{name} is not finite, without a word"


def _weights(file: str) -> Reader:
    return Reader(file, lambda f: _finite(load_weights(LeNet5(), f / file, "teacher")))


def _program(file: str) -> Reader:
    return Reader(file, lambda f: _finite(load_network(f / file, role="teacher")))


def _model(folder: Path) -> None:
    opened = open_file(folder / "t.safetensors", "model")
    assert opened.network is not None
    _finite(opened.network)
    if opened.std is not None:
        assert min(opened.std) > 0, "a deviation of zero, without a word"


def _run(folder: Path) -> None:
    opened = open_run(folder / "run")
    assert opened.network is not None
    _finite(opened.network)
    write_report(folder / "run")
    export_student(opened.network, folder / "out.safetensors", "safetensors", run=folder / "run")


def _resumed(folder: Path) -> None:
    train(command.parse(["--resume", str(_copied(folder)), "--steps", "3"]), progress="off")


def _restored(folder: Path) -> None:
    """As far as a resumed run goes before its first step."""
    copied = _copied(folder)
    config, teacher, student = load_networks(command.parse(["--resume", str(copied)]))
    if not _STEP:
        _STEP.append(prepare(config, teacher, student, torch.device("cpu"), "fp32"))
    Loop(config, _STEP[0], RunFolder(copied), teacher, None, [])


_STEP: list[Step] = []  # made once; every checkpoint is read into it


def _copied(folder: Path) -> Path:
    copied = folder / "again"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(folder / "run", copied, symlinks=True, copy_function=_linked)
    return copied


def _linked(source: str, target: str) -> None:
    """A copy; of what is no file, a second name, as no copy ends."""
    if Path(source).is_file():
        shutil.copyfile(source, target)
    else:
        os.link(source, target, follow_symlinks=False)


def _image(folder: Path) -> None:
    images = data.load(str(folder / "images"), "test", image_size=32, channels=1).images
    assert len(images) == 2


def _given(name: str) -> Callable[[Path], None]:
    """As --images has it."""
    form = data.Format(8, 1, (0.5,), (0.5,))

    def read(folder: Path) -> None:
        given = read_images([folder / name], form)
        assert len(given.photographs) + len(given.whole) > 0

    return read


def _npz(folder: Path) -> None:
    assert len(data.load(str(folder / "data.npz"), "test").images) > 0


def _lock(folder: Path) -> None:
    with locked(folder / "run" / ".lock", "the run is being trained"):
        pass  # and gone it is


def _transformers(folder: Path) -> None:
    _finite(load_network(f"transformers:{folder / 'hf'}", role="teacher"))


def _reproduced(folder: Path) -> None:
    reproduction = Reproduction(reproduced(folder))
    reproduction.run()
    reproduction.report()


READERS = {
    "weights": _weights("t.safetensors"),
    "checkpoint": _weights("t.pt"),
    "old checkpoint": _weights("old.pth"),
    "exported": _program("t.pt2"),
    "TorchScript": _program("script.pt"),
    "ONNX": _program("t.onnx"),
    "model": Reader("t.safetensors", _model),
    "note": Reader("t.json", _model),
    "npz": Reader("data.npz", _npz),
    "image": Reader("images/a/0.png", _image),
    "given image": Reader("images/a/0.png", _given("images/a/0.png")),
    "given npz": Reader("data.npz", _given("data.npz")),
    "MNIST": Reader(
        "MNIST/raw/t10k-images-idx3-ubyte", lambda folder: data.load("mnist", "test", folder)
    ),
    "MNIST labels": Reader(
        "MNIST/raw/t10k-labels-idx1-ubyte", lambda folder: data.load("mnist", "test", folder)
    ),
    "config": Reader("run/config.yaml", _resumed),
    "config of a student": Reader("run/config.yaml", _run),
    "checkpoint of a run": Reader("run/checkpoint.pt", _restored),
    "bank": Reader("run/bank/000000000-000000008.safetensors", _restored),
    "metrics": Reader("run/metrics.jsonl", _restored),
    "metrics of a report": Reader("run/metrics.jsonl", _run),
    "summary": Reader("run/summary.json", _run),
    "environment": Reader("run/environment.json", _run),
    "student": Reader("run/student.safetensors", _run),
    "sample": Reader("run/samples/step-0000002.png", _run),
    "lock": Reader("run/.lock", _lock),
    "checkpoint of a teacher": Reader(
        "teacher.checkpoint", lambda folder: train_teacher(teacher(folder, resume=True))
    ),
    "transformers": Reader("hf/config.json", _transformers),
    "transformers' weights": Reader("hf/model.safetensors", _transformers),
    "transformers' images": Reader("hf/preprocessor_config.json", _transformers),
    "reproduced": Reader("reproduced/results/teacher-0.json", _reproduced),
    "settings of reproduced": Reader("reproduced/settings.json", _reproduced),
}

# -- bad files -------------------------------------------------------------------------------------

Case = tuple[str, Callable[[Path], object]]  # a name, and what writes it to a path


class Evil:
    """An object whose unpickling leaves the canary."""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["HOSTILE_CANARY"]),)


def spoiled(file: Path, folder: Path, seed: int = 0) -> Iterator[Case]:
    """What may lie in the place of the good `file` of `folder`."""
    good = file.read_bytes()
    yield from _anything(good, random.Random(seed))
    others = {
        path.suffix or path.name: path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    for ending, other in others.items():
        if other != file:
            yield f"a good {ending}", _bytes(other.read_bytes())
    if zipfile.is_zipfile(file):
        yield from _archives(good, random.Random(seed))
    for endings, cases in _BY_ENDING.items():
        if str(file).endswith(endings):
            yield from cases(file)


def content(name: str, content: bytes) -> Case:
    """A case with that content."""
    return name, _bytes(content)


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _anything(good: bytes, draw: random.Random) -> Iterator[Case]:
    yield "nothing", lambda path: None
    yield "a folder", lambda path: path.mkdir()
    yield "a pipe", os.mkfifo
    yield "an endless device", lambda path: path.symlink_to("/dev/zero")
    yield "an empty device", lambda path: path.symlink_to("/dev/null")
    yield "a link to itself", lambda path: path.symlink_to(path.name)
    yield "a link to nothing", lambda path: path.symlink_to("nowhere")
    for name, content in {
        "nothing in it": b"",
        "one byte": good[:1],
        "zeros": bytes(1000),
        "noise": draw.randbytes(1000),
        "no UTF-8": b"\xff\xfe\x00 a: 1",
        "UTF-16": "a: 1".encode("utf-16"),
        "deep lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "a long line": b"a" * 3_000_000,
        "escape codes": b"\x1b[2J\x1b]0;owned\x07[red]x[/red][/]",
        "a pickle": pickle.dumps(Evil()),
        "a pickle of torch": _saved(Evil()),
        "an old pickle of torch": _saved({"state_dict": Evil()}, new=False),
        "twice": good + good,
        "more behind it": good + b"more",
        "something before it": b"more" + good,
    }.items():
        yield name, _bytes(content)
    for part in (0.1, 0.3, 0.5, 0.9, 0.99):
        yield f"{part:.0%} of it", _bytes(good[: int(part * len(good))])
    for number in range(24):
        yield f"bits flipped, {number}", _bytes(flipped(good, draw))


def flipped(good: bytes, draw: random.Random) -> bytes:
    """`good` with some bits, bytes or stretches changed; at its ends as often as elsewhere, as all
    headers and directories are there."""
    bad = bytearray(good)
    for _ in range(draw.choice((1, 1, 3, 20))):
        if len(bad) < 4:
            break
        near = draw.randrange(min(len(bad), 400))
        place = draw.choice((near, len(bad) - 1 - near, draw.randrange(len(bad))))
        change = draw.randrange(4)
        if change == 0:
            bad[place] ^= 1 << draw.randrange(8)
        elif change == 1:
            bad[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7D))
        elif change == 2:
            other = draw.randrange(len(bad))
            bad[place : place + 16], bad[other : other + 16] = (
                bad[other : other + 16], bad[place : place + 16],
            )  # fmt: skip
        elif len(bad) > 2:
            del bad[place : place + draw.choice((1, 8))]
    return bytes(bad)


def _saved(content: Any, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


# Places in an archive's directory.
_DIRECTORY = {
    4: "version", 6: "version", 8: "flags", 10: "method", 16: "CRC", 20: "size", 24: "size",
    28: "length of a name", 42: "place",
}  # fmt: skip


def _archives(good: bytes, draw: random.Random) -> Iterator[Case]:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]

    def packed(entries: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> Case:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", how) as archive:
            for name, content in entries:
                archive.writestr(name, content)
        return "", _bytes(buffer.getvalue())

    yield "an archive of nothing", packed([])[1]
    yield "a compressed archive", packed(entries, zipfile.ZIP_DEFLATED)[1]
    for index in sorted(draw.sample(range(len(entries)), min(12, len(entries)))):
        name, content = entries[index]
        rest = entries[:index] + entries[index + 1 :]
        yield f"without {name}", packed(rest)[1]
        yield f"empty {name}", packed([*rest, (name, b"")])[1]
        yield f"noise as {name}", packed([*rest, (name, draw.randbytes(64))])[1]
        yield f"a pickle as {name}", packed([*rest, (name, pickle.dumps(Evil()))])[1]
        yield f"{name} flipped", packed([*rest, (name, flipped(content + b"    ", draw))])[1]
        yield f"{name} has another's content", packed([*rest, (name, entries[0][1])])[1]
        yield f"{name} elsewhere", packed([*rest, (f"../../{name}", content)])[1]
    where = good.rindex(b"PK\x01\x02")
    for offset, what in _DIRECTORY.items():
        for value in (0x01, 0xFF):
            bad = bytearray(good)
            bad[where + offset] ^= value
            yield f"directory with another {what}, {offset} {value}", _bytes(bytes(bad))


_ODD: tuple[Any, ...] = (
    None, True, "x", "\x1b[2J[red]", -1, 0, 2**70, 1.5, float("inf"), float("nan"), [], {}, [[]],
    {"a": 1}, ["x", None], "y" * 2000,
)  # fmt: skip


def changed(content: Any, odd: tuple[Any, ...] = _ODD, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """`content` with each of its items, and theirs, lost or replaced by each of `odd`."""
    if depth == 0 or not isinstance(content, (dict, list)):
        return
    items = list(content.items() if isinstance(content, dict) else enumerate(content))
    for key, value in items:
        for instead in odd:
            new = type(content)(content)
            new[key] = instead
            yield f"{key} is {str(instead)[:20]!r}", new
        new = type(content)(content)
        del new[key]
        yield f"{key} is lost", new
        for what, inner in changed(value, odd[:12:3], depth - 1):
            new = type(content)(content)
            new[key] = inner
            yield f"{key}: {what}", new


def _few(cases: Iterator[tuple[str, Any]], most: int) -> list[tuple[str, Any]]:
    found = list(cases)
    return found if len(found) <= most else random.Random(0).sample(found, most)


def _text(content: Any) -> bytes:
    return json.dumps(content).encode()


def _json_cases(file: Path) -> Iterator[Case]:
    content = json.loads(file.read_text())
    for name, new in _few(changed(content), 150):
        yield name, _bytes(_text(new))
    yield "keys twice", _bytes(_text(content)[:-1] + b"," + _text(content)[1:])
    yield "long digits", _bytes(b'{"steps": ' + b"9" * 10_000 + b"}")
    for name in ("null", "[]", "1", '"x"', "NaN"):
        yield name, _bytes(name.encode())


def _line_cases(file: Path) -> Iterator[Case]:
    first, *rest = file.read_bytes().splitlines()
    for name, new in _few(changed(json.loads(first)), 80):
        yield name, _bytes(b"\n".join([_text(new), *rest, b""]))
    for name in (b"null", b"[]", b"{", b"1", b"", b"\xff}", b"{}", b"[" * 10**5 + b"}"):
        yield f"a line {name[:9]!r}", _bytes(b"\n".join([first, name, *rest, b""]))
    endless = b'{"step": ' + b"1" * 30_000_000 + b"}"
    yield "an endless line", _bytes(b"\n".join([first, endless, *rest, b""]))


def _yaml_cases(file: Path) -> Iterator[Case]:
    content = yaml.safe_load(file.read_text())
    for name, new in _few(changed(content), 250):
        yield name, _bytes(yaml.safe_dump(new).encode())
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    yield "aliases that multiply", _bytes("\n".join([*lines, "student: *a11"]).encode())
    yield "an alias of itself", _bytes(b"mean: &a [*a]")
    merged = ["- &m0 {x: 1}", *(f"- &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}"
                                for n in range(1, 9))]  # fmt: skip
    yield "merges that multiply", _bytes("\n".join(merged).encode())
    yield "an object", _bytes(b"student: !!python/object/apply:os.system ['touch x']")
    yield "two documents", _bytes(file.read_bytes() + b"---\n" + file.read_bytes())
    for name in ("null", "- 1", "1", "x", "? [a]\n: 1", "? {a: 1}\n: 1", "2020-01-01: 1", "1: 2"):
        yield name, _bytes(name.encode())


def _tensors(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """State dicts that a network does not have."""
    for index in (0, len(state) - 1):
        name, tensor = list(state.items())[index]
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        more = torch.cat([tensor, tensor]) if tensor.dim() else tensor.repeat(2)
        fewer = tensor[:-1] if tensor.dim() else tensor.repeat(3)
        nan, inf = tensor.clone(), tensor.clone()
        nan.view(-1)[0], inf.view(-1)[-1] = float("nan"), float("inf")
        for what, new in {
            "not a number": nan, "infinite": inf, "longer": more, "shorter": fewer,
            "of another dimension": tensor[None], "empty": tensor.flatten()[:0],
        }.items():  # fmt: skip
            yield f"{name} {what}", {**state, name: new}
        yield f"no {name}", {key: value for key, value in state.items() if key != name}
        yield f"one more {name}", {**state, f"{name}\x1b[2J": tensor.clone()}


def _safetensors_cases(file: Path) -> Iterator[Case]:
    from safetensors.torch import load_file, save_file

    for name, state in _tensors(load_file(file)):
        yield (
            name,
            lambda path, state=state: save_file(
                {key: value.contiguous() for key, value in state.items()}, path
            ),
        )
    yield "no tensors", lambda path: save_file({}, path)
    good = file.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header, content = json.loads(good[8 : 8 + length]), good[8 + length :]

    def packed(text: bytes, length: int | None = None) -> Callable[[Path], object]:
        return _bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)

    for name, new in _few(changed(header, _ODD[::2]), 40):
        yield f"header: {name}", packed(_text(new))
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        yield f"header of {length} bytes", packed(_text(header), length)


def _odd_tensors() -> dict[str, Any]:
    some = torch.ones(2, 3)
    return {
        "a sparse tensor": some.to_sparse(),
        "a tensor without memory": torch.empty(2, 3, device="meta"),
        "a quantised tensor": torch.quantize_per_tensor(some, 0.1, 0, torch.qint8),
        "a nested tensor": torch.nested.nested_tensor([some, some[:1]]),
        "a complex tensor": some.to(torch.complex64),
        "a tensor of bits": some.bool(),
        "a huge tensor of one number": torch.ones(1).expand(2**40),
        "a parameter": nn.Parameter(some),
    }


def _checkpoint_cases(file: Path) -> Iterator[Case]:
    content = torch.load(file, weights_only=True)
    new = zipfile.is_zipfile(file)
    round_about: dict[Any, Any] = {}
    round_about["state_dict"] = round_about
    for name, value in {
        "itself": round_about, "a list of itself": [round_about], "a tensor": torch.ones(3),
        "a list": [1, 2], "numbers as keys": {1: torch.ones(3)}, "pairs as keys": {(1, 2): 3},
        "None as a key": {None: torch.ones(2)}, "tensors as keys": {"x": {torch.ones(1): 1}},
        "nothing": {}, "text": "x",
        "long names": {"x" * 10_000 + "\x1b[2J": torch.ones(2)},
    }.items():  # fmt: skip
        yield f"a checkpoint: {name}", _bytes(_saved(value, new))
    odd = _odd_tensors()
    for what, tensor in odd.items():
        places = [{"state_dict": {"conv.weight": tensor}}, {"conv.weight": tensor}]
        if isinstance(content, dict):
            first = next(iter(content))
            places.append({**content, first: tensor})
        for number, place in enumerate(places):
            try:
                yield f"{what}, {number}", _bytes(_saved(place, new))
            except (RuntimeError, NotImplementedError):  # not to be had in this form
                continue
    for name, value in _few(changed(content, (*_ODD[::2], *odd.values()), 4), 100):
        try:
            yield name, _bytes(_saved(value, new))
        except (RuntimeError, NotImplementedError, TypeError):
            continue


def _image_cases(file: Path) -> Iterator[Case]:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    yield "EPS", _bytes(eps)
    yield "text that is long when unpacked", _bytes(_png(9, 9, _chunk(b"zTXt", b"a\0\0" + _LONG)))
    yield "a long profile", _bytes(_png(9, 9, _chunk(b"iCCP", b"a\0\0" + _LONG)))
    yield "1 x 200,000", lambda path: Image.new("L", (200_000, 1)).save(path, "png")
    yield "200,000 x 1", lambda path: Image.new("L", (1, 200_000)).save(path, "png")
    for width in (20_000, 60_000, 2**31 - 1):
        yield f"{width} x {width}", _bytes(_png(width, width))
    yield "no width", _bytes(_png(0, 9))
    for kind in ("gif", "ico", "pcx", "tga", "icns", "pdf", "sgi", "dds", "im", "msp"):
        how = "1" if kind == "msp" else "RGB"
        yield kind, lambda path, kind=kind, how=how: Image.new(how, (32, 32)).save(path, kind)
    for mode, kind in (("F", "tiff"), ("I", "tiff"), ("CMYK", "jpeg"), ("LA", "png"), ("P", "png")):
        yield (
            f"{mode} as {kind}",
            lambda path, mode=mode, kind=kind: Image.new(mode, (32, 32)).save(path, kind),
        )


def _onnx_cases(file: Path) -> Iterator[Case]:
    good = file.read_bytes()
    for name in (b"images", b"logits", b"Conv", b"weight"):
        for new in (b"\xf4" + name[1:], b"\x1b" + name[1:], name[:-1] + b"\n"):
            yield f"{name!r} as {new!r}", _bytes(good.replace(name, new))


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


_LONG = zlib.compress(bytes(80_000_000), 9)


def _png(width: int, height: int, more: bytes = b"") -> bytes:
    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + more + _chunk(b"IDAT", rows)
        + _chunk(b"IEND", b"")
    )  # fmt: skip


def _npz_cases(file: Path) -> Iterator[Case]:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    for what, new in {
        "labels of a billion": np.array([0, 1, 2, 10**9]),
        "labels beyond int64": np.array([0, 1, 2, 2**64 - 1], np.uint64),
        "labels below zero": np.array([0, 1, 2, -1]), "labels that are text": np.array(["a"] * 4),
        "labels of objects": np.array([{}, 1, 2, 3]), "one label": np.array(3),
        "labels that are no numbers": np.full(4, np.nan), "no labels": np.zeros((0,), int),
    }.items():  # fmt: skip
        yield what, lambda path, new=new: _npz_to(path, images=images, labels=new)
    for shape in ((4,), (4, 8), (4, 0, 8), (4, 8, 8, 0), (4, 8, 8, 65), (1,) * 30):
        new = np.zeros(shape, np.uint8)
        yield f"images {shape}", lambda path, new=new: _npz_to(path, images=new, labels=labels)
    for kind in ("f4", "i8", "?", "S3", "M8[s]", "c8", "f2"):
        new = np.zeros((4, 8, 8), kind)
        yield f"images of {kind}", lambda path, new=new: _npz_to(path, images=new, labels=labels)
    yield "an array by itself", lambda path: path.write_bytes(_npy(images))
    for shape in ("10**12,", "10**15, 8, 8", "-1, 8, 8", "2**62, 2**62", "'x'", "8.0, 8", "", "9,"):
        numbers = ", ".join(str(eval(part)) for part in shape.split(",") if part.strip())
        head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({numbers},)}}".encode()
        yield f"a header of {shape}", lambda path, head=head: _zip_to(path, _npy(images, head))
    yield (
        "a header of code",
        lambda path: _zip_to(path, _npy(images, b"__import__('os').system('touch x')")),
    )


def _npy(array: np.ndarray, head: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    if head is None:
        return buffer.getvalue()
    head += b" " * (64 - (len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + array.tobytes()


def _npz_to(path: Path, **arrays: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _zip_to(path: Path, images: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", images)
        archive.writestr("labels.npy", _npy(np.arange(4)))


_BY_ENDING: dict[tuple[str, ...], Callable[[Path], Iterator[Case]]] = {
    (".json", ".lock"): _json_cases,
    (".jsonl",): _line_cases,
    (".yaml",): _yaml_cases,
    (".safetensors",): _safetensors_cases,
    ("/t.pt", ".pth", "checkpoint.pt", ".checkpoint"): _checkpoint_cases,
    (".png",): _image_cases,
    (".npz",): _npz_cases,
    (".onnx",): _onnx_cases,
}

# -- trying ----------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """Not an Exception, which a reader would turn into a sentence."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raises TooSlow after `SECONDS`, and lets no more memory be asked for than a few times `BYTES`
    above what there is."""

    def late(number: int, frame: object) -> None:
        raise TooSlow

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * BYTES, hard))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Cost(NamedTuple):
    """What an input took: seconds, and bytes of memory above what there was before."""

    seconds: float = 0.0
    memory: int = 0

    def most(self, other: Cost) -> Cost:
        return Cost(max(self.seconds, other.seconds), max(self.memory, other.memory))


def _memory(name: str) -> int:
    """Of this process, in bytes: what it has (VmRSS), or the most it had (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def measured(read: Callable[[], object]) -> tuple[str, str, Cost]:
    """How a reader ends: "read", "refused" in one sentence, or "bad"; what it said and took."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts again
    Path("/proc/self/clear_refs").write_text("5")  # the most is measured anew
    before, start = _memory("VmRSS"), time.monotonic()
    how, said = _verdict(read)
    cost = Cost(time.monotonic() - start, _memory("VmHWM") - before)
    if cost.memory > BYTES:
        how, said = "bad", f"it took {cost.memory / 1e9:.1f} GB"
    return how, said, cost


def _verdict(read: Callable[[], object]) -> tuple[str, str]:
    printed = io.StringIO()
    try:
        with bounded(), redirect_stdout(printed):
            read()
        said = ("read", "")
    except (UserError, TrainingStopped) as error:
        said = ("refused", str(error))
        if fault := fault_of(str(error)):
            said = ("bad", f"{fault}: {str(error)[:300]!r}")
    except (MemoryError, RuntimeError) as error:
        # Of which a command makes a sentence.
        said = ("refused" if memory_is_full(error) else "bad", f"{type(error).__name__}: {error}")
    except TooSlow:
        said = ("bad", f"it took more than {SECONDS} s")
    except BaseException as error:
        said = ("bad", f"{type(error).__name__}: {str(error)[:300]}")
    if "Error" in printed.getvalue():  # of a library
        said = ("bad", f"it printed {printed.getvalue()[:300]!r}")
    return said


def fault_of(message: str) -> str:
    """What is wrong with a message to the user; nothing if it is one sentence."""
    if not message.strip():
        return "empty"
    if not message.isprintable():
        return "not printable"
    if "weights_only=False" in message or "Traceback" in message:
        return "torch's own words"
    return "long" if len(message) > 1100 else ""


def tried(
    reader: Reader, folder: Path, cases: Iterator[Case], keep: Path | None = None
) -> Iterator[tuple[str, str, str, Cost]]:
    """Each case's name and how it was `measured`. The good file is there again afterwards. What
    ends badly is copied to `keep`; there is the newest one too, in case that it ends the process.
    """
    file = folder / reader.file
    kept = folder / "kept"
    file.rename(kept)
    try:
        for name, write in cases:
            write(file)
            newest = None if keep is None else keep / "newest"
            if newest is not None and file.is_file():
                shutil.copyfile(file, newest)
            how, said, cost = measured(lambda: reader.read(folder))
            if newest is not None and how == "bad" and file.is_file():
                shutil.copyfile(file, newest.with_name(f"{reader.file} {name}".replace("/", "_")))
            yield name, how, said, cost
            _remove(file)
    finally:
        _remove(file)
        kept.rename(file)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def fuzzed(good: bytes, draw: random.Random) -> Iterator[Case]:
    """The good file, changed at random, for ever."""
    for number in itertools.count():
        bad = good
        for _ in range(draw.choice((1, 1, 2, 5))):
            bad = flipped(bad, draw)
        yield content(str(number), bad)


def _in_time(cases: Iterator[Case], seconds: float) -> Iterator[Case]:
    start = time.monotonic()
    return itertools.takewhile(lambda _: time.monotonic() - start < seconds, cases)


def _at_most(cost: Cost) -> str:
    return f"at most {cost.seconds:.1f} s and {cost.memory / 1e6:,.0f} MB each"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile")
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(READERS)}; all by default")
    parser.add_argument("--fuzz", type=float, metavar="SECONDS", help="that are shared by them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that end badly")
    asked = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    os.fsync = lambda handle: None  # type: ignore[assignment]  # which is half of the time
    torch.set_num_threads(1)
    names, counts, highest = asked.readers or list(READERS), Counter[str](), Cost()
    with tempfile.TemporaryDirectory() as place:
        os.environ["HOSTILE_CANARY"] = str(Path(place) / CANARY)
        folder = folder_of_files(Path(place))
        for name in names:
            reader, here, most = READERS[name], Counter[str](), Cost()
            file = folder / reader.file
            cases = iter(list(spoiled(file, folder, asked.seed)))
            if asked.fuzz is not None:
                draw = random.Random(f"{name} {asked.seed}")
                cases = _in_time(fuzzed(file.read_bytes(), draw), asked.fuzz / len(names))
            for case, how, said, cost in tried(reader, folder, cases, asked.keep):
                here[how] += 1
                most = most.most(cost)
                if how == "bad":
                    print(f"  {name}: {case}: {said}")
            counts, highest = counts + here, highest.most(most)
            print(f"{name}: {dict(here)}, {_at_most(most)}", flush=True)
        ran = Path(os.environ["HOSTILE_CANARY"]).exists()
    print(
        f"{counts.total()} inputs: {dict(counts)}, {_at_most(highest)}; "
        f"code was {'run' if ran else 'not run'}"
    )
    return bool(counts["bad"] or ran)


if __name__ == "__main__":
    sys.exit(main())

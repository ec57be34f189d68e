"""Sentences about networks and settings that do not go together, each said and not said."""

from __future__ import annotations

import logging
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dafl_fast import device as device_module
from dafl_fast import distill, notices
from dafl_fast.device import computes_in, pick_precision
from dafl_fast.engine.checks import check_answers
from dafl_fast.engine.distributed import World
from dafl_fast.engine.prepare import prepare
from dafl_fast.errors import TrainingStopped, UserError
from dafl_fast.models import build
from dafl_fast.notices import give_notice, smaller_network
from dafl_fast.recipes import make_config

CPU = torch.device("cpu")
SMALL = dict(
    image_shape=(3, 8, 8), batch_size=16, generator_width=8, student_batch_size=16,
    student_updates=1, bank_images=64, log_every=1, precision="fp32", bn_statistics=0.0, steps=2,
    adapt=False,
)  # fmt: skip
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """A small convolutional network; `dropout` is live in evaluation too, as F.dropout(x, p) is."""

    def __init__(self, classes: int = 5, dropout: float = 0.0, track: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, track_running_stats=track)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)
        self.dropout = dropout

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        x = F.dropout(x, self.dropout) if self.dropout else self.drop(x)
        return self.head(x)


def warnings_of(caplog) -> list[str]:
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


def step_of(teacher: nn.Module, student: nn.Module, **settings):
    config = make_config("custom", **{**SMALL, **settings})
    return config, prepare(config, teacher, student, CPU, config.precision)


def said(caplog, teacher: nn.Module, student: nn.Module, **settings) -> list[str]:
    """What `give_notice` says of them."""
    config, step = step_of(teacher, student, **settings)
    caplog.clear()
    give_notice(config, teacher, step)
    return warnings_of(caplog)


# -- answers that differ ---------------------------------------------------------------------------


def test_a_teacher_that_answers_differently_each_time_is_refused(tmp_path):
    for dropout in (0.5, 0.05):
        torch.manual_seed(0)
        teacher = Network(dropout=dropout)
        with pytest.raises(UserError) as refused:
            distill(teacher, Network(), out_dir=tmp_path / "run", **SMALL)
        found = re.fullmatch(
            r"the teacher answers differently when it is asked twice about the same images "
            r"\(logits differ by up to ([\d.e-]+)\): something random runs in evaluation too, "
            r"such as F.dropout\(x, 0.5\), which needs training=self.training",
            str(refused.value),
        )
        with torch.no_grad():
            calls = torch.stack([teacher.eval()(IMAGES) for _ in range(50)])
        assert 0 < float(found[1]) < 3 * float(calls.amax(0).sub(calls.amin(0)).max())
    assert not (tmp_path / "run").exists()


def test_dropout_that_evaluation_switches_off_is_fine(tmp_path, caplog):
    result = distill(Network(), Network(), out_dir=tmp_path / "run", **SMALL)
    assert result.summary["steps"] == 2
    assert warnings_of(caplog) == []


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_rounding_is_no_difference(caplog):
    """Neither that of every call, nor that of the first calls of a program, which optimises."""

    class Rounding(nn.Module):
        def __init__(self, *shares: float) -> None:
            super().__init__()
            self.network, self.shares = Network().eval(), list(shares)

        def forward(self, x):
            share = self.shares.pop(0) if len(self.shares) > 1 else self.shares[0]
            return self.network(x) * (1 + share)

    check_answers(Rounding(0, 5e-4, 0, 5e-4), IMAGES)
    check_answers(Rounding(0.01, 0, 0), IMAGES)
    check_answers(Rounding(0.01, 0, 0).bfloat16(), IMAGES.bfloat16())
    check_answers(torch.jit.trace(Network().eval(), IMAGES), IMAGES)
    assert warnings_of(caplog) == []
    with pytest.raises(UserError, match="answers differently when it is asked twice"):
        check_answers(Rounding(0.01, 0, 0.01, 0), IMAGES)


def test_asking_twice_changes_nothing_that_is_drawn():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_answers(Network().eval(), IMAGES)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), before)
    states = []
    for check in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not check:
                patch.setattr("dafl_fast.engine.prepare.check_answers", lambda *_: None)
            step_of(Network(), Network())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_an_answer_that_depends_on_the_batch_is_worth_a_word(tmp_path, caplog):
    result = distill(Network(track=False), Network(), out_dir=tmp_path / "run", **SMALL)
    (sentence,) = warnings_of(caplog)
    assert result.summary["steps"] == 2
    found = re.match(
        r"the teacher's answer for an image depends on the other images of the batch \(logits "
        r"differ by up to ([\d.]+)\), as with BatchNorm that has no running statistics; ",
        sentence,
    )
    assert float(found[1]) > 0

    class Stubborn(Network):
        """Ignores eval(), so that its BatchNorm goes by the batch."""

        def train(self, mode=True):
            super().train(True)
            self.drop.eval()
            return self

    caplog.clear()
    check_answers(Stubborn().eval(), IMAGES)
    assert "depends on the other images of the batch" in caplog.text


def test_a_network_that_takes_one_number_of_images_is_not_asked_about_fewer(caplog):
    class Sixteen(nn.Module):
        def forward(self, x):
            return x.reshape(16, 192)[:, :5]

    check_answers(Sixteen(), IMAGES)
    assert warnings_of(caplog) == []


# -- sizes -----------------------------------------------------------------------------------------


def test_a_student_larger_than_its_teacher(caplog):
    small, large = Network(), nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    assert said(caplog, small, large) == [
        "the student is larger than the teacher, 965 parameters against 285; give it a smaller one"
    ]
    assert said(caplog, large, small) == []
    assert said(caplog, small, Network()) == [], "as large is not larger"


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_of_a_frozen_torchscript_the_size_is_not_known(caplog):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    program = torch.jit.freeze(torch.jit.trace(network, torch.randn(2, 3, 8, 8)))
    assert not list(program.parameters())
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    assert not [line for line in said(caplog, program, student) if "larger" in line]


def test_a_students_size_counts_when_its_lazy_layers_have_theirs(caplog):
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    (sentence,) = said(caplog, Network(), lazy)
    assert "965 parameters against 285" in sentence


@pytest.mark.parametrize(
    ("preset", "student", "who", "remedy"),
    [
        ("cifar10", "ResNet18", "student ResNet18 of the preset cifar10", ", such as ResNet8"),
        ("cifar10", "ResNet34", "student ResNet34", ", such as ResNet8"),
        ("custom", "timm:x", "student timm:x", ", such as ResNet8"),
    ],
)
def test_a_named_student_has_a_smaller_one_named_instead(caplog, preset, student, who, remedy):
    teacher = build("ResNet20")  # of 272,474 parameters
    with torch.device("meta"):
        large = build("ResNet18")
    config = make_config(preset, student=student, image_shape=(3, 32, 32), steps=1)
    step = type("Step", (), dict(student=large, num_classes=10, device=CPU, precision="fp32"))
    give_notice(config, teacher, step)
    assert warnings_of(caplog) == [
        f"the {who} is larger than the teacher, 11,173,962 parameters against 272,474; name a "
        f"smaller one with --student{remedy}"
    ]


def test_the_network_to_propose():
    parameters = {
        name: sum(p.numel() for p in build(name).parameters())
        for name in ("ResNet8", "ResNet8Slim", "WRN-16-1")
    }
    # At most half as large, else at least smaller, else none; and for such images.
    assert smaller_network(2 * parameters["ResNet8"], 10, (3, 32, 32)) == "ResNet8"
    assert smaller_network(2 * parameters["WRN-16-1"], 10, (3, 64, 64)) == "WRN-16-1"
    assert smaller_network(2 * parameters["ResNet8"] - 1, 10, (3, 32, 32)) == "ResNet8Slim"
    assert smaller_network(parameters["ResNet8Slim"] + 1, 10, (3, 32, 32)) == "ResNet8Slim"
    assert smaller_network(parameters["ResNet8Slim"], 10, (3, 32, 32)) is None
    assert smaller_network(61_706, 10, (1, 32, 32)) == "ResNet8Slim"
    assert smaller_network(61_706, 10, (1, 64, 64)) == "ResNet8Slim"
    assert smaller_network(10**7, 1000, (4, 32, 32)) == "WRN-40-2"


# -- batches and precision -------------------------------------------------------------------------


def test_fewer_images_than_classes(caplog):
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 17))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 17))
    assert said(caplog, teacher, student, bn_statistics=0.0) == [
        "a batch of 16 images cannot show all of 17 classes, which the entropy loss asks for; give "
        "--batch-size at least 17"
    ]
    assert said(caplog, teacher, student, batch_size=17) == []
    assert said(caplog, teacher, student, entropy=0.0) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_processor_imitates(caplog, monkeypatch, precision):
    monkeypatch.setattr(notices.platform, "machine", lambda: "x86_64")
    for native in (False, True):
        monkeypatch.setattr(notices, "computes_in", lambda p, d, native=native: native)
        sentence = (
            f"this processor has no {precision} arithmetic and imitates it, which is slower than "
            "fp32; use --precision fp32"
        )
        expected = [] if native else [sentence]
        assert said(caplog, Network(), Network(), precision=precision) == expected
        assert said(caplog, Network(), Network()) == []
    monkeypatch.setattr(notices, "computes_in", lambda *_: False)
    monkeypatch.setattr(notices.platform, "machine", lambda: "aarch64")
    assert said(caplog, Network(), Network(), precision=precision) == [], "nobody knows"
    config, step = step_of(Network(), Network(), precision=precision)
    step.device = torch.device("cuda", 0)
    give_notice(config, Network(), step)
    assert f"this GPU has no {precision} arithmetic" in caplog.text


def test_auto_and_the_notice_ask_the_same(monkeypatch):
    available = ["baseline", "avx2", "avx512"]
    monkeypatch.setattr(
        device_module, "build_info", lambda: {"isa": available[-1], "isa_available": available}
    )
    for bf16, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert computes_in("bf16", CPU) is (bf16 or amx)
        assert pick_precision("auto", CPU) == ("bf16" if bf16 or amx else "fp32")
    monkeypatch.setattr(  # DAFL_FAST_ISA=avx2
        device_module, "build_info", lambda: {"isa": "avx2", "isa_available": available}
    )
    assert not computes_in("bf16", CPU)
    assert computes_in("fp16", CPU) in (True, False)
    gpu = torch.device("cuda", 0)
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        assert computes_in("bf16", gpu) is native
        assert pick_precision("auto", gpu) == ("bf16" if native else "fp32")
        assert computes_in("fp16", gpu)


@pytest.mark.parametrize("first", [True, False])
def test_one_process_speaks_for_all(tmp_path, monkeypatch, capsys, caplog, first):
    def stop(*_):
        raise TrainingStopped("far enough")

    monkeypatch.setattr(World, "first", first)
    monkeypatch.setattr(sys.modules[distill.__module__], "Loop", stop)
    with pytest.raises(TrainingStopped):
        distill(Network(17), Network(17), out_dir=tmp_path / "run", **SMALL)
    assert capsys.readouterr().err.startswith("distilling Network ") is first
    assert ("cannot show all of 17 classes" in caplog.text) is first

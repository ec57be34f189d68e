"""Students prepared for quantisation (torch.ao.quantization) train, and can then be converted."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from dafl_fast.engine.checks import check_student
from dafl_fast.errors import UserError

from .test_containers import Small, run
from .test_teacher import randomised

quantization = pytest.importorskip("torch.ao.quantization")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.second, self.head = nn.Conv2d(8, 8, 3, 2), nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(self.quant(x))))
        return self.dequant(self.head(self.second(x).mean((2, 3))))


def prepared(observer: str) -> nn.Module:
    network = Quantised().train()
    quantization.fuse_modules_qat(network, [["conv", "norm", "relu"]], inplace=True)
    q = quantization
    # Activations of 7 bits, as in PyTorch's own configuration for x86: sums of products of 8-bit
    # numbers overflow on processors without VNNI.
    reduced = {"reduce_range": True}
    network.qconfig = {
        # Per-channel observers get their shape from the first batch.
        "fused, per channel": q.QConfig(
            q.default_fused_act_fake_quant.with_args(**reduced),
            q.default_fused_per_channel_wt_fake_quant,
        ),
        "per channel": q.QConfig(
            q.FakeQuantize.with_args(observer=q.MinMaxObserver, **reduced),
            q.default_per_channel_weight_fake_quant,
        ),
        "histogram": q.QConfig(
            q.FakeQuantize.with_args(observer=q.HistogramObserver, **reduced),
            q.default_weight_fake_quant,
        ),
    }[observer]
    return quantization.prepare_qat(network)


@pytest.fixture
def quantised_engine():
    before = torch.backends.quantized.engine
    supported = torch.backends.quantized.supported_engines
    found = [name for name in ("x86", "qnnpack") if name in supported]
    if not found:
        pytest.skip("this PyTorch has no quantised operators")
    torch.backends.quantized.engine = found[0]
    yield
    torch.backends.quantized.engine = before


@pytest.mark.parametrize("observer", ["fused, per channel", "per channel", "histogram"])
def test_a_student_prepared_for_quantisation(observer, quantised_engine, tmp_path):
    teacher, student = randomised(Small()).eval(), prepared(observer)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    result = run(teacher, student, tmp_path)
    after = student.state_dict()
    lows = [name for name in after if name.endswith("min_val")]
    assert len(lows) == 7
    for name in lows:
        assert after[name].isfinite().all()
        assert not torch.equal(after[name], before[name])
    x = torch.randn(16, 3, 32, 32)
    for network in (student, result.student):
        simulated = copy.deepcopy(network).eval()
        simulated.apply(quantization.disable_observer)
        expected = simulated(x)
        converted = quantization.convert(simulated)
        assert type(converted.second).__module__.startswith("torch.ao.nn.quantized")
        assert (converted(x) - expected).abs().max() < 0.1 * expected.abs().max()
    resumed = run(teacher, prepared(observer), tmp_path, resume=result.folder, steps=6)
    assert resumed.summary["steps"] == 6


def test_a_student_prepared_by_fx(quantised_engine, tmp_path):
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    config = quantization.QConfigMapping().set_global(prepared("fused, per channel").qconfig)
    student = quantize_fx.prepare_qat_fx(Quantised().train(), config, (torch.randn(2, 3, 32, 32),))
    result = run(randomised(Small()).eval(), student, tmp_path)
    converted = quantize_fx.convert_fx(result.student)
    assert converted(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_observers_see_the_images_of_training_only(tmp_path):
    student = prepared("per channel")
    seen = []
    for images in (torch.randn(8, 3, 32, 32), 100 * torch.randn(8, 3, 32, 32)):
        torch.manual_seed(0)
        network = copy.deepcopy(student)
        folder = tmp_path / str(len(seen))
        loader = [(images, torch.zeros(8, dtype=torch.long))]
        result = run(randomised(Small()).eval(), network, folder, eval_loader=loader)
        lows = {n: b for n, b in result.student.named_buffers() if n.endswith("min_val")}
        seen.append(lows)
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(low, seen[1][name]) for name, low in seen[0].items())
    # What the copy in the result was compared with leaves no trace either.
    assert all(torch.equal(b, lows[n]) for n, b in network.named_buffers() if n in lows)
    check_student(student, 1000 * torch.randn(2, 3, 32, 32), 5)
    assert student.quant.activation_post_process.activation_post_process.min_val == float("inf")
    assert student.second.weight_fake_quant.scale.shape == (8,)


def test_quantisation_is_simulated_in_fp32(tmp_path, monkeypatch, caplog):
    student = prepared("fused, per channel")
    with pytest.raises(UserError, match="precision must be fp32 for a student that is prepared"):
        run(Small(), student, tmp_path, precision="bf16")
    module = sys.modules["dafl_fast.distill"]
    monkeypatch.setattr(module, "pick_precision", lambda name, device: "bf16")
    assert run(Small(), student, tmp_path).summary["precision"] == "fp32"
    assert "the student is prepared for quantisation: all is computed in float32" in caplog.text

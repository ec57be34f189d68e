"""The step as a CUDA graph: equal to the ordinary step, random numbers included; and, on any
machine, that warming up for it leaves no trace."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from torch import nn

from dafl_fast.engine import graph
from dafl_fast.errors import UserError
from dafl_fast.losses import distill_loss

from .conftest import NO_GPU
from .test_step import assert_same_weights, make_step

GPU = [pytest.mark.gpu, NO_GPU]
FAST = dict(
    student_updates=3, student_batch_size=8, bank_images=40, ema_decay=0.9, bank_crop=1,
    generator_restart_every=7,
)  # fmt: skip
RECIPES = {"fast": FAST, "published": {}, "paper": {}}


def everything(step):
    state = copy.deepcopy(step.state_dict())
    if step.bank is not None:
        state["bank"] = step.bank.span(0, step.bank.capacity)
    return state


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
    else:
        yield path, value


def assert_same(one, other):
    for (path, mine), (_, theirs) in zip(leaves(one), leaves(other), strict=True):
        same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert same, path


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("steps_before", [0, 2, 5])
@pytest.mark.parametrize("recipe", RECIPES)
def test_warming_up_leaves_no_trace(device, recipe, steps_before, precision):
    step = make_step(recipe, torch.float32, precision, device, **RECIPES[recipe])
    if step.bank is not None:  # what was never written may hold NaN
        step.bank.restore(0, {k: torch.zeros_like(v) for k, v in step.bank.span(0, 40).items()})
    for _ in range(steps_before):
        step()
    before = everything(step)
    newest = step.newest
    with graph.unchanged(step, 3):
        for _ in range(3):
            step.body()
        changed = everything(step)
    assert_same(everything(step), before)
    assert step.newest is newest
    assert not torch.equal(changed["student"]["fc2.weight"], before["student"]["fc2.weight"])


def test_the_state_is_written_in_place(device):
    """Resuming and stepping keep every tensor where a graph would have it."""
    step = make_step("fast", torch.float32, device=device, **FAST)

    def places_of(step):
        found = [value for _, value in leaves(step.state_dict()) if isinstance(value, torch.Tensor)]
        # Not the states of random number generators, which are copies.
        return [t.data_ptr() for t in (*found, step.bank.count) if t.dtype != torch.uint8]

    places = places_of(step)
    for _ in range(8):  # past a restart of the generator
        step()
    step.load_state_dict(copy.deepcopy(step.state_dict()))
    step.set_student_lr(1e-4)
    assert places_of(step) == places


def test_no_garbage_is_collected_inside():
    with graph.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with graph.uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("cleared", [False, True])
def test_the_pool_of_a_failed_capture_is_given_back_once(monkeypatch, cleared):
    """Also with a torch that has done so itself, and says that there is no such pool."""
    calls = []

    def end(device, pool):
        if cleared:
            raise RuntimeError("not recording to this pool")
        calls.append(("end", device, pool))

    release = lambda device, pool: calls.append(("release", device, pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    graph.release((0, 3), 1)
    assert calls == ([] if cleared else [("end", 1, (0, 3)), ("release", 1, (0, 3))])


def test_without_a_gpu_there_is_a_reason():
    for wanted, reason in (("auto", "the device is cpu"), ("off", "--cuda-graph off")):
        step = make_step("published", cuda_graph=wanted)
        assert graph.compile_and_capture(step) == reason
        assert step.run == step.body
    with pytest.raises(UserError, match="--cuda-graph on: .* the device is cpu"):
        graph.compile_and_capture(make_step("published", cuda_graph="on"))


@pytest.mark.parametrize(
    "precision", [pytest.param(p, marks=GPU) for p in ("fp32", "bf16", "fp16")]
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_fifty_replays_equal_fifty_steps(recipe, precision):
    """To rounding: cuDNN's weight gradients may add in another order."""
    device = torch.device("cuda")
    torch.backends.cudnn.deterministic = True
    one, two = (
        make_step(
            recipe,
            torch.float32,
            precision,
            device,
            cuda_graph="on",
            generator_lr=1e-3,
            **RECIPES[recipe],
        )
        for _ in range(2)
    )
    assert graph.compile_and_capture(two) is None
    images = []
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    for number in range(50):
        learn = recipe != "fast" or number >= 3  # before the student begins there are no replays
        one.set_student_lr(1e-3)
        two.set_student_lr(1e-3)
        one(learn)
        two(learn)
        torch.testing.assert_close(*(x.newest[0] for x in (one, two)), rtol=0.1, atol=0.1)
        images.append(two.newest[0].clone())
    assert_same_weights(one.averaged_student, two.averaged_student, tolerance)
    assert_same_weights(one.generator, two.generator, tolerance)
    torch.testing.assert_close(one.statistics, two.statistics, rtol=tolerance, atol=tolerance)
    assert torch.equal(one.random.get_state(), two.random.get_state())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(images))


@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=GPU)])
def test_an_overflow_in_a_replay_skips_the_update(precision):
    device = torch.device("cuda")
    step = make_step("published", torch.float32, precision, device, cuda_graph="on")
    assert graph.compile_and_capture(step) is None
    step()
    before = copy.deepcopy(step.student.state_dict())
    for scaler in step.scalers:
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    step()
    for scaler in step.scalers:
        assert scaler.get_scale() == 2.0**39
    for name, parameter in step.student.named_parameters():
        assert torch.equal(parameter, before[name])


class Waits(nn.Module):
    """A student that asks the device for a number, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1024, 10)

    def forward(self, x):
        return self.fc(x.flatten(1) * (1.0 if x.sum().item() > 0 else 2.0))


def test_a_capture_that_fails_without_a_word_has_a_reason(monkeypatch):
    def failing(step):
        raise RuntimeError

    monkeypatch.setattr(graph, "reason_not_captured", lambda *_: None)
    monkeypatch.setattr(graph, "capture", failing)
    assert graph.compile_and_capture(make_step("published", torch.float32)) == "RuntimeError"


@pytest.mark.parametrize("wanted", [pytest.param(w, marks=GPU) for w in ("auto", "on")])
def test_what_cannot_be_captured_runs_step_by_step(wanted, caplog):
    device = torch.device("cuda")
    step = make_step("published", torch.float32, device=device, cuda_graph=wanted)
    step.student = step._student = Waits().to(device)
    step.student_optimizer = torch.optim.SGD(step.student.parameters(), lr=0.1)
    if wanted == "on":
        with pytest.raises(UserError, match="cannot be captured"):
            graph.compile_and_capture(step)
        return
    reason = graph.compile_and_capture(step)
    assert reason is not None
    assert f"no CUDA graph: {reason}" in caplog.text
    before = step.student.fc.weight.clone()
    step()
    assert not torch.equal(before, step.student.fc.weight)
    assert distill_loss(step.student(step.newest[0]), step.newest[1]).total.isfinite()

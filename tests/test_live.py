"""The inventory of what a step changes: nothing is missing from it, and what is in it is saved,
restored and put back after a warm-up."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dafl_fast.engine import graph
from dafl_fast.engine.live import map_tensors
from dafl_fast.engine.step import Step

from .test_graph import RECIPES, leaves
from .test_step import CPU, make_step

# Changed by a step and in no inventory, with the reason.
ELSEWHERE = {
    "newest": "made anew by every step, for pictures only",
    "_student_lr": "written by the host before each step",
    "_adversarial": "written by the host before each step",
    "average.weight": "written by the host before each step",
    "average.pace": "written by the host before each step",
    "found.bank._pixels": "saved incrementally, entry by entry",
    "found.bank.logits": "saved incrementally, entry by entry",
    "found.bank.levels": "saved incrementally, entry by entry",
    "found.bank.labels": "follows from the logits",
    "found.bank.counts": "follows from the logits",
    "found.bank._cumulative": "follows from the logits",
    "bank._pixels": "saved incrementally, entry by entry",
    "bank.logits": "saved incrementally, entry by entry",
    "bank.levels": "saved incrementally, entry by entry",
}


def reachable(value, path="", seen=None):
    """Every tensor that can be reached from `value`, with the path that leads to it."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, type)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from reachable(item, f"{path}.{key}" if isinstance(key, str) else path, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from reachable(item, path, seen)
    elif hasattr(value, "__dict__"):
        for key, item in vars(value).items():
            yield from reachable(item, f"{path}.{key}" if path else key, seen)


def forgotten(step: Step) -> set[str]:
    """What two steps change that is neither in the inventory nor known to be elsewhere."""
    step()  # caches that are made once are there now
    before = {path: (t, t.detach().clone()) for path, t in reachable(step)}
    step()
    known = {t.data_ptr() for _, t in leaves(step.state_dict()) if isinstance(t, Tensor)}
    if step.bank is not None:
        known.add(step.bank.count.data_ptr())  # an int in the state
    return {
        path
        for path, (tensor, value) in before.items()
        if tensor.data_ptr() not in known
        and not path.startswith(tuple(ELSEWHERE))
        and not torch.equal(tensor, value)
    }


class Counting(nn.Module):
    """A student with a buffer of its own that every forward changes."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.student(x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_that_a_step_changes_is_missing(recipe):
    step = make_step(recipe, torch.float32, **RECIPES[recipe])
    assert forgotten(step) == set()


class Forgetful(Step):
    """A step with one tensor more."""

    extra: Tensor

    def body(self):
        super().body()
        self.extra += 1


def with_extra(listed: bool) -> Step:
    step = make_step("fast", torch.float32, **RECIPES["fast"])
    step.__class__ = Forgetful
    step.run = step.body
    step.extra = torch.zeros(3)
    if listed:
        step.live["extra"] = step.extra
    return step


def test_a_tensor_that_is_not_listed_is_found():
    assert forgotten(with_extra(listed=False)) == {"extra"}
    assert forgotten(with_extra(listed=True)) == set()


def test_a_tensor_that_is_listed_is_saved_restored_and_put_back():
    step = with_extra(listed=True)
    step()
    place, saved = step.extra.data_ptr(), copy.deepcopy(step.state_dict())
    assert torch.equal(saved["extra"], torch.ones(3))
    with graph.unchanged(step, 2):
        step.body(), step.body()
        assert torch.equal(step.extra, torch.full((3,), 3.0))
    assert torch.equal(step.extra, torch.ones(3))
    step()
    step.load_state_dict(saved)
    assert torch.equal(step.extra, torch.ones(3)) and step.extra.data_ptr() == place
    other = with_extra(listed=True)
    other.load_state_dict(saved)
    assert torch.equal(other.extra, torch.ones(3)) and other.steps == 1


def test_buffers_of_a_users_student_are_in_it():
    step = make_step("published", torch.float32)
    counting = Counting(step.student)
    again = Step(step.config, step.generator, step.teacher, counting, 10, CPU)
    assert forgotten(again) == set()
    assert again.state_dict()["student"]["calls"] == 2


def test_map_tensors_keeps_the_shape_of_things():
    value = {"a": [torch.ones(2), 3], "b": {"c": torch.zeros(1), "d": "text"}, "e": None}
    assert map_tensors(value, lambda t: t.sum().item()) == {
        "a": [2.0, 3], "b": {"c": 0.0, "d": "text"}, "e": None,
    }  # fmt: skip

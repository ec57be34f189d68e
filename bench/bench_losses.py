"""The losses, forward + backward through the public function, against eager and torch.compile.

    pytest bench/bench_losses.py --benchmark-only

One benchmark per shape. It runs the contenders in turns: a round is some calls of ours, then as
many of eager, then of torch.compile, so that what disturbs the machine disturbs all alike. The
timed one is ours; the medians of all three and the ratios stand in extra_info and are printed. One
thread but for the row that says otherwise.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import dafl_fast.losses as fused
from dafl_fast import reference
from dafl_fast.engine.loop import keep_freed_memory

ROUNDS = 30


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def problem(loss: str, rows: int, classes: int, features: int):
    """What a contender's function is called with; all of it that has a gradient comes first."""
    logits = randn(rows, classes, seed=0).requires_grad_()
    if loss == "distill_loss":
        return [logits], [randn(rows, classes, seed=1)], {"temperature": 4.0}
    if features:
        return [logits, randn(rows, features, seed=2).relu().requires_grad_()], [], {}
    return [logits], [], {}


def contenders(loss: str, rows: int, classes: int, features: int):
    inputs, constants, options = problem(loss, rows, classes, features)
    torch._dynamo.reset()
    functions = {
        "ours": getattr(fused, loss),
        "eager": getattr(reference, loss),
        "compile": torch.compile(getattr(reference, loss)),
    }

    def step(function):
        def run():
            for x in inputs:
                x.grad = None
            function(*inputs, *constants, **options).total.backward()

        return run

    return {name: step(function) for name, function in functions.items()}


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


CASES = [
    ("generator_loss", 1024, 10, 0, 1),
    ("generator_loss", 1024, 10, 84, 1),
    ("generator_loss", 1024, 10, 120, 1),
    ("distill_loss", 1024, 10, 0, 1),
    ("generator_loss", 1024, 1000, 0, 1),
    ("generator_loss", 1024, 1000, 84, 1),
    ("generator_loss", 1024, 1000, 120, 1),
    ("distill_loss", 1024, 1000, 0, 1),
    ("generator_loss", 1024, 1000, 0, 2),
    ("distill_loss", 1024, 1000, 0, 2),
]


@pytest.mark.parametrize(
    ("loss", "rows", "classes", "features", "threads"),
    CASES,
    indirect=["threads"],
    ids=[f"{loss}-{n}x{c}-features{f}-threads{k}" for loss, n, c, f, k in CASES],
)
def test_losses(benchmark, capsys, loss, rows, classes, features, threads):
    keep_freed_memory()  # as in training, and for all contenders: no page is cleared anew
    steps = contenders(loss, rows, classes, features)
    # Several calls in a row, so that each contender meets its own memory again, as in training.
    calls = 10 if classes <= 32 else 6
    seconds = {name: [] for name in steps}

    def measure(name):
        start = time.perf_counter()
        for _ in range(calls):
            steps[name]()
        seconds[name].append((time.perf_counter() - start) / calls)

    for step in steps.values():  # compiles, and warms caches and allocator up
        for _ in range(5):
            step()

    def others():
        measure("eager")
        measure("compile")

    benchmark.pedantic(lambda: measure("ours"), setup=others, rounds=ROUNDS)

    medians = {name: statistics.median(values) * 1e6 for name, values in seconds.items()}
    for name, value in medians.items():
        benchmark.extra_info[f"{name}_us"] = round(value, 1)
    for name in ("eager", "compile"):
        benchmark.extra_info[f"times_{name}"] = round(medians[name] / medians["ours"], 2)
    benchmark.extra_info["isa"] = fused._C.build_info()["isa"]
    with capsys.disabled():
        print(
            f"\n{loss} {rows}x{classes} features={features} threads={threads}: "
            + ", ".join(f"{name} {value:.0f} us" for name, value in medians.items())
            + f" ({medians['eager'] / medians['ours']:.1f}x eager, "
            f"{medians['compile'] / medians['ours']:.1f}x torch.compile)"
        )

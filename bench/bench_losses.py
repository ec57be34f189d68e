"""The losses, forward + backward through the public function, against eager and torch.compile.

    pytest bench/bench_losses.py --benchmark-only

`test_losses` has the method's own sizes and a thousand classes, one thread but for the rows that
say otherwise; what fits a cache may pass the memory's bandwidth. `test_sweep` has four million
logits, which do not fit, at 10 to 10,000 classes. On a GPU these times include the host's; the
kernels alone are measured by tools/gpu_measure.py.
"""

from __future__ import annotations

import pytest
import torch

import dafl_fast.losses as fused
from bench.measure import DEVICE, GPU, record, take_turns, timed
from dafl_fast import reference
from dafl_fast.device import keep_freed_memory

# Operations a logit, forward and backward, each exponential as one: the roofline's numerator.
# Generator loss: maximum, difference, exp, sum, probability, its sum over the batch; the same
# probability again, and the three products and sums of its gradient. Distillation loss: for both
# networks maximum, division, difference, exp, sum and probability; three for KL, two for the
# gradient.
FLOP_PER_LOGIT = {"generator_loss": 12, "distill_loss": 17}
FLOP_PER_FEATURE = 3  # magnitude, sum, sign times weight


def randn(*shape: int, seed: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(DEVICE)


def problem(loss: str, rows: int, classes: int, features: int):
    """What a contender's function is called with; all of it that has a gradient comes first."""
    logits = randn(rows, classes, seed=0).requires_grad_()
    if loss == "distill_loss":
        return [logits], [randn(rows, classes, seed=1)], {"temperature": 4.0}
    if features:
        return [logits, randn(rows, features, seed=2).relu().requires_grad_()], [], {}
    return [logits], [], {}


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def compare(benchmark, capsys, loss, rows, classes, features, calls, rounds, warm_up):
    keep_freed_memory()  # as in training, and for all contenders: no page is cleared anew
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

    steps = {name: timed(step(function), calls) for name, function in functions.items()}
    for function in functions.values():  # compiles, and warms caches and allocator up
        timed(step(function), warm_up)()
    seconds = take_turns(benchmark, steps, rounds)
    record(
        benchmark,
        capsys,
        f"{loss} {rows}x{classes} features={features}",
        seconds,
        unit="us",
        ideal_bytes=4 * sum(2 * x.numel() for x in inputs) + 4 * sum(x.numel() for x in constants),
        flop=FLOP_PER_LOGIT[loss] * rows * classes + FLOP_PER_FEATURE * rows * features,
        isa=fused._C.build_info()["isa"],
    )


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
if GPU:  # which does the work, however many threads the host has
    CASES = CASES[:-2]


@pytest.mark.parametrize(
    ("loss", "rows", "classes", "features", "threads"),
    CASES,
    indirect=["threads"],
    ids=[f"{loss}-{n}x{c}-features{f}-threads{k}" for loss, n, c, f, k in CASES],
)
def test_losses(benchmark, capsys, loss, rows, classes, features, threads):
    calls = 50 if GPU else 10 if classes <= 32 else 6
    compare(benchmark, capsys, loss, rows, classes, features, calls, rounds=30, warm_up=5)


@pytest.mark.parametrize("classes", [10, 100, 1000, 10000])
@pytest.mark.parametrize("loss", ["generator_loss", "distill_loss"])
@pytest.mark.parametrize("threads", [1], indirect=True)
def test_sweep(benchmark, capsys, threads, loss, classes):
    calls = 20 if GPU else 2
    compare(benchmark, capsys, loss, 4_000_000 // classes, classes, 0, calls, rounds=7, warm_up=2)

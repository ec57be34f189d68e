"""What the suites share: contenders that take turns, the machine's limits, the record of it."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from dafl_fast.device import AUTOCAST, pick_precision
from tests.published import (
    CIFAR10,
    PublishedGenerator,
    PublishedLeNet5,
    PublishedResNet,
    PublishedStep,
)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PRECISION = pick_precision("auto", DEVICE)
# For all contenders: the fastest convolutions are looked for once. What fp32 is on a GPU stays as
# PyTorch has it, and is named in the results.
torch.backends.cudnn.benchmark = True
TF32 = f"cudnn {torch.backends.cudnn.allow_tf32}, matmul {torch.backends.cuda.matmul.allow_tf32}"
# Set to a small number to see in a few minutes that everything runs; the figures are then void.
ROUNDS = os.environ.get("DAFL_BENCH_ROUNDS")


def rounds(usual: int) -> int:
    """How often the contenders take turns."""
    return int(ROUNDS) if ROUNDS else usual


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


# ---- Contenders ---------------------------------------------------------------------------------


def published_step(preset: str, contender: str = "published") -> PublishedStep:
    """The published algorithm on DEVICE with the published networks for MNIST or CIFAR-10.

    "published" as it is; "tuned" with what any user can switch on, to be run under `autocast`:
    frozen teacher, channels_last, fused optimizers; "compiled" with torch.compile on top.
    """
    if preset == "mnist":
        generator, settings = PublishedGenerator(), {}
        networks = PublishedLeNet5(), PublishedLeNet5(3, 8, 60, 42)
    else:
        generator, settings = PublishedGenerator(1000, channels=3), CIFAR10
        networks = PublishedResNet((3, 4, 6, 3)), PublishedResNet((2, 2, 2, 2))
    step = PublishedStep(*(n.to(DEVICE) for n in (generator, *networks)), **settings)
    if contender == "published":
        return step
    step.teacher.requires_grad_(False)
    for network in (step.generator, step.teacher, step.student):
        network.to(memory_format=torch.channels_last)
        if contender == "compiled":
            network.compile()
    for optimizer in (step.optimizer_g, step.optimizer_s):
        for group in optimizer.param_groups:
            group.update(fused=True, foreach=False)
    return step


def on_noise(step: PublishedStep, contender: str, batch: int) -> Callable[[], None]:
    """`step` on fresh noise, drawn as the published code does: on the CPU, then copied."""
    latent = step.generator.l1[0].in_features

    def run() -> None:
        with autocast(contender != "published"):
            step(torch.randn(batch, latent).to(DEVICE))

    return run


def autocast(enabled: bool) -> torch.autocast:
    """The precision of the contenders but the published one."""
    low = enabled and PRECISION in AUTOCAST
    return torch.autocast(DEVICE.type, AUTOCAST.get(PRECISION, torch.bfloat16), enabled=low)


def timed(function: Callable[[], Any], calls: int = 1) -> Callable[[], float]:
    """Calls `function` some times in a row and returns the seconds a call took.

    In a row, so that each contender meets its own memory again, as in training.
    """

    def run() -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return (time.perf_counter() - start) / calls

    return run


def take_turns(
    benchmark: Any, contenders: dict[str, Callable[[], float]], count: int
) -> dict[str, float]:
    """The median seconds of every contender over `count` rounds.

    In a round each has its turn, so that what disturbs the machine disturbs all alike. The one that
    pytest-benchmark times is `ours`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def turn(name: str) -> None:
        seconds[name].append(contenders[name]())

    def others() -> None:
        for name in contenders:
            if name != "ours":
                turn(name)

    benchmark.pedantic(lambda: turn("ours"), setup=others, rounds=rounds(count))
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---- The machine's limits -----------------------------------------------------------------------


@functools.cache
def bandwidth(threads: int) -> float:
    """GB/s of the better of copy and triad (a = b + s c), medians, over 512 MB tensors.

    Bytes read and bytes written count, as in STREAM; what a CPU reads because it is about to write
    there does not.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b, c = (torch.ones(1 << 27, device=DEVICE) for _ in range(3))
        seconds: dict[int, list[float]] = {2: [], 3: []}
        for _ in range(10):
            seconds[2].append(timed(lambda: a.copy_(b))())
            seconds[3].append(timed(lambda: torch.add(b, c, alpha=0.5, out=a))())
    finally:
        torch.set_num_threads(before)
    return max(n * 4 * len(a) / statistics.median(s[1:]) for n, s in seconds.items()) / 1e9


class MatrixProduct:
    """A large matrix product in the contenders' precision: a contender of its own, whose median
    is the peak that utilisation is measured against."""

    def __init__(self) -> None:
        size = 8192 if GPU else 2048
        dtype = AUTOCAST.get(PRECISION, torch.float32)
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        self.flop = 2 * size**3
        self._timed = timed(lambda: a @ b, calls=3)

    def __call__(self) -> float:
        return self._timed()


# ---- Results ------------------------------------------------------------------------------------


def record(
    benchmark: Any,
    capsys: Any,
    title: str,
    seconds: dict[str, float],
    unit: str = "ms",
    images: int | None = None,
    ideal_bytes: int | None = None,
    flop: int | None = None,
    peak: float | None = None,
    **more: Any,
) -> None:
    """Writes what was measured to extra_info, and prints it.

    Args:
        title: for the printout.
        seconds: a call of each contender, see `take_turns`.
        unit: "us" or "ms", in which times are written.
        images: that one call processes.
        ideal_bytes: every input read once and every output written once.
        flop: floating-point operations of the plain algorithm, however a contender gets around
            them; so a utilisation may exceed 1.
        peak: FLOP/s of the matrix product.
        more: further facts.
    """
    scale = {"us": 1e6, "ms": 1e3}[unit]
    threads = torch.get_num_threads()
    ours = seconds["ours"]
    facts: dict[str, Any] = {f"{n}_{unit}": round(s * scale, 2) for n, s in seconds.items()}
    facts |= {f"times_{n}": round(s / ours, 2) for n, s in seconds.items() if n != "ours"}
    if images is not None:
        facts |= {
            "images_per_second": round(images / ours),
            "steps_per_second": round(1 / ours, 2),
        }
    if ideal_bytes is not None:
        limit = bandwidth(threads)
        speed = {n: ideal_bytes / s / 1e9 for n, s in seconds.items()}
        facts |= {f"{n}_GB_per_s": round(value, 2) for n, value in speed.items()}
        facts |= {
            "ideal_bytes": ideal_bytes,
            "bandwidth_GB_per_s": round(limit, 2),
            "percent_of_bandwidth": round(100 * speed["ours"] / limit, 1),
        }
    if flop is not None:
        facts["flop"] = flop
    if flop is not None and peak is not None:
        facts |= {f"{n}_flop_utilisation": round(flop / s / peak, 3) for n, s in seconds.items()}
    if peak is not None:
        facts["matrix_peak_tflops"] = round(peak / 1e12, 3)
    device = torch.cuda.get_device_name() if GPU else "cpu"
    benchmark.extra_info.update(facts, threads=threads, device=device, **more)
    with capsys.disabled():
        print(f"\n{title}, on {device}, {threads} threads")
        for name, value in seconds.items():
            print(
                f"  {name:10s} {value * scale:9.1f} {unit}  {value / ours:5.1f}x ours"
                + (f"  {facts[f'{name}_GB_per_s']:7.1f} GB/s" if ideal_bytes is not None else "")
                + (f"  {facts[f'{name}_flop_utilisation']:6.1%} of peak" if flop and peak else "")
            )

"""The training step: the published algorithm as its users have it, and the same in faster hands.

    pytest bench --benchmark-only -k step

published  eager fp32, contiguous, teacher not frozen, as transcribed in tests/published.py
tuned      the same code with what any user can switch on: frozen teacher, low precision
           (autocast), channels_last, fused optimizers
compiled   `tuned` with torch.compile on the three networks
ours       `dafl_fast.engine.step.Step` with the recipe `published`; one CUDA graph on a GPU
ours+      on a GPU also with --compile

MNIST: LeNet-5 to LeNet-5-Half, batch 512, generator width 128. CIFAR: ResNet-34 to ResNet-18,
batch 1024 on a GPU and 32 on a CPU. Each contender lives in a process of its own, since how memory
is kept is a setting of the process. They take turns, one step each; what counts are medians over
the rounds. Utilisation counts the multiplications of `tuned`, however we get around them, against
the measured speed of a large matrix product.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dafl_fast.config import make_config
from dafl_fast.engine.graph import make_ready
from dafl_fast.engine.loop import keep_freed_memory, pick_precision, prepare
from dafl_fast.engine.step import AUTOCAST
from dafl_fast.models import build
from tests.published import (
    CIFAR10,
    PublishedGenerator,
    PublishedLeNet5,
    PublishedResNet,
    PublishedStep,
)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CONTENDERS = ("published", "tuned", "compiled", "ours", *(("ours+",) if GPU else ()))


class Case(NamedTuple):
    batch: int
    latent: int
    image_shape: tuple[int, int, int]
    teacher: str
    student: str
    rounds: int
    settings: dict[str, Any]

    def published(self) -> PublishedStep:
        channels, size, _ = self.image_shape
        generator = PublishedGenerator(self.latent, 128, size, channels)
        if self.teacher == "LeNet5":
            networks = PublishedLeNet5(), PublishedLeNet5(3, 8, 60, 42)
            return PublishedStep(generator.to(DEVICE), *(n.to(DEVICE) for n in networks))
        networks = PublishedResNet((3, 4, 6, 3)), PublishedResNet((2, 2, 2, 2))
        return PublishedStep(generator.to(DEVICE), *(n.to(DEVICE) for n in networks), **CIFAR10)


CASES = {
    "mnist": Case(512, 100, (1, 32, 32), "LeNet5", "LeNet5Half", 7, {}),
    "cifar": Case(
        1024 if GPU else 32, 1000, (3, 32, 32), "ResNet34", "ResNet18", 5,
        dict(
            generator_lr=0.02, one_hot=0.05, entropy=5.0, activation=0.01, student_optimizer="sgd",
            student_lr=0.1, student_weight_decay=5e-4,
        ),
    ),
}  # fmt: skip


def make_step(contender: str, case: Case):
    precision = pick_precision("auto", DEVICE)
    if contender.startswith("ours"):
        keep_freed_memory()
        config = make_config(
            "mnist", "published", batch_size=case.batch, latent_dim=case.latent,
            image_shape=case.image_shape, feature_layer=None, compile=contender == "ours+",
            **case.settings,
        )  # fmt: skip
        step = prepare(config, build(case.teacher), build(case.student), DEVICE, precision)
        make_ready(step)
        return step
    step = case.published()
    if contender != "published":
        for network in (step.generator, step.teacher, step.student):
            network.to(memory_format=torch.channels_last)
        step.teacher.requires_grad_(False)
        for optimizer in (step.optimizer_g, step.optimizer_s):
            for group in optimizer.param_groups:
                group.update(fused=True, foreach=False)
    if contender == "compiled":
        for network in (step.generator, step.teacher, step.student):
            network.compile()
    low = contender != "published" and precision in AUTOCAST

    def run():
        with torch.autocast(DEVICE.type, AUTOCAST.get(precision), enabled=low):
            # The published code draws z on the CPU and copies it.
            step(torch.randn(case.batch, case.latent).to(DEVICE))

    return run


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def serve(contender: str, case_name: str, threads: int, pipe) -> None:
    """Runs a few steps for every message and answers with the seconds a step."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = make_step(contender, CASES[case_name])
    for _ in range(10 if GPU else 2):
        step()
    facts: dict[str, float] = {}
    if contender == "tuned":
        with FlopCounterMode(display=False) as counter:
            step()
        facts["flop"] = counter.get_total_flops()
    if GPU:
        facts["kernel_seconds"] = seconds_of_kernels(step)
        facts["peak_bytes"] = torch.cuda.max_memory_reserved()
    pipe.send(facts)
    calls = 10 if GPU else 1
    while pipe.recv():
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        wait()
        pipe.send((time.perf_counter() - start) / calls)


def seconds_of_kernels(step) -> float:
    """Sum of the times of all kernels and copies of a step, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            step()
        wait()
    on_device = (event.self_device_time_total for event in profiler.key_averages())
    return sum(on_device) / 5 * 1e-6


def matrix_peak() -> float:
    """FLOP/s of a large matrix product in the precision of the contenders."""
    size = 8192 if GPU else 2048
    dtype = AUTOCAST.get(pick_precision("auto", DEVICE), torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


@pytest.fixture
def workers(request):
    """Per contender a pipe that times a step, and what it said of itself."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, facts = {}, [], {}
    for contender in CONTENDERS:
        pipes[contender], theirs = context.Pipe()
        process = context.Process(
            target=serve, args=(contender, request.param, torch.get_num_threads(), theirs)
        )
        process.start()
        theirs.close()
        processes.append(process)
        # One after the other, so that none warms up in another's way.
        facts[contender] = pipes[contender].recv()
    yield request.param, pipes, facts
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()


@pytest.mark.parametrize("workers", CASES, indirect=True)
def test_step(benchmark, capsys, workers):
    name, pipes, facts = workers
    case = CASES[name]
    seconds = {contender: [] for contender in CONTENDERS}

    def measure(contender):
        pipes[contender].send(True)
        seconds[contender].append(pipes[contender].recv())

    def others():
        for contender in CONTENDERS:
            if contender != "ours":
                measure(contender)

    benchmark.pedantic(lambda: measure("ours"), setup=others, rounds=case.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    times = {name: medians["published"] / value for name, value in medians.items()}
    peak = matrix_peak()
    used = {name: facts["tuned"]["flop"] / value / peak for name, value in medians.items()}
    benchmark.extra_info.update(
        {f"{name}_ms": round(value * 1e3, 2) for name, value in medians.items()},
        **{f"{name}_times_published": round(value, 2) for name, value in times.items()},
        **{f"{name}_flop_utilisation": round(value, 3) for name, value in used.items()},
        images_per_second=round(case.batch / medians["ours"]),
        steps_per_second=round(1 / medians["ours"], 2),
        matrix_peak_tflops=round(peak / 1e12, 3),
        precision=pick_precision("auto", DEVICE),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if GPU else "cpu",
        **{
            f"{name}_{fact}": value
            for name, known in facts.items()
            for fact, value in known.items()
            if GPU
        },
    )
    with capsys.disabled():
        print(f"\n{name} step, batch {case.batch}, on {benchmark.extra_info['device']}")
        for contender in CONTENDERS:
            print(
                f"  {contender:10s} {medians[contender] * 1e3:8.1f} ms  "
                f"{times[contender]:5.1f}x published  "
                f"{used[contender]:5.1%} of {peak / 1e12:.2f} TFLOP/s"
            )

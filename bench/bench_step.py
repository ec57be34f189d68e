"""The training step: the published algorithm as its users have it, and the same in faster hands.

    pytest bench/bench_step.py --benchmark-only

published  eager fp32, contiguous, teacher not frozen, as transcribed in tests/published.py
tuned      the same code with what any user can switch on: frozen teacher, low precision
           (autocast), channels_last, fused optimizers
compiled   `tuned` with torch.compile on the three networks
ours       `dafl_fast.engine.step.Step` with the recipe `published`; one CUDA graph on a GPU
ours+      on a GPU also with --compile

MNIST: LeNet-5 to LeNet-5-Half, batch 512, generator width 128. CIFAR: ResNet-34 to ResNet-18,
batch 1024 on a GPU and 32 on a CPU; smaller batches of MNIST with the first and the fourth alone.
Each contender lives in a process of its own, since how memory is kept is a setting of the process.
They take turns, one step each; what counts are medians over the rounds. Utilisation counts the
multiplications of `tuned`, however we get around them, against the measured speed of a large
matrix product, which has its turns like the others.
"""

from __future__ import annotations

import multiprocessing
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import (
    DEVICE,
    GPU,
    PRECISION,
    TF32,
    MatrixProduct,
    on_noise,
    published_step,
    record,
    take_turns,
    timed,
    wait,
)
from dafl_fast.device import keep_freed_memory
from dafl_fast.engine.graph import compile_and_capture
from dafl_fast.engine.prepare import prepare
from dafl_fast.models import build
from dafl_fast.recipes import make_config

CONTENDERS = ("published", "tuned", "compiled", "ours", *(("ours+",) if GPU else ()))


class Case(NamedTuple):
    preset: str
    batch: int
    rounds: int
    contenders: tuple[str, ...] = CONTENDERS


CASES = {
    "mnist": Case("mnist", 512, 7),
    "cifar": Case("cifar10", 1024 if GPU else 32, 5),
    **{f"mnist-{n}": Case("mnist", n, 3, ("published", "ours")) for n in (64, 128, 256)},
}


def make_step(contender: str, case: Case):
    if contender.startswith("ours"):
        keep_freed_memory()
        graph = "on" if GPU and contender != "ours without graph" else "off"
        config = make_config(
            case.preset,
            "published",
            batch_size=case.batch,
            compile=contender == "ours+",
            cuda_graph=graph,
        )
        step = prepare(config, build(config.teacher), build(config.student), DEVICE, PRECISION)
        compile_and_capture(step)
        return step
    return on_noise(published_step(case.preset, contender), contender, case.batch)


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
    turn = timed(step, calls=10 if GPU else 1)
    while pipe.recv():
        pipe.send(turn())


def seconds_of_kernels(step) -> float:
    """Sum of the times of all kernels and copies of a step, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            step()
        wait()
    on_device = (event.self_device_time_total for event in profiler.key_averages())
    return sum(on_device) / 5 * 1e-6


@pytest.fixture
def workers(request):
    """Per contender a pipe that times a step, and what it said of itself."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, facts = {}, [], {}
    for contender in CASES[request.param].contenders:
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

    def turn(pipe):
        def run():
            pipe.send(True)
            return pipe.recv()

        return run

    product = MatrixProduct()
    turns = {contender: turn(pipe) for contender, pipe in pipes.items()}
    seconds = take_turns(benchmark, {**turns, "product": product}, case.rounds)
    peak = product.flop / seconds.pop("product")
    record(
        benchmark,
        capsys,
        f"{case.preset} step, batch {case.batch}",
        seconds,
        images=case.batch,
        flop=facts["tuned"]["flop"] if "tuned" in facts else None,
        peak=peak,
        batch=case.batch,
        precision=PRECISION,
        tf32=TF32,
        **{
            f"{name}_{fact}": value
            for name, known in facts.items()
            for fact, value in known.items()
            if GPU
        },
    )

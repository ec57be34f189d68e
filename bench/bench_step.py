"""The MNIST training step, batch 512 and generator width 128: the published algorithm as its users
have it, and the same algorithm in faster hands.

    pytest bench --benchmark-only -k step

published  eager fp32, contiguous, teacher not frozen, as transcribed in tests/published.py
tuned      the same code with what any user can switch on: frozen teacher, bf16 autocast,
           channels_last, fused optimizers
compiled   `tuned` with torch.compile on the three networks
ours       `dafl_fast.engine.step.Step` with the recipe `published`

Each contender lives in a process of its own, since how memory is kept is a setting of the process.
They take turns, one step each; what counts are medians over the rounds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time

import pytest
import torch

from dafl_fast.config import PRESETS, make_config
from dafl_fast.engine.loop import keep_freed_memory, pick_precision, prepare
from tests.published import PublishedGenerator, PublishedLeNet5, PublishedStep

ROUNDS, WARM_UP = 7, 2
CPU = torch.device("cpu")
CONTENDERS = ("published", "tuned", "compiled", "ours")


def make_step(contender: str):
    config = make_config("mnist", "published", batch_size=512, generator_width=128, eval="none")
    precision = pick_precision("auto", CPU)
    if contender == "ours":
        keep_freed_memory()
        return prepare(config, PRESETS["mnist"], CPU, precision)
    networks = [
        PublishedGenerator(width=config.generator_width),
        PublishedLeNet5(),
        PublishedLeNet5(3, 8, 60, 42),
    ]
    if contender != "published":
        networks = [network.to(memory_format=torch.channels_last) for network in networks]
        networks[1].requires_grad_(False)
    step = PublishedStep(*networks)
    if contender != "published":
        step.optimizer_g = torch.optim.Adam(networks[0].parameters(), lr=0.2, fused=True)
        step.optimizer_s = torch.optim.Adam(networks[2].parameters(), lr=2e-3, fused=True)
    if contender == "compiled":
        for network in networks:
            network.compile()
    bf16 = contender != "published" and precision == "bf16"

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            step(torch.randn(config.batch_size, config.latent_dim))

    return run


def serve(contender: str, threads: int, pipe) -> None:
    """Runs one step for every message and answers with its seconds."""
    torch.set_num_threads(threads)
    step = make_step(contender)
    for _ in range(WARM_UP):
        step()
    pipe.send(None)
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)


@pytest.fixture(scope="module")
def workers():
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for contender in CONTENDERS:
        pipes[contender], theirs = context.Pipe()
        process = context.Process(target=serve, args=(contender, torch.get_num_threads(), theirs))
        process.start()
        processes.append(process)
        pipes[contender].recv()  # one after the other, so that none warms up in another's way
    yield pipes
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()


def test_mnist_step(benchmark, capsys, workers):
    seconds = {contender: [] for contender in CONTENDERS}

    def measure(contender):
        workers[contender].send(True)
        seconds[contender].append(workers[contender].recv())

    def others():
        for contender in CONTENDERS[:-1]:
            measure(contender)

    benchmark.pedantic(lambda: measure("ours"), setup=others, rounds=ROUNDS)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    times = {name: medians["published"] / value for name, value in medians.items()}
    benchmark.extra_info.update(
        {f"{name}_ms": round(value * 1e3, 1) for name, value in medians.items()},
        **{f"{name}_times_published": round(value, 2) for name, value in times.items()},
        images_per_second=round(512 / medians["ours"]),
        precision=pick_precision("auto", CPU),
        threads=torch.get_num_threads(),
    )
    with capsys.disabled():
        print("\nMNIST step, batch 512, generator width 128")
        for name in CONTENDERS:
            print(f"  {name:10s} {medians[name] * 1e3:7.0f} ms  {times[name]:5.1f}x published")

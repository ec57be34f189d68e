"""The MNIST training step, batch 512 and generator width 128: the published algorithm as its users
have it, and the same algorithm in faster hands.

    pytest bench --benchmark-only -k step

(a) published  eager fp32, contiguous, teacher not frozen, as transcribed in tests/published.py
(b) tuned      the same code with what any user can switch on: frozen teacher, bf16 autocast,
               channels_last, fused optimizers
(c) compiled   (b) with torch.compile on the three networks
(d) ours       `dafl_fast.engine.step.Step` with the recipe `published`

Contenders take turns, one step each; medians over the rounds.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from dafl_fast.config import PRESETS, make_config
from dafl_fast.engine.loop import keep_freed_memory, pick_precision, prepare
from tests.published import PublishedGenerator, PublishedLeNet5, PublishedStep

ROUNDS = 7
CPU = torch.device("cpu")


def published(config):
    step = PublishedStep(
        PublishedGenerator(width=config.generator_width),
        PublishedLeNet5(),
        PublishedLeNet5(3, 8, 60, 42),
    )
    return lambda: step(torch.randn(config.batch_size, config.latent_dim))


def tuned(config, precision: str, compiled: bool):
    networks = [
        PublishedGenerator(width=config.generator_width),
        PublishedLeNet5().requires_grad_(False),
        PublishedLeNet5(3, 8, 60, 42),
    ]
    networks = [network.to(memory_format=torch.channels_last) for network in networks]
    step = PublishedStep(*networks)
    step.optimizer_g = torch.optim.Adam(networks[0].parameters(), lr=0.2, fused=True)
    step.optimizer_s = torch.optim.Adam(networks[2].parameters(), lr=2e-3, fused=True)
    if compiled:
        for network in networks:
            network.compile()

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            step(torch.randn(config.batch_size, config.latent_dim))

    return run


@pytest.mark.parametrize("contender", ["tuned", "compiled", "ours"])
def test_mnist_step(benchmark, capsys, contender):
    config = make_config("mnist", "published", batch_size=512, generator_width=128, eval="none")
    precision = pick_precision("auto", CPU)
    torch._dynamo.reset()
    # A setting of the whole process: every contender, the published step too, profits from it.
    keep_freed_memory()
    steps = {"published": published(config)}
    if contender == "ours":
        steps["ours"] = prepare(config, PRESETS["mnist"], CPU, precision)
    else:
        steps[contender] = tuned(config, precision, contender == "compiled")
    seconds = {name: [] for name in steps}

    def measure(name):
        start = time.perf_counter()
        steps[name]()
        seconds[name].append(time.perf_counter() - start)

    for step in steps.values():
        for _ in range(2):
            step()
    benchmark.pedantic(
        lambda: measure(contender), setup=lambda: measure("published"), rounds=ROUNDS
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["published"] / medians[contender]
    benchmark.extra_info.update(
        {f"{name}_ms": round(value * 1e3, 1) for name, value in medians.items()},
        times_published=round(ratio, 2),
        precision=precision,
        threads=torch.get_num_threads(),
    )
    with capsys.disabled():
        print(
            f"\nMNIST step 512, {contender} ({precision}): {medians[contender] * 1e3:.0f} ms, "
            f"published {medians['published'] * 1e3:.0f} ms, {ratio:.1f}x"
        )

"""The teacher on generated images, forward and back to the images.

published  eager fp32, contiguous, not frozen: weight gradients are computed and thrown away
tuned      the same network frozen, in low precision (autocast) and channels_last
compiled   `tuned` with torch.compile
ours       the teacher of `dafl_fast.engine.step.Step`: BatchNorm folded, weights in low precision,
           on a CPU with our own convolutions

LeNet-5 with 512 images, ResNet-34 with 1024 on a GPU and 32 on a CPU. Utilisation counts as in
bench_step.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import (
    DEVICE,
    GPU,
    PRECISION,
    MatrixProduct,
    autocast,
    published_step,
    record,
    take_turns,
    timed,
)
from dafl_fast.device import keep_freed_memory
from dafl_fast.engine.prepare import prepare
from dafl_fast.models import build
from dafl_fast.recipes import make_config

CASES = {"mnist": (512, 9), "cifar10": (1024 if GPU else 32, 5)}


def contenders(preset, batch):
    """Per contender a function that runs the teacher to its images' gradient; and ideal bytes."""

    def run(network, images, low=True, **options):
        def once():
            images.grad = None
            network.zero_grad()
            with autocast(low):
                logits, features = network(images, **options)
            (logits.float().sum() + features.float().sum()).backward()

        return once

    config = make_config(preset, "published", batch_size=batch)
    step = prepare(config, build(config.teacher), build(config.student), DEVICE, PRECISION)
    torch._dynamo.reset()
    plain, tuned, compiled = (
        published_step(preset, contender).teacher
        for contender in ("published", "tuned", "compiled")
    )
    rows = torch.randn(batch, *config.image_shape, device=DEVICE).requires_grad_()
    pixels = rows.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    functions = {
        "published": run(plain, rows, low=False, out_feature=True),
        "tuned": run(tuned, pixels, out_feature=True),
        "compiled": run(compiled, pixels, out_feature=True),
        "ours": run(step.teacher, pixels),
    }
    return functions, layer_bytes(plain, rows)


@torch.no_grad()
def layer_bytes(network, images):
    """Input, output and weights of every convolution and linear layer, once each way."""
    size = 4 if PRECISION == "fp32" else 2
    numbers = []

    def count(layer, inputs, output):
        numbers.append(inputs[0].numel() + output.numel() + layer.weight.numel())

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    network(images)
    for hook in hooks:
        hook.remove()
    return 2 * size * sum(numbers)


@pytest.mark.parametrize("preset", CASES)
def test_teacher(benchmark, capsys, preset):
    batch, rounds = CASES[preset]
    keep_freed_memory()
    functions, ideal_bytes = contenders(preset, batch)
    for function in functions.values():
        timed(function, 2)()
    with FlopCounterMode(display=False) as counter:
        functions["tuned"]()
    calls = 10 if GPU else 3 if preset == "mnist" else 1
    turns = {name: timed(function, calls) for name, function in functions.items()}
    product = MatrixProduct()
    seconds = take_turns(benchmark, {**turns, "product": product}, rounds)
    peak = product.flop / seconds.pop("product")
    record(
        benchmark,
        capsys,
        f"{preset} teacher forward + input gradient, batch {batch}",
        seconds,
        images=batch,
        flop=counter.get_total_flops(),
        peak=peak,
        ideal_bytes=ideal_bytes,
        batch=batch,
        precision=PRECISION,
    )

"""A training step as one CUDA graph: the GPU runs it without waiting for Python in between.

Capturing records the kernels of one run of `Step.body` with their addresses. It must come after
some ordinary runs (libraries choose their algorithms, allocate, compile), and those must leave no
trace: what they change is kept and put back, in place, so that a captured run and an ordinary one
start from the same state and draw the same random numbers.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator

import torch

from ..config import Config
from ..errors import UserError
from .distributed import World
from .live import copied
from .step import Step

log = logging.getLogger(__name__)

# Ordinary steps before the capture.
WARM_UP = 3


def compile_and_capture(step: Step) -> str | None:
    """Compiles `step` and lets it run as a CUDA graph from now on, as its config and the machine
    allow; nothing that training reads is changed.

    Returns:
        Why it is no graph, or None if it is. With `cuda_graph` "auto" the step then runs as before.

    Raises:
        UserError: `cuda_graph` is "on" and the step cannot be captured.
    """
    wanted = step.config.cuda_graph
    reason = reason_not_captured(step.config, step.device, step.world)
    if reason is None:
        try:
            step.run = capture(step)
        except RuntimeError as error:
            # A network that waits for the device or copies from the host cannot be captured.
            cause = error.__context__ or error
            reason = str(cause).splitlines()[0]
            if wanted == "on":
                raise UserError(
                    f"--cuda-graph on: the step cannot be captured: {reason}"
                ) from error
    if wanted == "auto" and reason is not None and step.device.type == "cuda":
        log.warning("no CUDA graph: %s", reason)
    if step.config.compile and reason is not None:
        with unchanged(step, 1):  # compiles now, before the clock runs
            step.body()
    return reason


def reason_not_captured(config: Config, device: torch.device, world: World) -> str | None:
    """Why a step with these settings will not even be tried to capture; None if it will be.

    Raises:
        UserError: `cuda_graph` is "on".
    """
    if config.cuda_graph == "off":
        return "--cuda-graph off"
    reason = None
    if device.type != "cuda":
        reason = f"the device is {device.type}"
    elif world.size > 1:
        reason = "there are several processes"
    if config.cuda_graph == "on" and reason is not None:
        raise UserError(f"--cuda-graph on: the step cannot be captured: {reason}")
    return reason


def capture(step: Step) -> Callable[[], None]:
    """Warms `step.body` up on a side stream, captures it, and leaves `step` as it was.

    Raises:
        RuntimeError: something in the body cannot be captured; the step is as it was.
    """
    side = torch.cuda.Stream(step.device)
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.current_stream(step.device)
    with unchanged(step, WARM_UP):
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    step.body()
        finally:
            here.wait_stream(side)
        # Gradients are to be made anew inside the graph's memory, and never outside it.
        for optimizer in (step.generator_optimizer, step.student_optimizer):
            optimizer.zero_grad(set_to_none=True)
    graph.register_generator_state(step.random)
    # A capture that fails half-way may leave the generators, and the choice of stream, as they
    # were inside it.
    generators = (step.random, torch.cuda.default_generators[here.device_index])
    spares = [generator.clone_state() for generator in generators]
    # The graph's memory is a pool of its own, which goes when the graph goes.
    pool = torch.cuda.graph_pool_handle()
    try:
        with (
            uncollected(),
            torch.cuda.stream(here),
            torch.cuda.graph(graph, pool=pool, stream=side),
        ):
            step.body()
    except BaseException:
        for generator, spare in zip(generators, spares, strict=True):
            generator.graphsafe_set_state(spare)
        raise
    return graph.replay


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collects garbage before and not inside, where it could free memory of the device."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def unchanged(step: Step, runs: int) -> Iterator[None]:
    """Puts everything back in place, afterwards, that `runs` runs of `step.body` inside change."""
    kept, newest, bank = copied(step.state_dict()), step.newest, step.bank
    if bank is not None:
        first = bank.added
        entries = bank.span(first, first + min(runs * step.config.batch_size, bank.capacity))
    try:
        yield
    finally:
        with torch.no_grad():
            step.load_state_dict(kept)
        step.newest = newest
        if bank is not None:
            bank.restore(first, entries)

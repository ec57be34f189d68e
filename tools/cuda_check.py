"""Compiles every kernel with warnings as errors and says what each takes: `make cuda-check`.

    python tools/cuda_check.py [--write] [ARCH ...]     default: sm_80, sm_90 and sm_120

No GPU and no torch is needed. It fails on warnings, on registers spilled to memory in the regimes
that matter for speed, and where a kernel for sm_90 needs more instructions than its budget in
tools/cuda_model.py. For those it reads nvdisasm's output: nvdisasm comes with a full toolkit, and
with the package triton. `--write` puts the predictions into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import cuda_model, sass  # noqa: E402

# The flags of setup.py, and those that torch adds: its half operators are off.
FLAGS = [
    "-std=c++17", "-O3", "--cubin", "-Xptxas", "-v", "-Werror", "all-warnings",
    "-Xcompiler", "-Wall,-Wextra,-Werror",
    "-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__",
]  # fmt: skip
ARCHITECTURES = ["sm_80", "sm_90", "sm_120"]

# Bytes that a kernel may spill: a few registers, around its loops and not in them.
SPILLED = 32
# Kernels that may spill: those for any size and fp64 are not made for speed.
MAY_SPILL = re.compile("_stream_|_f64_")

BEGIN, END = "<!-- predicted by tools/cuda_check.py -->", "<!-- end of what is predicted -->"
PAGE = ROOT / "docs" / "kernels.md"


class Compiled(NamedTuple):
    registers: dict[str, tuple[int, int]]  # and spilled bytes, by a kernel's name
    listing: str = ""  # what nvdisasm prints, where it was asked
    error: str = ""
    uncounted: str = ""  # why nvdisasm printed nothing


def compilers_home() -> Path:
    import setup

    for major in ("13", "12"):
        found = setup.find_toolkit(major, os.environ)
        if isinstance(found, setup.Toolkit):
            return found.home
    raise SystemExit(f"dafl_fast: {found}")


def known_architectures(nvcc: Path) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = re.findall(r"compute_(\d+)$", listed.stdout, re.M)
    return [arch for arch in ARCHITECTURES if arch[3:] in known]


def find_nvdisasm(toolkit: Path) -> Path | None:
    """On PATH, in the toolkit, or in triton's package."""
    triton = importlib.util.find_spec("triton")
    places = [Path(shutil.which("nvdisasm") or "nowhere"), toolkit / "bin" / "nvdisasm"]
    if triton is not None and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    return next((place for place in places if place.is_file()), None)


def demangled(names: Iterable[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = done.stdout.replace("dafl::cuda::", "").replace("(anonymous namespace)::", "")
    return [re.sub(r"\(.*|^void ", "", line) for line in short.splitlines()]


def kernels(log: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of each kernel in what ptxas -v printed.

    What a kernel calls, and is not part of its code, has properties there too, but no registers.
    """
    spills = {
        name: int(stores) + int(loads)
        for name, stores, loads in re.findall(
            r"Function properties for (\w+)\s.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
            log,
        )
    }
    entries = re.split(r"Compiling entry function '(\w+)'", log)
    registers = {}
    for name, text in zip(entries[1::2], entries[2::2], strict=True):
        used = re.search(r"Used (\d+) registers", text)
        if used is None or name not in spills:
            raise SystemExit(f"dafl_fast: what ptxas prints has changed:\n{log}")
        called = re.findall(r"Function properties for (\w+)", text)
        registers[name] = int(used[1]), sum(spills[one] for one in {name, *called})
    return dict(zip(demangled(registers), registers.values(), strict=True))


def compile_source(nvcc: Path, source: Path, arch: str, nvdisasm: Path | None) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        done = subprocess.run(
            [nvcc, *FLAGS, f"-arch={arch}", f"-I{ROOT / 'csrc'}", source, "-o", cubin],
            capture_output=True, text=True,
        )  # fmt: skip
        log = done.stdout + done.stderr
        if done.returncode != 0:
            print(log)
            return Compiled({}, error=f"{source.name} does not compile for {arch}")
        if nvdisasm is None:
            return Compiled(kernels(log))
        try:
            return Compiled(kernels(log), sass.disassemble(nvdisasm, cubin))
        except ValueError as problem:
            return Compiled(kernels(log), uncounted=str(problem))


def modelled(listings: Iterable[Compiled]) -> tuple[list[cuda_model.Kernel], list[str]]:
    """The kernels that have a model, and what is wrong with them."""
    found: list[cuda_model.Kernel] = []
    failures = []
    for one in listings:
        functions = sass.functions(one.listing)
        for name, blocks in zip(demangled(functions), functions.values(), strict=True):
            if cuda_model.KERNEL.match(name):
                kernel = cuda_model.kernel_of(name, blocks, *one.registers[name])
                if kernel is None:
                    failures.append(f"no loop over rows with loads of 16 bytes in {name}")
                else:
                    found.append(kernel)
    for kernel in found:
        failures += [f"{kernel.name}, {kernel.dtype}: {what}" for what in kernel.over_budget()]
    order = attrgetter("loss", "direction", "cluster", "group", "values", "dtype")
    return sorted(found, key=order), failures


def write_page(tables: str) -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    page = f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"
    PAGE.write_text(page, encoding="utf-8")


def why_not(
    done: Sequence[Compiled], toolkit: Path, archs: Sequence[str], nvdisasm: Path | None
) -> str:
    if "sm_90" not in archs:
        return "sm_90 is not among the architectures"
    if nvdisasm is None:
        return (f"no nvdisasm on PATH, in {toolkit / 'bin'} or in the package triton, which "
                "`pip install --no-deps triton` brings")  # fmt: skip
    return next((one.uncounted for one in done if one.uncounted), "nothing compiled for sm_90")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archs", nargs="*", metavar="ARCH")
    parser.add_argument("--write", action="store_true", help="put the predictions into the docs")
    arguments = parser.parse_args()
    home = compilers_home()
    nvcc, nvdisasm = home / "bin" / "nvcc", find_nvdisasm(home)
    archs = arguments.archs or known_architectures(nvcc)
    jobs = [(s, a) for s in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for a in archs]

    def compiled(job: tuple[Path, str]) -> Compiled:
        source, arch = job
        return compile_source(nvcc, source, arch, nvdisasm if arch == "sm_90" else None)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(compiled, jobs))

    table: dict[str, dict[str, str]] = {}
    failures_to_compile = [one.error for one in done if one.error]
    failures = [*failures_to_compile]
    for (_, arch), one in zip(jobs, done, strict=True):
        for name, (registers, spilled) in one.registers.items():
            table.setdefault(name, {})[arch] = f"{registers}/{spilled}"
            if spilled > SPILLED and not MAY_SPILL.search(name):
                failures.append(f"{name} spills {spilled} bytes for {arch}, {SPILLED} are allowed")
    width = max(map(len, table), default=6)
    print(f"{'registers/spilled bytes':{width}}  " + "  ".join(f"{arch:>8}" for arch in archs))
    for name, columns in sorted(table.items()):
        print(f"{name:{width}}  " + "  ".join(f"{columns.get(arch, '-'):>8}" for arch in archs))
    print("Shared memory is dynamic: 48 KiB a block at most, see plan.h and tests/test_plan.py.")

    if not any(one.listing for one in done):
        print(f"Instructions were not counted: {why_not(done, home, archs, nvdisasm)}.")
    elif not failures_to_compile:
        found, wrong = modelled([one for one in done if one.listing])
        failures += wrong
        tiles = {name: one.registers[name] for one in done if one.listing
                 for name in one.registers if "_tile_kernel" in name}  # fmt: skip
        tables = cuda_model.tables(found, tiles)
        print(f"\n{tables}")
        if arguments.write:
            write_page(tables)
    for failure in failures:
        print(f"dafl_fast: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles every kernel with warnings as errors and says what each takes: `make cuda-check`.

    python tools/cuda_check.py [ARCH ...]     default: sm_80, sm_90 and the newest that nvcc knows

No GPU and no torch is needed. It fails on warnings, and on registers spilled to memory in the
regimes that matter for speed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The flags of setup.py, and those that torch adds: its half operators are off.
FLAGS = [
    "-std=c++17", "-O3", "--cubin", "-Xptxas", "-v", "-Werror", "all-warnings",
    "-Xcompiler", "-Wall,-Wextra,-Werror",
    "-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__",
]  # fmt: skip

# Bytes that a kernel may spill. The kernels for any size and fp64 are not made for speed. A row
# and the slope of all its columns leave threads with 128 registers each a few too short.
ALLOWED = {
    "_stream_": 1 << 20,
    "generator_backward_rows_kernel<Rows<256,": 64,
    "generator_backward_rows_kernel<Rows<512,": 200,
}


def compilers_home() -> Path:
    import setup

    for major in ("13", "12"):
        found = setup.find_toolkit(major, os.environ)
        if isinstance(found, setup.Toolkit):
            return found.home
    raise SystemExit(f"dafl_fast: {found}")


def architectures(nvcc: Path) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    newest = max(int(number) for number in re.findall(r"compute_(\d+)$", listed.stdout, re.M))
    return ["sm_80", "sm_90", f"sm_{newest}"]


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = done.stdout.replace("dafl::cuda::", "").replace("(anonymous namespace)::", "")
    return [re.sub(r"\(.*|^void ", "", line) for line in short.splitlines()]


def kernels(log: str) -> list[tuple[str, int, int]]:
    """Name, registers and spilled bytes of each kernel in what ptxas -v printed."""
    names = re.findall(r"Compiling entry function '(\w+)'", log)
    spills = [
        int(a) + int(b)
        for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    ]
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    if not len(names) == len(spills) == len(registers):
        raise SystemExit(f"dafl_fast: what ptxas prints has changed:\n{log}")
    return list(zip(demangled(names), registers, spills, strict=True))


def main() -> int:
    nvcc = compilers_home() / "bin" / "nvcc"
    archs = sys.argv[1:] or architectures(nvcc)
    table: dict[str, dict[str, str]] = {}
    failures = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for arch in archs:
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    [nvcc, *FLAGS, f"-arch={arch}", f"-I{ROOT / 'csrc'}", source,
                     "-o", Path(folder) / "cubin"],
                    capture_output=True, text=True,
                )  # fmt: skip
            log = done.stdout + done.stderr
            if done.returncode != 0:
                print(log)
                failures.append(f"{source.name} does not compile for {arch}")
                continue
            for name, registers, spilled in kernels(log):
                table.setdefault(name, {})[arch] = f"{registers}/{spilled}"
                most = max((size for part, size in ALLOWED.items() if part in name), default=0)
                if spilled > most:
                    failures.append(f"{name} spills {spilled} bytes for {arch}, {most} allowed")
    width = max(map(len, table), default=6)
    print(f"{'registers/spilled bytes':{width}}  " + "  ".join(f"{arch:>8}" for arch in archs))
    for name, columns in sorted(table.items()):
        print(f"{name:{width}}  " + "  ".join(f"{columns.get(arch, '-'):>8}" for arch in archs))
    print("Shared memory is dynamic: 48 KiB a block at most, see plan.h and tests/test_plan.py.")
    for failure in failures:
        print(f"dafl_fast: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the operators' tests on an extension that is compiled with AddressSanitizer and
UndefinedBehaviorSanitizer, once for each instruction set of this processor: `make sanitize-cpu`.

    python tools/sanitize_cpu.py
    python tools/sanitize_cpu.py --isa avx2 -x      one of them, and arguments for pytest

The extension and a copy of the tests are in build/sanitized; a second run compiles only what
changed. PyTorch itself is not instrumented, but its memory is watched: where our code reads or
writes outside the bytes of a tensor, the process ends. It needs GCC.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitized"
LIBRARIES = ("libasan.so", "libstdc++.so")  # to be loaded before Python itself
TESTS = (
    "operators", "bad_calls", "memory", "losses", "losses_properties", "dafl_losses", "functional",
    "winograd",
)  # fmt: skip
# Compilers under the sanitizers take minutes and say nothing of our code; times would be wrong.
LEFT_OUT = "not compile and not dynamic_shapes and not overhead"
SETTINGS = {
    # Python frees little at its end; and it is torch that refuses what is too large.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}


def build() -> Path:
    """The folder to run in, with the package, its sanitized extension, and the tests."""
    here = FOLDER / "lib"
    command = [
        sys.executable, "-W", "ignore", "setup.py", "--quiet", "build",
        "--build-lib", str(here), "--build-temp", str(FOLDER / "objects"),
    ]  # fmt: skip
    settings = {"DAFL_FAST_SANITIZE": "1", "DAFL_FAST_CUDA": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    shutil.rmtree(here / "tests", ignore_errors=True)
    shutil.copytree(ROOT / "tests", here / "tests")
    shutil.copy(ROOT / "pyproject.toml", here)
    return here


def libraries() -> list[str]:
    compiler = os.environ.get("CXX", "c++")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in LIBRARIES
    ]
    if not all(Path(path).is_file() for path in found):
        raise SystemExit(f"tools/sanitize_cpu.py needs GCC with {' and '.join(LIBRARIES)}.")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="The operators' tests under the sanitizers.")
    parser.add_argument("--isa", help="this instruction set only")
    chosen, more = parser.parse_known_args()
    start = time.monotonic()
    here = build()
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    environ = os.environ | SETTINGS | {
        "LD_PRELOAD": " ".join(libraries()), "PYTHONPATH": str(here), "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    which = "import dafl_fast; print(*dafl_fast.build_info()['isa_available'])"
    all_sets = subprocess.run(
        [sys.executable, "-c", which], cwd=here, env=environ, capture_output=True, text=True
    )
    if all_sets.returncode:
        raise SystemExit(all_sets.stderr)
    tests = [f"tests/test_{name}.py" for name in TESTS]
    for isa in [chosen.isa] if chosen.isa else all_sets.stdout.split():
        print(f"== {isa}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-k", LEFT_OUT, *more, *tests],
            cwd=here, env=environ | {"DAFL_FAST_ISA": isa},
        )  # fmt: skip
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles the extension in place, and shows how far it is: `make build`.

    python tools/build.py              the extension only
    python tools/build.py --install    and installs the package, editable, with what it needs

Where no GPU is visible it leaves the CUDA kernels out, which take most of the time, unless
DAFL_FAST_CUDA=1 asks for them. It compiles as many files at once as there are processors, or
MAX_JOBS. For the other switches see setup.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A line of ninja: files that are compiled, of how many, and the command for one.
_COMPILED = re.compile(r"\[(\d+/\d+)\] .*?(csrc/[\w/]+\.(?:cpp|cu))\b")


def choose(environ: MutableMapping[str, str], gpu: bool) -> str:
    """Sets in `environ` what the user has not. Returns what there is to say of it, if anything."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environ.setdefault("MAX_JOBS", str(cpus or 1))
    if gpu or environ.get("DAFL_FAST_CUDA"):
        return ""
    environ["DAFL_FAST_CUDA"] = "0"
    return "no GPU is visible, so without CUDA kernels; with them: DAFL_FAST_CUDA=1 make -B build"


def shortened(lines: Iterable[str], seconds: float) -> Iterator[str]:
    """What to show of the compiler's output, line by line: how far it is instead of commands.
    `seconds` is the start, by time.monotonic."""
    for line in lines:
        if compiled := _COMPILED.match(line):
            yield f"  {compiled[1]}  {compiled[2]}  {time.monotonic() - seconds:.0f} s\n"
        elif line.strip() and not line.startswith(("ninja: ", "g++ ", "c++ ")):
            yield line


def main() -> int:
    import torch

    said = choose(os.environ, torch.cuda.is_available())
    if said:
        print(said, flush=True)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in shortened(process.stdout, time.monotonic()):
        print(line, end="", flush=True)
    if process.wait() or "--install" not in sys.argv[1:]:
        return process.returncode
    # It builds again, in the same folder, where there is nothing left to compile.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return subprocess.run([*pip, "--no-build-isolation", "--editable", "."], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())

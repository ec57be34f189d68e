"""How many steps a run makes beside another program that keeps a core busy, and how many alone.

    python bench/sharing.py                       a busy process, 20 s a run, 3 rounds: 5 minutes
    python bench/sharing.py --beside compiler     a compiler instead
    python bench/sharing.py --threads auto 2 1    several settings of --threads take turns

In a round each setting has a run alone and one beside the program. The figures are medians over the
rounds. Nothing else may run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUSY = "while True: pass"
# The largest file of the extension, again and again.
COMPILER = """
import subprocess, sys
from torch.utils import cpp_extension
folders = [f"-isystem{path}" for path in cpp_extension.include_paths()]
while True:
    subprocess.run(["c++", "-std=c++20", "-O3", "-mavx2", "-Icsrc", "-c", "csrc/cpu/avx2.cpp",
                    "-o", "/dev/null", *folders], check=True)
"""
PROGRAMS = {"nothing": None, "busy": BUSY, "compiler": COMPILER}


def steps(arguments: list[str], beside: str) -> tuple[int, str]:
    """The steps of a run beside that program, and what it said of its threads."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    environ.pop("OMP_NUM_THREADS", None)  # it would be the number
    program = PROGRAMS[beside]
    other = None
    if program is not None:  # a group of its own, as a compiler starts programs too
        other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, start_new_session=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "run")
            command = ["-m", "dafl_fast.train", "mnist", "--device", "cpu", "--eval", "none"]
            done = subprocess.run(
                [sys.executable, *command, "--out-dir", str(out), *arguments],
                env=environ, cwd=folder, check=True, capture_output=True, text=True,
            )  # fmt: skip
            said = [line for line in done.stderr.splitlines() if "going on with" in line]
            return json.loads((out / "summary.json").read_text())["steps"], "; ".join(said)
    finally:
        if other is not None:
            os.killpg(other.pid, 9)
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", choices=[*PROGRAMS][1:], default="busy")
    parser.add_argument("--threads", nargs="+", default=["auto"])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[tuple[str, str], list[int]] = {}
    for number in range(asked.rounds):
        for threads in asked.threads:
            for beside in ("nothing", asked.beside):
                length = ["--max-seconds", str(asked.seconds), "--threads", threads]
                count, said = steps(length, beside)
                found.setdefault((threads, beside), []).append(count)
                print(f"round {number + 1}, --threads {threads}, beside {beside}: {count} steps  "
                      f"{said}", flush=True)  # fmt: skip
    for threads in asked.threads:
        alone, shared = (statistics.median(found[threads, b]) for b in ("nothing", asked.beside))
        print(f"--threads {threads}: {alone:.0f} steps alone, {shared:.0f} beside {asked.beside}, "
              f"{shared / alone:.0%}")  # fmt: skip


if __name__ == "__main__":
    main()

"""Everything that only a GPU can show, in one command: `make gpu-check`. Below eight minutes.

    python tools/gpu_check.py                            everything, in the order of SECTIONS
    python tools/gpu_check.py --only build,kernels,step  these; the file's other sections stay

Writes bench/results/<gpu>.json, a table and a log beside it, and all three into the folder that the
environment variable OUT names as well. Every row is there as soon as it is measured. Nothing is
installed or downloaded: packages that are missing are named, and what needs them is left out. The
package's own dependencies, tyro among them, must be there; so must pytest and pytest-benchmark for
tests and benchmarks. Without a GPU the same is done on the CPU with tiny sizes, into a temporary
folder.
What is measured, and how, is in gpu_measure.py; this file needs no package.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START = time.monotonic()

SECTIONS = (
    "build", "tests", "kernels", "step", "step-compile", "accuracy", "teacher", "bank",
    "kernels-compile", "sanitizer",
)  # fmt: skip
# N, C, F. The first two are the method's own sizes.
SIZES = [
    (1024, 10, 84), (65536, 10, 84), (32768, 1024, 0), (32768, 4096, 0), (32768, 256, 0),
    (32768, 16384, 0), (16384, 131072, 0),
]  # fmt: skip
# Seconds that are kept for the last section.
RESERVED = 40
TINY = [(64, 10, 8), (16, 100, 0), (4, 2000, 0)]
PACKAGES = (
    "tyro", "rich", "safetensors", "yaml", "numpy", "torchvision", "mlxtend", "pytest",
    "pytest_benchmark", "hypothesis", "ninja", "triton", "liger_kernel",
)  # fmt: skip


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


# ---- The parent: one process after the other, and what they say is kept -------------------------


class Check:
    """The results so far, in files that are whole at any time.

    With `keep` the sections of the file that is there stay; those that run now replace theirs.
    """

    def __init__(
        self, facts: dict[str, Any], folders: list[Path], seconds: float, keep: bool = False
    ) -> None:
        self.facts, self.folders, self.until = facts, folders, START + seconds
        self.stem = re.sub(r"[^A-Za-z0-9]+", "-", facts["gpu"] or "no-gpu").strip("-")
        self.sections: dict[str, Any] = {}
        self.bad: list[str] = []
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        path = folders[0] / f"{self.stem}.json"
        if keep and path.exists():
            self.sections = json.loads(path.read_text()).get("sections", {})
        mode = "a" if keep else "w"
        self.logs = [(folder / f"{self.stem}.log").open(mode) for folder in folders]

    def begin(self, section: str) -> None:
        keys = ("date", "driver", "torch", "cuda", "copy_GB_per_s")
        run = {key: self.facts.get(key) for key in keys}
        self.sections[section] = {"run": run, "jobs": {}, "rows": []}

    def write(self) -> None:
        results = {**self.facts, "sections": self.sections}
        texts = {"json": json.dumps(results, indent=1) + "\n", "md": tables(results)}
        for folder in self.folders:
            for suffix, text in texts.items():
                part = folder / f"{self.stem}.{suffix}.part"
                part.write_text(text)
                part.replace(folder / f"{self.stem}.{suffix}")

    def log(self, text: str) -> None:
        for file in self.logs:
            file.write(text)
            file.flush()

    def note(self, section: str, job: str, outcome: str) -> None:
        self.sections[section]["jobs"][job] = outcome
        self.write()
        say(f"{section}, {job}: {outcome}")
        if not outcome.startswith(("ok", "not run")):
            self.bad.append(f"{section}, {job}")

    def row(self, section: str, row: dict[str, Any]) -> None:
        self.sections[section]["rows"].append(row)
        self.write()

    def job(self, section: str, job: str, command: list[str], limit: float, /,
            **environment: str) -> list[str]:  # fmt: skip
        """Runs a command for as long as there is time, and keeps the rows that it prints."""
        left = self.until - time.monotonic()
        if left < 5:
            self.note(section, job, "not run: out of time")
            return []
        start, lines, missing = time.monotonic(), [], ""

        def read(line: str) -> None:
            nonlocal missing
            self.log(line)
            lines.append(line.rstrip())
            if line.startswith("ROW "):
                self.row(section, json.loads(line[4:]))
            elif line.startswith("MISSING "):
                missing = f"not run: no package {line[8:].strip()}"

        self.log(f"\n==== {' '.join(command)}\n")
        code = run(command, min(limit, left), read, environment)
        self.log(f"({'killed' if code is None else f'exit status {code}'})\n")
        took = f"{time.monotonic() - start:.0f} s"
        outcome = "ok" if code == 0 else f"FAILED, exit status {code}"
        if code is None:
            outcome = "not run to its end: out of time" if left < limit else "KILLED"
        self.note(section, job, missing or f"{outcome}, {took}")
        return lines


def run(command: list[str], limit: float, read: Callable[[str], None],
        environment: dict[str, str]) -> int | None:  # fmt: skip
    """A command's exit status, None past the limit; whatever it started ends with it."""
    child = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, text=True,
        errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    late = threading.Event()

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer(limit, lambda: (late.set(), end()))
    timer.start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            read(line)
        code = child.wait()
    finally:
        timer.cancel()
        end()
        child.wait()
    return None if late.is_set() else code


def child(what: str, *arguments: Any) -> list[str]:
    return [sys.executable, "tools/gpu_measure.py", what, *map(str, arguments)]


def tables(results: dict[str, Any]) -> str:
    head = ", ".join(f"{key} {value}" for key, value in results.items() if key != "sections")
    lines = [head, ""]
    for name, section in results["sections"].items():
        jobs = "; ".join(f"{job}: {outcome}" for job, outcome in section["jobs"].items())
        lines += [f"## {name}", "", f"{section['run']['date']}: {jobs}", ""]
        keys = list(dict.fromkeys(key for row in section["rows"] for key in row
                                  if not isinstance(row[key], (list, dict))))  # fmt: skip
        if keys:
            lines += [f"| {' | '.join(keys)} |", "| --- " * len(keys) + "|"]
            for row in section["rows"]:
                lines.append(f"| {' | '.join(str(row.get(key, '')) for key in keys)} |")
            lines.append("")
    return "\n".join(lines) + "\n"


# ---- Sections -----------------------------------------------------------------------------------


def build(check: Check) -> None:
    cores = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    lines = check.job("build", "all", command, 240, TORCH_CUDA_ARCH_LIST=archs, MAX_JOBS=cores)
    if check.bad:
        print("\n".join(lines[-30:]))


def tests(check: Check) -> None:
    # With -v a test that fails is named at once, also if there is no time for those that follow.
    command = ["-m", "pytest", "tests", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider",
               "--continue-on-collection-errors", "--durations=10"]  # fmt: skip
    lines = check.job("tests", "gpu", [sys.executable, *command], 150)
    bad = failures(lines)
    check.row("tests", {"summary": lines[-1] if lines else "", "bad": bad})
    print("\n".join([*lines[-1:], *bad]))


def failures(lines: list[str]) -> list[str]:
    """What pytest -v printed of tests that failed, and of the one in which its process ended."""
    bad = [line[:300] for line in lines if re.search("^(FAILED|ERROR)|::.* (FAILED|ERROR)", line)]
    begun = [line for line in lines if re.match(r"\S+\.py::", line)]
    if begun and not re.search(r" (PASSED|SKIPPED|XFAIL|XPASS|FAILED|ERROR)\b", begun[-1]):
        bad.append(f"{begun[-1].split()[0][:280]} did not end")
    return bad


def kernels(check: Check, section: str = "kernels") -> None:
    on_gpu = check.facts["gpu"] is not None
    compiled = section == "kernels-compile"
    for N, C, F in SIZES if on_gpu else TINY[:1] if compiled else TINY:
        # The largest size shows bandwidth, which needs no rival.
        if not compiled or C <= 16384:
            peak = check.facts["copy_GB_per_s"]
            check.job(section, f"{N}x{C}", child("kernels", N, C, F, peak, int(compiled)), 60)


def step(check: Check, section: str = "step") -> None:
    on_gpu = check.facts["gpu"] is not None
    cases = ("mnist", "cifar", "mnist-64") if on_gpu else ("mnist-64",)
    compiled = section == "step-compile"
    if compiled and not on_gpu:
        check.note(section, "all", "not run: no GPU")
        return
    for case in cases[:2] if compiled else cases:
        check.job(section, case, child("step", case, int(compiled)), 120 if compiled else 75)


def suite(check: Check, name: str, limit: float) -> None:
    """A suite of bench/, each preset in a process of its own."""
    tiny = {} if check.facts["gpu"] else {"DAFL_BENCH_ROUNDS": "1"}
    for preset in ("mnist", "cifar10") if not tiny else ("mnist",):
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "results.json"
            command = ["-m", "pytest", "-q", f"bench/bench_{name}.py", "-k", preset,
                       "--benchmark-only", "-p", "no:cacheprovider",
                       f"--benchmark-json={found}"]  # fmt: skip
            check.job(name, preset, [sys.executable, *command], limit, **tiny)
            if found.exists() and found.stat().st_size:
                for row in json.loads(found.read_text())["benchmarks"]:
                    check.row(name, {"name": row["name"], **row["extra_info"]})


def accuracy(check: Check) -> None:
    on_gpu = check.facts["gpu"] is not None
    for recipe, seconds in (("fast", 10), ("published", 20)) if on_gpu else (("fast", 2),):
        for seed in (0, 1, 2) if on_gpu else (0,):
            job = f"{recipe}, seed {seed}"
            check.job("accuracy", job, child("accuracy", recipe, seconds, seed), seconds + 40)


def sanitizer(check: Check) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if check.facts["gpu"] is None:
        check.job("sanitizer", "without it", child("exercise"), 60)
    elif not Path(tool).exists():
        check.note("sanitizer", "all", "not run: no compute-sanitizer here")
    else:
        for name in ("memcheck", "racecheck", "synccheck"):
            # Hazards within a kernel of cuDNN's are none of ours.
            others = ["--kernel-name-exclude", "kns=cudnn"] if name == "racecheck" else []
            command = [tool, "--tool", name, *others, "--error-exitcode", "9", *child("exercise")]
            lines = check.job("sanitizer", name, command, 60)
            summary = [line for line in lines if "SUMMARY" in line]
            check.row("sanitizer", {"tool": name, "summary": " ".join(summary)})


RUN: dict[str, Callable[[Check], None]] = {
    "build": build,
    "tests": tests,
    "kernels": kernels,
    "step": step,
    "step-compile": lambda check: step(check, "step-compile"),
    "accuracy": accuracy,
    "teacher": lambda check: suite(check, "teacher", 60),
    "bank": lambda check: suite(check, "bank", 40),
    "kernels-compile": lambda check: kernels(check, "kernels-compile"),
    "sanitizer": sanitizer,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=480, help="what no longer fits is left")
    arguments = parser.parse_args()
    only = arguments.only.split(",") if arguments.only else list(SECTIONS)
    if unknown := set(only) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(SECTIONS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the child that runs

    lines: list[str] = []
    run(child("facts"), 90, lines.append, {})
    rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    if not rows:
        print("".join(lines))
        return 1
    facts = {**rows[0], "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    facts["missing"] = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if facts["gpu"] and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        run(query, 30, lambda line: facts.update(driver=line.strip()), {})
    folders = [ROOT / "bench" / "results"]
    if facts["gpu"] is None:
        say("no NVIDIA GPU is visible: a dry run on the CPU with tiny sizes, no result is kept")
        folders = [Path(tempfile.mkdtemp())]
    if os.environ.get("OUT"):
        folders.append(Path(os.environ["OUT"]))
    say(", ".join(f"{key} {value}" for key, value in facts.items()))

    check = Check(facts, folders, arguments.seconds, keep=bool(arguments.only))
    for section in SECTIONS:
        if section in only:
            # The last has its share of the time, whatever the others take.
            spare = RESERVED if "sanitizer" in only and section != "sanitizer" else 0
            check.until = START + arguments.seconds - spare
            check.begin(section)
            RUN[section](check)
            if check.bad == ["build, all"]:
                return 1
    print(tables({"sections": {name: check.sections[name] for name in only}}))
    say(f"written: {folders[0] / check.stem}.json, .md and .log")
    say(f"FAILED: {'; '.join(check.bad)}" if check.bad else "done")
    return 1 if check.bad else 0


if __name__ == "__main__":
    sys.exit(main())

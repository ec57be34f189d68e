"""Changes the CUDA kernels in one place each and says which test of the emulation finds it:
`make mutants`.

    python tools/mutants.py                 all of tests/mutants.py, about 10 minutes on two CPUs
    python tools/mutants.py --third today   one in three, others tomorrow (or --third 0, 1, 2)
    python tools/mutants.py --only tie      those with the word in their file, text or reason
    python tools/mutants.py --equivalent    those that no test can find: all must survive

Each change is made in a copy of csrc/. Exits with 1 if one survives that should not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import emulated  # noqa: E402
from tests.mutants import MUTANTS, Mutant  # noqa: E402

TESTS = "tests/test_cuda_emulated.py"
PATIENCE = 300  # seconds; then a change has made a kernel that never ends


class Verdict(NamedTuple):
    killer: str  # the test; nothing: it survives
    how: str


class Watch:
    """A plugin of pytest: tries the likeliest tests first, and notes what runs and what fails."""

    def __init__(self, words: list[str], notes: Path):
        self.words, self.notes = words, notes

    def pytest_collection_modifyitems(self, items) -> None:
        items.sort(key=lambda item: not any(word in item.name for word in self.words))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.notes.write_text(nodeid.partition("::")[2] + "\n")

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            with self.notes.open("a") as notes:
                notes.write(crash.message if crash else str(report.longrepr))


def dependencies(source: Path) -> set[str]:
    """Files of the project that a source includes, itself too."""
    command = emulated.command(ROOT, source, Path("-"))
    command[command.index("-c")] = "-MM"
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    paths = [Path(word).resolve() for word in text.replace("\\\n", " ").split()[1:]]
    return {str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT)}


class Bench:
    """The unchanged sources, compiled, and what depends on what."""

    def __init__(self, folder: Path, tests: str = TESTS):
        self.folder, self.tests = folder, tests
        emulated.build(ROOT, folder)
        self.needs = {
            str(source.relative_to(ROOT)): dependencies(source) for source in emulated.sources(ROOT)
        }

    def build(self, mutant: Mutant, folder: Path) -> Path:
        for name in ("csrc", "tests/emulation"):
            shutil.copytree(ROOT / name, folder / name)
        changed = folder / mutant.file
        text = changed.read_text()
        assert text.count(mutant.old) == 1, f"stands {text.count(mutant.old)} times: {mutant.old}"
        changed.write_text(text.replace(mutant.old, mutant.new))
        objects = []
        for name, needed in self.needs.items():
            source = folder / name
            objects.append(self.folder / f"{source.stem}.o")
            if mutant.file in needed:
                objects[-1] = folder / f"{source.stem}.o"
                # Most time goes into compiling.
                command = [*emulated.command(folder, source, objects[-1]), "-O0"]
                subprocess.run(command, check=True)
        emulated.link(objects, folder / "kernels.so")
        return folder / "kernels.so"

    def try_out(self, mutant: Mutant, folder: Path) -> int:
        """In a process of its own: pytest's exit status."""
        library = self.build(mutant, folder)
        os.environ["DAFL_FAST_EMULATION"] = str(library)
        torch.set_num_threads(1)
        signal.alarm(PATIENCE)
        os.chdir(ROOT)
        arguments = ["-qx", "--tb=short", "-p", "no:cacheprovider", "-p", "no:faulthandler",
                     self.tests]  # fmt: skip
        words = mutant.by.split(" or ") if mutant.by else []
        return int(pytest.main(arguments, [Watch(words, folder / "notes")]))

    def start(self, mutant: Mutant, folder: Path) -> int:
        folder.mkdir()
        if pid := os.fork():
            return pid
        try:
            said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 1)
            os.dup2(said, 2)
            status = self.try_out(mutant, folder)
        except BaseException:
            traceback.print_exc()
            status = 100
        finally:
            sys.stdout.flush()
            os._exit(status)

    def verdict(self, folder: Path, status: int) -> Verdict:
        if status == 0:
            return Verdict("", "")
        if status == 100:
            return Verdict("", (folder / "said").read_text())
        test, _, reason = (folder / "notes").read_text().partition("\n")
        if status == -signal.SIGALRM:
            reason = f"does not end within {PATIENCE} seconds"
        return Verdict(test, reason.strip().partition("\n")[0] or f"ends the process ({status})")

    def judge(self, mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, Verdict]]:
        """In the order in which they are done."""
        running: dict[int, tuple[Mutant, Path]] = {}
        waiting = list(enumerate(mutants))
        while waiting or running:
            while waiting and len(running) < jobs:
                number, mutant = waiting.pop(0)
                folder = self.folder / str(number)
                running[self.start(mutant, folder)] = mutant, folder
            pid, status = os.wait()
            mutant, folder = running.pop(pid)
            yield mutant, self.verdict(folder, os.waitstatus_to_exitcode(status))
            shutil.rmtree(folder)


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    mutants = [m for m in MUTANTS if bool(m.equivalent) == arguments.equivalent]
    if arguments.only:
        mutants = [m for m in mutants if arguments.only in " ".join(m)]
    if arguments.third is not None:
        day = date.today().toordinal() if arguments.third == "today" else int(arguments.third)
        mutants = mutants[day % 3 :: 3]
    return mutants


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--third", choices=["0", "1", "2", "today"])
    parser.add_argument("--only", metavar="WORD")
    parser.add_argument("--equivalent", action="store_true")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def main() -> int:
    arguments = parser().parse_args()
    mutants = chosen(arguments)
    begin = time.monotonic()
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        for mutant, verdict in Bench(Path(folder)).judge(mutants, arguments.jobs):
            print("killed  " if verdict.killer else "SURVIVES", end=" ")
            print(f"{mutant.file}: {mutant.why}")
            print(f"         {verdict.killer or 'no test'}: {verdict.how}"[:160], flush=True)
            if not verdict.killer:
                survivors.append(mutant)
    print(f"\n{len(mutants) - len(survivors)} of {len(mutants)} killed", end=", ")
    print(f"{time.monotonic() - begin:.0f} seconds")
    for mutant in survivors:
        print(f"survives: {mutant.file}: {mutant.why}  {mutant.equivalent}")
    return int(len(survivors) != (len(mutants) if arguments.equivalent else 0))


if __name__ == "__main__":
    sys.exit(main())

"""Whether a benchmark has become slower: python bench/compare.py OLD NEW [--threshold 0.10].

On one machine our times are compared. On different ones it is our time in units of eager PyTorch's,
which had its turns in the same run. The exit status is 1 if one grew by more than the threshold
or has gone, and 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import load, machine, rows, seconds  # noqa: E402
from dafl_fast.errors import UserError, command  # noqa: E402


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float) -> tuple[str, bool]:
    """A table of all benchmarks in either file, and whether one is gone or too slow."""
    same = machine(old) == machine(new)
    befores, afters = rows(old), rows(new)
    if not befores.keys() & afters.keys():
        raise UserError("the two files have no benchmark in common")

    def value(row: dict[str, Any]) -> float | None:
        found = seconds(row)
        if same:
            return found.get("ours")
        return found["ours"] / found["eager"] if {"ours", "eager"} <= found.keys() else None

    def shown(number: float | None) -> str:
        if number is None:
            return "-"
        return f"{number * 1e3:.3f} ms" if same else f"{number:.4f}"

    what = f"seconds on {machine(new)}" if same else (
        f"ours / eager, for the machines differ ({machine(old)}, {machine(new)})"
    )  # fmt: skip
    lines, failed = [f"Compared: {what}"], False
    width = max(map(len, [*befores, *afters]))
    for name in [*befores, *(name for name in afters if name not in befores)]:
        before = value(befores[name]) if name in befores else None
        after = value(afters[name]) if name in afters else None
        if name not in afters:
            verdict, failed = "MISSING", True
        elif name not in befores:
            verdict = "new"
        elif before is None:
            verdict = "not compared"
        elif after is None:
            verdict, failed = "SLOWER: no time any more", True
        else:
            change = after / before - 1
            slower = change > threshold
            failed |= slower
            verdict = f"{change:+7.1%}{'  SLOWER' if slower else ''}"
        lines.append(f"{name:{width}}  {shown(before):>14}  {shown(after):>14}  {verdict}")
    return "\n".join(lines), failed


@command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument(
        "--threshold", type=float, default=0.10, help="tolerated growth, 0.10: 10 %%"
    )
    options = parser.parse_args()
    if not options.threshold >= 0:
        raise UserError(f"--threshold must be 0 or more, got {options.threshold}")
    text, failed = compare(load(options.old), load(options.new), options.threshold)
    print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""The losses of published methods in this package's step, with equal seconds: which teaches best?

    python bench/compare_methods.py mnist --max-seconds 30
    python bench/compare_methods.py --seeds 0 1 2 --methods dafl cmi recipe --out runs/methods \
        custom --teacher ResNet20 --teacher-weights resnet20.safetensors --student ResNet8 \
        --image-shape 3 32 32 --max-seconds 600 --eval imagefolder --data-dir photos

What is no option of this program is a command of `dafl_fast.train`. Every method has the generator,
bank, student and speed of that command, so only the losses of the generator differ; its published
code has others, and none of that code is here. A run that is done is not run again, and one that
was stopped is gone on with. Nothing else may run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dafl_fast.config import Config  # noqa: E402
from dafl_fast.distill import train  # noqa: E402
from dafl_fast.errors import UserError, command  # noqa: E402
from dafl_fast.files import read_json, write_json, write_text  # noqa: E402
from dafl_fast.losses import PLAIN_GENERATOR_LOSSES  # noqa: E402
from dafl_fast.paper import LOSSES  # noqa: E402
from dafl_fast.train import named, parse  # noqa: E402

NONE: dict[str, float] = dict.fromkeys((*LOSSES, *PLAIN_GENERATOR_LOSSES), 0.0)
# Weights as in the paper or code that is named. The adversarial loss is that of CMI, which leaves
# out images for which student and teacher already differ. What a method has beside its losses, such
# as labels for the generator or images in place of one, is not there.
METHODS: dict[str, dict[str, float] | None] = {
    "none": NONE,  # generators as drawn
    "dafl": {**NONE, "one_hot": 1.0, "entropy": 5.0, "activation": 0.1},  # Chen et al. 2019
    "dfad": {**NONE, "adversarial": 1.0},  # Fang et al. 2019
    "deepinversion": {**NONE, "one_hot": 1.0, "bn_statistics": 10.0},  # Yin et al. 2020
    "cmi": {**NONE, "one_hot": 1.0, "bn_statistics": 1.0, "adversarial": 0.5},  # Fang et al. 2021
    "fastdfkd": {**NONE, "one_hot": 0.4, "bn_statistics": 10.0, "adversarial": 1.1},  # 2022
    "nayer": {**NONE, "one_hot": 0.5, "bn_statistics": 10.0, "adversarial": 1.33},  # Tran 2024
    "recipe": None,  # the weights of the command
}


def compare(
    command_line: list[str], methods: list[str], seeds: list[int], out: Path
) -> list[dict[str, Any]]:
    """One row a method, with what its runs came to.

    Raises:
        UserError: the command is not usable, or the folder has runs of another one.
    """
    usual = parse(command_line)
    if usual.eval == "none":
        raise UserError("--eval none leaves nothing to compare; name labelled images, --eval mnist")
    asked, this = out / "command.json", {"command": command_line}
    if asked.exists() and read_json(asked, "command") != this:
        raise UserError(f"{out} has runs of another command; choose another folder with --out")
    write_json(asked, this)
    for seed in seeds:  # methods take turns, so that a slow hour is nobody's
        for method in methods:
            run(usual, named(command_line), method, seed, out / f"{method}-{seed}")
    return [row(method, seeds, out) for method in methods]


def run(usual: Config, chosen: set[str], method: str, seed: int, folder: Path) -> None:
    """A run of `usual` with the method's losses, unless it is done."""
    summary = folder / "summary.json"
    if summary.exists() and not read_json(summary, "summary")["interrupted"]:
        return
    weights = METHODS[method] or {}
    print(f"{method}, seed {seed}", flush=True)
    if (folder / "checkpoint.pt").exists():
        changes: dict[str, Any] = {"resume": folder}
    else:
        changes = {"out_dir": folder}
    config = dataclasses.replace(usual, seed=seed, **weights, **changes)
    if train(config, chosen=chosen | weights.keys())["interrupted"]:
        raise KeyboardInterrupt


def row(method: str, seeds: list[int], out: Path) -> dict[str, Any]:
    """What the runs of a method came to: accuracies of the last students and the means of the rest.

    `estimate` is the agreement with the teacher that the run itself expected on real images.
    """
    summaries = [read_json(out / f"{method}-{seed}" / "summary.json", "summary") for seed in seeds]
    accuracies = [summary["student_accuracy"] for summary in summaries]
    estimates = [summary.get("estimated_agreement") for summary in summaries]
    return {
        "method": method,
        "accuracies": accuracies,
        "mean": statistics.fmean(accuracies),
        "sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "teacher": summaries[0]["teacher_accuracy"],
        "seconds": statistics.fmean(summary["train_seconds"] for summary in summaries),
        "steps": statistics.fmean(summary["steps"] for summary in summaries),
        "estimate": None if None in estimates else statistics.fmean(estimates),
    }


def markdown(rows: list[dict[str, Any]], seeds: list[int]) -> str:
    """The rows as a table."""
    lines = [
        f"| losses | accuracy, % (seeds {', '.join(map(str, seeds))}) | mean | steps | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in rows:
        each = ", ".join(f"{100 * value:.2f}" for value in one["accuracies"])
        spread = "" if one["sd"] is None else f" ± {100 * one['sd']:.2f}"
        mean = f"{100 * one['mean']:.2f}{spread}"
        lines.append(
            f"| {one['method']} | {each} | {mean} | {one['steps']:.0f} | {one['seconds']:.0f} |"
        )
    teacher = f"The teacher has {100 * rows[0]['teacher']:.2f} %."
    return "\n".join([*lines, "", teacher, ""])


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs") / "methods")
    options, command_line = parser.parse_known_args()
    rows = compare(command_line, options.methods, options.seeds, options.out)
    write_json(options.out / "methods.json", rows)
    text = markdown(rows, options.seeds)
    write_text(options.out / "methods.md", text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())

"""Time to accuracy: the `fast` MNIST recipe with the bundled teacher, from the first step.

The student is looked at every few seconds on the 5,000 held-out images; that time and the time of
saving are not counted. The run ends when it reaches 98 %, or after 90 seconds of training, for
which its learning rates are laid out. What other code reaches in that time is not measured: the
published step alone (bench_step.py) takes seconds.
"""

from __future__ import annotations

import signal

from bench.measure import GPU, PRECISION, ROUNDS
from dafl_fast.config import make_config
from dafl_fast.engine.loop import train

GOALS = (97, 98)


def test_time_to_accuracy(benchmark, capsys, tmp_path):
    config = make_config(
        "mnist",
        "fast",
        out_dir=tmp_path / "run",
        max_seconds=5.0 if ROUNDS else 90.0,
        eval_every=0.5 if GPU else 2.0,
    )
    curve: list[tuple[float, float]] = []

    def watch(row):
        if "accuracy" in row:
            curve.append((row["train_seconds"], 100 * row["accuracy"]))
            # Ends the run after this step, whose evaluation comes once more; a second signal would
            # end the process.
            if sum(percent >= GOALS[-1] for _, percent in curve) == 1:
                signal.raise_signal(signal.SIGINT)

    summary = benchmark.pedantic(lambda: train(config, watch), rounds=1)
    reached = {
        goal: next((seconds for seconds, percent in curve if percent >= goal), None)
        for goal in GOALS
    }
    benchmark.extra_info.update(
        {f"seconds_to_{goal}_percent": seconds for goal, seconds in reached.items()},
        # As the other suites call the time that counts; None if the goal was not reached.
        ours_s=reached[GOALS[-1]],
        curve=[(round(seconds, 2), round(percent, 2)) for seconds, percent in curve],
        images_per_second=summary["images_per_second"],
        steps_per_second=round(summary["steps"] / summary["train_seconds"], 2),
        precision=PRECISION,
    )
    with capsys.disabled():
        print("\nTime to accuracy, MNIST, recipe fast, bundled teacher")
        for goal, seconds in reached.items():
            print(f"  {goal} %: {'not reached' if seconds is None else f'{seconds:.1f} s'}")

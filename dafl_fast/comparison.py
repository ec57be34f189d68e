"""The results of a table beside the paper's numbers: as JSON, as Markdown and as a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .engine.folder import read_metrics
from .errors import require
from .files import read_json, reading, write_atomically
from .paper import Row, Table
from .templates import render


def compare(table: Table, folder: Path, what: dict[str, Any]) -> dict[str, Any]:
    """The results of `table` in `folder`, results/<row>-<seed>.json, as <table>.json has them:
    after `what`, which says what was run."""
    results = [read_result(path) for path in (folder / "results").glob("*.json")]
    results.sort(key=lambda result: result["seed"])
    teachers = [result["accuracy"] for result in results if result["row"] == "teacher"]
    return {
        **what,
        "teacher_accuracy": teachers[0] if teachers else None,
        "wall_seconds": sum(result["wall_seconds"] for result in results),
        "date": max((result["date"] for result in results), default=None),
        "machines": sorted({_machine(result) for result in results}),
        "rows": [
            _summary(name, row, [result for result in results if result["row"] == name])
            for name, row in table.rows.items()
        ],
    }


def read_result(path: Path) -> dict[str, Any]:
    """What came of a run; raises UserError if the file is damaged."""
    result = read_json(path, "result")
    with reading(path, "result", "is damaged, remove it to run that again"):
        for name in ("accuracy", "train_seconds", "images", "wall_seconds"):
            value = result[name]
            number = type(value) in (int, float) and abs(value) < 2**63
            if not number and (name == "wall_seconds" or value is not None):
                raise ValueError(f"{name} cannot be {value!r}")
        texts = [result[name] for name in ("row", "date")] + [result.get("data") or ""]
        if type(result["seed"]) is not int or not all(isinstance(text, str) for text in texts):
            raise ValueError("its row, seed, date or data")
        if result["accuracy"] is None and not isinstance(result["stopped"], str):
            raise ValueError("neither an accuracy nor why it was stopped")
        _machine(result)
    return result


def curves(table: Table, folder: Path) -> dict[str, list[list[tuple[float, float]]]]:
    """Accuracy (0..1) over seconds of training of each DAFL row, by label, a curve a seed."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for name, row in table.rows.items():
        for run in sorted(path.parent for path in folder.glob(f"runs/{name}-*/metrics.jsonl")):
            if (folder / "results" / f"{run.name}.json").exists():
                lines = [line for line in read_metrics(run) if "accuracy" in line]
                points = [(line["train_seconds"], line["accuracy"]) for line in lines]
                found.setdefault(row.label, []).append(points)
    return found


def _summary(name: str, row: Row, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the seeds of a row have in common."""
    done = [result for result in results if result["accuracy"] is not None]
    accuracies = [result["accuracy"] for result in done]

    def mean(key: str) -> float | None:
        values = [result[key] for result in done if result[key] is not None]
        return statistics.fmean(values) if values else None

    sd = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    ours = "stopped" if results else "not run"
    if accuracies:
        ours = f"{100 * statistics.fmean(accuracies):.2f}"
    if sd is not None:
        ours += f" ± {100 * sd:.2f}"
    sources = sorted({result["data"] for result in done if result.get("data")})
    return {
        "row": name,
        "label": row.label + (f" ({' and '.join(sources)})" if sources else ""),
        "paper": row.paper,
        "ours": ours,
        "seeds": [result["seed"] for result in done],
        "accuracies": accuracies,
        "mean": mean("accuracy"),
        "sd": sd,
        "train_seconds": mean("train_seconds"),
        "images": mean("images"),
        "stopped": {r["seed"]: r["stopped"] for r in results if r["accuracy"] is None},
    }


def _machine(result: dict[str, Any]) -> str:
    machine = result["environment"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, no GPU"
    return f"{where}, PyTorch {machine['torch']}, {result['precision']}"


def markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table with a title and a sentence on how it came about."""
    return render("table.md.j2", report) + "\n"


def save_comparison(
    path: Path,
    title: str,
    rows: list[dict[str, Any]],
    curves: dict[str, list[list[tuple[float, float]]]],
) -> None:
    """Plots the accuracies of a table beside the paper's, and those of DAFL over time, as a PNG.

    Args:
        rows: each with `label`, `paper` (per cent), `mean` and `sd` (0..1, or None), and `ours`,
            the text for those two.
        curves: by label, a list of (seconds, accuracy 0..1) for each seed.

    Raises:
        UserError: matplotlib is missing.
    """
    require("matplotlib", "the plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.6 + 0.55 * len(rows)), dpi=120, layout="constrained")
    figure.suptitle(title)
    bars, lines = figure.subplots(1, 2)
    places = range(len(rows))
    means = [100 * (row["mean"] or 0) for row in rows]
    spreads = [100 * (row["sd"] or 0) for row in rows]
    papers = [row["paper"] for row in rows]
    for offset, values, errors, texts, colour, whose in (
        (-0.2, papers, [0.0] * len(rows), [f"{x:.2f}" for x in papers], "#b8c4d0", "paper"),
        (0.2, means, spreads, [row["ours"] for row in rows], "#1f5f99", "ours"),
    ):
        heights = [place + offset for place in places]
        drawn = bars.barh(heights, values, 0.38, xerr=errors, color=colour, label=whose)
        bars.bar_label(drawn, texts, padding=4)
    bars.set_yticks(places, [row["label"] for row in rows])
    bars.invert_yaxis()
    bars.set_xlim(0, 140)  # room for the numbers
    bars.set_xticks(range(0, 101, 20))
    bars.set_xlabel("accuracy in %, ± standard deviation over seeds")
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    for number, (label, runs) in enumerate(curves.items()):
        for run in runs:
            seconds, accuracies = [x for x, _ in run], [100 * y for _, y in run]
            name = label if run is runs[0] else None
            lines.plot(seconds, accuracies, ".-", color=f"C{number}", label=name)
    lines.set_xlabel("seconds of training")
    lines.set_ylabel("accuracy of DAFL in %, a line a seed")
    lines.grid(alpha=0.3)
    if len(curves) > 1:
        figure.legend(*lines.get_legend_handles_labels(), loc="outside right center")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))

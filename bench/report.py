"""Tables and plots from a results file of `make bench`.

    python bench/report.py bench/out/latest.json            table and plots beside it
    python bench/report.py bench/out/latest.json --store    and a copy in bench/results
    python bench/report.py --readme                         README's table from bench/results

A results file is pytest-benchmark's JSON. We read only the extra_info of each benchmark: it holds
the median time of each contender, and the contenders took turns (see `bench.measure.record`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dafl_fast.errors import UserError, command, require  # noqa: E402
from dafl_fast.files import write_atomically, write_text  # noqa: E402

README = ROOT / "README.md"
# One for each kind of machine; the first has all its columns there.
README_RESULTS = (
    ROOT / "bench" / "results" / "cpu-2x-amd-epyc-avx512-bf16.json",
    ROOT / "bench" / "results" / "cpu-2x-amd-epyc-avx2.json",
)
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
# The rows that README shows, in this order.
README_ROWS = (
    "test_time_to_accuracy",
    "test_step[mnist]",
    "test_step[cifar]",
    "test_teacher[mnist]",
    "test_teacher[cifar10]",
    "test_losses[generator_loss-1024x10-features0-threads1]",
    "test_losses[distill_loss-1024x10-features0-threads1]",
    "test_losses[generator_loss-1024x1000-features0-threads1]",
    "test_losses[distill_loss-1024x1000-features0-threads1]",
    "test_bank[cifar10-draw]",
)
# The name that a suite gives to a contender, and its role: the role decides the column.
ROLES = {
    "ours": "ours", "eager": "eager", "published": "eager", "tuned": "tuned",
    "compile": "compile", "compiled": "compile", "ours+": "ours+",
}  # fmt: skip
COLOURS = {"ours": "#1f5f99", "eager": "#8d99a6", "tuned": "#8a9a5b", "compile": "#d98c3f"}
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
Row = dict[str, Any]


# ---- Reading ------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        UserError: it cannot be read or is not pytest-benchmark's.
    """
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    known = isinstance(results, dict) and isinstance(results.get("machine_info"), dict)
    if not known or not isinstance(results.get("benchmarks"), list) or not results["benchmarks"]:
        raise UserError(f"{path} is not a results file of pytest-benchmark, or has no benchmarks")
    return results


def rows(results: dict[str, Any]) -> dict[str, Row]:
    """The benchmarks by name."""
    return {row["name"]: row for row in results["benchmarks"]}


def seconds(row: Row) -> dict[str, float]:
    """The median of each contender, by its role: "ours", "eager", "tuned", "compile", "ours+"."""
    return {
        role: value * factor
        for name, role in ROLES.items()
        for unit, factor in UNITS.items()
        if (value := row["extra_info"].get(f"{name}_{unit}")) is not None
    }


def machine(results: dict[str, Any]) -> str:
    """The machine's name, which is also the name of its results file. A processor's has the
    instructions that were used: many have one brand, and any can be capped."""
    info = results["machine_info"]
    cpu = info.get("cpu", {})
    gpu = info.get("gpu")
    brand, isa = cpu.get("brand_raw") or "unknown", info.get("isa", "")
    name = f"gpu {gpu}" if gpu else f"cpu {cpu.get('count', 1)}x {brand} {isa}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def setting(results: dict[str, Any]) -> str:
    """The machine, the version of torch and the day, as a title."""
    version = results["machine_info"].get("torch")
    day = str(results.get("datetime", ""))[:10]
    return ", ".join(filter(None, [machine(results), version and f"torch {version}", day]))


def label(row: Row) -> str:
    """What a benchmark measured, as a row of a table names it."""
    kind, _, case = row["name"].removesuffix("]").partition("[")
    facts, settings = row["extra_info"], row.get("params") or {}
    mnist = case.startswith("mnist")
    batch = f", batch {facts['batch']}" if "batch" in facts else ""
    if kind == "test_time_to_accuracy":
        return "MNIST, training until the student reaches 98 %"
    if kind == "test_step":
        networks = (
            "MNIST training step, LeNet-5" if mnist else "CIFAR training step, ResNet-34 to 18"
        )
        return f"{networks}{batch}"
    if kind == "test_teacher":
        return f"{'LeNet-5' if mnist else 'ResNet-34'} teacher, gradient to its images{batch}"
    if kind == "test_bank":
        return f"replay bank, {'MNIST' if mnist else 'CIFAR'}: {case.rpartition('-')[2]} a batch"
    if kind == "test_sweep":
        return f"{settings['loss']}, 4 million logits, {settings['classes']} classes"
    if kind == "test_losses":
        features = f", {settings['features']} features" if settings["features"] else ""
        threads = f", {settings['threads']} thread{'s' * (settings['threads'] > 1)}"
        threads *= facts.get("device", "cpu") == "cpu"
        size = f"{settings['rows']} × {settings['classes']} logits"
        return f"{settings['loss']}, {size}{features}{threads}"
    return str(row["name"])


# ---- Tables -------------------------------------------------------------------------------------


def duration(value: float | None) -> str:
    if value is None:
        return ""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if value < limit:
            shown = value * factor
            return f"{shown:.{0 if shown >= 10 else 2}f} {unit}"
    return f"{value:.2f} s"


def shown(row: Row, role: str) -> str:
    """A contender's time, or the accuracy that it reached in the time that ours took."""
    reached = [row["extra_info"].get(f"{n}_percent") for n, r in ROLES.items() if r == role]
    percent = next((value for value in reached if value is not None), None)
    return duration(seconds(row).get(role)) if percent is None else f"{percent:.1f} % in that time"


def times(row: Row, role: str) -> str:
    """How many times as fast as that contender dafl_fast is."""
    found = seconds(row)
    return f"{found[role] / found['ours']:.1f}×" if {role, "ours"} <= found.keys() else ""


def table(columns: list[str], lines: list[list[str]]) -> str:
    """A Markdown table: the first column is aligned left, the others right."""
    alignment = ["---", *["--:"] * (len(columns) - 1)]
    return "\n".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in line)
        for line in [columns, alignment, *lines]
    )


def readme_table(results: dict[str, Any], *others: dict[str, Any]) -> str:
    """The table for README, without the rows that the first file lacks. Other machines' results
    have fewer columns, with the instructions that they used in the heading."""
    known, more = rows(results), [rows(other) for other in others]
    lines = []
    for name in README_ROWS:
        if name not in known or "ours" not in (found := seconds(known[name])):
            continue
        row = known[name]
        line = [label(row), f"**{duration(found['ours'])}**"]
        line += [shown(row, role) for role in ("eager", "tuned", "compile")]
        line.append(times(row, "eager"))
        for there in more:
            other = there.get(name)
            line += [shown(other, "ours"), times(other, "eager")] if other else ["", ""]
        lines.append(line)
    columns = [
        "what is timed", "dafl_fast", "plain PyTorch", "tuned PyTorch", "torch.compile",
        "speed-up over plain PyTorch",
    ]  # fmt: skip
    for other in others:
        isa = other["machine_info"].get("isa", "").upper()
        columns += [f"{isa}: dafl_fast", f"{isa}: speed-up"]
    return table(columns, lines)


def full_table(results: dict[str, Any]) -> str:
    """A table of every benchmark in the file, with all its values."""
    lines = []
    for row in results["benchmarks"]:
        facts = row["extra_info"]

        def fact(key: str, form: str = "{}", facts: Row = facts) -> str:
            return form.format(facts[key]) if facts.get(key) is not None else ""

        lines.append(
            [
                label(row),
                *(shown(row, role) for role in ("ours", "eager", "tuned", "compile")),
                times(row, "eager"),
                times(row, "compile"),
                fact("steps_per_second", "{:,.1f}"),
                fact("images_per_second", "{:,.0f}"),
                fact("ours_GB_per_s", "{:.1f}"),
                fact("percent_of_bandwidth", "{:.0f}"),
                fact("ours_flop_utilisation", "{:.0%}"),
            ]
        )
    columns = [
        "what is timed", "dafl_fast", "plain PyTorch", "tuned PyTorch", "torch.compile",
        "speed-up over plain PyTorch", "speed-up over torch.compile", "steps/s", "images/s",
        "GB/s", "% of the measured bandwidth", "% of the measured matrix speed",
    ]  # fmt: skip
    return table(columns, lines)


def update_readme(results: list[dict[str, Any]], path: Path = README) -> None:
    """Puts the table between README's markers.

    Raises:
        UserError: README has no such markers.
    """
    text = path.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} must have {BEGIN} and {END} around the table")
    write_text(path, f"{head}{BEGIN}\n{readme_table(*results)}\n{END}{tail}")


# ---- Plots --------------------------------------------------------------------------------------


def figure(width: float, height: float, title: str, results: dict[str, Any], panels: int = 1):
    """An empty figure with its axes, titled with the machine; UserError without matplotlib."""
    require("matplotlib", "the plot")
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), dpi=120, layout="constrained")
    drawing.suptitle(f"{title}\n{setting(results)}", fontsize=11)
    axes = drawing.subplots(1, panels, squeeze=False, sharey=True)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def plot_speedups(results: dict[str, Any]):
    """Bars: the speed-up over plain PyTorch and over torch.compile. None without such rows."""
    known = [
        (row, found)
        for row in results["benchmarks"]
        if not row["name"].startswith(("test_sweep", "test_step[mnist-"))
        and {"ours", "eager"} <= (found := seconds(row)).keys()
    ]
    if not known:
        return None
    drawing, (ax,) = figure(9, 1.4 + 0.45 * len(known), "Speed-up of dafl_fast", results)
    for offset, role, name in ((-0.2, "eager", "plain PyTorch"), (0.2, "compile", "torch.compile")):
        bars = [(i, f[role] / f["ours"]) for i, (_, f) in enumerate(known) if role in f]
        drawn = ax.barh(
            [i + offset for i, _ in bars], [value for _, value in bars], 0.38,
            color=COLOURS[role], label=f"over {name}",
        )  # fmt: skip
        ax.bar_label(
            drawn, [f"{value:.1f}" for _, value in bars], padding=3, fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    ax.set_yticks(range(len(known)), [label(row) for row, _ in known], fontsize=9)
    ax.invert_yaxis()
    ax.axvline(1, color="#444444", linewidth=1, zorder=0)
    ax.margins(x=0.08, y=0.01)
    ax.set_xlabel("time of plain PyTorch or torch.compile / time of dafl_fast")
    ax.legend(loc="lower right", frameon=False)
    return drawing


def plot_bandwidth(results: dict[str, Any]):
    """Bandwidth against the number of classes, one panel per loss. None without such rows."""
    sweep = [row for row in results["benchmarks"] if row["name"].startswith("test_sweep")]
    losses = sorted({row["params"]["loss"] for row in sweep}, reverse=True)
    if not losses:
        return None
    title = "Losses, forward + backward: bytes that must move / time"
    drawing, axes = figure(5 * len(losses), 4.2, title, results, len(losses))
    for ax, loss in zip(axes, losses):
        points = sorted(
            (row for row in sweep if row["params"]["loss"] == loss),
            key=lambda row: row["params"]["classes"],
        )
        for role, name in (
            ("ours", "dafl_fast"),
            ("compile", "torch.compile"),
            ("eager", "plain PyTorch"),
        ):
            line = [
                (row["params"]["classes"], row["extra_info"]["ideal_bytes"] / found[role] / 1e9)
                for row in points
                if role in (found := seconds(row))
            ]
            ax.plot(*zip(*line), "o-", color=COLOURS[role], label=name)
        limit = points[0]["extra_info"]["bandwidth_GB_per_s"]
        ax.axhline(limit, color="#444444", linestyle="--", linewidth=1, label="copy or triad")
        ax.set_xscale("log")
        ax.set_ylim(0)
        ax.set_title(loss, fontsize=10)
        ax.set_xlabel("classes C (4 million logits)")
    axes[0].set_ylabel("GB/s")
    drawing.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    return drawing


def plot_batches(results: dict[str, Any]):
    """Images per second of the MNIST step against its batch size. None for fewer than two sizes."""
    steps = [
        row
        for row in results["benchmarks"]
        if row["name"].startswith("test_step[mnist") and "batch" in row["extra_info"]
    ]
    if len(steps) < 2:
        return None
    steps.sort(key=lambda row: row["extra_info"]["batch"])
    drawing, (ax,) = figure(6.4, 4.4, "The published MNIST step", results)
    for role, name in (("ours", "dafl_fast"), ("eager", "published code")):
        line = [
            (row["extra_info"]["batch"], row["extra_info"]["batch"] / found[role])
            for row in steps
            if role in (found := seconds(row))
        ]
        ax.plot(*zip(*line), "o-", color=COLOURS[role], label=name)
        for batch, speed in line:
            ax.annotate(f"{speed:,.0f}", (batch, speed), (0, 7), textcoords="offset points",
                        ha="center", fontsize=8)  # fmt: skip
    sizes = [row["extra_info"]["batch"] for row in steps]
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_ylim(0)
    ax.margins(x=0.08, y=0.12)
    ax.set_xlabel("batch size")
    ax.set_ylabel("images / s")
    ax.legend(frameon=False, loc="center right")
    return drawing


def plot_roofline(results: dict[str, Any]):
    """FLOP/s against operations per byte, with the measured limits. None without such rows."""
    pieces = [
        row for row in results["benchmarks"] if {"flop", "ideal_bytes"} <= row["extra_info"].keys()
    ]
    peaks = [
        peak
        for row in results["benchmarks"]
        if (peak := row["extra_info"].get("matrix_peak_tflops")) is not None
    ]
    if not pieces or not peaks:
        return None
    title = "Roofline (a point may lie above the roof: its algorithm needs fewer operations)"
    drawing, (ax,) = figure(9, 5.6, title, results)
    groups = (
        ("generator_loss", "o", "generator_loss", "#1f5f99"),
        ("distill_loss", "s", "distill_loss", "#7b4ea3"),
        ("mnist", "^", "LeNet-5 teacher", "#2c8c6b"),
        ("cifar", "D", "ResNet-34 teacher", "#a33b3b"),
    )
    intensities = []
    for start, marker, name, colour in groups:
        for role, face in (("ours", colour), ("eager", "none")):
            points = [
                (facts["flop"] / facts["ideal_bytes"], facts["flop"] / found[role] / 1e9)
                for row in pieces
                if row["name"].partition("[")[2].startswith(start)
                or (row.get("params") or {}).get("loss") == start
                if role in (found := seconds(row))
                for facts in [row["extra_info"]]
            ]
            intensities += [x for x, _ in points]
            if points:
                whose = "plain PyTorch" if role == "eager" else "dafl_fast"
                ax.scatter(*zip(*points), marker=marker, facecolor=face, edgecolor=colour, s=42,
                           zorder=3, label=f"{name}, {whose}")  # fmt: skip
    left, right = min(intensities) / 3, max(intensities) * 3
    peak = max(peaks) * 1e3
    limits = {row["extra_info"]["threads"]: row["extra_info"]["bandwidth_GB_per_s"]
              for row in pieces}  # fmt: skip
    for (threads, limit), style in zip(sorted(limits.items()), ("--", "-", ":")):
        ax.plot([left, peak / limit], [left * limit, peak], style, color="#444444", linewidth=1,
                label=f"{limit:.0f} GB/s, {threads} thread{'s' * (threads > 1)}")  # fmt: skip
    ridge = peak / max(limits.values())
    ax.plot([ridge, max(right, 2 * ridge)], [peak, peak], "-.", color="#444444", linewidth=1,
            label=f"{peak:,.0f} GFLOP/s, matrix product")  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(which="major", color="#eeeeee")
    ax.set_xlabel("operations of the plain algorithm / bytes that must move")
    ax.set_ylabel("GFLOP/s")
    drawing.legend(loc="outside right center", frameon=False, fontsize=9)
    return drawing


PLOTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "speedups": plot_speedups,
    "bandwidth": plot_bandwidth,
    "batches": plot_batches,
    "roofline": plot_roofline,
}


def write(results: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Writes STEM.md, and STEM-PLOT.png for each plot whose rows are in the results."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {name: plot(results) for name, plot in PLOTS.items()}
    written = [folder / f"{stem}.md"]
    pictures = []
    for name, drawing in drawings.items():
        if drawing is not None:
            path = folder / f"{stem}-{name}.png"
            write_atomically(path, lambda p, d=drawing: d.savefig(p, format="png"))
            pictures.append(f"![{name}]({path.name})")
            written.append(path)
    parts = [setting(results), full_table(results), *pictures]
    write_text(written[0], "\n\n".join(parts) + "\n")
    return written


@command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", help="pytest-benchmark's JSON")
    parser.add_argument("--out", type=Path, help="folder for table and plots (beside the results)")
    parser.add_argument(
        "--store", action="store_true", help="keep it as bench/results/MACHINE.json"
    )
    parser.add_argument("--readme", action="store_true", help="write README's table")
    options = parser.parse_args()
    if options.readme:
        update_readme([load(path) for path in README_RESULTS])
        return 0
    if options.results is None:
        raise UserError("name the results file, or give --readme")
    results = load(options.results)
    if options.store:
        path = ROOT / "bench" / "results" / f"{machine(results)}.json"
        write_text(path, json.dumps(results, indent=1) + "\n")
        print(path)
    for path in write(results, options.out or options.results.parent, options.results.stem):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables, plots and comparison of benchmark results, on results that are made up."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from bench import compare, compare_methods, measure, report
from dafl_fast.errors import UserError


def row(name, params=None, **facts):
    return {"name": name, "params": params, "extra_info": {"threads": 1, "device": "cpu", **facts}}


def losses(ours=50.0, eager=500.0, compiled=200.0):
    name = "test_losses[generator_loss-1024x10-features0-threads1]"
    params = dict(loss="generator_loss", rows=1024, classes=10, features=0, threads=1)
    limits = dict(flop=122_880, ideal_bytes=81_920, bandwidth_GB_per_s=10.0)
    return row(name, params, ours_us=ours, eager_us=eager, compile_us=compiled, **limits)


def step(batch, ours=100.0, published=1000.0):
    name = "test_step[mnist]" if batch == 512 else f"test_step[mnist-{batch}]"
    times = dict(ours_ms=ours, published_ms=published, tuned_ms=400.0, compiled_ms=300.0)
    return row(name, batch=batch, **times, matrix_peak_tflops=0.4, images_per_second=5120)


def sweep(classes):
    params = dict(loss="distill_loss", classes=classes, threads=1)
    times = dict(ours_us=1000.0, eager_us=9000.0, compile_us=4000.0)
    limits = dict(ideal_bytes=48_000_000, bandwidth_GB_per_s=60.0)
    return row(f"test_sweep[1-distill_loss-{classes}]", params, **times, **limits)


def results(*benchmarks, cpu="Some CPU", gpu=None, isa="avx512"):
    info = {"cpu": {"brand_raw": cpu, "count": 2}, "gpu": gpu, "isa": isa, "torch": "2.9"}
    return {"machine_info": info, "benchmarks": list(benchmarks), "datetime": "2030-01-02T03"}


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def call(monkeypatch):
    """Runs a script's `main` with arguments and returns its exit status."""

    def run(script, *arguments):
        monkeypatch.setattr("sys.argv", [script.__name__, *arguments])
        return script.main()

    return run


class Benchmark:
    """As pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def test_contenders_take_turns_and_medians_count(monkeypatch):
    monkeypatch.setattr(measure, "ROUNDS", None)
    turns = []

    def contender(name, *seconds):
        return lambda: turns.append(name) or seconds[turns.count(name) - 1]

    contenders = {"eager": contender("eager", 5.0, 9.0, 6.0), "ours": contender("ours", 3, 1, 2)}
    assert measure.take_turns(Benchmark(), contenders, 3) == {"eager": 6.0, "ours": 2}
    assert turns == ["eager", "ours"] * 3


def test_a_record_has_speeds_against_the_machines_limits(monkeypatch):
    monkeypatch.setattr(measure, "bandwidth", lambda threads: 20.0 * threads)
    monkeypatch.setattr(measure, "GPU", False)
    torch.set_num_threads(2)
    benchmark = Benchmark()
    seconds = {"eager": 0.4, "ours": 0.1}
    limits = dict(ideal_bytes=2 * 10**9, flop=10**11, peak=2e12)
    open_capsys = SimpleNamespace(disabled=nullcontext)  # the printout stays captured
    measure.record(benchmark, open_capsys, "title", seconds, images=50, **limits, batch=50)
    assert benchmark.extra_info == {
        "eager_ms": 400.0, "ours_ms": 100.0, "times_eager": 4.0,
        "images_per_second": 500, "steps_per_second": 10.0,
        "eager_GB_per_s": 5.0, "ours_GB_per_s": 20.0, "ideal_bytes": 2 * 10**9,
        "bandwidth_GB_per_s": 40.0, "percent_of_bandwidth": 50.0,
        "flop": 10**11, "eager_flop_utilisation": 0.125, "ours_flop_utilisation": 0.5,
        "matrix_peak_tflops": 2.0, "threads": 2, "device": "cpu", "batch": 50,
    }  # fmt: skip
    assert report.seconds(row("test", **benchmark.extra_info)) == {"ours": 0.1, "eager": 0.4}


def test_readmes_table_is_that_of_the_committed_results():
    text = report.README.read_text()
    between = text.partition(report.BEGIN)[2].partition(report.END)[0]
    assert between == f"\n{report.readme_table(*map(report.load, report.README_RESULTS))}\n"


def test_readme_table_has_the_rows_there_are_in_its_own_order(tmp_path):
    reached = dict(published_percent=9.96, tuned_percent=11.25, compiled_percent=50.0)
    ours = row("test_time_to_accuracy", ours_s=31.25, **reached)
    made = results(losses(), row("test_unknown", ours_us=1.0), step(512), ours)
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    slower = results(losses(100.0, 600.0), isa="avx2")
    report.update_readme([made, slower], path)
    assert path.read_text() == (
        f"before\n{report.BEGIN}\n"
        "| what is timed | dafl_fast | plain PyTorch | tuned PyTorch | torch.compile "
        "| speed-up over plain PyTorch | AVX2: dafl_fast | AVX2: speed-up |\n"
        "| --- | --: | --: | --: | --: | --: | --: | --: |\n"
        "| MNIST, training until the student reaches 98 % | **31.25 s** | 10.0 % in that time "
        "| 11.2 % in that time | 50.0 % in that time | | | |\n"
        "| MNIST training step, LeNet-5, batch 512 | **100 ms** | 1.00 s | 400 ms | 300 ms "
        "| 10.0× | | |\n"
        "| generator_loss, 1024 × 10 logits, 1 thread | **50 µs** | 500 µs | | 200 µs | 10.0× "
        "| 100 µs | 6.0× |\n"
        f"{report.END}\nafter\n"
    )


def test_a_goal_that_was_not_reached_has_no_row():
    made = results(losses(), row("test_time_to_accuracy", ours_s=None))
    assert "98 %" not in report.readme_table(made)


def test_a_readme_without_markers_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("nothing here")
    with pytest.raises(report.UserError, match=r"must have <!-- bench:begin -->"):
        report.update_readme([results(losses())], path)
    assert path.read_text() == "nothing here"


def test_full_table_shows_what_was_measured():
    table = report.full_table(results(losses(), step(512)))
    assert (
        "| generator_loss, 1024 × 10 logits, 1 thread | 50 µs | 500 µs | | 200 µs | 10.0× | 4.0× |"
        in table
    )
    assert (
        "| MNIST training step, LeNet-5, batch 512 | 100 ms | 1.00 s | 400 ms | 300 ms | 10.0× "
        "| 3.0× |" in table
    )
    assert "| 5,120 |" in table


def test_results_are_named_after_the_gpu_or_the_cpu():
    assert report.machine(results(cpu="AMD EPYC")) == "cpu-2x-amd-epyc-avx512"
    capped = results(cpu="AMD EPYC", isa="avx2")
    assert report.machine(capped) == "cpu-2x-amd-epyc-avx2"
    assert report.machine(results(gpu="NVIDIA H100 80GB HBM3")) == "gpu-nvidia-h100-80gb-hbm3"


def test_plots_show_the_values():
    pytest.importorskip("matplotlib")
    made = results(losses(), step(128, ours=20.0), step(512), sweep(10), sweep(1000))
    bars = report.plot_speedups(made).axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([10, 10, 4, 3])
    lines = report.plot_bandwidth(made).axes[0].lines
    assert [line.get_ydata()[0] for line in lines] == pytest.approx([48, 12, 48 / 9, 60])
    ours, published = report.plot_batches(made).axes[0].lines
    assert list(ours.get_xdata()) == [128, 512]
    assert list(ours.get_ydata()) == pytest.approx([6400, 5120])
    assert list(published.get_ydata()) == pytest.approx([128, 512])
    points = report.plot_roofline(made).axes[0].collections
    assert points[0].get_offsets().tolist() == [pytest.approx([1.5, 2.4576])]
    assert points[1].get_offsets().tolist() == [pytest.approx([1.5, 0.24576])]


def test_report_writes_a_table_and_the_plots_it_has_rows_for(call, file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    made = file("some.json", results(losses(), sweep(10), sweep(100)))
    assert call(report, made, "--out", str(tmp_path / "out")) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["some-bandwidth.png", "some-speedups.png", "some.md"]
    assert (tmp_path / "out" / "some-bandwidth.png").read_bytes().startswith(b"\x89PNG")
    assert "![bandwidth](some-bandwidth.png)" in (tmp_path / "out" / "some.md").read_text()


@pytest.mark.parametrize(
    ("ours", "threshold", "code"), [(54.0, 0.1, 0), (56.0, 0.1, 1), (56.0, 0.2, 0), (10.0, 0.1, 0)]
)
def test_compare_fails_beyond_the_threshold(call, file, capsys, ours, threshold, code):
    old, new = file("old", results(losses(50.0))), file("new", results(losses(ours)))
    assert call(compare, old, new, "--threshold", str(threshold)) == code
    assert ("SLOWER" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(("eager", "code"), [(1000.0, 0), (500.0, 1)])
def test_on_different_machines_the_ratio_to_eager_counts(call, file, capsys, eager, code):
    old = file("old", results(losses(50.0, 500.0)))
    new = file("new", results(losses(100.0, eager), cpu="Slow CPU"))
    assert call(compare, old, new) == code
    assert "cpu-2x-some-cpu-avx512, cpu-2x-slow-cpu-avx512" in capsys.readouterr().out


def test_missing_and_new_benchmarks_are_named(call, file, capsys):
    old = file("old", results(losses(), step(64)))
    new = file("new", results(losses(), step(512)))
    assert call(compare, old, new) == 1
    verdicts = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert verdicts["test_step[mnist-64]"] == "MISSING"
    assert verdicts["test_step[mnist]"] == "new"


def test_an_accuracy_that_is_reached_no_more_is_slower(call, file):
    old = file("old", results(row("test_time_to_accuracy", ours_s=30.0)))
    new = file("new", results(row("test_time_to_accuracy", ours_s=None)))
    assert call(compare, old, new) == 1
    assert call(compare, new, old) == 0


def test_bad_files_get_one_sentence(call, file, tmp_path, capsys):
    good = file("good", results(losses()))
    for path, sentence in [
        (str(tmp_path / "none"), "cannot be read: No such file"),
        (file("text", "{"), "is not JSON"),
        (file("list", "[]"), "is not a results file of pytest-benchmark"),
        (file("empty", results()), "or has no benchmarks"),
        (file("other", results(step(64))), "the two files have no benchmark in common"),
    ]:
        assert call(compare, good, path) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert call(compare, good, good, "--threshold", "nan") == 2
    assert "--threshold must be 0 or more" in capsys.readouterr().err
    assert call(report) == 2
    assert "name the results file" in capsys.readouterr().err


# -- the losses of published methods ---------------------------------------------------------------


def small_command(folder, *more):
    images = torch.randint(256, (20, 32, 32), dtype=torch.uint8).numpy()
    np.savez(folder / "digits.npz", images=images, labels=torch.arange(20).numpy() % 10)
    return [
        "mnist", "--steps", "2", "--batch-size", "8", "--student-batch-size", "8",
        "--student-updates", "1", "--bank-images", "32", "--generator-width", "4", "--eval-every",
        "0", "--device", "cpu", "--precision", "fp32", "--eval", str(folder / "digits.npz"), *more,
    ]  # fmt: skip


def test_methods_differ_in_their_losses_alone(tmp_path):
    methods, out = ["recipe", "fastdfkd", "none"], tmp_path / "out"
    rows = compare_methods.compare(small_command(tmp_path), methods, [0, 1], out)
    assert [one["method"] for one in rows] == methods
    configs = [yaml.safe_load((out / f"{name}-0" / "config.yaml").read_text()) for name in methods]
    differing = {key for key in configs[0] if len({str(one[key]) for one in configs}) > 1}
    assert differing == {"one_hot", "entropy", "activation", "bn_statistics", "adversarial"}
    assert configs[1]["adversarial"] == 1.1 and configs[2]["one_hot"] == 0.0
    for one, name in zip(rows, methods, strict=True):
        runs = [
            json.loads((out / f"{name}-{seed}" / "summary.json").read_text()) for seed in (0, 1)
        ]
        assert one["accuracies"] == [summary["student_accuracy"] for summary in runs]
        assert one["mean"] == sum(one["accuracies"]) / 2 and one["steps"] == 2
    table = compare_methods.markdown(rows, [0, 1])
    assert f"| {100 * rows[0]['mean']:.2f} ± {100 * rows[0]['sd']:.2f} | 2 |" in table


def test_methods_that_are_done_are_not_run_again(tmp_path, monkeypatch):
    command, out = small_command(tmp_path), tmp_path / "out"
    first = compare_methods.compare(command, ["none"], [0], out)
    monkeypatch.setattr(compare_methods, "train", lambda *_, **__: pytest.fail("ran again"))
    assert compare_methods.compare(command, ["none"], [0], out) == first
    with pytest.raises(UserError, match="runs of another command; choose another folder"):
        compare_methods.compare([*command, "--seed", "1"], ["none"], [0], out)


def test_methods_need_images_to_be_compared_on(tmp_path):
    with pytest.raises(UserError, match="--eval none leaves nothing to compare"):
        compare_methods.compare(["mnist", "--eval", "none"], ["none"], [0], tmp_path)

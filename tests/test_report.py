"""The page about a run: what it says, that it needs nothing else, how it looks in a browser."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from markupsafe import escape

from dafl_fast import charts, pages, report
from dafl_fast.distill import Result, distill, train
from dafl_fast.engine.folder import RunFolder, read_summary
from dafl_fast.errors import UserError
from dafl_fast.models import build
from dafl_fast.pictures import save_samples
from dafl_fast.recipes import make_config
from dafl_fast.records import Run
from dafl_fast.templates import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
SUMMARY = {
    "preset": "mnist", "recipe": "fast", "teacher": "LeNet5", "student": "LeNet5Half",
    "device": "cpu", "precision": "bf16", "processes": 1, "cuda_graph": False, "seed": 7,
    "steps": 60, "generator_images": 15360, "student_images": 184320, "wall_seconds": 9.5,
    "train_seconds": 9.0, "images_per_second": 22187.5, "teacher_accuracy": 0.9912,
    "student_accuracy": 0.9753, "agreement_fresh": 0.8125, "eval_set": "mnist-5k",
    "eval_count": 5000,
    "teacher_parameters": 61706, "student_parameters": 15738, "bank_bytes": 835200000,
    "peak_host_bytes": 10**9, "peak_device_bytes": None, "interrupted": False, "version": "0.1.0",
}  # fmt: skip


def words(page: str) -> str:
    """The text of a page as a reader sees it."""
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


@pytest.fixture
def make_run(tmp_path):
    """Makes the folder of a run with three rows of losses and one evaluation."""

    def make(name="run", summary=SUMMARY, classes=10, samples=2, **settings) -> Path:
        config = make_config("mnist", **{"max_seconds": 120.0, "num_classes": classes, **settings})
        config = dataclasses.replace(config, out_dir=tmp_path / name)
        folder = RunFolder(RunFolder.create(config))
        for step in (20, 40, 60):
            folder.append_metrics({
                "step": step, "train_seconds": step * 0.15, "generator_loss": -4.0 - step / 100,
                "one_hot": 0.3, "entropy": -0.9, "activation": -1.5, "bn_statistics": 0.0,
                "adversarial": 0.0, "distill_loss": 100 / step,
                "agreement_training": 0.8 + step / 1000,
                "steps_per_second": 6.7, "images_per_second": 22000.0 + step, "done": step / 60,
            })  # fmt: skip
        folder.append_metrics({
            "step": 60, "train_seconds": 9.1, "accuracy": 0.9753, "agreement_newest": 0.8359375,
            "class_counts": [31, *[25] * 8, 0][:classes] + [0] * (classes - 10),
        })  # fmt: skip
        for step in range(samples):
            images, logits = torch.randn(40, 1, 32, 32), torch.randn(40, 10)
            save_samples(folder.samples(20 * step), images, logits)
        if summary:
            folder.write_json("summary.json", summary)
        folder.close()
        return folder.path

    return make


def test_the_figures_of_a_run_are_in_its_report(make_run):
    path = make_run(seed=7, entropy=9.5)
    assert report.write_report(path) == path / "report.html"
    page = (path / "report.html").read_text()
    text = words(page)
    assert (
        "an accuracy of 97.53 % on 5,000 held-out images, 1.59 points below its teacher's" in text
    )
    assert "agrees with its teacher on 81.25 % of generated images" in text
    for shown in (
        "Accuracy on held-out images student 97.53 % teacher 99.12 %",
        "images it learns from 86 % newest images 83.59 %",
        "Distillation loss at the end 1.667",
        "Generator loss, weighted sum at the end −4.6",
        "Entropy loss, weight 9.5 at the end −0.9",
        "Class balance: effective number of classes at the end 7.943",  # 10 ** 0.9
        "of 231 images, classes present 9 of 10",
        "Images per second at the end 22,060",
        "setting this run recipe seed 7 0 entropy 9.5 5.0 All other settings",
        f"torch {torch.__version__}",
        f"python -m dafl_fast.report {path}",
    ):
        assert shown in text, shown
    assert "BatchNorm loss" not in text  # it is off
    # What there is nothing to go on with is not offered.
    assert "--resume" not in text and "dafl_fast.export" not in text
    (path / "checkpoint.pt").touch()
    (path / "student.safetensors").touch()
    text = words(render("report.html.j2", pages.page_of_run(Run.read(path))))
    assert f"python -m dafl_fast.train --resume {path} --max-seconds 240" in text
    assert f"python -m dafl_fast.evaluate {path} --data mnist-5k" in text
    assert f"python -m dafl_fast.export {path} --format onnx" in text


def test_the_page_needs_nothing_else(make_run):
    page = report.write_report(make_run(samples=12)).read_text()
    links = re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']([^"']*)""", page)
    assert len([link for link in links if link.startswith("data:image/png;base64,")]) == 8
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"https?://|url\(|@import|<script|<iframe", page)
    assert set(re.findall(r'<use href="#(\w+)"', page)) == set(
        re.findall(r'<image id="(\w+)"', page)
    )


def test_the_curves_go_where_the_values_are():
    line = charts.Line("x", [(0.0, 1.0), (50.0, 2.0), (100.0, 5.0)])
    svg = charts.chart("t", [line])
    path = re.search(r'class="line c0 " d="M([^"]*)"', svg)[1]
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    middle = (left + right) / 2
    assert points == [
        (left, bottom), (middle, pytest.approx(bottom - (bottom - top) / 4, abs=0.05)), (right, top)
    ]  # fmt: skip
    assert "logarithmic" not in svg
    steep = charts.chart("t", [charts.Line("x", [(0.0, 0.1), (50.0, 1.0), (100.0, 10.0)])])
    assert "t, logarithmic" in steep and f"L{middle:.1f} {(top + bottom) / 2:.1f}L" in steep
    # One value only, or the same ones, are drawn, too.
    assert "<circle" in charts.chart("t", [charts.Line("x", [(3.0, 0.0)])])
    thinned = charts.Line("x", [(float(x), 2.0 * x) for x in range(1000)]).thinned(300)
    assert thinned[:2] == [(1.5, 3.0), (5.5, 11.0)] and len(thinned) == 250


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 25, 50, 75, 100]), (98.4, 99.12, [98.4, 98.6, 98.8, 99.0]), (-3, -1, None)],
)
def test_ticks_are_round_and_within(low, high, expected):
    found = charts.ticks(low, high)
    assert found == (expected or [-3, -2.5, -2, -1.5, -1])
    assert charts.log_ticks(0.3, 3) == [0.5, 1, 2]
    assert charts.log_ticks(0.01, 100) == pytest.approx([0.01, 0.1, 1, 10, 100])


def test_more_classes_than_bars(make_run):
    text = words(report.write_report(make_run(classes=1000)).read_text())
    assert "classes present 9 of 1,000" in text
    assert "classes, the most frequent first (9 of 1,000)" in text


def test_runs_without_an_end(make_run):
    path = make_run(summary=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 80, "train_sec')  # killed while writing
    text = words(report.write_report(path).read_text())
    assert "Not finished: this is how it stood at step 60." in text
    assert "last had an accuracy of 97.53 %" in text and "on 86.00 % of generated" in text
    # The summary of a part that was resumed and killed later says nothing of the whole.
    path = make_run("resumed", summary={**SUMMARY, "steps": 40, "student_accuracy": 0.5})
    assert "50.00" not in words(report.write_report(path).read_text())
    path = make_run("stopped", summary={**SUMMARY, "interrupted": True})
    assert "Interrupted after step 60." in words(report.write_report(path).read_text())
    path = make_run("collapsed", summary=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 70, "train_seconds": 11.0, "stopped": "the generator has collapsed"}\n'
        )
    (path / "checkpoint.pt").touch()
    text = words(report.write_report(path).read_text())
    assert "Stopped at step 70: the generator has collapsed." in text
    assert "--resume" not in text
    path = make_run(
        "blind", summary={**SUMMARY, "student_accuracy": None, "teacher_accuracy": None}
    )
    assert "no held-out images were given" in words(report.write_report(path).read_text())
    (path / "samples" / "step-0000000.png").write_bytes(b"not a picture")
    (path / "environment.json").write_text("[")
    (path / "summary.json").write_text("")
    assert "step 20" in words(report.write_report(path).read_text())


def test_runs_from_before_agreement_had_two_names_are_shown_as_today(make_run):
    path = make_run()
    page = report.write_report(path).read_text()
    for name in ("metrics.jsonl", "summary.json"):
        text = (path / name).read_text()
        (path / name).write_text(re.sub('"agreement_(fresh|training)"', '"agreement"', text))
    assert read_summary(path)["agreement_fresh"] == 0.8125
    assert report.write_report(path).read_text() == page


def test_what_comes_from_files_is_escaped(make_run):
    evil = "<script>alert('x')</script>&\"><img src=http://e.x>"
    path = make_run(student=evil, summary={**SUMMARY, "student": evil})
    other = path.rename(path.with_name("<b>a&b"))
    for page in (
        report.write_report(other).read_text(),
        pages.write_comparison([other, make_run("two")], path.with_name("c.html")).read_text(),
    ):
        assert "<script" not in page and "<img" not in page and "<b>a" not in page
        assert str(escape(evil)) in page and "&lt;b&gt;a&amp;b" in page


def test_a_path_of_another_encoding(make_run):
    path = make_run(os.fsdecode(b"r\xff"))
    assert r"r\udcff" in pages.write_report(path).read_text()


def test_large_pictures_are_made_small(make_run, tmp_path):
    path = make_run(samples=0)
    images = torch.randn(20, 3, 224, 224)
    save_samples(path / "samples" / "step-0000020.png", images, torch.randn(20, 10))
    large = (path / "samples" / "step-0000020.png").stat().st_size
    page = report.write_report(path).read_text()
    assert "data:image/jpeg;base64," in page
    assert len(page) < 600_000 < large


def test_runs_side_by_side(make_run, tmp_path, monkeypatch, capsys):
    one = make_run("one", seed=1)
    two = make_run("two", seed=2, summary={**SUMMARY, "student_accuracy": 0.9801})
    out = tmp_path / "both.html"
    monkeypatch.setattr(sys, "argv", ["report", str(one), str(two), "--out", str(out)])
    assert report.main() == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text()
    text = words(page)
    assert "2 runs, 1 setting differs." in text
    assert "The most accurate student is that of two: 98.01 %." in text
    assert "Settings that differ setting one two seed 1 2" in text
    assert "Accuracy of the student 97.53 % 98.01 %" in text
    assert re.findall('class="marked">([^<]*)', page) == ["2"]
    assert "two 98.01 % accuracy, agreement 81.25 %; 60 steps in 9 s" in text
    assert text.count("Distillation loss one 1.667 two 1.667") == 1
    assert len(re.findall('<path class="line c0 ', page)) == len(
        re.findall('<path class="line c1 ', page)
    )


def test_runs_of_one_name_are_told_apart(make_run, tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
    paths = [make_run("a/dafl-0"), make_run("b/dafl-0")]
    text = words(pages.write_comparison(paths, tmp_path / "c.html").read_text())
    assert f"One-hot loss {paths[0]} 0.3 {paths[1]} 0.3" in text


def test_mistakes_get_one_sentence(make_run, tmp_path, monkeypatch, capsys):
    empty = RunFolder.create(make_config("mnist", out_dir=tmp_path / "empty"))
    for arguments, message in (
        ([], "name the folder of a run"),
        ([str(tmp_path)], f"there is no run in {tmp_path} (no config.yaml)"),
        ([str(empty)], f"the run in {empty} has no metrics yet: nothing to report"),
        ([str(make_run()), str(tmp_path / "no")], "no (no config.yaml)"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        assert report.main() == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


class WellFormed(HTMLParser):
    """Fails unless all tags are closed in their order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag != "img":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_result_shows_itself_in_a_notebook(make_run):
    path = make_run()
    result = Result(torch.nn.Identity(), [], {**SUMMARY, "run": str(path)}, path)
    assert repr(result) == (
        "Result(LeNet5Half of 15,738 parameters, taught by LeNet5 of 61,706: 60 steps in 9.0 s, "
        f"agreement 81.25%, accuracy 97.53% (teacher 99.12%), {path})"
    )
    page = result._repr_html_()
    WellFormed(page)
    text = words(page)
    for shown in (
        "LeNet5Half, taught by LeNet5", "Student 97.53 % accuracy on held-out images",
        "Teacher 99.12 %", "Agreement 81.25 %", "Training 9 s 60 steps", "Student size 15,738",
        "teacher 61,706, 3.9 times as many", "Accuracy on held-out images student 97.53 %",
        "Distillation loss at the end 1.667", "Generated images, step 20", str(path),
    ):  # fmt: skip
        assert shown in text, shown
    assert page.count("<svg") == 4 and page.count("<img") == 1
    assert page.count('src="data:image/png;base64,') == 1
    assert not re.search(r"https?://|url\(|@import|<script|<iframe|<body|:root", page)
    # Its style sheet is for what it brings along alone.
    rules = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    selectors = re.findall(r"([^{}]+)\{", rules)
    assert all(part.strip().startswith(".dafl-fast") for s in selectors for part in s.split(","))


def test_a_result_shows_what_there_is(make_run):
    told = {**SUMMARY, "student_accuracy": None, "teacher_accuracy": None, "interrupted": True,
            "teacher": "<script>alert(1)</script>", "steps": 40}  # fmt: skip
    path = make_run(samples=0)
    result = Result(torch.nn.Identity(), [], {**told, "run": str(path)}, path)
    assert "interrupted after 40 steps in 9.0 s, agreement 81.25%, /" in repr(result)
    page = result._repr_html_()
    WellFormed(page)
    text = words(page)
    assert "<script" not in page and "taught by <script>alert(1)</script>" in text
    assert "<img" not in page and "<svg" in page
    assert "Interrupted after step 40; to go on, give distill() resume=result.folder." in text
    assert "accuracy" not in text.lower() and "Agreement 81.25 %" in text
    # It is that of these steps, whoever has gone on with the run since.
    assert "Distillation loss at the end 2.5" in text
    shutil.rmtree(path)
    assert result._repr_html_() is None


SMALL = {
    "batch_size": 16, "generator_width": 8, "student_batch_size": 16, "student_updates": 1,
    "bank_images": 64, "log_every": 2, "precision": "fp32", "eval_every": 1e-9, "eval": "none",
}  # fmt: skip


def events(path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(path / "tensorboard"), {"scalars": 0, "images": 0}).Reload()


def test_a_run_reports_itself_and_writes_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    config = make_config("mnist", steps=4, out_dir=tmp_path / "run", tensorboard=True, **SMALL)
    summary = train(config)
    path = tmp_path / "run"
    text = words((path / "report.html").read_text())
    assert f"agrees with its teacher on {100 * summary['agreement_fresh']:.2f} %" in text
    assert "step 2" in text and f"tensorboard --logdir {path}/tensorboard" in text
    train(dataclasses.replace(config, steps=8, resume=path, out_dir=None))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "class_counts" in row]
    assert [row["step"] for row in evaluated] == [2, 4, 4, 6, 8, 8]
    assert all(sum(row["class_counts"]) == 16 for row in evaluated)
    read = events(path)
    for name in ("generator_loss", "distill_loss", "images_per_second", "agreement_newest"):
        expected = [(row["step"], pytest.approx(row[name])) for row in rows if name in row]
        assert [(x.step, x.value) for x in read.Scalars(name)] == expected
    pictures = read.Images("generated")
    assert [x.step for x in pictures] == [2, 4, 4, 6, 8, 8]
    assert (pictures[-1].width, pictures[-1].encoded_image_string[1:4]) == (684, b"PNG")


def test_steps_that_were_lost_leave_no_trace_in_tensorboard(tmp_path, monkeypatch):
    """A run killed after its checkpoint repeats steps; TensorBoard shows each once."""
    pytest.importorskip("tensorboard")
    config = make_config("mnist", steps=8, out_dir=tmp_path / "run", tensorboard=True, **SMALL)
    train(dataclasses.replace(config, steps=4))
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    train(dataclasses.replace(config, steps=6, resume=tmp_path / "run", out_dir=None))
    (tmp_path / "run" / "checkpoint.pt").write_bytes(kept)
    train(dataclasses.replace(config, resume=tmp_path / "run", out_dir=None))
    steps = [x.step for x in events(tmp_path / "run").Scalars("generator_loss")]
    assert steps == [2, 4, 6, 8]


def test_a_run_without_a_report_is_still_a_run(tmp_path, monkeypatch, caplog):
    def broken(path):
        raise ImportError("No module named 'jinja2'")

    monkeypatch.setattr(sys.modules["dafl_fast.distill"], "write_report", broken)
    teacher, student = build("LeNet5"), build("LeNet5Half")
    result = distill(
        teacher, student, image_shape=(1, 32, 32), steps=2, out_dir=tmp_path / "run",
        preset="mnist", **{k: v for k, v in SMALL.items() if k != "eval"},
    )  # fmt: skip
    assert result.summary["steps"] == 2 and not (tmp_path / "run" / "report.html").exists()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "no report of the run could be made: No module named 'jinja2'"


def test_tensorboard_missing_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = make_config("mnist", steps=2, out_dir=tmp_path / "run", tensorboard=True, **SMALL)
    with pytest.raises(UserError, match="--tensorboard needs the package 'tensorboard'"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
def test_in_a_browser_nothing_is_wider_than_the_screen(make_run, tmp_path):
    """Both pages in frames as wide as a phone and a desktop, in a browser without a window."""
    long = "a-name-with-no-place-to-break-it-" * 4
    one, two = make_run("one", student=long), make_run("two", seed=12)
    both = [
        report.write_report(one).read_text(),
        pages.write_comparison([one, two, make_run("three")], tmp_path / "c.html").read_text(),
    ]
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
        for page in both
        for width in (375, 1280)
    )
    measure = """<pre id="found"></pre><script>
      onload = () => {
        document.getElementById("found").textContent = [...document.querySelectorAll("iframe")]
          .map(({contentDocument: d, contentWindow: w}) => [
            w.innerWidth, d.documentElement.scrollWidth, d.querySelectorAll("figure").length,
            [...d.querySelectorAll("figure, .card, pre, .table, details")]
              .filter(e => e.getBoundingClientRect().right > w.innerWidth).length +
            [...d.querySelectorAll("svg text")].filter(e => {
              const [text, svg] = [e, e.ownerSVGElement].map(x => x.getBoundingClientRect());
              return text.left < svg.left || text.right > svg.right;
            }).length,
          ].join(" ")).join(";");
      }</script>"""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f'<!doctype html><meta charset="utf-8">{frames}{measure}')
    shown = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         "--virtual-time-budget=5000", "--hide-scrollbars", "--dump-dom", wrapper.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "CONSOLE" not in shown.stderr, shown.stderr[-2000:]
    found = re.search(r'<pre id="found">([^<]*)', shown.stdout)[1].split(";")
    measured = [tuple(map(int, frame.split())) for frame in found]
    assert [width for width, *_ in measured] == [375, 1280, 375, 1280]
    for width, scrolled, figures, beyond in measured:
        assert figures > 8
        assert scrolled <= width and beyond == 0, measured


def test_the_estimate_is_told_and_judged(make_run):
    told = {
        "agreement_held_out": 0.8,
        "estimated_agreement": 0.876,
        "estimated_between": [0.75, 0.94],
    }
    path = make_run(summary={**SUMMARY, **told})
    text = words(report.write_report(path).read_text())
    assert "On real images it agrees with its teacher on about 87.60 %" in text
    assert "(most likely 75 to 94). It lags behind its teacher: train it longer." in text
    assert "Estimate 87.60 % agreement on real images, 75 to 94" in text
    assert "Estimated agreement on real images 87.60 %" in text


def test_a_good_estimate_needs_no_advice_and_none_is_not_told(make_run):
    told = {
        "agreement_held_out": 0.8,
        "estimated_agreement": 0.97,
        "estimated_between": [0.9, 0.99],
    }
    text = words(report.write_report(make_run("good", {**SUMMARY, **told})).read_text())
    assert "about 97.00 %" in text and "lags" not in text
    none = {"agreement_held_out": 0.8, "estimated_agreement": None, "estimated_between": None}
    text = words(report.write_report(make_run("none", {**SUMMARY, **none})).read_text())
    assert "On real images" not in text and "cannot tell" not in text
    assert "Its images do not tell how often it agrees with its teacher on real ones" in text
    two = {**SUMMARY, **none, "num_classes": 2}
    text = words(report.write_report(make_run("two", two, classes=2, diversity=0.0)).read_text())
    assert "its images cannot tell how it does on real ones: use --diversity 3" in text
    assert "do not tell" not in text
    text = words(report.write_report(make_run("varied", two, classes=2, diversity=3.0)).read_text())
    assert "cannot tell" not in text

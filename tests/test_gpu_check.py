"""How tools/gpu_check.py keeps what it measures; that needs no GPU."""

import json
import sys
import time

import pytest

from tools import gpu_check

FACTS = {"gpu": "NVIDIA Test 9000", "torch": "2.9", "date": "2030-01-02"}


def make(*folders, seconds=1e6, keep=False):
    check = gpu_check.Check(FACTS, list(folders), seconds, keep)
    check.begin("step")
    return check


def python(code):
    return [sys.executable, "-c", code]


def test_rows_are_in_every_folder_as_soon_as_they_are_printed(tmp_path):
    check = make(tmp_path / "results", tmp_path / "out")
    check.write()  # the file that the child looks at
    look = f"""
import pathlib, time
path = pathlib.Path({str(tmp_path / "out" / "NVIDIA-Test-9000.json")!r})
print('ROW {{"name": "ours", "ms": 1.5}}')
for _ in range(100):
    if "1.5" in path.read_text():
        print("seen")
        break
    time.sleep(0.1)
"""
    found = check.job("step", "mnist", python(look), 60)
    assert found[-1] == "seen"
    texts = []
    for folder in (tmp_path / "results", tmp_path / "out"):
        names = sorted(path.name for path in folder.iterdir())
        assert names == [f"NVIDIA-Test-9000.{suffix}" for suffix in ("json", "log", "md")]
        texts.append([(folder / name).read_text() for name in names])
    assert texts[0] == texts[1]
    results, log, table = texts[0]
    assert json.loads(results)["sections"]["step"]["rows"] == [{"name": "ours", "ms": 1.5}]
    assert "seen" in log
    assert "| name | ms |\n| --- | --- |\n| ours | 1.5 |" in table


@pytest.mark.parametrize(
    ("code", "outcome", "bad"),
    [
        ("pass", "ok", False),
        ("raise SystemExit(3)", "FAILED, exit status 3", True),
        ("print('MISSING tyro'); raise SystemExit(1)", "not run: no package tyro", False),
    ],
)
def test_outcomes(tmp_path, code, outcome, bad):
    check = make(tmp_path)
    check.job("step", "mnist", python(code), 60)
    assert check.sections["step"]["jobs"]["mnist"].startswith(outcome)
    assert bool(check.bad) == bad


def test_what_is_too_slow_is_killed_with_its_children(tmp_path):
    check = make(tmp_path)
    # The child's child holds the pipe: reading ends only when it has ended too.
    code = "import subprocess as s; s.run(['sleep', '60'])"
    start = time.monotonic()
    check.job("step", "mnist", python(code), 1)
    assert time.monotonic() - start < 20
    assert check.sections["step"]["jobs"]["mnist"].startswith("KILLED")
    assert check.bad == ["step, mnist"]


def test_without_time_nothing_runs(tmp_path):
    check = make(tmp_path, seconds=-1e6)
    assert check.job("step", "mnist", python("raise SystemExit(1)"), 60) == []
    assert check.sections["step"]["jobs"] == {"mnist": "not run: out of time"}
    assert not check.bad


def test_the_other_sections_of_a_file_stay(tmp_path):
    earlier = make(tmp_path)
    earlier.begin("kernels")
    earlier.row("kernels", {"us": 9.0})
    earlier.row("step", {"ms": 7.0})
    later = make(tmp_path, keep=True)
    assert later.sections["kernels"]["rows"] == [{"us": 9.0}]
    assert later.sections["step"]["rows"] == []
    assert "kernels" not in make(tmp_path).sections


def test_tests_that_failed_and_the_one_that_crashed_are_named(tmp_path):
    (tmp_path / "test_crash.py").write_text(
        "import os\ndef test_good(): pass\ndef test_bad(): assert 0\n"
        "def test_worst(): os._exit(9)\n"
    )
    command = ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", str(tmp_path)]
    lines = make(tmp_path / "out").job("step", "gpu", [sys.executable, *command], 60)
    bad, crashed = gpu_check.failures(lines)
    assert "test_crash.py::test_bad FAILED" in bad
    assert crashed.endswith("test_crash.py::test_worst did not end")
    assert gpu_check.failures(["tests/test_a.py::test_a PASSED   [100%]", "1 passed in 1 s"]) == []

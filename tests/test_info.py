"""The report for bug reports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import dafl_fast
from dafl_fast import info as command

ROOT = Path(__file__).resolve().parent.parent


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["info", *arguments])
    assert command.main() == 0
    return capsys.readouterr().out


def test_it_says_what_is_here(monkeypatch, capsys, tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "usps.bz2").touch()  # half of it
    monkeypatch.setenv("DAFL_DATA", str(tmp_path))
    monkeypatch.setattr("dafl_fast.info.cpu_quota", lambda: 1.5)
    torch.set_num_threads(1)
    found = json.loads(run(monkeypatch, capsys, "--json"))
    assert found["build"] == dafl_fast.build_info()
    assert found["threads"] == found["auto_threads"] == 1
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert (found["data_dir"], found["data"]) == (str(tmp_path), ["mnist"])
    printed = run(monkeypatch, capsys)
    for said in (dafl_fast.__version__, torch.__version__, found["cpu"], found["build"]["isa"],
                 f"{tmp_path}: mnist", f"{found['device']}, {found['precision']}, 1 thread\n",
                 f"{found['usable_cpus']} usable, a quota of 1.5\n"):  # fmt: skip
        assert said in printed


def test_gpus_and_a_missing_folder(monkeypatch, capsys, tmp_path):
    class Properties:
        name, total_memory, major, minor = "NVIDIA H100", 80 * 2**30, 9, 0

    # Another package may have told PyTorch to go by the number of devices.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    monkeypatch.setenv("DAFL_DATA", str(tmp_path / "none"))
    printed = run(monkeypatch, capsys)
    gpu = "NVIDIA H100, 80.0 GiB, compute capability 9.0"
    assert f"{gpu}; {gpu}\n" in printed
    assert f"{tmp_path}/none (no such folder): none" in printed


def test_packages_and_the_extras_that_bring_them():
    found = command.packages(
        [
            "torch>=2.9",
            "no-such.thing[a]>=3",
            'no-such-plot<2; extra == "plot"',
            'dafl_fast[plot]; extra == "test"',
            'no-such-plot; extra == "test"',
            "ruff==0.17.*; extra == 'lint'",
            "no-such-tpu; python_version > '3.9' and extra == 'tpu'",
        ]
    )  # fmt: skip
    assert list(found) == ["torch", "no-such.thing", "no-such-plot", "no-such-tpu"]
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["no-such.thing"] == "missing; pip install 'no-such.thing'"
    assert found["no-such-plot"] == "missing; pip install 'dafl_fast[plot]'"
    assert found["no-such-tpu"] == "missing; pip install 'dafl_fast[tpu]'"


def test_without_the_extension_it_says_what_is_wrong():
    code = (
        "import sys, runpy; sys.modules['dafl_fast._C'] = None; runpy.run_module('dafl_fast.info')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "ImportError: the extension of dafl_fast is not built for this Python and PyTorch "
        f"{torch.__version__} ("
    )
    assert last.endswith("build it, from the sources: pip install --no-build-isolation .")


def test_bug_reports_ask_for_it():
    template = ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml"
    if not template.exists():
        pytest.skip("not part of the source distribution")
    fields = {item.get("id"): item for item in yaml.safe_load(template.read_text())["body"]}
    assert "python -m dafl_fast.info" in fields["info"]["attributes"]["description"]

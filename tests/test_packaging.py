"""What setup.py decides, and what it ships. Nothing here compiles."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import dafl_fast

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module: importing it builds nothing."""
    spec = importlib.util.spec_from_file_location("dafl_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_toolkit(home, version="13.0", headers=True):
    """A folder with as much of a CUDA toolkit as the finder looks at."""
    script(
        home / "bin" / "nvcc",
        f"""case "$1" in
        --version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
        --dryrun) echo '#$ _HERE_={home}/bin' >&2 ;;
        --list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;
        esac""",
    )
    (home / "include").mkdir()
    if headers:
        (home / "include" / "cuda_runtime.h").touch()
    return home


@pytest.fixture
def system(tmp_path):
    """Stands for /usr/local on a machine without CUDA."""
    (tmp_path / "system").mkdir()
    return tmp_path / "system"


def test_cpu_only_torch_gives_a_cpu_build(setup, system):
    plan = setup.decide(None, {}, system=system)
    assert plan.toolkit is None
    assert plan.reason == "torch has no CUDA"


def test_toolkit_of_torchs_major_version_gives_a_cuda_build(setup, system):
    fake_toolkit(system / "cuda-12.9", "12.9")
    home = fake_toolkit(system / "cuda-13.0", "13.0")
    assert setup.decide("13.2", {}, system=system).toolkit == setup.Toolkit(home, "13.0")


def test_wrapper_script_nvcc_is_seen_through(setup, system, tmp_path):
    home = fake_toolkit(tmp_path / "elsewhere")
    wrapper = script(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    plan = setup.decide("13.0", {"PATH": str(wrapper.parent)}, system=system)
    assert plan.toolkit == setup.Toolkit(home, "13.0")


def test_linked_nvcc_is_seen_through(setup, system, tmp_path):
    home = fake_toolkit(tmp_path / "elsewhere")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    plan = setup.decide("13.0", {"PATH": str(tmp_path / "bin")}, system=system)
    assert plan.toolkit == setup.Toolkit(home, "13.0")


def test_cuda_home_comes_first_but_only_if_it_is_usable(setup, system, tmp_path):
    fallback = fake_toolkit(system / "cuda")
    named = fake_toolkit(tmp_path / "named")
    bare = fake_toolkit(tmp_path / "bare", headers=False)
    assert setup.find_toolkit("13.0", {"CUDA_HOME": str(named)}, system).home == named
    assert setup.find_toolkit("13.0", {"CUDA_HOME": str(bare)}, system).home == fallback


def test_every_rejected_folder_is_named_with_its_reason(setup, system, tmp_path):
    fake_toolkit(system / "cuda-12.4", "12.4")
    fake_toolkit(system / "cuda-13.0", headers=False)
    (system / "cuda-11.8" / "include").mkdir(parents=True)
    (system / "cuda-11.8" / "include" / "cuda_runtime.h").touch()
    reason = setup.decide("13.0", {}, system=system).reason
    assert reason == (
        f"no usable CUDA 13 toolkit found ({system}/cuda-13.0: no include/cuda_runtime.h; "
        f"{system}/cuda-12.4: its CUDA is 12.4; {system}/cuda-11.8: no bin/nvcc that runs)"
    )


def test_the_build_can_be_forced_either_way(setup, system):
    with pytest.raises(SystemExit, match=r"DAFL_FAST_CUDA=1, but no usable CUDA 13 toolkit"):
        setup.decide("13.0", {"DAFL_FAST_CUDA": "1"}, system=system)
    with pytest.raises(SystemExit, match=r"DAFL_FAST_CUDA=1, but torch has no CUDA"):
        setup.decide(None, {"DAFL_FAST_CUDA": "1"}, system=system)
    with pytest.raises(SystemExit, match=r"must be 0 or 1, got 'yes'"):
        setup.decide("13.0", {"DAFL_FAST_CUDA": "yes"}, system=system)
    fake_toolkit(system / "cuda")
    assert setup.decide("13.0", {"DAFL_FAST_CUDA": "0"}, system=system).toolkit is None
    assert setup.decide("13.0", {"DAFL_FAST_CUDA": "1"}, system=system).toolkit is not None


@pytest.mark.parametrize(
    ("visible", "asked", "expected"),
    [
        ([], "", "8.0;9.0+PTX"),
        ([(9, 0)], "", "9.0"),
        ([(9, 0), (8, 0), (9, 0)], "native", "8.0;9.0"),
        ([(12, 0)], "", "8.0;9.0+PTX"),  # newer than this nvcc
        ([(9, 0)], "8.6 8.9+PTX", "8.6;8.9+PTX"),
    ],
)
def test_architectures(setup, system, monkeypatch, visible, asked, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(visible))
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(visible))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda gpu: visible[gpu])
    toolkit = setup.Toolkit(fake_toolkit(system / "cuda"), "13.0")
    assert setup.architectures(toolkit, {"TORCH_CUDA_ARCH_LIST": asked}) == expected


def test_openmp_is_that_of_torch(setup, tmp_path):
    assert setup.openmp("linux", [tmp_path]) == ["-fopenmp"]
    assert setup.openmp("darwin", [tmp_path]) == []
    (tmp_path / "omp.h").touch()
    assert setup.openmp("darwin", ["/nowhere", tmp_path]) == ["-Xpreprocessor", "-fopenmp"]


def test_forcing_cuda_without_a_toolkit_ends_with_one_sentence(tmp_path):
    hidden = f"""
import setup, sys
setup.find_toolkit = lambda *_: "no usable CUDA toolkit found"
sys.argv = ["setup.py", "build_ext", "--build-lib", {str(tmp_path)!r}]
setup.main()
"""
    done = run(["-c", hidden], {"DAFL_FAST_CUDA": "1"})
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("dafl_fast: DAFL_FAST_CUDA=1, but ")
    assert len(done.stderr.splitlines()) == 1


def test_building_without_torch_ends_with_one_sentence(tmp_path):
    no_torch = f"""
import sys
sys.modules["torch"] = None  # what makes `import torch` fail
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", {str(tmp_path)!r}]
import setup
setup.main()
"""
    done = run(["-c", no_torch])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("dafl_fast: torch is needed to build: `pip ")
    assert "Traceback" not in done.stderr


def test_version_has_one_place(setup):
    written = (ROOT / "dafl_fast" / "_version.py").read_text()
    assert f'__version__ = "{dafl_fast.__version__}"' in written
    assert dafl_fast.__version__ == setup.VERSION
    assert dafl_fast.build_info()["version"] == dafl_fast.__version__
    for name in ("pyproject.toml", "setup.py", "csrc/bindings.cpp", "Makefile", "README.md"):
        assert f'"{dafl_fast.__version__}"' not in (ROOT / name).read_text()
        assert f"dafl_fast {dafl_fast.__version__}" not in (ROOT / name).read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d[^]]*)\]", changes, re.MULTILINE)
    assert released[:1] in ([], [dafl_fast.__version__])
    assert f"version: {dafl_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_metadata_names_the_pythons_that_are_meant():
    lines = (ROOT / "pyproject.toml").read_text()
    minors = re.findall(r"Python :: 3\.(\d+)", lines)
    assert minors == ["10", "11", "12", "13"]
    for setting in ('requires-python = ">=3.10"', 'target-version = "py310"',
                    'python_version = "3.10"'):  # fmt: skip
        assert setting in lines


def test_source_distribution_is_complete(tmp_path):
    """Made as an isolated build makes it: without torch."""
    no_torch = f"""
import sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "--quiet", "egg_info", "--egg-base", {str(tmp_path)!r},
            "sdist", "--dist-dir", {str(tmp_path)!r}]
import setup
setup.main()
"""
    done = run(["-c", no_torch])
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / f"dafl_fast-{dafl_fast.__version__}.tar.gz") as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "dafl_fast/py.typed"}
    for folder in ("csrc", "dafl_fast/assets", "tests", "bench", "tools", "docs"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        made = {"__pycache__", "out"}  # by Python and by `make bench`
        wanted |= {str(p.relative_to(ROOT)) for p in files if not made & {*p.parts}}
    assert wanted - shipped == set()
    assert not [name for name in shipped if name.endswith((".so", ".pyc"))]


def run(arguments, environ=None):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_needs_torch_alone():
    code = """
import sys
for name in ("yaml", "numpy", "tyro", "rich", "safetensors", "torchvision", "PIL", "mlxtend",
             "matplotlib", "timm", "onnx", "onnxscript", "onnxruntime"):
    sys.modules[name] = None  # what makes importing it fail
import dafl_fast
assert callable(dafl_fast.distill)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

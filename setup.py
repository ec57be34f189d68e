"""Builds dafl_fast._C, with CUDA or for the CPU only, and prints which and why.

CUDA is built when torch was built with CUDA and a usable toolkit of the same major version is
found, whether or not a GPU is visible.

    DAFL_FAST_CUDA=0 | 1             never | always: 1 without a usable toolkit is an error
    DAFL_FAST_WERROR=1               warnings are errors
    DAFL_FAST_SANITIZE=1             with AddressSanitizer and UndefinedBehaviorSanitizer, which
                                     must be loaded first: see tools/sanitize_cpu.py
    TORCH_CUDA_ARCH_LIST="8.0;9.0"   the architectures to compile for
    CUDA_HOME=DIR                    the toolkit to try first
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "dafl_fast" / "_version.py"))["__version__"]

# Runs on every GPU from Ampere on: newer ones than the last translate its PTX. Two architectures
# keep the build short.
DEFAULT_ARCHS = "8.0;9.0+PTX"


class BuildError(SystemExit):
    """Ends the build with one plain sentence instead of a traceback."""

    def __init__(self, sentence: str):
        super().__init__(f"dafl_fast: {sentence}")


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str


@dataclass(frozen=True)
class Plan:
    """What to build, and why."""

    toolkit: Toolkit | None
    reason: str


def output_of(*command: str | Path) -> str:
    """Standard output and error of a command, empty if it cannot be run."""
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def candidate_homes(environ: Mapping[str, str], system: Path) -> Iterator[Path]:
    """Folders that may hold a CUDA toolkit, the likeliest first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            yield Path(environ[variable])
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc:
        # This nvcc may be a wrapper script outside the toolkit, but the real one that it runs
        # names its own folder.
        own = re.search(r"^#\$ _HERE_=(.+)$", output_of(nvcc, "--dryrun", "x.cu"), re.MULTILINE)
        if own:
            yield Path(own[1].strip()).parent
        yield Path(nvcc).resolve().parent.parent
        yield Path(nvcc).parent.parent
    yield system / "cuda"
    yield from sorted(system.glob("cuda-*"), reverse=True)


def find_toolkit(
    torch_cuda: str, environ: Mapping[str, str] = os.environ, system: Path = Path("/usr/local")
) -> Toolkit | str:
    """The first usable toolkit of torch's CUDA major version, or what is wrong with each."""
    major = torch_cuda.split(".")[0]
    wrong: dict[Path, str] = {}
    for home in candidate_homes(environ, system):
        if home in wrong or not home.is_dir():
            continue
        release = re.search(r"release ((\d+)\.\d+)", output_of(home / "bin" / "nvcc", "--version"))
        if not (home / "include" / "cuda_runtime.h").is_file():
            wrong[home] = "no include/cuda_runtime.h"
        elif not release:
            wrong[home] = "no bin/nvcc that runs"
        elif release[2] != major:
            wrong[home] = f"its CUDA is {release[1]}"
        else:
            return Toolkit(home, release[1])
    tried = "; ".join(f"{home}: {why}" for home, why in wrong.items())
    return f"no usable CUDA {major} toolkit found ({tried or 'none anywhere'})"


def decide(torch_cuda: str | None, environ: Mapping[str, str] = os.environ, **where: Path) -> Plan:
    """CUDA or CPU only; torch_cuda is torch.version.cuda."""
    wish = environ.get("DAFL_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"DAFL_FAST_CUDA must be 0 or 1, got {wish!r}.")
    if wish == "0":
        return Plan(None, "DAFL_FAST_CUDA=0")
    found = find_toolkit(torch_cuda, environ, **where) if torch_cuda else "torch has no CUDA"
    if isinstance(found, Toolkit):
        forced = "DAFL_FAST_CUDA=1" if wish else "torch has CUDA and a usable toolkit was found"
        return Plan(found, forced)
    if wish == "1":
        raise BuildError(f"DAFL_FAST_CUDA=1, but {found}.")
    return Plan(None, found)


def architectures(toolkit: Toolkit, environ: Mapping[str, str] = os.environ) -> str:
    """TORCH_CUDA_ARCH_LIST, else the visible GPUs' if nvcc knows them, else the default."""
    import torch

    asked = environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked and asked != "native":
        return asked.replace(" ", ";")
    known = re.findall(
        r"compute_(\d+)", output_of(toolkit.home / "bin" / "nvcc", "--list-gpu-arch")
    )
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    visible = sorted({torch.cuda.get_device_capability(gpu) for gpu in gpus})
    if visible and all(f"{major}{minor}" in known for major, minor in visible):
        return ";".join(f"{major}.{minor}" for major, minor in visible)
    return DEFAULT_ARCHS


def openmp(platform: str, includes: Iterable[str]) -> list[str]:
    """What to compile with, so that operators share torch's threads; nothing where that cannot be.

    The extension is not linked to OpenMP: its symbols resolve to the one runtime that torch has
    loaded. On macOS the compiler brings no omp.h, but torch does, along with that runtime.
    """
    if platform == "linux":
        return ["-fopenmp"]
    if platform == "darwin" and any((Path(folder) / "omp.h").is_file() for folder in includes):
        return ["-Xpreprocessor", "-fopenmp"]
    return []


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))


def torch_build() -> tuple[Extension, type[build_ext]]:
    """The extension and the command that builds it, by way of torch's own builder."""
    import torch

    # The ninja of an environment that is not activated is found too.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

    # Silences its guesses about CUDA_HOME and minor versions: what is decided is printed below.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    plan = decide(torch.version.cuda)
    files = sources("**/*.cpp")
    macros: list[tuple[str, str | None]] = [("DAFL_FAST_VERSION", VERSION)]
    said = f"CPU only: {plan.reason} (torch {torch.__version__})"
    if plan.toolkit:
        cpp_extension.CUDA_HOME = str(plan.toolkit.home)
        archs = os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(plan.toolkit)
        files += sources("cuda/*.cu")
        macros += [
            ("DAFL_FAST_CUDA", "1"),
            ("DAFL_FAST_CUDA_TOOLKIT", plan.toolkit.version),
            ("DAFL_FAST_CUDA_ARCHS", archs),
        ]
        said = (
            f"with CUDA: {plan.reason} (torch {torch.__version__} with CUDA {torch.version.cuda}, "
            f"toolkit {plan.toolkit.version} in {plan.toolkit.home}, architectures {archs})"
        )

    werror = os.environ.get("DAFL_FAST_WERROR") == "1"
    cxx = ["-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
    cxx += ["-Wall", "-Wextra", *(["-Werror"] if werror else [])]
    link = ["-Wl,--strip-all"] if sys.platform == "linux" else []
    if os.environ.get("DAFL_FAST_SANITIZE") == "1":
        # Python's own flags would let integers overflow. Torch hides the types that vptr compares.
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv"]
        cxx += ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
        cxx += ["-fno-sanitize-recover=undefined"]
        link = ["-fsanitize=address,undefined"]
    threads = openmp(sys.platform, cpp_extension.include_paths())
    cxx += threads
    if not threads:
        said += "; without OpenMP, so operators run on one thread: torch brings no omp.h"
    nvcc = ["-O3", "-Xcompiler", "-Wall,-fvisibility=hidden"]
    nvcc += ["-Werror", "all-warnings", "-Xcompiler", "-Werror"] if werror else []

    make = cpp_extension.CUDAExtension if plan.toolkit else cpp_extension.CppExtension
    extension = make(
        name="dafl_fast._C",
        sources=files,
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
    )
    # Torch's headers as system headers: their warnings are not ours, and .cu files, which are
    # compiled without them, cannot come to include torch.
    for folder in extension.include_dirs:
        cxx.extend(["-isystem", folder])
    extension.include_dirs = [str(ROOT / "csrc")]

    class TorchBuild(cpp_extension.BuildExtension):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, use_ninja=cpp_extension.is_ninja_available(), **kwargs)

        def finalize_options(self):
            super().finalize_options()
            if self.inplace:
                # An editable install compiles in a fresh folder; this one keeps its objects.
                kept = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
                self.build_temp = str(ROOT / "build" / kept)

        def build_extensions(self):
            print(f"dafl_fast {VERSION}: building {said}", flush=True)
            super().build_extensions()

    return extension, TorchBuild


def main() -> None:
    try:
        extension, command = torch_build()
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        # Source distributions and pip's first question can do without; all else compiles.
        if not {"egg_info", "sdist"} & set(sys.argv):
            raise BuildError(
                "torch is needed to build: `pip install torch torchvision` first, "
                "then `pip install --no-build-isolation .`"
            ) from None
        extension, command = Extension("dafl_fast._C", sources=[]), build_ext
    # The licence is named here because setuptools before and after 77 disagree on its form in
    # pyproject.toml.
    setup(
        version=VERSION,
        license="Apache-2.0",
        ext_modules=[extension],
        cmdclass={"build_ext": command},
    )


if __name__ == "__main__":
    main()

"""Builds a wheel for 64-bit ARM on another machine, and runs it there by qemu: `make arm-wheel`.

    python tools/arm_wheel.py [TORCH]       the version of torch to build against, 2.9.1 by default

setup.py runs in a Python for ARM, under qemu, and so knows that Python's folders and names; the
compiler that it calls is a cross-compiler, at full speed. That Python comes from Debian's packages
and has the version of this one; torch comes from PyPI. Both are kept in build/arm-wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "arm-wheel"
SYSTEM, SITE, WHEEL = HOME / "system", HOME / "site", HOME / "wheel"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
COMPILER = "aarch64-linux-gnu-g++"
PURE = ["filelock", "fsspec", "jinja2", "networkx", "numpy", "setuptools>=77", "sympy",
        "typing_extensions", "wheel"]  # fmt: skip
CHECK = """
import torch, dafl_fast
from dafl_fast import reference
info = dafl_fast.build_info()
print(info)
assert info["openmp"] and info["isa_available"] == {expected}, info
t = torch.randn(70, 10, requires_grad=True)
dafl_fast.generator_loss(t).total.backward()
ours, t.grad = t.grad, None
reference.generator_loss(t).total.backward()
torch.testing.assert_close(ours, t.grad)
"""


def run(*command: str | Path, **options) -> None:
    """Runs it, and ends all with its exit code where it fails."""
    code = subprocess.run([str(part) for part in command], **options).returncode
    if code != 0:
        raise SystemExit(code)


def need(*names: str) -> str:
    """The first of these programs that is here."""
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        raise SystemExit(
            f"make arm-wheel needs {names[0]}: on Debian, "
            "apt-get install g++-aarch64-linux-gnu qemu-user"
        )
    return found


def get_python() -> None:
    """Unpacks Debian's Python for ARM, and what it needs, without installing anything."""
    apt = HOME / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    own = [
        f"Dir::State::lists={apt}/lists", f"Dir::State::status={apt}/status",
        f"Dir::Cache={apt}/cache", "APT::Architecture=arm64", "APT::Architectures::=arm64",
        "APT::Sandbox::User=root", "Debug::NoLocking=1",
    ]  # fmt: skip
    get = ["apt-get", "-qq", *(part for option in own for part in ("-o", option))]
    run(*get, "update")
    run(*get, "install", "--yes", "--download-only", "--no-install-recommends", PYTHON, "libgomp1",
        "libstdc++6")  # fmt: skip
    # The headers without all that they depend on.
    run(*get, "download", f"lib{PYTHON}-dev", cwd=apt / "cache" / "archives")
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run("dpkg-deb", "-x", package, SYSTEM)


def get_torch(version: str) -> None:
    """Installs torch for ARM into a folder; its dependencies without those on CUDA."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
           "--target", SITE, "--python-version", PYTHON.removeprefix("python"),
           "--platform", "manylinux_2_28_aarch64", "--platform", "manylinux2014_aarch64",
           "--only-binary=:all:"]  # fmt: skip
    run(*pip, "--no-deps", f"torch=={version}")
    run(*pip, *PURE)


def main() -> None:
    version = sys.argv[1] if len(sys.argv) > 1 else "2.9.1"
    qemu = need("qemu-aarch64", "qemu-aarch64-static")
    for name in (COMPILER, "apt-get", "dpkg-deb"):
        need(name)

    def arm(*arguments: str | Path, cpu: str = "max", path: Path = SITE, **options) -> None:
        run(qemu, "-cpu", cpu, "-L", SYSTEM, "-E", f"PYTHONPATH={path}:{SITE}",
            SYSTEM / "usr/bin" / PYTHON, *arguments, **options)  # fmt: skip

    if not (SYSTEM / "usr/bin" / PYTHON).exists():
        get_python()
    if not list(SITE.glob(f"torch-{version}*.dist-info")):
        shutil.rmtree(SITE, ignore_errors=True)
        get_torch(version)
    headers = SYSTEM / "usr" / "include"
    settings = {
        "CC": COMPILER.replace("g++", "gcc"), "CXX": COMPILER, "DAFL_FAST_CUDA": "0",
        "CPATH": f"{headers / PYTHON}:{headers}", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    shutil.rmtree(WHEEL, ignore_errors=True)
    arm("setup.py", "--quiet", "build", "--build-base", HOME / "build", "bdist_wheel",
        "--dist-dir", WHEEL, cwd=ROOT, env={**os.environ, **settings})  # fmt: skip
    (wheel,) = WHEEL.glob("*.whl")
    (ROOT / "dist").mkdir(exist_ok=True)
    shutil.copy(wheel, ROOT / "dist")
    unpacked = WHEEL / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    for cpu, expected in (("max", ["neon", "neon_bf16"]), ("cortex-a72", ["neon"])):
        arm("-c", CHECK.format(expected=expected), cpu=cpu, path=unpacked, cwd=WHEEL)
    print(f"dist/{wheel.name} is built and runs, against torch {version}")


if __name__ == "__main__":
    main()

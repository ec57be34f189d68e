"""`python -m dafl_fast.info`: what there is here, for bug reports."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from .data import find
from .device import (
    cpu_quota,
    environment,
    pick_device,
    pick_precision,
    pick_threads,
    usable_cpus,
)
from .errors import command

# Extras for those who work on dafl_fast itself.
_DEVELOPMENT = ("test", "lint", "dev")


@dataclass(frozen=True)
class InfoConfig:
    """Build, devices, versions and data that dafl_fast finds here, to paste into a bug report."""

    json: bool = False
    """Print JSON instead of text."""


def collect() -> dict[str, Any]:
    """`environment()` and what else a bug report needs, ready for JSON."""
    device = pick_device("auto")
    root, found = find()
    try:
        requirements = importlib.metadata.requires("dafl_fast") or []
    except importlib.metadata.PackageNotFoundError:  # built in place, not installed
        requirements = []
    return {
        **environment(),
        "usable_cpus": len(usable_cpus()),
        "cpu_quota": cpu_quota(),
        "auto_threads": pick_threads("auto"),
        "gpus": [
            {
                "name": gpu.name,
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "compute_capability": f"{gpu.major}.{gpu.minor}",
            }
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "device": device.type,
        "precision": pick_precision("auto", device),
        "packages": packages(requirements),
        "data_dir": str(root.resolve()) if root.is_dir() else f"{root} (no such folder)",
        "data": found,
    }


def packages(requirements: list[str]) -> dict[str, str]:
    """The version of each package that `requirements` name, as a distribution's metadata do, or
    that it is missing, with the extra that brings it."""
    found: dict[str, str] = {}
    for requirement in requirements:
        parts = re.match(r"([\w.-]+)[^;]*(?:;.*extra == .(\w+).)?", requirement)
        assert parts is not None
        name, extra = parts.groups()
        itself = name.replace("-", "_") == "dafl_fast"  # an extra that brings another one along
        if itself or extra in _DEVELOPMENT or name in found:
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wanted = f"dafl_fast[{extra}]" if extra else name
            found[name] = f"missing; pip install '{wanted}'"
    return found


def text(info: dict[str, Any]) -> str:
    """`collect()` as lines for people."""
    build = info["build"]
    cuda = f"CUDA {build['cuda_toolkit']} ({build['cuda_archs']})" if build["cuda"] else "CPU only"
    gpus = [
        f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}"
        for gpu in info["gpus"]
    ]
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    picked = f"{info['auto_threads']} thread{'s' * (info['auto_threads'] > 1)}"
    quota = f", a quota of {info['cpu_quota']:g}" if info["cpu_quota"] else ""
    lines = {
        "dafl_fast": f"{info['dafl_fast']}, built with {cuda}, {build['compiler']}, "
        f"torch {build['torch']}, {'OpenMP' if build['openmp'] else 'no OpenMP'}",
        "torch": info["torch"],
        "python": f"{info['python']}, {info['system']}",
        "CPU": f"{info['cpu']}, {info['cpus']} logical, {info['usable_cpus']} usable{quota}",
        "threads": f"{info['threads']} (OMP_NUM_THREADS {threads})",
        "instructions": f"{build['isa']}, of {', '.join(build['isa_available'])}",
        "GPUs": "; ".join(gpus) or "none",
        "auto picks": f"{info['device']}, {info['precision']}, {picked}",
        "data sets": f"{info['data_dir']}: {', '.join(info['data']) or 'none'}",
        **{name: value for name, value in info["packages"].items() if name != "torch"},
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


@command
def main() -> None:
    config = tyro.cli(InfoConfig, prog="python -m dafl_fast.info")
    info = collect()
    print(json.dumps(info, indent=2) if config.json else text(info))


if __name__ == "__main__":
    sys.exit(main())

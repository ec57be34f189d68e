"""The device, the precision and the memory of a run, and a description of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from ._C import build_info
from ._version import __version__
from .errors import UserError

# The dtype that each precision except fp32 uses under autocast.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device for `--device`; raises UserError for cuda without a usable GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but PyTorch sees no CUDA GPU here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        # torchrun numbers the processes of a machine. Each process uses the GPU with its number.
        rank, count = told_by_torchrun("LOCAL_RANK", 0), torch.cuda.device_count()
        if rank >= count:
            raise UserError(
                f"each process needs a GPU of its own, and process {rank} of this machine (counted "
                f"from 0) has none, since PyTorch sees {count}; start fewer, or use --device cpu"
            )
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def told_by_torchrun(name: str, default: int) -> int:
    """A number that torchrun gives its processes in the environment; `default` without torchrun.

    Raises:
        UserError: it is no number.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise UserError(
            f"the environment variable {name} must be a number, as torchrun sets it, got {text!r}; "
            "unset it to train in one process"
        )
    return int(text)


def pick_precision(name: str, device: torch.device) -> str:
    """The precision for `--precision`: "auto" is bf16 if the device computes in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if computes_in("bf16", device) else "fp32"


def computes_in(precision: str, device: torch.device) -> bool:
    """Whether the device has arithmetic of its own for bf16 or fp16. Of a processor that is not
    Intel's or AMD's it says no, and for bf16 of one whose instructions DAFL_FAST_ISA limits."""
    if device.type == "cuda":
        return precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "fp16":
        return torch.backends.mkldnn.is_available() and bool(
            torch.ops.mkldnn._is_mkldnn_fp16_supported()
        )
    info = build_info()
    if info["isa"] != info["isa_available"][-1]:
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def usable_cpus() -> set[int]:
    """The numbers of the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


_GROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cpu_quota(groups: Path = _GROUPS, mount: Path = _MOUNT) -> float | None:
    """How many processors' time the control groups of this process let it use, as for a container
    with a limit; None without a limit. Both versions of control groups are read."""
    found = map(_quota_in, _control_groups("cpu", groups, mount))
    return min((quota for quota in found if quota is not None), default=None)


def _control_groups(controller: str, groups: Path, mount: Path) -> Iterator[Path]:
    """The folders of the control groups that may limit this process."""
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            for root in (mount, mount / "unified", mount / controllers, mount / controller):
                # A limit further up holds too. In a container only the root may be there.
                own = root / path.lstrip("/")
                yield from (f for f in (own, *own.parents) if f.is_relative_to(root))


def _quota_in(folder: Path) -> float | None:
    """The limit of the control group `folder`; None if it has none, or is none."""
    with contextlib.suppress(OSError, ValueError):  # version 2; "max" is no number
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):  # version 1; -1 is no limit
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
        )
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def usable_cores() -> int:
    """The cores that this process may use: those of `usable_cpus`, and not more than its quota."""
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = set()
    for cpu in usable_cpus():
        path = Path(topology.format(cpu))
        cores.add(path.read_text() if path.exists() else str(cpu))
    # With half a core more it is faster to use one thread more and to be stopped now and then.
    quota = cpu_quota() or len(cores)
    return max(1, min(len(cores), int(quota + 0.5)))


def pick_threads(wish: int | Literal["auto"]) -> int:
    """The number of threads for `--threads`.

    "auto": as many as OMP_NUM_THREADS says; else one for each usable core, and not more than
    PyTorch has. The processes that torchrun starts on a machine share its cores.
    """
    if wish != "auto":
        return wish
    if "OMP_NUM_THREADS" in os.environ and not _set_by_torchrun():
        return torch.get_num_threads()
    share = max(1, usable_cores() // told_by_torchrun("LOCAL_WORLD_SIZE", 1))
    return share if _set_by_torchrun() else min(share, torch.get_num_threads())


def may_change_threads(wish: int | Literal["auto"]) -> bool:
    """Whether neither `--threads` nor OMP_NUM_THREADS says how many there are to be."""
    return wish == "auto" and ("OMP_NUM_THREADS" not in os.environ or _set_by_torchrun())


def _set_by_torchrun() -> bool:
    """Whether OMP_NUM_THREADS=1 is torchrun's doing: it says so to each of several processes."""
    several = told_by_torchrun("LOCAL_WORLD_SIZE", 1) > 1
    started = several and "TORCHELASTIC_RUN_ID" in os.environ
    return started and os.environ.get("OMP_NUM_THREADS") == "1"


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """A context in which PyTorch computes with `number` threads. Afterwards it has as many as
    before, also if that changed inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def usual_defaults() -> Iterator[None]:
    """A context in which new tensors are float32 and on the CPU unless something else is said, and
    gradients are computed, whatever the program around has set. Afterwards all is as before, the
    global random numbers too."""
    dtype, search = torch.get_default_dtype(), torch.backends.cudnn.benchmark
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    gpu = torch.cuda.current_device() if gpus else None
    elsewhere = torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.device("cpu") if elsewhere else contextlib.nullcontext(),
            torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(gpus),
        ):  # fmt: skip
            yield
    finally:
        torch.backends.cudnn.benchmark = search
        torch.set_default_dtype(dtype)
        if gpu is not None:
            torch.cuda.set_device(gpu)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which networks compute in `precision`; with "fp32" it does nothing."""
    if precision not in AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device.type, AUTOCAST[precision])


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory, because each step frees and allocates hundreds of megabytes.

    By default every large tensor gets new pages, and the kernel clears them each time. On two cores
    that takes about a sixth of the MNIST step.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_mmap_max = -1, -4
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The most memory this process has held so far, in bytes: on the host and on the device."""
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    on_host *= 1 if sys.platform == "darwin" else 1024
    on_device = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {"peak_host_bytes": on_host, "peak_device_bytes": on_device}


def free_memory(device: torch.device, groups: Path = _GROUPS, mount: Path = _MOUNT) -> int | None:
    """Bytes that are free on a GPU, or on the host for a CPU, also within the limits of control
    groups; None if nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [*map(_memory_left_in, _control_groups("memory", groups, mount))]
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text()
        found += [1024 * int(size) for size in re.findall(r"MemAvailable:\s*(\d+) kB", text)]
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((size for size in found if size is not None), default=None)


def _memory_left_in(folder: Path) -> int | None:
    """What the control group `folder` lets its processes take in addition; None without a limit."""
    for most, used, files in (
        ("memory.max", "memory.current", "inactive_file"),  # version 2; "max" is no number
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            left = int((folder / most).read_text()) - int((folder / used).read_text())
            with contextlib.suppress(OSError):  # copies of files are given up when need be
                found = re.search(rf"^{files} (\d+)$", (folder / "memory.stat").read_text(), re.M)
                left += int(found[1]) if found else 0
            return max(0, left)
    return None


def environment() -> dict[str, Any]:
    """Versions and machine, for environment.json and bug reports."""
    path = Path("/proc/cpuinfo")
    cpus = path.read_text() if path.exists() else ""
    found = re.search(r"^model name\s*:[ \t]*(.*\S)", cpus, re.MULTILINE)
    model = found[1] if found else platform.processor() or platform.machine()
    return {
        "dafl_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "build": build_info(),
    }

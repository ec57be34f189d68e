"""What the demo finds here and what to expect of it: `make demo` says so first."""

from __future__ import annotations

import dafl_fast
from dafl_fast.device import environment, pick_threads
from dafl_fast.recipes import make_config

# How many times as long a step of the demo takes as with AVX-512 and bf16: measured on two cores of
# an AMD EPYC that was told to use no more than that (docs/cpu.md).
SLOWER = {"avx512_bf16": 1.0, "avx512": 1.15, "avx2": 1.15}
# With AVX-512 and bf16 on two cores, the seconds of training to a student of that accuracy; see
# README.md.
SECONDS = {"98 %": 10, "98.6 %": 60}


def text(isa: str, cpu: str, threads: int, gpu: str | None) -> str:
    """Some lines: the processor, and what to expect of it."""
    minutes = (make_config("mnist").max_seconds or 0) / 60
    found = f"{cpu}, {threads} thread{'s' * (threads > 1)}, instructions {isa}"
    long = f"The demo trains for {minutes:g} minutes; make demo ARGS='--max-seconds 30' for 30 s."
    if gpu is not None:
        return f"{gpu}; {found}\n{long}\nExpect 98.5 % after some seconds; an H100 takes 1 s."
    if isa not in SLOWER:
        return f"{found}, no GPU\n{long}\nHow fast it is with these has not been measured."
    times = " and ".join(
        f"{accuracy} after {seconds * SLOWER[isa]:.0f} s" for accuracy, seconds in SECONDS.items()
    )
    expected = f"With two threads of this kind expect about {times}, later beside other programs."
    return f"{found}, no GPU\n{long}\n{expected}"


def main() -> None:
    here = environment()
    print(text(dafl_fast.build_info()["isa"], here["cpu"], pick_threads("auto"), here["gpu"]))


if __name__ == "__main__":
    main()

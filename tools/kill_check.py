"""Kills runs at random moments, and compares how they end with one that was not: `make kill-check`.

    python tools/kill_check.py --kills 100      in one process and in two, alternately
    python tools/kill_check.py --kills 30 --processes 1 --seed 7

A run of tiny networks writes something at every other step: metrics, checkpoint, bank and samples.
One kill in three comes while it starts, one just after it has saved, one near its end, where it
writes its student, summary and report. Of two processes one is killed, or both. The run is then
resumed, until it gets through. Its student, its metrics but for times, and the files in its folder
(the bank is cut where it was saved) must be those of a run that nothing has disturbed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SETTINGS: dict[str, Any] = {
    "batch_size": 16, "generator_width": 8, "student_batch_size": 16, "student_updates": 2,
    "bank_images": 160, "log_every": 2, "eval": "none", "steps": 30, "save_every": 1e-9,
    "eval_every": 1e-9, "generator_restart_every": 7, "precision": "fp32", "device": "cpu",
    "threads": 1,
}  # fmt: skip
PATIENCE = 300  # seconds for a run to get on
TIMES = ("train_seconds", "steps_per_second", "images_per_second")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dafl_fast.distill"])


def train_in_process(out: str, rank: int, size: int, port: int) -> None:
    """The run in `out`, begun or resumed, as the process `rank` of `size`."""
    import torch

    from dafl_fast import train as command
    from dafl_fast.distill import train
    from dafl_fast.recipes import make_config

    for stream in (1, 2):  # what a killed job says is of no interest
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    if (Path(out) / "config.yaml").exists():
        train(command.parse(["--resume", out]), progress="off")
    else:
        train(make_config("mnist", **SETTINGS, out_dir=Path(out)), progress="off")


def started(out: Path, size: int) -> list[Any]:
    """The processes of a job, running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = [
        CONTEXT.Process(target=train_in_process, args=(str(out), rank, size, port))
        for rank in range(size)
    ]
    for process in job:
        process.start()
    return job


def ended(job: list[Any]) -> bool:
    """Waits for the end of a job; whether all of it ended well."""
    for process in job:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            raise SystemExit(f"a process did not end within {PATIENCE} s")
    return all(process.exitcode == 0 for process in job)


def steps_in(out: Path) -> int:
    """How many steps the run's metrics tell of."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def kill(job: list[Any], out: Path, draw: random.Random) -> str:
    """Kills the job, or one process of it, at a random moment; which kind of moment that was, or
    "too late"."""
    moment = draw.choice(("start", "save", "end"))
    checkpoint = out / "checkpoint.pt"

    def stamp() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    before, limit = stamp(), time.monotonic() + PATIENCE
    while moment != "start" and any(p.is_alive() for p in job) and time.monotonic() < limit:
        if stamp() != before and (moment == "save" or steps_in(out) >= SETTINGS["steps"]):
            break
        time.sleep(0.001)
    time.sleep(draw.random() * (2.0 if moment == "start" else 0.1))
    victims = [process for process in job if process.is_alive()]
    if len(victims) < len(job):
        return "too late"
    for process in victims if draw.random() < 0.5 else [draw.choice(victims)]:
        process.kill()
    for stop in (lambda p: None, lambda p: p.terminate(), lambda p: p.kill()):  # as torchrun
        for process in job:
            stop(process)
        for process in job:
            process.join(15)
    return moment


def outcome(out: Path) -> dict[str, Any]:
    """What must be the same in two runs."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    # One that is killed while it ends is evaluated again, with the same outcome.
    rows = [row for number, row in enumerate(rows) if row not in rows[:number]]
    return {
        "student": (out / "student.safetensors").read_bytes(),
        "metrics": rows,
        "steps": json.loads((out / "summary.json").read_text())["steps"],
        "files": sorted(
            str(path.relative_to(out)) for path in out.rglob("*") if path.parent.name != "bank"
        ),
    }


def check(kills: int, sizes: list[int], seed: int, place: Path) -> Counter[str]:
    """Kills that often, and returns at which moments. Ends the program, with what differs, if
    a run ends otherwise than one that was left alone."""
    draw, moments, runs = random.Random(seed), Counter[str](), 0
    whole = {}
    for size in sizes:
        out = place / f"whole-{size}"
        assert ended(started(out, size)), "the run failed that was left alone"
        whole[size] = outcome(out)
    while moments.total() - moments["too late"] < kills:
        size = sizes[runs % len(sizes)]
        out = place / f"killed-{runs}"
        runs += 1
        while True:
            job = started(out, size)
            if moments.total() - moments["too late"] >= kills:
                assert ended(job), f"the run in {out} cannot be resumed"
                break
            moment = kill(job, out, draw)
            if ended(job):
                moments["too late"] += 1
                break
            moments[moment] += 1
        found = outcome(out)
        for name, value in whole[size].items():
            if found[name] != value:
                apart = f"{found[name]} instead of {value}" if name != "student" else ""
                raise SystemExit(f"{name} of {out} differ from those of a whole run: {apart}")
        print(f"{runs} runs, {dict(moments)}", flush=True)
    return moments


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, action="append", help="1, 2 or both, by default")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        moments = check(asked.kills, asked.processes or [1, 2], asked.seed, Path(place))
    late = moments.pop("too late", 0)
    print(f"{moments.total()} kills ({dict(moments)}, {late} too late): every run ended the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Kills jobs at random moments, and compares how they end with one left alone: `make kill-check`.

    python tools/kill_check.py --kills 100      all jobs of `JOBS`, one after the other
    python tools/kill_check.py --kills 30 --only teacher export --seed 7

A job of tiny networks writes something at every other step. Some kills come at a random
moment: while the job starts, just after it has saved, near its end. More are aimed, at one kind of
file after the other: when it is opened, written, renamed or removed, or a little later. Of two
processes one is killed, or both. Then the same command goes on, until it gets through. What has
its final name must be whole after each kill. At the end there must be the same files, with the same
weights and figures (but for times), as of a job that nothing has disturbed.

While a resumed run is stopped for a moment, another `--resume` of its folder is started too: that
is refused, and changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SETTINGS: dict[str, Any] = {
    "batch_size": 16, "generator_width": 8, "student_batch_size": 16, "student_updates": 2,
    "bank_images": 160, "log_every": 2, "eval": "none", "steps": 30, "save_every": 1e-9,
    "eval_every": 1e-9, "generator_restart_every": 7, "precision": "fp32", "device": "cpu",
    "threads": 1,
}  # fmt: skip
PATIENCE = 300  # seconds for a job to get on
AIMED = 0.6  # of the kills
MOST_KILLS = 5  # of one job, before it may get through
REFUSED = 2  # exit code of what the user is to put right
TIMES = (
    "train_seconds", "steps_per_second", "images_per_second", "wall_seconds", "command", "date",
)  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dafl_fast.distill"])

# -- jobs ------------------------------------------------------------------------------------------


def train_run(out: Path) -> None:
    """The run in `out`, begun or resumed."""
    from dafl_fast import train as command
    from dafl_fast.distill import train
    from dafl_fast.recipes import make_config

    if (out / "config.yaml").exists():
        train(command.parse(["--resume", str(out)]), progress="off")
    else:
        train(make_config("mnist", **SETTINGS, out_dir=out), progress="off")


def images_in(place: Path) -> Path:
    """A file of images with labels, made if there is none."""
    import numpy as np

    path, draw = place / "images.npz", np.random.default_rng(0)
    if not path.exists():
        labels = np.arange(40) % 10
        with path.open("wb") as file:
            np.savez(file, images=draw.integers(0, 256, (40, 32, 32), np.uint8), labels=labels)
    return path


def train_a_teacher(out: Path) -> None:
    from dafl_fast.train_teacher import TeacherConfig, train

    resume = (out / "teacher.checkpoint").exists()
    train(
        TeacherConfig(
            data=str(images_in(out.parent)), out=out / "teacher.safetensors", epochs=6,
            batch_size=10, save_every=1e-9, log_every=1, device="cpu", threads=1, precision="fp32",
            eval="none", resume=resume, network="LeNet5",
        )
    )  # fmt: skip


def export_all(out: Path) -> None:
    """All formats, of a run beside `out` that is made once."""
    from dafl_fast.export import FORMATS, export_student
    from dafl_fast.networks import open_run

    run = out.parent / "exported-run"
    if not (run / "summary.json").exists():
        train_run(run)
    for name in FORMATS:
        network = open_run(run).built()
        export_student(network, out / f"student.{name}", name, run=run)


def reproduce_some(out: Path) -> None:
    """Three rows of a table. Their length is counted in steps: in seconds it would differ."""
    from dafl_fast import reproduce, train_teacher

    class InSteps(reproduce.Reproduction):
        def __init__(self, config: reproduce.ReproduceConfig) -> None:
            super().__init__(config)
            self.training |= {"max_seconds": None, "threads": 1}
            self.recipe = {**self.recipe, "steps": 3}

    made, images = train_teacher.make_config, str(images_in(out.parent))

    def short(preset: str, **changes: Any) -> train_teacher.TeacherConfig:
        return made(preset, **{**changes, "epochs": 2, "save_every": 1e-9, "log_every": 1})

    reproduce.Reproduction, train_teacher.make_config = InSteps, short  # type: ignore[misc]
    reproduce.reproduce(
        reproduce.ReproduceConfig(
            "mnist", seeds=(0,), only=("ordinary", "kd", "dafl"), out=out, device="cpu",
            max_seconds_per_run=1e-6, precision="fp32", data=images, eval=images,
        )
    )  # fmt: skip


class Job(NamedTuple):
    """What is killed.

    Attributes:
        work: what each process does; the same call goes on after a kill.
        files: the kinds of file that it writes, as patterns of their paths in its folder.
        processes: how many.
    """

    work: Callable[[Path], None]
    files: dict[str, str]
    processes: int = 1


_RUN = {
    "config": r"config\.yaml", "environment": r"environment\.json", "lock": r"\.lock",
    "bank": r"bank", "checkpoint": r"checkpoint\.pt", "metrics": r"metrics\.jsonl",
    "samples": r"samples", "student": r"student\.safetensors", "summary": r"summary\.json",
    "report": r"report\.html",
}  # fmt: skip
JOBS = {
    "run": Job(train_run, _RUN),
    "run of two": Job(train_run, _RUN, processes=2),
    "teacher": Job(
        train_a_teacher,
        {"weights": r"teacher\.safetensors", "note": r"teacher\.json",
         "checkpoint of a teacher": r"teacher\.checkpoint"},
    ),
    "export": Job(
        export_all,
        {"safetensors": r"student\.safetensors\.\w+/", "ONNX": r"student\.onnx\.\w+/",
         "pt2": r"student\.pt2\.\w+/", "card": r"\.md"},
    ),
    "reproduce": Job(
        reproduce_some,
        {"settings": r"settings\.json", "result": r"results", "table": r"mnist\.(json|md)",
         "plot": r"mnist\.png", "row": r"runs/[^/]*\.safetensors", "run in it": r"runs/dafl-0",
         "checkpoint of a row": r"runs/[^/]*\.checkpoint"},
    ),
}  # fmt: skip

# -- dying -----------------------------------------------------------------------------------------


class Aim(NamedTuple):
    """At the event number `number` of a kind of file, and `delay` seconds later."""

    kind: str
    number: int
    delay: float


def watch(out: Path, files: dict[str, str], aim: Aim | None) -> Counter[str]:
    """Counts what this process does to each kind of file from now on; dies as `aim` says."""
    seen = Counter[str]()
    known = {kind: re.compile(rf"{re.escape(str(out))}/.*{name}") for kind, name in files.items()}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        else:
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.chmod", "shutil.rmtree")
        if not changes or isinstance(arguments[0], int):
            return
        for kind, name in known.items():
            if name.match(os.fsdecode(arguments[0])):
                seen[kind] += 1
                if aim is not None and (kind, seen[kind]) == (aim.kind, aim.number):
                    if aim.delay:  # the signal's own effect, wherever the process is then
                        signal.setitimer(signal.ITIMER_REAL, aim.delay)
                    else:
                        os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def work(name: str, out: Path, rank: int, port: int, aim: Aim | None) -> None:
    """The process `rank` of a job; what it says is kept beside `out`."""
    import torch

    from dafl_fast.errors import UserError

    job = JOBS[name]
    for stream in (1, 2):
        os.dup2(os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    if job.processes > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(job.processes), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(job.processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
    seen = watch(out, job.files, aim) if rank == 0 else Counter[str]()
    try:
        job.work(out)
    except UserError as error:
        print(f"refused: {error}", flush=True)
        sys.exit(REFUSED)
    if rank == 0:
        Path(f"{out}.counts").write_text(json.dumps(seen))


def started(name: str, out: Path, aim: Aim | None = None) -> list[Any]:
    """The processes of a job, running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=work, args=(name, out, rank, port, aim))
        for rank in range(JOBS[name].processes)
    ]
    for process in processes:
        process.start()
    return processes


def finish(job: list[Any], out: Path) -> None:
    """Waits for the end of a job that must get through."""
    for process in job:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            raise SystemExit(f"a process in {out} did not end within {PATIENCE} s")
        if process.exitcode != 0:
            codes = [one.exitcode for one in job]
            said = Path(f"{out}.log").read_text()[-9000:]
            raise SystemExit(f"{out}: exit codes {codes}\n{said}")


def steps_in(out: Path) -> int:
    """How many steps the run's metrics tell of."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for_a_moment(job: list[Any], out: Path, draw: random.Random, seconds: float) -> str:
    """Waits for a random moment of a job that takes `seconds`; which kind of moment that is."""
    moment = draw.choice(("start", "save", "end")) if (out / "config.yaml").exists() else "any time"
    if moment == "any time":
        time.sleep(draw.random() * seconds)
        return moment
    checkpoint = out / "checkpoint.pt"

    def stamp() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    before, limit = stamp(), time.monotonic() + PATIENCE
    while moment != "start" and all(p.is_alive() for p in job) and time.monotonic() < limit:
        if stamp() != before and (moment == "save" or steps_in(out) >= SETTINGS["steps"]):
            break
        time.sleep(0.001)
    time.sleep(draw.random() * (2.0 if moment == "start" else 0.1))
    return moment


def kill(job: list[Any], aim: Aim | None, draw: random.Random) -> bool:
    """Kills the job, or one process of it; of an aimed one, the others than the first, which sees
    to it. Whether there was still something to kill."""
    if aim is not None:
        job[0].join(PATIENCE)
        if job[0].exitcode not in (-signal.SIGKILL, -signal.SIGALRM):
            return False
    elif not all(process.is_alive() for process in job):
        return False
    elif draw.random() < 0.5:
        draw.choice(job).kill()
    else:
        for process in job:
            process.kill()
    for stop in (lambda p: None, lambda p: p.terminate(), lambda p: p.kill()):  # as torchrun
        for process in job:
            stop(process)
        for process in job:
            process.join(15)
    return True


# -- comparing -------------------------------------------------------------------------------------


def outcome(out: Path) -> dict[str, Any]:
    """What must be the same in two jobs: which files there are, and what is in them but for times.
    How the bank is cut into files depends on when it was saved."""
    files = [path for path in sorted(out.rglob("*")) if path.parent.name != "bank"]
    content: dict[str, Any] = {str(path.relative_to(out)): None for path in files}
    for path in files:
        name = str(path.relative_to(out))
        if path.name == "metrics.jsonl":
            rows = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
            # One that is killed while it ends is evaluated again, with the same outcome.
            content[name] = [row for number, row in enumerate(rows) if row not in rows[:number]]
        elif path.suffix in (".safetensors", ".onnx") or path.parent.name == "samples":
            content[name] = path.read_bytes()
        elif path.name == "summary.json":
            content[name] = json.loads(path.read_text())["steps"]
        elif path.suffix == ".json" and path.name != "environment.json":
            content[name] = _timeless(json.loads(path.read_text()))
    return content


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in TIMES}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def check_whole(out: Path) -> None:
    """Ends the program if a file that has its final name is not whole."""
    import torch
    import yaml
    from PIL import Image
    from safetensors.torch import load_file

    def image(path: Path) -> None:
        with Image.open(path) as picture:
            picture.load()

    def page(path: Path) -> None:
        assert path.read_text().rstrip().endswith("</html>")

    readers: dict[str, Callable[[Path], object]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".yaml": lambda path: yaml.safe_load(path.read_text())["steps"],
        ".safetensors": load_file,
        ".pt": lambda path: torch.load(path, weights_only=True)["progress"],
        ".checkpoint": lambda path: torch.load(path, weights_only=True)["steps"],
        ".pt2": torch.export.load,
        ".png": image,
        ".html": page,
    }
    for path in out.rglob("*"):
        if path.suffix in readers and not path.name.startswith("."):
            try:
                readers[path.suffix](path)
            except Exception as error:
                raise SystemExit(f"{path} is not whole after a kill: {error}") from error


def check_rival(name: str, job: list[Any], out: Path) -> bool:
    """While a resumed run stands still, another one is refused and changes nothing in its folder;
    ends the program if not. Whether there was a moment for it."""
    holder, limit = f'"process": {job[0].pid},', time.monotonic() + PATIENCE

    def is_locked() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return holder in (out / ".lock").read_text()
        return False

    while not is_locked():
        if not job[0].is_alive() or time.monotonic() > limit:
            return False
        time.sleep(0.001)
    os.kill(job[0].pid, signal.SIGSTOP)
    try:
        if not is_locked():
            return False
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        (rival,) = started(name.removesuffix(" of two"), out)
        rival.join(PATIENCE)
        said = Path(f"{out}.log").read_text()[-500:]
        if rival.exitcode != REFUSED or "is being trained by process" not in said:
            raise SystemExit(f"a second resume of {out} was not refused: {said}")
        if before != {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}:
            raise SystemExit(f"a second resume of {out} has changed its files")
    finally:
        os.kill(job[0].pid, signal.SIGCONT)
    return True


def check(kills: int, names: list[str], seed: int, place: Path) -> Counter[str]:
    """Kills that often, and returns at which moments. Ends the program, with what differs, if a job
    ends otherwise than one that was left alone."""
    draw, moments, jobs = random.Random(seed), Counter[str](), 0
    whole, counts, seconds, aims = {}, {}, {}, Counter[tuple[str, str]]()
    for name in names:
        for _ in range(2):  # the first may make what it needs
            out = place / f"whole {name}"
            if out.exists():
                out.rename(place / f"first {name}")
            begun = time.monotonic()
            finish(started(name, out), out)
            seconds[name] = time.monotonic() - begun
            whole[name] = outcome(out)
        counts[name] = json.loads(Path(f"{out}.counts").read_text())
        assert counts[name].keys() == JOBS[name].files.keys(), f"not written: {counts[name]}"
        assert outcome(place / f"first {name}") == whole[name], f"{name} is not repeatable"
    apart = ("too late", "two at once")  # which are no kills
    while (done := sum(n for moment, n in moments.items() if moment not in apart)) < kills:
        name = names[jobs % len(names)]
        out = place / f"{name} {jobs}"
        jobs += 1
        for _ in range(min(draw.randint(1, MOST_KILLS), kills - done)):
            aim = None
            if draw.random() < AIMED:
                kind = min(sorted(counts[name]), key=lambda kind: aims[name, kind])
                aims[name, kind] += 1
                delay = draw.choice((0.0, 10 ** draw.uniform(-5, -2)))
                aim = Aim(kind, draw.randint(1, counts[name][kind]), delay)
            job = started(name, out, aim)
            moment = aim.kind if aim else wait_for_a_moment(job, out, draw, seconds[name])
            if not kill(job, aim, draw):
                finish(job, out)
                moments["too late"] += 1
                continue
            check_whole(out)
            moments[moment] += 1
        job = started(name, out)
        if "run" in name and (out / "config.yaml").exists():
            moments["two at once"] += check_rival(name, job, out)
        finish(job, out)
        found = outcome(out)
        for file in whole[name].keys() | found.keys():
            if file not in found or file not in whole[name]:
                raise SystemExit(f"{out / file} is in one job only, a killed or a whole one")
            if found[file] != whole[name][file]:
                raise SystemExit(f"{out / file} differs from that of a job left alone")
        print(f"{jobs} jobs, {dict(moments)}", flush=True)
    return moments


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        moments = check(asked.kills, asked.only, asked.seed, Path(place))
    late, rivals = moments.pop("too late", 0), moments.pop("two at once", 0)
    print(
        f"{moments.total()} kills ({dict(moments)}, {late} too late): all ended as left alone; "
        f"{rivals} times a second resume was refused"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How many threads a run uses: what the machine lets it, and what `Threads` finds out."""

import logging
import os
from pathlib import Path

import pytest
import torch

from dafl_fast.config import Config
from dafl_fast.device import cpu_quota, free_memory, pick_device, pick_threads, usable_cores
from dafl_fast.distill import distill, train
from dafl_fast.engine import threads as module
from dafl_fast.engine.folder import read_json
from dafl_fast.engine.loop import Loop
from dafl_fast.engine.threads import Load, Threads, threads_of_run
from dafl_fast.errors import UserError
from dafl_fast.evaluate import EvaluateConfig
from dafl_fast.recipes import make_config
from dafl_fast.train import parse
from tests.test_progress import SMALL, network

# ---- The machine ---------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path):
    """Control groups: from the lines of /proc/self/cgroup and files under the mount, the quota."""

    def quota(lines: str, files: dict[str, str]) -> float | None:
        mount = tmp_path / "mount"
        for name, text in files.items():
            (mount / name).parent.mkdir(parents=True, exist_ok=True)
            (mount / name).write_text(text + "\n")
        (tmp_path / "cgroup").write_text(lines)
        return cpu_quota(tmp_path / "cgroup", mount)

    return quota


@pytest.mark.parametrize(
    ("lines", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {}, None),
        # The narrowest limit on the way up holds; a sibling's does not.
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000",
                       "cpu.max": "800000 100000", "a/c/cpu.max": "10000 100000"}, 2.0),
        # In a container the path may be that of the host.
        ("0::/docker/1f\n", {"cpu.max": "400000 100000"}, 4.0),
        ("9:memory:/m\n3:cpu,cpuacct:/job\n0::/\n",
         {"cpu,cpuacct/job/cpu.cfs_quota_us": "50000", "cpu,cpuacct/job/cpu.cfs_period_us": "20000",
          "cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 2.5),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        # Both versions at once, the second without the controller.
        ("2:cpu:/x\n0::/\n",
         {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000",
          "unified/cgroup.procs": ""}, 1.0),
        ("3:cpuset:/job\n", {"cpuset/job/cpu.cfs_quota_us": "1",
                             "cpuset/job/cpu.cfs_period_us": "1"}, None),
    ],
)  # fmt: skip
def test_quotas_of_control_groups(groups, lines, files, quota):
    assert groups(lines, files) == quota


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        ("0::/job/a\n", {"job/a/memory.max": "max", "job/a/memory.current": "70",
                         "job/memory.max": "1000", "job/memory.current": "900",
                         "job/memory.stat": "anon 800\ninactive_file 60\nactive_file 9\n"}, 160),
        ("0::/\n", {"memory.max": "1000", "memory.current": "1200"}, 0),
        ("0::/\n", {"memory.max": "max", "memory.current": "70"}, None),
        ("4:memory:/job\n1:cpu:/\n",
         {"memory/job/memory.limit_in_bytes": "5000", "memory/job/memory.usage_in_bytes": "3000",
          "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
          "memory/memory.limit_in_bytes": "9223372036854771712",
          "memory/memory.usage_in_bytes": "8000"}, 2500),
    ],
)  # fmt: skip
def test_memory_of_control_groups(tmp_path, lines, files, left):
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text)
    (tmp_path / "cgroup").write_text(lines)
    cpu = torch.device("cpu")
    machine = free_memory(cpu, tmp_path / "none")
    found = free_memory(cpu, tmp_path / "cgroup", tmp_path / "mount")
    assert found == left if left is not None else found > 10**8 and machine > 10**8


def test_no_control_groups(tmp_path):
    assert cpu_quota(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (0.3, 1), (1.4, 1), (1.5, 2), (9.0, 4)])
def test_cores_within_the_quota(monkeypatch, quota, cores):
    monkeypatch.setattr("dafl_fast.device.usable_cpus", lambda: {10_000, 10_001, 10_002, 10_003})
    monkeypatch.setattr("dafl_fast.device.cpu_quota", lambda: quota)
    assert usable_cores() == cores


def test_this_machine():
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


@pytest.fixture
def eight_cores(monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("dafl_fast.device.usable_cores", lambda: 8)
    torch.set_num_threads(8)


def test_threads_for_the_cores(eight_cores, monkeypatch):
    assert pick_threads("auto") == 8
    assert pick_threads(3) == 3
    torch.set_num_threads(2)  # by the user
    assert pick_threads("auto") == 2
    torch.set_num_threads(16)
    assert pick_threads("auto") == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "16")  # by the user too
    assert pick_threads("auto") == 16
    assert pick_threads(3) == 3


def test_processes_of_torchrun_share_the_cores(eight_cores, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for processes, each in ((1, 8), (2, 4), (3, 2), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert pick_threads("auto") == each
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which torchrun sets where nobody has
    torch.set_num_threads(1)
    assert pick_threads("auto") == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    assert pick_threads("auto") == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # one process: torchrun sets nothing
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    assert pick_threads("auto") == 1


# ---- The setting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (0, "--threads must be auto, or 1 to 4096, got 0"),
        (-2, "--threads must be auto, or 1 to 4096, got -2"),
        ("two", "--threads must be a whole number, got 'two'"),
        (1.5, "--threads must be a whole number, got 1.5"),
        (True, "--threads must be a whole number, got True"),
    ],
)
def test_numbers_that_are_none(value, sentence):
    for kind in (Config, lambda **given: EvaluateConfig(Path("x"), **given)):
        with pytest.raises(UserError) as raised:
            kind(threads=value)
        assert str(raised.value) == sentence


def test_the_command_line_takes_a_number():
    assert parse(["--threads", "3"]).threads == 3
    assert parse(["--threads", "auto"]).threads == parse([]).threads == "auto"


def test_a_run_uses_what_it_is_told_and_gives_it_back(tmp_path):
    torch.set_num_threads(1)
    seen = []
    distill(
        network(), network(), out_dir=tmp_path / "run", progress="off", threads=2,
        callbacks=[lambda row: seen.append(torch.get_num_threads())], **SMALL, steps=4,
    )  # fmt: skip
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1
    assert read_json(tmp_path / "run" / "environment.json")["threads"] == 2


def test_a_resumed_run_of_steps_keeps_its_number(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen, teacher = [], network()

    def run(**settings) -> int:
        distill(
            teacher, network(), progress="off",
            callbacks=[lambda row: seen.append(torch.get_num_threads())], **SMALL, **settings,
        )  # fmt: skip
        return seen[-1]

    torch.set_num_threads(2)
    monkeypatch.setattr("dafl_fast.device.usable_cores", lambda: 2)
    assert run(out_dir=tmp_path, steps=2) == 2
    torch.set_num_threads(1)  # as on a machine with fewer cores
    assert run(resume=tmp_path, steps=4) == 2
    config = make_config("mnist", resume=tmp_path, max_seconds=1)
    assert threads_of_run(config) == 1, "bounded by time it may take another one"
    assert threads_of_run(make_config("mnist", resume=tmp_path, steps=9, threads=5)) == 5
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert threads_of_run(make_config("mnist", resume=tmp_path, steps=9)) == 1


def test_when_the_number_may_change(eight_cores, monkeypatch):
    class World:
        size = 1

    class Step:
        device, world = torch.device("cpu"), World

    def changes(**settings) -> bool:
        return Threads.for_run(make_config("mnist", **settings), Step, 0.0) is not None

    assert changes()
    assert changes(max_seconds=5)
    assert not changes(steps=5)
    assert not changes(steps=5, max_seconds=5)
    assert not changes(threads=8)
    assert not changes(compile=True)
    monkeypatch.setattr(World, "size", 2)
    assert not changes()
    monkeypatch.setattr(World, "size", 1)
    monkeypatch.setattr(Step, "device", torch.device("cuda"))
    assert not changes()
    monkeypatch.setattr(Step, "device", torch.device("cpu"))
    torch.set_num_threads(1)
    assert not changes()
    torch.set_num_threads(8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert not changes()


# ---- The controller, with simulated steps --------------------------------------------------------


class Machine:
    """Cores that a run's threads and `others` share, one thread each.

    A step is `work` seconds of one thread, of which the share `parallel` can be split. Threads that
    are too many for the cores wait in turn, and all wait for the one that waits.
    """

    def __init__(self, cores=2, work=0.1, parallel=0.8, tells=True):
        self.cores, self.work, self.parallel, self.tells = cores, work, parallel, tells
        self.others = 0
        self.seconds = self.waited = self.idle = self.used_by_others = 0.0
        self.threads, self.steps, self.used = cores, 0, {}

    def use(self, threads):
        self.threads = threads

    def load(self):
        told = (self.waited, self.idle, self.used_by_others) if self.tells else (None,) * 3
        return Load(self.seconds, *told)

    def step_seconds(self, threads):
        alone = self.work * (1 - self.parallel + self.parallel / threads)
        crowd = threads + self.others - self.cores
        return alone * (1 + 3 * crowd / self.cores if crowd > 0 and threads > 1 else
                        max(1, (1 + self.others) / self.cores))  # fmt: skip

    def run(self, controller, until):
        while self.seconds < until:
            took = self.step_seconds(self.threads)
            running = self.threads + self.others
            self.seconds += took
            self.waited += took * max(0, running - self.cores) * self.threads / running
            self.idle += took * max(0, self.cores - running)
            self.used_by_others += took * self.others * min(1, self.cores / running)
            self.steps += 1
            self.used[self.threads] = self.used.get(self.threads, 0.0) + took
            controller.after_step(self.seconds)


def controller(machine, seconds=120.0):
    return Threads(machine.threads, seconds, machine.seconds, machine.use, machine.load)


def lines(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("work", [0.01, 0.1, 1.0, 8.0])
def test_alone_it_loses_nothing(caplog, tells, work):
    machine = Machine(work=work, tells=tells)
    machine.run(controller(machine), 120)
    assert machine.steps > 0.99 * 120 / machine.step_seconds(2) - 1
    assert lines(caplog) == []


@pytest.mark.parametrize("tells", [True, False])
def test_beside_a_busy_process(caplog, tells):
    machine = Machine(tells=tells)
    under = controller(machine)
    machine.run(under, 10)
    machine.others = 1
    machine.run(under, 13)
    assert under.number == machine.threads == 1
    reason = ", because other programs use the cores" if tells else ""
    assert lines(caplog) == [
        f"with 2 threads a step takes 1.5 times as long as with 1{reason}: going on with 1 thread"
    ]
    machine.run(under, 60)
    slow, fast = machine.step_seconds(2), machine.step_seconds(1)
    assert machine.used[1] > 0.9 * 50, (slow, fast)
    machine.others = 0
    machine.run(under, 120)
    assert under.number == 2
    reason = ", because cores are free again" if tells else ""
    assert lines(caplog)[-1] == (
        f"with 1 thread a step takes 1.7 times as long as with 2{reason}: going on with 2 threads"
    )
    assert machine.used[2] > 60, "soon after it was alone again"


def test_beside_it_from_the_beginning():
    """A short run, so there is no trial without a reason: the waiting threads are the reason."""
    machine = Machine()
    machine.others = 1
    machine.run(controller(machine, 20), 20)
    assert machine.used[1] > 0.9 * 20


def test_a_resumed_run(caplog):
    """Its clock goes on: the first step has not taken all the time before it."""
    machine = Machine()
    machine.seconds = 1000.0
    under = controller(machine, 1060)
    machine.run(under, 1060)
    assert under.number == 2
    assert machine.used.get(1, 0.0) < 1.0
    assert lines(caplog) == []


def test_a_slow_beginning_is_no_reason(caplog):
    machine = Machine()
    under = controller(machine)
    machine.work *= 2.5  # as long as memory is new
    machine.run(under, 0.8)
    machine.work /= 2.5
    machine.run(under, 10)
    assert under.number == 2
    assert lines(caplog) == []


def test_threads_of_its_own_are_no_reason(caplog):
    """While a checkpoint is written, threads wait, but not for other programs."""
    machine = Machine()
    machine.load = lambda: Load(machine.seconds, machine.seconds, 0.0, 0.0)
    under = controller(machine, 20)
    machine.run(under, 20)
    assert machine.used.keys() == {2}


def test_as_many_fewer_as_wait(caplog):
    machine = Machine(cores=16, work=1.0, parallel=0.99)
    machine.others = 3
    under = controller(machine)
    machine.run(under, 30)
    assert under.number == 13
    assert len(lines(caplog)) == 1


def test_very_long_steps_are_tried_soon():
    """One step tells enough, if it lasts that long."""
    machine = Machine(work=30.0)
    machine.others = 1
    machine.run(controller(machine, 600), 60)
    assert machine.threads == 1


def test_a_network_too_small_for_many_threads(caplog):
    machine = Machine(cores=8)
    best = {8: 4.0, 4: 2.0, 2: 1.0, 1: 3.0}
    machine.step_seconds = lambda threads: 0.01 * best[threads]
    under = controller(machine)
    machine.run(under, 120)
    assert under.number == 2
    assert machine.used[2] > 0.95 * 120
    assert lines(caplog)[0] == (
        "with 8 threads a step takes 2.0 times as long as with 4: going on with 4 threads"
    )
    assert len(lines(caplog)) == 2


def test_steps_that_become_longer_by_themselves(caplog):
    """As when the adversarial loss is switched on: fewer threads are tried once, in vain."""
    machine = Machine()
    under = controller(machine)
    machine.run(under, 10)
    machine.work *= 3
    before = machine.used.get(1, 0.0)
    machine.run(under, 120)
    assert under.number == 2
    assert 0 < machine.used[1] - before < 2.5
    assert lines(caplog) == []


def test_an_unlucky_trial_is_repeated():
    machine = Machine()
    under = controller(machine, 30)
    machine.others = 1
    usual, machine.step_seconds = machine.step_seconds, lambda threads: 0.2  # in a bad moment
    machine.run(under, 3)
    assert under.number == 2
    machine.step_seconds = usual
    machine.run(under, 30)
    assert under.number == 1


def test_what_this_machine_tells():
    first, second = Load.read(), Load.read()
    for told in second.since(first):
        assert told is None or told >= 0
    if Path("/proc/self/schedstat").exists():
        assert second.waited >= 0
    before = Load(1.0, 5.0, 1.0, 2.0)
    assert Load(2.0, None, 3.0, 2.5).since(before) == (None, 2.0, 0.5)
    assert Load(3.0, 1.0, 3.0, 2.0).since(before) == (0.0, 1.0, 0.0), "a thread has ended"


def test_the_run_of_a_config_changes_its_threads(tmp_path, monkeypatch, caplog):
    """The loop calls it: beside programs that make it wait, a run goes on with fewer threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("dafl_fast.device.usable_cores", lambda: 2)
    monkeypatch.setattr(module, "SHORTEST", 0.0)
    monkeypatch.setattr(module, "FASTER", 1e9)
    share = lambda self, ahead=0: (self.step.steps + ahead) / 12  # noqa: E731, on any machine
    monkeypatch.setattr(Loop, "_share", share)
    monkeypatch.setattr(Threads, "_consider", lambda self, look: self._try(1, look, ", so"))
    torch.set_num_threads(2)
    settings = {**SMALL, "image_shape": (1, 32, 32), "eval": "none"}
    train(make_config("mnist", max_seconds=9, out_dir=tmp_path, **settings), progress="off")
    assert torch.get_num_threads() == 2
    assert any("going on with 1 thread" in line for line in lines(caplog))


def test_more_processes_than_gpus_is_one_sentence(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 1 .* has none, since PyTorch sees 1; start fewer"):
        pick_device("auto")

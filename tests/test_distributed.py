"""Several processes are one: the same student as a single process, gloo on the CPU."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dafl_fast import distill, generator_loss
from dafl_fast.adapt import adapted
from dafl_fast.data import FORMATS
from dafl_fast.distill import train
from dafl_fast.engine import loop
from dafl_fast.engine.distributed import World
from dafl_fast.engine.prepare import prepare
from dafl_fast.errors import TrainingStopped, UserError
from dafl_fast.models import build
from dafl_fast.recipes import make_config
from dafl_fast.unlabelled import Given

from .test_step import make_step
from .test_train import TINY, assert_same_student

SETTINGS = {
    "published": {},
    "paper": {},
    "fast": dict(
        student_updates=2, student_batch_size=8, bank_images=40, ema_decay=0.9, bank_crop=1,
        bank_flip=True, generator_restart_every=2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """Calls `function(world, *arguments)` in each of two processes and gives both results."""
    context = multiprocessing.get_context("forkserver")
    meeting = tmp_path_factory.mktemp("processes") / "meeting"
    pipes, workers = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        workers.append(context.Process(target=serve, args=(rank, str(meeting), theirs)))
        workers[-1].start()
        theirs.close()
        pipes.append(ours)

    def call(function, *arguments):
        for pipe in pipes:
            pipe.send(pickle.dumps((function, arguments)))
        return [pickle.loads(pipe.recv()) for pipe in pipes]

    yield call
    for pipe, worker in zip(pipes, workers, strict=True):
        pipe.send(None)
        worker.join()


def serve(rank: int, meeting: str, pipe) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    while (request := pipe.recv()) is not None:
        function, arguments = pickle.loads(request)
        pipe.send(pickle.dumps(function(World(rank, 2), *arguments)))
    torch.distributed.destroy_process_group()


def losses(world: World, logits, features):
    part = slice(world.rank * 8, world.rank * 8 + 8)
    t, f = logits[part].requires_grad_(), features[part].requires_grad_()
    loss = generator_loss(t, f, one_hot=0.7, entropy=4.0, activation=0.3, group=world.group)
    (loss.total * 3).backward()
    mean = world.mean(torch.stack([loss.total.detach(), *loss[1:]]))
    return mean, t.grad, f.grad


def test_the_mean_prediction_is_that_of_all_processes(in_two_processes):
    t, f = torch.randn(16, 10).double() * 3, torch.randn(16, 5).double()
    first, second = in_two_processes(losses, t, f)
    t.requires_grad_(), f.requires_grad_()
    loss = generator_loss(t, f, one_hot=0.7, entropy=4.0, activation=0.3)
    (loss.total * 3).backward()
    torch.testing.assert_close(first[0], torch.stack([loss.total, *loss[1:]]).detach())
    torch.testing.assert_close(second[0], first[0])
    # Each process's gradient is that of the mean over its own rows: twice as much a row.
    torch.testing.assert_close(torch.cat([first[1], second[1]]) / 2, t.grad)
    torch.testing.assert_close(torch.cat([first[2], second[2]]) / 2, f.grad)


def differing(world: World, seed: int, step: int):
    values = {"--steps": 3, "--seed": seed + step * world.rank, "--lr": float(world.rank)}
    try:
        world.demand_equal(dict(list(values.items())[: 2 if step == 0 else 3]))
    except UserError as error:
        return str(error)


def test_processes_with_other_settings_are_refused(in_two_processes):
    assert in_two_processes(differing, 4, 0) == [None, None]
    said = "--seed must be the same in all processes, got 4 in process 0 and 5 in process 1"
    assert in_two_processes(differing, 4, 1) == [said, said]


def other_teacher(world: World):
    config = make_config("mnist", batch_size=8, generator_width=4, steps=1, precision="fp32",
                         bank_images=16, student_batch_size=8)  # fmt: skip
    torch.manual_seed(world.rank)
    try:
        prepare(config, build("LeNet5"), build("LeNet5Half"), torch.device("cpu"), "fp32",
                world=world)  # fmt: skip
    except UserError as error:
        return str(error)


def test_processes_with_other_teachers_are_refused(in_two_processes):
    first, second = in_two_processes(other_teacher)
    assert first == second
    assert first.startswith("the teacher (by the SHA-256 of its weights) must be the same in all")


def deciding(world: World):
    """What `decide` gives for a value, and for a mistake, that the first process alone sees."""

    def make():
        assert world.first
        raise UserError("there is no such thing")

    try:
        world.decide(make)
    except UserError as error:
        return world.decide(lambda: {"rank": world.rank}), str(error)


def test_all_processes_have_what_the_first_one_decides(in_two_processes):
    expected = ({"rank": 0}, "there is no such thing")
    assert in_two_processes(deciding) == [expected, expected]


def chosen_settings(world: World):
    """Of a teacher that knows mirrored images in the second process only."""
    config = make_config("custom", image_shape=(3, 8, 8), num_classes=5, steps=1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dafl_fast.adapt._knows_mirrored", lambda *_: world.rank == 1)
        return adapted(config, network, torch.device("cpu"), world)


def test_the_first_process_chooses_the_settings(in_two_processes):
    first, second = in_two_processes(chosen_settings)
    assert first == second and not first.bank_flip


def refusal(world: World, folder, **settings):
    """What a run says that is refused in both processes."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    given = dict(image_shape=(3, 8, 8), batch_size=8, student_batch_size=8, bank_images=16, steps=1,
                 out_dir=folder, adapt=False, progress="off", dead_leaves=0)  # fmt: skip
    if "images" in settings:
        settings["images"] = settings["images"] + world.rank
    try:
        distill(teacher, nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), **given | settings)
    except UserError as error:
        return str(error)


def refusal_of_images(world: World, folder):
    return refusal(world, folder, images=torch.zeros(4, 3, 8, 8))


def test_processes_with_other_images_are_refused(in_two_processes, tmp_path):
    first, second = in_two_processes(refusal_of_images, tmp_path / "run")
    assert first == second
    assert first.startswith("the images (by the SHA-256 of their pixels) must be the same in all")
    assert not (tmp_path / "run").exists()


def test_what_only_the_first_process_sees_is_said_by_both(in_two_processes, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    said = f"--out-dir {tmp_path} is not empty; choose a new folder"
    assert in_two_processes(refusal, tmp_path) == [said, said]


def refusal_of_held_out(world: World, folder):
    """The first process alone has held-out images, as it alone reports an accuracy."""
    wrong = [(torch.zeros(4, 3, 8, 8), torch.full((4,), 7))]
    return refusal(world, folder, eval_loader=wrong if world.first else None)


def test_wrong_held_out_images_of_the_first_process_end_both(in_two_processes, tmp_path):
    first, second = in_two_processes(refusal_of_held_out, tmp_path / "run")
    assert first == second and first.endswith("got labels from 7 to 7 in batch 1")
    assert not (tmp_path / "run").exists()


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def told_of_statistics(world: World):
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("dafl_fast.engine.distributed")
    logger.addHandler(handler)
    networks = [nn.Sequential(norm(4)) for norm in (nn.BatchNorm2d, NormAndReLU)]
    for network in (*networks, nn.Sequential(NormAndReLU(4)).eval()):
        world.share_statistics(network, "student")
    logger.removeHandler(handler)
    return records


def test_statistics_that_processes_do_not_share_are_told_of(in_two_processes):
    first, second = in_two_processes(told_of_statistics)
    assert first == [
        "the student's layers of the class NormAndReLU take the statistics of each process's share "
        "of the batch, and the first process's are kept"
    ]
    assert second == []


def test_lost_contact_is_one_sentence():
    with (
        pytest.raises(TrainingStopped, match="process 1 of 2 has lost contact with another one"),
        World(1, 2).in_contact(),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    for world, text in ((World(1, 2), "something else"), (World(), "gloo")):
        with pytest.raises(RuntimeError, match=text), world.in_contact():
            raise RuntimeError(text)


def normalised(world: World, x, upstream, layer):
    layer = world.average_gradients(world.share_statistics(nn.Sequential(layer), "student"))
    part = slice(world.rank * 3, world.rank * 3 + 3)
    x = x[part].requires_grad_()
    y = layer(x)
    y.backward(upstream[part] * 2)  # the mean over processes halves it
    grads = [p.grad for p in layer.parameters()]
    return y.detach(), x.grad / 2, grads, dict(layer.module[0].named_buffers())


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(4, eps=0.8), nn.BatchNorm1d(4, affine=True, momentum=0.3),
     nn.BatchNorm2d(4, affine=False)],
    ids=["2d", "1d", "no affine"],
)  # fmt: skip
def test_batch_norm_over_processes(in_two_processes, layer):
    shape = (6, 4) if isinstance(layer, nn.BatchNorm1d) else (6, 4, 3, 3)
    layer = layer.double()
    x, upstream = torch.randn(shape).double() * 2 + 1, torch.randn(shape).double()
    if not layer.affine:
        layer = nn.Sequential(nn.Conv2d(4, 4, 1), layer).double()  # something to train
        results = in_two_processes(normalised, x, upstream, layer)
    else:
        results = in_two_processes(normalised, x, upstream, layer)
    x.requires_grad_()
    y = layer(x)
    y.backward(upstream)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), y.detach())
    torch.testing.assert_close(torch.cat([r[1] for r in results]), x.grad)
    for _, _, grads, buffers in results:
        for mine, parameter in zip(grads, layer.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad)
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(buffers[name], buffer)


def three_steps(world: World, recipe: str, pixels: str):
    step = make_step(recipe, world=world, pixels=pixels, **SETTINGS[recipe])
    for _ in range(3):
        step()
    agreement = step.fresh_agreement(2)
    return (
        step.generator.state_dict(),
        step.averaged_student.state_dict(),
        step.newest[1],
        agreement,
    )


@pytest.mark.parametrize(
    ("recipe", "pixels"), [*((name, "normalised") for name in SETTINGS), ("fast", "0..1")]
)
def test_two_processes_equal_one(in_two_processes, recipe, pixels):
    """2 processes x batch 8 = 1 process x batch 16, in fp64, from the same noise."""
    first, second = in_two_processes(three_steps, recipe, pixels)
    generator, student, logits, agreement = three_steps(World(), recipe, pixels)
    for theirs in (first, second):
        for mine, other in ((generator, theirs[0]), (student, theirs[1])):
            for name, tensor in mine.items():
                torch.testing.assert_close(
                    other[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
        assert theirs[3] == agreement
    torch.testing.assert_close(torch.cat([first[2], second[2]]), logits, rtol=1e-6, atol=1e-6)


def three_steps_with_images(world: World, generator: str):
    draw = torch.Generator().manual_seed(3)
    photograph, whole = (
        torch.randint(256, shape, generator=draw, dtype=torch.uint8)
        for shape in ((1, 80, 99), (5, 1, 32, 32))
    )
    step = make_step(
        "fast", world=world, given=Given([photograph], whole, FORMATS["mnist"]),
        generator=generator, images_candidates=32, images_share=0.4, **SETTINGS["fast"],
    )  # fmt: skip
    for _ in range(3):
        step()
    assert step.found is not None
    agreement = step.fresh_agreement(2)
    return step.averaged_student.state_dict(), step.found.bank.newest(100), agreement


@pytest.mark.parametrize("generator", ["auto", "none"])
def test_two_processes_find_the_same_images_as_one(in_two_processes, generator):
    student, (images, logits), agreement = three_steps_with_images(World(), generator)
    assert len(images) == (5 + 24 if generator == "none" else 16)  # of a ring of 40, and of 16
    for theirs in in_two_processes(three_steps_with_images, generator):
        assert torch.equal(theirs[1][0], images)
        torch.testing.assert_close(theirs[1][1], logits)
        assert theirs[2] == agreement
        for name, tensor in student.items():
            torch.testing.assert_close(theirs[0][name], tensor, rtol=1e-6, atol=1e-6)


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(UserError, match="--batch-size must be a multiple of .* 3, .* got 16"):
        make_step("published", world=World(0, 3))
    with pytest.raises(UserError, match="at least two images for each, got 16"):
        make_step("published", world=World(0, 16))


def torchrun(count: int, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(count), "-m", "dafl_fast.train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


COMMON = ["mnist", "--eval", "none", "--precision", "fp32", "--save-every", "1e-9", *TINY,
          "--student-schedule", "constant"]  # fmt: skip


def test_torchrun_trains_and_another_number_of_processes_goes_on(tmp_path):
    out = tmp_path / "two"
    process = torchrun(2, *COMMON, "--steps", "6", "--out-dir", str(out))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert printed.count("steps in") == errors.count("distilling ") == 1, (
        "one process speaks for all"
    )
    assert json.loads((out / "summary.json").read_text())["processes"] == 2
    again = [sys.executable, "-m", "dafl_fast.train", "--resume", str(out), "--steps", "8"]
    subprocess.run(again, check=True, capture_output=True, timeout=120)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["processes"]) == (8, 1)

    subprocess.run(
        [sys.executable, "-m", "dafl_fast.train", *COMMON, "--steps", "8", "--out-dir",
         str(tmp_path / "one")],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert_same_student(tmp_path / "one", out, 1e-2)


def test_a_killed_worker_ends_the_job_and_the_run_can_be_resumed(tmp_path):
    out = tmp_path / "run"
    job = torchrun(2, *COMMON, "--steps", "100000", "--out-dir", str(out))
    limit = time.monotonic() + 90
    while not (out / "checkpoint.pt").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task").glob("*/children")
    workers = [int(pid) for path in children for pid in path.read_text().split()]
    victims = [pid for pid in workers if _environment(pid).get("RANK") == "1"]
    assert len(victims) == 1
    os.kill(victims[0], signal.SIGKILL)
    _, errors = job.communicate(timeout=90)
    assert job.returncode != 0
    assert "process 0 of 2 has lost contact with another one at step" in errors, errors
    assert f"start again with --resume {out}" in errors
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    resumed = torchrun(2, "--resume", str(out), "--steps", str(state["step"]["steps"] + 4))
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == state["step"]["steps"] + 4


@pytest.mark.parametrize("moment", ["report", "end"])
def test_torchruns_signal_does_not_take_the_message_away(tmp_path, moment):
    """It comes as soon as torchrun sees the dead worker: before this one has said its word."""
    config = make_config("mnist", "fast", eval="none", steps=1, precision="fp32", batch_size=16,
                         generator_width=8, out_dir=tmp_path / "run")  # fmt: skip
    reports = []

    def losing_contact(self):
        self.step()
        self._log(0.5)
        self.world = World(0, 2)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer")

    def reporting(folder):
        reports.append(folder)
        if moment == "report":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Loop, "_train", losing_contact)
            patch.setattr(sys.modules["dafl_fast.distill"], "write_report", reporting)
            with pytest.raises(TrainingStopped, match="lost contact with another one at step 1;"):
                train(config)
        if moment == "end":
            os.kill(os.getpid(), signal.SIGTERM)
        assert reports == [tmp_path / "run"]
        assert signal.getsignal(signal.SIGTERM) is before, "a second one has its usual effect"
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)

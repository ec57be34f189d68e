"""The paper's tables: what each row runs, that nothing runs twice, and what the table says."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dafl_fast import reproduce as command
from dafl_fast import train_teacher
from dafl_fast.comparison import curves, markdown
from dafl_fast.data import FORMATS, normalise
from dafl_fast.data import load as load_data
from dafl_fast.distill import Result
from dafl_fast.engine.lock import locked
from dafl_fast.engine.step import Step
from dafl_fast.errors import TrainingStopped, UserError
from dafl_fast.models import build
from dafl_fast.networks import load_weights
from dafl_fast.paper import TABLES
from dafl_fast.recipes import PRESETS, make_config
from dafl_fast.reproduce import ReproduceConfig, Reproduction, reproduce
from dafl_fast.train_teacher import Training

TINY = {
    "batch_size": 16, "generator_width": 8, "student_source": "bank", "student_batch_size": 16,
    "student_updates": 2, "bank_images": 160, "log_every": 1, "temperature": 4.0,
    "generator_lr": 1e-3, "save_every": 1e-9,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_recipe(monkeypatch):
    make_tiny(monkeypatch, steps=4)


def make_tiny(patch: pytest.MonkeyPatch, **recipe) -> None:
    patch.setitem(PRESETS["mnist"].recipes, "fast", {**TINY, **recipe})
    patch.setitem(train_teacher.PRESETS, "mnist", {"save_every": 1e-9, "log_every": 1})


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> dict[str, str]:
    """A few of MNIST's images as files, for training and for evaluation."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels, _ = load_data("mnist-5k", "train")
    chosen = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    for name, index in (("data", chosen[:600]), ("eval", chosen[600:900])):
        np.savez(folder / name, images=images[index, 0].numpy(), labels=labels[index].numpy())
    return {name: str(folder / f"{name}.npz") for name in ("data", "eval")}


def config_of(out: Path, digits: dict[str, str], table: str = "mnist", **changes):
    settings = {"seeds": (0, 1), "max_seconds_per_run": 0.2, "precision": "fp32", **digits}
    settings |= {"data_dir": out.parent, "alternative": "uci-digits", "device": "cpu", **changes}
    return ReproduceConfig(table, out=out, **settings)


def results_of(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """What is being run, in this order."""
    ran: list[str] = []
    run = Reproduction._run
    monkeypatch.setattr(
        Reproduction,
        "_run",
        lambda self, *what: (ran.append("{}-{}".format(*what)), run(self, *what))[1],
    )
    return ran


def test_a_table_is_run_once(tmp_path, digits, runs):
    out = tmp_path / "out"
    text = reproduce(config_of(out, digits))
    rows = ("ordinary", "kd", "noise", "alternative", "dafl")
    assert runs == ["teacher-0"] + [f"{row}-{seed}" for row in rows for seed in (0, 1)]
    results = results_of(out)
    assert sorted(results) == sorted(runs)

    # Accuracies are those of the weights that were kept, on the images for evaluation.
    images, labels, _ = load_data(digits["eval"], "test")
    x = normalise(images, FORMATS["mnist"])
    for name, result in results.items():
        network, path = build("LeNet5Half"), out / "runs" / f"{name}.safetensors"
        if name == "teacher-0":
            network, path = (
                build("LeNet5"),
                Path(command.__file__).parent / "assets" / ("lenet5-mnist.safetensors"),
            )
        elif name.startswith("dafl"):
            path = out / "runs" / name / "student.safetensors"
        network = load_weights(network, path, "network").eval()
        expected = (network(x).argmax(1) == labels).float().mean().item()
        assert result["accuracy"] == pytest.approx(expected), name
        if name.startswith("dafl"):
            steps = json.loads((out / "runs" / name / "summary.json").read_text())["steps"]
            assert result["images"] == steps * 2 * 16 > 0
        elif name != "teacher-0":
            assert 0.2 <= result["train_seconds"] <= result["wall_seconds"]
            assert result["images"] % 256 == 0 and result["images"] > 0
    assert results["teacher-0"]["accuracy"] > 0.97
    assert results["teacher-0"]["train_seconds"] == 221.1
    # What only resuming needs is gone.
    assert {path.name for path in (out / "runs" / "dafl-0").iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "report.html", "samples",
        "student.safetensors", "summary.json",
    }  # fmt: skip
    assert not list((out / "runs").glob("*.checkpoint"))
    assert (out / "mnist.md").read_text() == text
    assert (out / "mnist.png").read_bytes()[1:4] == b"PNG"

    runs.clear()
    assert reproduce(config_of(out, digits)) == text
    assert runs == []
    (out / "results" / "kd-1.json").unlink()
    reproduce(config_of(out, digits, seeds=(0, 1, 2), only=("teacher", "kd")))
    assert runs == ["kd-1", "kd-2"]
    report = json.loads((out / "mnist.json").read_text())
    assert [row["seeds"] for row in report["rows"]] == [
        [0], [0, 1], [0, 1, 2], [0, 1], [0, 1], [0, 1],
    ]  # fmt: skip
    with pytest.raises(UserError, match="--recipe cannot change: .* have fast, got paper; choose"):
        reproduce(config_of(out, digits, recipe="paper"))


class Seen(BaseException):
    pass


def training_of(monkeypatch, tmp_path, digits, row: str) -> Training:
    """The training that a row would run."""

    def stop(self, checkpoint):
        raise Seen(self)

    monkeypatch.setattr(Training, "run", stop)
    with pytest.raises(Seen) as seen:
        reproduce(config_of(tmp_path / row, digits, only=(row,), seeds=(3,)))
    return seen.value.args[0]


def test_a_folder_is_in_the_hands_of_one_process(tmp_path, digits):
    with (
        locked(tmp_path / ".lock", "another is being made"),
        pytest.raises(UserError, match=f"^a table in {tmp_path} is being made by process .* on th"),
    ):
        reproduce(config_of(tmp_path, digits))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", ["kd", "noise", "alternative"])
def test_students_of_the_teacher_get_its_answers(monkeypatch, tmp_path, digits, row):
    """Against the paper's equation 1 in float64, at the recipe's temperature."""
    training = training_of(monkeypatch, tmp_path, digits, row)
    assert training.config.seed == 3
    x = training._batch(torch.arange(64))
    s, y = torch.randn(64, 10), torch.zeros(64, dtype=torch.long)
    teacher = Reproduction(config_of(tmp_path / row, digits)).teacher.double()
    t = teacher(x.double())
    p, q = (t / 4).log_softmax(1), (s.double() / 4).log_softmax(1)
    loss, right = training.objective(x, s, y)
    assert loss.item() == pytest.approx(16 * (p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4)
    assert right.item() == pytest.approx((s.argmax(1) == t.argmax(1)).float().mean().item())
    if row == "kd":
        for _ in range(60):
            loss, right = training._step(torch.arange(256))
        assert right > 0.6  # chance is 0.1


def test_ordinary_training_has_the_labels(monkeypatch, tmp_path, digits):
    training = training_of(monkeypatch, tmp_path, digits, "ordinary")
    images, labels, _ = load_data(digits["data"], "train")
    assert torch.equal(training.labels, labels)
    got = training._batch(torch.arange(5))
    torch.testing.assert_close(got, normalise(images[:5], FORMATS["mnist"]))
    s, y = torch.randn(8, 10), torch.arange(8)
    loss, right = training.objective(got, s, y)
    assert loss.item() == pytest.approx(-s.log_softmax(1)[y, y].mean().item(), rel=1e-5)
    assert right.item() == (s.argmax(1) == y).float().mean().item()


def test_noise_is_standard_normal_and_new_each_time(monkeypatch, tmp_path, digits):
    training = training_of(monkeypatch, tmp_path, digits, "noise")
    one, two = training._batch(torch.arange(256)), training._batch(torch.arange(256))
    assert one.shape == (256, 1, 32, 32)
    for x in (one, two):
        assert x.mean().item() == pytest.approx(0, abs=0.01)
        assert x.std().item() == pytest.approx(1, abs=0.01)
    assert torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1].abs() < 0.01


def test_alternative_data_are_what_there_is(monkeypatch, tmp_path, digits):
    training = training_of(monkeypatch, tmp_path, digits, "alternative")
    assert len(training.labels) == 1797
    config = config_of(tmp_path / "other", digits, alternative=None)
    images, _, title = Reproduction(config).alternative_images
    assert title == "UCI digits, 8x8"
    assert images.shape == (1797, 1, 32, 32) and images.max() == 255
    config = config_of(tmp_path / "own", digits, alternative=digits["data"])
    assert Reproduction(config).alternative_images[2] == "data.npz"
    # Whoever allows a download of USPS is told when it fails.
    monkeypatch.setattr("torchvision.datasets.USPS", None)
    monkeypatch.setattr("torchvision.datasets.USPS", lambda *a, **b: (_ for _ in ()).throw(OSError))
    config = config_of(tmp_path / "usps", digits, alternative=None, download=True)
    with pytest.raises(UserError, match="USPS was not found"):
        _ = Reproduction(config).alternative_images


def test_the_ablation_has_all_eight_combinations(monkeypatch, tmp_path, digits):
    used = {}

    def distill(teacher, student, *, steps, max_seconds, image_shape, eval_loader, **s):
        config = make_config(steps=steps, max_seconds=max_seconds, **s)
        used[s["out_dir"].name] = (config.one_hot, config.entropy, config.activation)
        summary = {"interrupted": False, "student_accuracy": 0.5, "student_images": 7}
        return Result(
            student, [], {**summary, "train_seconds": 1.0, "wall_seconds": 2.0}, s["out_dir"]
        )

    monkeypatch.setitem(PRESETS["mnist"].recipes["fast"], "entropy", 7.0)
    monkeypatch.setattr(command, "distill", distill)
    reproduce(config_of(tmp_path / "out", digits, "ablation", seeds=(4,)))
    assert set(used.values()) == set(itertools.product((0.0, 1.0), (0.0, 7.0), (0.0, 0.1)))
    assert len(used) == 8
    assert used["one-hot-activation-4"] == (1.0, 0.0, 0.1)
    assert used["none-4"] == (0.0, 0.0, 0.0) and used["all-4"] == (1.0, 7.0, 0.1)
    # The paper's numbers stand beside the right ones.
    paper = {row.losses: row.paper for row in TABLES["ablation"].rows.values()}
    assert paper[()] == 88.01 and paper["one_hot",] == 78.77 and paper["activation",] == 15.95
    assert paper["one_hot", "activation"] == 42.07 and paper["entropy", "activation"] == 95.53


def test_without_losses_the_generator_stays_as_it_is(monkeypatch, tmp_path, digits):
    steps = []
    call = Step.__call__

    def remember(self, *arguments):
        before = [p.detach().clone() for p in self.generator.parameters()]
        call(self, *arguments)
        pairs = zip(before, self.generator.parameters(), strict=True)
        steps.append(all(torch.equal(a, b) for a, b in pairs))

    monkeypatch.setattr(Step, "__call__", remember)
    changes = {"seeds": (0,), "only": ("none", "all"), "max_seconds_per_run": 600.0}
    reproduce(config_of(tmp_path / "out", digits, "ablation", **changes))
    assert steps == [True] * 4 + [False] * 4


def test_a_teacher_that_is_not_there_is_trained_once(monkeypatch, tmp_path, digits, runs):
    out = tmp_path / "out"
    reproduce(config_of(out, digits, "hintonnet", only=("teacher",)))
    note = json.loads((out / "teacher.json").read_text())
    assert (note["network"], note["image_size"]) == ("HintonNet1200", 28)
    (result,) = results_of(out).values()
    assert result["images"] == pytest.approx(600 * note["epochs"], abs=4)
    assert result["train_seconds"] == note["train_seconds"] >= 0.2
    (out / "results" / "teacher-0.json").unlink()
    monkeypatch.setattr(train_teacher, "train", None)
    reproduce(config_of(out, digits, "hintonnet", only=("teacher",)))
    assert runs == ["teacher-0", "teacher-0"]
    assert results_of(out)["teacher-0"]["accuracy"] == result["accuracy"]


def test_a_run_that_collapses_is_a_result(monkeypatch, tmp_path, digits, runs):
    def distill(*networks, seed, **settings):
        raise TrainingStopped(f"the generator has collapsed with seed {seed}")

    monkeypatch.setattr(command, "distill", distill)
    config = config_of(tmp_path / "out", digits, only=("dafl", "noise"))
    assert "| student, DAFL | 98.20 | stopped | 0 (2 stopped) |  |  |" in reproduce(config)
    assert len(runs) == 5
    reproduce(config)
    assert len(runs) == 5
    report = json.loads((tmp_path / "out" / "mnist.json").read_text())
    assert report["rows"][5]["stopped"]["1"] == "the generator has collapsed with seed 1"


def write_result(out: Path, row: str, seed: int, accuracy: float | None, **more) -> None:
    machine = {"gpu": None, "cpu": "a CPU", "threads": 2, "torch": "2.9"}
    result = {"row": row, "seed": seed, "accuracy": accuracy, "train_seconds": 59.6, "images": 1000,
              "wall_seconds": 60.0, "date": "2026-01-02", "precision": "bf16",
              "environment": machine, **more}  # fmt: skip
    path = out / "results" / f"{row}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))


def test_the_table_says_what_the_results_are(tmp_path):
    write_result(tmp_path, "teacher", 0, 0.992, images=None, train_seconds=None)
    for seed, accuracy in enumerate((0.98, 0.981, 0.985)):
        write_result(tmp_path, "dafl", seed, accuracy, images=1_000_000 + 3 * seed)
    write_result(tmp_path, "noise", 1, 0.5)
    write_result(tmp_path, "noise", 2, None, stopped="it collapsed")
    write_result(tmp_path, "alternative", 0, 0.7, data="UCI digits, 8x8")
    folder = tmp_path / "runs" / "dafl-1"
    folder.mkdir(parents=True)
    rows = [{"step": 1, "train_seconds": 3.0}, {"step": 2, "train_seconds": 3.5, "accuracy": 0.25}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reproduction = Reproduction(ReproduceConfig("mnist", out=tmp_path, max_seconds_per_run=60))
    report = reproduction.report()
    assert markdown(report).splitlines() == [
        "### MNIST: LeNet5 → LeNet5Half",
        "",
        "| network and training | paper, % | ours, % | seeds | training time | images trained on |",
        "| --- | --- | --- | --- | --- | --- |",
        "| teacher | 98.91 | 99.20 | 1 |  |  |",
        "| student, ordinary training | 98.65 | not run | 0 |  |  |",
        "| student, KD on real data | 98.91 | not run | 0 |  |  |",
        "| student, normal noise | 88.01 | 50.00 | 1 (1 stopped) | 60 s | 1,000 |",
        "| student, alternative data (UCI digits, 8x8) | 94.56 | 70.00 | 1 | 60 s | 1,000 |",
        "| student, DAFL | 98.20 | 98.20 ± 0.26 | 3 | 60 s | 1,000,003 |",
        "",
        "Accuracy in % of the last weights on the test images of mnist, mean and standard "
        "deviation over the seeds. The teacher has 99.20%. Recipe `fast`, at most 60 s of "
        "training a run, 7.0 minutes in all. a CPU, 2 threads, no GPU, PyTorch 2.9, bf16. "
        "2026-01-02.",
    ]
    assert curves(reproduction.table, tmp_path) == {"student, DAFL": [[(3.5, 0.25)]]}
    assert report["rows"][5]["accuracies"] == [0.98, 0.981, 0.985]


def run_in_process(config: ReproduceConfig, kind: type, step: str) -> None:
    """Runs until something was saved, and then waits to be killed."""
    torch.set_num_threads(1)
    original = getattr(kind, step)

    def until_saved(self, *arguments):
        if self.steps == 2:
            time.sleep(600)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch)
        patch.setattr(kind, step, until_saved)
        reproduce(config)


@pytest.mark.parametrize(
    ("row", "kind", "step", "checkpoint"),
    [
        ("dafl", Step, "__call__", "dafl-0/checkpoint.pt"),
        ("kd", Training, "_step", "kd-0.checkpoint"),
    ],
)
def test_a_killed_run_goes_on(monkeypatch, tmp_path, digits, row, kind, step, checkpoint):
    out = tmp_path / "out"
    config = config_of(out, digits, only=(row,), seeds=(0,), max_seconds_per_run=1.5)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_in_process, args=(config, kind, step))
    process.start()
    limit = time.monotonic() + 60
    while not (out / "runs" / checkpoint).exists() and time.monotonic() < limit:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert results_of(out).keys() == {"teacher-0"}
    saved = torch.load(out / "runs" / checkpoint, weights_only=True)
    before = saved.get("step", saved)["steps"]
    counts = []
    original = getattr(kind, step)
    monkeypatch.setattr(
        kind, step, lambda self, *a: (counts.append(self.steps), original(self, *a))[1]
    )
    make_tiny(monkeypatch)  # by seconds, as the students
    reproduce(config)
    assert counts[0] == before > 0
    result = results_of(out)[f"{row}-0"]
    assert result["train_seconds"] >= 1.5
    assert result["images"] == (counts[-1] + 1) * (32 if row == "dafl" else 256)


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, tmp_path, digits, capsys):
    out = tmp_path / "out"

    def interrupt(self, *_):
        original(self, *_)
        signal.raise_signal(signal.SIGINT)

    original = Step.__call__
    arguments = ["mnist", "--only", "dafl", "--seeds", "0", "--out", str(out), "--data",
                 digits["data"], "--eval", digits["eval"]]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["reproduce", *arguments])
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", interrupt)
        assert command.main() == 130
    error = capsys.readouterr().err
    assert error.endswith("\nthe same command again goes on from here\ninterrupted\n")
    assert results_of(out).keys() == {"teacher-0"}
    assert command.main() == 0
    assert results_of(out)["dafl-0"]["images"] == 4 * 2 * 16
    assert "| student, DAFL | 98.20 | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["imagenet"], "unknown table 'imagenet': choose one of mnist, hintonnet, ablation"),
        (["mnist", "--only", "all"], "--only all is no row of mnist: choose from teacher, ordi"),
        (["mnist", "--seeds"], "--seeds must name at least one seed"),
        (["mnist", "--max-seconds-per-run", "0"], "--max-seconds-per-run must be positive, got 0"),
        (["mnist", "--data-dir", "nowhere"], "MNIST was not found in nowhere"),
        (["mnist", "--data", "DATA"], "data.npz has no test images: name those to measure on with"),
        (["mnist", "--eval", "EVAL", "--alternative", "x"], "unknown data set 'x'"),
        (["mnist", "--eval", "EVAL", "--teacher", "x.pt"], "the teacher file x.pt does not exist"),
        (["mnist", "--student-network", "VGG"], "unknown student 'VGG'"),
        (["cifar10", "--eval", "EVAL"], "the images have 1 channel(s), the network takes 3"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, tmp_path, digits, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    files = {"DATA": digits["data"], "EVAL": digits["eval"]}
    monkeypatch.setattr(sys, "argv", ["reproduce", *(files.get(a, a) for a in arguments)])
    assert command.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

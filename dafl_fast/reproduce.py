"""`python -m dafl_fast.reproduce mnist`: the rows of the paper's tables, beside its numbers.

Each row is run once per seed, and what came of it is kept in a file of its own: a command that was
stopped, in whatever way, goes on where it stood, and one that is complete only prints its table.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from . import data, train_teacher
from .comparison import compare, curves, markdown, save_comparison
from .config import RecipeName
from .device import AUTOCAST, environment, keep_freed_memory, pick_device, pick_precision
from .distill import distill
from .engine.evaluation import Batches, accuracy_on, eval_set
from .engine.lock import locked
from .engine.teacher import FrozenTeacher
from .errors import TrainingStopped, UserError, command, require
from .files import check_file, read_json, remove_leftovers, save_weights, write_json, write_text
from .losses import distill_loss
from .networks import bundled_weights, load_network
from .paper import LOSSES, TABLES, Row
from .recipes import PRESETS, make_config
from .settings import POSITIVE, SEEDS, Mark, check, check_unchanged, plain


@dataclass(frozen=True)
class ReproduceConfig:
    """Run the rows of a table of the paper; the same command again goes on where it stopped."""

    table: tyro.conf.Positional[str]
    """mnist (LeNet-5), hintonnet, ablation (the eight combinations of the generator's losses on
    MNIST), cifar10 or cifar100."""
    seeds: Annotated[tuple[int, ...], SEEDS, Mark.RESUMABLE] = (0, 1, 2)
    """Seeds of each row; there is one teacher for all of them."""
    max_seconds_per_run: Annotated[float, POSITIVE] = 120.0
    """Training seconds of each run, the teacher's included if it is to be trained. A recipe with a
    number of steps may end earlier."""
    only: Annotated[tuple[str, ...], Mark.RESUMABLE] = ()
    """Run only these rows: teacher, ordinary, kd, noise, alternative, dafl; of the ablation none,
    one-hot, entropy, activation, one-hot-activation, one-hot-entropy, entropy-activation, all."""
    out: Annotated[Path | None, Mark.RESUMABLE] = None
    """Folder of results, table and plot; runs/reproduce-<table> when not given."""
    recipe: RecipeName = "fast"
    """Recipe of the DAFL rows; its temperature is that of all rows with a teacher."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Mark.RESUMABLE] = "auto"
    """auto: the GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks. auto: bf16 where the processor has it."""

    # --- networks -----------------------------------------------------------------------------
    teacher: Path | None = None
    """The teacher's weights; when not given the bundled ones if there are any, else a teacher is
    trained first."""
    teacher_network: str | None = None
    """The teacher, as ResNet20 or WRN-40-2; the paper's when not given."""
    student_network: str | None = None
    """The student, likewise; ResNet8 goes with ResNet20."""

    # --- data ---------------------------------------------------------------------------------
    data: str | None = None
    """The real images: the table's set when not given; a folder or an .npz file, as for
    train_teacher."""
    eval: str | None = None
    """The images that accuracies are measured on; the test split of --data when not given."""
    alternative: str | None = None
    """Images of the row alternative, named as in --data: for MNIST USPS where it is to be had,
    else scikit-learn's uci-digits, when not given; for CIFAR the row is left out then."""
    data_dir: Annotated[Path | None, Mark.RESUMABLE] = None
    """Where the data lie, in torchvision's layout; default: the environment variable DAFL_DATA."""
    download: Annotated[bool, Mark.RESUMABLE] = False
    """Allow torchvision to download into --data-dir."""

    def __post_init__(self) -> None:
        check(self)
        if self.table not in TABLES:
            raise UserError(f"unknown table {self.table!r}: choose one of {', '.join(TABLES)}")
        rows = TABLES[self.table].rows
        for name in self.only:
            if name not in rows:
                raise UserError(
                    f"--only {name} is no row of {self.table}: choose from {', '.join(rows)}"
                )
        if not self.seeds:
            raise UserError("--seeds must name at least one seed")


class Reproduction:
    """The runs of one table in one folder; data and teacher are loaded when a run wants them.

    settings.json  results/<row>-<seed>.json  runs/<row>-<seed>...  teacher.safetensors
    <table>.md  <table>.json  <table>.png
    """

    def __init__(self, config: ReproduceConfig) -> None:
        self.config = config
        self.table = TABLES[config.table]
        self.out = config.out or Path("runs") / f"reproduce-{config.table}"
        preset = PRESETS[self.table.preset]
        self.recipe = preset.recipes[config.recipe]
        self.teacher_name = config.teacher_network or preset.networks["teacher"]
        self.student_name = config.student_network or preset.networks["student"]
        self.classes = preset.networks["num_classes"]
        self.image_shape = preset.networks["image_shape"]
        self.form = make_config(self.table.preset).image_format
        grey = self.table.preset in ("mnist", "hintonnet")
        self.data = config.data or ("mnist" if grey else self.table.preset)
        self.device = pick_device(config.device)
        self.precision = pick_precision(config.precision, self.device)
        self.training: dict[str, Any] = {
            "max_seconds": config.max_seconds_per_run,
            "device": config.device,
            "precision": config.precision,
        }

    def run(self) -> None:
        """Runs what is not done yet; see `reproduce`."""
        config, settings = self.config, self.out / "settings.json"
        if settings.exists():
            check_unchanged(
                read_json(settings), config,
                f": the results in {self.out} have", "; choose another folder with --out",
            )  # fmt: skip
        runs = [("teacher", 0)]  # one for all seeds, and its accuracy belongs to any table
        for name in config.only or self.table.rows:
            given = name != "alternative" or config.alternative or self.form.channels == 1
            if name != "teacher" and given:
                runs += [(name, seed) for seed in config.seeds]
        left = {name for name, seed in runs if not self._result(name, seed).exists()}
        if left:  # mistakes show before anything has taken its time
            _ = self._new_student(0), self.held_out
            if config.teacher is not None:
                check_file(config.teacher, "teacher file")
        if "alternative" in left:
            _ = self.alternative_images
        with locked(self.out / ".lock", f"a table in {self.out} is being made"):
            self._run_all(runs, settings)

    def _run_all(self, runs: list[tuple[str, int]], settings: Path) -> None:
        config = self.config
        remove_leftovers(settings, *(self._result(*run) for run in runs))
        for end in (".checkpoint", ".safetensors"):
            remove_leftovers(*(self._folder(*run).with_suffix(end) for run in runs))
        for end in (".json", ".md", ".png"):
            remove_leftovers(self.out / f"{config.table}{end}")
        for number, (name, seed) in enumerate(runs, 1):
            path = self._result(name, seed)
            if not path.exists():
                print(f"{number} of {len(runs)}: {name}, seed {seed}", flush=True)
                start = time.perf_counter()
                result = self._run(name, seed)
                result.setdefault("wall_seconds", time.perf_counter() - start)
                result |= {
                    "row": name,
                    "seed": seed,
                    "date": time.strftime("%Y-%m-%d"),
                    "precision": self.precision,
                    "environment": environment(),
                }
                write_json(settings, plain(config, Mark.RESUMABLE))
                write_json(path, result)
                print(result.get("stopped") or f"accuracy {result['accuracy']:.2%}", flush=True)
            folder = self._folder(name, seed)  # without what only resuming needs
            folder.with_suffix(".checkpoint").unlink(missing_ok=True)
            if not folder.is_symlink():  # another run's
                (folder / "checkpoint.pt").unlink(missing_ok=True)
                for bank in ("bank", "images"):
                    shutil.rmtree(folder / bank, ignore_errors=True)  # nothing if it is a link

    def _result(self, name: str, seed: int) -> Path:
        return self.out / "results" / f"{name}-{seed}.json"

    def _folder(self, name: str, seed: int) -> Path:
        return self.out / "runs" / f"{name}-{seed}"

    def _run(self, name: str, seed: int) -> dict[str, Any]:
        """One run, from its last checkpoint if it has one: accuracy (None if training had to be
        stopped), train_seconds, images (seen by the network) and, where it matters, data."""
        if name == "teacher":
            return self._run_teacher()
        row = self.table.rows[name]
        run = self._run_dafl if row.kind == "dafl" else self._run_student
        try:
            return run(row, self._folder(name, seed), seed)
        except TrainingStopped as error:
            # A collapse is a result too, and would only come again.
            return {"accuracy": None, "train_seconds": None, "images": None, "stopped": str(error)}

    def _run_teacher(self) -> dict[str, Any]:
        note = {}
        if self.config.teacher is None:
            note = read_json(self.teacher_weights.with_suffix(".json"), "note")
        seen = round(note["epochs"] * note["training_images"]) if "epochs" in note else None
        return {
            "accuracy": self._accuracy(self.teacher),
            "train_seconds": note.get("train_seconds"),
            "images": seen,
        }

    def _run_dafl(self, row: Row, folder: Path, seed: int) -> dict[str, Any]:
        config = self.config
        settings: dict[str, Any] = {loss: 0.0 for loss in LOSSES if loss not in row.losses}
        settings["resume" if (folder / "config.yaml").exists() else "out_dir"] = folder
        summary = distill(
            self.teacher,
            self._new_student(seed),
            image_shape=self.image_shape,
            num_classes=self.classes,
            recipe=config.recipe,
            steps=self.recipe.get("steps"),
            eval_loader=self.held_out,
            preset=self.table.preset,
            seed=seed,
            eval_every=config.max_seconds_per_run / 10,
            **self.training,
            **settings,
        ).summary
        if summary["interrupted"]:
            raise KeyboardInterrupt
        return {
            "accuracy": summary["student_accuracy"],
            "train_seconds": summary["train_seconds"],
            "wall_seconds": summary["wall_seconds"],
            "images": summary["student_images"],
        }

    def _run_student(self, row: Row, folder: Path, seed: int) -> dict[str, Any]:
        """A student on given images, with their labels or with the teacher's answers to them."""
        start = time.perf_counter()
        changes: dict[str, Any] = {"noise": 0.0}
        objective = None if row.kind == "ordinary" else self._imitation
        source = None
        if row.kind == "noise":
            # Images of the mean grey, with noise of deviation 1 added in normalised units.
            grey = torch.tensor(self.form.mean).mul(255).round().to(torch.uint8)
            images = grey.view(1, -1, 1, 1).repeat(4096, 1, *self.image_shape[1:])
            labels = torch.zeros(len(images), dtype=torch.long)
            changes = {"noise": 1.0, "shift": 0, "flip": False}
        elif row.kind == "alternative":
            images, labels, source = self.alternative_images
        else:
            images, labels = self.real_images
        config = train_teacher.make_config(
            self.table.preset,
            network=self.student_name,
            data=self.data,
            seed=seed,
            **self.training,
            **changes,
        )
        student = self._new_student(seed)
        training = train_teacher.Training(student, images, labels, self.form, config, objective)
        checkpoint = folder.with_suffix(".checkpoint")
        if checkpoint.exists():
            training.restore(checkpoint)
            start -= training.seconds
        training.run(checkpoint)
        network = training.average.module
        save_weights(folder.with_suffix(".safetensors"), network.state_dict())
        return {
            "accuracy": self._accuracy(network),
            "train_seconds": training.seconds,
            "wall_seconds": time.perf_counter() - start,
            "images": training.steps * training.batch_size,
            "data": source,
        }

    def _new_student(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self._build(self.student_name, None, "student")

    def _build(self, name: str, weights: Path | None, role: str) -> nn.Module:
        channels, *size = self.image_shape
        return load_network(
            name, weights, role=role, num_classes=self.classes, channels=channels,
            image_size=tuple(size),
        )  # fmt: skip

    def _accuracy(self, network: nn.Module) -> float:
        return accuracy_on(network.to(self.device), self.held_out)[0]

    @cached_property
    def teacher_weights(self) -> Path:
        """The teacher's file, trained if there is none."""
        config, bundled = self.config, bundled_weights(self.table.preset)
        if config.teacher is not None:
            return config.teacher
        if bundled and self.teacher_name == PRESETS[self.table.preset].networks["teacher"]:
            return bundled
        path = self.out / "teacher.safetensors"
        if not path.with_suffix(".json").exists():  # which is written last
            settings = train_teacher.make_config(
                self.table.preset,
                network=self.teacher_name,
                data=self.data,
                data_dir=config.data_dir,
                download=config.download,
                eval="none",
                out=path,
                resume=path.with_suffix(".checkpoint").exists(),
                **self.training,
            )
            train_teacher.train(settings)
        return path

    @cached_property
    def teacher(self) -> nn.Module:
        """The teacher with its weights."""
        return self._build(self.teacher_name, self.teacher_weights, "teacher").eval()

    @cached_property
    def _imitation(self) -> train_teacher.Objective:
        """The distillation loss at the recipe's temperature, and the agreement with the teacher."""
        frozen = FrozenTeacher(self.teacher)
        frozen.to(self.device).to(memory_format=torch.channels_last)
        if self.precision in AUTOCAST:
            frozen.cast(AUTOCAST[self.precision])
        temperature = self.recipe.get("temperature", 1.0)

        def objective(x: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                answers, _ = frozen(x)
            loss = distill_loss(logits, answers, temperature=temperature)
            return loss.total, loss.agreement

        return objective

    @cached_property
    def real_images(self) -> tuple[Tensor, Tensor]:
        """The data set that the student is to go without: images uint8 and labels."""
        images, labels = self._load(self.data)
        data.check_labels(labels, self.classes)
        return images, labels

    @cached_property
    def held_out(self) -> Batches:
        """The test images."""
        name = self.config.eval or self.data
        if self.config.eval is None and not data.has_test_split(name, self.config.data_dir):
            raise UserError(f"{name} has no test images: name those to measure on with --eval")
        reading = (self.form, self.classes, self.config.data_dir, self.config.download)
        return eval_set(name, *reading)

    @cached_property
    def alternative_images(self) -> tuple[Tensor, Tensor, str]:
        """Images of another kind, their labels, and what they are called."""
        name = self.config.alternative
        if name is None:
            try:
                return *self._load("usps"), "USPS"
            except UserError:
                if self.config.download:
                    raise
            name = "uci-digits"
        title = "UCI digits, 8x8" if name == "uci-digits" else Path(name).name
        return *self._load(name), title

    def _load(self, name: str) -> tuple[Tensor, Tensor]:
        config, form = self.config, self.form
        reading = (config.data_dir, config.download, form.image_size, form.channels)
        images, labels, _ = data.load(name, "train", *reading)
        data.check_channels(images, form.channels)
        return data.resized(images, form.image_size), labels

    def report(self) -> dict[str, Any]:
        """All results in the folder, as <table>.json has them."""
        what = {
            "table": self.config.table,
            "title": f"{self.table.title}: {self.teacher_name} → {self.student_name}",
            "recipe": self.config.recipe,
            "max_seconds_per_run": self.config.max_seconds_per_run,
            "eval": Path(self.config.eval or self.data).name,
        }
        return compare(self.table, self.out, what)


def reproduce(config: ReproduceConfig) -> str:
    """Runs what is not done of a table, writes table and plot, and returns the table as Markdown.

    Raises:
        UserError: something in `config`, the data or the folder is not usable.
        KeyboardInterrupt: a run was interrupted; the same call goes on with it.
    """
    require("matplotlib", "the plot of reproduce")  # not after an hour
    keep_freed_memory()
    reproduction = Reproduction(config)
    reproduction.run()
    report = reproduction.report()
    text = markdown(report)
    path = reproduction.out / config.table
    write_json(path.with_suffix(".json"), report)
    write_text(path.with_suffix(".md"), text)
    lines = curves(reproduction.table, reproduction.out)
    save_comparison(path.with_suffix(".png"), report["title"], report["rows"], lines)
    return text


@command
def main() -> None:
    config = tyro.cli(ReproduceConfig, prog="python -m dafl_fast.reproduce", args=sys.argv[1:])
    try:
        print(reproduce(config))
    except KeyboardInterrupt:
        print("the same command again goes on from here", file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(main())

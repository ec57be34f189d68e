"""The functions that users call: `distill` takes modules, `train` takes a Config with names."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapt import ADAPTED, adapted
from .arguments import (
    check_networks,
    check_settings,
    checked_callbacks,
    checked_images,
    checked_shape,
    uncompiled,
)
from .config import Config
from .device import (
    free_memory,
    keep_freed_memory,
    pick_device,
    pick_precision,
    threads,
    usual_defaults,
)
from .engine.bank import bytes_of_entry
from .engine.distributed import World
from .engine.evaluation import HeldOut, buffers_kept, eval_set, evaluation_mode, modes_kept
from .engine.folder import RunFolder, check_resumed, read_config
from .engine.graph import reason_not_captured
from .engine.layout import copying_inputs, layout_kept
from .engine.lock import locked
from .engine.loop import Loop, parameters_of
from .engine.precision import computed_in
from .engine.prepare import prepare
from .engine.tensorboard import TensorBoard
from .engine.threads import threads_of_run
from .errors import UserError, require
from .models.inherit import inherit
from .models.twin import answers_alike, duplicate, give_back
from .networks import load_networks, outputs_of
from .notices import give_notice
from .pages import page_of_result, write_report
from .progress import Mode, Progress, outcome
from .recipes import WITHOUT_BATCH_NORM, make_config
from .records import Run
from .settings import Mark, mistake, plain
from .unlabelled import Given, given_tensor, read_images, with_dead_leaves, with_sketches

log = logging.getLogger(__name__)


@dataclass
class Result:
    """The result of a run.

    Attributes:
        student: a copy of the trained student in evaluation mode. If the recipe keeps a moving
            average of the weights, it has that. The module that was given has the same weights and
            its own mode; it is here itself if it cannot be copied.
        history: the rows of metrics.jsonl that this call added.
        summary: the content of summary.json.
        folder: the folder of the run.
    """

    student: nn.Module
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    folder: Path

    def __repr__(self) -> str:
        """The result in one line."""
        told = self.summary
        large, small = told["teacher_parameters"], told["student_parameters"]
        return (
            f"Result({told['student']} of {small:,} parameters, taught by {told['teacher']} of "
            f"{large:,}: {outcome(told)})"
        )

    def _repr_html_(self) -> str | None:
        """What a notebook shows: figures, curves and generated images. None, and so the line above,
        if the folder is no longer there."""
        try:
            run = Run.read(self.folder)
        except UserError:
            return None
        # The run may have been resumed since.
        rows = [row for row in run.rows if row["step"] <= self.summary["steps"]]
        return page_of_result(dataclasses.replace(run, rows=rows, summary=self.summary))


def distill(
    teacher: nn.Module,
    student: nn.Module,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
    generator: nn.Module | Literal["none"] | None = None,
    images: Tensor | Path | str | Sequence[Path | str] = (),
    feature_layer: str | None = None,
    recipe: str = "fast",
    steps: int | None = None,
    max_seconds: float | None = None,
    eval_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    callbacks: Callable[[dict[str, Any]], None] | Sequence[Callable[[dict[str, Any]], None]] = (),
    preset: str = "custom",
    progress: Mode = "auto",
    **settings: Any,
) -> Result:
    """Distils `teacher` into `student` without data.

    After SIGINT or SIGTERM it finishes the current step and saves everything; `resume` continues.

    Args:
        teacher: any classifier, images [N, C, H, W] as the setting `pixels` says, by default
            normalised -> logits [N, num_classes] or what else `teacher_output` names, alone or in a
            dict, tuple or object. A copy is used; the teacher itself may be moved to another
            device, but is not changed otherwise.
        student: any network from such images to as many logits. It gets pixels of 0..255 as they
            are, if the teacher takes those, and should divide them itself. Its weights are trained
            in place; its layers keep their classes, hooks and modes. If it is in training mode, its
            layers in evaluation mode (frozen BatchNorm) stay in that mode. If it is in evaluation
            mode, all its layers are trained. With `student_start="teacher"` it begins with the
            teacher's weights in the layers that both have; else with its own.
        image_shape: C, H and W; 1 to 64 channels, height and width of at least 4.
        num_classes: if given, it must be the number of the teacher's logits; among several outputs
            of the teacher it chooses those.
        generator: from noise [N, latent_dim] to images of mean 0 and variance 1 per channel, which
            are brought to what `pixels` says; of one channel if `grey` is set. By default the
            published one, with as many stages as the image size needs. If it has a method `reset`,
            which initialises its parameters anew, it is restarted as the recipe says; otherwise it
            is never restarted. "none": the student learns from `images` alone.
        images: real images that are not the data, without labels: paths of photographs, folders or
            .npz files, see docs/recipes.md, or a tensor [N, C, H, W] in the teacher's units. Such a
            tensor must be given again when the run is resumed.
        feature_layer: name of the teacher's layer whose input is the feature vector of the
            activation loss. By default the last linear layer that its logits are computed with.
        recipe: "fast", "published" or "paper"; see docs/recipes.md.
        steps, max_seconds: when to stop. By default after the recipe's own length.
        eval_loader: batches of held-out images [N, C, H, W], in the teacher's units, and labels
            [N], as tensors or NumPy arrays; or one such pair. They serve only to report the
            accuracy.
        callbacks: each is called with every row of metrics.
        preset: which preset's settings to use: "custom", "mnist", "cifar10", ...
        progress: "auto", "on" or True shows how the run stands: a live line on a terminal and in a
            notebook, elsewhere a line on stderr now and then. "off" or False shows nothing.
        settings: any other field of `Config`: pixels, mean, std, grey, out_dir, seed, batch_size,
            device, resume, ...

    Raises:
        UserError: a setting, a network or the folder cannot be used.
        TrainingStopped: the generator collapsed, a loss is not finite, or another process ended
            unexpectedly. The run's last good checkpoint is kept.
    """
    if isinstance(generator, str):
        settings["generator"], generator = generator, None
    check_settings(settings)
    check_networks(teacher, student, generator)
    teacher, student = uncompiled(teacher), uncompiled(student)
    callbacks, paths = checked_callbacks(callbacks), checked_images(images)
    if generator is not None and not hasattr(generator, "reset"):
        settings.setdefault("generator_restart_every", 0)
    given: dict[str, Any] = {
        "image_shape": checked_shape(image_shape), "num_classes": num_classes, "steps": steps,
        "max_seconds": max_seconds, "feature_layer": feature_layer, "eval": "none",
        "teacher": None, "student": None,
    }  # fmt: skip
    tensor = paths if isinstance(paths, Tensor) else None
    if tensor is not None:
        settings["images"] = ()  # also in place of files that a resumed run began with
    elif len(paths):
        settings["images"] = paths
    config = make_config(preset, recipe, **(given | settings))
    if config.resume is not None:
        # What was chosen for the networks, or for the memory, when the run began, and its images.
        before = Config(**read_config(config.resume))
        own = {*ADAPTED, "images", "student_start"} - settings.keys()
        config = dataclasses.replace(config, **{name: getattr(before, name) for name in own})
        check_resumed(config)
    return _run(
        config, teacher, student, generator, tensor, eval_loader, callbacks, progress, settings
    )


def train(
    config: Config,
    report: Callable[[dict[str, Any]], None] | None = None,
    progress: Mode = "auto",
    chosen: Collection[str] = (),
) -> dict[str, Any]:
    """Starts or resumes the run that `config` describes, and returns its summary.

    It works like `distill`, but takes networks and held-out images by name. `report` is called with
    each row of metrics.jsonl. `chosen` are names of settings that the user gave, beside those that
    differ from the recipe's: `adapt` leaves them as they are, and none may mean nothing. Under
    torchrun every process calls this function. Each trains on its share of the batches, and the
    first one writes the files and shows the progress.
    """
    config, teacher, student = load_networks(config)
    held_out = None
    if config.eval != "none" and os.environ.get("RANK", "0") == "0":
        how = (config.teacher_output, config.teacher_output_name, config.num_classes)
        classes = outputs_of(teacher, config.shape, *how)
        held_out = eval_set(
            config.eval, config.image_format, classes, config.data_dir, config.download
        )
    callbacks = [report] if report else []
    result = _run(config, teacher, student, None, None, held_out, callbacks, progress, chosen)
    return result.summary


@usual_defaults()
def _run(
    config: Config,
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module | None,
    images: Tensor | None,
    held_out: Iterable[tuple[Tensor, Tensor]] | None,
    callbacks: Sequence[Callable[[dict[str, Any]], None]],
    progress: Mode,
    chosen: Collection[str],
) -> Result:
    begun = time.perf_counter()
    if config.steps is None and config.max_seconds is None:
        raise UserError("--steps or --max-seconds must say when to stop")
    if config.tensorboard:
        require("tensorboard", "--tensorboard")
    device = pick_device(config.device)
    keep_freed_memory()
    world = World.join(device)
    with world.in_contact():
        config, teacher, given = _settled(config, teacher, images, chosen, device, world)
    if config.student_start == "teacher":
        _begin_as_teacher(student, teacher, config, "student_start" in chosen, world)
    precision = pick_precision(config.precision, device)
    reason_not_captured(config, device, world)
    board = step = None
    with (
        world.in_contact(), Progress(progress if world.first else "off") as shown,
        threads(threads_of_run(config)),
        modes_kept(student), layout_kept(student), layout_kept(generator or nn.Identity()),
        contextlib.ExitStack() as held,
    ):  # fmt: skip
        try:
            step = prepare(config, teacher, student, device, precision, generator, world, given)
            if world.first:
                give_notice(config, teacher, step)
            shown.announce(config, teacher, step)
            classes = step.num_classes

            def begin() -> Path:
                nonlocal held_out
                if held_out is not None:
                    held_out = HeldOut(held_out, config, classes)
                path = config.resume or RunFolder.create(config)
                held.enter_context(locked(path / ".lock", f"the run in {path} is being trained"))
                return path

            folder = RunFolder(world.decide(begin))
            report = functools.partial(_report, folder.path)
            loop = Loop(config, step, folder, teacher, held_out, [*callbacks, shown], report)
            loop.wall_start = begun  # what came before took the user's time, too
            if config.tensorboard and world.first:
                board = TensorBoard(folder, step)  # whose steps count on from the checkpoint by now
                loop.callbacks = [*loop.callbacks, board]
            shown.begin()
            summary = loop.run()
            shown.end(summary)
            if world.first and not summary["student_images"]:
                log.warning(
                    "the student has learned nothing: the run ended at step %s, before it began%s",
                    summary["steps"], "" if summary["interrupted"] else "; --max-seconds "
                    f"{config.max_seconds:g} is too short",
                )  # fmt: skip
            world.leave()
            student.load_state_dict(step.averaged_student.state_dict())
        finally:
            if board is not None:
                board.close()
            if step is not None:
                give_back(student, step.student)
                student.zero_grad()  # the last step's gradients are of no use to anybody
            if config.compile:
                vars(student).pop("_compiled_call_impl", None)
    examples = [
        torch.randn(count, *config.shape, device=device, dtype=step.dtype) for count in (2, 3)
    ]
    return Result(_in_evaluation_mode(student, examples), loop.history, summary, folder.path)


def _settled(
    config: Config,
    teacher: nn.Module,
    images: Tensor | None,
    chosen: Collection[str],
    device: torch.device,
    world: World,
) -> tuple[Config, nn.Module, Given | None]:
    """What the run is: settings that suit the teacher, the images and the memory; the teacher as it
    is computed; and all images that are not the data, with those that are drawn.

    Raises:
        UserError: images cannot be read, a setting that the user chose says nothing beside others,
            or the processes differ.
    """
    settings = plain(config, without=Mark.RESUMABLE)
    world.demand_equal({f"--{name.replace('_', '-')}": value for name, value in settings.items()})
    given = None if images is None else given_tensor(images, config.shape)
    for path in config.images:  # which is what is wrong, if the normalisation is missing as well
        if not os.path.exists(path):
            raise UserError(f"--images {path} does not exist")
    if config.images:
        given = read_images(config.images, config.image_format)
    if world.size > 1:
        fingerprint = None if given is None else given.fingerprint()
        world.demand_equal({"the images (by the SHA-256 of their pixels)": fingerprint})
    example = torch.zeros(2, *config.shape)
    teacher = computed_in(example.dtype, teacher, "teacher", example)
    teacher = copying_inputs(teacher, example.to(next(teacher.parameters(), example).device))
    new = config.resume is None
    if new and config.mean and max(config.mean) > 1:
        raise mistake("mean", "of pixels in 0..1, so divide it by 255, as --std", config.mean)
    own = {*chosen, *_unusual(config)} if new else set()
    if new and "dead_leaves" not in own and not _has_use_for_pictures(config, given):
        config = dataclasses.replace(config, dead_leaves=0)
    # Sketches are not chosen beside images of the user's, which are nearer to the data.
    kept = chosen if given is None else {*chosen, "sketches"}
    config = adapted(config, teacher, device, world, kept)
    config.check_chosen(own, given is not None or config.draws)
    config.check_images(given is not None or config.draws)
    if new or images is None:
        if config.dead_leaves:
            given = with_dead_leaves(given, config.dead_leaves, config.drawn_format)
        if config.sketches != "none":
            given = with_sketches(given, config.sketches, config.drawn_format)
    if new and config.student_source == "bank":
        fits = world.decide(lambda: _bank_that_fits(config, device, world.size, given))
        config = dataclasses.replace(config, bank_images=fits)
    return config, teacher, given


def _has_use_for_pictures(config: Config, given: Given | None) -> bool:
    """Whether drawn pictures help: a generator and photographs. Images of the teacher's size, and
    sketches, do more."""
    if config.student_source != "bank" or config.sketches != "none":
        return False
    return given is None or (bool(given.photographs) and config.generator != "none")


def _begin_as_teacher(
    student: nn.Module, teacher: nn.Module, config: Config, asked: bool, world: World
) -> None:
    """Gives the student what it can have of the teacher's weights, and says how much that is. If it
    is nothing, only a user who `asked` for it is told. A resumed run has it said already; it may
    have been killed before its first checkpoint, and else has other weights soon."""
    count = inherit(student, teacher)
    if config.resume is not None or not world.first:
        return
    if count:
        log.warning(
            "the student begins with the teacher's weights in %s of its %s parameters; "
            "--student-start own lets it begin without them",
            f"{count:,}", f"{parameters_of(student):,}",
        )  # fmt: skip
    elif asked:
        log.warning(
            "--student-start teacher gives the student nothing: none of its layers has the name "
            "and shape of one of the teacher's"
        )


def _unusual(config: Config) -> set[str]:
    """The settings that are not as the recipe has them."""
    usual = make_config(config.preset, config.recipe)
    return {name for name, value in vars(usual).items() if getattr(config, name) != value}


def _bank_that_fits(
    config: Config, device: torch.device, processes: int, given: Given | None = None
) -> int:
    """The images of the replay bank: fewer than those of the recipe if they take too much memory.

    Raises:
        UserError: the user's own number takes more memory than there is.
    """
    free, wanted = free_memory(device), config.bank_images
    if free is None:
        return wanted
    entry = bytes_of_entry(config.shape, config.num_classes or 0, config.bank_dtype)
    # Processes on CPUs share the memory of the host, and each has the whole bank.
    free //= processes if device.type == "cpu" else 1
    if given is not None:
        free = max(0, free - given.bytes_to_cut - len(given.whole) * entry)
        if given.form is not None and config.generator != "none":
            entry = round(entry * (1 + config.images_share))  # what is cut has a bank of its own
    usual = wanted in (
        make_config(config.preset, config.recipe).bank_images,
        WITHOUT_BATCH_NORM["bank_images"],
    )
    if not usual and wanted * entry > free:
        raise UserError(
            f"--bank-images {wanted} of --image-shape {config.shape} as {config.bank_dtype} "
            f"take {wanted * entry / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            f"{'' if given is None else ' beside the images'}: choose at most {free // entry}"
        )
    images = max(config.batch_size, min(wanted, free // (4 * entry))) if usual else wanted
    if images < wanted:
        log.warning(
            "the replay bank holds %s images instead of %s, a quarter of the %.1f GB of memory "
            "that are free; --bank-images sets another number", f"{images:,}", f"{wanted:,}",
            free / 1e9,
        )  # fmt: skip
    return images


def _in_evaluation_mode(student: nn.Module, images: list[Tensor]) -> nn.Module:
    """A copy of `student` in evaluation mode, or `student` itself if a copy answers otherwise."""
    with contextlib.suppress(UserError):
        copied = duplicate(student).eval()
        with evaluation_mode(student), buffers_kept(student), buffers_kept(copied):
            if answers_alike(student, copied, images):
                return copied
    return student


def _report(folder: Path) -> None:
    """Writes report.html, also for a stopped run. If that fails, the run does not fail with it."""
    try:
        write_report(folder)
    except Exception as error:
        log.warning("no report of the run could be made: %s", error)

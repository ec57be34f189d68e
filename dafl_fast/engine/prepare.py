"""Makes networks ready for training: checks, freezes, moves and accelerates them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..device import AUTOCAST, autocast
from ..errors import UserError, first_line
from ..models import Generator
from ..models.functional import BUILT_FOR_GPU
from ..models.norm import is_norm, with_fast_norms
from ..models.pixels import Affine, GeneratorOf
from ..models.twin import answers_alike, duplicate
from ..models.winograd import accelerated, becomes_faster
from ..unlabelled import Given
from .checks import check_answers, check_generator, check_student, run_lazy_layers
from .distributed import World
from .evaluation import buffers_kept, evaluation_mode
from .fuse import fuse_relu
from .layout import try_out, use_channels_last
from .outputs import demand_exclusive_classes, reading_of, tell_of_sigmoid
from .precision import check_trainable, precision_of
from .step import Step
from .teacher import Autocast, FrozenTeacher

log = logging.getLogger(__name__)


def prepare(
    config: Config,
    teacher: nn.Module,
    student: nn.Module,
    device: torch.device,
    precision: str,
    generator: nn.Module | None = None,
    world: World | None = None,
    given: Given | None = None,
) -> Step:
    """Checks that networks and generator fit together, and makes a Step of them on `device`.

    Args:
        config: all settings.
        teacher: the classifier; a frozen copy of it is used.
        student: it is moved to `device`. If some of its layers can be made faster, the Step has a
            twin of it, with the same parameters and buffers, and its layers keep their classes.
        device, precision: see `pick_device` and `pick_precision`.
        generator: by default the published one.
        world: the processes of this job.
        given: images that are not the data, for the student.

    Raises:
        UserError: a network does not take such images, they differ in the number of classes, or
            the processes have different teachers.
    """
    torch.manual_seed(config.seed)
    channels, height, width = shape = config.shape
    made = (1 if config.grey else channels, height, width)
    if config.generator == "none":
        generator = NoGenerator()
    elif generator is None:
        generator = Generator(config.latent_dim, (height, width), made[0], config.generator_width)
    frozen = freeze(teacher, config, random_images(config, 16))
    if world is not None:
        world.demand_equal({"the teacher (by the SHA-256 of its weights)": frozen.fingerprint()})
    for module in (generator, student, frozen):
        module.to(device)
    noise = torch.randn(2, config.latent_dim, device=device)
    run_lazy_layers(generator, noise, "generator")
    run_lazy_layers(student, torch.zeros(2, *shape, device=device), "student")
    many = random_images(config, 16).to(device)
    generating = config.generator != "none"
    num_classes = frozen.check(many, to_images=generating)
    check_answers(frozen.network, many)
    if config.num_classes not in (None, num_classes):
        raise UserError(
            f"--num-classes is {config.num_classes}, but the teacher tells {num_classes} apart"
        )
    images = many[:2]
    check_trainable(student, "student", images)
    precision = precision_of(student, config.precision, precision)
    check_student(student, images, num_classes)
    tell_of_sigmoid(student, images)
    if generating:
        check_trainable(generator, "generator", noise)
        check_generator(generator, noise, made)
    if generating and config.generator_restart_every and not hasattr(generator, "reset"):
        raise UserError(
            "--generator-restart-every needs a generator with a method reset() that draws its "
            "parameters anew; give it one, or set it to 0"
        )
    if generating:
        use_channels_last(generator, noise, "generator", trained=True)
    use_channels_last(student, images, "student", trained=True)
    use_channels_last(frozen.network, images, "teacher")
    if generating and config.from_generated is not None:
        generator = GeneratorOf(generator, *config.from_generated).to(device)
    if precision in AUTOCAST:
        for role, network, inputs in (
            *([("generator", generator, noise)] if generating else []),
            ("student", student, images),
        ):
            precision = _narrow(precision, device, network, inputs, role)
        if precision in AUTOCAST:
            _cast(frozen, AUTOCAST[precision], images)
    # Shapes never change, so cuDNN needs to search for the fastest convolutions only once.
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu":
        some = [images, many[2:5]]  # of two sizes: what was kept from the first would show
        constant = partial(accelerated, constant=True)
        frozen.network = _accelerated(frozen.network, some, constant, becomes_faster)
        student = _accelerated(student, some, accelerated, becomes_faster, trained=True)
    elif not config.compile:  # which fuses by itself
        if precision in AUTOCAST:  # with a batch as in training, for which cuDNN then has kernels
            fuse_relu(frozen.network, [random_images(config, config.batch_size).to(device)])
        if BUILT_FOR_GPU and (world is None or world.size == 1):
            student = _accelerated(student, [images, many], with_fast_norms, is_norm, trained=True)
    if config.compile:
        for module in (generator, student, frozen):
            module.compile()
    return Step(config, generator, frozen, student, num_classes, device, precision, world, given)


class NoGenerator(nn.Module):
    """Stands in a Step where a generator would. It is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))


def random_images(config: Config, count: int, grain: int = 1) -> Tensor:
    """Noise [N, C, H, W] in the units of the teacher's images, with `grain` pixels from one random
    value to the next; the same in every call."""
    channels, *size = config.shape
    draw = torch.Generator().manual_seed(0)  # what the run draws does not depend on it
    coarse = [max(side // grain, 1) for side in size]
    images = torch.randn(count, 1 if config.grey else channels, *coarse, generator=draw)
    if grain > 1:
        images = F.interpolate(images, size=size, mode="bilinear")
        deviation, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
        images = (images - mean) / deviation.clamp_min(1e-3)
    given = config.from_generated
    return images if given is None else Affine(*given)(images)


def _narrow(
    precision: str, device: torch.device, network: nn.Module, inputs: Tensor, role: str
) -> str:
    """`precision` if `network` trains in it under autocast, else "fp32", and a warning."""
    if precision not in AUTOCAST:
        return precision
    try:
        with autocast(device, precision):
            try_out(network, inputs, trained=True)
    except Exception as error:  # a network may raise anything
        log.warning(
            "the %s does not run in %s, so the run computes in fp32: %s",
            role, precision, first_line(error),
        )  # fmt: skip
        return "fp32"
    return precision


def _cast(frozen: FrozenTeacher, dtype: torch.dtype, images: Tensor) -> None:
    """`frozen.cast(dtype)`, as far as the teacher then still answers as it does."""
    whole = frozen.network
    narrow, weights = Autocast(whole, dtype), [(p, p.data) for p in whole.parameters()]
    if frozen.read_as.fine or not answers_alike(whole, narrow, [images]):
        frozen.network = Autocast(whole, dtype, enabled=False)
        log.warning(
            "the teacher computes in fp32: in %s it does not run, or answers otherwise",
            str(dtype).removeprefix("torch."),
        )
        return
    expected = narrow(images)
    frozen.cast(dtype)
    with contextlib.suppress(Exception):  # a network may raise anything
        if torch.allclose(frozen.network(images), expected, 1e-3, 1e-3, equal_nan=True):
            return
    for parameter, data in weights:  # its code reads its weights itself
        parameter.data = data


def _accelerated(
    network: nn.Module,
    images: list[Tensor],
    twin: Callable[..., nn.Module],
    becomes_faster: Callable[[nn.Module], bool],
    trained: bool = False,
) -> nn.Module:
    """`network` with faster layers, as many of them as leave its answers what they are: a `twin`,
    or one in which only these layers are faster."""

    def holds(fast: nn.Module) -> bool:
        with evaluation_mode(network), evaluation_mode(fast), buffers_kept(network):
            if not answers_alike(network, fast, images):
                return False
        with contextlib.suppress(Exception):  # a network may raise anything
            try_out(fast, images[0], trained)
            return True
        return False

    fast = twin(network)
    if fast is network or holds(fast):
        return fast
    candidates = [layer for layer in network.modules() if becomes_faster(layer)]
    good = {layer for layer in candidates if holds(twin(network, layers={layer}))}
    fast = twin(network, layers=good)
    return fast if fast is network or holds(fast) else network


@torch.no_grad()
def freeze(teacher: nn.Module, config: Config, images: Tensor) -> FrozenTeacher:
    """A FrozenTeacher whose BatchNorm is folded, unless its outputs would then differ.

    They can differ if the network's code checks the type of its input: torch.fx then traces the
    wrong branch.
    """
    images = images.to(next(teacher.parameters(), images).device)
    reading = reading_of(
        teacher, images, config.teacher_output, name=config.teacher_output_name,
        classes=config.num_classes,
    )  # fmt: skip
    if config.teacher_output == "auto":
        demand_exclusive_classes(reading)
    watch = config.generator != "none" and config.bn_statistics != 0
    frozen = FrozenTeacher(teacher, config.feature_layer, watch=watch, reading=reading)
    ordinary = reading.plain and reading.kind == "logits" and not reading.doubts
    log.log(logging.INFO if ordinary else logging.WARNING, reading.describe(frozen.read_as))
    if not frozen.folded:
        return frozen
    unfolded = duplicate(teacher).eval()
    with contextlib.suppress(RuntimeError):  # `FrozenTeacher.check` has a better message
        expected = reading.numbers(unfolded(images))
        got = reading.repeated(frozen.network(images))
        if not torch.allclose(got, expected, 1e-3, 1e-3 * expected.abs().max().item(), True):
            log.warning("the teacher's BatchNorm is not folded: it would answer differently")
            return FrozenTeacher(teacher, config.feature_layer, fold=False, reading=reading)
    return frozen

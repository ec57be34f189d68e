"""Makes networks ready for training: checks, freezes, moves and accelerates them."""

from __future__ import annotations

import contextlib
import copy
import logging

import torch
from torch import Tensor, nn

from ..config import Config
from ..device import AUTOCAST
from ..errors import UserError
from ..models import Generator
from ..models.pixels import GeneratorOf
from ..models.twin import answers_alike
from ..models.winograd import accelerated
from .checks import check_generator, check_student, run_lazy_layers
from .distributed import World
from .evaluation import evaluation_mode
from .step import Step
from .teacher import FrozenTeacher

log = logging.getLogger(__name__)


def prepare(
    config: Config,
    teacher: nn.Module,
    student: nn.Module,
    device: torch.device,
    precision: str,
    generator: nn.Module | None = None,
    world: World | None = None,
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

    Raises:
        UserError: a network does not take such images, or they differ in the number of classes.
    """
    torch.manual_seed(config.seed)
    channels, height, width = shape = config.image_shape
    made = (1 if config.grey else channels, height, width)
    if generator is None:
        generator = Generator(config.latent_dim, (height, width), made[0], config.generator_width)
    frozen = freeze(teacher, config, torch.randn(16, *shape))
    for module in (generator, student, frozen):
        module.to(device)
    run_lazy_layers(generator, torch.zeros(2, config.latent_dim, device=device), "generator")
    run_lazy_layers(student, torch.zeros(2, *shape, device=device), "student")
    for module in (generator, student, frozen):
        # Convolutions are faster with channels innermost, on CPUs and on GPUs.
        module.to(memory_format=torch.channels_last)
    num_classes = frozen.check(torch.randn(16, *shape, device=device))
    if config.num_classes not in (None, num_classes):
        raise UserError(
            f"--num-classes is {config.num_classes}, but the teacher tells {num_classes} apart"
        )
    check_student(student, torch.randn(2, *shape, device=device), num_classes)
    check_generator(generator, torch.randn(2, config.latent_dim, device=device), made)
    if config.generator_restart_every and not hasattr(generator, "reset"):
        raise UserError(
            "--generator-restart-every needs a generator with a method reset() that draws its "
            "parameters anew; give it one, or set it to 0"
        )
    if config.from_generated is not None:
        generator = GeneratorOf(generator, *config.from_generated).to(device)
    if precision in AUTOCAST:
        frozen.cast(AUTOCAST[precision])
    if device.type == "cpu":
        some, draw = [], torch.Generator().manual_seed(0)
        for count in (2, 3):  # of two sizes, by which what was kept from the first would show
            some.append(torch.randn(count, *shape, generator=draw))
        frozen.network = _accelerated(frozen.network, some, constant=True)
        student = _accelerated(student, some)
    # Shapes never change, so cuDNN needs to search for the fastest convolutions only once.
    torch.backends.cudnn.benchmark = True
    if config.compile:
        for module in (generator, student, frozen):
            module.compile()
    return Step(config, generator, frozen, student, num_classes, device, precision, world)


def _accelerated(network: nn.Module, images: list[Tensor], constant: bool = False) -> nn.Module:
    """`network` with faster layers, if it then still answers as it does."""
    fast = accelerated(network, constant)
    if fast is network:
        return network
    with evaluation_mode(network), evaluation_mode(fast):
        return fast if answers_alike(network, fast, images) else network


@torch.no_grad()
def freeze(teacher: nn.Module, config: Config, images: Tensor) -> FrozenTeacher:
    """A FrozenTeacher whose BatchNorm is folded, unless its outputs would then differ.

    They can differ if the network's code checks the type of its input: torch.fx then traces the
    wrong branch.
    """
    frozen = FrozenTeacher(teacher, config.feature_layer, watch=config.bn_statistics != 0)
    if not frozen.folded:
        return frozen
    unfolded = copy.deepcopy(teacher).eval()
    images = images.to(next(teacher.parameters(), images).device)
    with contextlib.suppress(RuntimeError):  # `FrozenTeacher.check` has a better message
        expected, got = unfolded(images), frozen.network(images)
        if not torch.allclose(got, expected, 1e-3, 1e-3 * expected.abs().max().item(), True):
            log.warning("the teacher's BatchNorm is not folded: it would answer differently")
            return FrozenTeacher(teacher, config.feature_layer, fold=False)
    return frozen

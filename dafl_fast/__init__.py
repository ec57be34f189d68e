"""dafl_fast: distil a trained classifier into a small fast one, without its training data.

Data-Free Learning of Student Networks (Chen et al., ICCV 2019) with fused losses.
"""

import torch  # noqa: F401  (loads the libraries that the extension links to)

from ._C import build_info
from ._version import __version__
from .config import Config, make_config
from .engine.bank import ReplayBank
from .engine.loop import Result, distill
from .engine.teacher import FrozenTeacher
from .losses import (
    DaflLosses,
    DistillLoss,
    GeneratorLoss,
    dafl_losses,
    distill_loss,
    generator_loss,
)

__all__ = [
    "Config",
    "DaflLosses",
    "DistillLoss",
    "FrozenTeacher",
    "GeneratorLoss",
    "ReplayBank",
    "Result",
    "__version__",
    "build_info",
    "dafl_losses",
    "distill",
    "distill_loss",
    "generator_loss",
    "make_config",
]

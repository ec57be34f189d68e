"""dafl_fast: distil a trained classifier into a small fast one, without its training data.

Data-Free Learning of Student Networks (Chen et al., ICCV 2019) with fused losses.
"""

import torch  # loads the libraries that the extension links to

try:
    from ._C import build_info
except ImportError as error:
    raise ImportError(
        f"the extension of dafl_fast is not built for this Python and PyTorch {torch.__version__} "
        f"({error}); build it, from the sources: pip install --no-build-isolation ."
    ) from error

from ._version import __version__
from .config import Config
from .distill import Result, distill
from .engine.bank import ReplayBank
from .engine.teacher import FrozenTeacher
from .losses import (
    DaflLosses,
    DistillLoss,
    GeneratorLoss,
    dafl_losses,
    distill_loss,
    generator_loss,
)
from .networks import bundled_teacher, load_network
from .recipes import make_config

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
    "bundled_teacher",
    "dafl_losses",
    "distill",
    "distill_loss",
    "generator_loss",
    "load_network",
    "make_config",
]

"""Networks as users name them: `opener` is the way in, `names` has what is built by name, and
`formats` what is read from files."""

from .exported import from_export
from .formats import load_weights
from .names import is_code
from .opener import (
    bundled_teacher,
    bundled_weights,
    is_for_mnist,
    load_network,
    load_networks,
    open_file,
    open_run,
    outputs_of,
)

__all__ = [
    "bundled_teacher", "bundled_weights", "from_export", "is_code", "is_for_mnist",
    "load_network", "load_networks", "load_weights", "open_file", "open_run", "outputs_of",
]  # fmt: skip

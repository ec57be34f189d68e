"""Networks as users name them: `opener` is the way in, `names` what is built by name, `formats`
what is read from files, `runs` what the settings of a run name."""

from .exported import from_export
from .formats import load_weights
from .opener import bundled_teacher, bundled_weights, load_network, open_file, open_run
from .runs import load_networks, outputs_of

__all__ = [
    "bundled_teacher",
    "bundled_weights",
    "from_export",
    "load_network",
    "load_networks",
    "load_weights",
    "open_file",
    "open_run",
    "outputs_of",
]

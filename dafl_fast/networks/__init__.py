"""Networks found by name: what a user may name (`names`), files (`exported`), runs (`runs`)."""

from .names import bundled_teacher, load_network, load_weights, read_state

__all__ = ["bundled_teacher", "load_network", "load_weights", "read_state"]

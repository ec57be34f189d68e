"""Exponential moving average of a network's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.twin import duplicate


class Average:
    """A copy of a network with the moving average of its parameters: a <- a + weight (w - a).

    Buffers (BatchNorm statistics) are copied. The weight falls to 1 - `decay`; see `ramp`.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = duplicate(network).requires_grad_(False).eval()
        self.decay = decay
        # On the device, so that a captured update reads the value that the host has written there.
        self.weight: Tensor = torch.zeros((), device=next(network.parameters()).device)

    def ramp(self, updates: int) -> None:
        """Sets the weight for the next updates, when there have been `updates` so far.

        After k updates it is 1 - min(decay, (1 + k) / (10 + k)). It is larger at first, so that the
        average forgets the random initialisation.
        """
        self.weight.fill_(1 - min(self.decay, (1 + updates) / (10 + updates)))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Moves the average one step towards `network`."""
        mine: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(network.parameters())
        steps = list(torch._foreach_sub(theirs, mine))
        torch._foreach_mul_(steps, self.weight)
        torch._foreach_add_(mine, steps)
        # By dtype, since a list of one dtype is copied by one kernel.
        kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for own, buffer in zip(self.module.buffers(), network.buffers(), strict=True):
            into, out_of = kinds.setdefault(own.dtype, ([], []))
            into.append(own)
            out_of.append(buffer)
        for into, out_of in kinds.values():
            torch._foreach_copy_(into, out_of)

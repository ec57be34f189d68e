"""Exponential moving average of a network's weights, with BatchNorm statistics of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.twin import duplicate

# The weight of a batch in the statistics, when there have been many.
PACE = 0.05


class Average:
    """A copy of a network with the moving average of its parameters: a <- a + weight (w - a).

    BatchNorm statistics belong to the weights with which they were measured, so the average needs
    its own: `measure`, if there are such `layers`. Other buffers are copied. The weight falls to
    1 - `decay`; see `ramp`.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = duplicate(network).requires_grad_(False).eval()
        self.decay = decay
        # On the device, so that a captured update reads the value that the host has written there.
        device = next(network.parameters()).device
        self.weight: Tensor = torch.zeros((), device=device)
        self.pace: Tensor = torch.zeros((), device=device)
        # Those whose statistics are its own. The ones that the network keeps in evaluation mode are
        # copied as they are.
        self.layers = [
            mine
            for mine, own in zip(self.module.modules(), network.modules(), strict=True)
            if isinstance(mine, _BatchNorm) and own.training and mine.running_mean is not None
        ]
        for layer in self.layers:
            layer.momentum = 1.0

    def ramp(self, updates: int, measured: int) -> None:
        """Sets the weights for the next updates, when there have been `updates` so far, and for the
        next batch that is measured after `measured` others.

        After k updates it is 1 - min(decay, (1 + k) / (10 + k)). It is larger at first, so that the
        average forgets the random initialisation.
        """
        self.weight.fill_(1 - min(self.decay, (1 + updates) / (10 + updates)))
        self.pace.fill_(max(PACE, 1 / (1 + measured)))

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
        measured = {id(tensor) for tensor in self._statistics()}
        for own, buffer in zip(self.module.buffers(), network.buffers(), strict=True):
            if id(own) not in measured:
                into, out_of = kinds.setdefault(own.dtype, ([], []))
                into.append(own)
                out_of.append(buffer)
        for into, out_of in kinds.values():
            torch._foreach_copy_(into, out_of)

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Moves the average's BatchNorm statistics towards those of a batch that the network learns
        from: s <- s + pace (batch - s)."""
        statistics = self._statistics()
        before = [tensor.clone() for tensor in statistics]
        for layer in self.layers:
            layer.training = True
        self.module(images)  # with a momentum of 1, it leaves the batch's statistics
        for layer in self.layers:
            layer.training = False
        steps = list(torch._foreach_sub(statistics, before))
        torch._foreach_mul_(steps, self.pace)
        torch._foreach_add_(before, steps)
        torch._foreach_copy_(statistics, before)

    def _statistics(self) -> list[Tensor]:
        pairs = ((layer.running_mean, layer.running_var) for layer in self.layers)
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

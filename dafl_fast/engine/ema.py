"""Exponential moving average of a network's weights, with BatchNorm statistics of its own."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.twin import duplicate

# Layers that leave a batch's statistics behind if their momentum is 1.
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# The weight of a batch in the statistics, when there have been many. After the first ones, between
# which the weights move a lot, it falls as SOON / (SOON + batches).
PACE, SOON = 0.05, 10


class Average:
    """A copy of a network with the moving average of its parameters: a <- a + weight (w - a).

    BatchNorm statistics belong to the weights with which they were measured, so the average needs
    its own: `measure`, if there are `layers` that can. Those of other layers are copied, as all
    other buffers are. The weight falls to 1 - `decay`; see `ramp`.

    Args:
        network: in training mode, where it has BatchNorm.
        decay: of the average.
        example: images [N, C, H, W], which tell how often each layer is used; without them nothing
            is measured.
    """

    def __init__(self, network: nn.Module, decay: float, example: Tensor | None = None) -> None:
        self.module = duplicate(network).eval()
        for parameter in self.module.parameters():
            parameter.detach_()  # requires_grad_(False) fails for a copied TorchScript
        self.decay = decay
        # On the device, so that a captured update reads the value that the host has written there.
        device = next(network.parameters()).device
        self.weight: Tensor = torch.zeros((), device=device)
        self.pace: Tensor = torch.zeros((), device=device)
        self.layers = self._measurable(network, example)
        for layer in self.layers:
            layer.momentum = 1.0

    @torch.no_grad()
    def _measurable(self, network: nn.Module, example: Tensor | None) -> list[_BatchNorm]:
        """The layers of the average that follow their batches in the network, and are used once in
        a forward pass: one that is used twice leaves the second batch's statistics only."""
        if example is None:
            return []
        pairs = zip(self.module.modules(), network.modules(), strict=True)
        norms = [
            mine for mine, own in pairs
            if isinstance(mine, _BatchNorm) and type(mine) in NORMS and own.training
            and mine.track_running_stats and mine.running_mean is not None and mine.momentum != 0
        ]  # fmt: skip
        used: Counter[nn.Module] = Counter()
        count = lambda layer, inputs: used.update([layer])  # noqa: E731
        handles = [layer.register_forward_pre_hook(count) for layer in norms]
        try:
            if norms:
                self.module(example)
        finally:
            for handle in handles:
                handle.remove()
        return [layer for layer in norms if used[layer] == 1]

    def ramp(self, updates: int, measured: int) -> None:
        """Sets the weights for the next updates, when there have been `updates` so far, and for the
        next batch that is measured after `measured` others.

        After k updates it is 1 - min(decay, (1 + k) / (10 + k)). It is larger at first, so that the
        average forgets the random initialisation.
        """
        self.weight.fill_(1 - min(self.decay, (1 + updates) / (10 + updates)))
        self.pace.fill_(max(PACE, SOON / (SOON + measured)))

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
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.sub_(1)  # that was none of the network's batches
        steps = list(torch._foreach_sub(statistics, before))
        torch._foreach_mul_(steps, self.pace)
        torch._foreach_add_(before, steps)
        torch._foreach_copy_(statistics, before)

    def _statistics(self) -> list[Tensor]:
        pairs = ((layer.running_mean, layer.running_var) for layer in self.layers)
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """A copy of a network whose parameters follow it slowly: a <- decay a + (1 - decay) w.

    The first updates weigh the network more, by decay_k = min(decay, (1 + k) / (10 + k)), so that
    the average forgets the random initialisation. Buffers (BatchNorm statistics) are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Moves the average one step towards `network`."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(
            list(self.module.parameters()), list(network.parameters()), 1.0 - decay
        )
        for mine, theirs in zip(self.module.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)

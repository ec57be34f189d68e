"""What updates generator and student. Learning rates are tensors on the device, which a captured
step reads each time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Config
from .live import make_state


def generator_optimizer(
    config: Config, generator: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    """Adam."""
    return _adam(generator, _rate(config.generator_lr, device), config.generator_beta1)


def student_optimizer(
    config: Config, student: nn.Module, device: torch.device
) -> tuple[torch.optim.Optimizer, Tensor]:
    """Adam, or SGD with momentum 0.9, and its learning rate, to write others into."""
    rate, decay = _rate(config.student_lr, device), config.student_weight_decay
    if config.student_optimizer == "adam":
        return _adam(student, rate, weight_decay=decay), rate
    sgd = torch.optim.SGD(student.parameters(), rate, 0.9, weight_decay=decay, fused=True)
    make_state(sgd)
    return sgd, rate


def _rate(value: float, device: torch.device) -> Tensor:
    # CUDA's fused optimizers need it in fp32.
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    return torch.tensor(value, dtype=dtype, device=device)


def _adam(
    network: nn.Module, rate: Tensor, beta1: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    adam = torch.optim.Adam(
        network.parameters(),
        rate,
        betas=(beta1, 0.999),
        weight_decay=weight_decay,
        fused=True,
        capturable=rate.is_cuda,
    )
    make_state(adam)
    return adam

from typing import Any

from torch import Tensor, dtype

cuda: bool

def generator_loss(
    teacher_logits: Tensor,
    features: Tensor | None,
    one_hot: float,
    entropy: float,
    activation: float,
    log_base: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def distill_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, scale_by_t2: bool
) -> tuple[Tensor, Tensor, Tensor]: ...
def dafl_losses(
    teacher_logits: Tensor,
    features: Tensor | None,
    student_logits: Tensor,
    one_hot: float,
    entropy: float,
    activation: float,
    log_base: float,
    temperature: float,
    scale_by_t2: bool,
) -> tuple[Tensor, ...]: ...
def plan(
    rows: int, classes: int, float64: bool, multiprocessors: int, capability: int
) -> dict[str, Any]: ...
def conv3x3_pays(type: dtype) -> bool: ...
def build_info() -> dict[str, Any]: ...

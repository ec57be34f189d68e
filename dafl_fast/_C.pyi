from typing import Any

from torch import Tensor

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
def build_info() -> dict[str, Any]: ...

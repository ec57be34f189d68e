"""What a network takes and returns, as those who use it know it.

Inside, everything is one way: images [N, C, H, W] in floating point in, logits [N, C] out. A
teacher as it is found may have another convention. It is written into the run's summary, so that
the student can be exported as a drop-in replacement.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import Tensor

from .errors import UserError
from .settings import check

OutputKind = Literal[
    "logits", "probabilities", "log-probabilities", "sigmoids", "binary-logit", "binary-probability"
]


@dataclass(frozen=True)
class Convention:
    """The convention of a network.

    Attributes:
        input_name, output_name: what a program calls its images and its answers.
        layout: the order of the input's dimensions; N is the batch, H the height.
        dtype: of the input, as torch names it: "float32", "uint8", ...
        outputs: what the answers are. "sigmoids": a probability for each class by itself.
            "binary-...": one number, which is about the second of two classes.
        answer_shape: of the answer for one image: () is a bare number; None: one number for each
            class, or one in all.
        image_shape: channels, height and width, whatever the layout; None if they are not fixed.
        classes: their names, in the order of the outputs; empty if not known.
    """

    input_name: str = "images"
    output_name: str = "logits"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dtype: str = "float32"
    outputs: OutputKind = "logits"
    answer_shape: tuple[int, ...] | None = None
    image_shape: tuple[int, int, int] | None = None
    classes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Convention:
        """What `as_json` returned, also after a way through a JSON file.

        Raises:
            UserError: it is damaged.
        """
        known = {field.name for field in fields(cls)} & content.keys()
        values = {name: content[name] for name in known}
        for name in ("answer_shape", "image_shape", "classes"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        found = cls(**values)
        try:
            check(found)
        except UserError as error:
            raise UserError(f"the convention in a run's summary is damaged: {error}") from error
        return found


def as_answers(logits: Tensor, kind: OutputKind, shape: tuple[int, ...] | None = None) -> Tensor:
    """A student's logits [N, C] in its teacher's form.

    For "sigmoids" these are the probabilities of a softmax, because a student's logits are known
    but for a number that is added to all of them.

    Args:
        shape: of the answer for one image; by default [C], or [1] of one number.
    """
    if kind.startswith("binary"):
        x = logits[:, 1:] - logits[:, :1]
        x = x.sigmoid() if kind == "binary-probability" else x
    elif kind == "logits":
        x = logits
    else:
        x = logits.log_softmax(1) if kind == "log-probabilities" else logits.softmax(1)
    if shape is None or len(shape) == 1:
        return x
    return x.unflatten(1, shape) if shape else x.squeeze(1)


def sized(value: Any) -> int | tuple[int, int]:
    """An image size from a file; raises ValueError if it is none."""
    both = value if isinstance(value, (list, tuple)) else (value, value)
    if len(both) != 2 or not all(type(side) is int and 0 < side < 2**20 for side in both):
        raise ValueError(f"an image size cannot be {value!r}")
    return both[0] if both[0] == both[1] else (both[0], both[1])


def normalisation(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel from a file; raises ValueError if they are none."""
    for values in (mean, std):
        numbers = isinstance(values, (list, tuple)) and 1 <= len(values) <= 64
        if not numbers or not all(type(x) in (int, float) and abs(x) < 2**31 for x in values):
            raise ValueError(f"a mean or deviation cannot be {values!r}")
    if len(mean) != len(std) or min(std) <= 0:
        raise ValueError(f"the mean {mean!r} cannot have the deviation {std!r}")
    return tuple(mean), tuple(std)

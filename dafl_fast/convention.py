"""What a network takes and returns, as those who use it know it.

Inside, everything is one way: images [N, C, H, W] in floating point in, logits [N, C] out. A
teacher as it is found may have another convention. It is written into the run's summary, so that
the student can be exported as a drop-in replacement.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import Tensor

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
        """What `as_json` returned, also after a way through a JSON file."""
        known = {field.name for field in fields(cls)} & content.keys()
        values = {name: content[name] for name in known}
        for name in ("answer_shape", "image_shape", "classes"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)


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

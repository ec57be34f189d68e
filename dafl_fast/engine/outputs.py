"""What does a teacher return, and how do logits come of it?

Inside, every teacher returns logits [N, C]. What it returns as it is found is a `Reading`, made by
looking at its answers to random images. Logits are computed back, unless the softmax or sigmoid at
its end can be taken off (`ending.py`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convention import Convention, OutputKind, as_answers
from ..errors import UserError
from .checks import answer_of
from .evaluation import buffers_kept, evaluation_mode
from .structures import FORM, Path, candidates, chosen, named, place

log = logging.getLogger(__name__)

# Probabilities below this are taken for this one, and then give no gradient. The logarithm of
# smaller ones could give a gradient that overflows on its way through a softmax.
FLOOR = 1e-30
# Factors on random images: what does not lie between 0 and 1 shows it at one of them.
_AMPLITUDES = (1, 8, 64)

_aten = torch.ops.aten


class Squash(NamedTuple):
    """A function at the end of a network: what it computes [N, K] -> [N, K], how autograd calls
    it, and the layers, functions, operators and methods that compute it."""

    function: Callable[[Tensor], Tensor]
    backward: str
    targets: frozenset[Any]


_SOFTMAX = Squash(
    lambda z: z.softmax(1), "SoftmaxBackward",
    frozenset({nn.Softmax, nn.Softmax2d, F.softmax, torch.softmax, torch.special.softmax,
               _aten.softmax.int, _aten._softmax.default, "softmax"}),
)  # fmt: skip
_LOG_SOFTMAX = Squash(
    lambda z: z.log_softmax(1), "LogSoftmaxBackward",
    frozenset({nn.LogSoftmax, F.log_softmax, torch.log_softmax, torch.special.log_softmax,
               _aten.log_softmax.int, _aten._log_softmax.default, "log_softmax"}),
)  # fmt: skip
_SIGMOID = Squash(
    lambda z: z.sigmoid(), "SigmoidBackward",
    frozenset({nn.Sigmoid, F.sigmoid, torch.sigmoid, torch.special.expit, torch.sigmoid_,
               _aten.sigmoid.default, _aten.sigmoid_.default, "sigmoid", "sigmoid_"}),
)  # fmt: skip
# What comes straight from a layer of products is nothing but logits.
_LINEAR = Squash(
    lambda z: z, "(Addmm|Mm|Bmm|Baddbmm|Linear|(Mkldnn|Cudnn)?Convolution)Backward", frozenset()
)
# By what a network with such a function at its end returns.
SQUASHED: dict[str, Squash] = {
    "probabilities": _SOFTMAX,
    "log-probabilities": _LOG_SOFTMAX,
    "sigmoids": _SIGMOID,
    "binary-probability": _SIGMOID,
}
_WORDS: dict[OutputKind, str] = {
    "logits": "logits of {} classes",
    "probabilities": "probabilities of {} classes",
    "log-probabilities": "log-probabilities of {} classes",
    "sigmoids": "a sigmoid for each of {} classes, which are taken to exclude each other",
    "binary-logit": "one logit, of the second of two classes",
    "binary-probability": "one probability, of the second of two classes",
}
_MUST_BE: dict[OutputKind, str] = {
    "logits": "several numbers for each image",
    "probabilities": "numbers for each image that are not negative and add up to 1",
    "log-probabilities": "numbers for each image whose exponentials add up to 1",
    "sigmoids": "several numbers for each image, all between 0 and 1",
    "binary-logit": "one number for each image",
    "binary-probability": "one number for each image, between 0 and 1",
}


@dataclass(frozen=True)
class Reading:
    """How logits [N, C] come of what a network returns.

    Attributes:
        kind: what the numbers are.
        path: where their tensor is: the keys, fields and indices that lead to it.
        shape: of one image's numbers: (C,), (C, 1, 1), (1,) or, of a bare number, ().
        doubts: sentences on what could also be meant.
        together: the share of the images for which two or more numbers were above one half.
        seen: batches of images, and the network's numbers [N, K] for them.
    """

    kind: OutputKind = "logits"
    path: Path = ()
    shape: tuple[int, ...] = ()
    doubts: tuple[str, ...] = ()
    together: float = 0.0
    seen: tuple[tuple[Tensor, Tensor], ...] = field(default=(), repr=False, compare=False)

    @property
    def plain(self) -> bool:
        """Whether a network's answers are logits [N, C] as they stand. Log-probabilities are:
        they differ from logits by a number for each image, which no loss sees."""
        return (
            self.kind in ("logits", "log-probabilities") and not self.path and len(self.shape) == 1
        )

    @property
    def fine(self) -> bool:
        """Whether the numbers must be computed in fp32: in less, a sigmoid soon rounds to 1."""
        return self.kind in ("sigmoids", "binary-probability")

    @property
    def classes(self) -> int:
        return 2 if self.kind.startswith("binary") else max(self.shape)

    def numbers(self, answer: Any) -> Tensor:
        """The numbers [N, K] in what the network returns."""
        for key in self.path:
            by_name = isinstance(key, str) and not isinstance(answer, Mapping)
            answer = getattr(answer, str(key)) if by_name else answer[key]
        return answer.reshape(len(answer), -1)

    def logits(self, answer: Any) -> Tensor:
        """Logits [N, C] from what the network returns, of at least fp32 where they are computed.

        log p of probabilities, and log(p / (1 - p)) of sigmoids. Where p is below `FLOOR`, or a
        sigmoid rounds to 1, they are finite, and there is no gradient.
        """
        x = self.numbers(answer)
        if self.kind not in ("logits", "log-probabilities", "binary-logit"):
            own = torch.finfo(x.dtype)
            p = x.to(torch.promote_types(x.dtype, torch.float32))
            x = p.clamp_min(max(FLOOR, own.tiny)).log()
            if self.kind != "probabilities":
                # The largest number below 1 in the dtype of p.
                x = x - torch.log1p(-p.clamp_max(1 - own.eps / 2))
        return torch.cat([torch.zeros_like(x), x], 1) if self.kind.startswith("binary") else x

    def repeated(self, logits: Tensor) -> Tensor:
        """The network's numbers [N, K], given its own logits."""
        if self.kind == "sigmoids":
            return logits.sigmoid()
        return as_answers(logits, self.kind).reshape(len(logits), -1)

    def describe(self, read_as: Reading) -> str:
        """What was found, in one line; `read_as` is what is left of it without the last layer."""
        said = [f"the teacher returns {_WORDS[self.kind].format(self.classes)}"]
        if self.path:
            said[0] += f", as {place(self.path)} of its answer"
        if self.kind not in ("logits", "binary-logit"):
            if read_as.kind != self.kind:
                said.append("its last layer is taken off")
            elif self.kind != "log-probabilities":
                said.append("logits are computed from them")
            said.append("if they are something else, name it with --teacher-output")
        return "; ".join([*said, *self.doubts])

    def forgotten(self) -> Reading:
        """Without the images that were looked at."""
        return replace(self, seen=())


LOGITS = Reading(shape=(1,))  # of a network that nobody has looked at


class Classifier(nn.Module):
    """A network whose answers are read: images -> logits [N, C]."""

    def __init__(self, network: nn.Module, reading: Reading) -> None:
        super().__init__()
        self.network, self.reading = network, reading

    def forward(self, images: Tensor) -> Tensor:
        return self.reading.logits(self.network(images))


def as_classifier(network: nn.Module, reading: Reading) -> nn.Module:
    """`network` as images -> logits [N, C]; itself if that is what it is."""
    return network if reading.plain else Classifier(network, reading.forgotten())


def reading_of(
    network: nn.Module,
    images: Tensor,
    wanted: OutputKind | Literal["auto"] = "auto",
    role: str = "teacher",
    name: str | None = None,
    classes: int | None = None,
) -> Reading:
    """Looks at what a network returns for random images.

    Several numbers between 0 and 1 are taken for sigmoids only if a sigmoid computed them. They
    may be logits.

    Args:
        network: a classifier; it is run in evaluation mode, and not changed.
        images: random ones [N, C, H, W], on its device.
        wanted: the kind of its numbers, if that is known.
        role: names it in messages.
        name: of the tensor in a structure: its key, or keys and indices as in "heads/0".
        classes: how many there are, if that is known. It only chooses among several tensors.

    Raises:
        UserError: it does not take such images, nothing in its answer has a row of numbers for each
            image, several tensors may be meant, none has that `name`, or the numbers cannot be
            what is `wanted`.
    """
    seen = []
    reading = function = None
    widths = {1} if wanted.startswith("binary") else {classes} if classes else set()
    if classes == 2 and wanted == "auto":
        widths.add(1)
    own = getattr(network, "convention", None)
    with evaluation_mode(network), buffers_kept(network):
        for amplitude in _AMPLITUDES:
            some = images if amplitude == 1 else images[: max(2, len(images) // 4)]
            batch = (amplitude * some).detach()
            with torch.set_grad_enabled(reading is None):  # autograd tells what computed them
                answer = answer_of(network, batch.clone().requires_grad_(), role)
                if reading is None:
                    if isinstance(answer, Tensor) and name == getattr(own, "output_name", None):
                        name = None  # a program's only output
                    reading = _found(answer, len(batch), role, name, widths)
                    function = _last_function(reading.numbers(answer))
            seen.append((batch, reading.numbers(answer).detach()))
    assert reading is not None
    rows = torch.cat([numbers for _, numbers in seen])
    possible = _possible(rows)
    kind: OutputKind = _likeliest(possible, function) if wanted == "auto" else wanted
    doubts = reading.doubts
    if kind not in possible:
        raise UserError(
            f"--teacher-output says {kind}, which are {_MUST_BE[kind]}, but the {role} returns "
            f"{rows.shape[1]} for each image, from {rows.min():.3g} to {rows.max():.3g}"
        )
    unsure = "sigmoids" in possible and function is not _LINEAR
    if wanted == "auto" and kind == "logits" and unsure:
        doubts += (
            "they all lie between 0 and 1, as those of a sigmoid: if they are probabilities of "
            "classes that exclude each other, give --teacher-output sigmoids",
        )
    together = float(((rows > 0.5).sum(1) > 1).float().mean())
    return replace(reading, kind=kind, doubts=doubts, together=together, seen=tuple(seen))


def demand_logits(logits: Tensor) -> None:
    """Raises UserError if these numbers [N, K] of a teacher are not logits of two classes or more.
    Others between 0 and 1 only cause a warning: logits may lie there too."""
    possible, function = _possible(logits.detach()), _last_function(logits)
    kind = _likeliest(possible, function)
    if kind != "logits":
        raise UserError(
            f"the teacher returns {_WORDS[kind].format(logits.shape[1])}; the losses need logits: "
            "give FrozenTeacher a reading, dafl_fast.engine.outputs.reading_of(network, images)"
        )
    if "sigmoids" in possible and function is not _LINEAR:
        log.warning(
            "the teacher's outputs all lie between 0 and 1, as those of a sigmoid; the losses need "
            "logits"
        )


def tell_of_sigmoid(student: nn.Module, images: Tensor) -> None:
    """Warns of a student [N, C, H, W] -> [N, K] that ends in a sigmoid."""
    with evaluation_mode(student), buffers_kept(student), torch.enable_grad():
        if _last_function(student(images.clone())) is _SIGMOID:
            log.warning(
                "the student ends in a sigmoid, and its outputs are taken for logits; leave it "
                "out, an export can end in it"
            )


def demand_exclusive_classes(reading: Reading) -> None:
    """Raises UserError if a network's sigmoids are often above one half together, as those of
    labels that do not exclude each other."""
    if reading.kind == "sigmoids" and reading.together > 0.5:
        raise UserError(
            "the teacher's sigmoids are above one half for several classes at once, as those of "
            "labels that do not exclude each other, which cannot be distilled; give "
            "--teacher-output sigmoids if its classes do exclude each other"
        )


def convention_of(
    network: nn.Module, reading: Reading, image_shape: tuple[int, int, int]
) -> Convention:
    """What `network` takes and returns: its own attribute `convention`, if a reader of files has
    set one, and what was found out. A key under which its numbers are is the output's name."""
    own = getattr(network, "convention", None)
    named = next((str(key) for key in reversed(reading.path) if isinstance(key, str)), None)
    if not isinstance(own, Convention):
        own = Convention(output_name=reading.kind.replace("-", "_"))
    return replace(
        own,
        output_name=named or own.output_name,
        outputs=reading.kind,
        answer_shape=None if len(reading.shape) == 1 else reading.shape,
        image_shape=image_shape,
    )


def _found(
    answer: Any, count: int, role: str, name: str | None = None, widths: Collection[int] = ()
) -> Reading:
    """Where in an answer to `count` images the numbers are; their kind is still to be found."""
    fitting = candidates(answer, count)
    if not fitting:
        got = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        kind = f" of {answer.dtype}" if isinstance(answer, Tensor) else ""
        raise UserError(
            f"the {role} must return logits [N, C], got {got}{kind} for {count} images; taken are "
            "also probabilities, one number for each image, and a dict, tuple or object with them"
        )
    one, others = (named(fitting, name), "") if name else chosen(fitting, widths, role)
    doubts = (others,) if others else ()
    return Reading(path=one.path, shape=tuple(one.tensor.shape[1:]), doubts=doubts)


def _possible(numbers: Tensor) -> set[OutputKind]:
    """What the numbers [N, K] can be."""
    rows = numbers.float()
    rows = rows[rows.isfinite().all(1)]
    # Rounding changes the sum of K probabilities by at most half an epsilon of their dtype.
    near = max(1e-3, 4 * torch.finfo(numbers.dtype).eps)
    positive = len(rows) > 0 and bool((rows >= 0).all())
    unit = positive and bool((rows <= 1).all())
    if rows.shape[1] == 1:
        return {"binary-logit", "binary-probability"} if unit else {"binary-logit"}
    found: set[OutputKind] = {"logits", "sigmoids"} if unit else {"logits"}
    if positive and bool(((rows.sum(1) - 1).abs() < near).all()):
        found.add("probabilities")
    if len(rows) > 0 and bool((rows.logsumexp(1).abs() < near).all()):
        found.add("log-probabilities")
    return found


def _likeliest(possible: set[OutputKind], function: Squash | None) -> OutputKind:
    """The kind of numbers that `function` has computed."""
    if function is _LINEAR:
        return "logits" if "logits" in possible else "binary-logit"
    order: tuple[OutputKind, ...] = (
        "binary-probability", "binary-logit", "probabilities", "log-probabilities",
    )  # fmt: skip
    for kind in order:
        if kind in possible:
            return kind
    return "sigmoids" if "sigmoids" in possible and function is _SIGMOID else "logits"


def _last_function(numbers: Tensor) -> Squash | None:
    """The function that has computed a tensor, by what autograd recorded, if it is one of those
    above."""
    node = numbers.grad_fn
    while node is not None:
        for squash in (_SOFTMAX, _LOG_SOFTMAX, _SIGMOID, _LINEAR):
            if re.fullmatch(squash.backward + r"\d*", node.name()):
                return squash
        if not FORM.fullmatch(node.name()):
            return None
        node = node.next_functions[0][0]
    return None

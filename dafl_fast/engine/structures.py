"""Which tensor of the dict, tuple or object that a network returns holds its numbers?

Names tell it, the number of classes where that is given, and what is computed from what: a layer
turns an embedding into logits, and a softmax turns logits into probabilities.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import UserError

Path = tuple[str | int, ...]

# Words in the names of logits, from the surest on, and in those of other tensors.
_LIKELY = (
    re.compile(r"^logits?$"),
    re.compile(r"^(pred|score|prob|class|cls|label|softmax|y$|yhat)"),
    re.compile(r"^(outputs?|out|heads?|main|final|results?|answers?)$"),
)
_UNLIKELY = re.compile(
    "aux|feat|embed|hidden|pool|loss|attention|attn|repr|latent|backbone|trunk|stage|token|encod|"
    "proj|^emb|^neck|^stem|^state|^box|^mask|^map|^inter|^pre$|prelogit"
)
_OTHERS = re.compile("aux|^box|^mask|prelogit|^pre$")  # which have logits of their own
# What autograd records of code that changes the form of a tensor only, or hardly its values.
FORM = re.compile(
    "(View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|ToCopy|Alias|Clone|Select|Slice|Transpose|"
    r"Permute|T|Clamp\w*)Backward\d*"
)
# What it records of a layer with weights.
_LAYER = re.compile(
    r"(Addmm|Addmv|Mm|Mv|Bmm|Baddbmm|Linear|Cdist|EuclideanDist|\w*Convolution)Backward\d*"
)
_LISTED = 6  # tensors in a message


class Candidate(NamedTuple):
    """A tensor with a row of numbers for each image, and the keys that lead to it."""

    path: Path
    tensor: Tensor

    @property
    def width(self) -> int:
        return self.tensor[0].numel()

    def __str__(self) -> str:
        return f"{place(self.path)} {['N', *self.tensor.shape[1:]]}".replace("'", "")


def place(path: Path) -> str:
    """A path as messages name it."""
    return f"item {path[0]}" if len(path) == 1 and isinstance(path[0], int) else spelled(path)


def spelled(path: Path) -> str:
    """A path as it is typed: "logits", "1", "heads/main"."""
    return "/".join(map(str, path))


def candidates(answer: Any, count: int) -> list[Candidate]:
    """The tensors in an answer to `count` images that have a row of numbers for each."""
    return [
        Candidate(path, tensor)
        for path, tensor in _tensors(answer, ())
        if tensor.is_floating_point()
        and tensor.dim() > 0
        and len(tensor) == count
        and tensor[0].numel() == max((1, *tensor.shape[1:])) > 0
    ]


def named(found: list[Candidate], name: str) -> Candidate:
    """The one that `name` means, a whole path or the end of one; raises UserError if none does."""
    whole = [one for one in found if spelled(one.path) == name]
    fitting = whole or [one for one in found if f"/{spelled(one.path)}".endswith(f"/{name}")]
    if len(fitting) != 1:
        names = ", ".join(spelled(one.path) for one in fitting or found)
        wanted = f"one of {names}" if names else "left out where one tensor is returned"
        raise UserError(f"--teacher-output-name must be {wanted}, got {name!r}")
    return fitting[0]


def chosen(found: list[Candidate], widths: Collection[int], role: str) -> tuple[Candidate, str]:
    """The one that is meant most likely, and a sentence on the others, if there are any.

    Args:
        found: at least one.
        widths: how many numbers there can be for an image, if that is known.

    Raises:
        UserError: several of different widths are as likely.
    """
    fitting = [one for one in found if one.width in widths] or found
    standings = _standings(fitting)
    ranks = [(_rank(one, how), how) for one, how in zip(fitting, standings, strict=True)]
    best = [one for one, rank in zip(fitting, ranks, strict=True) if rank == min(ranks)]
    if len({one.width for one in best}) > 1:
        raise UserError(
            f"the {role} returns several tensors that could be its answer, {_listed(best)}: choose "
            "one with --teacher-output-name, or by --num-classes"
        )
    another = "--teacher-output-name chooses another"
    if len(best) > 1:
        return best[0], f"{_listed(best[1:], 'or')} could be meant too: {another}"
    others = [one for one in found if one is not best[0]]
    return best[0], f"{another}: {_listed(others, 'or')}" if others else ""


def nodes_behind(tensor: Tensor) -> dict[Any, bool]:
    """The nodes of autograd's graph that a tensor was computed by, its own among them; for each
    whether a layer with weights lies between."""
    found: dict[Any, bool] = {}
    ahead = [(tensor.grad_fn, False)]
    while ahead:
        node, crossed = ahead.pop()
        if node is None or found.get(node, -1) >= crossed:
            continue
        found[node] = crossed
        crossed = crossed or bool(_LAYER.fullmatch(node.name()))
        ahead += [(one, crossed) for one, _ in node.next_functions]
    return found


def _standings(found: list[Candidate]) -> list[int]:
    """For each tensor 2 if another has passed through all its layers and more, as logits through
    those of an embedding; 1 if it was made from another without a layer, as probabilities from
    logits; else 0. What comes straight out of a layer may itself be logits, from which others are
    made, as by a decoder: it counts as 0."""
    if len(found) == 1:
        return [0]
    nodes = [one.tensor.grad_fn for one in found]
    behind = [nodes_behind(one.tensor) for one in found]
    layers = [{node for node in each if _LAYER.fullmatch(node.name())} for each in behind]
    standings = []
    for own, mine, passed in zip(nodes, behind, layers, strict=True):
        inner = any(passed < more for more in layers) and not _is_from_a_layer(own)
        derived = any(mine.get(node) is False for node in nodes if node is not own)
        standings.append(2 if inner else 1 if derived else 0)
    return standings


def _is_from_a_layer(node: Any) -> bool:
    """Whether a layer has computed what has this node, but for its form."""
    while node is not None and FORM.fullmatch(node.name()):
        node = node.next_functions[0][0]
    return node is not None and bool(_LAYER.fullmatch(node.name()))


def _rank(one: Candidate, standing: int) -> float:
    """How early a tensor comes into question; 0 is first."""
    names = [re.sub("(?<=[a-z])(?=[A-Z])", "_", key) for key in one.path if isinstance(key, str)]
    words = [word for name in names for word in re.findall("[a-z]+", name.lower())]
    rank = float(len(_LIKELY))
    if "logits" in words and not any(map(_OTHERS.search, words)):
        rank = 0.0
    elif any(map(_UNLIKELY.search, words)):
        rank += 1
    else:
        likely = (index for index, kind in enumerate(_LIKELY) if any(map(kind.search, words)))
        rank = next(likely, rank)
    # A weak name counts less than what is computed from what, and a bare "score" may be the best
    # class's.
    return rank + 1.5 * (rank >= 2 and standing == 2) + 1.5 * (rank >= 1 and one.width == 1)


def _listed(some: list[Candidate], word: str = "and") -> str:
    texts = [str(one) for one in some[:_LISTED]]
    if len(some) > _LISTED:
        texts[-1:] = [f"{len(some) - _LISTED + 1} others"]
    return f" {word} ".join([*([", ".join(texts[:-1])] if texts[1:] else []), texts[-1]])


def _tensors(answer: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in a structure, and the path to it."""
    if isinstance(answer, Tensor):
        yield path, answer
        return
    parts: Any = ()
    if isinstance(answer, Mapping):
        parts = answer.items()
    elif dataclasses.is_dataclass(answer):
        parts = ((part.name, getattr(answer, part.name)) for part in dataclasses.fields(answer))
    elif isinstance(answer, tuple) and hasattr(answer, "_fields"):
        parts = zip(answer._fields, answer)
    elif isinstance(answer, (list, tuple)):
        parts = enumerate(answer)
    for key, part in parts:
        yield from _tensors(part, (*path, key))

"""The tables of the paper (Chen et al., ICCV 2019): what each row is and the accuracy it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["teacher", "ordinary", "kd", "noise", "alternative", "dafl"]
LOSSES = ("one_hot", "entropy", "activation")


@dataclass(frozen=True)
class Row:
    """A row of a table: what is run, and the accuracy that the paper has for it, in per cent."""

    label: str
    paper: float
    kind: Kind
    losses: tuple[str, ...] = LOSSES
    """Those of `LOSSES` that train the generator, with the recipe's weights."""


@dataclass(frozen=True)
class Table:
    """A table of the paper: the preset with its networks, and the rows by their names."""

    title: str
    preset: str
    rows: dict[str, Row]


_LABELS: dict[Kind, str] = {
    "teacher": "teacher",
    "ordinary": "student, ordinary training",
    "kd": "student, KD on real data",
    "noise": "student, normal noise",
    "alternative": "student, alternative data",
    "dafl": "student, DAFL",
}


def _comparison(*paper: float) -> dict[str, Row]:
    rows = zip(_LABELS.items(), paper, strict=True)
    return {kind: Row(label, accuracy, kind) for (kind, label), accuracy in rows}


def _ablation(**paper: float) -> dict[str, Row]:
    rows = {}
    for name, accuracy in paper.items():
        losses = tuple(loss for loss in LOSSES if loss in name or name == "all")
        label = " + ".join(loss.replace("_", "-") for loss in losses)
        rows[name.replace("_", "-")] = Row(
            label or "none (generator as drawn)", accuracy, "dafl", losses
        )
    return rows


TABLES = {
    "mnist": Table("MNIST", "mnist", _comparison(98.91, 98.65, 98.91, 88.01, 94.56, 98.20)),
    "hintonnet": Table("MNIST", "hintonnet", _comparison(98.39, 98.11, 98.39, 87.58, 93.99, 97.91)),
    "ablation": Table(
        "Generator losses on MNIST",
        "mnist",
        _ablation(
            none=88.01, one_hot=78.77, entropy=88.14, activation=15.95, one_hot_activation=42.07,
            one_hot_entropy=97.25, entropy_activation=95.53, all=98.20,
        ),
    ),
    "cifar10": Table("CIFAR-10", "cifar10", _comparison(95.58, 93.92, 94.34, 14.89, 90.65, 92.22)),
    "cifar100": Table(
        "CIFAR-100", "cifar100", _comparison(77.84, 76.53, 76.87, 1.44, 69.88, 74.47)
    ),
}  # fmt: skip

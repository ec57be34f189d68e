"""Every operator, on tensors between pages that nobody may touch: it reads nothing outside, and
gives the same values as on ordinary memory, with every instruction set and odd shapes.

`make sanitize-cpu` runs these tests too: AddressSanitizer then also sees what is written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dafl_fast import build_info

from .guarded import guarded
from .operator_calls import Sizes, good_calls, results_of

# Around the widths of vectors and of the losses' two regimes (32 classes), and of panels and tiles.
SIZES = [
    Sizes(1, 1, 1, 1, 1, 1, 1, 2),
    Sizes(15, 9, 3, 1, 3, 1, 7, 6),
    Sizes(16, 10, 16, 3, 5, 2, 2, 3),
    Sizes(17, 31, 17, 17, 1, 3, 6, 6),
    Sizes(33, 32, 5, 2, 16, 17, 5, 9),
    Sizes(2, 33, 0, 1, 17, 16, 1, 1),
    Sizes(3, 100, 7, 5, 2, 5, 9, 8),
    Sizes(65, 3, 2, 4, 33, 4, 3, 17),
    Sizes(0, 5, 2, 0, 3, 4, 6, 6),
    Sizes(4, 131, 130, 2, 0, 3, 4, 4),
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]


def with_gaps(x: Tensor) -> Tensor:
    """The same values, of which every second element of the last dimension is nobody's."""
    gaps = torch.empty(*x.shape, 2, dtype=x.dtype)[..., 0] if x.dim() else x.clone()
    return gaps.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The same values, with the first dimension last in memory."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() > 1 else x


def shifted(x: Tensor) -> Tensor:
    """The same values, with rows that begin one element later than the one before ends."""
    return torch.cat([x, x[..., :1]], -1)[..., :-1] if x.dim() and x.numel() else x


def no_stride(x: Tensor) -> Tensor:
    """The same values, with strides that lead far away where there is nothing to step to."""
    strides = [
        10**6 * (i + 1) if n == 1 else s for i, (n, s) in enumerate(zip(x.shape, x.stride()))
    ]
    return x.as_strided(x.shape, strides) if x.numel() else x


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "gaps": with_gaps,
    "transposed": transposed,
    "shifted": shifted,
    "strides of nothing": no_stride,
}


def all_cases() -> Iterator[tuple[str, str, list[Any]]]:
    """(name, operator, arguments) on ordinary memory."""
    for at, sizes in enumerate(SIZES):
        for dtype, other in (DTYPES[0], *DTYPES[1 + at % 2 :: 2]):
            for operator, arguments in good_calls(sizes, dtype, other).items():
                name = f"{operator}, {tuple(sizes)}, {dtype} and {other}"
                yield name, operator, arguments


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    return all(
        x.dtype == y.dtype and torch.allclose(x, y, tolerance, tolerance, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def changed(arguments: list[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
    return [change(one) if isinstance(one, Tensor) else one for one in arguments]


def child() -> None:
    """Prints a line of JSON for each case before it runs, and one with those that gave something
    else than on ordinary memory with the same strides (the order of sums may depend on them)."""
    calls, wrong = 0, []
    for name, operator, arguments in all_cases():
        print(json.dumps(name), flush=True)
        dense = results_of(operator, arguments)
        for form, change in FORMS.items():
            strided = changed(arguments, change)
            expected = results_of(operator, strided)
            if not close(expected, dense, 1e-5):
                wrong.append(f"{name}, {form} and dense differ")
            for at_end in (True, False):
                calls += 1
                results = results_of(operator, changed(strided, lambda x: guarded(x, at_end)))  # noqa: B023
                if not close(results, expected, 0):
                    wrong.append(f"{name}, {form}, {'end' if at_end else 'beginning'}")
    print(json.dumps({"calls": calls, "wrong": wrong}), flush=True)


@pytest.mark.parametrize("isa", build_info()["isa_available"])
def test_operators_read_nothing_outside_their_tensors(isa: str) -> None:
    if os.environ.get("DAFL_FAST_ISA", isa) != isa:
        pytest.skip("this whole run is on another instruction set")
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_memory import child; child()"],
        env={**os.environ, "DAFL_FAST_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, f"{last} ended the process: {done.stderr[-3000:]}"
    assert last["wrong"] == []
    assert last["calls"] > 4000


def test_a_guard_ends_the_process() -> None:
    """The test above can fail: reading one element too many, at either end, is a fault."""
    for at_end, at in ((True, 10), (False, -1)):
        read = (
            "import torch, ctypes; from tests.guarded import guarded; "
            f"x = guarded(torch.ones(10), {at_end}); assert x.sum() == 10; "
            f"ctypes.c_float.from_address(x.data_ptr() + {4 * at}).value"
        )
        done = subprocess.run([sys.executable, "-c", read], capture_output=True, timeout=60)
        assert done.returncode != 0 and b"Assertion" not in done.stderr

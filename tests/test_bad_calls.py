"""Operators called with what does not fit: each refuses in one sentence, and none reads or writes
outside its tensors.

The bad calls are made from the operators' schemas: each tensor argument in turn gets another
shape, dtype or device. They run in a process of their own, which a fault would end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dafl_fast.losses import distill_loss, generator_loss

OPS = torch.ops.dafl_fast
WEIGHTS = (1.0, 5.0, 0.1, 10.0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def good_calls() -> dict[str, list[Any]]:
    """For each operator, arguments that fit."""
    t, f, s, one = randn(6, 40), randn(6, 4), randn(6, 40) + 1, torch.ones(())
    *_, row_stats, class_mean = OPS.generator_loss(t, f, *WEIGHTS)
    distilled = OPS.distill_loss(s, t, 2.0, True)[3]
    x, large = randn(2, 3, 6, 6), randn(2, 3, 8, 8)
    five, three, bias = randn(4, 3, 5, 5), randn(4, 3, 3, 3), randn(4)
    pooled, index = OPS.conv_pool(large, five, bias)
    mean, variance = OPS.moments(x)
    norm, settings = (mean, variance, randn(3), randn(3) + 1), (1e-5, 0.2)
    factors = OPS.conv3x3_factors(three, torch.float32, True)
    same, double = randn(2, 4, 6, 6), randn(2, 4, 12, 12)
    return {
        "generator_loss": [t, f, *WEIGHTS],
        "generator_loss_backward": [one, t, f, row_stats, class_mean, *WEIGHTS],
        "distill_loss": [s, t, 2.0, True],
        "distill_loss_backward": [one, s, t, distilled, 2.0, True],
        "dafl_losses": [t, f, s, *WEIGHTS, 2.0, True],
        "conv_pool": [large, five, bias],
        "conv_pool_backward": [pooled, large, five, bias, index, True, True],
        "moments": [x],
        "norm_activation": [x, *norm, *settings],
        "norm_activation_backward": [x, x, *norm, *settings],
        "norm_image_conv": [x, *norm, *settings, three, bias],
        "norm_image_conv_backward": [same, x, *norm, *settings, three, bias],
        "upsample_conv": [x, three],
        "upsample_conv_backward": [double, x, three],
        "conv3x3": [x, three, bias, *factors],
        "conv3x3_factors": [three, torch.float32, True],
        "conv3x3_outputs": [x, factors[0], bias, 4],
        "conv3x3_weight_grad": [same, x, three],
    }


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one more": lambda t: torch.zeros([n + 1 for n in t.shape] or [2], dtype=t.dtype),
    "empty": lambda t: torch.empty([0] * max(t.dim(), 1), dtype=t.dtype),
    "rank": lambda t: t.unsqueeze(0).unsqueeze(0),
    "bool": lambda t: t.bool(),
    "meta": lambda t: t.to("meta"),
    "half": lambda t: t.half(),
}
# Arguments that are read as they are; others may be of any floating point dtype.
EXACT = {
    "row_stats", "class_mean", "mean", "variance", "index", "factors", "forward_factors",
    "backward_factors",
}  # fmt: skip
# Changes after which a call still fits.
FITS = {
    ("generator_loss_backward", "grad_total", "rank"),  # one number in any shape
    ("distill_loss_backward", "grad_total", "rank"),
    # Without another tensor there is none to differ from.
    ("moments", "x", "meta"),
    ("moments", "x", "one more"),
    ("conv3x3_factors", "weight", "meta"),
    ("conv3x3", "backward_factors", "empty"),  # as made for no gradient
    ("conv3x3_outputs", "x", "one more"),  # factors are padded to several channels
}


def bad_calls() -> Iterator[tuple[str, str, str, list[Any]]]:
    """(operator, argument, change, arguments)"""
    for operator, arguments in good_calls().items():
        for at, argument in enumerate(getattr(OPS, operator).default._schema.arguments):
            if not isinstance(arguments[at], Tensor):
                continue
            for change, changed in CHANGES.items():
                if change == "half" and argument.name not in EXACT:
                    continue
                if (operator, argument.name, change) not in FITS:
                    bad = list(arguments)
                    bad[at] = changed(bad[at])
                    yield operator, argument.name, change, bad


def with_argmax(value: float) -> None:
    arguments = good_calls()["generator_loss_backward"]
    arguments[3][2, 4] = value
    OPS.generator_loss_backward(*arguments)


def with_halves(operator: str) -> None:
    """The backward pass when what is saved for it comes back in half precision."""
    arguments = [
        one.requires_grad_()
        if isinstance(one, Tensor) and name.name not in (EXACT | {"teacher_logits"})
        else one
        for one, name in zip(
            good_calls()[operator], getattr(OPS, operator).default._schema.arguments
        )
    ]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.half(), lambda x: x):
        result = getattr(OPS, operator)(*arguments)
    (result if isinstance(result, Tensor) else result[0]).sum().backward()


DIFFERENTIABLE = [
    "generator_loss", "distill_loss", "conv_pool", "norm_activation", "norm_image_conv",
    "upsample_conv", "conv3x3",
]  # fmt: skip


def all_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for operator, name, change, arguments in bad_calls():
        call = getattr(OPS, operator)
        yield f"{operator}, {name}, {change}", lambda c=call, a=arguments: c(*a)
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        if change != "meta":
            yield f"{operator}, {name}, {change}, on meta", lambda c=call, a=meta: c(*a)
    for value in (1e9, -1.0, 40.0, float("nan"), float("inf")):
        yield f"argmax {value}", lambda v=value: with_argmax(v)
    yield "factors for bool", lambda: OPS.conv3x3_factors(randn(4, 3, 3, 3), torch.bool, True)
    yield "channels", lambda: OPS.conv3x3_outputs(*good_calls()["conv3x3_outputs"][:3], -4)
    for operator in DIFFERENTIABLE:
        yield f"{operator}, saved in half", lambda o=operator: with_halves(o)


def child() -> None:
    """Prints a line of JSON for each case before it runs, and one with what was raised."""
    for name, run in all_cases():
        print(json.dumps([name]), flush=True)
        try:
            run()
            raised = None
        except Exception as error:
            raised = [type(error).__name__, str(error)]
        print(json.dumps([name, raised]), flush=True)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_bad_calls import child; child()"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1]} ended the process: {done.stderr[-500:]}"
    return {line[0]: line[1] for line in lines if len(line) == 2}


def is_one_sentence(message: str) -> bool:
    return "\n" not in message and ". " not in message and len(message) < 300


def test_every_operator_is_called() -> None:
    known = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dafl_fast::")
    }
    assert known == set(good_calls())
    for operator, arguments in good_calls().items():
        getattr(OPS, operator)(*arguments)


@pytest.mark.parametrize("operator", list(good_calls()))
def test_bad_calls_are_refused(outcomes: dict[str, Any], operator: str) -> None:
    names = [a.name for a in getattr(OPS, operator).default._schema.arguments]
    cases = {key: raised for key, raised in outcomes.items() if key.startswith(f"{operator}, ")}
    assert len(cases) >= 4
    for key, raised in cases.items():
        if key.endswith("saved in half"):
            continue
        assert raised is not None, f"{key}: accepted"
        kind, message = raised
        assert kind in ("ValueError", "TypeError"), (key, raised)
        name = key.split(", ")[1]
        mentioned = [name] if name in EXACT or name.startswith("grad") else names
        assert any(one in message for one in mentioned), (key, raised)
        assert is_one_sentence(message), (key, raised)


def test_changes_that_fit_are_accepted() -> None:
    calls = good_calls()
    for operator, name, change in FITS:
        schema = getattr(OPS, operator).default._schema
        arguments = [
            CHANGES[change](value) if argument.name == name else value
            for argument, value in zip(schema.arguments, calls[operator])
        ]
        getattr(OPS, operator)(*arguments)


@pytest.mark.parametrize("value", ["1000000000.0", "-1.0", "40.0", "nan", "inf"])
def test_an_argmax_that_is_no_class_is_refused(outcomes: dict[str, Any], value: str) -> None:
    kind, message = outcomes[f"argmax {value}"]
    assert kind == "ValueError" and "row_stats" in message and is_one_sentence(message)


def test_settings_that_decide_sizes_are_refused(outcomes: dict[str, Any]) -> None:
    assert outcomes["factors for bool"][0] == "TypeError"
    assert "dtype must be" in outcomes["factors for bool"][1]
    assert outcomes["channels"][0] == "ValueError" and "channels" in outcomes["channels"][1]


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_what_was_saved_in_half_precision_is_not_misread(
    outcomes: dict[str, Any], operator: str
) -> None:
    raised = outcomes[f"{operator}, saved in half"]
    if operator == "upsample_conv":  # reads only what it converts itself
        assert raised is None
    else:
        assert raised is not None and raised[0] in ("ValueError", "TypeError"), raised
        assert is_one_sentence(raised[1]), raised


# ---- Transformations ----------------------------------------------------------------------------


def losses_of(t: Tensor, f: Tensor, s: Tensor) -> tuple[Callable[..., Tensor], ...]:
    return (
        lambda t: generator_loss(t).total,
        lambda f: generator_loss(t, f).total,
        lambda s: distill_loss(s, t).total,
        lambda t: distill_loss(s, t).total,
    )


def test_forward_mode_is_refused() -> None:
    calls = good_calls()
    t, f, s = randn(6, 10), randn(6, 4), randn(6, 10) + 1
    for function, x in zip(losses_of(t, f, s), (t, f, s, t)):
        with pytest.raises(NotImplementedError, match="_loss has no forward-mode derivative"):
            torch.func.jvp(function, (x,), (x,))
        with pytest.raises(NotImplementedError, match="forward-mode"), forward_ad.dual_level():
            function(forward_ad.make_dual(x, x))
    for operator in calls:
        arguments = list(calls[operator])
        for at, value in enumerate(calls[operator]):
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                continue
            for grad in (True, False):
                with torch.set_grad_enabled(grad), forward_ad.dual_level():
                    dual = forward_ad.make_dual(value, torch.ones_like(value))
                    with pytest.raises(NotImplementedError, match="forward"):
                        getattr(OPS, operator)(*arguments[:at], dual, *arguments[at + 1 :])


def test_a_tangent_that_meets_the_backward_pass_is_refused() -> None:
    t, s = randn(6, 10), (randn(6, 10) + 1).requires_grad_()
    for loss, x in ((distill_loss(s, t).total, s), (generator_loss(s).total, s)):
        with forward_ad.dual_level():
            factor = forward_ad.make_dual(torch.tensor(2.0), torch.tensor(1.0))
            with pytest.raises(NotImplementedError, match="forward AD"):
                torch.autograd.grad(loss * factor, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functorch_gives_the_same_values_and_gradients() -> None:
    many = randn(3, 6, 10)
    t = randn(6, 10)

    def expected(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = many.clone().requires_grad_()
        values = torch.stack([function(one) for one in x])
        values.sum().backward()
        assert x.grad is not None
        return values.detach(), x.grad

    for function in (lambda x: generator_loss(x).total, lambda x: distill_loss(x, t).total):
        values, grads = expected(function)
        assert torch.equal(torch.vmap(function)(many), values)
        assert torch.equal(torch.vmap(torch.func.grad(function))(many), grads)
        x = many.clone().requires_grad_()
        torch.vmap(function)(x).sum().backward()
        assert torch.equal(x.grad, grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    teacher = randn(6, 10)

    def generate(t: Tensor, f: Tensor) -> Tensor:
        return generator_loss(t.sin(), f.sin()).total

    def distil(s: Tensor) -> Tensor:
        return distill_loss(s.sin(), teacher).total

    grads = []
    for keep in (True, False):
        inputs = [randn(6, 10).requires_grad_(), randn(6, 4).requires_grad_()]
        student = (randn(6, 10) + 1).requires_grad_()
        if keep:
            loss = generate(*inputs) + distil(student)
        else:
            loss = checkpoint(generate, *inputs, use_reentrant=reentrant)
            loss = loss + checkpoint(distil, student, use_reentrant=reentrant)
        loss.backward()
        grads.append([x.grad for x in (*inputs, student)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

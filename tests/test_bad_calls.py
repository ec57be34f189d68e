"""Operators called with what does not fit: each refuses in one sentence, and none reads or writes
outside its tensors.

The bad calls are made from the operators' schemas: each tensor argument in turn gets another
shape, dtype or device. They run in a process of their own, which a fault would end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dafl_fast.losses import dafl_losses, distill_loss, generator_loss
from dafl_fast.models.functional import with_moments
from tests.operator_calls import OPS, good_calls, randn, results_of


def freed(t: Tensor) -> Tensor:
    """A tensor that has lost its memory, as FSDP's have between layers."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def cut(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "one more": lambda t: torch.zeros([n + 1 for n in t.shape] or [2], dtype=t.dtype),
    "empty": lambda t: torch.empty([0] * max(t.dim(), 1), dtype=t.dtype),
    "rank": lambda t: t.unsqueeze(0).unsqueeze(0),
    "one number": lambda t: torch.zeros((), dtype=t.dtype),
    "bool": lambda t: t.bool(),
    "int64": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "half": lambda t: t.half(),
    "double": lambda t: t.double(),
    "none": lambda t: None,
    "sparse": lambda t: (t if t.dim() else t.reshape(1)).to_sparse(),
    "sparse rows": lambda t: t.reshape(len(t) if t.dim() else 1, -1).to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "freed": freed,
    "cut": cut,
}
# Those of which there is no tensor on the meta device, or no other than one that fits.
NOT_ON_META = {"meta", "none", "sparse", "sparse rows", "quantised", "nested", "freed", "cut"}
# Arguments that are read as they are; others may be of any floating point dtype.
EXACT = {
    "row_stats", "class_mean", "mean", "variance", "index", "factors", "forward_factors",
    "backward_factors",
}  # fmt: skip
# Changes after which a call still fits.
FITS = {
    ("generator_loss_backward", "grad_total", "rank"),  # one number in any shape
    ("distill_loss_backward", "grad_total", "rank"),
    ("generator_loss_backward", "grad_total", "one number"),
    ("distill_loss_backward", "grad_total", "one number"),
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
                if change in ("half", "double") and argument.name not in EXACT:
                    continue
                if change == "none" and str(argument.type).startswith("Optional"):
                    continue
                if (operator, argument.name, change) not in FITS:
                    bad = list(arguments)
                    bad[at] = changed(bad[at])
                    yield operator, argument.name, change, bad


# Numbers that no setting may have, and more for those with a bound.
NUMBERS = {name: (float("nan"), float("inf"), -float("inf")) for name in
           ("one_hot", "entropy", "activation", "log_base", "temperature", "eps")}  # fmt: skip
NUMBERS["log_base"] += (1.0, 0.0, -10.0)
NUMBERS["temperature"] += (0.0, -1.0)
NUMBERS["eps"] += (-1.0,)


def bad_numbers() -> Iterator[tuple[str, str, float, list[Any]]]:
    for operator, arguments in good_calls().items():
        for at, argument in enumerate(getattr(OPS, operator).default._schema.arguments):
            for number in NUMBERS.get(argument.name, ()):
                yield operator, argument.name, number, [
                    *arguments[:at], number, *arguments[at + 1 :]
                ]  # fmt: skip


def with_argmax(value: float) -> None:
    arguments = good_calls()["generator_loss_backward"]
    arguments[3][2, 4] = value
    OPS.generator_loss_backward(*arguments)


def with_index(value: int) -> None:
    arguments = good_calls()["conv_pool_backward"]
    arguments[4][7] = value
    OPS.conv_pool_backward(*arguments)


DIFFERENTIABLE = [
    "generator_loss", "distill_loss", "conv_pool", "norm_activation", "norm_image_conv",
    "upsample_conv", "conv3x3",
]  # fmt: skip


# What a hook may do to the tensors that are saved for the backward pass.
SAVED: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "double": lambda t: t.double(),
    "integers": lambda t: t.int(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "freed": freed,
    "empty": lambda t: t.new_empty([0] * t.dim()),
    "one row": lambda t: t[:1],
    "another row": lambda t: torch.cat([t, t[:1]]) if t.dim() else t,
    "flat": lambda t: t.flatten(),
    "turned": lambda t: t.movedim(0, -1),
}


def gradients_of(operator: str, hook: Callable[[Tensor], Tensor]) -> list[Tensor]:
    constant = EXACT | ({"teacher_logits"} if operator == "distill_loss" else set())
    arguments = [
        value.clone().requires_grad_()
        if isinstance(value, Tensor) and argument.name not in constant
        else value
        for argument, value in zip(
            getattr(OPS, operator).default._schema.arguments, good_calls()[operator]
        )
    ]
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
        result = results_of(operator, arguments)[0]
    wanted = [one for one in arguments if isinstance(one, Tensor) and one.requires_grad]
    return list(torch.autograd.grad(result.square().sum(), wanted))


def with_saved(operator: str, change: str) -> None:
    """The backward pass when what is saved for it comes back changed: right, or refused."""
    expected = gradients_of(operator, lambda t: t)
    for one, other in zip(gradients_of(operator, SAVED[change]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * other.abs().max().item())


def all_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for operator, name, change, arguments in bad_calls():
        call = getattr(OPS, operator)
        yield f"{operator}, {name}, {change}", lambda c=call, a=arguments: c(*a)
        if change not in NOT_ON_META:
            meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
            yield f"{operator}, {name}, {change}, on meta", lambda c=call, a=meta: c(*a)
    for operator, name, number, arguments in bad_numbers():
        call = getattr(OPS, operator)
        yield f"{operator}, {name}, {number}", lambda c=call, a=arguments: c(*a)
    for value in (1e9, -1.0, 40.0, float("nan"), float("inf")):
        yield f"argmax {value}", lambda v=value: with_argmax(v)
    for value in (5, 255):
        yield f"index {value}", lambda v=value: with_index(v)
    yield "factors for bool", lambda: OPS.conv3x3_factors(randn(4, 3, 3, 3), torch.bool, True)
    for channels in (-4, 2**31, 2**60, 2**63 - 1):
        yield (
            f"channels {channels}",
            lambda c=channels: OPS.conv3x3_outputs(*good_calls()["conv3x3_outputs"][:3], c),
        )
    for operator in DIFFERENTIABLE:
        for change in SAVED:
            yield f"saved, {operator}, {change}", lambda o=operator, c=change: with_saved(o, c)


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
    channels = [raised for key, raised in outcomes.items() if key.startswith("channels ")]
    assert len(channels) == 4
    for kind, message in channels:
        assert kind == "ValueError" and "channels must be" in message
    for value in (5, 255):
        kind, message = outcomes[f"index {value}"]
        assert kind == "ValueError" and "index must be" in message and is_one_sentence(message)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_what_was_saved_and_comes_back_changed_is_not_misread(
    outcomes: dict[str, Any], operator: str
) -> None:
    cases = {k: raised for k, raised in outcomes.items() if k.startswith(f"saved, {operator}, ")}
    assert len(cases) == len(SAVED)
    for key, raised in cases.items():
        assert raised is None or raised[0] in ("ValueError", "TypeError", "RuntimeError")
        assert raised is None or is_one_sentence(raised[1]), (key, raised)


@pytest.mark.parametrize("bad", [None, 1.0, "x", [1, 2], randn(3).numpy()], ids=lambda x: type(x))
def test_the_losses_name_what_is_no_tensor(bad: Any) -> None:
    t = randn(6, 10)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("teacher_logits", lambda: generator_loss(bad)),
        ("student_logits", lambda: distill_loss(bad, t)),
        ("teacher_logits", lambda: distill_loss(t, bad)),
        ("teacher_logits", lambda: dafl_losses(bad, None, t)),
        ("student_logits", lambda: dafl_losses(t, t, bad)),
    ]
    if bad is not None:
        calls += [("features", lambda: generator_loss(t, bad)),
                  ("features", lambda: dafl_losses(t, bad, t))]  # fmt: skip
    for name, call in calls:
        with pytest.raises(TypeError, match=f"^{name} must be a tensor, got {type(bad).__name__}$"):
            call()


@pytest.mark.parametrize("bad", [None, "1.0", [1.0], 10**400], ids=lambda x: type(x))
def test_the_losses_name_what_is_no_number(bad: Any) -> None:
    t = randn(6, 10)
    for name, call in (
        ("one_hot", lambda: generator_loss(t, one_hot=bad)),
        ("log_base", lambda: generator_loss(t, log_base=bad)),
        ("temperature", lambda: distill_loss(t, t, temperature=bad)),
        ("temperature", lambda: dafl_losses(t, None, t, temperature=bad)),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be a number"):
            call()


# The same values in other clothes.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda t: torch._neg_view(-t),
    "half of another": lambda t: torch.stack([t, t], -1)[..., 0],
    "inference": lambda t: inference_copy(t),
    "requires grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "expanded": lambda t: t.expand(2, *t.shape)[1],
}


def inference_copy(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


@pytest.mark.parametrize("view", VIEWS)
def test_other_kinds_of_tensors_give_the_same_values(view: str) -> None:
    for operator, arguments in good_calls().items():
        expected = results_of(operator, arguments)
        schema = getattr(OPS, operator).default._schema
        for at, argument in enumerate(schema.arguments):
            constant = argument.name in EXACT | {"teacher_logits"} and "backward" not in operator
            if not isinstance(arguments[at], Tensor) or (constant and "grad" in view):
                continue
            seen = [*arguments[:at], VIEWS[view](arguments[at]), *arguments[at + 1 :]]
            for one, other in zip(results_of(operator, seen), expected, strict=True):
                torch.testing.assert_close(one.detach(), other, rtol=1e-5, atol=1e-6)


def test_zeros_without_memory_are_zeros() -> None:
    for operator, arguments in good_calls().items():
        for at, one in enumerate(arguments):
            if not isinstance(one, Tensor):
                continue
            zeros, none = torch.zeros_like(one), torch._efficientzerotensor(one.shape)
            results = [
                results_of(operator, [*arguments[:at], zero, *arguments[at + 1 :]])
                for zero in (zeros, none.to(one.dtype))
            ]
            for one_result, other in zip(*results, strict=True):
                torch.testing.assert_close(one_result, other, rtol=0, atol=0, equal_nan=True)


def test_no_channels_and_very_many_of_them_take_no_time() -> None:
    for size in ((2**40, 0, 3, 3), (0, 2**40, 3, 3), (2**63 - 1, 0, 3, 3)):
        factors = OPS.conv3x3_factors(torch.empty(size), torch.float32, True)
        assert [one.numel() for one in factors] == [0, 0]


def test_very_many_images_without_channels_take_no_time() -> None:
    many, none = torch.empty(2**40, 0, 6, 6), torch.empty(0)
    three, five = torch.empty(0, 0, 3, 3), torch.empty(0, 0, 5, 5)
    pooled, doubled = torch.empty(2**40, 0, 1, 1), torch.empty(2**40, 0, 12, 12)
    norm = (none, none, none, none, 1e-5, 0.2)
    for operator, arguments in {
        "norm_activation": [many, *norm],
        "norm_activation_backward": [many, many, *norm],
        "norm_image_conv": [many, *norm, three, none],
        "norm_image_conv_backward": [many, many, *norm, three, none],
        "upsample_conv": [many, three],
        "upsample_conv_backward": [doubled, many, three],
        "conv3x3": [many, three, none, None, None],
        "conv3x3_outputs": [many, none, None, 0],
        "conv3x3_weight_grad": [many, many, three],
        "conv_pool": [many, five, none],
        "conv_pool_backward": [pooled, many, five, none, none.byte(), True, True],
    }.items():
        assert all(result.numel() == 0 for result in results_of(operator, arguments)), operator


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


def layers() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """The differentiable layers as functions of what has a gradient."""
    calls = good_calls()

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return OPS.norm_activation(x, *OPS.moments(x.detach()), weight, bias, 1e-5, 0.2)

    def to_image(x: Tensor, weight: Tensor, bias: Tensor, *conv: Tensor) -> Tensor:
        moments = OPS.moments(x.detach())
        return OPS.norm_image_conv(x, *moments, weight, bias, 1e-5, 0.2, *conv)

    x, _, _, weight, bias, _, _, three, last = calls["norm_image_conv"]
    return {
        "conv_pool": (lambda *a: OPS.conv_pool(*a)[0], calls["conv_pool"]),
        "norm_activation": (norm, [x, weight, bias]),
        "norm_image_conv": (to_image, [x, weight, bias, three, last]),
        "upsample_conv": (lambda *a: OPS.upsample_conv(*a)[0], calls["upsample_conv"]),
        "conv3x3": (lambda *a: OPS.conv3x3(*a, None, None), [x, three, last]),
    }


@pytest.mark.parametrize("name", layers())
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_layers_in_transformations_are_right_or_refused(name: str) -> None:
    function, arguments = layers()[name]
    arguments = [one.clone().requires_grad_() for one in arguments]
    y = function(*arguments)
    upstream = randn(3, *y.shape)
    expected = [torch.autograd.grad(y, arguments, one, retain_graph=True) for one in upstream]
    batched = torch.autograd.grad(y, arguments, upstream, is_grads_batched=True)
    for at, x in enumerate(arguments):
        one_by_one = torch.stack([grads[at] for grads in expected])
        torch.testing.assert_close(batched[at], one_by_one)

        def of(x: Tensor, at: int = at) -> Tensor:
            plain = [one.detach() for one in arguments]
            return function(*plain[:at], x, *plain[at + 1 :])

        x = x.detach()
        many = torch.stack([x, x + 1, -x])
        expected_values = torch.stack([of(one) for one in many])
        torch.testing.assert_close(torch.vmap(of)(many), expected_values)
        assert torch.equal(torch.func.functionalize(of)(x), of(x))
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
            with pytest.raises((RuntimeError, NotImplementedError)):
                transform(lambda x: of(x).square().sum())(x)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(of, (x,), (x,))


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_in_activation_checkpointing_give_the_same_gradients(
    name: str, reentrant: bool
) -> None:
    function, arguments = layers()[name]
    arguments = [one.clone().requires_grad_() for one in arguments]
    expected = torch.autograd.grad(function(*arguments).square().sum(), arguments)
    checkpoint(function, *arguments, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(x.grad, grad) for x, grad in zip(arguments, expected, strict=True))


@pytest.mark.parametrize("name", layers())
def test_a_penalty_on_a_gradient_is_refused(name: str) -> None:
    """It needs second derivatives, by the parameters too: none may be missing in silence."""
    function, arguments = layers()[name]
    for x, parameter in ((0, 0), (0, 1), (1, 0)):
        inputs = [one.clone().requires_grad_(at in (x, parameter))
                  for at, one in enumerate(arguments)]  # fmt: skip
        y = function(*inputs)
        (grad,) = torch.autograd.grad(y.square().sum(), inputs[x], create_graph=True)
        with pytest.raises(RuntimeError, match="derivative"):
            torch.autograd.grad(y.sum() + grad.square().sum(), inputs[parameter])
        # Where the gradient that goes in is a constant, as of a critic's output.
        y = function(*inputs)
        (grad,) = torch.autograd.grad(y.sum(), inputs[x], create_graph=True)
        if x == parameter and name == "conv3x3":
            continue  # linear: the second derivative is 0
        with pytest.raises(RuntimeError, match="derivative"):
            torch.autograd.grad(y.sum() + grad.square().sum(), inputs[parameter])


def test_what_has_no_gradient_must_not_require_one() -> None:
    calls = good_calls()
    for operator, name in (
        ("norm_activation", "mean"), ("norm_activation", "variance"),
        ("norm_image_conv", "mean"), ("norm_image_conv", "variance"),
        ("conv3x3", "forward_factors"), ("conv3x3", "backward_factors"),
        ("distill_loss", "teacher_logits"),
    ):  # fmt: skip
        schema = getattr(OPS, operator).default._schema
        arguments = [
            value.clone().requires_grad_() if argument.name == name else value
            for argument, value in zip(schema.arguments, calls[operator])
        ]
        with pytest.raises(ValueError, match=f"{name} must not require grad"):
            getattr(OPS, operator)(*arguments)
        with torch.no_grad():
            getattr(OPS, operator)(*arguments)


def test_moments_have_a_second_derivative_that_is_right() -> None:
    """Their gradient is a norm without moments of its own, which the norm's operator has not."""
    x = randn(4, 3, 5, 5).double().requires_grad_()

    def plain(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x, [0, 2, 3], correction=0)
        return x, mean, variance

    seconds = []
    for moments in (with_moments, plain):
        y, mean, variance = moments(x)
        loss = y.square().sum() + mean.pow(3).sum() + variance.square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        seconds += torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(*seconds)


def main() -> None:
    """How many calls are made here, and how they end: `python -m tests.test_bad_calls`."""
    ends: Counter[str] = Counter()
    for _, run in all_cases():
        try:
            run()
            ends["accepted"] += 1
        except Exception as error:
            ends[type(error).__name__] += 1
    print(f"{ends.total()} calls: {dict(ends)}")


if __name__ == "__main__":
    main()

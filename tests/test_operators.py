"""The losses as PyTorch operators: opcheck, torch.compile, fake tensors, autocast, overhead."""

import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dafl_fast import reference
from dafl_fast.losses import _C, DistillLoss, GeneratorLoss, distill_loss, generator_loss

OPS = torch.ops.dafl_fast
WEIGHTS = tuple(map(float, reference.generator_loss.__kwdefaults__.values()))


def randn(*shape, seed=0, dtype=torch.float32, grad=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(grad)


def both(student, teacher, features):
    """A use of both losses, with work around them."""
    generator = generator_loss(teacher * 2, features, log_base=2)
    distill = distill_loss(student * 2, teacher.detach(), temperature=3.0)
    parts = (generator.one_hot, generator.entropy, generator.activation, distill.kl)
    return generator.total * 2 + distill.total, parts + (distill.agreement,)


# ---- opcheck ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [10, 40])
def test_opcheck_forward(classes, dtype):
    for grad in (False, True):
        t, f = randn(6, classes, dtype=dtype, grad=grad), randn(6, 4, dtype=dtype, grad=grad)
        torch.library.opcheck(OPS.generator_loss, (t, f, *WEIGHTS))
        torch.library.opcheck(OPS.generator_loss, (t, None, *WEIGHTS))
        s = randn(6, classes, seed=1, dtype=dtype, grad=grad)
        torch.library.opcheck(OPS.distill_loss, (s, t.detach(), 2.0, True))


@pytest.mark.parametrize("classes", [10, 40])
def test_opcheck_backward(classes):
    t, f, s = randn(6, classes), randn(6, 4), randn(6, classes, seed=1)
    *_, stats, mean = OPS.generator_loss(t, f, *WEIGHTS)
    one = torch.ones(())
    torch.library.opcheck(OPS.generator_loss_backward, (one, t, f, stats, mean, *WEIGHTS))
    torch.library.opcheck(OPS.generator_loss_backward, (one, t, None, stats, mean, *WEIGHTS))
    stats = OPS.distill_loss(s, t, 2.0, False)[3]
    torch.library.opcheck(OPS.distill_loss_backward, (one, s, t, stats, 2.0, False))


def test_outputs_share_no_memory():
    t = randn(6, 10)
    for out in (OPS.generator_loss(t, None, *WEIGHTS), OPS.distill_loss(t, t, 1.0, True)):
        assert len({x.untyped_storage().data_ptr() for x in out}) == len(out)


def test_bound_functions_are_the_operators():
    t, s, f = randn(6, 10), randn(6, 10, seed=1), randn(6, 4)
    pairs = (
        (_C.generator_loss(t, f, *WEIGHTS), OPS.generator_loss(t, f, *WEIGHTS)),
        (_C.distill_loss(s, t, 2.0, True), OPS.distill_loss(s, t, 2.0, True)),
    )
    for bound, operator in pairs:
        assert all(torch.equal(a, b) for a, b in zip(bound, operator))


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    results = []
    for function in (both, compiled):
        s, t, f = (
            randn(33, 10, grad=True),
            randn(33, 10, seed=1, grad=True),
            randn(33, 7, grad=True),
        )
        total, parts = function(s, t, f)
        assert total.requires_grad and not any(x.requires_grad for x in parts)
        total.backward()
        results.append([total.detach(), *parts, s.grad, t.grad, f.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_compiled_returns_the_named_tuples():
    t = randn(8, 10)
    generator = torch.compile(generator_loss, fullgraph=True, backend="aot_eager")(t)
    distill = torch.compile(distill_loss, fullgraph=True, backend="aot_eager")(t, t)
    assert isinstance(generator, GeneratorLoss) and isinstance(distill, DistillLoss)


def test_dynamic_shapes_compile_once():
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=counting_backend)
    for rows, classes in ((33, 10), (7, 40), (128, 12)):
        s, t, f = randn(rows, classes), randn(rows, classes, seed=1), randn(rows, 7)
        assert torch.equal(compiled(s, t, f)[0], both(s, t, f)[0])
    assert len(graphs) == 1


def test_compiled_with_dynamic_shapes_has_the_same_gradients():
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, classes in ((33, 10), (7, 40)):
        grads = []
        for function in (both, compiled):
            t = randn(rows, classes, seed=1, grad=True)
            function(randn(rows, classes), t, None)[0].backward()
            grads.append(t.grad)
        assert torch.equal(*grads)


# ---- Fake and meta tensors ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_fake_outputs_look_like_real_ones(dtype):
    def run():
        t, f = torch.zeros(6, 10, dtype=dtype), torch.zeros(6, 4, dtype=torch.bfloat16)
        generator = OPS.generator_loss(t, f, *WEIGHTS)
        distill = OPS.distill_loss(f, torch.zeros(6, 4, dtype=dtype), 1.0, True)
        one = torch.ones((), dtype=generator[0].dtype)
        backward = OPS.generator_loss_backward(one, t, f, *generator[-2:], *WEIGHTS)
        student = OPS.distill_loss_backward(one, f, f.to(dtype), distill[3], 1.0, True)
        return [*generator, *distill, *backward, student]

    real = run()
    with FakeTensorMode():
        fake = run()
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def test_fake_tensors_on_a_gpu_that_is_not_there():
    with FakeTensorMode():
        t = torch.empty(6, 10, device="cuda")
        assert {x.device.type for x in generator_loss(t)} == {"cuda"}


def test_checks_run_on_fake_tensors_too():
    with FakeTensorMode(), pytest.raises(ValueError, match="student_logits must be"):
        distill_loss(torch.empty(6, 10), torch.empty(6, 11))


# ---- Autocast -----------------------------------------------------------------------------------


def test_autocast_mixes_dtypes():
    x, w, t = randn(20, 12), randn(12, 10, seed=1, grad=True), randn(20, 10, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = x @ w
        assert logits.dtype == torch.bfloat16
        loss = distill_loss(logits, t)
        generator = generator_loss(logits, x)
    assert loss.total.dtype == generator.total.dtype == torch.float32
    (loss.total + generator.total).backward()
    d = w.detach().double().requires_grad_()
    y = x.double() @ d
    expected = reference.distill_loss(y, t.double()).total
    (expected + reference.generator_loss(y, x.double()).total).backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=2e-2)
    assert (w.grad.double() - d.grad).norm() / d.grad.norm() < 2e-2


# ---- Cost of a call -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["generator", "distill"])
def test_overhead_of_a_call_is_below_30_microseconds(loss):
    """The best of many, so that a busy machine does not fail it."""
    t = randn(1, 2, grad=True)
    teacher = t.detach()
    call = (
        (lambda: generator_loss(t)) if loss == "generator" else (lambda: distill_loss(t, teacher))
    )
    best = float("inf")
    for _ in range(2000):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    assert best < 30e-6

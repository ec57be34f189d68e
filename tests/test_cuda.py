"""What only a GPU can show: graphs, streams, devices, determinism. The losses' values on a GPU are
tested where those on the CPU are (test_losses.py, test_dafl_losses.py)."""

import subprocess
import sys

import pytest
import torch

from dafl_fast import _C, reference
from dafl_fast.losses import dafl_losses, distill_loss, generator_loss
from tests.conftest import NO_GPU, ROOT

pytestmark = [
    pytest.mark.gpu,
    NO_GPU,
    pytest.mark.skipif(not _C.build_info()["cuda"], reason="this build has no CUDA kernels"),
]
CUDA = torch.device("cuda")
# Each regime of the launch planner, with rows to spare in its last part.
SHAPES = [(1024, 10), (5000, 10), (1500, 32), (700, 200), (500, 1000), (300, 3000), (200, 10000),
          (40, 20000), (20, 131072)]  # fmt: skip


def randn(*shape, seed=0, dtype=torch.float32, device=CUDA):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(device, dtype)


def inputs(N, C, F=33, **options):
    return [randn(N, width, seed=seed, **options) for seed, width in enumerate((C, F, C))]


def step(t, f, s):
    """Losses and gradients of both, through autograd and from the joint operator."""
    t, f, s = (x.detach().requires_grad_() for x in (t, f, s))
    generator = generator_loss(t, f)
    distill = distill_loss(s, t.detach(), temperature=2.0)
    grads = [*torch.autograd.grad(generator.total * 3, (t, f)),
             *torch.autograd.grad(distill.total * 3, s)]  # fmt: skip
    joint = dafl_losses(t, f, s, temperature=2.0)
    return [
        *(x.detach() for x in (*generator, *distill)), *grads, *joint.generator, *joint.distill,
        joint.grad_teacher_logits, joint.grad_features, joint.grad_student_logits,
    ]  # fmt: skip


def captured(given, stream=None):
    side = stream or torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        results = step(*given)
    return graph, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_thousand_replays_are_the_same_bits_as_eager(shape, dtype):
    given = inputs(*shape, dtype=dtype)
    eager = step(*given)
    graph, results = captured(given)
    replays = 1000 if shape[0] * shape[1] < 1 << 20 else 100
    different = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(replays):
        for x in results:
            x.fill_(7)
        graph.replay()
        for a, b in zip(eager, results, strict=True):
            different += (a != b).sum()
    assert different.item() == 0


def test_a_replay_reads_new_inputs():
    given = inputs(1024, 10)
    graph, results = captured(given)
    for x, new in zip(given, inputs(1024, 10, F=33), strict=True):
        x.copy_(new.flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(step(*given), results, strict=True))


def test_the_first_call_of_all_may_be_inside_a_capture():
    """In a new process, where no kernel is loaded yet and no limit of the GPU was asked for."""
    code = """
import torch
from tests.test_cuda import SHAPES, inputs, step

x = torch.ones((), device="cuda", requires_grad=True)
torch.autograd.grad(x * 3, x)  # what torch itself has to load
for shape in SHAPES:
    given = inputs(*shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*given)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(step(*given), results, strict=True)), shape
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compiled_is_the_same_bits():
    torch._dynamo.reset()

    def both(t, f, s):
        generator = generator_loss(t * 2, f)
        return generator.total * 2 + distill_loss(s * 2, t.detach()).total

    grads = []
    for function in (both, torch.compile(both, fullgraph=True)):
        given = [x.requires_grad_() for x in inputs(1024, 10)]
        total = function(*given)
        grads.append([total.detach(), *torch.autograd.grad(total, given)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_two_streams_do_not_disturb_each_other():
    work = [inputs(2000, 10), [x.flip(0) for x in inputs(2000, 10)], inputs(400, 700)]
    expected = [step(*given) for given in work]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in work]
    results = [[] for _ in work]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(step(*work[i]))
    torch.cuda.synchronize()
    for i, right in enumerate(expected):
        for result in results[i]:
            assert all(torch.equal(a, b) for a, b in zip(right, result, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_is_used_whatever_the_current_one_is():
    given = inputs(100, 10, device=torch.device("cuda:1"))
    results = step(*given)
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in results)
    for a, b in zip(results, step(*(x.to("cuda:0") for x in given)), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_gradients_survive_grad_scaler_in_fp16():
    """At 65,536 rows fp16 gradients are far below its smallest number until they are scaled."""
    t = randn(65536, 10, dtype=torch.float16).requires_grad_()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    scaler.scale(generator_loss(t).total).backward()
    d = t.detach().double().requires_grad_()
    reference.generator_loss(d).total.backward()
    error = (t.grad.double() / 2**16 - d.grad).norm() / d.grad.norm()
    assert error < 1e-3


def test_no_call_waits_for_the_gpu():
    given = inputs(1024, 10)
    step(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_31_elements():
    """64-bit indices: the last rows of 2^31 + elements, 4 GB of logits."""
    free, _ = torch.cuda.mem_get_info()
    N, C = (1 << 31) // 10 + 1000, 10
    if free < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    t = torch.zeros(N, C, dtype=torch.bfloat16, device=CUDA)
    t[-1, 7] = 5
    t[:-1, 3] = 1
    t.requires_grad_()
    loss = generator_loss(t, entropy=0.0)
    (grad,) = torch.autograd.grad(loss.total * N, t)
    d = t[-2:].detach().double()
    expected = d.softmax(1) - torch.nn.functional.one_hot(d.argmax(1), C)
    torch.testing.assert_close(grad[-2:].double(), expected, rtol=1e-2, atol=0)

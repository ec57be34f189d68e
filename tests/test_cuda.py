"""What only a GPU can show: graphs, streams, devices, determinism. The losses' values on a GPU are
tested where those on the CPU are (test_losses.py, test_dafl_losses.py)."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dafl_fast import _C, reference
from dafl_fast.engine.fuse import ConvReLU, fuse_relu
from dafl_fast.engine.teacher import FrozenTeacher
from dafl_fast.losses import dafl_losses, distill_loss, generator_loss
from dafl_fast.models import Generator, build
from dafl_fast.models.functional import conv_pool
from dafl_fast.models.norm import with_fast_norms
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


def randint(*shape, seed=0):
    """Sums of products of small integers are exact, so that equals are equal in every order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape",  # N, in, H, W, out
    [(512, 1, 32, 32, 6), (512, 6, 14, 14, 16), (512, 1, 32, 32, 3), (512, 3, 14, 14, 8),
     (1030, 1, 6, 6, 1), (3, 32, 64, 64, 32), (7, 5, 33, 40, 17), (2, 3, 9, 12, 5)], ids=str,
)  # fmt: skip
def test_conv_pool_is_convolution_pooling_and_relu(shape, form, dtype):
    N, channels, H, W, out = shape
    sizes = ((N, channels, H, W), (out, channels, 5, 5), (out,))
    x, weight, bias = (randint(*size, seed=seed) for seed, size in enumerate(sizes))
    grad = randint(N, out, (H - 4) // 2, (W - 4) // 2, seed=3)
    wide = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    expected = torch.relu(torch.max_pool2d(torch.conv2d(*wide), 2))
    expected.backward(grad)
    conv = torch.nn.Conv2d(channels, out, 5)
    conv.weight.data, conv.bias.data = weight, bias
    conv.to(CUDA, torch.float64 if dtype == torch.float64 else torch.float32, memory_format=form)
    x = x.to(CUDA, dtype).contiguous(memory_format=form).requires_grad_()
    results = []
    for _ in range(2):
        y = conv_pool(x, conv)
        y.backward(grad.to(CUDA, dtype))
        results.append([y.detach(), x.grad, conv.weight.grad, conv.bias.grad])
        x.grad = conv.weight.grad = conv.bias.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results))
    for ours, oracle in zip(results[0], [expected, *(tensor.grad for tensor in wide)]):
        assert ours.dtype == (dtype if ours.dim() == 4 and ours.shape[0] == N else conv.bias.dtype)
        largest = oracle.detach().abs().max()
        error = (ours.cpu().double() - oracle.detach()).abs().max() / largest
        narrow = ours.dtype.itemsize == 2
        assert error <= (2**-8 if narrow else 1e-5), ours.shape


def test_conv_pool_is_a_sound_operator_with_limits():
    x, conv = torch.randn(9, 3, 14, 14, device=CUDA), torch.nn.Conv2d(3, 8, 5).to(CUDA)
    parts = (x.requires_grad_(), conv.weight, conv.bias)
    torch.library.opcheck(torch.ops.dafl_fast.conv_pool.default, parts)
    with torch.autocast("cuda", torch.bfloat16):
        assert conv_pool(x, conv).dtype == torch.bfloat16
        wide = torch.randn(2, 3, 80, 80, device=CUDA)  # torch's own layers
        assert conv_pool(wide, conv).shape == (2, 8, 38, 38)
    with pytest.raises(ValueError, match="64x64"):
        torch.ops.dafl_fast.conv_pool(wide, conv.weight, conv.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape", [(512, 64, 32, 32), (512, 128, 8, 8), (3, 10, 5, 7), (2, 600, 3, 3)]
)
def test_norm_and_activation_are_batch_norm_and_leaky_relu(shape, form, dtype):
    C, ops = shape[1], torch.ops.dafl_fast
    x, grad = (randn(*shape, seed=seed, dtype=dtype) for seed in (0, 1))
    weight, bias = (randn(C, seed=seed) for seed in (2, 3))
    wide = [each.double().requires_grad_() for each in (x, weight, bias)]
    normalised = F.batch_norm(wide[0], None, None, *wide[1:], training=True, eps=0.8)
    # Close to the kink, rounding may take the other slope.
    grad = grad * (normalised.abs() > 1e-3)
    expected = F.leaky_relu(normalised, 0.2)
    expected.backward(grad.double())
    variance, mean = torch.var_mean(wide[0].detach(), (0, 2, 3), correction=0)
    x = x.contiguous(memory_format=form)
    operands = [each.requires_grad_() for each in (x, weight, bias)]
    runs = []
    for _ in range(2):
        moments = ops.moments(x.detach())
        y = ops.norm_activation(x, *moments, weight, bias, 0.8, 0.2)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        runs.append([*moments, y.detach(), *torch.autograd.grad(y, operands, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    oracles = [mean, variance, expected.detach(), *(each.grad for each in wide)]
    for ours, oracle in zip(runs[0], oracles, strict=True):
        error = (ours.double() - oracle).abs().max() / oracle.abs().max()
        assert error <= (2**-8 if ours.dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(512, 64, 32, 32), (64, 64, 32, 32), (3, 10, 5, 7), (2, 128, 9, 379), (2, 64, 100, 64)],
    ids=str,
)
def test_norm_activation_and_image_convolution_are_those_layers(shape, dtype):
    N, C, H, W = shape
    x, grad = randn(*shape, dtype=dtype), randn(N, 1, H, W, seed=1, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    parameters = [randn(C, seed=2), randn(C, seed=3), randn(1, C, 3, 3, seed=4), randn(1, seed=5)]
    wide = [each.double().requires_grad_() for each in (x, *parameters)]
    z = F.batch_norm(wide[0], None, None, *wide[1:3], training=True, eps=0.8)
    expected = F.conv2d(F.leaky_relu(z, 0.2), wide[3], wide[4], padding=1)
    expected.backward(grad.double())
    variance, mean = torch.var_mean(wide[0].detach(), (0, 2, 3), correction=0)
    norm, image = [each.requires_grad_() for each in parameters[:2]], parameters[2:]
    operands = [x.requires_grad_(), *norm, *(each.requires_grad_() for each in image)]
    runs = []
    for _ in range(2):
        y = torch.ops.dafl_fast.norm_image_conv(
            x, mean.float(), variance.float(), *norm, 0.8, 0.2, *image
        )
        runs.append([y.detach(), *torch.autograd.grad(y, operands, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    for ours, oracle in zip(runs[0], [expected.detach(), *(each.grad for each in wide)]):
        # A few values at the kink may take the other slope.
        assert (ours.double() - oracle).norm() <= (
            3e-3 if dtype.itemsize == 2 else 1e-4
        ) * oracle.norm()


def test_a_student_with_fast_norms_learns_as_it_does():
    torch.manual_seed(0)
    student = build("ResNet18").to(CUDA, memory_format=torch.channels_last)
    exact = copy.deepcopy(student).double()
    ours = copy.deepcopy(student)
    fast = with_fast_norms(ours)
    x, errors = randn(64, 3, 32, 32), []
    x = x.contiguous(memory_format=torch.channels_last)
    exact(x.double()).square().sum().backward()
    for network in (student, fast):
        with torch.autocast("cuda", torch.bfloat16):
            logits = network(x)
        logits.float().square().sum().backward()
        pairs = list(zip(network.parameters(), exact.parameters()))
        errors.append(sum((a.grad - b.grad).norm() / b.grad.norm() for a, b in pairs) / len(pairs))
    assert errors[1] <= 1.5 * errors[0] < 1
    for (name, a), (_, b) in zip(ours.named_buffers(), student.named_buffers()):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=1e-2, msg=name)


@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 32), (2, 20)], ids=str)
def test_the_generator_is_that_of_the_cpu(channels, size, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    slow = Generator(16, size, channels, 32).double()
    fast = Generator(16, size, channels, 32)
    fast.load_state_dict(slow.state_dict())
    fast.to(CUDA, memory_format=torch.channels_last)
    z = randn(64, 16, device="cpu")
    upstream = randn(64, channels, size, size, device="cpu")
    for network, noise in ((slow, z.double()), (fast, z.to(CUDA))):
        network(noise).backward(upstream.to(noise))
    for (name, a), (_, b) in zip(fast.named_parameters(), slow.named_parameters()):
        if b.grad is not None:  # a convolution's bias before BatchNorm has none
            assert (a.grad.cpu().double() - b.grad).norm() <= 2e-3 * b.grad.norm(), name
    for (name, a), (_, b) in zip(fast.named_buffers(), slow.named_buffers()):
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_resnet_that_fuses_its_relu_answers_as_before(dtype):
    torch.manual_seed(0)
    network = build("ResNet34")
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.weight, 1, 0.1)
            torch.nn.init.normal_(layer.bias, 0, 0.1)
    wide, plain, fused = (
        FrozenTeacher(network).to(CUDA, memory_format=torch.channels_last) for _ in range(3)
    )
    plain.cast(dtype)
    fused.cast(dtype)
    images = torch.randn(64, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
    assert fuse_relu(fused.network, [images]) == 32
    answers = []
    for teacher in (wide, plain, fused):
        x = images.clone().requires_grad_()
        logits, _ = teacher(x)
        (grad,) = torch.autograd.grad(logits.float().square().sum(), x)
        answers.append((logits.double().detach(), grad.double()))
    assert not any(layer.refused for layer in fused.modules() if isinstance(layer, ConvReLU))
    for exact, rounded, ours in zip(*answers):
        error, usual = ((each - exact).norm() / exact.norm() for each in (ours, rounded))
        assert 0 < error <= 1.5 * usual


def test_the_images_of_one_channel_are_normalised_by_the_kernels_for_channels_last():
    generator = Generator(8, 16, 1, 8).to(CUDA, memory_format=torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        images = generator(torch.randn(4, 8, device=CUDA))
        images.backward(torch.randn_like(images))
        torch.cuda.synchronize()
    slow = [event.key for event in profile.key_averages() if "batch_norm" in event.key]
    assert slow and all("channels_last" in name or "update_stats" in name for name in slow)
    assert images.stride() == (256, 1, 16, 1)

"""Every operator writes every byte that it returns, and reads none that nobody wrote.

Each runs in memory that is full of junk before, of three kinds; the results must be the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys

import pytest
import torch

from dafl_fast import _C, reference

OPS = torch.ops.dafl_fast
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WEIGHTS = tuple(map(float, reference.generator_loss.__kwdefaults__.values()))
ONE = torch.ones(())
M_PERTURB = -6  # glibc's mallopt(3): what memory is filled with, inverted


@contextlib.contextmanager
def fresh_memory_of(byte):
    """glibc fills what it allocates with `byte`; None: PyTorch fills tensors with NaN or 255."""
    if byte is None:
        torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory is its default
    else:
        ctypes.CDLL(None).mallopt(M_PERTURB, byte ^ 0xFF)
    try:
        yield
    finally:
        if byte is None:
            torch.use_deterministic_algorithms(False)
        else:
            ctypes.CDLL(None).mallopt(M_PERTURB, 0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def losses(n, dtype, classes):
    t, s, f = randn(n, classes, dtype=dtype), randn(n, classes, dtype=dtype), randn(n, 7).to(dtype)
    *_, stats, mean = OPS.generator_loss(t, f, *WEIGHTS)
    distill_stats = OPS.distill_loss(s, t, 3.0, True)[3]
    one = ONE.to(stats.dtype)
    return {
        "generator_loss": (t, f, *WEIGHTS),
        "generator_loss_backward": (one, t, f, stats, mean, *WEIGHTS),
        "distill_loss": (s, t, 3.0, True),
        "distill_loss_backward": (one, s, t, distill_stats, 3.0, True),
        "dafl_losses": (t, f, s, *WEIGHTS, 3.0, True),
    }


def convolutions(n, dtype):
    x, y = randn(n, 5, 3, 7, dtype=dtype), randn(n, 6, 3, 7, dtype=dtype)
    weight, bias = randn(6, 5, 3, 3), randn(6)
    factors, _ = OPS.conv3x3_factors(weight, dtype, False)
    square = randn(n, n, 3, 3)
    return {
        "upsample_conv": (x, weight),
        "upsample_conv_backward": (randn(n, 6, 6, 14, dtype=dtype), x, weight),
        "conv3x3": (x, weight, bias, None, None),
        "conv3x3_factors": (square, dtype, True),
        "conv3x3_outputs": (x, factors, bias, 6),
        "conv3x3_weight_grad": (y, x, weight),
    }


def norms(n, dtype):
    x, grad = randn(n, 5, 3, 7, dtype=dtype), randn(n, 5, 3, 7, dtype=dtype)
    norm = (x, *OPS.moments(x), randn(5), randn(5), 0.8, 0.2)
    image = (randn(3, 5, 3, 3), randn(3))
    return {
        "moments": (x,),
        "norm_activation": norm,
        "norm_activation_backward": (grad, *norm),
        "norm_image_conv": (*norm, *image),
        "norm_image_conv_backward": (randn(n, 3, 3, 7, dtype=dtype), *norm, *image),
    }


def pools(n, dtype):
    x, weight, bias = randn(n, 3, 7, 8, dtype=dtype), randn(5, 3, 5, 5), randn(5)
    y, index = OPS.conv_pool(x, weight, bias)
    return {
        "conv_pool": (x, weight, bias),
        "conv_pool_backward": (torch.randn_like(y), x, weight, bias, index, True, True),
    }


GROUPS = {
    "losses, 10 classes": lambda n, dtype: losses(n, dtype, 10),
    "losses, 37 classes": lambda n, dtype: losses(n, dtype, 37),
    "convolutions": convolutions,
    "norms": norms,
    "pools": pools,
}


def bits(results):
    """The bytes of one tensor or several, as they lie in memory."""
    tensors = [results] if isinstance(results, torch.Tensor) else results
    storages = [t.detach().untyped_storage() for t in tensors]
    return [torch.tensor([], dtype=torch.uint8).set_(s).numpy().tobytes() for s in storages]


def test_all_operators_are_here():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("dafl_fast::")}  # fmt: skip
    assert names == {name for make in GROUPS.values() for name in make(2, torch.float32)}


@pytest.mark.parametrize("byte", [0x5A, 0xA5, None])
def test_fresh_memory_is_full_of_junk(byte):
    if byte is not None and not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("only glibc can fill what it allocates")
    with fresh_memory_of(byte):
        for size in (2000, 100_000):  # glibc may take smaller blocks from a cache, as they are
            values = torch.empty(size, dtype=torch.uint8).unique().tolist()
            assert values == [0xFF if byte is None else byte]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_every_byte_is_written(group, dtype):
    for n in range(1, 71):
        torch.manual_seed(n)
        for name, arguments in GROUPS[group](n, dtype).items():
            results = []
            for byte in (0x5A, 0xA5, None):
                with fresh_memory_of(byte):
                    results.append(bits(getattr(OPS, name)(*arguments)))
            assert results[0] == results[1] == results[2], f"{name} of {n} images or rows"


@pytest.mark.parametrize("isa", _C.build_info()["isa_available"])
def test_every_instruction_set(isa):
    if os.environ.get("DAFL_FAST_ISA") or isa == _C.build_info()["isa"]:
        pytest.skip("this whole run is on one, or it is what the other tests run on")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__,
         "-k", "written"],
        env={**os.environ, "DAFL_FAST_ISA": isa}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

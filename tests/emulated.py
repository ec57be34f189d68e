"""The CUDA kernels, compiled for the CPU with tests/emulation, and calls of their launchers.

All that a kernel gets lies against locked pages (`Arena`), so an address outside of it ends the
call with a `Fault`, as does what CUDA leaves undefined (tests/emulation/scheduler.h).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import weakref
from pathlib import Path

import torch

from dafl_fast import reference
from dafl_fast.losses import DistillLoss, GeneratorLoss

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++")
# A misaligned access is an illegal instruction, which the scheduler catches: no run-time library.
FLAGS = [
    "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-w", "-fsanitize=alignment",
    "-fsanitize-undefined-trap-on-error",
]  # fmt: skip

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
WEIGHTS = {**reference.generator_loss.__kwdefaults__}
WEIGHTS.update(one_hot=0.7, entropy=3.0, activation=0.4, log_base=10.0)
LOSSES = len(GeneratorLoss._fields)
TEMPERATURE = 2.0
POINTER = ctypes.c_void_p
SIZE = ctypes.c_int64
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = POINTER
LIBC.mmap.argtypes = [POINTER, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [POINTER, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [POINTER, ctypes.c_size_t]
NORESERVE = 0x4000
PAGE = mmap.PAGESIZE
SPARSE = 1 << 16  # elements between rows or columns, so that it is not copied
POISON = 0xFF  # all of a number's bytes: a NaN in every dtype


# ---- The library -------------------------------------------------------------------------------


class Fault(AssertionError):
    """A kernel did what CUDA leaves undefined."""


def sources(root: Path) -> list[Path]:
    return [
        root / "tests/emulation/kernels.cpp",
        *sorted(set(root.glob("csrc/cuda/*.cu")) - {root / "csrc/cuda/device.cu"}),
    ]


def command(root: Path, source: Path, to: Path) -> list[str]:
    """Compiles one of the sources."""
    emulation = f"-I{root / 'tests/emulation'}"
    return [COMPILER, *FLAGS, emulation, "-c", "-o", str(to), "-x", "c++", str(source)]


def link(objects: list[Path], to: Path) -> None:
    subprocess.run([COMPILER, "-shared", "-o", to, *objects], check=True, timeout=60)


def build(root: Path, folder: Path) -> Path:
    """Compiles the sources, as many at a time as there are CPUs."""
    objects = [folder / f"{source.stem}.o" for source in sources(root)]
    running = []
    for source, to in zip(sources(root), objects):
        if len(running) == len(os.sched_getaffinity(0)):
            assert running.pop(0).wait(timeout=300) == 0
        running.append(subprocess.Popen(command(root, source, to)))
    assert all(process.wait(timeout=300) == 0 for process in running)
    link(objects, folder / "kernels.so")
    return folder / "kernels.so"


def _raise_fault(result, function, arguments):
    if result is not None:
        raise Fault(result.decode())


def load(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    for name in ("scratch_bytes", "backward_blocks", "conv_pool_scratch", "norm_parts",
                 "image_conv_scratch"):  # fmt: skip
        getattr(loaded, name).restype = SIZE
    loaded.set_order.argtypes = [ctypes.c_uint64]
    loaded.set_blocks.argtypes = [SIZE, SIZE]
    for name in ("generator_forward", "generator_backward", "distill_forward", "distill_backward",
                 "joint", "conv_pool", "norm", "image_conv"):  # fmt: skip
        function = getattr(loaded, name)
        function.restype = ctypes.c_char_p
        function.errcheck = _raise_fault
    return loaded


# ---- Memory ------------------------------------------------------------------------------------


def pages(size: int) -> torch.Tensor:
    """Bytes between two locked pages, zeros that take no memory before they are touched."""
    size = (size + PAGE - 1) // PAGE * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    start = LIBC.mmap(None, size + 2 * PAGE, 0, flags, -1, 0)
    assert start != POINTER(-1).value, "no address space"
    assert LIBC.mprotect(start + PAGE, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    memory = (ctypes.c_uint8 * size).from_address(start + PAGE)
    weakref.finalize(memory, LIBC.munmap, start, size + 2 * PAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Arena:
    """Tensors between locked pages: each ends (`at_end`) or begins where a locked page does, as
    closely as its alignment to 16 bytes allows. What is not theirs is poisoned."""

    def __init__(self, at_end: bool = True):
        self.at_end = at_end
        self.gaps: list[torch.Tensor] = []

    def empty(self, shape, strides, dtype, alignment: int = 0) -> torch.Tensor:
        """Poisoned; its address is `alignment` more than a multiple of 16."""
        elements = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
        if 0 in shape:
            elements = 0
        size = elements * dtype.itemsize
        room = (alignment + size + 15 + PAGE - 1) // PAGE * PAGE
        whole = pages(room)
        whole.fill_(POISON)
        before = alignment + (room - size - alignment) // 16 * 16 if self.at_end else alignment
        self.gaps += [whole[:before], whole[before + size :]]
        if elements == 0:
            return torch.empty(shape, dtype=dtype)
        return whole[before : before + size].view(dtype).as_strided(shape, strides)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """With the same strides and alignment. What is sparse is guarded as it stands."""
        if x.stride() and max(x.stride()) > SPARSE:
            return x
        placed = self.empty(x.shape, x.stride(), x.dtype, x.data_ptr() % 16)
        if x.numel():
            once = [n if stride else 1 for n, stride in zip(x.shape, x.stride())]
            placed.as_strided(once, x.stride()).copy_(x.as_strided(once, x.stride()))
        return placed

    def poisoned(self, *shape, dtype=torch.float32) -> torch.Tensor:
        """What was not written shows."""
        return self.empty(shape, torch.empty(shape, device="meta").stride(), dtype)

    def intact(self) -> bool:
        return all((gap == POISON).all() for gap in self.gaps)


def sparse(x: torch.Tensor, strides: tuple[int, int]) -> torch.Tensor:
    """With strides so large that most of its memory is never touched."""
    elements = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides))
    return pages(elements * x.itemsize).view(x.dtype).as_strided(x.shape, strides).copy_(x)


class Matrix(ctypes.Structure):
    _fields_ = [("data", POINTER), ("row_stride", SIZE), ("col_stride", SIZE),
                ("dtype", ctypes.c_int)]  # fmt: skip


def matrix(x: torch.Tensor) -> Matrix:
    return Matrix(x.data_ptr(), x.stride(0), x.stride(1), DTYPES[x.dtype])


def address(x: torch.Tensor) -> POINTER:
    return POINTER(x.data_ptr() if x.numel() else None)


def pointers(tensors) -> ctypes.Array:
    return (POINTER * len(tensors))(*[x.data_ptr() for x in tensors])


# ---- Calls -------------------------------------------------------------------------------------


class Case:
    """One call of each operator on the emulated GPU `gpu`, with the results in the operators'
    order: losses, statistics, gradients."""

    def __init__(self, kernels, logits, features, student, gpu, upstream=1024.0, at_end=True):
        self.kernels, self.gpu, self.at_end = kernels, gpu, at_end
        self.logits, self.features, self.student = logits, features, student
        self.upstream = upstream if isinstance(upstream, torch.Tensor) else torch.tensor(upstream)
        self.N, self.C = logits.shape
        self.F = features.shape[1] if features is not None else 0
        self.weights = (ctypes.c_double * len(WEIGHTS))(*WEIGHTS.values())
        self.argmax = None  # what the backward pass is told, of all rows

    def stats_dtype(self, *inputs):
        return torch.float64 if torch.float64 in [x.dtype for x in inputs] else torch.float32

    def scratch(self, arena, f64):
        size = self.kernels.scratch_bytes(SIZE(self.N), SIZE(self.C), f64, *self.gpu)
        return address(arena.poisoned(size // 8, dtype=torch.float64))

    def place_features(self, arena):
        if self.features is None:
            return Matrix(), torch.empty(0, 0)
        grad = arena.poisoned(self.N, self.F, dtype=self.features.dtype)
        return matrix(arena.copy(self.features)), grad

    def finish(self, arena, results):
        assert arena.intact(), "something was written outside of all tensors"
        return [x.clone() for x in results]

    def generator(self):
        S = self.stats_dtype(self.logits)
        f64 = torch.float64 == S
        arena = Arena(self.at_end)
        logits = matrix(arena.copy(self.logits))
        features, grad_features = self.place_features(arena)
        upstream = arena.copy(self.upstream)
        losses = [arena.poisoned(1, dtype=S) for _ in range(LOSSES)]
        stats = arena.poisoned(3, self.N, dtype=S)
        mean = arena.poisoned(self.C, dtype=S)
        grad = arena.poisoned(self.N, self.C, dtype=self.logits.dtype)
        inputs = [SIZE(self.N), SIZE(self.C), SIZE(self.F), ctypes.byref(logits),
                  ctypes.byref(features), self.weights]  # fmt: skip
        self.kernels.generator_forward(
            *inputs, f64, *self.gpu, pointers(losses), address(stats), address(mean),
            self.scratch(arena, f64),
        )  # fmt: skip
        if self.argmax is not None:
            stats[2] = self.argmax
        self.kernels.generator_backward(
            *inputs, address(upstream), DTYPES[upstream.dtype], f64, *self.gpu, address(stats),
            address(mean), address(grad), address(grad_features),
        )  # fmt: skip
        return self.finish(arena, [*losses, stats, mean, grad, grad_features])

    def distill(self):
        S = self.stats_dtype(self.logits, self.student)
        f64 = torch.float64 == S
        arena = Arena(self.at_end)
        teacher, student = matrix(arena.copy(self.logits)), matrix(arena.copy(self.student))
        upstream = arena.copy(self.upstream)
        losses = [arena.poisoned(1, dtype=S) for _ in DistillLoss._fields]
        stats = arena.poisoned(4, self.N, dtype=S)
        grad = arena.poisoned(self.N, self.C, dtype=self.student.dtype)
        inputs = [SIZE(self.N), SIZE(self.C), ctypes.byref(student), ctypes.byref(teacher),
                  ctypes.c_double(TEMPERATURE)]  # fmt: skip
        self.kernels.distill_forward(
            *inputs, f64, *self.gpu, pointers(losses), address(stats), self.scratch(arena, f64)
        )
        self.kernels.distill_backward(
            *inputs, address(upstream), DTYPES[upstream.dtype], f64, *self.gpu, address(stats),
            address(grad),
        )  # fmt: skip
        return self.finish(arena, [*losses, stats, grad])

    def joint(self):
        arena = Arena(self.at_end)
        teacher, student = matrix(arena.copy(self.logits)), matrix(arena.copy(self.student))
        features, grad_features = self.place_features(arena)
        losses = [arena.poisoned(1) for _ in range(LOSSES + len(DistillLoss._fields))]
        grads = [
            arena.poisoned(self.N, self.C, dtype=self.logits.dtype),
            grad_features,
            arena.poisoned(self.N, self.C, dtype=self.student.dtype),
        ]
        self.kernels.joint(
            SIZE(self.N), SIZE(self.C), SIZE(self.F), ctypes.byref(teacher),
            ctypes.byref(student), ctypes.byref(features), self.weights,
            ctypes.c_double(TEMPERATURE), *self.gpu, pointers(losses),
            self.scratch(arena, False), *map(address, grads),
        )  # fmt: skip
        return self.finish(arena, [*losses, *grads])

    def oracle(self, upstream):
        t = self.logits.double().requires_grad_()
        f = None if self.features is None else self.features.double().requires_grad_()
        s = self.student.double().requires_grad_()
        generator = reference.generator_loss(t, f, **WEIGHTS)
        distill = reference.distill_loss(s, t, temperature=TEMPERATURE)
        inputs = [t] if f is None else [t, f]
        grads = torch.autograd.grad(generator.total * upstream, inputs)
        grad_features = grads[1] if f is not None else torch.empty(0, 0)
        (grad_student,) = torch.autograd.grad(distill.total * upstream, s)
        mean = t.softmax(1).mean(0).detach()
        return generator, distill, grads[0], grad_features, grad_student, mean


# ---- What tests share ----------------------------------------------------------------------------


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def assert_close(ours, oracle, rtol=1e-5):
    if ours.dtype in (torch.bfloat16, torch.float16):
        rtol = 2**-8 if ours.dtype == torch.bfloat16 else 2**-10
    elif ours.dtype == torch.float64:
        rtol = 1e-12
    assert torch.isfinite(ours).all()
    largest = oracle.detach().abs().max().item() if oracle.numel() else 0.0
    torch.testing.assert_close(
        ours.double().reshape(oracle.shape), oracle.detach().double(), rtol=0, atol=largest * rtol
    )


def kernels(tmp_path_factory) -> ctypes.CDLL:
    """A fixture. Built here, but for tools/mutants.py, which builds them itself."""
    built = os.environ.get("DAFL_FAST_EMULATION")
    return load(Path(built) if built else build(ROOT, tmp_path_factory.mktemp("emulation")))

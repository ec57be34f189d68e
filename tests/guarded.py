"""Tensors whose memory ends, or begins, at a page that nobody may touch: a single byte read or
written outside ends the process. Between the elements of a tensor that has gaps lie NaNs."""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_NONE = 0


def guarded(tensor: Tensor, at_end: bool = True) -> Tensor:
    """A copy of the same dtype and strides in memory of its own: its last byte is the last before a
    page without access, or its first byte the first after one."""
    if tensor.numel() == 0:
        return tensor
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = extent * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = pages + 2 * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _LIBC.mmap(None, whole, _PROT_NONE, flags, -1, 0)
    begin = start + mmap.PAGESIZE
    if start == ctypes.c_void_p(-1).value or _LIBC.mprotect(
        begin, pages, mmap.PROT_READ | mmap.PROT_WRITE
    ):
        raise OSError(ctypes.get_errno(), "no memory between guard pages")
    memory = (ctypes.c_char * size).from_address(begin + (pages - size if at_end else 0))
    weakref.finalize(memory, _LIBC.munmap, start, whole)
    ctypes.memset(memory, 0xFF, size)  # NaN in every floating point type
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

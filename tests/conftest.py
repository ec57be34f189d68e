"""Fixtures shared by all tests: the devices there are, reproducible randomness, local data."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Tests that start processes fork them from a server that has imported everything.
multiprocessing.set_forkserver_preload(["dafl_fast.distill", "pytest"])
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request) -> torch.device:
    """Each device there is; the GPU is visibly skipped where there is none."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    """Seeds the generators, and puts back the number of threads that a test may have changed."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """A folder that torchvision's data sets are read from: DAFL_DATA, else ../shared/data."""
    folder = Path(os.environ.get("DAFL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: set DAFL_DATA to one")
    return folder


def joined(batches):
    """All images and all labels of batches."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)

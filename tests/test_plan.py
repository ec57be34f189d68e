"""The CUDA launch planner, on the CPU: every row once, limits of a launch, the regimes' borders."""

import math

import pytest

from dafl_fast import _C

GPUS = [(1, 80), (16, 86), (108, 80), (132, 90), (148, 100), (170, 120)]
ROWS = [1, 2, 31, 127, 128, 129, 1000, 1024, 1025, 4097, 65535, 65536, 1 << 20, (1 << 31) + 5]
CLASSES = [1, 2, 10, 31, 32, 33, 256, 257, 1000, 1024, 1025, 4096, 4097, 16384, 16385, 32769,
           65537, 131072, 131073, 1 << 24]  # fmt: skip
COLUMNS = 32  # of a thread that holds its share of a row in registers


def plan(N, C, f64=False, gpu=(132, 90)):
    return _C.plan(N, C, f64, *gpu)


@pytest.mark.parametrize("gpu", GPUS, ids=str)
@pytest.mark.parametrize("f64", [False, True])
def test_every_plan_can_be_launched_and_covers_every_row_once(gpu, f64):
    for N in ROWS:
        for C in CLASSES:
            p = plan(N, C, f64, gpu)
            what = (N, C, p)
            # Part i has rows [i rows, (i + 1) rows): all of them, and no part without any.
            assert p["rows"] >= 1 and p["parts"] >= 1, what
            assert (p["parts"] - 1) * p["rows"] < N <= p["parts"] * p["rows"], what
            # What a GPU accepts.
            assert 1 <= p["blocks"] < 2**31 and p["blocks"] % p["cluster"] == 0, what
            assert p["threads"] % 32 == 0 and p["threads"] <= 512, what
            assert p["shared"] <= 48 << 10, what
            assert p["cluster"] in (1, 2, 4, 8), what
            assert p["cluster"] == 1 or gpu[1] >= 90, what
            # Scratch: a part's C sums in the statistics' dtype and scalars in fp64, and two numbers
            # per 32 columns.
            part = -(-C * (8 if f64 else 4) // 8) * 8 + 8 * p["scalars"]
            assert p["scratch"] == p["parts"] * part + 16 * -(-C // 32), what
            assert 1 <= p["backward_blocks"] < 2**31, what
            assert p["regime"] != "cluster" or p["backward_blocks"] % p["cluster"] == 0, what
            if p["one_launch"]:
                assert p["regime"] == "tile" and p["parts"] <= p["blocks"] == p["cluster"], what
            elif p["regime"] == "cluster":
                assert p["blocks"] == p["parts"] * p["cluster"], what
            else:
                assert p["blocks"] == p["parts"], what


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_registers_and_shared_memory_hold_a_row(gpu):
    for C in CLASSES:
        p = plan(1000, C, gpu=gpu)
        if p["group"] > 0:
            # Columns are dealt to a cluster's blocks in equal shares of whole vectors.
            share = math.ceil(math.ceil(C / 8) / p["cluster"]) * 8
            assert share <= p["group"] * COLUMNS
            # An fp32 sum over rows spans at most 512 of them.
            at_once = p["threads"] // p["group"]
            for N in ROWS:
                rows = plan(N, C, gpu=gpu)["rows"]
                assert rows <= 512 * at_once and (rows % at_once == 0 or rows == N)
        if p["regime"] == "warp":
            assert p["shared"] >= p["threads"] * COLUMNS * 4


@pytest.mark.parametrize(
    ("C", "f64", "capability", "regime"),
    [
        (1, False, 90, "tile"), (32, False, 90, "tile"), (33, False, 90, "warp"),
        (1024, False, 80, "warp"), (1025, False, 80, "block"), (16384, False, 90, "block"),
        (16385, False, 90, "cluster"), (16385, False, 89, "stream"),
        (131072, False, 90, "cluster"), (131073, False, 90, "stream"),
        (10, True, 90, "stream"), (1000, True, 80, "stream"),
    ],
)  # fmt: skip
def test_borders_of_the_regimes(C, f64, capability, regime):
    assert plan(64, C, f64, (132, capability))["regime"] == regime


def test_small_batches_of_few_classes_take_one_launch_where_there_are_clusters():
    assert plan(1024, 10)["one_launch"] and plan(1, 1)["one_launch"]
    assert not plan(1025, 10)["one_launch"]
    assert not plan(1024, 33)["one_launch"]
    assert not plan(1024, 10, gpu=(108, 80))["one_launch"]


def test_the_stream_regimes_second_grid_dimension_fits():
    for N in ROWS:
        assert plan(N, 10, True)["parts"] <= 65535


def test_the_gpu_is_filled():
    for C in (10, 100, 1000, 4000, 16000):
        assert plan(65536, C)["blocks"] >= 132


def test_scratch_stays_small():
    for C in CLASSES[:-1]:
        for N in (1024, 65536):
            for f64 in (False, True):
                most = max(65 << 20, N * C * 4 // 100)
                assert plan(N, C, f64)["scratch"] <= most


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        plan(0, 10)

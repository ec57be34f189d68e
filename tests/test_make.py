"""What `make build` and `make demo` say and choose. Nothing here compiles."""

import os
import time

import pytest

from tools import build, demo


def test_without_a_gpu_the_build_has_no_cuda():
    environ = {}
    assert build.choose(environ, gpu=False) == (
        "no GPU is visible, so without CUDA kernels; with them: DAFL_FAST_CUDA=1 make -B build"
    )
    assert environ == {"DAFL_FAST_CUDA": "0", "MAX_JOBS": str(len(os.sched_getaffinity(0)))}


@pytest.mark.parametrize("wish", ["0", "1"])
def test_what_the_user_says_holds(wish):
    environ = {"DAFL_FAST_CUDA": wish, "MAX_JOBS": "3"}
    assert build.choose(environ, gpu=False) == ""
    assert environ == {"DAFL_FAST_CUDA": wish, "MAX_JOBS": "3"}


def test_with_a_gpu_setup_decides():
    environ = {"DAFL_FAST_CUDA": ""}
    assert build.choose(environ, gpu=True) == ""
    assert environ["DAFL_FAST_CUDA"] == ""


def test_how_far_the_compiler_is():
    lines = [
        "dafl_fast 1.0: building CPU only\n",
        "\n",
        "[1/3] c++ -MMD -MF /t/csrc/cpu/avx2.o.d -O3 -c -c /w/csrc/cpu/avx2.cpp -o /t/avx2.o -O3\n",
        "[2/3] /cuda/bin/nvcc -MD -MF t.o.d -c -c /w/csrc/cuda/row.cu -o t.o --threads 2\n",
        "FAILED: [code=1] /t/csrc/layers/winograd.o\n",
        "c++ -MMD -MF /t/csrc/layers/winograd.o.d -c /w/csrc/layers/winograd.cpp\n",
        "/w/csrc/layers/winograd.cpp:3:1: error: expected unqualified-id\n",
        "ninja: build stopped: subcommand failed.\n",
        "g++ -shared /t/csrc/cpu/avx2.o -o /t/_C.so\n",
    ]
    assert list(build.shortened(lines, time.monotonic() - 12)) == [
        "dafl_fast 1.0: building CPU only\n",
        "  1/3  csrc/cpu/avx2.cpp  12 s\n",
        "  2/3  csrc/cuda/row.cu  12 s\n",
        "FAILED: [code=1] /t/csrc/layers/winograd.o\n",
        "/w/csrc/layers/winograd.cpp:3:1: error: expected unqualified-id\n",
    ]


def test_what_to_expect_of_the_demo():
    said = demo.text("avx512_bf16", "A CPU", 2, None).splitlines()
    assert said == [
        "A CPU, 2 threads, instructions avx512_bf16, no GPU",
        "The demo trains for 2 minutes; make demo ARGS='--max-seconds 30' for 30 s.",
        "With two threads of this kind expect about 98 % after 10 s and 98.6 % after 60 s, later "
        "beside other programs.",
    ]
    assert "98 % after 10 s" not in demo.text("avx2", "A CPU", 2, None)
    said = demo.text("baseline", "A CPU", 1, None)
    assert said.startswith("A CPU, 1 thread, instructions baseline, no GPU\n")
    assert said.endswith("has not been measured.")
    said = demo.text("avx2", "A CPU", 16, "A GPU")
    assert said.startswith("A GPU; A CPU, 16 threads, instructions avx2\n")
    assert "an H100 takes 1 s" in said

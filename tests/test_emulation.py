"""The emulation that tests/test_cuda_emulated.py rests on: kernels that are wrong in one way each,
and what it says of them."""

import ctypes
import subprocess

import pytest
import torch

from tests import emulated
from tests.emulated import Arena, Fault, address

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++")
ORDERS = range(12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    source = emulated.ROOT / "tests/emulation/faults.cpp"
    subprocess.run(emulated.command(emulated.ROOT, source, folder / "faults.o"), check=True)
    emulated.link([folder / "faults.o"], folder / "faults.so")
    library = ctypes.CDLL(str(folder / "faults.so"))
    library.set_order.argtypes = [ctypes.c_uint64]

    def run(name, out=None, order=0):
        library.set_order(order)
        function = getattr(library, f"run_{name}")
        function.restype = ctypes.c_char_p
        said = function(address(out) if out is not None else None)
        if said is not None:
            raise Fault(said.decode())
        return out

    return run


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_warp_does_together(run, order):
    out = run("sums", torch.zeros(64, 16, dtype=torch.int32), order)
    assert torch.equal(out[:32], out[32:])
    lane = torch.arange(32)
    value = lane - 7
    ballot = sum(1 << i for i in range(0, 32, 3))
    expected = [
        torch.full((32,), -2), value[lane ^ 16], value[(lane + 1).clamp(max=31)],
        torch.where(lane % 8 == 0, value, value - 1), torch.full((32,), int(value.sum())),
        torch.full((32,), -7), torch.full((32,), 24), torch.zeros(32), torch.full((32,), -1),
        torch.full((32,), ballot - (ballot >> 31 << 32)), torch.ones(32), torch.zeros(32),
        torch.where(lane < 8, value[:8].sum(), value[lane ^ 1]), torch.full((32,), -7),
        torch.ones(32), torch.ones(32),
    ]  # fmt: skip
    assert torch.equal(out[:32].long(), torch.stack([column.long() for column in expected], 1))


def test_numbers_as_cuda_has_them(run):
    out = run("numbers", torch.zeros(11)).tolist()
    assert out == [2, 3, -1, 8, 1, 65504, -1.5, 1, 128, 26, 26]


def test_orders(run):
    def turns(name, order):
        return run(name, torch.zeros(1 + 6 * 64, dtype=torch.int32), order)[1:]

    forward = torch.arange(6 * 64, dtype=torch.int32)
    for name in ("turns", "turns_cluster"):
        assert torch.equal(turns(name, 0), forward)
        assert torch.equal(turns(name, 1), forward.flip(0))
        assert torch.equal(turns(name, 7), turns(name, 7)), "a seed is an order"
        seen = torch.stack([turns(name, seed) for seed in range(2, 42)])
        firsts = (seen == 0).nonzero()[:, 1]
        assert len(set((firsts // 64).tolist())) == 6, "every block comes first at times"
        assert len(set((firsts % 64 // 32).tolist())) == 2, "every warp"
        assert len(set((firsts % 32).tolist())) > 15, "and many lanes"


def test_a_missing_barrier_changes_results(run):
    expected = (torch.arange(64) + 32) % 64
    for order in ORDERS:
        assert not torch.equal(run("barrier_missing", torch.zeros(64), order), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier_skipped", "threads wait for threads that never come"),
        ("unnamed_lane", "under a mask that does not name it"),
        ("named_lane_elsewhere", "names a lane that has returned|that never come"),
        ("two_masks", "under different masks|has returned|never come"),
        ("two_masks_at_once", "under a mask that does not name it|under different masks"),
        ("absent_lane", "reads a lane that is not in the shuffle's mask"),
        ("two_operations", "lanes of a warp meet in different operations"),
        ("behind_shared", "written behind its end"),
        ("remote_unmet", "shared memory of the cluster's block [01], which (does not run yet|has)"),
        ("arrives_twice", "arrives at a cluster barrier a second time"),
        ("never_arrives", "without having arrived"),
        ("mailboxes_closed", "a mailbox is used before it is opened"),
        ("mailboxes_unexpected", "never come"),
        ("cluster_too_large", "a launch that no GPU accepts"),
    ],
)
def test_what_is_undefined_is_found_in_every_order(run, name, message):
    for order in ORDERS:
        with pytest.raises(Fault, match=message):
            run(name, torch.zeros(4096), order)


def test_shared_memory_of_a_block_that_has_ended(run):
    for order in ORDERS:
        out = run("remote", torch.zeros(4 * 64), order)
        assert torch.equal(out.view(4, 64)[:, 0], torch.tensor([1.0, 0, 1, 0]))

    def leave_early():
        for order in ORDERS:
            run("remote_left", torch.zeros(4 * 64), order)

    with pytest.raises(Fault, match="has ended"):
        leave_early()


def test_mailboxes(run):
    """With two sets in turn nobody overtakes; with one, somebody does in some order."""
    turn = torch.arange(8).view(8, 1, 1) * 10
    expected = (turn + torch.tensor([1, 0]).view(1, 2, 1)).expand(8, 2, 64).float()
    for order in ORDERS:
        assert torch.equal(run("mailboxes", torch.zeros(8, 2, 64), order), expected)

    def wrong(order):
        try:
            return not torch.equal(run("mailboxes_one_set", torch.zeros(8, 2, 64), order), expected)
        except Fault:
            return True

    assert sum(map(wrong, ORDERS)) > 3


@pytest.mark.parametrize("name", ["before", "behind"])
def test_an_address_outside_of_a_tensor(run, name):
    message = r"address 0x\w+ is not the kernel's \(block 0, thread 1\)"
    with pytest.raises(Fault, match=message):
        run(name, Arena(at_end=name == "behind").poisoned(64))
    arena = Arena(at_end=name != "behind")
    out = run(name, arena.poisoned(63))
    assert out.isnan().all() and arena.intact()  # a gap's poison was read
    run("barrier_missing", out)
    assert not arena.intact()  # it was written to


def test_a_misaligned_access(run):
    for order in ORDERS:
        with pytest.raises(Fault, match=r"a misaligned access \(block 0, thread 1\)"):
            run("misaligned", torch.zeros(64), order)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("at_end", [True, False])
def test_arenas_keep_values_strides_and_alignment(at_end, offset):
    x = torch.arange(200.0)[offset:]
    for layout in (x[:8].view(4, 2), x[:12].view(3, 4).t(), x[:30].view(3, 10)[:, 2:9:2],
                   x[:4].expand(7, 4), x[3], x[:0].view(0, 3)):  # fmt: skip
        arena = Arena(at_end)
        placed = arena.copy(layout)
        assert torch.equal(placed, layout) and arena.intact()
        if layout.numel():
            assert placed.stride() == layout.stride()
            assert placed.data_ptr() % 16 == layout.data_ptr() % 16

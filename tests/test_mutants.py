"""The list of tests/mutants.py and what tools/mutants.py makes of it."""

import itertools

import pytest

from tests.emulated import COMPILER, ROOT
from tests.mutants import MUTANTS, Mutant
from tools.mutants import TESTS, Bench, chosen, parser


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file[10:]} {m.why}")
def test_a_mutant_changes_one_place(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old


def test_there_are_many_mutants_and_each_has_its_turn():
    killable = chosen(parser().parse_args([]))
    assert len(killable) >= 40 and len({m[:3] for m in MUTANTS}) == len(MUTANTS)
    thirds = [chosen(parser().parse_args(["--third", third])) for third in "012"]
    assert sorted(itertools.chain(*thirds)) == sorted(killable)
    assert chosen(parser().parse_args(["--third", "today"])) in thirds


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_verdicts(tmp_path):
    place = ("csrc/cuda/generator_loss.cu", "return __fmul_rn(factor,")
    killer = "test_upstream_gradients[50]"  # the first with rows in registers
    cases = [
        ("/* the same */" + place[1], "", ""),
        (place[1] + " 2 *", killer, "not close"),
        ("return *reinterpret_cast<float*>(8);" + place[1], killer, "address 0x8 is"),
        ("not C++", "", "was not declared in this scope"),
    ]
    mutants = [Mutant(*place, new, new) for new, *_ in cases]
    bench = Bench(tmp_path, f"{TESTS}::test_upstream_gradients")
    verdicts = dict(bench.judge(mutants, jobs=2))
    for mutant, (_, killer, how) in zip(mutants, cases):
        verdict = verdicts[mutant]
        assert verdict.killer == killer and how in verdict.how, verdict

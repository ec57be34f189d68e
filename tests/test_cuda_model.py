"""The counting of instructions and the times predicted from them, without nvcc, nvdisasm or GPU."""

from types import SimpleNamespace

import pytest

from dafl_fast import _C
from tools import cuda_check, cuda_model, sass

# As nvdisasm prints it, shortened: a loop over rows (.L_x_1 to the jump back to it) that reads
# eight numbers in two loads of 16 bytes, or one after the other where rows are not aligned
# (.L_x_2, with a loop of its own). One thread writes a result. Behind EXIT is what nvcc keeps for
# threads out of step, and a division.
LISTING = """
	.headerflags	@"EF_CUDA_SM90"
//--------------------- .text.rows --------------------------
	.section	.text.rows,"ax",@progbits
.text.rows:
        .type           rows,@function
rows:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0020*/                   MUFU.EX2 R9, R9 ;
.L_x_1:
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0060*/              @!P1 LDG.E.128 R8, desc[UR6][R2.64+0x200] ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*0090*/                   FADD R5, R4, R5 ;
        /*00a0*/                   FADD R6, R5, R6 ;
        /*00b0*/                   FADD R7, R5, R7 ;
        /*00c0*/                   FADD R8, R5, R8 ;
        /*00d0*/               @P2 BRA `(.L_x_2) ;
.L_x_3:
        /*00e0*/                   FADD R12, -R11, R12 ;
        /*00f0*/                   MUFU.EX2 R4, R4 ;
        /*0100*/                   BRA.DIV UR4, `(.L_x_5) ;
        /*0110*/                   SHFL.BFLY PT, R13, R12, 0x10, 0x1f ;
        /*0120*/               @P3 BRA `(.L_x_4) ;
        /*0130*/                   F2F.F64.F32 R20, R13 ;
        /*0140*/                   DADD R22, R22, R20 ;
        /*0150*/                   STG.E desc[UR6][R14.64], R13 ;
.L_x_4:
        /*0160*/                   ISETP.GE.AND P4, PT, R3, R0.reuse, PT ;
        /*0170*/              @!P4 BRA `(.L_x_1) ;
        /*0180*/                   EXIT ;
.L_x_5:
        /*0190*/                   WARPSYNC.COLLECTIVE R60, `(.L_x_6) ;
        /*01a0*/                   SHFL.BFLY P0, R58, R61, R62, R63 ;
.L_x_6:
        /*01b0*/                   BRA `(.L_x_4) ;
$__internal_8_$__cuda_sm20_div_s64:
        /*01c0*/                   RET.REL.NODEC R12 `(rows) ;
.L_x_7:
        /*01d0*/                   BRA `(.L_x_7);
.L_x_8:
"""
FAST = [
    "IADD3", "BRA", "LDG.E.128", "LDG.E.128", "BRA", "FADD", "MUFU.EX2", "BRA.DIV", "SHFL.BFLY",
    "BRA", "F2F.F64.F32", "DADD", "STG.E", "ISETP.GE.AND", "BRA",
]  # fmt: skip


@pytest.fixture(scope="module")
def blocks():
    functions = sass.functions(LISTING)
    assert list(functions) == ["rows"]
    return functions["rows"]


def test_loops_are_found_and_nested(blocks):
    loops = sorted(sass.loops(blocks), key=lambda loop: len(loop.blocks))
    inner, outer = loops  # not that behind EXIT, which nothing leads to
    assert inner.blocks < outer.blocks
    assert blocks[inner.header].instructions[0].opcode == "LDG.E"
    assert blocks[outer.header].instructions[0].opcode == "IADD3"


def test_the_fast_path_is_counted_and_what_one_thread_does_is_part_of_it(blocks):
    turn, passes = sass.row_loop(blocks, 16)
    assert [i.opcode for i in turn.instructions] == FAST and passes == []
    assert turn.loaded == 32
    assert turn.in_flight() == 2
    cycles = turn.cycles()
    assert cycles["instructions"] == 15
    assert cycles["special functions"] == 8 * 2  # EX2 and a conversion to fp64
    assert cycles["fp64"] == 2
    assert cycles["comparisons and integers"] == 2 * 2
    assert cycles["loads, stores, shuffles"] == 4 * 4


def test_a_load_that_waits_for_the_one_before_is_not_in_flight_with_it(blocks):
    text = LISTING.replace("@!P1 LDG.E.128 R8, desc[UR6][R2.64+", "LDG.E.128 R8, desc[UR6][R4.64+")
    turn, _ = sass.row_loop(sass.functions(text)["rows"], 16)
    assert turn.in_flight() == 1


def test_loads_that_the_next_turn_needs_are_in_flight_across_the_jump_back():
    text = LISTING.replace("STG.E desc[UR6][R14.64], R13", "LDG.E.128 R24, desc[UR6][R14.64]")
    text = text.replace("FADD R12, -R11, R12", "FADD R12, -R24, R12")
    turn, _ = sass.row_loop(sass.functions(text)["rows"], 16)
    assert turn.in_flight() == 3


def test_a_loop_over_columns_is_a_pass_over_the_row():
    text = LISTING.replace("LDG.E R4", "LDG.E.128 R4").replace("@!P0 BRA", "@!P6 BRA")
    turn, passes = sass.row_loop(sass.functions(text)["rows"], 16)
    # The path with more wide loads is still the one without that loop, unless it is the only one.
    assert [i.opcode for i in turn.instructions] == FAST
    text = text.replace("@!P6 BRA `", "BRA `")
    turn, passes = sass.row_loop(sass.functions(text)["rows"], 16)
    assert [len(one.instructions) for one in passes] == [6]
    assert len(turn.instructions) == len(FAST) - 3 + 6
    name = "generator_forward_rows_kernel<Rows<128, 12, false, 4>, float>"
    k = kernel_named(name, text)
    assert k.instructions == (18 + 2 * 6) / 12  # 4 columns in each of three turns of the loop


def test_no_loop_with_wide_loads_and_exponentials_no_turn(blocks):
    assert sass.row_loop(blocks, 8) is None
    without = sass.functions(LISTING.replace("MUFU.EX2 R4", "MUFU.RCP R4"))["rows"]
    assert sass.row_loop(without, 16) is None


def kernel_named(name, text=LISTING):
    return cuda_model.kernel_of(name, sass.functions(text)["rows"], 128, 0)


def test_a_name_says_loss_direction_dtype_and_how_rows_are_shared():
    k = kernel_named("generator_forward_rows_kernel<Rows<128, 8, false, 4>, float>")
    assert (k.loss, k.direction, k.dtype, k.regime) == ("generator", "forward", "fp32", "block")
    assert (k.group, k.threads, k.values, k.loads, k.flight) == (128, 128, 8, 2, 2)
    assert k.instructions == 15 / 8
    k = kernel_named("generator_backward_rows_kernel<Rows<32, 16, false, 2>, __nv_bfloat16>")
    assert (k.dtype, k.regime, k.threads, k.instructions) == ("bf16", "warp", 256, 15 / 16)
    k = kernel_named("distill_forward_rows_kernel<Rows<512, 32, true, 1>, __half>")
    assert (k.loss, k.dtype, k.regime, k.instructions) == ("distill", "fp16", "cluster", 15 / 8)
    k = kernel_named("distill_backward_kernel<__half, 256>")
    assert (k.direction, k.dtype, k.regime, k.values) == ("backward", "fp16", "block", 16)
    assert kernel_named("generator_totals_kernel<float>") is None
    assert kernel_named("generator_forward_rows_kernel<Rows<128, 8, false, 4>, int>") is None


def kernel(instructions=20.0, special=8.0, **changes):
    k = kernel_named("generator_forward_rows_kernel<Rows<512, 32, false, 1>, float>")
    cycles = {"instructions": instructions, "special functions": special}
    return k._replace(**{**dict(cycles=cycles, loads=8, flight=8), **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(), []),
        (dict(dtype="bf16"), []),
        (dict(dtype="bf16", instructions=22.5), ["22.5 instructions an element, at most 22"]),
        (dict(dtype="bf16", instructions=25.0, cluster=True), []),
        (dict(dtype="bf16", instructions=27.0, direction="backward"), []),
        (dict(dtype="bf16", instructions=29.0, direction="backward"), ["at most 28"]),
        (dict(instructions=27.0), ["at most 26"]),
        (dict(loss="distill", instructions=67.0), ["67.0 instructions a pair, at most 66"]),
        (dict(flight=3), ["loads in flight: 3, at least 4 are wanted"]),
        (dict(flight=1, loads=1), []),  # a row has no more
    ],
    ids=str,
)
def test_budgets(changes, said):
    found = list(kernel(**changes).over_budget())
    assert len(found) == len(said) and all(b in a for a, b in zip(found, said, strict=True)), found


def test_blocks_that_fit_a_multiprocessor():
    assert kernel().resident(1000) == 1  # 512 threads of 128 registers
    assert kernel(registers=64).resident(1000) == 2
    assert kernel(registers=33).resident(1000) == 3  # taken in eights
    assert kernel(registers=16).resident(1000) == 4  # 2048 threads
    assert kernel(registers=16).resident(100_000) == 2


def test_the_planner_is_asked_and_not_copied():
    sizes = [(1024, 10), (32768, 1024), (32768, 16384), (16384, 131072)]
    for (N, C), plan in cuda_model.plans(sizes).items():
        expected = _C.plan(N, C, False, cuda_model.MULTIPROCESSORS, 90)
        assert plan.regime == expected["regime"]
        for name in ("threads", "cluster", "parts", "blocks", "shared"):
            assert getattr(plan, name) == expected[name], name


def test_times_follow_from_bytes_instructions_and_waves():
    m = cuda_model
    plan = m.Plan("block", 512, 1, 132, 132, 132, 1000)
    N, C = 13200, 16384
    started = m.LAUNCH + 2 * (m.NEXT_LAUNCH + 3 * m.ADD_PARTS)
    bytes_bound = m.predict(kernel(), plan, N, C)
    assert bytes_bound.bound == "bytes" and bytes_bound.waves == 1
    assert bytes_bound.seconds == pytest.approx(4 * N * C / m.COPY + started)
    assert bytes_bound.share == pytest.approx(4 * N * C / m.COPY / bytes_bound.seconds)

    # 100 rows a block, of 32 columns for each of 512 threads: 16 warps on four quarters.
    many = kernel(instructions=60.0)
    seconds = 100 * 4 * 32 * 60 / m.ISSUED / m.CLOCK
    slow = m.predict(many, plan, N, C)
    assert slow.bound == "instructions" and slow.seconds == pytest.approx(seconds + started)
    special = kernel(special=60.0)
    assert m.predict(special, plan, N, C).bound == "special functions"
    assert m.predict(special, plan, N, C).seconds == pytest.approx(
        100 * 4 * 32 * 60 / m.CLOCK + started
    )

    # A block more than fits starts when the others are done, and takes as long as they did.
    one_more = plan._replace(parts=133, blocks=133)
    later = m.predict(many, one_more, 13300, C)
    assert later.waves == pytest.approx(133 / 132)
    assert later.seconds == pytest.approx(2 * seconds + started)


def test_of_several_kernels_the_smallest_that_holds_a_row_is_taken():
    few, many = (kernel(group=32, values=v) for v in (8, 32))
    plan = cuda_model.Plan("warp", 256, 1, 256, 256, 256, 1000)
    chosen = [
        cuda_model.kernel_for([many, few], "generator", "forward", "fp32", plan, C)
        for C in (256, 257, 1024)
    ]
    assert chosen == [few, many, many]
    assert cuda_model.kernel_for([few], "distill", "forward", "fp32", plan, 256) is None


def test_the_distillation_loss_has_segments_of_rows_in_its_backward_pass():
    plan = cuda_model.Plan("cluster", 512, 8, 96, 768, 120, 9000)
    cut, N, C = cuda_model.in_segments(plan, 16384, 131072)
    assert (cut.regime, cut.cluster, cut.backward_blocks) == ("block", 1, 65536)
    assert (N, C) == (16384 * 32, 4096)
    k = kernel(loss="distill", direction="backward", group=256, values=16, registers=48)
    p = cuda_model.predict(k, cut, N, C)
    assert p.waves == pytest.approx(65536 / (132 * 5))
    assert p.seconds == pytest.approx(3 * 4 * 16384 * 131072 / cuda_model.COPY, rel=0.01)
    cut, N, C = cuda_model.in_segments(plan, 32768, 256)
    assert (cut.regime, cut.backward_blocks, N, C) == ("warp", 4096, 32768, 256)


def test_the_page_is_written_between_its_marks(tmp_path, monkeypatch):
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{cuda_check.BEGIN}\nold\n{cuda_check.END}\nafter\n")
    monkeypatch.setattr(cuda_check, "PAGE", page)
    cuda_check.write_page("| new |")
    cuda_check.write_page("| newer |")
    assert page.read_text() == (
        f"before\n{cuda_check.BEGIN}\n\n| newer |\n\n{cuda_check.END}\nafter\n"
    )
    assert cuda_check.BEGIN in (cuda_check.ROOT / "docs" / "kernels.md").read_text()


def test_registers_and_spills_are_read_from_ptxas():
    log = """ptxas info    : Compiling entry function '_Z1aIfEvi' for 'sm_90'
ptxas info    : Function properties for _Z1aIfEvi
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z1bIfEvi' for 'sm_90'
ptxas info    : Function properties for _Z1bIfEvi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers
ptxas info    : Function properties for _Z6calledv
    0 bytes stack frame, 2 bytes spill stores, 2 bytes spill loads
"""
    assert cuda_check.kernels(log) == {"a<float>": (40, 12), "b<float>": (48, 4)}


def test_nvdisasm_is_looked_for_on_path_in_the_toolkit_and_in_triton(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert cuda_check.find_nvdisasm(tmp_path) is None
    package = SimpleNamespace(origin=str(tmp_path / "triton" / "__init__.py"))
    monkeypatch.setattr(cuda_check.importlib.util, "find_spec", lambda name: package)
    places = [tmp_path / "triton" / "backends" / "nvidia" / "bin", tmp_path / "bin",
              tmp_path / "path"]  # fmt: skip
    for place in places:  # each goes before the one above
        place.mkdir(parents=True)
        (place / "nvdisasm").touch(mode=0o755)
        assert cuda_check.find_nvdisasm(tmp_path) == place / "nvdisasm"


NAME = "generator_forward_rows_kernel<Rows<128, 8, false, 4>, float>"


@pytest.mark.parametrize(
    ("arguments", "compiled", "code", "printed", "failed"),
    [
        (["sm_90"], dict(listing=LISTING), 0,
         "| generator forward, block 128 × 8 | fp32 | 1.9 | 26 | 2 of 16 bytes | 64 | 0 | 8 |", ""),
        (["sm_90"], dict(listing=LISTING.replace("EX2", "RCP")), 1, "", f"16 bytes in {NAME}"),
        (["sm_90"], dict(registers={NAME: (64, 40)}, listing=LISTING), 1, "64/40",
         f"{NAME} spills 40 bytes for sm_90, 32 are allowed"),
        (["sm_90"], dict(registers={NAME: (64, 8)}, listing=LISTING), 0, "64/8", ""),
        (["sm_90"], dict(uncounted="nvdisasm cannot read cubin: too new"), 0,
         "not counted: nvdisasm cannot read cubin: too new.", ""),
        (["sm_80"], dict(), 0, "not counted: sm_90 is not among the architectures.", ""),
        (["sm_90"], dict(error="a.cu does not compile for sm_90", registers={}), 1,
         "not counted: nothing compiled for sm_90.", "a.cu does not compile"),
    ],
    ids=["fine", "no loop", "spills", "spills little", "old nvdisasm", "no sm_90", "no kernel"],
)  # fmt: skip
def test_the_command(arguments, compiled, code, printed, failed, tmp_path, monkeypatch, capsys):
    one = cuda_check.Compiled(**{"registers": {NAME: (64, 0)}, **compiled})
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "a.cu").touch()
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_check, "compilers_home", lambda: tmp_path)
    monkeypatch.setattr(cuda_check, "find_nvdisasm", lambda home: tmp_path)
    monkeypatch.setattr(cuda_check, "compile_source", lambda *_: one)
    monkeypatch.setattr(cuda_check, "demangled", lambda names: [NAME for _ in names])
    monkeypatch.setattr(cuda_check.sys, "argv", ["cuda_check.py", *arguments])
    assert cuda_check.main() == code
    said = capsys.readouterr()
    assert printed in said.out and failed in said.err
    assert bool(said.err) == bool(failed)


def test_without_nvdisasm_one_sentence_says_where_it_was_looked_for(tmp_path):
    said = cuda_check.why_not([], tmp_path, ["sm_90"], None)
    assert said == (f"no nvdisasm on PATH, in {tmp_path / 'bin'} or in the package triton, which "
                    "`pip install --no-deps triton` brings")  # fmt: skip

"""Reads what nvdisasm prints of a cubin: a kernel's loop over rows, and what a turn of it takes.

A kernel's instructions are cut into blocks, its loops are found, and of the loop the path that
full, aligned rows take: the one with the most wide accesses of global memory. Where a branch
leaves a choice apart from that, the path goes through the more instructions: what one thread of a
warp does takes the whole warp's time.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"`\((\.L\w+)\)")

# Cycles that a part of a quarter multiprocessor is busy with an instruction of a warp; to issue any
# takes 1. For compute capability 9.0, from the CUDA programming guide's table of throughputs.
PIPES = {
    "special functions": (8, re.compile(r"MUFU|F2F\.|F2I|I2F\.|FRND|POPC|FLO")),
    "fp64": (2, re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)")),
    "comparisons and integers": (2, re.compile(
        r"ISETP|FSETP|FSET|FSEL|FMNMX|SEL|LOP3|PLOP3|SHF\b|PRMT|LEA|IADD|VIADD|MOV|IABS|IMNMX"
        r"|VIMNMX|F2FP|I2FP|HMNMX2"
    )),
    "integer products": (2, re.compile(r"IMAD")),
    "loads, stores, shuffles": (4, re.compile(r"(LD|ST|LDS|STS|LDG|STG|LDL|STL|SHFL)\b")),
}  # fmt: skip


class Instruction(NamedTuple):
    guard: str  # @P0, @!P0 or nothing
    opcode: str
    operands: str

    @property
    def target(self) -> str | None:
        """Where it may jump to. Not followed: BRA.DIV, for warps whose threads are out of step."""
        found = TARGET.search(self.operands) if self.opcode.startswith("BRA") else None
        return found[1] if found and ".DIV" not in self.opcode else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction can follow."""
        if self.opcode.startswith("BRA") and self.target:
            return bool(self.guard) or not self.operands.startswith("`")
        return bool(self.guard) or not re.match(r"(EXIT|RET|BRX|JMX|BPT)\b", self.opcode)

    def bytes_of(self, kind: str) -> int:
        """Bytes a thread moves from or to global memory, `kind` LDG or STG; 0: something else."""
        if not re.match(rf"{kind}\b", self.opcode):
            return 0
        width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", self.opcode)
        return {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[width[1]] if width else 4

    def written(self) -> set[int]:
        """Registers that a load fills."""
        first = re.match(r"(?:U?PT?\d*, )?R(\d+)", self.operands)
        if first is None:
            return set()
        return set(range(int(first[1]), int(first[1]) + max(1, self.bytes_of("LDG") // 4)))

    def read(self) -> set[int]:
        operands = self.operands
        if not re.match(r"(ST|RED|BAR)", self.opcode):
            operands = re.sub(r"^R\d+(\.\w+)*,", "", operands)
        return {int(number) for number in re.findall(r"\bR(\d+)", operands)}


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


class Loop(NamedTuple):
    header: int
    blocks: frozenset[int]
    latches: frozenset[int]  # blocks that jump back to the header


class Turn(NamedTuple):
    """The instructions of one turn of a loop, on the way that full and aligned rows take."""

    instructions: list[Instruction]
    width: int  # bytes of a wide access

    @property
    def loaded(self) -> int:
        """Bytes that a thread loads in a turn, with wide accesses."""
        sizes = (i.bytes_of("LDG") for i in self.instructions)
        return sum(size for size in sizes if size == self.width)

    def in_flight(self) -> int:
        """Wide loads under way before the first instruction that needs one of them.

        The path is followed twice, for loads that the next turn needs.
        """
        most = 0
        waiting: list[set[int]] = []
        for instruction in [*self.instructions, *self.instructions]:
            if any(instruction.read() & registers for registers in waiting):
                waiting = []
            if instruction.bytes_of("LDG") == self.width:
                written = instruction.written()
                waiting = [registers for registers in waiting if not registers & written]
                waiting.append(written)
                most = max(most, len(waiting))
        return most

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, i.opcode) is not None for i in self.instructions)

    def cycles(self) -> dict[str, float]:
        """Cycles of a quarter of a multiprocessor for a warp's turn, by what they are spent on."""
        spent: dict[str, float] = {"instructions": len(self.instructions)}
        for name, (cycles, pattern) in PIPES.items():
            matching = sum(pattern.match(i.opcode) is not None for i in self.instructions)
            spent[name] = cycles * matching
        return spent


def disassemble(nvdisasm: Path, cubin: Path) -> str:
    done = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{nvdisasm} cannot read {cubin.name}: {done.stderr.strip()}")
    return done.stdout


def functions(text: str) -> dict[str, list[Block]]:
    """The blocks of every kernel in `text`, by its mangled name. The first block is the entry."""
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.M)
    return {name: blocks_of(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def blocks_of(body: str) -> list[Block]:
    blocks = [Block()]
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := re.match(r"(\.L\w+|\$\S+):", line):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.search(line):
            one = Instruction((found[2] or "").strip(), found[3], found[4].strip())
            blocks[-1].instructions.append(one)
            if one.target or not one.goes_on:
                blocks.append(Block())
    for number, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if last is not None and last.target:
            block.after.append(labels[last.target])
        if (last is None or last.goes_on) and number + 1 < len(blocks):
            block.after.append(number + 1)
    return blocks


def loops(blocks: Sequence[Block]) -> list[Loop]:
    """Natural loops, one for each header."""
    order = topological(range(len(blocks)), 0, lambda b: blocks[b].after)
    before: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for a in blocks[b].after:
            before[a].append(b)
    # Dominators, as sets of bits.
    everywhere = (1 << len(blocks)) - 1
    dominators = dict.fromkeys(order, everywhere)
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            common = everywhere
            for a in before[b]:
                common &= dominators[a]
            common |= 1 << b
            if common != dominators[b]:
                dominators[b], changed = common, True
    latches: dict[int, set[int]] = {}
    for b in order:
        for a in blocks[b].after:
            if dominators[b] >> a & 1:
                latches.setdefault(a, set()).add(b)
    found = []
    for header, ends in latches.items():
        inside, todo = {header}, list(ends)
        while todo:
            b = todo.pop()
            if b not in inside:
                inside.add(b)
                todo += before[b]
        found.append(Loop(header, frozenset(inside), frozenset(ends)))
    return found


def topological(
    nodes: Iterable[int], start: int, after: Callable[[int], Sequence[int]]
) -> list[int]:
    """Nodes reached from `start`, each before what follows it but for jumps back."""
    allowed = set(nodes)
    seen = {start}
    done: list[int] = []
    stack = [(start, iter(after(start)))]
    while stack:
        node, rest = stack[-1]
        for a in rest:
            if a in allowed and a not in seen:
                seen.add(a)
                stack.append((a, iter(after(a))))
                break
        else:
            done.append(node)
            stack.pop()
    return done[::-1]


def fast_path(blocks: Sequence[Block], loop: Loop, width: int) -> Turn | None:
    """One turn of `loop` with loads of `width` bytes; None if it has none.

    Loops inside are passed once.
    """
    order = topological(sorted(loop.blocks), loop.header, lambda b: blocks[b].after)
    place = {b: at for at, b in enumerate(order)}

    def worth(block: Block) -> tuple[int, ...]:
        wide = calls = narrow = 0
        for i in block.instructions:
            loaded, stored = i.bytes_of("LDG"), i.bytes_of("STG")
            wide += width in (loaded, stored)
            calls += i.opcode.startswith("CALL")
            narrow += 0 < loaded < 8 or 0 < stored < 4
        return wide, -calls, -narrow, len(block.instructions)

    best: dict[int, tuple[tuple[int, ...], int | None]] = {}
    for b in order:
        arriving = [
            (best[a][0], a) for a in order[: place[b]] if a in best and b in blocks[a].after
        ]
        so_far, previous = max(arriving) if arriving else ((0, 0, 0, 0), None)
        own = worth(blocks[b])
        best[b] = tuple(x + y for x, y in zip(so_far, own, strict=True)), previous
    ends = [(best[b][0], b) for b in loop.latches]
    step: int | None = max(ends)[1]
    way = []
    while step is not None:
        way.append(step)
        step = best[step][1]
    turn = Turn([i for b in reversed(way) for i in blocks[b].instructions], width)
    return turn if turn.loaded > 0 else None


def row_loop(blocks: Sequence[Block], width: int) -> tuple[Turn, list[Turn]] | None:
    """A turn of the loop over rows of a kernel with exponentials, on its fast path.

    Behind it the turns of loops inside that read from the row, each a pass over it.
    """
    every = loops(blocks)
    outermost = [a for a in every if not any(a.blocks < b.blocks for b in every)]
    found = []
    for loop in outermost:
        turn = fast_path(blocks, loop, width)
        if turn is not None and turn.count(r"MUFU\.EX2"):
            found.append((turn.loaded, -len(turn.instructions), loop, turn))
    if not found:
        return None
    _, _, loop, turn = max(found, key=lambda one: one[:2])
    passes = [fast_path(blocks, a, width) for a in every if a.blocks < loop.blocks]
    return turn, [one for one in passes if one is not None]

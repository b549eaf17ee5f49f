"""What nvcc says of a kernel: registers and shared memory from ptxas, loops and their instructions from nvdisasm."""

import re
from collections import Counter
from typing import NamedTuple

# One line of nvdisasm: "/*0290*/  @!P0 IMAD.WIDE.U32 R2, R10, 0x4, R2 ;"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)(.*)")
TARGET = re.compile(r"`\((\.L_\w+)\)")
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
RESOURCES = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")

CLASSES = {
    "tensor": "HMMA IMMA QMMA",
    "fma": "FFMA FMUL FADD IMAD HFMA2 HMUL2 HADD2 IDP FSWZADD",
    "convert": "F2F I2F F2I MUFU POPC FLO BREV I2FP F2IP",  # a quarter of the rate of others
    "global": "LDG STG LDGSTS RED ATOMG ATOM LD ST",
    "shared": "LDS STS LDSM SHFL ATOMS",
    "sync": "BAR WARPSYNC BSSY BSYNC DEPBAR LDGDEPBAR NOP YIELD MEMBAR BREAK ERRBAR CCTL",
    "branch": "BRA EXIT RET CALL BRX",
}
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}
WIDE = {"X", "EX", "WIDE", "S64", "U64"}  # of 64-bit addresses and counts, where they are no load's or store's


class Instruction(NamedTuple):
    opcode: str  # with its modifiers
    target: str | None  # a label, of a branch

    @property
    def kind(self) -> str:
        base = self.opcode.split(".")[0]
        if base in CLASS_OF:
            return CLASS_OF[base]
        return "uniform" if base[0] == "U" and base != "UNDEF" else "alu"

    @property
    def wide(self) -> bool:
        """Return whether this is half of an operation on 64 bits, such as one on an address."""
        base, *modifiers = self.opcode.split(".")
        return self.kind in ("alu", "fma", "uniform") and base != "MOV" and not WIDE.isdisjoint(modifiers)


class Function(NamedTuple):
    name: str  # mangled
    instructions: list[Instruction]
    labels: dict[str, int]  # the index of the instruction behind it

    def loops(self) -> list[range]:
        """Return the range of each loop: a branch back and its target, not behind the end, where code seldom runs."""
        found = []
        for i, instruction in enumerate(self.instructions):
            start = self.labels.get(instruction.target or "")
            if start is None or i - start < 2:
                continue
            if not any(one.opcode == "EXIT" for one in self.instructions[start:i]):
                found.append(range(start, i + 1))
        return found

    def body(self, marker: str) -> list[Instruction]:
        """The loop that has most instructions whose opcode begins with `marker`, without loops inside that have none.

        Of two the shorter, and where no loop has any, the whole function up to the last EXIT.
        """

        def count(span: range) -> int:
            return sum(self.instructions[i].opcode.startswith(marker) for i in span)

        loops = self.loops()
        best = max(loops, key=lambda span: (count(span), -len(span)), default=range(0))
        if count(best) == 0:
            last = max((i for i, one in enumerate(self.instructions) if one.opcode.startswith("EXIT")), default=-1)
            best = range(last + 1)
        left_out = {
            i
            for span in loops
            if span != best and best.start <= span.start and span.stop <= best.stop and not count(span)
            for i in span
        }
        return [self.instructions[i] for i in best if i not in left_out]


class Resources(NamedTuple):
    registers: int
    shared: int  # bytes, static
    spilled: int  # bytes


def functions(text: str) -> dict[str, Function]:
    """Return the functions in the output of `nvdisasm -c`, by mangled name."""
    found: dict[str, Function] = {}
    current: Function | None = None
    for line in text.splitlines():
        if line.startswith(".text.") and line.endswith(":"):
            name = line[len(".text.") : -1]
            current = found[name] = Function(name, [], {})
        elif current is None:
            continue
        elif line.startswith(".L_") and line.rstrip().endswith(":"):
            current.labels[line.strip()[:-1]] = len(current.instructions)
        elif match := INSTRUCTION.search(line):
            target = TARGET.search(match[3]) if match[2].startswith("BRA") else None
            current.instructions.append(Instruction(match[2], target[1] if target else None))
    return found


def resources(text: str) -> dict[str, Resources]:
    """Return the resources in the output of `ptxas -v`, by mangled name."""
    found: dict[str, Resources] = {}
    name, spilled = "", 0
    for line in text.splitlines():
        if match := ENTRY.search(line):
            name, spilled = match[1], 0
        elif match := SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif (match := RESOURCES.search(line)) and name:
            found[name] = Resources(int(match[1]), int(match[2] or 0), spilled)
    return found


def by_class(instructions: list[Instruction]) -> Counter[str]:
    """Return the number of instructions of each class, and as `wide` of those on 64 bits."""
    counts = Counter(one.kind for one in instructions)
    counts["wide"] = sum(one.wide for one in instructions)
    return counts

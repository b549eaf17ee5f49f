"""benchmarks/cuda_bounds: what is read off ptxas and nvdisasm, and the times that follow from it."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "cuda_bounds"))

from cards import CARDS, Work, bound, cycles, estimates, resident, times
from sass import Resources, by_class, functions, resources
from work import WORK

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# As nvdisasm -c prints it: a loop of four that are all of the work, one inside it, and code behind the end.
SASS = """
	.section	.text._Z5firstv,"ax",@progbits
.text._Z5firstv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0030*/                   IMAD.WIDE.U32 R2, R10, 0x4, R2 ;
.L_x_1:
        /*0040*/                   LDS R7, [R6] ;
        /*0050*/                   IADD3.X R9, R7, UR6, RZ, P1, !PT ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/                   PRMT R5, R4, 0x5410, R6 ;
        /*0090*/              @!P0 BRA `(.L_x_0) ;
.L_x_2:
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   SHFL.IDX PT, R14, R13, R12, R11 ;
        /*00c0*/                   BRA `(.L_x_0) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
	.section	.text._Z6secondv,"ax",@progbits
.text._Z6secondv:
        /*0000*/                   MUFU.RSQ R1, R2 ;
        /*0010*/                   EXIT ;
"""

PTXAS = """
ptxas info    : Compiling entry function '_Z5firstv' for 'sm_90'
ptxas info    : Function properties for _Z5firstv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 112 registers, used 1 barriers, 37952 bytes smem
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90'
ptxas info    : Function properties for _Z6secondv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
"""

H100, RTX = CARDS


def work(**other):
    return Work("", "", "", "HMMA", **{"markers": 1e6, "bytes": 1e6, "blocks": 132, "threads": 128} | other)


def test_functions_and_their_loops():
    found = functions(SASS)
    assert list(found) == ["_Z5firstv", "_Z6secondv"]
    first = found["_Z5firstv"]
    assert first.loops() == [range(4, 7), range(2, 10)]  # not from behind EXIT, nor a branch to itself
    assert [one.opcode for one in first.body("HMMA")] == [
        "LDG.E.128.CONSTANT",
        "IMAD.WIDE.U32",
        "HMMA.16816.F32.BF16",
        "PRMT",
        "BRA",
    ]
    assert [one.opcode for one in first.body("LDS")] == ["LDS", "IADD3.X", "BRA"]  # the innermost


def test_a_kernel_without_a_loop_is_all_of_it():
    assert [one.opcode for one in functions(SASS)["_Z6secondv"].body("HMMA")] == ["MUFU.RSQ", "EXIT"]


def test_instructions_by_class():
    counts = by_class(functions(SASS)["_Z5firstv"].instructions)
    assert counts == {
        "alu": 3,  # LDC, IADD3, PRMT
        "branch": 6,
        "global": 1,
        "fma": 1,
        "shared": 2,
        "tensor": 1,
        "wide": 2,  # IMAD.WIDE, IADD3.X
    }


def test_resources():
    assert resources(PTXAS) == {"_Z5firstv": Resources(112, 37952, 16), "_Z6secondv": Resources(32, 0, 0)}


@pytest.mark.parametrize(
    ("card", "registers", "shared", "threads", "blocks"),
    [
        (H100, 128, 2240, 128, 4),  # 65,536 registers
        (H100, 32, 37952, 128, 5),  # 228 KB
        (RTX, 32, 37952, 128, 2),  # 100 KB
        (RTX, 32, 0, 256, 6),  # 48 warps
        (H100, 16, 0, 32, 32),  # blocks
        (H100, 33, 0, 256, 6),  # registers in pieces of 8
    ],
)
def test_resident_blocks(card, registers, shared, threads, blocks):
    assert resident(card, Resources(registers, shared, 0), threads) == blocks


def test_cycles_of_pipes():
    body = functions(SASS)["_Z5firstv"].body("HMMA")
    assert cycles(H100, body) == {"issue": 5, "alu": 2, "shared": 4, "tensor": 3.2}
    assert cycles(RTX, body)["tensor"] == 32


def test_times():
    body = functions(SASS)["_Z5firstv"].body("HMMA")
    found = times(H100, work(bytes=30e6), body, Resources(32, 0, 0))
    assert found.memory == pytest.approx(10)
    assert found.issue == pytest.approx(1e6 * 5 / 132 / 4 / 1755)
    assert found.shared == pytest.approx(1e6 * 4 / 132 / 1755)
    assert (found.limit, found.longest) == ("shared", found.shared)
    # One block more than multiprocessors: one of them has two, and takes twice as long.
    more = times(H100, work(blocks=133), body, Resources(32, 0, 0))
    assert more.issue == pytest.approx(found.issue * 2 * 132 / 133)
    assert bound(RTX, work(), body) == pytest.approx(1e6 * 32 / 128 / 4 / 2520)  # its tensor cores


def test_bytes_on_their_way_limit_memory():
    # 132 blocks of 1,000 bytes, and an answer after 800 ns: 165 bytes a ns.
    found = times(H100, work(bytes=165e3, in_flight=1000), [], Resources(32, 0, 0))
    assert found.waiting == pytest.approx(1)
    assert times(H100, work(bytes=3000e3, in_flight=1e6), [], Resources(32, 0, 0)).waiting == pytest.approx(1)


def test_estimates_are_a_range():
    body, small = functions(SASS)["_Z5firstv"].body("HMMA"), Resources(32, 0, 0)
    (low, high), found = estimates(H100, work(bytes=30e6), body, small), times(H100, work(bytes=30e6), body, small)
    # A block of four warps on each multiprocessor is one a scheduler, which hides nothing.
    assert low == pytest.approx(found.longest + 0.7 + 0.8)
    assert high == pytest.approx(found.memory + found.shared + found.issue + 1.5 + 2 * 0.8)
    several = work(bytes=30e6, blocks=4 * 132)
    parts = times(H100, several, body, small).stages
    hidden = max(parts) + (sum(parts) - max(parts)) / 4
    assert estimates(H100, several, body, small)[1] == pytest.approx(hidden + 1.5 + 2 * 0.8)
    # Sums that the last block adds, on a card without clusters.
    plain, shared = (estimates(RTX, work(sums=sums), body, small)[1] for sums in (0, 1e-3))
    assert shared - plain == pytest.approx(2 * 0.6, abs=1e-3)


ARGUMENTS = {
    "typename": r"peftcore::\w+|peftcore::quant4::LaneScales<\(peftcore::ScaleKind\)\d, \d> ",
    "int": r"\d+",
    "bool": "true|false",
    "ScaleKind": r"\(peftcore::ScaleKind\)\d",
}


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.label)
def test_kernels_of_the_table_have_these_template_parameters(work):
    name, arguments = re.fullmatch(r"(\w+)<(.+)>", work.kernel).groups()
    source = (CSRC / work.source).read_text()
    headers = re.findall(rf'#include "({Path(work.source).parent}/\w+\.cuh)"', source)
    text = "".join([source, *((CSRC / header).read_text() for header in headers)])
    (parameters,) = re.findall(rf"template <([^>]+)>\s*__global__[^;{{]*?\b{name}\(", text)
    found, kinds = re.split(r", (?![^<]*>)", arguments), [one.split()[0] for one in parameters.split(", ")]
    assert len(found) == len(kinds)
    for argument, kind in zip(found, kinds, strict=True):
        assert re.fullmatch(ARGUMENTS[kind], argument), (argument, kind)

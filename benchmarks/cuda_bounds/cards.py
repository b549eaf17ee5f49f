"""Two cards, and how long each part of them is busy with a kernel: estimates, from data sheets and instruction counts.

Every scheduler of an SM, of which there are four, issues one instruction of a warp in a cycle. Pipes take longer (CUDA
C++ Programming Guide, "Arithmetic Instructions"): integers, bytes and conversions to 16 bits two cycles, for 16 of 32
lanes; loads and stores share 128 bytes a cycle among the four.
"""

from collections.abc import Iterable
from typing import NamedTuple

from sass import Instruction, Resources


class Card(NamedTuple):
    name: str
    arch: int
    multiprocessors: int
    clock: float  # GHz, as it runs under load
    bandwidth: float  # bytes a ns, by the data sheet
    copy: float  # bytes a ns that a copy reaches
    l2: float  # bytes a ns
    latency: float  # of memory under load, ns
    shared: int  # bytes of a multiprocessor
    warps: int  # of a multiprocessor, at most
    blocks: int
    mma: float  # cycles of a scheduler for an mma.m16n8k16 of 16 bits, sums in fp32
    tf32: float  # for an mma.m16n8k8
    cluster: float = 0  # bytes a ns between the multiprocessors of clusters; 0: there are none
    launch: tuple[float, float] = (0.7, 1.5)  # µs from the end of one kernel of a CUDA graph to the start of the next


# Of an H100's tensor cores `mma.sync` reaches about 0.62 (arXiv 2402.13499): 2 cycles at the full rate. Between
# the multiprocessors of clusters about 2.65 TB/s are taken, which was not checked, and of these kernels bounds none.
# Copies are taken to reach nine tenths of the data sheet's bandwidth.
CARDS = (
    Card("H100 SXM", 90, 132, 1.755, 3350, 3000, 5500, 800, 228 << 10, 64, 32, 3.2, 3.2, 2650),
    Card("RTX 4090", 89, 128, 2.52, 1008, 920, 5000, 600, 100 << 10, 48, 24, 32, 32),
)
REGISTERS, RESERVED = 65536, 1024  # of a multiprocessor; shared memory that a block has beside its own


class Work(NamedTuple):
    """Work of a launch that its code does not tell."""

    label: str
    source: str  # below csrc
    kernel: str  # what its demangled name contains
    marker: str  # an opcode of the inner loop
    markers: float  # how often warps execute it, in all
    bytes: float  # from and to memory: each once
    blocks: int
    threads: int
    again: float = 0  # bytes that come from the second cache once more
    sums: float = (
        0  # bytes that blocks leave for others: in the second cache, or where there are clusters read once there
    )
    in_flight: float = 0  # bytes of memory that a block waits for at a time; 0: enough
    weight_bytes: float = 0  # of the weight alone, in 4 bits
    dynamic_shared: int = 0  # bytes that a launch asks for beside what ptxas knows of
    tickets: bool = False  # blocks leave sums that the last of them adds, on cards without clusters if there are `sums`


class Times(NamedTuple):
    """Times of the parts of a launch, in microseconds."""

    memory: float
    l2: float
    waiting: float
    issue: float
    alu: float
    shared: float
    tensor: float
    cluster: float = 0

    @property
    def longest(self) -> float:
        return max(self)

    @property
    def limit(self) -> str:
        return self._fields[self.index(self.longest)]

    @property
    def stages(self) -> tuple[float, ...]:
        """Return the times of what a warp does one after the other: fetch, load and store shared memory, compute."""
        return (
            max(self.memory, self.l2, self.waiting),
            self.shared,
            max(self.issue, self.alu, self.tensor),
        )


def resident(card: Card, resources: Resources, threads: int) -> int:
    """Return the number of blocks that a multiprocessor holds."""
    warps = -(-threads // 32)
    of_warp = -(-resources.registers * 32 // 256) * 256
    by_registers = REGISTERS // of_warp // warps
    by_shared = card.shared // (-(-resources.shared // 128) * 128 + RESERVED)
    return min(by_registers, by_shared, card.warps // warps, card.blocks)


def _pieces(opcode: str) -> int:
    """Times 128 bytes that a load or store of a warp moves."""
    modifiers = opcode.split(".")
    if modifiers[0] == "LDSM":
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    return 4 if "128" in modifiers else 2 if "64" in modifiers else 1


def cycles(card: Card, instructions: Iterable[Instruction]) -> dict[str, float]:
    """Return the cycles for which one warp keeps a scheduler, its pipes and the shared memory pipe busy, by name."""
    total = dict.fromkeys(("issue", "alu", "shared", "tensor"), 0.0)
    for one in instructions:
        total["issue"] += 1
        if one.kind == "alu":
            total["alu"] += 2
        elif one.kind == "convert":
            total["alu"] += 8
        elif one.kind in ("global", "shared"):
            total["shared"] += _pieces(one.opcode)
        elif one.kind == "tensor":
            total["tensor"] += card.tf32 if "TF32" in one.opcode else card.mma
    return total


def times(card: Card, work: Work, body: list[Instruction], resources: Resources) -> Times:
    """Return the times of a launch on this card, as if each part of it waited for nothing else."""
    here = max(1, sum(one.opcode.startswith(work.marker) for one in body))
    busy = cycles(card, body)
    # The multiprocessor that has most blocks is the last.
    most = -(-work.blocks // card.multiprocessors)
    share = most / work.blocks
    schedulers = work.markers / here * share / (card.clock * 1000)
    held = min(resident(card, resources, work.threads), most)
    rate = work.in_flight * held * card.multiprocessors / card.latency if work.in_flight else card.copy
    return Times(
        memory=work.bytes / card.copy / 1000,
        l2=(work.bytes + work.again + (0 if card.cluster else 2 * work.sums)) / card.l2 / 1000,
        waiting=work.bytes / min(rate, card.copy) / 1000,
        issue=busy["issue"] * schedulers / 4,
        alu=busy["alu"] * schedulers / 4,
        shared=busy["shared"] * schedulers,
        tensor=busy["tensor"] * schedulers / 4,
        cluster=work.sums / card.cluster / 1000 if card.cluster else 0,
    )


def estimates(card: Card, work: Work, body: list[Instruction], resources: Resources) -> tuple[float, float]:
    """Return microseconds between which a launch in a CUDA graph should be.

    The lower one: the longest part, the launch, and one latency of memory until the first bytes arrive. The higher one:
    of the other stages, what the warps of a scheduler do not hide from each other; what clusters add at the end; a
    slower launch; one more latency, of the last stores; and two where the last block takes a ticket and adds sums.
    """
    parts, latency = times(card, work, body, resources), card.latency / 1000
    held = min(resident(card, resources, work.threads), -(-work.blocks // card.multiprocessors))
    warps = max(1.0, held * work.threads / 32 / 4)  # of a scheduler
    exposed = (sum(parts.stages) - max(parts.stages)) / warps
    tickets = work.tickets or (work.sums > 0 and not card.cluster)
    low = parts.longest + card.launch[0] + latency
    return low, max(parts.stages) + exposed + parts.cluster + card.launch[1] + latency * (4 if tickets else 2)


def bound(card: Card, work: Work, body: list[Instruction]) -> float:
    """Return the microseconds that every kernel needs: memory read once, and the products on all tensor cores."""
    here = max(1, sum(one.opcode.startswith(work.marker) for one in body))
    tensor = cycles(card, body)["tensor"] * work.markers / here / 4 / card.multiprocessors / (card.clock * 1000)
    return max(work.bytes / card.bandwidth / 1000, tensor)

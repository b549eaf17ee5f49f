"""What bounds each CUDA kernel on two cards, from what nvcc makes of it and from data sheets. No card is needed.

    python benchmarks/cuda_bounds/run.py [PATTERN]        (`make cuda-bounds` has what it needs)

nvcc compiles csrc's .cu files for both cards; registers and shared memory are ptxas's, instructions those of the inner
loop as nvdisasm prints it. PATTERN: of labels, to see some of them only.

    bound        memory once at the bandwidth of the data sheet, or the products on all tensor cores: nothing is faster
    parts        memory at a copy's rate; what the second cache and clusters give; bytes on their way at a time over
                 memory's latency; instructions over what four schedulers issue; the integer pipe; loads and stores of
                 shared memory and of the first cache; tensor cores. Each as if it waited for nothing
    from         the longest part, the launch in a CUDA graph, and the latency of the first bytes
    to           also what the warps of a scheduler do not hide from each other, the last stores, a slower launch, and
                 where blocks share sums, their counters

All times are estimates until a card has run the kernels.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from cards import CARDS, Card, Work, bound, estimates, resident, times
from sass import Function, Resources, by_class, functions, resources
from work import WORK

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> str:
    """Return the path of nvcc or nvdisasm: from the variable of its name, CUDA, or the package nvidia-cuda-nvdisasm."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / name for home in homes if home]
    places += sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}"))
    found = os.environ.get(name.upper()) or shutil.which(name) or next((str(p) for p in places if p.exists()), None)
    if found is None:
        sys.exit(f"{name} was not found (looked at {name.upper()}, PATH, {', '.join(map(str, places)) or 'no CUDA'})")
    return found


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compiled(source: str, arch: int, folder: Path) -> dict[str, tuple[Function, Resources]]:
    """Return the code and the resources of each kernel in a .cu file, by its demangled name."""
    cubin = folder / f"{Path(source).stem}-{arch}.cubin"
    flags = [f"-arch=sm_{arch}", "-O3", "-std=c++17", "-Xptxas", "-v", "-cubin", f"-I{ROOT / 'csrc'}"]
    used = resources(output(tool("nvcc"), *flags, "-o", str(cubin), str(ROOT / "csrc" / source)))
    code = functions(output(tool("nvdisasm"), "-c", str(cubin)))
    names = output("c++filt", *code).splitlines()
    short = [name.replace("(anonymous namespace)::", "") for name in names]
    return {name: (function, used[key]) for name, (key, function) in zip(short, code.items(), strict=True)}


def found(kernels: dict[str, tuple[Function, Resources]], work: Work) -> tuple[Function, Resources]:
    matches = [name for name in kernels if work.kernel in name]
    if len(matches) != 1:
        sys.exit(f"{work.label}: {len(matches)} kernels of {work.source} are called {work.kernel}: {sorted(kernels)}")
    function, used = kernels[matches[0]]
    return function, used._replace(shared=used.shared + work.dynamic_shared)


def facts(card: Card, work: Work, function: Function, used: Resources) -> list[str]:
    body = function.body(work.marker)
    counts = by_class(body)
    markers = max(1, sum(one.opcode.startswith(work.marker) for one in body))
    bytes_of_weight = work.weight_bytes * markers / work.markers  # of an iteration
    per_byte = f"{len(body) * 32 / bytes_of_weight:.1f}" if work.weight_bytes else ""
    blocks = resident(card, used, work.threads)
    mix = [f"{counts[kind]} {kind}" for kind in ("tensor", "fma", "alu", "convert", "global", "shared", "sync")]
    return [
        work.label,
        f"{work.bytes / 1e6:.1f}",
        str(used.registers) + (f", {used.spilled} spilled" if used.spilled else ""),
        f"{used.shared / 1024:.1f}",
        f"{blocks} x {work.threads // 32}",
        f"{len(body)}: " + ", ".join(text for text in mix if not text.startswith("0 ")) + f"; {counts['wide']} wide",
        per_byte,
    ]


def estimate(card: Card, work: Work, function: Function, used: Resources) -> list[str]:
    body = function.body(work.marker)
    spent, least = times(card, work, body, used), bound(card, work, body)
    low, high = estimates(card, work, body, used)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in spent._asdict().items())
    return [f"{least:.1f}", f"{low:.1f}", f"{high:.1f}", spent.limit, parts]


FACTS = ["", "MB", "registers", "shared, KB", "blocks x warps", "inner loop of a warp", "instructions a byte of W"]
TIMES = ["", "bound, µs", "from, µs", "to, µs", "limit", "parts, µs"]


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(cells: list[str]) -> str:
    return row(cells) + "\n" + "|---" * len(cells) + "|"


def main() -> None:
    pattern = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    chosen = [work for work in WORK if pattern.search(work.label)]
    with tempfile.TemporaryDirectory() as name:
        for card in CARDS:
            kernels = {source: compiled(source, card.arch, Path(name)) for source in {work.source for work in chosen}}
            rates = f"{card.bandwidth} GB/s, {card.multiprocessors} multiprocessors of {card.clock} GHz"
            both = [(work, *found(kernels[work.source], work)) for work in chosen]
            print(f"\n{card.name}, sm_{card.arch}: {rates}\n\n{head(FACTS)}")
            for work, function, used in both:
                print(row(facts(card, work, function, used)))
            print(f"\n{head(TIMES)}")
            for work, function, used in both:
                print(row([work.label, *estimate(card, work, function, used)]))
    print("\nEstimates from instruction counts and data sheets; no card has run these kernels.")


if __name__ == "__main__":
    main()

"""The calls of `fuzz.operators` at each SIMD level of this machine, every pair of levels compared.

    cd tests; python -m fuzz.levels FIRST LAST [STEP]     what differs; at the end, how often no bit does

All levels give the same within rounding, or all refuse with the same words.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from itertools import combinations
from typing import Any

import torch
from fuzz.arguments import pages_of
from fuzz.operators import HUGE, REFUSALS, WRITTEN, call_number, different, outcome, roughness
from torch import Tensor

from peftcore import ops

LEVELS = ops.extension.cpu_levels() if ops.extension is not None else []


def found_at(level: str, number: int) -> tuple[str, Any, float]:
    """(what the call is, its results or what it raised, the least error)."""
    name, given, done = call_number(number)
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.peftcore, base), overload or "default")
    ops.extension.set_cpu_level(level)
    with pages_of(given) if name == "optim_step_paged_" else contextlib.nullcontext():
        found = outcome(operator, given, WRITTEN.get(name, ()))
    return f"call {number}, {name} with {', '.join(done) or 'nothing hostile'}", found, roughness(given, name)


def in_words(error: Exception) -> str:
    """The message; without sizes where memory was not to be had, as levels ask for workspaces of their own."""
    return "no memory" if "allocate memory" in str(error) else str(error)


def bits(found: list[Any]) -> list[Any]:
    return [t.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in found if _is_plain(t)]


def _is_plain(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu" and 0 < t.numel() < HUGE


def wrong_with(number: int, equal: dict[str, list[int]]) -> list[str]:
    results = {level: found_at(level, number) for level in LEVELS}
    wrong, same = [], True
    for one, other in combinations(LEVELS, 2):
        (what, found, rough), (_, wanted, _) = results[one], results[other]
        at = f"{what}: {one} and {other}: "
        refused = [isinstance(each, Exception) for each in (found, wanted)]
        if any(refused):
            if not all(isinstance(each, REFUSALS) for each in (found, wanted)) or in_words(found) != in_words(wanted):
                wrong.append(f"{at}{found!r} and {wanted!r}"[:600])
            continue
        why = different(found, wanted, 2 * rough, what.split()[2])  # each may be off by `rough`
        if why is not None:
            wrong.append(at + why)
        same = same and all(map(torch.equal, bits(found), bits(wanted)))
    if not isinstance(results[LEVELS[0]][1], Exception):
        count = equal.setdefault(results[LEVELS[0]][0].split()[2], [0, 0])
        count[0] += same
        count[1] += 1
    return wrong


def main(first: str, last: str, step: str = "1") -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    equal: dict[str, list[int]] = {}
    for number in range(int(first), int(last), int(step)):
        print(f"at {number}", flush=True)  # the last line of a worker that crashed
        for line in wrong_with(number, equal):
            print(f"WRONG {line}", flush=True)
    for name, (same, count) in sorted(equal.items()):
        print(f"{name}: the same bits at all levels in {same} of {count} calls")
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])

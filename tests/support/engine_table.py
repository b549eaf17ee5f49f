"""What engines and divided bases do with eight kinds of methods: engines.csv of tests/distributed, and its table.

Tests call `check` with what they have measured or read. `python -m support.engine_table` in tests/ writes the table in
docs/distributed.md; a test fails when that is stale. To record a line: its test with PEFTCORE_WRITE_ENGINES=1.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FACTS = Path(__file__).parents[1] / "distributed" / "engines.csv"
PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
START, END = "<!-- engines: made by `python -m support.engine_table` -->", "<!-- end of engines -->"
WRITING = "PEFTCORE_WRITE_ENGINES"
LIMIT = 1e-6  # of a difference, in float32
METHODS = ("LoRA", "QLoRA", "DoRA", "IA3", "adapters", "prefixes", "BitFit", "LoRA on experts")
ENGINES = (
    "DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3", "accelerate", "Trainer", "Ray Train", "Lightning",
    "tp_plan", "parallelize_module", "FSDP2 and tp_plan", "expert parallel", "pipeline", "parts of sequences",
)  # fmt: skip
CHECKS = {
    "equal": "equal to one process",
    "save": "saved and loaded",
    "resume": "resumed on one rank",
    "killed": "a rank killed",
}
LINES = [(engine, what) for engine in ENGINES for what in CHECKS]
NAMED = "named"
SAVED = "saved"  # without the others
SENTENCES = {  # parts of errors
    "quantize first": "is sharded, so no rank has the full weight. Quantize before sharding",
    "no stage": "no stage contains the adapter parameter",
    "whole sequences": "needs full sequences, but context_parallel splits them",
    "train before": "is already sharded and cannot be trained",
    "spread experts": "spread over processes (tensor or expert parallelism)",
    "as many ranks": "used a DP world size of 2 but the current world size is 1",
}

Found = float | str


def read() -> dict[tuple[str, str], dict[str, str]]:
    """Facts by (engine, check), and by method."""
    with FACTS.open(newline="") as file:
        return {(row.pop("engine"), row.pop("check")): row for row in csv.DictReader(file)}


def as_text(found: Found) -> str:
    """A difference with one digit; the key of an error's sentence; `named` for an error that names the lost rank."""
    if not isinstance(found, str):
        return f"{found:.0e}" if found else "0"
    if "If another rank has exited" in found:
        return NAMED
    keys = [key for key, part in SENTENCES.items() if part in found]
    assert len(keys) == 1 or found == SAVED, f"no sentence of `SENTENCES` is in: {found}"
    return keys[0] if keys else found


def check(engine: str, what: str, found: Mapping[str, Found]) -> None:
    """Compare what a test has found, by method, with the facts; differences with `LIMIT` alone."""
    texts = {method: as_text(found[method]) for method in METHODS}
    over = {method: value for method, value in found.items() if not isinstance(value, str) and not value <= LIMIT}
    assert not over, f"{engine}, {what}: {over}"
    facts = read()
    if os.environ.get(WRITING):
        facts[engine, what] = texts
        write(facts)
    wanted = facts[engine, what]
    for method, text in texts.items():
        alike = _is_number(text) and _is_number(wanted[method])
        assert alike or text == wanted[method], f"{engine}, {what}, {method}: {text}, but {FACTS.name} has {wanted}"


def worst(of_ranks: Sequence[Mapping[str, Any]], what: str) -> dict[str, Found]:
    """The largest difference of all ranks, by method; or the error of the first."""
    return {
        name: max(rank[name][what] for rank in of_ranks) if isinstance(found, dict) else found
        for name, found in of_ranks[0].items()
    }


def write(facts: Mapping[tuple[str, str], Mapping[str, str]]) -> None:
    with FACTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["engine", "check", *METHODS], lineterminator="\n")
        writer.writeheader()
        for engine, what in LINES:
            if (engine, what) in facts:
                writer.writerow({"engine": engine, "check": what, **facts[engine, what]})


def table() -> str:
    """The table in Markdown, with the sentences of refusals below."""
    facts = read()
    keys = list(dict.fromkeys(text for row in facts.values() for text in row.values() if text in SENTENCES))
    lines = [f"| engine | check | {' | '.join(METHODS)} |", f"|{'---|' * (2 + len(METHODS))}"]
    for engine in ENGINES:
        for number, (what, title) in enumerate(CHECKS.items()):
            row = facts[engine, what]
            cells = [f"refused ({1 + keys.index(row[m])})" if row[m] in keys else row[m] for m in METHODS]
            lines.append(f"| {engine if number == 0 else ''} | {title} | {' | '.join(cells)} |")
    sentences = [f'{number}. "{SENTENCES[key]}"' for number, key in enumerate(keys, 1)]
    return "\n".join([*lines, "", "The errors say:", "", *sentences])


def of_page(text: str) -> tuple[str, str, str]:
    """What is before, in and after the generated part of the page."""
    before, found = text.split(START)
    inside, after = found.split(END)
    return before, inside.strip(), after


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    before, _, after = of_page(PAGE.read_text())
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}")

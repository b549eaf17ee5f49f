"""Conformance of every method, and the table in docs/method-support.md that is made of it: `make matrix`.

A conformance test is a call of `conformance`, which compares the report with that of the last `make matrix`, kept in
matrix.json; a test of the page compares the table with the file. So a table that is no longer true fails, and nothing
is run twice. A single row: its test with PEFTCORE_WRITE_MATRIX=1, then `python -m support.matrix --page`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcore.plugin.registry import registry
from peftcore.testing import CHECKS, COMPILE, FAMILIES, PEFT_READS, PEFT_WRITES, Report, check_method
from peftcore.testing.families import family_of
from support.whole_run import WHOLE

ROOT = Path(__file__).parents[2]
REPORTS = Path(__file__).with_name("matrix.json")
WRITING = "PEFTCORE_WRITE_MATRIX"
START, END = "<!-- matrix: made by `make matrix` -->", "<!-- end of matrix -->"
ON = "on "  # and a family: why the method cannot be applied to it, or None
# {first method of a kind of placement: others of the kind, whose code is only what an adapter computes}. `make test`
# shows with the first what the engine does, `make test-all` with each. Methods that are not here run all checks: they
# change the call, or have several kinds of placements.
KINDS = {
    # around a linear layer
    "lora": (
        "adalora", "beft", "boft", "c3a", "deft", "delora", "fourierft", "glora", "gralora", "hira", "hra", "ia3",
        "loha", "lokr", "miss", "oft", "peanut", "psoft", "pvera", "qlora", "randlora", "relora", "road", "shira",
        "supertuning", "tinylora", "unilora", "vblora", "vera", "waveft",
    ),
    "dora": (),  # around a layer, with its weight
    "adapter": (),  # behind a layer
    "prompt-tuning": ("multitask-prompt-tuning", "p-tuning"),  # before the embeddings
    "prefix-tuning": ("cartridge",),  # in the cache
    "bitfit": ("ln-tuning",),  # parameters of the base
}  # fmt: skip
REPRESENTED = {name for others in KINDS.values() for name in others}
OF_THE_ENGINE = (
    "base untouched by training",
    "disabled equals base",
    "remove is bit exact",
    "two adapters are switched",
    "an adapter for each sample of a batch equals each sample alone",
    "a frozen adapter gets no gradients",
    "with another method's adapter, merged in both orders, saved and removed",
    "generate, with and without cache, equals one full forward",
    "generate for rows of different lengths, with and without cache, equals each row alone",
    "texts packed into a row equal a row for each, or are refused",
    "parameter groups name each trained parameter once",
    "gradient checkpointing",
)
# Only for the first of each kind, and for QLoRA; NF4 is tried with every method.
OTHER_FORMATS = ("a quantized base (MXFP4)", "a quantized base (affine4)")
# What `make test` runs for other configs of a method.
OWN_CHECKS = [name for name in CHECKS if name != COMPILE and (WHOLE or name not in OF_THE_ENGINE)]
OTHER_FAMILIES = ("T5", "Qwen3-MoE")
COLUMNS = {
    "merge": "merge equals forward, unmerge is bit exact",
    "4-bit base": "a quantized base (NF4)",
    "compile": "torch.compile(fullgraph=True)",
    "checkpointing": "gradient checkpointing",
    "cache": "generate, with and without cache, equals one full forward",
    "padded batches": "generate for rows of different lengths, with and without cache, equals each row alone",
    "switching": "two adapters are switched",
    "PEFT's files": "Hugging Face PEFT computes the same from the file",
}


def conformance(config: Any, *, not_applicable: Mapping[str, str] | None = None, **options: Any) -> Report:
    """Run the conformance suite on the method of `config`, and compare its row of the table.

    All of it in `make test-all`. In `make test` it runs on the first family that the method can be applied to, on one
    with an encoder and a decoder, and on one with experts; PEFT's files are left to tests of their own where a method
    has those. `KINDS` says which methods run the checks `OF_THE_ENGINE`. `torch.compile` is tried for the first of each
    kind; with the backend that traces the backward pass for LoRA alone.
    """
    name, excuses = registry.method_of_config(config).name, dict(not_applicable or {})
    if not WHOLE and not os.environ.get(WRITING):
        names = _of_the_day(read().get(name, {}))
        families = [
            family for family in map(family_of, options.get("families", tuple(FAMILIES))) if family.name in names
        ]
        left_out = set(OF_THE_ENGINE) if name in REPRESENTED else set()
        if name not in KINDS:
            left_out.add(COMPILE)
        if name not in (*KINDS, "qlora"):
            left_out.update(OTHER_FORMATS)
        if name != "lora":
            options["compile_backend"] = "eager"
        if _compares_with_peft(name):
            left_out |= {PEFT_READS, PEFT_WRITES}
        options |= {"families": families, "checks": [check for check in CHECKS if check not in left_out]}
        others = FAMILIES.keys() - names
        excuses = {key: why for key, why in excuses.items() if key.partition(":")[0] not in others}
    report = check_method(config, not_applicable=excuses, **options)
    _compare(report)
    return report


def _compares_with_peft(method: str) -> bool:
    """Return whether tests of the method's package import PEFT."""
    tests = (ROOT / "plugins" / f"peftcore-{method}" / "tests").glob("*.py")
    return any(re.search("^import peft$|^from peft ", test.read_text(), re.MULTILINE) for test in tests)


def _of_the_day(row: Mapping[str, str | None]) -> list[str]:
    """Return the families up to the first that a method can be applied to, and those of two other kinds."""
    families = list(FAMILIES)
    first = next((i for i, family in enumerate(families) if row.get(f"{ON}{family}") is None), len(families) - 1)
    return [*families[: first + 1], *(family for family in OTHER_FAMILIES if family in families[first + 1 :])]


def _compare(report: Report) -> None:
    """Compare a report with the one that the table was made from, or in `make matrix` keep it."""
    reports = read()
    found = {r.name: r.reason for r in report.of(report.first) if r.name in COLUMNS.values()}
    found |= {f"{ON}{family}": report.of(family)[0].reason for family in report.families}
    if os.environ.get(WRITING):
        REPORTS.write_text(json.dumps({**reports, report.method: found}, indent=1, sort_keys=True) + "\n")
        return
    known = reports.get(report.method, {})
    if not WHOLE:
        known = {key: why for key, why in known.items() if key in found}
    assert known == found, f"the row of {report.method} is stale. Run: make matrix"


def read() -> dict[str, dict[str, str | None]]:
    """{method: {check of a column, or family: why it is not applicable, or None}}."""
    return json.loads(REPORTS.read_text()) if REPORTS.exists() else {}


def table(reports: dict[str, dict[str, str | None]]) -> str:
    """The table, with the reasons as notes."""
    notes: list[str] = []

    def cell(reason: str | None) -> str:
        if reason is None:
            return "yes"
        if reason not in notes:
            notes.append(reason)
        answer = "into 16 bits" if reason.endswith("merges into 16 bits") else "no"
        return f"{answer} ({notes.index(reason) + 1})"

    def families(checks: dict[str, str | None]) -> str:
        refused = {name.removeprefix(ON): reason for name, reason in checks.items() if name.startswith(ON) and reason}
        if not refused:
            return "all"
        return "all but " + ", ".join(
            f"{family} {cell(reason).removeprefix('no ')}" for family, reason in refused.items()
        )

    lines = ["| | families | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method, checks in sorted(reports.items()):
        cells = [families(checks), *(cell(checks[name]) for name in COLUMNS.values())]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"({i}) {note}  " for i, note in enumerate(notes, 1))]) + "\n"


def section(text: str) -> str:
    """What the page has between the markers."""
    return re.search(f"{re.escape(START)}\n(.*?){re.escape(END)}", text, re.DOTALL)[1]


def write_page() -> None:
    """Put the table of the reports that are kept into the page."""
    page = ROOT / "docs/method-support.md"
    text = page.read_text()
    before, rest = text.split(START)
    page.write_text(f"{before}{START}\n{table(read())}{END}{rest.split(END)[1]}")


def main() -> None:
    tests = sorted(map(str, ROOT.glob("plugins/*/tests/test_*conformance.py")))
    REPORTS.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-k", "conformance", *tests]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, WRITING: "1"})
    missing = registry.methods().keys() - read().keys()
    if missing:
        sys.exit(f"no conformance run of {', '.join(sorted(missing))} gave its report to matrix.check")
    write_page()


if __name__ == "__main__":
    write_page() if "--page" in sys.argv else main()

"""The report of a run, as Markdown."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from card_stages.results import FAILED, MEASURED, PASSED, PROVING, SKIPPED, Results

VERDICT = {0: "every check passed", 1: "checks failed", 3: "no check failed, but the time was up before all had run"}


def write(out: Path, results: Results, expected: list[str], code: int) -> None:
    """Write report.md with the rows so far."""
    rows = list(results)
    facts = json.loads((out / "machine.json").read_text())
    checked = bool(expected) or any(row["stage"] in PROVING for row in rows)
    parts = [
        f"# peftcore on {facts['card']}",
        f"**{VERDICT[code] if checked else 'no check ran'}** (exit code {code})",
        table(["", ""], facts.items()),
    ]
    parts += ["## Checks", checks(rows, expected)]
    for status in (FAILED, SKIPPED):
        details = [f"- {row['stage']}, `{row['name']}`: {first_lines(row)}" for row in rows if row["status"] == status]
        if details:
            parts.append(f"### {status.capitalize()}\n\n" + "\n".join(details))
    for stage in ("timings", "tuning", "training", "decoding"):
        measured = [row for row in rows if row["stage"] == stage and row["status"] == MEASURED]
        if measured:
            parts += [f"## {stage.capitalize()}", measurements(measured)]
    (out / "report.md").write_text("\n\n".join(parts) + "\n")


def first_lines(row: dict[str, Any]) -> str:
    return " ".join(row.get("detail", "").split("\n"))[:400]


def table(head: list[str], rows: Any) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def checks(rows: list[dict[str, Any]], expected: list[str]) -> str:
    """Return a table of the numbers of passed, failed, skipped and remaining cases of each function."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    seconds: dict[str, float] = defaultdict(float)
    for row in rows:
        if row["stage"] in PROVING:
            group = f"{row['stage']}: {row['name'].partition('[')[0]}"
            counts[group][row["status"]] += 1
            seconds[group] += row["seconds"]
    names = {row["name"] for row in rows if row["stage"] == "correctness"}
    for name in expected:
        if name not in names:
            counts[f"correctness: {name.partition('[')[0]}"]["not run"] += 1
    columns = [PASSED, FAILED, SKIPPED, "not run"]
    lines = [
        [group, *(count[column] or "" for column in columns), f"{seconds[group]:.1f}"]
        for group, count in counts.items()
    ]
    return table(["", *columns, "seconds"], lines)


def measurements(rows: list[dict[str, Any]]) -> str:
    """Return a table for each `group` of measurements."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row.get("group", "")].append(row)
    parts = []
    for group, group_rows in groups.items():
        columns: dict[str, None] = {}
        for row in group_rows:
            columns |= dict.fromkeys(row["values"])
        lines = []
        for row in group_rows:
            cells = [number(row["values"].get(column)) for column in columns]
            lines.append([row.get("label", row["name"]), *cells])
        parts.append((f"**{group}**\n\n" if group else "") + table(["", *columns], lines))
    return "\n\n".join(parts)


def number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"

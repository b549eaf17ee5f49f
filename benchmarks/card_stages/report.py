"""The report of a run, as Markdown with two pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from card_stages.results import FAILED, MEASURED, PASSED, PROVING, SKIPPED, Results

VERDICT = {0: "every check passed", 1: "checks failed", 3: "no check failed, but the time was up before all had run"}


def write(out: Path, results: Results, expected: list[str], code: int) -> None:
    """Write report.md, kernels.svg and steps.svg, with what is known so far."""
    rows = list(results)
    facts = json.loads((out / "machine.json").read_text())
    parts = [
        f"# peftcore on {facts['card']}",
        f"**{VERDICT[code]}** (exit code {code})",
        table(["", ""], facts.items()),
    ]
    parts += ["## Checks", checks(rows, expected)]
    failed = [row for row in rows if row["status"] == FAILED and row["stage"] in PROVING]
    if failed:
        parts.append("### Failed\n\n" + "\n".join(f"- `{row['name']}`: {first_lines(row)}" for row in failed))
    skipped = [row for row in rows if row["status"] == SKIPPED]
    if skipped:
        parts.append("### Skipped\n\n" + "\n".join(f"- `{row['name']}`: {first_lines(row)}" for row in skipped))
    for stage, picture in (("timings", "kernels.svg"), ("training", "steps.svg"), ("decoding", None)):
        own = [row for row in rows if row["stage"] == stage and row["status"] == MEASURED]
        if not own:
            continue
        parts.append(f"## {stage.capitalize()}")
        if picture:
            (out / picture).write_text(bars(own))
            parts.append(f"![{stage}]({picture})")
        parts.append(measurements(own))
    (out / "report.md").write_text("\n\n".join(parts) + "\n")


def first_lines(row: dict[str, Any]) -> str:
    return " ".join(row.get("detail", "").split("\n"))[:400]


def table(head: list[str], rows: Any) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def checks(rows: list[dict[str, Any]], expected: list[str]) -> str:
    """Return a row for each function of cases: how many passed, failed, were skipped, and have not run."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    seconds: dict[str, float] = defaultdict(float)
    for row in rows:
        if row["stage"] in PROVING:
            group = f"{row['stage']}: {row['name'].partition('[')[0]}"
            counts[group][row["status"]] += 1
            seconds[group] += row["seconds"]
    have = {row["name"] for row in rows if row["stage"] == "correctness"}
    for name in expected:
        if name not in have:
            counts[f"correctness: {name.partition('[')[0]}"]["not run"] += 1
    columns = [PASSED, FAILED, SKIPPED, "not run"]
    lines = [
        [group, *(count[column] or "" for column in columns), f"{seconds[group]:.1f}"]
        for group, count in counts.items()
    ]
    return table(["", *columns, "seconds"], lines)


def measurements(rows: list[dict[str, Any]]) -> str:
    """Return tables by `group`: a row for each measurement, with its floor."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row.get("group", "")].append(row)
    parts = []
    for group, own in groups.items():
        columns = list(dict.fromkeys(key for row in own for key in row["values"]))
        lines = [
            [row.get("label", row["name"]), *(number(row["values"].get(column)) for column in columns)] for row in own
        ]
        parts.append((f"**{group}**\n\n" if group else "") + table(["", *columns], lines))
    return "\n\n".join(parts)


def number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"


def bars(rows: list[dict[str, Any]]) -> str:
    """Return a picture: for each measurement a bar as long as its first value, on a scale of its group."""
    height, width, label, line = 16, 900, 340, 0
    longest: dict[str, float] = defaultdict(float)
    for row in rows:
        longest[row.get("group", "")] = max(longest[row.get("group", "")], first_value(row))
    shapes, group = [], None
    for row in rows:
        if row.get("group", "") != group:
            group = row.get("group", "")
            line += 2
            shapes.append(f'<text x="4" y="{line * height - 4}" font-weight="bold">{escape(group)}</text>')
        line += 1
        length = (width - label - 100) * first_value(row) / (longest[group] or 1)
        color = "#2b6cb0" if "peftcore" in row.get("label", row["name"]) else "#a0aec0"
        y = line * height
        shapes.append(
            f'<text x="{label - 6}" y="{y - 4}" text-anchor="end">{escape(row.get("label", row["name"]))}</text>'
        )
        shapes.append(
            f'<rect x="{label}" y="{y - height + 2}" width="{max(1, length):.0f}" height="12" fill="{color}"/>'
        )
        text = f"{number(first_value(row))} {next(iter(row['values']))}"
        shapes.append(f'<text x="{label + length + 6:.0f}" y="{y - 4}">{escape(text)}</text>')
        floor = row["values"].get("floor, µs")
        if floor:
            x = label + (width - label - 100) * floor / (longest[group] or 1)
            shapes.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{y - height + 1}" y2="{y - 1}" stroke="#c53030"/>')
    total = (line + 1) * height
    style = '<style>text{font:11px sans-serif}</style><rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}">{style}{"".join(shapes)}</svg>\n'


def first_value(row: dict[str, Any]) -> float:
    return float(next(iter(row["values"].values()), 0) or 0)

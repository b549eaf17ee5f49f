"""The page of all figures, docs/figures.md, and a chart, docs/performance.png, from docs/figures.csv: `make figures`.

The columns of the data file: the topic, what was measured, the figure, what it compares with, the machine, the command,
and a note. A test compares the page with the file, and the tables of other pages with both.
"""

import csv
import re
from itertools import groupby
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
DATA, PAGE, CHART = DOCS / "figures.csv", DOCS / "figures.md", DOCS / "performance.png"
HEADER = """# All figures

<!-- made by `make figures` from figures.csv: edit that file -->

One row a measurement, with its machine and its command. [Performance](performance.md) has the ones that most people ask
for, and says how to read them.

- **Machines**: *Zen 4* and *Zen 5* are two cores of an AMD processor with AVX-512 and bf16 instructions, *Sapphire
  Rapids* two cores of an Intel Xeon with AMX, *Cascade Lake* two cores of an Intel Xeon with AVX-512 and without bf16
  instructions. *Busy* means that other programs ran at the same time: compare the ratios within a row, not the times.
  Two threads unless a row says otherwise.
- **Versions**: PyTorch 2.13, peft 0.21.2, bitsandbytes 0.50.2, llama-cpp-python 0.3.36.
- Figures are medians unless a row says otherwise. A ratio is the time divided by the time of what the row names; peers
  were measured in the same run unless a row says otherwise.
- A dash in place of a command: measured by hand, with a profiler or a script that was not kept.
"""


def rows() -> list[dict[str, str]]:
    """Return the rows of the data file."""
    with DATA.open(newline="") as file:
        return list(csv.DictReader(file))


def page() -> str:
    """Return the page, with a table for each topic."""
    parts = [HEADER]
    for topic, group in groupby(rows(), key=lambda row: row["topic"]):
        lines = ["| what | figure | compared with | machine | command |", "|---|---|---|---|---|"]
        for row in group:
            what = row["what"] + (f"<br><small>{row['note']}</small>" if row["note"] else "")
            command = f"`{row['command']}`" if row["command"] else "—"
            lines.append(f"| {what} | {row['figure'] or '—'} | {row['compared']} | {row['machine']} | {command} |")
        parts.append(f"\n## {topic}\n\n" + "\n".join(lines) + "\n")
    return "".join(parts)


def missing(text: str) -> list[str]:
    """Return the figures in the tables under a `<!-- figures -->` line that no row of the data file has."""
    fields = [row[column] for row in rows() for column in ("figure", "compared")]
    known = {part for field in fields for part in (field, *field.split("; "))}
    cells = [
        cell.strip()
        for table in re.findall(r"<!-- figures -->\n((?:\|.*\n)+)", text)
        for line in table.splitlines()[2:]
        for cell in line.split("|")[2:-1]
    ]
    return [cell for cell in cells if re.search(r"\d", cell) and not cell.startswith("`") and cell not in known]


def steps() -> list[tuple[str, float, float]]:
    """Return (method, time over the frozen model's, that of peft) of the training steps measured on a Zen 4."""
    found: dict[str, tuple[str, float, float]] = {}
    for row in rows():
        step = re.fullmatch(r"Training step with ([^,]+).*, over the frozen model", row["what"])
        peft = re.match(r"peft ([\d.]+)×", row["compared"])  # noqa: RUF001
        if step and peft and row["machine"] == "Zen 4":
            found.setdefault(step[1], (step[1], float(row["figure"].rstrip("×")), float(peft[1])))  # noqa: RUF001
    return list(found.values())


def draw() -> None:
    """Draw the chart: how much longer a training step takes with an adapter, here and in PEFT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, (_, ours, theirs) in enumerate(reversed(steps())):
        for ratio, offset, color in ((theirs, -0.2, "#9aa3b2"), (ours, 0.2, "#2457a6")):
            axes.barh(i + offset, 100 * (ratio - 1), 0.36, color=color)
            axes.text(100 * (ratio - 1) + 1, i + offset, f"{100 * (ratio - 1):.0f} %", va="center", size=8)
    axes.set_yticks(range(len(steps())), [name for name, _, _ in reversed(steps())])
    axes.set_xlabel("additional time of a training step compared with the frozen model (less is better)")
    axes.legend(
        [axes.patches[1], axes.patches[0]], ["peftcore", "peft 0.21.2"], frameon=False, loc="upper right", fontsize=9
    )
    axes.set_xlim(0, 112)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(CHART)


if __name__ == "__main__":
    PAGE.write_text(page())
    draw()

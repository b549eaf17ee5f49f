"""The page of all figures, docs/figures.md, and two charts, step.png and performance.png, from docs/figures.csv.

`make figures` writes them.

The columns of the data file: the topic, what was measured, the figure, what it compares with, the machine, the command,
and a note. A test compares the page with the file, and the tables of other pages with both.
"""

import csv
import re
from itertools import groupby
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
DATA, PAGE = DOCS / "figures.csv", DOCS / "figures.md"
OURS, PEFT = "#2457a6", "#8791a3"
MODELS = {  # as benchmarks/step.py names them, and as the chart does
    "SmolLM2-135M": "SmolLM2-135M",
    "Qwen3-0.6B": "Qwen3-0.6B",
    "Gemma-3-1B": "Gemma-3-1B",
    "Llama-1.1B": "Llama 1.1B",
    "mixture": "mixture of experts",
    "BERT": "BERT",
    "ViT": "ViT-B",
}
HEADER = """# All figures

<!-- made by `make figures` from figures.csv: edit that file -->

Each row is a measurement, with its machine and its command. [Performance](performance.md) shows the most important ones
and explains how to read them.

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
    """Return the figures in the tables under a `<!-- figures -->` line that no row of the data file has.

    In a column titled peft, figures are without the word "peft" that the data file has in front of them.
    """
    fields = [row[column] for row in rows() for column in ("figure", "compared")]
    known = {part for field in fields for part in (field, *field.split("; "))}
    absent = []
    for table in re.findall(r"<!-- figures -->\n((?:\|.*\n)+)", text):
        titles, _, *lines = ([cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines())
        for title, cell in (pair for line in lines for pair in zip(titles, line, strict=True)):
            figure = f"peft {cell}" if title == "peft" else cell
            if re.search(r"\d", cell) and not cell.startswith("`") and figure not in known:
                absent.append(cell)
    return absent


def ratios(row: dict[str, str]) -> tuple[float, float] | None:
    """Return a row's step time and PEFT's, over the frozen model's step, or None where the row has no such figures."""
    peft = re.match(r"peft ([\d.]+)×", row["compared"])  # noqa: RUF001
    ours = re.fullmatch(r"([\d.]+)×", row["figure"])  # noqa: RUF001
    return (float(ours[1]), float(peft[1])) if ours and peft else None


def methods() -> list[tuple[str, float, float]]:
    """Return (method, time over the frozen model's, PEFT's) of the steps of plain adapters measured on a Zen 4."""
    found: dict[str, tuple[str, float, float]] = {}
    for row in rows():
        step = re.fullmatch(r"Training step with ([^,]+).*, over the frozen model", row["what"])
        if step and row["machine"] == "Zen 4" and (times := ratios(row)):
            found.setdefault(step[1], (step[1], *times))
    return list(found.values())


def steps(options: str) -> list[tuple[str, float, float]]:
    """Return (model, time over the frozen model's, PEFT's) of LoRA steps measured on a Zen 5.

    Args:
        options: What the command of `benchmarks/step.py` has next to the model's name, such as "--rows 4x128", without
            its numbers of layers, rounds and steps.
    """
    found: dict[str, tuple[str, float, float]] = {}
    for row in rows():
        words = re.sub(r" --(layers|rounds|steps) \d+", "", row["command"])
        model = re.search(r" --model (\S+)", words)
        wanted = sorted(f"benchmarks/step.py --short --model {model[1]} {options}".split()) if model else None
        if wanted == sorted(words.split()) and row["machine"].startswith("Zen 5") and (times := ratios(row)):
            found[model[1]] = (MODELS[model[1]], *times)
    return [found[model] for model in MODELS if model in found]


def draw_steps() -> None:
    """Draw step.png: the time of a LoRA step over the frozen model's, in peftcore and in PEFT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    panels = {
        "bf16": "--rows 4x128",
        "fp32, limited to AVX2": "--level avx2 --rows 4x128 --dtype float32",
    }
    for axes, (title, options) in zip(figure.subplots(1, 2, sharex=True), panels.items(), strict=True):
        measured = list(reversed(steps(options)))
        for i, (_, ours, theirs) in enumerate(measured):
            for ratio, offset, color in ((theirs, -0.2, PEFT), (ours, 0.2, OURS)):
                axes.barh(i + offset, ratio, 0.36, color=color)
                axes.text(0.02, i + offset, f"{ratio:.2f}", va="center", size=8, color="white")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(measured)), [name for name, _, _ in measured])
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("time of a LoRA step, where the frozen model's step takes 1 (less is better)", fontsize=10)
    bars = [axes.patches[1], axes.patches[0]]
    figure.legend(bars, ["peftcore", "peft 0.21.2"], frameon=False, loc="outside upper right", ncols=2)
    figure.savefig(DOCS / "step.png")


def draw_methods() -> None:
    """Draw performance.png: how much longer a training step takes with an adapter, in peftcore and in PEFT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, (_, ours, theirs) in enumerate(reversed(methods())):
        for ratio, offset, color in ((theirs, -0.2, PEFT), (ours, 0.2, OURS)):
            axes.barh(i + offset, 100 * (ratio - 1), 0.36, color=color)
            axes.text(100 * (ratio - 1) + 1, i + offset, f"{100 * (ratio - 1):.0f} %", va="center", size=8)
    axes.set_yticks(range(len(methods())), [name for name, _, _ in reversed(methods())])
    axes.set_xlabel("additional time of a training step compared with the frozen model (less is better)")
    axes.legend(
        [axes.patches[1], axes.patches[0]], ["peftcore", "peft 0.21.2"], frameon=False, loc="upper right", fontsize=9
    )
    axes.set_xlim(0, 112)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "performance.png")


if __name__ == "__main__":
    PAGE.write_text(page())
    draw_steps()
    draw_methods()

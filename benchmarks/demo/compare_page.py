"""Write docs/comparison.md, between its markers, and docs/comparison.png from the results of the comparison.

python benchmarks/demo/compare_page.py    # from benchmarks/demo/comparison.json, without running anything
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from compare_chart import Panel, Point, draw
from compare_collect import FAMILIES

BEGIN, END = "<!-- comparison: made by `make compare` -->", "<!-- end of comparison -->"
BEGIN_TEN, END_TEN = "<!-- ten methods: made by `make compare` -->", "<!-- end of ten methods -->"
TEN = ("full", "hira", "dora", "lora", "qlora", "ia3", "adapter", "adalora", "vera", "prefix-tuning")
TITLES = {
    "classifier": "The classifier: MiniLM-L6 separates positive from negative movie reviews",
    "writer": "The writer: SmolLM2-135M-Instruct writes movie reviews",
}
MAIN = {"classifier": "accuracy", "writer": "loss"}


def write_page(found: dict, docs: Path) -> None:
    page = docs / "comparison.md"
    made = "\n".join(line for part in (made_with(found), *tables(found), failures(found)) for line in part)
    text = between(page.read_text(), BEGIN_TEN, END_TEN, "\n".join(ten(found["tasks"])))
    page.write_text(between(text, BEGIN, END, made))
    panels = [panel(task, each) for task, each in found["tasks"].items()]
    used = [name for name in FAMILIES if any(p.family == name for each in panels for p in each.points)]
    draw(docs / "comparison.png", panels, used)


def between(text: str, begin: str, end: str, made: str) -> str:
    """Return the page with `made` between the two markers."""
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"


def ten(tasks: dict) -> list[str]:
    """Return a table of ten well-known methods on both tasks."""
    found = {task: {row["method"]: row for row in each["rows"] if "error" not in row} for task, each in tasks.items()}
    lines = ["| method | accuracy of the classifier | peak memory | loss of the writer | peak memory | merges |"]
    lines.append("|" + "---|" * 6)
    for name in TEN:
        label, loss = found["classifier"][name], found["writer"][name]
        cells = [
            f"`{name}`",
            shown(label["accuracy"], "accuracy"),
            f"{label['peak'] / 1e6:,.0f} MB",
            shown(loss["loss"], "loss"),
            f"{loss['peak'] / 1e6:,.0f} MB",
            merges(label),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def made_with(found: dict) -> list[str]:
    made = found["made"]
    facts = "; ".join(f"{name} {value}" for name, value in made["machine"])
    times = " Other programs used the machine at the same time, so step times are omitted." if made["shared"] else ""
    command = f"Made with `{made['command']}`, each run in its own process with one thread."
    return [f"{command} Environment: {facts}.{times}", ""]


def tables(found: dict) -> list[list[str]]:
    return [table(task, each, found["made"]["shared"]) for task, each in found["tasks"].items()]


def table(task: str, found: dict, shared: bool) -> list[str]:
    """Return the table of a task, the best method first."""
    size, metric = found["size"], MAIN[task]
    rates = f"learning rates {size['rates'].replace(',', ', ')}" if size["rates"] else "each method's default rate"
    seeds = f"{size['seeds']} seeds" if size["seeds"] > 1 else "one seed"
    lines = [
        f"## {TITLES[task]}",
        "",
        f"{size['steps']} steps, batch size {size['batch_size']}, {size['test']} test examples, {seeds}, {rates}.",
        "",
    ]
    names = ["method", "rate", *(["accuracy", "macro F1"] if task == "classifier" else ["loss", "forgetting"])]
    names += ["trained", "file", "peak memory", *([] if shared else ["step"]), "merges"]
    is_beside = any(row.get("peft") for row in found["rows"])
    names += ["PEFT", "PEFT's peak"] if is_beside else []
    rows = [tuple(names), ("---",) * len(names)]
    blank = [""] * (len(names) - 4)
    rows.append(("before training", "", shown([found["before"][metric]], metric), "", *blank))
    if found["baseline"]:
        rows.append((found["baseline"][0], "", shown([found["baseline"][1]], metric), "", *blank))
    finished = [row for row in found["rows"] if "error" not in row]
    sign = -1 if metric == "accuracy" else 1
    for row in sorted(finished, key=lambda row: sign * statistics.mean(row[metric])):
        second = row["macro_f1"] if task == "classifier" else row["forgetting"]
        name = " ".join([f"`{row['method']}`", *(f"{field}={value}" for field, value in row["fields"].items())])
        rows.append(
            (
                name if len(name) < 60 else f"{name[:56]} …",
                f"{row['lr']:g}" + ("*" if at_the_edge(row) else ""),
                shown(row[metric], metric),
                shown(second, "macro_f1" if task == "classifier" else "rise"),
                f"{row['trained']:,}",
                size_of(row["bytes"]),
                f"{row['peak'] / 1e6:,.0f} MB",
                *([] if shared else [f"{1e3 * row['step']:,.0f} ms"]),
                merges(row),
                *(beside(row, metric) if is_beside else []),
            )
        )
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return [*lines, "", *tried(found)]


def merges(row: dict) -> str:
    if row["method"] == "qlora" and row["merges"]:
        return "into 16 bits"
    return {True: "yes", False: "no", None: ""}[row["merges"]]


def at_the_edge(row: dict) -> bool:
    """Return whether the best rate of a search is the lowest or the highest that was tried."""
    rates = [float(rate) for rate in row["tried"]]
    return len(rates) > 1 and row["lr"] in (min(rates), max(rates))


def beside(row: dict, metric: str) -> tuple[str, str]:
    peft = row["peft"]
    if peft is None:
        return "", ""
    if "error" in peft:
        return "refuses", ""
    return shown([peft["after"][metric]], metric), f"{peft['peak']['memory'] / 1e6:,.0f} MB"


def shown(values: Sequence[float], kind: str) -> str:
    scale, digits, unit = (100, 1, " %") if kind in ("accuracy", "macro_f1") else (1, 3, "")
    mean = statistics.mean(values)
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return ("+" if kind == "rise" and mean >= 0 else "") + f"{scale * mean:.{digits}f}{spread}{unit}"


def size_of(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def tried(found: dict) -> list[str]:
    """Return a table of the search: the validation loss at each rate."""
    rates = sorted({rate for row in found["rows"] for rate in row["tried"]}, key=float)
    if not rates:
        return []
    lines = [
        "<details markdown><summary>Validation loss at each rate</summary>",
        "",
        "The losses are those of the first seed.",
        "",
        "| method | " + " | ".join(f"{float(rate):g}" for rate in rates) + " |",
        "|" + "---|" * (len(rates) + 1),
    ]
    for row in found["rows"]:
        cells = [row["tried"].get(rate) for rate in rates]
        if any(isinstance(cell, float) for cell in cells):
            best = min(cell for cell in cells if isinstance(cell, float))
            texts = [
                "" if cell is None else "failed" if isinstance(cell, str) else f"**{cell:.3f}**" if cell == best
                else f"{cell:.3f}" for cell in cells
            ]  # fmt: skip
            lines.append(f"| `{row['method']}` | " + " | ".join(texts) + " |")
    return [*lines, "", "</details>", ""]


def failures(found: dict) -> list[str]:
    """Return a list of the methods that could not run, with the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for task, each in found["tasks"].items():
        for row in each["rows"]:
            if "error" in row:
                reasons.setdefault((row["method"], row["error"]), []).append(f"the {task}")
            elif row["peft"] and "error" in row["peft"]:
                reasons.setdefault((f"{row['method']} in PEFT", row["peft"]["error"]), []).append(f"the {task}")
    if not reasons:
        return []
    lines = [f"- `{name}` ({' and '.join(where)}): {reason}" for (name, reason), where in reasons.items()]
    return ["## Methods that could not run", "", *lines, ""]


def panel(task: str, found: dict) -> Panel:
    metric = MAIN[task]
    scale = 100 if metric == "accuracy" else 1
    points = [
        Point(row["method"], row["family"] or FAMILIES[0], row["peak"] / 1e6, scale * statistics.mean(row[metric]))
        for row in found["rows"]
        if "error" not in row and math.isfinite(statistics.mean(row[metric]))
    ]
    level = (scale * found["baseline"][1], found["baseline"][0]) if found["baseline"] else None
    y_name = "held-out accuracy, %" if metric == "accuracy" else "held-out loss (less is better)"
    return Panel(TITLES[task], y_name, points, metric == "accuracy", level)


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    write_page(json.loads((root / "benchmarks/demo/comparison.json").read_text()), root / "docs")

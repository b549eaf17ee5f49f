"""docs/comparison.md, between its markers, and docs/comparison.png, from what the comparison found."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from compare_chart import Panel, Point, draw
from compare_collect import FAMILIES

BEGIN, END = "<!-- comparison: made by `make compare` -->", "<!-- end of comparison -->"
TITLES = {
    "classifier": "The classifier: MiniLM-L6 tells positive movie reviews from negative ones",
    "writer": "The writer: SmolLM2-135M-Instruct writes movie reviews",
}
MAIN = {"classifier": "accuracy", "writer": "loss"}


def write_page(found: dict, docs: Path) -> None:
    page = docs / "comparison.md"
    before, _, rest = page.read_text().partition(BEGIN)
    made = "\n".join(line for part in (made_with(found), *tables(found), failures(found)) for line in part)
    page.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")
    panels = [panel(task, each) for task, each in found["tasks"].items()]
    used = [name for name in FAMILIES if any(p.family == name for each in panels for p in each.points)]
    draw(docs / "comparison.png", panels, used)


def made_with(found: dict) -> list[str]:
    made = found["made"]
    facts = "; ".join(f"{name} {value}" for name, value in made["machine"])
    times = " Others used the machine meanwhile, so no time of a step is given." if made["shared"] else ""
    return [f"Made with `{made['command']}`, each run in a process and a thread of its own, on {facts}.{times}", ""]


def tables(found: dict) -> list[list[str]]:
    return [table(task, each, found["made"]["shared"]) for task, each in found["tasks"].items()]


def table(task: str, found: dict, shared: bool) -> list[str]:
    """Best first."""
    size, metric = found["size"], MAIN[task]
    rates = f"the rates {size['rates'].replace(',', ', ')}" if size["rates"] else "each method's own rate"
    seeds = f"{size['seeds']} seeds" if size["seeds"] > 1 else "one seed"
    lines = [
        f"## {TITLES[task]}",
        "",
        f"{size['steps']} steps in batches of {size['batch_size']}, {size['test']} held out, {seeds}; {rates}.",
        "",
    ]
    names = ["method", "rate", *(["accuracy", "macro F1"] if task == "classifier" else ["loss", "forgetting"])]
    names += ["trained", "file", "peak memory", *([] if shared else ["step"]), "merges"]
    is_beside = any(row.get("peft") for row in found["rows"])
    names += ["PEFT", "its peak"] if is_beside else []
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
                {True: "yes", False: "no", None: ""}[row["merges"]],
                *(beside(row, metric) if is_beside else []),
            )
        )
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return [*lines, "", *tried(found)]


def at_the_edge(row: dict) -> bool:
    """Is the best rate of a search the lowest or the highest that was tried?"""
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
    """The search: losses on the validation part."""
    rates = sorted({rate for row in found["rows"] for rate in row["tried"]}, key=float)
    if not rates:
        return []
    lines = [
        "<details markdown><summary>What each rate gave</summary>",
        "",
        "Loss on the part of the training examples that was kept to choose by, first seed.",
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
    """Who cannot take part, and why."""
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
    return ["## Not run", "", *lines, ""]


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

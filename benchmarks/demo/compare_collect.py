"""The figures of both comparisons in one small file, from which page and picture are made.

They are read off the folders of the runs, so that a comparison that was cut off, or done in pieces, is seen whole.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

METRICS = ("accuracy", "macro_f1", "loss")
FAMILIES = ("weights", "activations", "prompts", "the base's own parameters", "the whole model")
PEFT_RESULT = "peft.json"


@dataclass
class Row:
    """Runs of a method: the first seed's by rate, from a search, and those by seed at the chosen rate."""

    settings: dict
    tried: dict[float, dict] = field(default_factory=dict)
    runs: list[dict] = field(default_factory=list)
    first: Path | None = None  # the folder of the first seed's

    @property
    def finished(self) -> list[dict]:
        return [run for run in self.runs if "error" not in run]


def rows_of(output: Path) -> list[Row]:
    """Return the runs under `output`, in the order of the methods' names."""
    return [row for folder in sorted(output.glob("runs/*")) if (row := row_of(folder)) is not None]


def row_of(folder: Path) -> Row | None:
    row, rates = None, {}
    for run in sorted(folder.glob("**/seed-*/run.json")):
        found = result(run.parent)
        if found is not None:
            settings = json.loads(run.read_text())
            row = row or Row(settings)
            rates.setdefault(settings["lr"], {})[settings["seed"]] = (found, run.parent)
    if row is None:
        return None
    searched = any(folder.glob("lr-*"))
    best = min(rates, key=lambda rate: loss(rates[rate][0][0]))
    row.settings = row.settings | {"lr": best}
    row.tried = {rate: found[0][0] for rate, found in sorted(rates.items())} if searched else {}
    row.runs = [found for _, (found, _) in sorted(rates[best].items())]
    row.first = rates[best][0][1]
    return row


def result(run: Path) -> dict | None:
    """Return what a run found, {"error": why it failed}, or None if it did not end."""
    if (run / "result.json").exists():
        return json.loads((run / "result.json").read_text())
    return {"error": (run / "error.txt").read_text().strip()} if (run / "error.txt").exists() else None


def loss(run: dict) -> float:
    """Return the loss by which a rate is chosen."""
    found = math.inf if "error" in run else (run["validation"] or run["after"])["loss"]
    return math.inf if math.isnan(found) else found


def collect(output: Path, sizes: dict, *, shared: bool) -> dict:
    from peftcore_cli import versions

    made = {
        "command": "make compare" + (" COMPARE=--reduced" if output.name.endswith("reduced") else ""),
        "machine": [*versions.machine(), *versions.versions(), ("peft", version("peft"))],
        "shared": shared,
    }
    there = [task for task in sizes if (output / task / "runs").exists()]
    return {"made": made, "tasks": {task: of_task(rows_of(output / task), sizes[task]) for task in there}}


def of_task(rows: list[Row], size) -> dict:
    first = next(run for row in rows for run in row.finished_runs)
    figures = [of_row(row) for row in rows]
    return {"size": asdict(size), "before": first["before"], "baseline": first["baseline"], "rows": figures}


def of_row(row: Row) -> dict:
    """Return the figures of a method; lists have a value for each seed."""
    runs = row.finished_runs
    tried = {f"{rate:g}": run.get("error") or run["validation"]["loss"] for rate, run in row.tried.items()}
    named = {name: row.settings[name] for name in ("method", "fields", "lr")}
    found = named | {"tried": tried, "family": family(row.settings)}
    if not runs:
        return found | {"error": row.runs[0]["error"]}
    found |= {
        metric: [run["after"][metric] for run in runs] for metric in METRICS if runs[0]["after"].get(metric) is not None
    }
    if runs[0]["other"]:
        found["forgetting"] = [run["other"][1]["loss"] - run["other"][0]["loss"] for run in runs]
    beside = row.first / PEFT_RESULT
    return found | {
        "trained": runs[0]["trainable_parameters"],
        "bytes": runs[0]["adapter_bytes"],
        "peak": statistics.median(run["peak"]["memory"] for run in runs),
        "step": statistics.median(run["step_seconds"] for run in runs),
        "merges": runs[0]["merges"],
        "peft": json.loads(beside.read_text()) if beside.exists() else None,
    }


def family(settings: dict) -> str | None:
    """Return what a method changes, by its placements; None if it refuses the model."""
    from peftcore_cli.bases import models
    from peftcore_cli.options import FULL

    import peftcore

    if settings["method"] == FULL:
        return FAMILIES[4]
    base = models.empty_model(settings["model"], settings["task"], ())
    try:
        plan = peftcore.plan(base, settings["method"], **settings["fields"])
        peftcore.apply(base, settings["method"], **settings["fields"])
    except peftcore.PeftcoreError:
        return None
    kinds = {kind for _, kind, _, _ in plan.rows}
    if kinds & {"SoftPrompt", "PrefixKV"}:
        return FAMILIES[2]
    if kinds == {"Train"}:
        return FAMILIES[3]
    return FAMILIES[0] if peftcore.can_merge(base) else FAMILIES[1]

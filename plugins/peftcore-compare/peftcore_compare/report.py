"""Results of a comparison, written as a table, Markdown, JSON and a chart."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peftcore_cli import chart, metrics, registered
from peftcore_cli.amounts import gigabytes, megabytes
from peftcore_cli.console import table
from peftcore_cli.options import FULL

if TYPE_CHECKING:
    from peftcore_cli.settings import Settings


_FORGETTING, _MERGES = "forgetting", "merges"
_COSTS = ("trained", "size", "peak memory", "step")


@dataclass
class MethodRuns:
    """Runs of one method. A result is as in `run_result.Result.to_json`, or {"error": reason}.

    Args:
        label: the method with its settings.
        lr: learning rate of these runs; in a search, the rate with the lowest validation loss.
        runs: results by seed.
        tried: results of the first seed by learning rate, in a search.
    """

    label: str
    lr: float
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    tried: dict[float, dict[str, Any]] = field(default_factory=dict)

    def add_tried(self, lr: float, seed: int, result: dict[str, Any]) -> None:
        """Add a run of the search, and update the best rate."""
        self.tried[lr] = result
        self.lr = min(self.tried, key=self.validation_loss)
        self.runs[seed] = self.tried[self.lr]

    def validation_loss(self, lr: float) -> float:
        """Return the validation loss at a learning rate of the search, or infinity if the run failed."""
        if "error" in self.tried[lr]:
            return math.inf
        loss = self.tried[lr]["validation"]["loss"]
        return math.inf if math.isnan(loss) else loss

    @property
    def finished_runs(self) -> list[dict[str, Any]]:
        return [run for run in self.runs.values() if "error" not in run]

    @property
    def error(self) -> str | None:
        """Error of the first failed run, or None."""
        return next((run["error"] for run in self.runs.values() if "error" in run), None)

    def values(self, metric: str, stage: str = "after") -> list[float]:
        """Return a held-out metric, one value per seed."""
        return [run[stage][metric] for run in self.finished_runs]

    def median(self, name: str) -> float:
        """Return the median of a figure over the seeds. "peak" is the peak memory of the device."""
        values = [run[name] if name != "peak" else list(run["peak"].values())[-1] for run in self.finished_runs]
        return statistics.median(values)


class ComparisonReport:
    """Results of all runs so far, by method, in the order of the command line."""

    files = ("report.json", "table.md", "compare.png")

    def __init__(self, settings: Settings, rows: Sequence[tuple[str, float]], rates: Sequence[float] = ()) -> None:
        self.settings, self.rates = settings, rates
        self.metric = registered.find(settings.task).main_figure
        self.methods = [MethodRuns(label, lr) for label, lr in rows]

    def row(self, label: str) -> MethodRuns:
        """Return a method's runs."""
        return next(method for method in self.methods if method.label == label)

    def add(self, label: str, seed: int, result: dict[str, Any], lr: float | None = None) -> None:
        """Add the result of a run; `lr` is its learning rate in a search."""
        row = self.row(label)
        if self.rates and lr is not None and seed == 0:
            row.add_tried(lr, seed, result)
        else:
            row.runs[seed] = result

    def sentence(self, result: dict[str, Any]) -> str:
        """Summarize a run in a few words."""
        if "error" in result:
            return f"failed: {result['error']}"
        value = self.format_metric([result["after"][self.metric]])
        return f"{metrics.title(self.metric)} {value}, {result['seconds']:.0f} s"

    def format_metric(self, values: Sequence[float], name: str | None = None) -> str:
        """Return the mean ± standard deviation of a figure over seeds, by default of the task's main figure."""
        is_share = (name or self.metric) in metrics.SHARES
        scale, digits, unit = (100, 1, " %") if is_share else (1, 3, "")
        mean = f"{scale * statistics.mean(values):.{digits}f}"
        deviation = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return mean + deviation + unit

    def failures(self) -> list[tuple[str, str]]:
        """Return (label, reason) for each method with a failed run."""
        return [(method.label, method.error) for method in self.methods if method.error]

    def figures(self) -> list[str]:
        """Return the names of the figures, starting with the task's main figure."""
        metrics = self.finished_runs()[0]["after"] if self.finished_runs() else {}
        return [self.metric, *(name for name in metrics if name not in (self.metric, "loss", "perplexity"))]

    def finished_runs(self) -> list[dict[str, Any]]:
        """Return the results of all methods' finished runs."""
        return list(itertools.chain.from_iterable(method.finished_runs for method in self.methods))

    def optional_columns(self) -> list[str]:
        """Return the columns that only some comparisons have."""
        forgetting = [_FORGETTING] if any(run.get("other") for run in self.finished_runs()) else []
        merges = [_MERGES] if any(run.get("merges") is not None for run in self.finished_runs()) else []
        return forgetting + merges

    def columns(self) -> tuple[str, ...]:
        return ("method", "learning rate", *map(metrics.title, self.figures()), *_COSTS, *self.optional_columns())

    def _optional_cells(self, method: MethodRuns) -> Iterator[str]:
        for name in self.optional_columns():
            if name == _MERGES:
                yield {True: "yes", False: "no", None: ""}[method.finished_runs[0]["merges"]]
                continue
            rises = []
            for run in method.finished_runs:
                loss_before, loss_after = run["other"]
                rises.append(loss_after["loss"] - loss_before["loss"])
            yield ("+" if statistics.mean(rises) >= 0 else "") + self.format_metric(rises, "loss")

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of the table: the untrained model, the baseline and the methods."""
        names = self.figures()
        costs = ("",) * (len(_COSTS) + len(self.optional_columns()))
        rows: list[tuple[str, ...]] = []
        if self.values_before():
            values = (self.format_metric(self.values_before(name), name) for name in names)
            rows.append(("before training", "", *values, *costs))
        if (baseline := self.baseline()) is not None:
            rows.append((baseline[0], "", self.format_metric([baseline[1]]), *("" for _ in names[1:]), *costs))
        for method in self.methods:
            if not method.finished_runs:
                failed_row = (method.label, f"{method.lr:g}", "failed", *("" for _ in names[1:]), *costs)
                rows += [failed_row] if method.error else []
                continue
            rows.append(
                (
                    method.label,
                    f"{method.lr:g}",
                    *(self.format_metric(method.values(name), name) for name in names),
                    f"{method.finished_runs[0]['trainable_parameters']:,}",
                    megabytes(method.median("adapter_bytes")),
                    gigabytes(method.median("peak")),
                    f"{1e3 * method.median('step_seconds'):,.0f} ms",
                    *self._optional_cells(method),
                )
            )
        return rows

    def baseline(self) -> tuple[str, float] | None:
        """Return (name, value) of the baseline's main figure, or None if there is no baseline.

        The value is a mean over seeds, because each seed may hold out different examples.
        """
        baselines = [run["baseline"] for run in self.finished_runs() if run.get("baseline")]
        if not baselines:
            return None
        return baselines[0][0], statistics.mean(value for _, value in baselines)

    def values_before(self, name: str | None = None) -> list[float]:
        """Return a figure of the untrained model, one value per seed. The default is the main figure."""
        return max((method.values(name or self.metric, "before") for method in self.methods), key=len, default=[])

    def show(self) -> None:
        """Print the table."""
        table(self.cells(), self.columns())

    def markdown(self) -> str:
        """Return the table as Markdown, with the errors of failed runs and each classifier's confusion matrix."""
        parts = [_markdown([self.columns(), *self.cells()])]
        if self.rates:
            parts += ["Validation loss at each learning rate (first seed):", _markdown(self.search_cells())]
        parts += [f"{label} failed: {reason}" for label, reason in self.failures()]
        for method in self.methods:
            classifier_runs = [run for run in method.finished_runs if run.get("confusion")]
            if classifier_runs:
                confusion = torch.tensor([run["confusion"] for run in classifier_runs]).sum(0).tolist()
                title = f"Predictions of {method.label} (columns) for each true label (rows), summed over seeds:"
                parts.append(f"{title}\n\n{_markdown(metrics.confusion_rows(confusion, classifier_runs[0]['labels']))}")
        return "\n\n".join(parts) + "\n"

    def search_cells(self) -> list[tuple[str, ...]]:
        """Return the rows of the learning-rate search, with the lowest loss in bold."""

        def cell(method: MethodRuns, rate: float) -> str:
            if rate not in method.tried:
                return ""
            loss = method.validation_loss(rate)
            if not math.isfinite(loss):
                return "failed"
            return f"**{loss:.3f}**" if rate == method.lr else f"{loss:.3f}"

        rows: list[tuple[str, ...]] = [("method", *(f"{rate:g}" for rate in self.rates))]
        rows += [(method.label, *(cell(method, rate) for rate in self.rates)) for method in self.methods]
        return rows

    def write(self, folder: Path) -> None:
        """Write the tables."""
        settings = self.settings.to_json()
        for name in ("method", "fields", "lr", "seed"):  # these settings differ between runs
            settings.pop(name, None)
        rows = []
        for method in self.methods:
            row: dict[str, Any] = {"method": method.label, "lr": method.lr, "runs": method.runs}
            if self.rates:
                row["tried"] = {f"{rate:g}": result for rate, result in method.tried.items()}
            rows.append(row)
        report = {"settings": settings, "rows": rows}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(self.markdown(), encoding="utf-8")

    def write_picture(self, folder: Path) -> None:
        """Write the chart, if there are results to draw."""
        if any(method.finished_runs for method in self.methods):
            (folder / "compare.png").write_bytes(self.picture())

    def picture(self) -> bytes:
        """Return the chart as a PNG."""
        methods = [method for method in self.methods if method.finished_runs]
        parameter_counts = [method.finished_runs[0]["trainable_parameters"] for method in methods]
        peak = [method.median("peak") / 1e6 for method in methods]
        step = [1e3 * method.median("step_seconds") for method in methods]
        panels = [
            self._metric_panel(methods),
            chart.Panel(
                "trained parameters", parameter_counts, [_short(count) for count in parameter_counts], log=True
            ),
            chart.Panel("peak memory (MB)", peak, [f"{value:,.0f}" for value in peak]),
            chart.Panel("step (ms)", step, [f"{value:,.0f}" for value in step]),
        ]
        model = "/".join(Path(self.settings.model).parts[-2:])
        files = [self.settings.data] if isinstance(self.settings.data, str) else self.settings.data
        title = f"{model} on {', '.join(Path(file).name for file in files)}"
        return chart.small_multiples([method.label for method in methods], panels, FULL, title)

    def _metric_panel(self, methods: Sequence[MethodRuns]) -> chart.Panel:
        """Return the panel of the main figure: means over seeds, with error bars and the baselines as lines."""
        is_share = self.metric in metrics.SHARES
        scale = 100 if is_share else 1
        values = [[scale * value for value in method.values(self.metric)] for method in methods]
        seeds = max(map(len, values))
        heading = f"held-out {metrics.title(self.metric)}"
        if is_share:
            heading += " (%)"
        if seeds > 1:
            heading += f", {seeds} seeds"
        lines = [(scale * statistics.mean(self.values_before()), "before training")]
        if (baseline := self.baseline()) is not None:
            name, value = baseline
            lines.append((scale * value, name))
        return chart.Panel(
            heading,
            [statistics.mean(seed_values) for seed_values in values],
            [self.format_metric(method.values(self.metric)).removesuffix(" %") for method in methods],
            spreads=[statistics.stdev(seed_values) if len(seed_values) > 1 else 0.0 for seed_values in values],
            lines=lines,
        )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, with the first row as its header."""
    rows = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _short(count: int) -> str:
    """Format a count like `1.2 M`."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)

"""`report.html`: a self-contained page with plots of the loss and of memory, and tables of the run."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftcore_cli.tasks import metrics
from peftcore_cli.tasks.metrics import Metrics

WIDE, NARROW = 9.0, 4.6  # inches

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 56rem; margin: 2.5rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem; margin-bottom: 0 }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem }}
p.note {{ color: #5a6475; margin-top: .2rem }} img {{ display: block; width: 100%; height: auto }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e3e7ee; vertical-align: top }}
td:first-child {{ color: #5a6475; white-space: nowrap; width: 14rem }}
td {{ overflow-wrap: anywhere }}
@media (max-width: 40rem) {{ td:first-child {{ white-space: normal; width: 8rem }} }}
pre {{ background: #f4f6f9; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1><p class="note">{note}</p>
{body}
</body></html>
"""


def write(
    path: Path,
    *,
    title: str,
    note: str,
    history: Sequence[dict[str, Any]],
    before: Metrics,
    sections: Sequence[tuple[str, Sequence[tuple[Any, ...]]]],
    commands: Sequence[str],
    memory: Callable[[float], bytes] | None = None,
) -> None:
    """Write the report.

    Args:
        path: the file.
        title: heading of the page.
        note: subtitle of the page.
        history: log of Trainer: dicts with `step` and `loss`, `eval_loss`, `eval_accuracy` and others.
        before: metrics before training, drawn at step 0.
        sections: (heading, rows of a table) in order.
        commands: commands that use the adapter.
        memory: function that draws memory over a step as a PNG, given a width in inches.
    """
    body = [_picture("Loss over the steps of training", lambda width: curve(history, before, width))]
    if memory is not None:
        body.append("<h2>Memory over a step</h2>")
        body.append(_picture("Memory over a step of training, predicted and measured", memory))
    for heading, rows in sections:
        body.append(f"<h2>{html.escape(heading)}</h2>")
        body.append(_table(rows))
    body.append("<h2>Use it</h2><pre>" + html.escape("\n".join(commands)) + "</pre>")
    page = _PAGE.format(title=html.escape(title), note=html.escape(note), body="\n".join(body))
    path.write_text(page, encoding="utf-8")


def _picture(alt: str, draw: Callable[[float], bytes]) -> str:
    """Return the HTML of an image in two widths. The browser shows the one that fits."""
    wide, narrow = (base64.b64encode(draw(inches)).decode() for inches in (WIDE, NARROW))
    return (
        f'<picture><source media="(max-width: 40rem)" srcset="data:image/png;base64,{narrow}">'
        f'<img alt="{alt}" src="data:image/png;base64,{wide}"></picture>'
    )


def curve(history: Sequence[dict[str, Any]], before: Metrics, width: float = WIDE) -> bytes:
    """Draw training loss, its running mean, held-out loss and the first metric as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = _series(history, "loss")
    if steps:
        axes.plot(steps, losses, color="#9db4d8", linewidth=1, label="training")
        axes.plot(steps, running_mean(losses), color="#2457a6", linewidth=2, label="training, running mean")
    eval_steps, eval_losses = _series(history, "eval_loss")
    axes.plot(
        [0, *eval_steps], [before.loss, *eval_losses], "o-", color="#c2521a", linewidth=1.5, label="held out", ms=5
    )
    axes.set(xlabel="step", ylabel="loss")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e3e7ee")
    lines = axes.get_lines()
    figure_name = next(iter(before.figures), None)
    if figure_name is not None:
        right = axes.twinx()
        scale, unit = (100, " (%)") if figure_name in metrics.SHARES else (1, "")
        metric_steps, metric_values = _series(history, f"eval_{figure_name}")
        values = [scale * value for value in (before.figures[figure_name], *metric_values)]
        name = metrics.title(figure_name)
        right.plot([0, *metric_steps], values, "s--", color="#2e8b57", linewidth=1.5, ms=5, label=f"held-out {name}")
        if figure_name == "accuracy" and before.baseline is not None:
            baseline_name, share = before.baseline
            right.axhline(scale * share, color="#2e8b57", linewidth=1, linestyle=":", label=baseline_name)
        right.set_ylabel(name + unit)
        right.spines["top"].set_visible(False)
        lines = [*lines, *right.get_lines()]
    labels = [str(line.get_label()) for line in lines]
    figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=len(lines) if width == WIDE else 2)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def running_mean(values: Sequence[float], share: float = 0.9) -> list[float]:
    """Return the bias-corrected exponential moving average of the values."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + (1 - share)
        means.append(total / weight)
    return means


def _series(history: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    by_step = {entry["step"]: entry[key] for entry in history if key in entry}
    return list(by_step), list(by_step.values())


def _table(rows: Sequence[tuple[Any, ...]]) -> str:
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"

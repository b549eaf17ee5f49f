"""Chart of a comparison: one row per method, one panel per measure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, GREY, ORANGE, PALE, INK = "#2457a6", "#8a94a6", "#c2521a", "#e3e7ee", "#1c2330"


@dataclass(frozen=True)
class Panel:
    """One measure and its value per row.

    Args:
        title: name of the measure, with its unit.
        values: one number per row.
        texts: label next to each value.
        spreads: half the length of each row's error bar. Rows with error bars are points instead of bars.
        lines: (value, name) of vertical reference lines.
        log: whether the axis is logarithmic.
    """

    title: str
    values: Sequence[float]
    texts: Sequence[str]
    spreads: Sequence[float] | None = None
    lines: Sequence[tuple[float, str]] = ()
    log: bool = False


def small_multiples(labels: Sequence[str], panels: Sequence[Panel], reference: str, title: str) -> bytes:
    """Draw panels side by side as a PNG. The first row is at the top, and the row `reference` is grey."""
    from matplotlib.figure import Figure

    height = 1.3 + 0.38 * len(labels)
    widths = [1.5 if panel.spreads is not None else 1.0 for panel in panels]
    figure = Figure(figsize=(11.5, height), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    grid = figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)[0]
    rows = range(len(labels))
    colours = [GREY if label == reference else BLUE for label in labels]
    for axes, panel in zip(grid, panels, strict=True):
        axes.set_title(panel.title, fontsize=10, color=INK, loc="left")
        if panel.log:  # bars start at zero
            axes.scatter(panel.values, rows, color=colours, s=36)
        elif panel.spreads is None:
            axes.barh(rows, panel.values, height=0.55, color=colours)
        else:
            for y, (value, error) in enumerate(zip(panel.values, panel.spreads, strict=True)):
                axes.errorbar(value, y, xerr=error or None, fmt="o", color=colours[y], capsize=3, ms=6)
        _limits(axes, panel)
        for y, (value, text) in enumerate(zip(panel.values, panel.texts, strict=True)):
            far = value + (panel.spreads[y] if panel.spreads else 0)
            axes.annotate(
                text, (far, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK
            )
        for level, (value, name) in enumerate(panel.lines):
            axes.axvline(value, color=ORANGE, linestyle=("--", ":")[level % 2], linewidth=1.2, zorder=0)
            axes.annotate(
                name,
                (value, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -2 - 10 * level),
                textcoords="offset points",
                va="top",
                fontsize=8.5,
                color=ORANGE,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # keeps the label readable
            )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GREY)
        axes.tick_params(which="both", length=0, labelsize=8.5, colors="#5a6475")
        axes.set_axisbelow(True)
        axes.grid(axis="x", color=PALE)
    grid[0].set_yticks(rows, labels, fontsize=10, color=INK)
    grid[0].set_ylim(len(labels) - 0.4, -0.9)  # first row on top
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _limits(axes: Axes, panel: Panel) -> None:
    """Set the axis limits, with space for the labels on the right."""
    if panel.log:
        axes.set_xscale("log")
        low, high = min(panel.values), max(panel.values)
        axes.set_xlim(low / 3, high * (high / low * 3) ** 0.75)
    elif panel.spreads is None:
        axes.set_xlim(0, 1.5 * max(panel.values))
    else:
        errors = panel.spreads
        shown = [*panel.values, *(value for value, _ in panel.lines)]
        low = min(value - s for value, s in zip(panel.values, errors, strict=True))
        low, high = min(low, *shown), max(value + s for value, s in zip(panel.values, errors, strict=True))
        room = high - low or abs(high) or 1.0
        axes.set_xlim(low - 0.08 * room, max(high, *shown) + 0.5 * room)

"""Chart of what each method reaches against the memory that its training takes, with the Pareto front."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

COLOURS = ("#2457a6", "#c2521a", "#2e8b57", "#8e44ad", "#5a6475")
INK, PALE, FRONT = "#1c2330", "#e3e7ee", "#8a94a6"
SIZE = 8.5  # of labels, in points


@dataclass(frozen=True)
class Point:
    name: str
    family: str
    x: float
    y: float


@dataclass(frozen=True)
class Panel:
    """Half of the chart. `rises`: whether more is better. `level`: a value to compare with, and its name."""

    title: str
    y_name: str
    points: Sequence[Point]
    rises: bool
    level: tuple[float, str] | None = None


def front(points: Sequence[Point], rises: bool) -> list[Point]:
    """Return the points that no other point beats in both values, by rising x."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y if rises else p.y)):
        if not found or (point.y > found[-1].y if rises else point.y < found[-1].y):
            found.append(point)
    return found


def near(panel: Panel) -> Panel:
    """Move points that are far worse than the rest to the edge, with their value in the name."""
    low, _, high = statistics.quantiles([p.y for p in panel.points], n=4)
    worst = low - 2 * (high - low) if panel.rises else high + 2 * (high - low)
    points = [
        replace(p, y=worst, name=f"{p.name} ({p.y:.1f})") if (p.y < worst) == panel.rises and p.y != worst else p
        for p in panel.points
    ]
    return replace(panel, points=points)


def draw(file: Path, panels: Sequence[Panel], families: Sequence[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(12, 6.6 * len(panels)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    colours = dict(zip(families, COLOURS, strict=False))
    panels = [near(panel) for panel in panels]
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        best = front(panel.points, panel.rises)
        axes.step([p.x for p in best], [p.y for p in best], where="post", color=FRONT, lw=1.4, zorder=1)
        for family in families:
            of = [p for p in panel.points if p.family == family]
            axes.scatter([p.x for p in of], [p.y for p in of], s=30, color=colours[family], zorder=3)
        if panel.level is not None:
            axes.axhline(panel.level[0], color=FRONT, ls=":", lw=1.2)
            place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
            axes.annotate(panel.level[1], (0.995, panel.level[0]), fontsize=SIZE, color=INK, **place)
        axes.set_title(panel.title, loc="left", fontsize=12, color=INK)
        axes.set_xlabel("peak memory of the process in training, MB (log)", fontsize=9.5, color=INK)
        axes.set_ylabel(panel.y_name, fontsize=9.5, color=INK)
        axes.set_xscale("log")
        ticks(axes, [p.x for p in panel.points])
        if not panel.rises:
            axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=PALE)
        axes.set_axisbelow(True)
        axes.margins(x=0.06, y=0.08)
    marks = [Line2D([], [], color=colours[family], marker="o", ls="", label=family) for family in families]
    marks.append(Line2D([], [], color=FRONT, lw=1.4, label="Pareto front"))
    figure.legend(handles=marks, loc="outside upper left", ncols=len(marks), fontsize=9.5, frameon=False)
    figure.canvas.draw()  # lays out: labels need the places of points in pixels
    figure.set_layout_engine("none")
    for axes, panel in zip(figure.axes, panels, strict=True):
        label(figure, axes, panel, colours)
    figure.savefig(file, bbox_inches="tight")  # a name may stand beyond the axes


def ticks(axes, values: Sequence[float]) -> None:
    """Set ticks at whole hundreds or fifties."""
    from matplotlib.ticker import NullFormatter

    low, high = min(values), max(values)
    step = next(step for step in (10, 20, 50, 100, 200, 500, 1000) if (high - low) / step <= 10)
    marks = range(math.floor(low / step) * step, math.ceil(high / step) * step + 1, step)
    axes.set_xticks(list(marks), [f"{mark:,}" for mark in marks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def label(figure, axes, panel: Panel, colours: dict[str, str]) -> None:
    """Put a name next to each point, at the nearest place where it covers no other name, point or line to a name."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    pixel = figure.dpi / 72
    at = {p.name: axes.transData.transform((p.x, p.y)) for p in panel.points}
    bounds = axes.get_window_extent(renderer)
    taken = [Bbox.from_extents(x - 4 * pixel, y - 4 * pixel, x + 4 * pixel, y + 4 * pixel) for x, y in at.values()]
    lines: list[tuple[tuple[float, float], tuple[float, float]]] = []
    best_points = front(panel.points, panel.rises)
    on_front = {p.name for p in best_points}
    if panel.level is not None:
        height = axes.transData.transform((panel.points[0].x, panel.level[0]))[1]
        lines.append(((bounds.x0, height), (bounds.x1, height)))
    for left, right in itertools.pairwise(best_points):
        corner = axes.transData.transform((right.x, left.y))
        lines += [(tuple(at[left.name]), tuple(corner)), (tuple(corner), tuple(at[right.name]))]

    def crowd(p: Point) -> int:
        return sum(math.dist(at[p.name], other) < 60 * pixel for other in at.values())

    for point in sorted(panel.points, key=crowd, reverse=True):
        weight = "bold" if point.name in on_front else "normal"
        text = figure.text(0, 0, point.name, fontsize=SIZE, weight=weight, color=colours[point.family])
        extent = text.get_window_extent(renderer)
        width, height = extent.width + 3 * pixel, extent.height
        x, y = at[point.name]
        best = None
        for radius in (7, 12, 18, 26, 36, 48, 62, 78, 96, 120, 150):
            for degrees in (0, 180, 45, 135, 315, 225, 90, 270, 22, 158, 338, 202, 67, 113, 293, 247):
                dx, dy = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
                cx, cy = x + dx * (radius * pixel + width / 2), y + dy * (radius * pixel + height / 2)
                box = Bbox.from_extents(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                if not (bounds.x0 < box.x0 and box.x1 < bounds.x1 + 40 and bounds.y0 < box.y0 and box.y1 < bounds.y1):
                    continue
                end = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
                others = [other for other in taken if not other.contains(x, y)]
                clear = not any(box.overlaps(other) for other in taken)
                clear = clear and not any(crosses((x, y), end, other) for other in others)
                clear = clear and not any(crosses(*line, box) for line in lines)
                if clear:
                    best = (box, end, radius)
                    break
            if best:
                break
        if best is None:
            text.remove()
            continue
        box, end, radius = best
        text.set_position(figure.transFigure.inverted().transform((box.x0 + 1.5 * pixel, box.y0 + height * 0.2)))
        taken.append(box)
        if radius > 12:
            lines.append(((x, y), end))
            xs, ys = zip(*(figure.transFigure.inverted().transform(each) for each in ((x, y), end)), strict=True)
            figure.add_artist(Line2D(xs, ys, color=colours[point.family], lw=0.6, alpha=0.7))


def crosses(a: tuple[float, float], b: tuple[float, float], box) -> bool:
    """Return whether the line from a to b runs through the box."""
    return any(box.contains(a[0] + (b[0] - a[0]) * t / 80, a[1] + (b[1] - a[1]) * t / 80) for t in range(81))

"""Plot of memory over a training step: predicted, by purpose, and measured."""

from __future__ import annotations

import io
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftcore.estimating import Purpose
from peftcore_cli.training.chart import BLUE, GREY, INK, PALE
from peftcore_cli.training.forecast import Forecast
from peftcore_cli.training.memory_trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from peftcore import Estimate

_PURPOSES = tuple(Purpose)

# The layers of the plot from bottom to top: their purposes and colour.
_LAYERS = {
    "weights": ((Purpose.BASE, Purpose.GATHERED), "#c9d3e3"),
    "adapters": ((Purpose.ADAPTERS,), "#7c9ccb"),
    "gradients": ((Purpose.GRADIENTS,), "#e5b25d"),
    "optimizer": ((Purpose.STATE,), "#b58ab8"),
    "activations": ((Purpose.ACTIVATIONS, Purpose.INPUTS), "#7fb69b"),
    "logits and loss": ((Purpose.LOGITS,), "#d98a6a"),
    "temporaries": ((Purpose.TEMPORARIES, Purpose.KERNELS, Purpose.MESSAGES, Purpose.KEPT), "#e9dcc9"),
}


def stack(estimate: Estimate) -> tuple[list[float], dict[str, list[int]]]:
    """Return (positions in the step, bytes of each layer of the plot at these positions).

    Positions count completed phases: 1.5 is the middle of the second phase, in floating-point operations.
    """
    phase_starts = [first_operation for first_operation, _ in estimate.phases]
    count = len(estimate.operations)
    # Every call counts as at least a million operations, so that phases without matrix products have a width.
    flops_before = [0.0, *itertools.accumulate(operation.cost.flops + 1e6 for operation in estimate.operations)]
    positions: list[float] = []
    for number, _ in estimate.timeline:
        phase = max(0, bisect_right(phase_starts, number) - 1)
        start = flops_before[phase_starts[phase]]
        end = flops_before[phase_starts[phase + 1] if phase + 1 < len(phase_starts) else count]
        positions.append(phase + (flops_before[min(number, count)] - start) / ((end - start) or 1.0))
    sizes: dict[str, list[int]] = {}
    for name, (purposes, _) in _LAYERS.items():
        indices = [_PURPOSES.index(purpose) for purpose in purposes]
        sizes[name] = [sum(bytes_by_purpose[i] for i in indices) for _, bytes_by_purpose in estimate.timeline]
    return positions, sizes


def picture(forecast: Forecast, trace: Trace | None, width: float = 9.0) -> bytes:
    """Draw the predicted memory over a step, and the measured memory if there is a trace, as a PNG.

    Args:
        forecast: the forecast of the run.
        trace: the measured step, or None.
        width: width in inches.
    """
    from matplotlib.figure import Figure

    wide = width > 6
    figure = Figure(figsize=(width, 4 if wide else 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw_layers(axes, forecast)
    low, high = forecast.peak.low / 1e9, forecast.peak.high / 1e9
    # A range with a single value would have no height.
    axes.axhspan(low, max(high, 1.002 * low), color=INK, alpha=0.25, linewidth=0, label="predicted peak")
    phases = [name for _, name in forecast.estimate.phases]
    measured_points = [] if trace is None else trace.by_phase(len(phases))
    if measured_points:
        positions, sizes = zip(*measured_points, strict=True)
        axes.plot(positions, [size / 1e9 for size in sizes], color=BLUE, lw=1.8, label="measured")
    _label_phases(axes, phases)
    top = max([high, *(size / 1e9 for _, size in measured_points)])
    axes.set(xlim=(0, len(phases)), ylim=(0, 1.08 * top), ylabel="GB", xticks=[])
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=5 if wide else 2, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_layers(axes: Axes, forecast: Forecast) -> None:
    positions, sizes = stack(forecast.estimate)
    order = sorted(range(len(positions)), key=positions.__getitem__)
    layers: dict[str, list[int]] = {}
    colours: list[str] = []
    if forecast.libraries:
        layers["Python and libraries"] = [forecast.libraries] * len(order)
        colours.append(PALE)
    for name, values in sizes.items():
        if any(values):
            layers[name] = [values[i] for i in order]
            colours.append(_LAYERS[name][1])
    heights = [[size / 1e9 for size in values] for values in layers.values()]
    axes.stackplot([positions[i] for i in order], heights, labels=[*layers], colors=colours, step="post")


def _label_phases(axes: Axes, phases: Sequence[str]) -> None:
    for number, name in enumerate(phases):
        if number:
            axes.axvline(number, color=GREY, linewidth=0.8)
        short = name.partition(" of ")[0] if len(phases) <= 9 else name[:1]
        axes.text(number + 0.5, 1.01, short, transform=axes.get_xaxis_transform(), ha="center", fontsize=8.5, color=INK)

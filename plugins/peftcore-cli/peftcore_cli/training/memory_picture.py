"""A picture of memory over one training step: predicted, by purpose, and measured."""

from __future__ import annotations

import io
import itertools
from bisect import bisect_right
from typing import TYPE_CHECKING

from peftcore.estimating import Purpose
from peftcore_cli.training.chart import BLUE, GREY, INK, PALE
from peftcore_cli.training.forecast import Forecast
from peftcore_cli.training.memory_trace import Trace

if TYPE_CHECKING:
    from peftcore import Estimate

_PURPOSES = tuple(Purpose)

# Groups drawn as one, from below, with their colour.
_LAYERS = {
    "weights": ((Purpose.BASE, Purpose.GATHERED), "#c9d3e3"),
    "adapters": ((Purpose.ADAPTERS,), "#7c9ccb"),
    "gradients": ((Purpose.GRADIENTS,), "#e5b25d"),
    "optimizer": ((Purpose.STATE,), "#b58ab8"),
    "activations": ((Purpose.ACTIVATIONS, Purpose.INPUTS), "#7fb69b"),
    "logits and loss": ((Purpose.LOGITS,), "#d98a6a"),
    "temporaries": ((Purpose.TEMPORARIES, Purpose.KERNELS, Purpose.MESSAGES, Purpose.KEPT), "#e9dcc9"),
}


def stacked(found: Estimate) -> tuple[list[float], dict[str, list[int]]]:
    """Return (places in the step, bytes of each layer of the picture at these places).

    A place counts completed phases: 1.5 is the middle of the second phase, by the floating-point operations.
    """
    firsts = [first for first, _ in found.phases]
    count = len(found.operations)
    # A call counts as some operations, or phases without products would have no width.
    done = [0.0, *itertools.accumulate(each.cost.flops + 1e6 for each in found.operations)]
    places = []
    for operation, _ in found.timeline:
        phase = max(0, bisect_right(firsts, operation) - 1)
        start = done[firsts[phase]]
        end = done[firsts[phase + 1] if phase + 1 < len(firsts) else count]
        places.append(phase + (done[min(operation, count)] - start) / ((end - start) or 1.0))
    sizes = {
        name: [sum(now[_PURPOSES.index(purpose)] for purpose in purposes) for _, now in found.timeline]
        for name, (purposes, _) in _LAYERS.items()
    }
    return places, sizes


def picture(said: Forecast, was: Trace | None, width: float = 9.0) -> bytes:
    """Return a PNG. `was`: the measured step, or None. `width`: in inches."""
    from matplotlib.figure import Figure

    wide = width > 6
    figure = Figure(figsize=(width, 4 if wide else 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    places, sizes = stacked(said.estimate)
    order = sorted(range(len(places)), key=lambda n: places[n])
    x = [places[n] for n in order]
    below = {"Python and libraries": [said.libraries] * len(x)} if said.libraries else {}
    layers = {**below, **{name: [values[n] for n in order] for name, values in sizes.items() if any(values)}}
    colours = [PALE if name in below else _LAYERS[name][1] for name in layers]
    heights = [[size / 1e9 for size in values] for values in layers.values()]
    axes.stackplot(x, heights, labels=[*layers], colors=colours, step="post")
    low, high = said.peak.low / 1e9, said.peak.high / 1e9
    axes.axhspan(low, max(high, 1.002 * low), color=INK, alpha=0.25, linewidth=0, label="predicted peak")
    phases = [name for _, name in said.estimate.phases]
    measured = was.by_phase(len(phases)) if was is not None else []
    if measured:
        axes.plot(
            [at for at, _ in measured], [size / 1e9 for _, size in measured], color=BLUE, lw=1.8, label="measured"
        )
    for number, name in enumerate(phases):
        if number:
            axes.axvline(number, color=GREY, linewidth=0.8)
        short = name.partition(" of ")[0] if len(phases) <= 9 else name[:1]
        axes.text(number + 0.5, 1.01, short, transform=axes.get_xaxis_transform(), ha="center", fontsize=8.5, color=INK)
    top = max([high, *(size / 1e9 for _, size in measured)])
    axes.set(xlim=(0, len(phases)), ylim=(0, 1.08 * top), ylabel="GB", xticks=[])
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=5 if wide else 2, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()

"""The residual stream in a trace: additions s + h where h was made from s, and the modules that gave h.

s ──┬── norm ── x ── F ── h ── (+) ── out
    └──────────────────────────┘
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from peftcore.model.tracing import Call, Trace

# Attention in one operator, of (query, key, value).
FUSED_ATTENTION = {
    f"_scaled_dot_product_{kind}" for kind in (
        "flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
        "fused_attention_overrideable", "attention_math", "attention_math_for_mps",
    )
}  # fmt: skip
MATRIX = {"mm", "addmm", "_grouped_mm", "bmm", "baddbmm", "convolution", *FUSED_ATTENTION}
# Operators by which one token sees others, where no product of activations does it.
MIXING = {"convolution", "_fft_r2c", "_fft_c2c", "cumsum", "stack", "avg_pool2d", "roll"}
_NORMS = {"native_layer_norm", "_fused_rms_norm", "rsqrt", "native_batch_norm", "native_group_norm", "var_mean", "std"}
_VIEWS = {"view", "_unsafe_view"}
_SCALES = {"mul", "div", "_to_copy", "clone", "view"}


@dataclass(frozen=True)
class Branch:
    """A residual branch: `call` computes h from `stream`, and `adder` adds h to it, or to a multiple, giving `out`."""

    call: Call
    h: int
    stream: int
    out: int
    adder: Call | None


class Residuals:
    """Residual `branches` found in a trace, and `streams`, the values to which something was added."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.values = trace, trace.values
        self.returned: dict[int, list[Call]] = defaultdict(list)  # {value: calls that returned it, innermost first}
        for call in trace.calls:
            if call.output is not None and call.output not in call.arguments.values():
                self.returned[call.output].insert(0, call)
        self._views: dict[int, list[int]] = defaultdict(list)
        for number, value in enumerate(self.values):
            if value.operator in _VIEWS and value.shape[-1:] == self.values[value.inputs[0]].shape[-1:]:
                self._views[value.inputs[0]].append(number)
        self._mixing = self._calls_with(MIXING | MATRIX)
        self.multiplies = self._calls_with(MATRIX)
        self._norms = self._calls_with(_NORMS)
        self._additions = self._find_additions()
        self.streams = {value for stream, _, root in self._additions.values() for value in (stream, root)}
        found = [
            Branch(call, call.output, root, out, self.values[out].call)
            for out, (_, h, root) in self._additions.items()
            for call in dict.fromkeys(self._givers(h, root, set(self._around(self.values[out].call))))
            if call.output is not None
        ]
        adders = {around for branch in found for around in self._around(branch.adder)}
        # Without blocks that contain branches.
        self.branches = [branch for branch in found if branch.call not in adders]

    def views(self, value: int) -> list[int]:
        """Return `value` and its views with other leading dimensions, such as OPT's rows back in batches."""
        return [value, *(view for each in self._views.get(value, ()) for view in self.views(each))]

    def region(self, value: int, since: int) -> set[int]:
        """Return the values from which `value` was computed, none older than `since`."""
        seen, queue = {value}, [value]
        while queue:
            for number in self.values[queue.pop()].inputs:
                if number >= since and number not in seen:
                    seen.add(number)
                    queue.append(number)
        return seen

    def comes_from(self, value: int, root: int) -> bool:
        """Return whether `value` was computed from `root`."""
        return value > root and root in self.region(value, root)

    def is_norm(self, call: Call) -> bool:
        return call in self._norms and self.is_plain(call)

    def is_plain(self, call: Call) -> bool:
        """Return whether the call mixes neither tokens nor features (norm, dropout, scale, activation)."""
        return call not in self._mixing and not any(p.dim() > 1 for p in call.module.parameters())

    def _calls_with(self, operators: set[str]) -> set[Call]:
        return {call for value in self.values if value.operator in operators for call in self._around(value.call)}

    def _around(self, call: Call | None) -> Iterator[Call]:
        if call is not None:
            yield call
            yield from call.around()

    def _find_additions(self) -> dict[int, tuple[int, int, int]]:
        """Return {out: (s, h, the value of s from which h was computed)}."""
        found: dict[int, tuple[int, int, int]] = {}

        for out, value in enumerate(self.values):
            if value.operator not in ("add", "add_") or len(value.inputs) < 2 or len(value.shape) < 2:
                continue
            a, b = value.inputs[:2]
            if self.values[a].shape != self.values[b].shape:
                continue
            for s, h in ((a, b), (b, a)):
                root = next((root for root in self._before(s, found) if self.comes_from(h, root)), None)
                if root is not None and not self.values[h].is_weight:
                    found[out] = s, h, root
                    break
        return found

    def _givers(self, value: int, oldest: int, around: set[Call]) -> Iterator[Call]:
        """Yield the outermost calls that returned `value`, ignoring norms, dropout, scales, views and sums."""
        seen: set[int] = set()

        def back(value: int) -> Iterator[Call]:
            if value <= oldest or value in seen:
                return
            seen.add(value)
            calls = [call for call in self.returned[value] if call not in around]
            if found := [call for call in calls if not self.is_plain(call)]:
                yield found[-1]
                return
            if calls:  # of a norm, dropout or scale: what it was called with
                yield from back(next((v for v in calls[-1].arguments.values() if not self.values[v].is_weight), -1))
                return
            operator = self.values[value].operator
            if operator in MATRIX:
                return
            inputs = [v for v in self.values[value].inputs if not self.values[v].is_weight]
            if value in self._additions:
                inputs = [self._additions[value][1]]
            if operator.startswith("add"):  # each term may come from a module of its own
                for term in inputs:
                    yield from back(term)
                return
            for factor in self._by_depth(
                inputs, oldest
            ):  # a gate is not followed if the gated value comes from a module
                given = list(back(factor))
                yield from given
                if given:
                    return

        return back(value)

    def _before(self, value: int, additions: dict[int, tuple[int, int, int]]) -> Iterator[int]:
        """Yield a stream's value and its earlier ones: x + attn(x) + mlp(x) has two additions, a · x a scale."""
        while True:
            yield value
            made = self.values[value]
            inputs = [v for v in made.inputs if not self.values[v].is_weight]
            if value in additions:
                value = additions[value][0]
            elif made.operator in _SCALES and len(inputs) == 1:
                value = inputs[0]
            else:
                return

    def _by_depth(self, values: list[int], oldest: int) -> list[int]:
        """Sort values by the number of products that led to them, most first: a gated value before its gate."""
        if len(values) < 2:
            return values

        def depth(value: int) -> int:
            return sum(self.values[v].operator in MATRIX for v in self.region(value, oldest))

        return sorted(values, key=depth, reverse=True)

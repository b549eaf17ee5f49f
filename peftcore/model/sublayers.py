"""Detect attention, cross-attention and feed-forward sublayers in one forward pass.

A sublayer is a branch F of the residual stream: an addition s + h where h was computed from s. Sublayers are detected
from these additions alone, never by class names.

s ──┬── norm ── x ── F ── h ── (+) ── out
    └──────────────────────────┘
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from peftcore.model.base_modules import base_modules
from peftcore.model.bypass import bypassed_layers, rewritten_layers
from peftcore.model.tracing import SKIPPED, Call, Trace, cached_by_model, observe, trace
from peftcore.plugin.architecture import ATTENTION, CROSS_ATTENTION, FEED_FORWARD, Kind, Sublayer

# Operators that compute attention of (query, key, value).
_FUSED_ATTENTION = {
    f"_scaled_dot_product_{kind}" for kind in (
        "flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
        "fused_attention_overrideable", "attention_math", "attention_math_for_mps",
    )
}  # fmt: skip
_MATRIX = {"mm", "addmm", "_grouped_mm", "bmm", "baddbmm", "convolution", *_FUSED_ATTENTION}
# Operators that mix tokens without a product of activations.
_MIXING = {"convolution", "_fft_r2c", "_fft_c2c", "cumsum", "stack", "avg_pool2d", "roll"}
_NORMS = {"native_layer_norm", "_fused_rms_norm", "rsqrt", "native_batch_norm", "native_group_norm", "var_mean", "std"}
_VIEWS = {"view", "_unsafe_view"}
_SCALES = {"mul", "div", "_to_copy", "clone", "view"}


class ObservedSublayers(Sequence[Sublayer]):
    """The sublayers of a model, detected on first access."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @cached_property
    def _sublayers(self) -> tuple[Sublayer, ...]:
        return find(self._model)

    def __getitem__(self, index: Any) -> Any:
        return self._sublayers[index]

    def __len__(self) -> int:
        return len(self._sublayers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._sublayers == tuple(other)

    def __repr__(self) -> str:
        return repr(self._sublayers)


@cached_by_model
def find(model: nn.Module) -> tuple[Sublayer, ...]:
    """Return the sublayers of all numbered layers of `model`, in the order of its forward.

    The result is empty if the forward fails inside a layer, or if the model rescales the residual stream.
    """
    reader = _SublayerReader(model, observe(model))
    if reader.looks_into_skipped_layers():
        reader = _SublayerReader(model, trace(model, every_layer=True))
    if reader.trace.error is not None and not _ran_whole_stacks(model, reader.trace):
        return ()
    sublayers = reader.sublayers()
    # A module may be called in evaluation mode, but bypassed in training.
    if any(sublayer.output in bypassed_layers(model) for sublayer in sublayers):
        training = trace(model, training=True)
        read_paths = {name.rpartition(".")[0] for name in training.other_reads}
        not_called = read_paths - training.called
        sublayers = tuple(sublayer for sublayer in sublayers if sublayer.output not in not_called)
    if any(f"{path}.".startswith(f"{sublayer.output}.") for path in rewritten_layers(model) for sublayer in sublayers):
        return ()  # evaluation and training scale the stream differently (RWKV)
    return sublayers


def _ran_whole_stacks(model: nn.Module, trace: Trace) -> bool:
    """Return whether a failed forward has run each list of layers completely or not at all."""
    if any(_numbered_prefixes(path) for path in trace.failed):
        return False
    lists = [(path, module) for path, module in base_modules(model) if isinstance(module, nn.ModuleList)]
    return all(len({f"{path}.{i}" in trace.called for i in range(len(module))}) <= 1 for path, module in lists)


@dataclass(frozen=True)
class Branch:
    """A residual branch: `call` computes h from `stream`, and `adder` adds h to the stream or to a multiple of it."""

    call: Call
    h: int
    stream: int
    out: int
    adder: Call | None


class Residuals:
    """Residual `branches` of a trace, and `streams`: the values to which a branch is added."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.values = trace, trace.values
        self.returned: dict[int, list[Call]] = defaultdict(list)  # {value: calls that returned it, outermost last}
        for call in trace.calls:
            if call.output is not None and call.output not in call.arguments.values():
                self.returned[call.output].insert(0, call)
        self._views: dict[int, list[int]] = defaultdict(list)
        for number, value in enumerate(self.values):
            if value.operator in _VIEWS and value.shape[-1:] == self.values[value.inputs[0]].shape[-1:]:
                self._views[value.inputs[0]].append(number)
        self._mixing = self._calls_with(_MIXING | _MATRIX)
        self.multiplies = self._calls_with(_MATRIX)
        self._norms = self._calls_with(_NORMS)
        self._additions = self._find_additions()
        self.streams = {value for stream, _, root in self._additions.values() for value in (stream, root)}
        found = [
            Branch(call=call, h=call.output, stream=root, out=out, adder=self.values[out].call)
            for out, (_, h, root) in self._additions.items()
            for call in dict.fromkeys(self._producers(h, root, set(self._with_enclosing(self.values[out].call))))
            if call.output is not None
        ]
        adders = {around for branch in found for around in self._with_enclosing(branch.adder)}
        # Skip blocks that contain other branches.
        self.branches = [branch for branch in found if branch.call not in adders]

    def views(self, value: int) -> list[int]:
        """Return `value` and its views with other leading dimensions, since OPT reshapes between rows and batches."""
        return [value, *(view for child in self._views.get(value, ()) for view in self.views(child))]

    def region(self, value: int, since: int) -> set[int]:
        """Return the values that `value` was computed from, back to `since`."""
        visited_values, queue = {value}, [value]
        while queue:
            for number in self.values[queue.pop()].inputs:
                if number >= since and number not in visited_values:
                    visited_values.add(number)
                    queue.append(number)
        return visited_values

    def comes_from(self, value: int, root: int) -> bool:
        """Return whether `value` was computed from `root`."""
        return value > root and root in self.region(value, root)

    def is_norm(self, call: Call) -> bool:
        return call in self._norms and self.is_plain(call)

    def is_plain(self, call: Call) -> bool:
        """Return whether the call mixes neither tokens nor features (norms, dropout, scales, activations)."""
        return call not in self._mixing and not any(p.dim() > 1 for p in call.module.parameters())

    def _calls_with(self, operators: set[str]) -> set[Call]:
        return {
            call for value in self.values if value.operator in operators for call in self._with_enclosing(value.call)
        }

    def _with_enclosing(self, call: Call | None) -> Iterator[Call]:
        if call is not None:
            yield call
            yield from call.enclosing()

    def _find_additions(self) -> dict[int, tuple[int, int, int]]:
        """Return the additions out = s + h as {out: (s, h, the earlier value of s from which h was computed)}."""
        additions: dict[int, tuple[int, int, int]] = {}

        for out, value in enumerate(self.values):
            if value.operator not in ("add", "add_") or len(value.inputs) < 2 or len(value.shape) < 2:
                continue
            a, b = value.inputs[:2]
            if self.values[a].shape != self.values[b].shape:
                continue
            for s, h in ((a, b), (b, a)):
                root = next((root for root in self._earlier_streams(s, additions) if self.comes_from(h, root)), None)
                if root is not None and not self.values[h].is_weight:
                    additions[out] = s, h, root
                    break
        return additions

    def _producers(self, value: int, oldest: int, around: set[Call]) -> Iterator[Call]:
        """Yield the outermost calls that returned `value`, ignoring norms, dropout, scales, views and sums."""
        visited_values: set[int] = set()

        def back(value: int) -> Iterator[Call]:
            if value <= oldest or value in visited_values:
                return
            visited_values.add(value)
            calls = [call for call in self.returned[value] if call not in around]
            if producers := [call for call in calls if not self.is_plain(call)]:
                yield producers[-1]
                return
            if calls:  # continue with the input of a norm, dropout or scale
                yield from back(next((v for v in calls[-1].arguments.values() if not self.values[v].is_weight), -1))
                return
            operator = self.values[value].operator
            if operator in _MATRIX:
                return
            inputs = [v for v in self.values[value].inputs if not self.values[v].is_weight]
            if value in self._additions:
                inputs = [self._additions[value][1]]
            if operator.startswith("add"):  # each term may come from a different module
                for term in inputs:
                    yield from back(term)
                return
            # Follow a gate only if the gated value does not come from a module.
            for factor in self._by_depth(inputs, oldest):
                calls = list(back(factor))
                yield from calls
                if calls:
                    return

        return back(value)

    def _earlier_streams(self, value: int, additions: dict[int, tuple[int, int, int]]) -> Iterator[int]:
        """Yield a stream's value and its earlier values, before additions (x + attn(x) + mlp(x)) and scales (a · x)."""
        while True:
            yield value
            producer = self.values[value]
            inputs = [v for v in producer.inputs if not self.values[v].is_weight]
            if value in additions:
                value = additions[value][0]
            elif producer.operator in _SCALES and len(inputs) == 1:
                value = inputs[0]
            else:
                return

    def _by_depth(self, values: list[int], oldest: int) -> list[int]:
        """Sort values by the number of matrix products behind them, largest first: gated values precede gates."""
        if len(values) < 2:
            return values

        def depth(value: int) -> int:
            return sum(self.values[v].operator in _MATRIX for v in self.region(value, oldest))

        return sorted(values, key=depth, reverse=True)


class _SublayerReader:
    """Converts the residual branches of a trace into sublayers."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace, self.values = trace, trace.values
        self.residuals = Residuals(trace)
        self.modules = dict(base_modules(model))
        self.called = trace.called

    def looks_into_skipped_layers(self) -> bool:
        """Return whether a branch passes through a layer that the trace skipped."""
        return any(
            self.values[v].operator == SKIPPED for branch in self.residuals.branches for v in self._region(branch)
        )

    def sublayers(self) -> tuple[Sublayer, ...]:
        """Return the sublayers of all numbered layers, in the order of the forward."""
        branches = self._branches_of_layers()
        twins = self._twins(branches)
        layers = _layer_by_path([path for paths in twins.values() for path in paths])
        by_layer: dict[str, list[Branch]] = defaultdict(list)  # traced layers only
        for path, branch in branches.items():
            by_layer[layers[path]].append(branch)
        sublayers_by_layer: dict[str, list[Sublayer]] = defaultdict(list)
        for layer, layer_branches in by_layer.items():
            for branch, kind in zip(layer_branches, self._kinds(layer_branches), strict=True):
                if kind is None:
                    continue
                sublayer = self._sublayer(branch, kind, layer)
                for path in dict.fromkeys(twins[branch.call.path]):
                    sublayers_by_layer[layers[path]].append(_for_other_layer(sublayer, layer, layers[path]))
        order = [call.path for call in self.trace.calls]
        indices = _layer_indices(sorted(sublayers_by_layer, key=order.index))
        return tuple(
            replace(sublayer, layer=indices[layer]) for layer in indices for sublayer in sublayers_by_layer[layer]
        )

    def _branches_of_layers(self) -> dict[str, Branch]:
        """Return {path of a numbered module: its branches}; if a layer runs several times, of its first call."""
        branches: dict[str, Branch] = {}
        for branch in self.residuals.branches:
            if _numbered_prefixes(branch.call.path) and self._has_features_last(branch.call):
                branches.setdefault(branch.call.path, branch)
        return branches

    def _twins(self, paths: Iterable[str]) -> dict[str, list[str]]:
        """Return {path in a traced layer: corresponding paths in all layers with the same structure}."""
        twins = {path: [path] for path in paths}
        for path, traced_layer in self.trace.alike:
            for twin in [twin for twin in twins if twin.startswith(f"{traced_layer}.")]:
                twins[twin].append(path + twin[len(traced_layer) :])
        return twins

    def _kinds(self, branches: list[Branch]) -> list[Kind | None]:
        """Return the kind of each branch of one layer; None for any other sublayer."""
        products = [self._product(branch) for branch in branches]
        attends = [product is not None for product in products]
        mixes = [any(self.values[v].operator in _MIXING for v in self._region(branch)) for branch in branches]
        kinds: list[Kind | None] = []
        for branch, product, mixing in zip(branches, products, mixes, strict=True):
            if product is not None:
                kinds.append(ATTENTION if self._is_self_attention(branch, product) else CROSS_ATTENTION)
            elif not mixing:
                kinds.append(FEED_FORWARD)
            elif not any(attends):
                kinds.append(ATTENTION)
            else:  # a convolution, either inside the feed-forward or next to it (Conformer)
                has_feed_forward = any(not a and not m for a, m in zip(attends, mixes, strict=True))
                kinds.append(None if has_feed_forward else FEED_FORWARD)
        return kinds

    def _region(self, branch: Branch) -> list[int]:
        """Return the values between the stream and h in order of execution."""
        return sorted(self.residuals.region(branch.h, branch.stream) - {branch.stream})

    def _product(self, branch: Branch) -> tuple[int, int] | None:
        """Return the factors (queries, keys) of the first product of two activations; None if there is none."""
        for number in self._region(branch):
            value = self.values[number]
            if value.operator in _FUSED_ATTENTION:
                return value.inputs[0], value.inputs[1]
            if value.operator in ("bmm", "baddbmm") and not any(self.values[v].is_weight for v in value.inputs[-2:]):
                return value.inputs[-2], value.inputs[-1]
        return None

    def _is_self_attention(self, branch: Branch, product: tuple[int, int]) -> bool:
        return self.residuals.comes_from(product[1], branch.stream)

    def _sublayer(self, branch: Branch, kind: Kind, layer: str) -> Sublayer:
        norm = self._norm_behind(branch, layer)
        module_path, adds = self._find_module(branch)
        calls = [call for out in self.residuals.views(branch.out) for call in self.residuals.returned[out]]
        streams = [call for call in calls if not self.residuals.is_plain(call)]
        return Sublayer(
            kind,
            0,  # `sublayers` sets the layer index once all layers are known
            output=branch.call.path,
            width=self.values[branch.h].shape[-1],
            whole=module_path,
            adds_residual=adds,
            norm=norm,
            stream=streams[0].path if streams and norm is None else None,
            query=self._query(branch) if kind != FEED_FORWARD else None,
            output_projection=self._output_projection(branch) if kind != FEED_FORWARD else None,
            inner=self._inner(branch) if kind == FEED_FORWARD else (),
        )

    def _norm_behind(self, branch: Branch, layer: str) -> str | None:
        """Return the path of the norm after the addition (post-norm); None if the sum itself is the stream."""
        outs = self.residuals.views(branch.out)
        if not self.residuals.streams.isdisjoint(outs):
            return None
        for call in self.trace.calls:
            if call.first in outs and self.residuals.is_norm(call) and call.path.startswith(f"{layer}."):
                return call.path
        return None

    def _find_module(self, branch: Branch) -> tuple[str | None, bool]:
        """Return (path of the innermost call from the sublayer's input to h, whether it also adds the stream).

        The first two arguments of such an adding call are h (or a value that h is computed from) and the stream.
        """
        for call in (branch.call, *branch.call.enclosing()):
            arguments = list(call.arguments.values())
            if arguments and self._is_input(arguments[0], branch) and call.output in (branch.h, branch.out):
                return call.path, False
            if branch.adder is call and arguments[1:2] == [branch.stream]:
                return call.path, True
        return None, False

    def _is_input(self, value: int, branch: Branch) -> bool:
        """Return whether `value` is the sublayer's input: the stream or the normalized stream."""
        region = self.residuals.region(value, branch.stream)
        return branch.stream in region and not any(self.values[v].operator in _MATRIX for v in region - {branch.stream})

    def _has_features_last(self, call: Call) -> bool:
        """Return whether features are in the output's last dimension, which is not the case after a convolution."""
        value = call.output
        while value is not None:
            operator = self.values[value].operator
            if operator == "convolution" or self.values[value].moves_last:
                return False
            if operator in _MATRIX or operator == "embedding":
                return True
            value = next((v for v in self.values[value].inputs if not self.values[v].is_weight), None)
        return False

    def _is_linear(self, call: Call) -> bool:
        weight = call.module._parameters.get("weight")
        leaf = not any(True for _ in call.module.children())
        return leaf and weight is not None and weight.dim() == 2 and call in self.residuals.multiplies

    def _linear_before(self, value: int, since: int) -> list[Call]:
        """Return the calls of the nearest linear layers that `value` was computed from, back to value `since`."""
        calls_by_path: dict[str, Call] = {}
        visited_values, queue = {value}, [value]
        while queue:
            number = queue.pop()
            calls = [c for c in self.residuals.returned[number] if self._is_linear(c)]
            if calls:
                calls_by_path.setdefault(calls[0].path, calls[0])
                continue
            for source in self.values[number].inputs:
                if source > since and source not in visited_values:
                    visited_values.add(source)
                    queue.append(source)
        return [calls_by_path[path] for path in sorted(calls_by_path)]

    def _query(self, branch: Branch) -> str | None:
        """Return the path of the linear layer that computes the queries; None if the layer also computes the keys."""
        product = self._product(branch)
        if product is None:
            return None
        query, key = (self._linear_before(v, branch.stream) for v in product)
        return query[0].path if len(query) == 1 and query[0] not in key else None

    def _output_projection(self, branch: Branch) -> str | None:
        """Return the path of the only linear layer between the heads' outputs and h."""
        product = self._product(branch)
        if product is None:
            return None
        projections = self._linear_before(branch.h, branch.stream)
        # Without an output projection, the nearest layers compute the queries, keys and values.
        input_projections = [call for value in product for call in self._linear_before(value, branch.stream)]
        return projections[0].path if len(projections) == 1 and projections[0] not in input_projections else None

    def _inner(self, branch: Branch) -> tuple[str, ...]:
        """Return the paths of the linear layers whose outputs feed the last layers of a feed-forward sublayer."""
        last_layers = self._linear_before(branch.h, branch.stream)
        read_values = [call.first for call in last_layers if call.first is not None]
        inner = {call.path for value in read_values for call in self._linear_before(value, branch.stream)}
        if any(not self._all_called(path) for path in inner):
            return ()  # the traced forward used only some of the experts
        return tuple(path for path in self.modules if path in inner)

    def _all_called(self, path: str) -> bool:
        """Return whether all modules in the same list were called."""
        parts = path.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                list_path = ".".join(parts[:i])
                siblings = self.modules[list_path].named_children() if list_path in self.modules else ()
                if not all(f"{list_path}.{name}" in self.called for name, _ in siblings):
                    return False
        return True


def _for_other_layer(sublayer: Sublayer, layer: str, other_layer: str) -> Sublayer:
    """Return the corresponding sublayer in another layer."""

    def moved(path: str) -> str:
        return other_layer + path[len(layer) :] if path == layer or path.startswith(f"{layer}.") else path

    names = ("output", "whole", "norm", "stream", "query", "output_projection")
    paths: dict[str, Any] = {name: getattr(sublayer, name) for name in names}
    paths = {name: moved(path) for name, path in paths.items() if path is not None}
    return replace(sublayer, inner=tuple(map(moved, sublayer.inner)), **paths)


def _numbered_prefixes(path: str) -> list[str]:
    """Return the prefixes of `path` that end in a number: `layers.3` and `layers.3.mlps.0` of `layers.3.mlps.0.up`."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]


def _layer_by_path(paths: list[str]) -> dict[str, str]:
    """Return the layer of each sublayer: the innermost numbered module that contains more than one sublayer."""
    paths_inside: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        for number in _numbered_prefixes(path):
            paths_inside[number].add(path)
    return {
        path: max(
            (n for n in _numbered_prefixes(path) if len(paths_inside[n]) > 1),
            key=len,
            default=_numbered_prefixes(path)[0],
        )
        for path in paths
    }


def _layer_indices(layers: list[str]) -> dict[str, int]:
    """Return the index of each layer in its stack: its number, or its position if stages contain lists of layers."""
    counts: Counter[str] = Counter()
    indices = {}
    for layer in layers:
        stack = _numbered_prefixes(layer)[0].rpartition(".")[0]
        is_nested = len(_numbered_prefixes(layer)) > 1
        indices[layer] = counts[stack] if is_nested else int(layer.rpartition(".")[2])
        counts[stack] += 1
    return indices

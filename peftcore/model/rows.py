"""Locate the samples of a batch in the tensors of a module's arguments and output.

A model's inputs have the samples in dimension 0. Inside the model the layout may differ: `[tokens, samples, width]`,
`[samples · tokens, width]`, or no sample dimension, as in a bias that depends only on positions. Sizes alone are
ambiguous, because there may be as many tokens as samples. `rows_of` therefore runs the model with two batch sizes: the
dimension that grows with the batch contains the samples. If samples and tokens share a dimension, `[samples · tokens,
width]`, the operators before it must also preserve the order of rows; an expert, for example, gets only a selection of
rows.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import base_modules, original_forward
from peftcore.model.inputs import example_inputs
from peftcore.model.tracing import Call as TracedCall, Inputs, Trace, Value, cached_by_model, trace
from peftcore.plugin.call import Call

# Placements other than `Samples`: the tensor is shared by all samples; it is shared and its dimension 0 has size 1;
# unknown.
SHARED, BROADCAST, UNKNOWN = "shared", "broadcast", "unknown"


@dataclass(frozen=True)
class Samples:
    """Samples of a batch that are consecutive in dimension `dim` of a tensor.

    Args:
        dim: the dimension.
        per_sample: number of entries per sample, or per token of a sample if `tokens` is given.
        tokens: names of model arguments `[samples, tokens, ...]`; the first one present in a call gives the number of
            tokens.
    """

    dim: int = 0
    per_sample: int = 1
    tokens: tuple[str, ...] = ()

    def entries(self, call: Call | None) -> int | None:
        """Return the number of entries per sample in this call of the model; None if it is unknown."""
        if not self.tokens:
            return self.per_sample
        arguments = (call.get(name) for name in (*self.tokens, *call)) if call is not None else ()
        return next((self.per_sample * t.shape[1] for t in arguments if isinstance(t, Tensor) and t.dim() > 1), None)


@dataclass(frozen=True)
class Rows:
    """Placement of the samples in the tensors of a module's arguments and output.

    A placement is `Samples` or one of the constants above; for containers, a container of placements.

    Args:
        first: placement in the first tensor argument.
        arguments: placements in the arguments, by name.
        output: placement in the output.
    """

    first: Samples
    arguments: Mapping[str, Any]
    output: Any


def entries_of(samples: Tensor, entries: int) -> Tensor:
    """Return the indices of the entries of these samples; each sample has `entries` consecutive entries."""
    if entries == 1:
        return samples
    return (samples[:, None] * entries + torch.arange(entries, device=samples.device)).flatten()


def slice_samples(value: Any, placement: Any, samples: Tensor, count: int) -> Any:
    """Slice a batched argument to some samples; arguments shared by all samples are returned unchanged.

    Args:
        value: a tensor, a plain value, or a nested container.
        placement: placement of the samples in the value, as in `Rows.arguments`.
        samples: int64 indices of the samples.
        count: number of samples in the batch.

    Raises:
        PeftcoreError: the placement of the samples in a tensor is unknown.
    """
    if isinstance(value, Tensor):
        return _slice_tensor(value, placement, samples, count)
    if type(value) in (tuple, list):
        return type(value)(
            slice_samples(item, _placement_of_item(placement, value, i), samples, count) for i, item in enumerate(value)
        )
    if type(value) is dict:
        return {
            key: slice_samples(item, _placement_of_item(placement, value, key), samples, count)
            for key, item in value.items()
        }
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PeftcoreError(
        f"cannot mix adapters in a batch of {count} samples: an argument of type {type(value).__name__} cannot be "
        "sliced. Mix only adapters on layers such as linear layers"
    )


def _slice_tensor(tensor: Tensor, placement: Any, samples: Tensor, count: int) -> Tensor:
    if placement == SHARED:
        return tensor
    # If a batch of several samples has one row, the row is broadcast.
    in_rows = isinstance(placement, Samples) and placement.dim == 0
    may_be_broadcast = placement in (BROADCAST, UNKNOWN) or (count > 1 and in_rows)
    if may_be_broadcast and (tensor.dim() == 0 or tensor.shape[0] == 1):
        return tensor
    placement = Samples() if placement == BROADCAST else placement
    if isinstance(placement, Samples) and placement.dim < tensor.dim() and tensor.shape[placement.dim] % count == 0:
        return tensor.index_select(placement.dim, entries_of(samples, tensor.shape[placement.dim] // count))
    raise PeftcoreError(
        f"cannot mix adapters in a batch of {count} samples: the samples in an argument of shape "
        f"{list(tensor.shape)} are unknown. Run the samples of each adapter in a separate batch"
    )


def join_samples(parts: list[Any], placement: Any, counts: list[int], order: Tensor) -> Any:
    """Join the outputs of groups of samples into the output of the full batch.

    A tensor shared by all samples of a group, such as T5's position bias, is repeated for each sample.

    Args:
        parts: the output of each group.
        placement: placement of the samples in the output, as in `Rows.output`.
        counts: number of samples in each group.
        order: int64, the index of each sample of the batch in the concatenated groups.

    Raises:
        PeftcoreError: the placement of the samples in a tensor is unknown.
    """
    if isinstance(parts[0], Tensor):
        if isinstance(placement, Samples) and _divides_evenly(parts, placement.dim, counts):
            entries = parts[0].shape[placement.dim] // counts[0]
            return torch.cat(parts, placement.dim).index_select(placement.dim, entries_of(order, entries))
        sizes = [part.shape[0] if part.dim() else 0 for part in parts]
        # A broadcast tensor may have been repeated for each sample already.
        allowed_counts = counts if placement == BROADCAST else [1] * len(counts)
        if all(size in (1, n) for size, n in zip(sizes, allowed_counts, strict=True)):
            expanded = [part.expand(n, *part.shape[1:]) for part, n in zip(parts, counts, strict=True)]
            return torch.cat(expanded)[order]
        raise PeftcoreError(
            f"cannot mix adapters in a batch: outputs of shape {list(parts[0].shape)} for {counts[0]} samples cannot "
            "be joined. Mix only adapters on layers such as linear layers"
        )
    if type(parts[0]) in (tuple, list):
        items_by_group = zip(*parts, strict=True)
        return type(parts[0])(
            join_samples(list(p), _placement_of_item(placement, parts[0], i), counts, order)
            for i, p in enumerate(items_by_group)
        )
    if isinstance(parts[0], dict):  # includes the output classes of transformers
        items = {}
        for key in parts[0]:
            values = [part[key] for part in parts]
            items[key] = join_samples(values, _placement_of_item(placement, parts[0], key), counts, order)
        return type(parts[0])(**items)
    if parts[0] is None:
        return None
    raise PeftcoreError(
        f"cannot mix adapters in a batch: outputs of type {type(parts[0]).__name__} cannot be joined. Run the samples "
        "of each adapter in a separate batch"
    )


def first_placement(placement: Any) -> Any:
    """Return the placement of the samples in the first tensor of an output."""
    if isinstance(placement, (tuple, list, dict)):
        return first_placement(next(iter(placement.values() if isinstance(placement, dict) else placement), UNKNOWN))
    return placement


def _divides_evenly(parts: list[Tensor], dim: int, counts: list[int]) -> bool:
    """Return whether all parts have the same number of entries per sample."""
    sizes = [part.shape[dim] if dim < part.dim() else 0 for part in parts]
    return all(size and size * counts[0] == sizes[0] * count for size, count in zip(sizes, counts, strict=True)) and (
        sizes[0] % counts[0] == 0
    )


def _placement_of_item(placement: Any, container: Any, key: Any) -> Any:
    """Return the placement of one item in a container; UNKNOWN if the observed container had other items."""
    if isinstance(container, dict):
        return placement.get(key, UNKNOWN) if isinstance(placement, dict) else UNKNOWN
    return placement[key] if type(placement) is type(container) and len(placement) == len(container) else UNKNOWN


# --- observation of the rows -----------------------------------------------------------------------------------------

_FEW, _MORE = 2, 3  # numbers of samples
_SHORT, _LONG = (7, 5), (11, 13)  # numbers of tokens per sample: (encoder or only stack, decoder)
_TOKENS = ("input_ids", "inputs_embeds", "hidden_states")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "labels", *_TOKENS)

# Operators that keep the order along dimension 0 if its size does not change.
_BY_ROW = {
    "_softmax", "_to_copy", "add", "addmm", "alias", "baddbmm", "bmm", "cat", "clamp", "clone", "convolution", "detach",
    "div", "exp", "expand", "gelu", "lift_fresh", "linear", "masked_fill", "mean", "mm", "mul", "native_dropout",
    "native_group_norm", "native_layer_norm", "neg", "permute", "pow", "relu", "rms_norm", "_fused_rms_norm", "rsqrt",
    "rsub", "sigmoid", "silu", "slice", "softplus", "split", "split_with_sizes", "sub", "sum", "t", "tanh", "transpose",
    "where",
}  # fmt: skip
_ALONG_ONE = {
    "slice",
    "split",
    "split_with_sizes",
    "sum",
    "mean",
    "cat",
    "expand",
}  # these act on one dimension, possibly 0
_RESHAPING = {"view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze"}


@cached_by_model
def rows_of(model: nn.Module) -> dict[str, Rows | str]:
    """Return {path: placement of samples in the module's tensors, or the reason why it is unknown}.

    This takes two forward passes on a meta copy, and a third if samples and tokens share a dimension.
    """
    trace_few = trace(model, inputs=_inputs(_FEW, *_SHORT))
    trace_more = trace(model, inputs=_inputs(_MORE, *_SHORT))
    calls, calls_more = _by_path(trace_few), _by_path(trace_more)
    shares_dimension = False
    for path in calls:
        shapes_few = _first_shapes(trace_few, calls[path])
        shapes_more = _first_shapes(trace_more, calls_more.get(path, []))
        for shape_few, shape_more in zip(shapes_few, shapes_more, strict=False):
            placement = _growing_dimension(shape_few, shape_more)
            shares_dimension |= isinstance(placement, Samples) and placement.per_sample > 1
    calls_longer = _by_path(trace(model, inputs=_inputs(_FEW, *_LONG))) if shares_dimension else calls
    rows: dict[str, Rows | str] = {}
    for path, path_calls in calls.items():
        triples = list(zip(path_calls, calls_more.get(path, []), calls_longer.get(path, []), strict=False))
        if len(triples) < len(path_calls) or len(path_calls) < len(calls_more[path]):
            rows[path] = "the number of its calls depends on the number of samples or tokens"
        else:
            rows[path] = _merge_calls([_rows(trace_few, trace_more, *triple) for triple in triples])
    for path, traced_path in trace_few.alike:
        for name in [name for name in rows if name == traced_path or name.startswith(f"{traced_path}.")]:
            rows[path + name[len(traced_path) :]] = rows[name]
    error = trace_few.error or trace_more.error
    reason = (
        "a forward on example inputs does not call the module"
        if error is None
        else f"a forward on example inputs fails before it reaches the module ({type(error).__name__}: {error})"
    )
    return {**{path: reason for path, _ in base_modules(model)}, **rows}


def _inputs(batch: int, length: int, decoder_length: int) -> Inputs:
    """Return a builder of example inputs of this size.

    The inputs have padding, so that the model creates a padding mask.
    """

    def make(model: nn.Module) -> dict[str, Any]:
        inputs = example_inputs(model, device="cpu", batch=batch, length=length, decoder_length=decoder_length)
        if "input_ids" in inputs and "attention_mask" in inspect.signature(original_forward(model)).parameters:
            inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
            inputs["attention_mask"][0, 0] = 0
        return inputs

    return make


def _by_path(forward_trace: Trace) -> dict[str, list[TracedCall]]:
    calls: dict[str, list[TracedCall]] = defaultdict(list)
    for call in forward_trace.calls:
        calls[call.path].append(call)
    return calls


def _first_shapes(forward_trace: Trace, calls: list[TracedCall]) -> list[tuple[int, ...]]:
    """Return the shape of the first tensor of each call."""
    return [() if call.first is None else forward_trace.values[call.first].shape for call in calls]


def _rows(trace_few: Trace, trace_more: Trace, few: TracedCall, more: TracedCall, longer: TracedCall) -> Rows | str:
    """Return the placement of the samples in one call of a module, by comparing three forward passes.

    Args:
        trace_few, trace_more: traces that contain `few` and `more`.
        few, more, longer: the same call with few samples, with more samples, and with longer samples.
    """
    other_arguments = (more.argument_shapes, longer.argument_shapes)
    arguments = {
        name: _compare_shapes(shapes, *(shapes_by_name.get(name) for shapes_by_name in other_arguments))
        for name, shapes in few.argument_shapes.items()
    }
    first_argument = next(iter(few.arguments), None)
    if first_argument is None:
        return "it is called without a tensor"
    placement = arguments[first_argument]
    if placement in (SHARED, BROADCAST):
        return "its inputs are the same for all samples"
    if not isinstance(placement, Samples):
        return "no single dimension of its input grows with the number of samples"
    has_several_entries = placement.per_sample > 1 or bool(placement.tokens)
    if has_several_entries:
        is_ordered = placement.dim == 0 and _is_in_sample_order(trace_few, trace_more, few.arguments[first_argument])
        if not is_ordered:
            return "its input has rows of all samples in an unknown order"
    return Rows(placement, arguments, _compare_shapes(few.output_shapes, more.output_shapes, longer.output_shapes))


def _compare_shapes(shapes_few: Any, shapes_more: Any, shapes_longer: Any) -> Any:
    """Return the placement of the samples in tensors of these shapes, in the same containers."""
    if isinstance(shapes_few, torch.Size):
        return _samples_in(shapes_few, shapes_more, shapes_longer)
    if isinstance(shapes_few, dict):
        shapes_more, shapes_longer = (
            other_shapes if isinstance(other_shapes, dict) else {} for other_shapes in (shapes_more, shapes_longer)
        )
        return {
            key: _compare_shapes(value, shapes_more.get(key), shapes_longer.get(key))
            for key, value in shapes_few.items()
        }
    if isinstance(shapes_few, (tuple, list)):
        shapes_more, shapes_longer = (
            other_shapes if _is_sequence_like(shapes_few, other_shapes) else [None] * len(shapes_few)
            for other_shapes in (shapes_more, shapes_longer)
        )
        places = [_compare_shapes(*items) for items in zip(shapes_few, shapes_more, shapes_longer, strict=True)]
        return tuple(places) if isinstance(shapes_few, tuple) else places
    return UNKNOWN


def _is_sequence_like(shapes: Sequence[Any], other_shapes: Any) -> bool:
    return isinstance(other_shapes, (tuple, list)) and len(other_shapes) == len(shapes)


def _samples_in(shape_few: torch.Size, shape_more: Any, shape_longer: Any) -> Samples | str:
    """Return the placement in a tensor from its shapes with few, with more, and with longer samples."""
    if not isinstance(shape_more, torch.Size) or not isinstance(shape_longer, torch.Size):
        return UNKNOWN
    placement = _growing_dimension(shape_few, shape_more)
    if not isinstance(placement, Samples) or placement.per_sample == 1:
        return placement
    if len(shape_longer) != len(shape_few) or shape_longer[placement.dim] % _FEW:
        return UNKNOWN
    entries = shape_longer[placement.dim] // _FEW
    if entries == placement.per_sample:
        return placement
    for short, long, names in zip(_SHORT, _LONG, (_TOKENS, _DECODER_TOKENS), strict=True):
        if placement.per_sample % short == 0 and placement.per_sample // short * long == entries:
            return Samples(placement.dim, placement.per_sample // short, names)
    return UNKNOWN


def _growing_dimension(shape_few: tuple[int, ...], shape_more: tuple[int, ...]) -> Samples | str:
    """Return the placement in the dimension that grows with the number of samples."""
    if len(shape_few) != len(shape_more):
        return UNKNOWN
    growing = [dim for dim in range(len(shape_few)) if shape_few[dim] != shape_more[dim]]
    if not growing:
        return BROADCAST if shape_few[:1] == (1,) else SHARED
    dim = growing[0]
    if len(growing) > 1 or shape_few[dim] % _FEW or shape_few[dim] // _FEW * _MORE != shape_more[dim]:
        return UNKNOWN
    return Samples(dim, shape_few[dim] // _FEW)


def _is_in_sample_order(trace_few: Trace, trace_more: Trace, number: int) -> bool:
    """Return whether dimension 0 of a value lists all entries of sample 0, then all of sample 1, and so on.

    Args:
        trace_few, trace_more: traces of the same operators with few and with more samples.
        number: index of the value in the traces.
    """
    if len(trace_few.values) != len(trace_more.values):
        return False
    stack, visited_values = [number], {number}
    while stack:
        number = stack.pop()
        value = trace_few.values[number]
        if value.shape[:1] == (_FEW,) and trace_more.values[number].shape[:1] == (_MORE,):
            continue  # one entry for each sample
        if value.operator in _RESHAPING:  # preserves the order of all elements
            inputs = value.inputs[:1]
        elif value.operator in _BY_ROW or value.operator.startswith("_scaled_dot_product"):
            inputs = tuple(
                i for i in value.inputs if _keeps_rows(trace_few.values[i], value) and not trace_few.values[i].is_weight
            )
        else:
            inputs = ()
        if not inputs or value.moves_first or value.shape[0] % _FEW:
            return False
        stack += [i for i in inputs if i not in visited_values]
        visited_values.update(inputs)
    return True


def _keeps_rows(source: Value, value: Value) -> bool:
    return source.shape[:1] == value.shape[:1] and (
        value.operator not in _ALONG_ONE or len(source.shape) == len(value.shape)
    )


def _merge_calls(calls: list[Rows | str]) -> Rows | str:
    """Return the placement common to all calls of a module, or the reason why there is none."""
    common = calls[0]
    for rows in calls[1:]:
        if isinstance(common, str) or isinstance(rows, str) or rows.first != common.first:
            if common == rows:
                continue
            return "samples are in different dimensions in its calls, or missing in some calls"
        if rows != common:
            arguments = {
                name: _same_placement(placement, rows.arguments.get(name))
                for name, placement in common.arguments.items()
            }
            common = Rows(common.first, arguments, _same_placement(common.output, rows.output))
    return common


def _same_placement(placement: Any, other_placement: Any) -> Any:
    return placement if placement == other_placement else UNKNOWN

"""Place of the samples of a batch in the tensors of a module's arguments and output.

A model is called with samples in dimension 0 of its inputs. Inside it they may be elsewhere: as `[tokens, samples,
width]`, as `[samples · tokens, width]`, or nowhere, as in a bias that depends only on positions. Sizes do not show it
(there may be as many tokens as samples), so `rows_of` runs the model with two batch sizes: a dimension whose size grows
with the batch, and with nothing else, contains the samples. If samples and tokens share a dimension, `[samples ·
tokens, width]`, the operators before it must keep the order of rows: an expert of a mixture, for example, receives a
selection of them.
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

# Instead of `Samples`: all samples share the tensor; they share it, with a dimension 0 of size 1; unknown.
SHARED, BROADCAST, UNKNOWN = "shared", "broadcast", "unknown"


@dataclass(frozen=True)
class Samples:
    """Samples of a batch, one after another in dimension `dim` of a tensor.

    Args:
        dim: the dimension.
        each: number of entries of each sample, or, with `tokens`, of each of its tokens.
        tokens: names of arguments of the model, `[samples, tokens, ...]`; the first one of a call has as many tokens.
    """

    dim: int = 0
    each: int = 1
    tokens: tuple[str, ...] = ()

    def entries(self, call: Call | None) -> int | None:
        """Return the number of entries of each sample in this call of the model, or None if it is not known."""
        if not self.tokens:
            return self.each
        given = (call.get(name) for name in (*self.tokens, *call)) if call is not None else ()
        return next((self.each * t.shape[1] for t in given if isinstance(t, Tensor) and t.dim() > 1), None)


@dataclass(frozen=True)
class Rows:
    """Place of the samples in the tensors of a module's arguments and output.

    Args:
        first: in the first tensor argument.
        arguments: by name of the argument, `Samples` or one of the constants above for each tensor, in its containers.
        output: likewise for the output.
    """

    first: Samples
    arguments: Mapping[str, Any]
    output: Any


def entries_of(samples: Tensor, each: int) -> Tensor:
    """Return the numbers of the entries of these samples, `each` consecutive ones per sample."""
    if each == 1:
        return samples
    return (samples[:, None] * each + torch.arange(each, device=samples.device)).flatten()


def taken(value: Any, where: Any, samples: Tensor, count: int) -> Any:
    """Return the part of an argument that belongs to some samples of a batch; what all samples share stays whole.

    Args:
        value: a tensor, a plain value, or containers of them.
        where: place of the samples in it, as in `Rows.arguments`.
        samples: int64, the numbers of the samples.
        count: number of samples in the batch.

    Raises:
        PeftcoreError: the place of the samples in a part of it is not known.
    """
    if isinstance(value, Tensor):
        return _taken_rows(value, where, samples, count)
    if type(value) in (tuple, list):
        return type(value)(taken(item, _inside(where, value, i), samples, count) for i, item in enumerate(value))
    if type(value) is dict:
        return {key: taken(item, _inside(where, value, key), samples, count) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PeftcoreError(
        f"an adapter for each of {count} samples: an argument of type {type(value).__name__} cannot be split. "
        "Only adapters of layers such as linear ones can be mixed in a batch"
    )


def _taken_rows(tensor: Tensor, where: Any, samples: Tensor, count: int) -> Tensor:
    if where == SHARED:
        return tensor
    # One row for a batch of several samples is broadcast to them.
    in_rows = isinstance(where, Samples) and where.dim == 0
    may_be_broadcast = where in (BROADCAST, UNKNOWN) or (count > 1 and in_rows)
    if may_be_broadcast and (tensor.dim() == 0 or tensor.shape[0] == 1):
        return tensor
    where = Samples() if where == BROADCAST else where
    if isinstance(where, Samples) and where.dim < tensor.dim() and tensor.shape[where.dim] % count == 0:
        return tensor.index_select(where.dim, entries_of(samples, tensor.shape[where.dim] // count))
    raise PeftcoreError(
        f"an adapter for each of {count} samples: it is not known which part of an argument of shape "
        f"{list(tensor.shape)} belongs to which sample. Run the samples of each adapter in a batch of their own"
    )


def joined(parts: list[Any], where: Any, counts: list[int], order: Tensor) -> Any:
    """Join the outputs of groups of samples into one output for the whole batch.

    A tensor that all samples of a group share, such as T5's position bias, is repeated for each of them.

    Args:
        parts: the output of each group.
        where: place of the samples in it, as in `Rows.output`.
        counts: number of samples of each group.
        order: int64, for each sample of the batch its place among the samples of all groups.

    Raises:
        PeftcoreError: the place of the samples in a part of it is not known.
    """
    if isinstance(parts[0], Tensor):
        if isinstance(where, Samples) and _divide(parts, where.dim, counts):
            each = parts[0].shape[where.dim] // counts[0]
            return torch.cat(parts, where.dim).index_select(where.dim, entries_of(order, each))
        sizes = [part.shape[0] if part.dim() else 0 for part in parts]
        may_be = counts if where == BROADCAST else [1] * len(counts)  # may have been repeated for each sample already
        if all(size in (1, n) for size, n in zip(sizes, may_be, strict=True)):
            return torch.cat([part.expand(n, *part.shape[1:]) for part, n in zip(parts, counts, strict=True)])[order]
        raise PeftcoreError(
            f"an adapter for each sample: an output of shape {list(parts[0].shape)} for {counts[0]} samples cannot be "
            "joined. Only adapters of layers such as linear ones can be mixed in a batch"
        )
    if type(parts[0]) in (tuple, list):
        own = zip(*parts, strict=True)
        return type(parts[0])(joined(list(p), _inside(where, parts[0], i), counts, order) for i, p in enumerate(own))
    if isinstance(parts[0], dict):  # the outputs of transformers' models, too
        items = {key: joined([p[key] for p in parts], _inside(where, parts[0], key), counts, order) for key in parts[0]}
        return type(parts[0])(**items)
    if parts[0] is None:
        return None
    raise PeftcoreError(f"an adapter for each sample: an output of type {type(parts[0]).__name__} cannot be joined")


def first_in(where: Any) -> Any:
    """Return the place of the samples in the first tensor of an output."""
    if isinstance(where, (tuple, list, dict)):
        return first_in(next(iter(where.values() if isinstance(where, dict) else where), UNKNOWN))
    return where


def _divide(parts: list[Tensor], dim: int, counts: list[int]) -> bool:
    """Return whether each part has the same number of entries for each of its samples."""
    sizes = [part.shape[dim] if dim < part.dim() else 0 for part in parts]
    return all(size and size * counts[0] == sizes[0] * count for size, count in zip(sizes, counts, strict=True)) and (
        sizes[0] % counts[0] == 0
    )


def _inside(where: Any, container: Any, key: Any) -> Any:
    """Return the entry of `where` for one item of a container, which may have other items than the observed one."""
    if isinstance(container, dict):
        return where.get(key, UNKNOWN) if isinstance(where, dict) else UNKNOWN
    return where[key] if type(where) is type(container) and len(where) == len(container) else UNKNOWN


# --- observation of the rows -----------------------------------------------------------------------------------------

_FEW, _MORE = 2, 3  # samples
_SHORT, _LONG = (7, 5), (11, 13)  # tokens of each sample, of the encoder (or only stack) and of the decoder
_TOKENS = ("input_ids", "inputs_embeds", "hidden_states")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "labels", *_TOKENS)

# Operators that keep the order along dimension 0 if its size stays the same.
_BY_ROW = {
    "_softmax", "_to_copy", "add", "addmm", "alias", "baddbmm", "bmm", "cat", "clamp", "clone", "convolution", "detach",
    "div", "exp", "expand", "gelu", "lift_fresh", "linear", "masked_fill", "mean", "mm", "mul", "native_dropout",
    "native_group_norm", "native_layer_norm", "neg", "permute", "pow", "relu", "rms_norm", "_fused_rms_norm", "rsqrt",
    "rsub", "sigmoid", "silu", "slice", "softplus", "split", "split_with_sizes", "sub", "sum", "t", "tanh", "transpose",
    "where",
}  # fmt: skip
_ALONG_ONE = {"slice", "split", "split_with_sizes", "sum", "mean", "cat", "expand"}  # which may be dimension 0
_RESHAPING = {"view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze"}


@cached_by_model
def rows_of(model: nn.Module) -> dict[str, Rows | str]:
    """Return {path: where samples are in the module's tensors, or why that is not known}.

    It takes two forward passes on a meta copy, and a third if samples and tokens share a dimension.
    """
    few, more = trace(model, inputs=_inputs(_FEW, *_SHORT)), trace(model, inputs=_inputs(_MORE, *_SHORT))
    calls, others = _by_path(few), _by_path(more)
    shares = any(
        isinstance(where := _grown(few_first, more_first), Samples) and where.each > 1
        for path in calls
        for few_first, more_first in zip(_firsts(few, calls[path]), _firsts(more, others.get(path, [])), strict=False)
    )
    longer = _by_path(trace(model, inputs=_inputs(_FEW, *_LONG))) if shares else calls
    found: dict[str, Rows | str] = {}
    for path, own in calls.items():
        triples = list(zip(own, others.get(path, []), longer.get(path, []), strict=False))
        if len(triples) < len(own) or len(own) < len(others[path]):
            found[path] = "how often it is called depends on the number of samples or tokens"
        else:
            found[path] = _agreed([_rows(few, more, *triple) for triple in triples])
    for path, like in few.alike:
        for name in [name for name in found if name == like or name.startswith(f"{like}.")]:
            found[path + name[len(like) :]] = found[name]
    error = few.error or more.error
    never = (
        "a forward with example inputs does not call it"
        if error is None
        else f"a forward with example inputs fails before it is called ({type(error).__name__}: {error})"
    )
    return {**{path: never for path, _ in base_modules(model)}, **found}


def _inputs(batch: int, length: int, decoder_length: int) -> Inputs:
    """Return a builder of example inputs of this size, padded, so that the model makes masks for padding."""

    def make(model: nn.Module) -> dict[str, Any]:
        made = example_inputs(model, device="cpu", batch=batch, length=length, decoder_length=decoder_length)
        if "input_ids" in made and "attention_mask" in inspect.signature(original_forward(model)).parameters:
            made["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
            made["attention_mask"][0, 0] = 0
        return made

    return make


def _by_path(seen: Trace) -> dict[str, list[TracedCall]]:
    calls: dict[str, list[TracedCall]] = defaultdict(list)
    for call in seen.calls:
        calls[call.path].append(call)
    return calls


def _firsts(seen: Trace, calls: list[TracedCall]) -> list[tuple[int, ...]]:
    """Return the shape of the first tensor of each call."""
    return [() if call.first is None else seen.values[call.first].shape for call in calls]


def _rows(seen: Trace, seen_more: Trace, few: TracedCall, more: TracedCall, longer: TracedCall) -> Rows | str:
    """Return where samples are in one call of a module, from three forward passes.

    Args:
        seen, seen_more: the forwards of `few` and `more`.
    """
    others = (more.given, longer.given)
    arguments = {name: _compared(given, *(other.get(name) for other in others)) for name, given in few.given.items()}
    first = next(iter(few.arguments), None)
    if first is None:
        return "it is called without a tensor"
    where = arguments[first]
    if where in (SHARED, BROADCAST):
        return "its inputs are the same for all samples"
    if not isinstance(where, Samples):
        return "its input grows with the number of samples in another way than by a dimension"
    if (where.each > 1 or where.tokens) and not (where.dim == 0 and _in_order(seen, seen_more, few.arguments[first])):
        return "its input has rows of all samples, whose order is not known"
    return Rows(where, arguments, _compared(few.gave, more.gave, longer.gave))


def _compared(few: Any, more: Any, longer: Any) -> Any:
    """Return where samples are in tensors of these shapes, in the same containers."""
    if isinstance(few, torch.Size):
        return _samples_in(few, more, longer)
    if isinstance(few, dict):
        more, longer = (other if isinstance(other, dict) else {} for other in (more, longer))
        return {key: _compared(value, more.get(key), longer.get(key)) for key, value in few.items()}
    if isinstance(few, (tuple, list)):
        more, longer = (other if _is_sequence_like(few, other) else [None] * len(few) for other in (more, longer))
        places = [_compared(*items) for items in zip(few, more, longer, strict=True)]
        return tuple(places) if isinstance(few, tuple) else places
    return UNKNOWN


def _is_sequence_like(few: Sequence[Any], other: Any) -> bool:
    return isinstance(other, (tuple, list)) and len(other) == len(few)


def _samples_in(few: torch.Size, more: Any, longer: Any) -> Samples | str:
    """Return where samples are in a tensor of these shapes: with few samples, with more, and with longer ones."""
    if not isinstance(more, torch.Size) or not isinstance(longer, torch.Size):
        return UNKNOWN
    where = _grown(few, more)
    if not isinstance(where, Samples) or where.each == 1:
        return where
    if len(longer) != len(few) or longer[where.dim] % _FEW:
        return UNKNOWN
    each = longer[where.dim] // _FEW
    if each == where.each:
        return where
    for short, long, names in zip(_SHORT, _LONG, (_TOKENS, _DECODER_TOKENS), strict=True):
        if where.each % short == 0 and where.each // short * long == each:
            return Samples(where.dim, where.each // short, names)
    return UNKNOWN


def _grown(few: tuple[int, ...], more: tuple[int, ...]) -> Samples | str:
    """Return the dimension that grows with the samples, and its number of entries per sample."""
    if len(few) != len(more):
        return UNKNOWN
    grown = [dim for dim in range(len(few)) if few[dim] != more[dim]]
    if not grown:
        return BROADCAST if few[:1] == (1,) else SHARED
    dim = grown[0]
    if len(grown) > 1 or few[dim] % _FEW or few[dim] // _FEW * _MORE != more[dim]:
        return UNKNOWN
    return Samples(dim, few[dim] // _FEW)


def _in_order(few: Trace, more: Trace, number: int) -> bool:
    """Return whether dimension 0 of a value holds all entries of the first sample, then those of the second.

    Args:
        few, more: forwards of the same operators, with so many samples.
        number: of the value.
    """
    if len(few.values) != len(more.values):
        return False
    ahead, known = [number], {number}
    while ahead:
        number = ahead.pop()
        value = few.values[number]
        if value.shape[:1] == (_FEW,) and more.values[number].shape[:1] == (_MORE,):
            continue  # one entry per sample: the model decides its order
        if value.operator in _RESHAPING:  # the order of all elements stays
            inputs = value.inputs[:1]
        elif value.operator in _BY_ROW or value.operator.startswith("_scaled_dot_product"):
            inputs = tuple(i for i in value.inputs if _keeps_rows(few.values[i], value) and not few.values[i].is_weight)
        else:
            inputs = ()
        if not inputs or value.moves_first or value.shape[0] % _FEW:
            return False
        ahead += [i for i in inputs if i not in known]
        known.update(inputs)
    return True


def _keeps_rows(before: Value, value: Value) -> bool:
    return before.shape[:1] == value.shape[:1] and (
        value.operator not in _ALONG_ONE or len(before.shape) == len(value.shape)
    )


def _agreed(calls: list[Rows | str]) -> Rows | str:
    """Return what holds for all calls of a module."""
    first = calls[0]
    for other in calls[1:]:
        if isinstance(first, str) or isinstance(other, str) or other.first != first.first:
            if first == other:
                continue
            return "its calls differ: samples are in different places, or missing from some"
        if other != first:
            merged = {name: _same(where, other.arguments.get(name)) for name, where in first.arguments.items()}
            first = Rows(first.first, merged, _same(first.output, other.output))
    return first


def _same(one: Any, other: Any) -> Any:
    return one if one == other else UNKNOWN

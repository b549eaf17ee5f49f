"""Detection of bypassed layers, whose weight is read without calling them, so that an adapter would never run.

    fused(x, self.out_proj.weight)        instead of        self.out_proj(x)

Such reads are found in a forward pass, and in code that a forward may run on another device or in another mode. Code
under a condition that is ruled out (`if self.slow_but_exact:`) does not count: see conditions.py.
"""

from __future__ import annotations

import dis
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from peftcore.adaptation.base_modules import base_modules, original_class
from peftcore.observation.conditions import Conditions, Knowledge, Known, Source, codes_of, function_of, source
from peftcore.observation.tracing import cached_by_model, observe

# Attributes of a weight that do not use its values.
_FACTS = {"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "is_cuda", "is_quantized", "numel", "size",
          "requires_grad_", "register_hook"}  # fmt: skip


def bypassed(model: nn.Module) -> dict[str, str]:
    """Return {path: why} of bypassed layers; layers that the forward pass did not reach are left out.

    Layers of `nn.MultiheadAttention` are not included, since it is adapted as a whole.
    """
    modules = dict(base_modules(model))
    found: dict[str, str] = {}
    for path, cls, read in _reads(model):
        if read.of_self and not read.is_fact and not read.is_change:
            found[_join(path, read.path)] = f"code of {cls.__name__} takes its weight without calling it"
    seen = observe(model)
    for path in seen.read - seen.called:
        parent = path.rpartition(".")[0]
        if parent not in seen.failed and not isinstance(modules.get(parent), nn.MultiheadAttention):
            found[path] = "its weight is read, and it is not called"
    found = {path: why for path, why in found.items() if path in modules and _has_matrix(modules[path])}
    return found | dict(_fused(modules))


# {fused projection: its parts} of diffusers' attentions with `fused_projections=True`.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def _fused(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield (path, why) of projections replaced by a fused one, or of a fused one that was split again."""
    for path, module in modules.items():
        if "fused_projections" not in module.__dict__ and not hasattr(type(module), "fused_projections"):
            continue  # a failing attribute lookup is slow
        if getattr(module, "fused_projections", False) is not True:
            continue
        # A class without `unfuse_projections` only gets another processor, and keeps the fused projection.
        processor = type(getattr(module, "processor", None)).__name__
        is_used = hasattr(module, "unfuse_projections") or processor.startswith("Fused")
        for whole, parts in _FUSED.items():
            if _join(path, whole) in modules and is_used:
                yield from ((_join(path, part), f"'{whole}' has its weight, and is called") for part in parts)
            elif _join(path, whole) in modules:
                yield _join(path, whole), f"{', '.join(parts)} are called in its place"


def rewritten(model: nn.Module) -> dict[str, str]:
    """Return {path: why} of layers whose weight the model changes in place, as RWKV does for evaluation."""
    modules = dict(base_modules(model))
    found: dict[str, str] = {}
    for path, cls, read in _reads(model):
        if read.is_change:  # also of a part of a part: `for block in self.blocks: block.output.weight.mul_(2)`
            inside = [p for p in modules if p.startswith(_join(path, "")) and f".{p}".endswith(f".{read.path}")]
            found.update(dict.fromkeys(inside, f"code of {cls.__name__} changes its weight in place"))
    return {path: why for path, why in found.items() if _has_matrix(modules[path])}


def asked_for_dtype(model: nn.Module) -> list[str]:
    """Return the layers whose weight dtype is read by code of the model to cast an input (ColPali)."""
    return [_join(path, read.path) for path, _, read in _reads(model) if read.of_self and read.then[:1] == ("dtype",)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and not isinstance(module, nn.Embedding)


@dataclass(frozen=True)
class _Read:
    """A read `self.path.weight.then`, or `other.path.weight.then`, in the code of a class."""

    path: str
    then: tuple[str, ...]
    of_self: bool
    is_tested: bool  # isinstance(self.path.weight, ...)

    @property
    def is_fact(self) -> bool:
        return self.is_tested or (bool(self.then) and (self.then[0] in _FACTS or self.then[0].startswith("_")))

    @property
    def is_change(self) -> bool:
        """Return whether it is `weight.mul_(...)` or `weight.data.mul_(...)`."""
        last = self.then[-1] if self.then else ""
        return last.endswith("_") and last.strip("_") != "" and last not in _FACTS and not self.is_fact


_ReadOf = tuple[str, type[nn.Module], _Read]  # path, class, what its code takes of a weight


def _reads(model: nn.Module) -> list[_ReadOf]:
    """Return the reads of weights in the code of all modules, cached while modules and config fields stay the same."""
    reads, asked = _cached_reads(model)
    if any(getattr(config, name, None) != value for (_, name), (config, value) in asked.items()):
        reads, _ = _find_reads(model)
    return reads


def _find_reads(model: nn.Module) -> tuple[list[_ReadOf], Known]:
    """Return the reads of weights in the code of all modules, and the config fields that decided them.

    Code that counts is in the forwards, and in the methods whose names that code uses, on whichever module.
    """
    alike: dict[Any, list[tuple[str, nn.Module]]] = defaultdict(list)  # to mypy a class is not hashable
    for path, module in base_modules(model):
        alike[original_class(module)].append((path, module))
    known = Knowledge(model)
    found, depends = _read_under(known, alike)
    if found and depends:  # arguments can only rule reads out
        known = Knowledge(model, follows_arguments=True)
        while known.shrank or depends:
            known.shrank = depends = False
            found, _ = _read_under(known, alike)
    reads = [(path, cls, read) for cls, modules in alike.items() for path, _ in modules for read in found.get(path, ())]
    return reads, known.asked


_cached_reads = cached_by_model(_find_reads)


def _read_under(
    known: Knowledge, alike: Mapping[Any, Sequence[tuple[str, nn.Module]]]
) -> tuple[dict[str, dict[_Read, None]], bool]:
    """Return {path: reads of weights} that `known` does not rule out, and whether some depend on arguments.

    Calls in the code are added to `known`.
    """
    found: dict[str, dict[_Read, None]] = defaultdict(dict)
    seen, queue, depends = {"forward"}, ["forward"], False
    while queue:
        name = queue.pop()
        for cls, modules in alike.items():
            for part in _parts(cls, name):
                if not (part.names or part.reads or known.follows_arguments):
                    continue
                reached = modules if not part.conditions else known.reaches(part.conditions, part.source, modules)
                if not reached:
                    continue
                part.add_calls(known, cls, reached)
                depends |= part.depends
                for path, _ in reached if part.reads else ():
                    found[path].update(dict.fromkeys(part.reads))
                queue += part.names - seen
                seen.update(part.names)
    return found, depends


@dataclass(frozen=True)
class _Part:
    """Code of a method under a set of conditions: the names it uses and its reads of weights.

    Args:
        depends: the reads depend on arguments.
    """

    source: Source
    conditions: Conditions
    names: frozenset[str]
    reads: tuple[_Read, ...]
    depends: bool

    def add_calls(self, known: Knowledge, cls: Any, modules: Sequence[tuple[str, nn.Module]]) -> None:
        """Add to `known` the calls and assignments of this code in `modules` of the class `cls`."""
        if known.follows_arguments:
            for line, passed in self.source.passes.get(self.conditions, ()):
                known.called(line, passed, self.source, cls, modules)
            for name, since in self.source.stores.get(self.conditions, ()):
                known.stored(name, since, self.source)


@cache
def _parts(cls: Any, name: str) -> tuple[_Part, ...]:
    """Return the parts of the method `name` of `cls`."""
    function = function_of(cls, name)
    if function is None:
        return ()
    read = source(function)
    names, reads = defaultdict[Any, set[str]](set), defaultdict[Any, list[_Read]](list)
    for code in codes_of(function.__code__):
        for step, line in _lines(code):
            if isinstance(step.argval, str) and step.argval in code.co_names:
                names[read.under(line)].add(step.argval)
        for weight, line in _weights(code):
            reads[read.under(line)].append(weight)
    may_depend = name == "forward"  # arguments of other methods are not followed
    return tuple(
        _Part(
            read,
            under,
            frozenset(names[under]),
            tuple(reads[under]),
            may_depend and under in reads and read.asks_arguments(under),
        )
        for under in {**names, **reads, **dict.fromkeys(read.all_conditions)}
    )


def _lines(code: CodeType) -> Iterator[tuple[dis.Instruction, int]]:
    """Yield the instructions of `code` with their lines."""
    starts = dict(dis.findlinestarts(code))
    line = code.co_firstlineno
    for step in dis.get_instructions(code):
        line = starts.get(step.offset) or line
        yield step, line


def _weights(code: CodeType) -> Iterator[tuple[_Read, int]]:
    """Yield the reads of weights in `code`, with their lines."""
    if "weight" not in code.co_names:
        return
    lines = [(step, line) for step, line in _lines(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    steps = [step for step, _ in lines]
    for i, step in enumerate(steps[:-1]):
        if step.argval != "weight" or not step.opname.startswith("LOAD_"):
            continue
        first = last = i
        while first and steps[first - 1].opname.startswith("LOAD_ATTR"):
            first -= 1
        while steps[last + 1].opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            last += 1
        path, owner = [s.argval for s in steps[first:i]], steps[first - 1].argval
        if path and isinstance(owner, str | tuple):
            then = tuple(s.argval for s in steps[i + 1 : last + 1])
            tested = any(s.argval == "isinstance" for s in steps[max(0, first - 4) : first])
            yield _Read(".".join(path), then, owner == "self" or owner[-1:] == ("self",), tested), lines[i][1]

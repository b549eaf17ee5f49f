"""Search for ways of training that fit into a memory, with their time (see `searching` for the algorithm)."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields as dataclass_fields, replace
from typing import Any

import torch

from peftcore.errors import PeftcoreError
from peftcore.estimating.devices import CARDS, Device, device_of, libraries_of_command, usable
from peftcore.estimating.following import NotFollowed
from peftcore.estimating.loop import ADAPTERS, BASE
from peftcore.estimating.prediction import Estimate, step_of
from peftcore.estimating.processes import STATE
from peftcore.estimating.ranges import Range
from peftcore.estimating.searching import ALIKE, LARGEST_BATCH, PAGED, PLAIN, Choice, Search, Sized, front
from peftcore.estimating.stand_in import config_of, refuse_not_followed
from peftcore.estimating.step import Step
from peftcore.optim.paging import bytes_of
from peftcore.registry import registry

_LOOKED_FOR = ("batch_size", "gradient_checkpointing", "optimizer")
NEARLY = 1.2  # a way whose line needs up to so many times the memory may fit: it is followed before it is left out
_EXAMPLES = {1: "one example", 2: "two examples"}
SHORTEST = 64  # tokens of the shortest examples that an error suggests


@dataclass(frozen=True)
class Way:
    """A way of training that fits.

    Args:
        hours: Hours of one epoch.
        next_need: Bytes, of the same kind as `memory`, for a batch of twice the size.
        libraries: Bytes of `memory` that Python and its libraries take; 0 on a card.
        alike: Other methods with equal memory and time and fewer trainable parameters.
    """

    method: str
    fields: dict[str, Any]
    batch_size: int
    gradient_checkpointing: bool
    optimizer: str
    estimate: Estimate
    hours: float
    next_need: float
    libraries: float = 0.0
    alike: tuple[str, ...] = ()

    @property
    def memory(self) -> Range:
        """Bytes of the process on this machine; on a card, of the card."""
        found = self.estimate
        low = self.libraries + found.beyond_libraries.low - (found.peak - found.least)
        high = self.libraries + found.needed
        return Range(low if self.libraries else high, high)

    def options(self) -> list[str]:
        """Return the options of `peftcore train` for this way."""
        chosen = ["--method", self.method]
        for name, value in self.fields.items():
            chosen += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        chosen += ["--batch-size", str(self.batch_size), "--optim", self.optimizer]
        return chosen + (["--gradient-checkpointing"] if self.gradient_checkpointing else [])


@dataclass(frozen=True)
class Suggestion:
    """Ways of training that fit into `memory` bytes, the fastest first.

    Each slower way needs less memory, or keeps the base dense. Among the fastest, a way with a dense base comes before
    one with a base in 4 bits.
    """

    memory: float
    device: Device
    ways: tuple[Way, ...]

    def __str__(self) -> str:
        ranks = self.ways[0].estimate.step.ranks
        each = f" for each of {ranks} processes, without waiting for one another" if ranks > 1 else ""
        with_libraries = " with Python and its libraries" if self.device.measured else ""
        where = f"{self.device.name}{with_libraries}{each}"
        lines = [f"fits into {self.memory / 1e9:,.1f} GB on {where}, fastest first:"]
        for way in self.ways:
            verdict = "" if way.next_need <= self.memory else " and does not fit"
            lines += [
                f"  {way.memory!s:>15}{way.hours:10,.2f} h an epoch   {shlex.join(way.options())}",
                f"  {'':15}   twice the batch needs about {way.next_need / 1e9:,.2f} GB{verdict}",
            ]
            if way.alike:
                lines += [f"  {'':15}   equal in both, with fewer trainable parameters: {', '.join(way.alike)}"]
        return "\n".join(lines)


def suggest(
    model: Any,
    /,
    *,
    memory: int | str | None = None,
    device: str = "cpu",
    examples: int = 1000,
    methods: Sequence[str] | None = None,
    r: Sequence[int] = (16,),
    dtype: torch.dtype = torch.bfloat16,
    max_ways: int = 4,
    fields: Mapping[str, Any] | None = None,
    step: Step | None = None,
    **options: Any,
) -> Suggestion:
    """Suggest ways to train `model` in so much memory: method, batch, gradient checkpointing, optimizer.

    Args:
        model: A transformers config, a folder with a `config.json`, a hub id, or a model that has a config.
        memory: Memory of the process or the card, in bytes or as text ("24GB"); None: what the device has free.
        device: `cpu`, which is this machine, or a card, as in `estimate`.
        examples: Number of training examples, for the time of an epoch.
        methods: Names of methods; None: the installed methods that have a rank `r` and need no other field, each that
            is smaller or faster than the others.
        r: Ranks to try.
        dtype: Dtype of the base.
        max_ways: Largest number of ways to return.
        fields: Fields of every method's config, such as target_modules.
        step: How a step is run, apart from what is searched; None: `Step()`.
        options: Fields of `Step`, such as length=2048, ranks=8 or mixed_precision="bf16", which override `step`.

    Returns:
        The Pareto front of memory and time.

    Raises:
        PeftcoreError: Nothing fits, with the smallest need that was found, or an argument is wrong.
    """
    where = device_of(device)
    room = _room(memory, where)
    wanted = [name for name in _LOOKED_FOR if name in options]
    step = step_of(step, options)
    if wanted or options:
        raise PeftcoreError(
            f"suggest chooses {', '.join(_LOOKED_FOR)} itself: leave out {', '.join(wanted)}"
            if wanted
            else f"suggest has no argument {', '.join(options)}. Pass fields of a method's config as fields={{...}}"
        )
    if memory is None and where.measured:
        room /= step.ranks
    config = config_of(model)
    refuse_not_followed(config)
    search = Search(config, replace(where, memory=room), step, dtype)
    named = _methods(methods, r, fields or {})
    firsts = {Choice(method, tuple(its.items()), False, PLAIN): () for method, its in named}
    alike: Mapping[Choice, tuple[str, ...]] = search.contenders([*firsts]) if methods is None else firsts
    if not alike:
        raise PeftcoreError("no installed method with a rank applies to this model. Name some: methods=[...]")
    choices = []
    for first in alike:
        search.line(first)  # raises if the method refuses the model
        choices.append(first)
        for optimizer in (PLAIN, PAGED):
            again = replace(first, gradient_checkpointing=True, optimizer=optimizer)
            with suppress(NotFollowed):  # some models have no gradient checkpointing
                search.line(again)
                choices.append(again)
    found = _search(search, choices, room, max_ways)
    if not found:
        raise PeftcoreError(_why_nothing(search, choices, room))
    ways = []
    libraries = libraries_of_command() if where.measured else 0.0
    for each in found:
        followed, choice = each.found, each.choice
        assert followed is not None  # `_search` returns only ways that were followed
        ways.append(
            Way(
                choice.method,
                dict(choice.fields),
                each.batch,
                choice.gradient_checkpointing,
                choice.optimizer,
                followed,
                hours=(followed.seconds or 0.0) * math.ceil(examples / (each.batch * step.copies)) / 3600,
                next_need=libraries + search.needs(choice, 2 * each.batch),
                libraries=libraries,
                alike=alike[replace(choice, gradient_checkpointing=False, optimizer=PLAIN)],
            )
        )
    ways.sort(key=lambda way: way.hours)
    near = [way for way in ways if way.hours <= (1 + ALIKE) * ways[0].hours]
    best = next((way for way in near if not way.estimate.summary.packed_parameters), ways[0])
    return Suggestion(room + libraries, where, (best, *(way for way in ways if way is not best)))


def _room(memory: int | str | None, where: Device) -> float:
    """Return the bytes of `memory` that a step on this device can use."""
    if memory is None:
        return where.memory
    try:
        given = float(bytes_of(memory) or 0)
    except ValueError as error:
        raise PeftcoreError(f"memory must be bytes or text such as '24GB', found {memory!r}") from error
    if given < 1e6:
        raise PeftcoreError(f"memory must be bytes or text such as '24GB', found {memory!r}: no model fits into that")
    room = given - libraries_of_command() if where.measured else usable(given)
    if room < 1e6:
        what = "Python and its libraries take" if where.measured else "the CUDA context takes"
        raise PeftcoreError(f"memory={memory!r} on {where.name} is no more than {what}. Give at least 1GB")
    return room


def _search(search: Search, choices: Sequence[Choice], room: float, max_ways: int) -> list[Sized]:
    """Return the front of what fits, with at most `max_ways` ways, each followed with all layers."""
    known: dict[tuple[Choice, int], Estimate] = {}
    while True:
        sized = []
        for choice in choices:
            line = search.line(choice)
            for power in range(search.least - 1, LARGEST_BATCH.bit_length()):
                step = known.get((choice, 2**power))
                memory, seconds = line.at(2**power) if step is None else (step.needed, step.seconds or 0.0)
                sized.append(Sized(choice, 2**power, memory, seconds, line.trained, line.is_packed, step))
        limits = ((each, room if each.found is not None else NEARLY * room) for each in sized)
        chosen = _spread(front([each for each, limit in limits if each.memory <= limit]), max_ways)
        unseen = next((each for each in chosen if each.found is None), None)
        if unseen is None:
            return chosen
        step = search.whole(unseen.choice, unseen.batch)
        known[unseen.choice, unseen.batch] = step
        search.line(unseen.choice).correct(unseen.batch, step)


def _spread(found: list[Sized], max_ways: int) -> list[Sized]:
    """Return at most `max_ways` of the front: the fastest, the fastest dense one, the smallest, and others between."""
    if len(found) <= max_ways:
        return found
    dense = next((each for each in found if not each.is_packed), found[0])
    between = [found[round(i * (len(found) - 1) / max_ways)] for i in range(1, max_ways)]
    order = [found[0], dense, min(found, key=lambda each: each.memory), *between, *found]
    chosen = list(dict.fromkeys(map(id, order)))[:max_ways]
    return [each for each in found if id(each) in chosen]


def _why_nothing(search: Search, choices: Sequence[Choice], room: float) -> str:
    """Return an error text with the smallest need, what it is for, and what would need less."""
    choice = min(choices, key=lambda each: search.line(each).at(search.least)[0])
    step = search.whole(choice, search.least)
    lasting = step.parts[BASE] + step.parts[ADAPTERS] + (0 if step.paged else step.parts[STATE])
    again = " and gradient checkpointing" if choice.gradient_checkpointing else ""
    beyond = " beyond Python and its libraries" if search.device.measured else ""
    text = (
        f"nothing fits into {_size(room)}{beyond}: the least is {_size(step.needed)}, {choice.method} with "
        f"{_EXAMPLES[search.least]} at a time{again}, {_size(step.parts[BASE])} of it the base"
    )
    ways = []
    if lasting < room and search.step.example is None:
        length = search.step.length // 2
        while length >= SHORTEST:
            if search.whole(choice, search.least, length).needed <= room:
                ways.append(f"examples of at most {length} tokens would fit (--max-length {length})")
                break
            length //= 2
    if not step.summary.packed_parameters:
        ways.append("a method with a base in 4 bits needs less")
    cards = [card.name for card in CARDS.values() if card.memory >= step.needed]
    if not search.device.measured and cards:
        ways.append(f"cards with enough memory: {', '.join(cards)}")
    return f"{text}. {_sentence(ways or ['Use a smaller model, or more memory'])}"


def _sentence(parts: Sequence[str]) -> str:
    joined = "; ".join(parts)
    return joined[:1].upper() + joined[1:]


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _methods(
    names: Sequence[str] | None, ranks: Sequence[int], given: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for name in names if names is not None else registry.methods():
        ranked = "r" not in given and "r" in {
            each.name for each in dataclass_fields(registry.method(name).config_class)
        }
        if ranked:
            found += [(name, {**given, "r": rank}) for rank in ranks]
        elif names is not None:
            found.append((name, dict(given)))
    return found

"""Which ways of training fit into a memory, and how long each takes (`searching` says how they are found)."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any

import torch

from peftcore.errors import PeftcoreError
from peftcore.estimating.devices import CARDS, Device, device_of, usable, usable_here
from peftcore.estimating.following import NotFollowed
from peftcore.estimating.loop import ADAPTERS, BASE, STATE
from peftcore.estimating.prediction import Estimate, step_of
from peftcore.estimating.searching import ALIKE, LARGEST_BATCH, PAGED, PLAIN, Choice, Search, Sized, front
from peftcore.estimating.standing import config_of
from peftcore.estimating.step import Step
from peftcore.optim.paging import bytes_of
from peftcore.registry import registry

_LOOKED_FOR = ("batch_size", "gradient_checkpointing", "optimizer")
NEARLY = 1.2  # what a line says to need so much more than there is may fit, and is followed whole before it is left out
SHORTEST = 64  # tokens of an example, of those that are offered where nothing fits


@dataclass(frozen=True)
class Way:
    """A way to train that fits.

    Args:
        hours: of all examples once.
        next_need: bytes that twice the batch would need, about.
        alike: other methods that need as much memory and time, and train fewer parameters.
    """

    method: str
    fields: dict[str, Any]
    batch_size: int
    gradient_checkpointing: bool
    optimizer: str
    estimate: Estimate
    hours: float
    next_need: float
    alike: tuple[str, ...] = ()

    @property
    def memory(self) -> float:
        """Bytes that it needs."""
        return self.estimate.needed

    def options(self) -> list[str]:
        """As `peftcore train` takes them."""
        chosen = ["--method", self.method]
        for name, value in self.fields.items():
            chosen += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        chosen += ["--batch-size", str(self.batch_size), "--optim", self.optimizer]
        return chosen + (["--gradient-checkpointing"] if self.gradient_checkpointing else [])


@dataclass(frozen=True)
class Suggestion:
    """What fits into `memory` bytes, the fastest first; of those alike in time the one whose base is not in 4 bits.

    A slower one needs less memory, or keeps the base dense.
    """

    memory: float
    device: Device
    ways: tuple[Way, ...]

    def __str__(self) -> str:
        ranks = self.ways[0].estimate.step.ranks
        each = f" for each of {ranks} processes, without what they wait for" if ranks > 1 else ""
        lines = [f"into {self.memory / 1e9:,.1f} GB on {self.device.name}{each}, fastest first:"]
        for way in self.ways:
            why = "" if way.next_need <= self.memory else ", and so does not fit"
            lines += [
                f"  {way.memory / 1e9:8,.2f} GB{way.hours:10,.2f} h an epoch   {shlex.join(way.options())}",
                f"  {'':8}   twice the batch would need about {way.next_need / 1e9:,.2f} GB{why}",
            ]
            if way.alike:
                lines += [f"  {'':8}   alike in both, with fewer parameters to train: {', '.join(way.alike)}"]
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
    most: int = 4,
    fields: Mapping[str, Any] | None = None,
    step: Step | None = None,
    **options: Any,
) -> Suggestion:
    """Look for ways to train `model` in so much memory: method, rank, recomputed activations, batch, paged optimizer.

    Args:
        model: a config of transformers, a folder with a `config.json`, a hub id, or a model that has a config.
        memory: of a process, in bytes, also as text ("24GB"); None: what the device has.
        device: `cpu`, which is this machine, or a card, as `estimate` takes it.
        examples: how many there are.
        methods: their names; None: of those installed that have a rank `r` and need no field beside it, each that is
            smaller or faster than the others.
        r: ranks of methods that have one.
        dtype: of the base.
        most: ways to answer at most.
        fields: of every method's config, such as target_modules.
        step: how a step is run, apart from what is looked for; None: as `Step()` says.
        options: fields of `Step`, such as length=2048, ranks=8 or mixed_precision="bf16", before those of `step`.

    Returns:
        The front of memory against time.

    Raises:
        PeftcoreError: nothing fits, with the least that was found, or an argument is wrong.
    """
    where = device_of(device)
    room = _room(memory, where)
    wanted = [name for name in _LOOKED_FOR if name in options]
    step = step_of(step, options)
    if wanted or options:
        raise PeftcoreError(
            f"suggest looks for {', '.join(_LOOKED_FOR)} itself: leave out {', '.join(wanted)}"
            if wanted
            else f"suggest takes no {', '.join(options)}. A method's fields: fields={{...}}"
        )
    if memory is None and where.measured:
        room /= step.ranks
    search = Search(config_of(model), replace(where, memory=room), step, dtype)
    named = _methods(methods, r, fields or {})
    firsts = {Choice(method, tuple(its.items()), False, PLAIN): () for method, its in named}
    alike: Mapping[Choice, tuple[str, ...]] = search.contenders([*firsts]) if methods is None else firsts
    if not alike:
        raise PeftcoreError("no method with a rank is installed that applies to this model. Name some: methods=[...]")
    choices = []
    for first in alike:
        search.line(first)  # what it refuses, it says itself
        choices.append(first)
        for optimizer in (PLAIN, PAGED):
            again = replace(first, gradient_checkpointing=True, optimizer=optimizer)
            with suppress(NotFollowed):  # not every model can compute activations again
                search.line(again)
                choices.append(again)
    found = _search(search, choices, room, most)
    if not found:
        raise PeftcoreError(_why_nothing(search, choices, room))
    ways = []
    for each in found:
        followed, choice = each.found, each.choice
        assert followed is not None  # all that is answered was followed whole
        ways.append(
            Way(
                choice.method,
                dict(choice.fields),
                each.batch,
                choice.gradient_checkpointing,
                choice.optimizer,
                followed,
                hours=(followed.seconds or 0.0) * math.ceil(examples / (each.batch * step.ranks)) / 3600,
                next_need=search.needs(choice, 2 * each.batch),
                alike=alike[replace(choice, gradient_checkpointing=False, optimizer=PLAIN)],
            )
        )
    ways.sort(key=lambda way: way.hours)
    near = [way for way in ways if way.hours <= (1 + ALIKE) * ways[0].hours]
    best = next((way for way in near if not way.estimate.summary.packed_parameters), ways[0])
    return Suggestion(room, where, (best, *(way for way in ways if way is not best)))


def _room(memory: int | str | None, where: Device) -> float:
    """Bytes of `memory` that there are for a step on this device."""
    if memory is None:
        return where.memory
    try:
        given = float(bytes_of(memory) or 0)
    except ValueError as error:
        raise PeftcoreError(f"memory is bytes, or text such as '24GB', found {memory!r}") from error
    if given < 1e6:
        raise PeftcoreError(f"memory is bytes, or text such as '24GB', found {memory!r}: no model fits into that")
    room = usable_here(given) if where.measured else usable(given)
    if room < 1e6:
        what = "Python and its libraries take" if where.measured else "its context takes"
        raise PeftcoreError(f"memory={memory!r} on {where.name} is no more than {what}: give at least 1GB")
    return room


def _search(search: Search, choices: Sequence[Choice], room: float, most: int) -> list[Sized]:
    """The front of what fits, at most so many of it, each followed whole."""
    known: dict[tuple[Choice, int], Estimate] = {}
    while True:
        sized = []
        for choice in choices:
            line = search.line(choice)
            for power in range(LARGEST_BATCH.bit_length()):
                step = known.get((choice, 2**power))
                memory, seconds = line.at(2**power) if step is None else (step.needed, step.seconds or 0.0)
                sized.append(Sized(choice, 2**power, memory, seconds, line.trained, line.is_packed, step))
        limits = ((each, room if each.found is not None else NEARLY * room) for each in sized)
        chosen = _spread(front([each for each, limit in limits if each.memory <= limit]), most)
        unseen = next((each for each in chosen if each.found is None), None)
        if unseen is None:
            return chosen
        step = search.whole(unseen.choice, unseen.batch)
        known[unseen.choice, unseen.batch] = step
        search.line(unseen.choice).correct(unseen.batch, step)


def _spread(found: list[Sized], most: int) -> list[Sized]:
    """Of the front so many: the fastest, the fastest with a dense base, the smallest, and others between."""
    if len(found) <= most:
        return found
    dense = next((each for each in found if not each.is_packed), found[0])
    between = [found[round(i * (len(found) - 1) / most)] for i in range(1, most)]
    order = [found[0], dense, min(found, key=lambda each: each.memory), *between, *found]
    chosen = list(dict.fromkeys(map(id, order)))[:most]
    return [each for each in found if id(each) in chosen]


def _why_nothing(search: Search, choices: Sequence[Choice], room: float) -> str:
    """What the least way needs, what for, and what would help."""
    choice = min(choices, key=lambda each: search.line(each).at(1)[0])
    step = search.whole(choice, 1)
    lasting = step.parts[BASE] + step.parts[ADAPTERS] + (0 if step.paged else step.parts[STATE])
    again = " and recomputed activations" if choice.gradient_checkpointing else ""
    text = (
        f"nothing fits into {_size(room)}: the least is {_size(step.needed)}, {choice.method} with one example at a "
        f"time{again}, {_size(step.parts[BASE])} of it the base"
    )
    ways = []
    if lasting < room:
        length = search.step.length // 2
        while length >= SHORTEST:
            if search.whole(choice, 1, length).needed <= room:
                ways.append(f"with examples of at most {length} tokens this would fit (--max-length {length})")
                break
            length //= 2
    if not step.summary.packed_parameters:
        ways.append("a method with a base in 4 bits needs less")
    cards = [card.name for card in CARDS.values() if card.memory >= step.needed]
    if not search.device.measured and cards:
        ways.append(f"cards with enough: {', '.join(cards)}")
    return f"{text}. {_sentence(ways or ['A smaller model is needed, or more memory'])}"


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

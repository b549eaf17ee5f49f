"""Search for training configurations that fit into a memory limit, and the largest batch of each, by bisection."""

from __future__ import annotations

import json
import math
import shlex
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields as dataclass_fields, replace
from typing import Any

import torch

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.estimating.devices import CARDS, Device, device_of, process_memory, usable
from peftcore.estimating.following import NotFollowed
from peftcore.estimating.prediction import Estimate, estimate, split_step_options
from peftcore.estimating.purpose import Purpose
from peftcore.estimating.ranges import Range
from peftcore.estimating.stand_in import config_of, refuse_not_followed
from peftcore.estimating.step import Step
from peftcore.optim import bytes_of

PLAIN, PAGED = "adamw_torch", "paged_adamw_8bit"
LARGEST_BATCH = 64
SHORTEST = 64  # length in tokens of the shortest examples that an error suggests
_SEARCHED = ("batch_size", "gradient_checkpointing", "optimizer")
_EXAMPLES = {1: "one example", 2: "two examples"}


@dataclass(frozen=True)
class Way:
    """A training configuration that fits, with its largest batch up to 64.

    Args:
        next_need: Bytes needed with twice the batch size, measured like `memory`.
        libraries: Bytes of `memory` that Python and its libraries take; 0 on a GPU.
    """

    method: str
    fields: dict[str, Any]
    batch_size: int
    gradient_checkpointing: bool
    optimizer: str
    estimate: Estimate
    next_need: float
    libraries: float = 0.0

    @property
    def memory(self) -> Range:
        """Bytes of the process on this machine, or of the GPU."""
        estimate = self.estimate
        low = self.libraries + estimate.beyond_libraries.low - (estimate.peak - estimate.least)
        high = self.libraries + estimate.needed
        return Range(low if self.libraries else high, high)

    def options(self) -> list[str]:
        """Return the options of `peftcore train` for this configuration."""
        words = ["--method", self.method]
        for name, value in self.fields.items():
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        words += ["--batch-size", str(self.batch_size), "--optim", self.optimizer]
        return words + (["--gradient-checkpointing"] if self.gradient_checkpointing else [])


@dataclass(frozen=True)
class Suggestion:
    """Training configurations that fit into `memory` bytes.

    Configurations with a dense base come before those with a less exact 4-bit base. For each method the plain
    configuration comes first. Gradient checkpointing and the paged optimizer, which are slower, follow if they allow a
    larger batch.
    """

    memory: float
    device: Device
    ways: tuple[Way, ...]

    def __str__(self) -> str:
        ranks = self.ways[0].estimate.step.ranks
        for_each_process = f" for each of {ranks} processes" if ranks > 1 else ""
        with_libraries = "" if self.device.is_card else ", including Python and its libraries"
        lines = [f"fits into {self.memory / 1e9:,.1f} GB on {self.device.name}{with_libraries}{for_each_process}:"]
        for way in self.ways:
            verdict = "" if way.next_need <= self.memory else " and does not fit"
            lines += [
                f"  {way.memory!s:>15}   {shlex.join(way.options())}",
                f"  {'':15}   twice the batch needs about {way.next_need / 1e9:,.2f} GB{verdict}",
            ]
        return "\n".join(lines)


def suggest(
    model: Any,
    /,
    methods: Sequence[str],
    *,
    memory: int | str | None = None,
    device: str = "cpu",
    r: Sequence[int] = (16,),
    dtype: torch.dtype = torch.bfloat16,
    max_ways: int = 4,
    fields: Mapping[str, Any] | None = None,
    step: Step | None = None,
    **options: Any,
) -> Suggestion:
    """Suggest how to train `model` within a memory limit: batch size, checkpointing and optimizer for each method.

    Args:
        model: A transformers config, a folder with a `config.json`, a hub id, or a model that has a config.
        methods: Names of the methods to compare, in the order in which they are tried.
        memory: Memory of the process or the GPU, in bytes or as text ("24GB"). None means the free memory of the
            device.
        device: `cpu` for this machine, or a GPU, as in `estimate`.
        r: Ranks to try, for methods that have one.
        dtype: Dtype of the base.
        max_ways: Maximum number of configurations to return.
        fields: Fields of every method's config, such as target_modules.
        step: Settings of a step, except for the searched ones. None means `Step()`.
        options: Fields of `Step`, such as length=2048, ranks=8 or mixed_precision="bf16", which override `step`.

    Raises:
        PeftcoreError: Nothing fits (the error gives the smallest requirement), or an argument is wrong.

    Examples:
        >>> config = AutoConfig.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> print(peftcore.suggest(config, ["lora", "qlora"], memory="24GB", device="rtx4090", length=512))
    """
    target = device_of(device)
    room = _room(memory, target)
    searched_options = [name for name in _SEARCHED if name in options]
    step = split_step_options(step, options)
    if searched_options:
        raise PeftcoreError(f"suggest chooses {', '.join(_SEARCHED)} itself. Omit {', '.join(searched_options)}")
    if options:
        raise PeftcoreError(
            f"suggest has no argument {', '.join(options)}. Pass fields of a method's config as fields={{...}}"
        )
    if memory is None and not target.is_card:
        room /= step.ranks
    config = config_of(model)
    refuse_not_followed(config)
    search = _Search(config, replace(target, memory=room), step, dtype)
    if isinstance(methods, str) or not methods:
        raise PeftcoreError(f"methods must be a list of names, found {methods!r}")
    libraries = 0.0 if target.is_card else float(process_memory())
    ways: list[Way] = []
    tried_choices: list[_Choice] = []
    for plain_choice in _choices(methods, r, fields or {}):
        search.estimate(plain_choice, search.smallest_batch)  # raises if the method refuses the model
        batch_before = 0
        for choice in _ladder(plain_choice):
            try:
                batch = search.largest_batch(choice, room)
            except NotFollowed:  # some models do not support gradient checkpointing
                if choice is plain_choice:
                    raise
                break
            tried_choices.append(choice)
            if batch <= batch_before:
                continue
            batch_before = batch
            largest = search.estimate(choice, batch)
            ways.append(
                Way(
                    choice.method,
                    dict(choice.fields),
                    batch,
                    choice.gradient_checkpointing,
                    choice.optimizer,
                    largest,
                    next_need=libraries + search.estimate(choice, 2 * batch).needed,
                    libraries=libraries,
                )
            )
    if not ways:
        raise PeftcoreError(_no_way_message(search, tried_choices, room))
    ways.sort(key=lambda way: bool(way.estimate.summary.packed_parameters))
    return Suggestion(room + libraries, target, tuple(ways[:max_ways]))


def _room(memory: int | str | None, device: Device) -> float:
    """Return the number of bytes of `memory` that are available to a step on this device."""
    if memory is None:
        return device.memory
    try:
        size = float(bytes_of(memory) or 0)
    except ValueError as error:
        raise PeftcoreError(f"memory must be a number of bytes or text such as '24GB', found {memory!r}") from error
    if size < 1e6:
        raise PeftcoreError(
            f"memory={memory!r} is too small for any model. Pass a number of bytes or text such as '24GB'"
        )
    room = usable(size) if device.is_card else size - process_memory()
    if room < 1e6:
        user_of_memory = "the CUDA context takes" if device.is_card else "Python and its libraries take"
        smallest_in_gb = math.ceil((size - room + 1e6) / 1e9)
        raise PeftcoreError(
            f"memory={memory!r} on {device.name} is no more than {user_of_memory}. Pass at least {smallest_in_gb}GB"
        )
    return room


@dataclass(frozen=True)
class _Choice:
    """Training configuration without its batch size."""

    method: str
    fields: tuple[tuple[str, Any], ...]
    gradient_checkpointing: bool = False
    optimizer: str = PLAIN

    def __hash__(self) -> int:
        return hash((self.method, repr(self.fields), self.gradient_checkpointing, self.optimizer))


def _ladder(plain: _Choice) -> tuple[_Choice, ...]:
    """Return the choice, then with checkpointing, then also with a paged optimizer: each needs less memory."""
    checkpointed = replace(plain, gradient_checkpointing=True)
    return plain, checkpointed, replace(checkpointed, optimizer=PAGED)


@dataclass
class _Search:
    """Cache of simulated steps of one model on one device. `step` has the fields that are not searched."""

    config: Any
    device: Device
    step: Step
    dtype: torch.dtype
    _estimates: dict[Any, Estimate] = field(default_factory=dict)

    @property
    def smallest_batch(self) -> int:
        """Smallest batch: at least two pairs, since pairs of texts are compared with each other."""
        return 2 if self.step.loss == "pairs" else 1

    def estimate(self, choice: _Choice, batch: int, length: int | None = None) -> Estimate:
        """Follow a step."""
        length = length or self.step.length
        key = choice, batch, length
        if key not in self._estimates:
            self._estimates[key] = estimate(
                self.config,
                choice.method,
                step=replace(
                    self.step,
                    batch_size=batch,
                    length=length,
                    optimizer=choice.optimizer,
                    gradient_checkpointing=choice.gradient_checkpointing,
                ),
                dtype=self.dtype,
                device=self.device,
                **dict(choice.fields),
            )
        return self._estimates[key]

    def largest_batch(self, choice: _Choice, room: float) -> int:
        """Return the largest power of two that fits, or 0."""
        batches = [2**power for power in range(LARGEST_BATCH.bit_length()) if 2**power >= self.smallest_batch]
        fitting = bisect_left(batches, True, key=lambda batch: self.estimate(choice, batch).needed > room)
        return batches[fitting - 1] if fitting else 0


def _no_way_message(search: _Search, choices: Sequence[_Choice], room: float) -> str:
    """Return the error text: the smallest requirement, its configuration, and how to reduce it."""
    choice = min(choices, key=lambda candidate: search.estimate(candidate, search.smallest_batch).needed)
    step = search.estimate(choice, search.smallest_batch)
    lasting = step.parts[Purpose.BASE] + step.parts[Purpose.ADAPTERS] + (0 if step.paged else step.parts[Purpose.STATE])
    with_checkpointing = " and gradient checkpointing" if choice.gradient_checkpointing else ""
    beyond = "" if search.device.is_card else " beyond Python and its libraries"
    text = (
        f"nothing fits into {_size(room)}{beyond}: the smallest configuration is {choice.method} with "
        f"{_EXAMPLES[search.smallest_batch]} at a time{with_checkpointing}, which needs {_size(step.needed)}, "
        f"including {_size(step.parts[Purpose.BASE])} for the base"
    )
    ways = []
    if lasting < room and search.step.example is None:
        length = search.step.length // 2
        while length >= SHORTEST:
            if search.estimate(choice, search.smallest_batch, length).needed <= room:
                ways.append(f"examples of at most {length} tokens would fit (--max-length {length})")
                break
            length //= 2
    if not step.summary.packed_parameters:
        ways.append("a method with a 4-bit base needs less")
    cards = [card.name for card in CARDS.values() if card.memory >= step.needed]
    if search.device.is_card and cards:
        ways.append(f"GPUs with enough memory: {', '.join(cards)}")
    return f"{text}. {_sentence(ways or ['Use a smaller model, or more memory'])}"


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _choices(names: Sequence[str], ranks: Sequence[int], fields: Mapping[str, Any]) -> list[_Choice]:
    """Return a choice for each method and rank; a method without a rank, or with a rank in `fields`, has one."""
    choices = []
    for name in names:
        has_rank = "r" in {item.name for item in dataclass_fields(peftcore.method(name).config_class)}
        if has_rank and "r" not in fields:
            choices += [_Choice(name, (*fields.items(), ("r", rank))) for rank in ranks]
        else:
            choices.append(_Choice(name, tuple(fields.items())))
    return choices

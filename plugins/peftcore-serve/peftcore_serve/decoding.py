"""Decoding of many sequences in one batch, which sequences join and leave between two steps.

A sequence's prompt runs by itself, without padding. Its keys and values then join those of the batch, which are aligned
at the end: shorter ones are padded at their beginning, where the attention mask is 0. Each step runs one token of every
sequence. So the arithmetic of a sequence is that of `generate` on a batch with left padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence as Several
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from peftcore_serve.sequence import Sequence

_PROBED = ((5, 1, 3), (2, 6, 4, 1, 3, 5, 2))  # tokens of two prompts of different lengths
_NEXT = 4  # the token that follows both


class Batch:
    """Sequences that are decoded together, with their keys and values.

    Args:
        model: a causal language model of transformers whose layers all cache keys and values.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.sequences: list[Sequence] = []
        self._cache: Any = None
        self._lengths: list[int] = []  # tokens of each sequence in the cache
        self._arguments = inspect.signature(type(model).forward).parameters

    def prefill(self, prompt: list[int], *, whole: bool = False) -> tuple[Tensor, Any]:
        """Run a prompt; return the logits `[V]` of the next token, and the prompt's cache.

        With `whole` the logits are `[tokens, V]`, those of the next token last.
        """
        from transformers import DynamicCache

        cache = DynamicCache()  # not of the config: layers with a window keep everything, and their mask has the window
        ids = torch.tensor([prompt], device=self.model.device)
        logits = self._run(ids, cache, keep=None if whole else 1)[0]
        return logits if whole else logits[-1], cache

    def join(self, sequence: Sequence, cache: Any) -> None:
        """Add a sequence, with its cache from `prefill`."""
        self._cache = cache if self._cache is None else _joined([self._cache, cache])
        self.sequences.append(sequence)
        self._lengths.append(len(sequence.prompt) + len(sequence.tokens) - 1)

    def drop_done(self) -> bool:
        """Remove sequences that have ended. Return whether there were any."""
        kept = [i for i, sequence in enumerate(self.sequences) if not sequence.is_done]
        if len(kept) == len(self.sequences):
            return False
        longest = max(self._lengths)
        self.sequences = [self.sequences[i] for i in kept]
        self._lengths = [self._lengths[i] for i in kept]
        self._cache = _selected(self._cache, kept, longest - max(self._lengths)) if kept else None
        return True

    def step(self) -> Tensor:
        """Run the last token of each sequence; return the logits `[sequences, V]` of the next."""
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in self.sequences], device=self.model.device)
        longest = max(self._lengths)
        mask = positions = None
        if min(self._lengths) < longest:
            padded = torch.tensor([longest - length for length in self._lengths], device=ids.device)
            mask = (torch.arange(longest + 1, device=ids.device) >= padded[:, None]).long()
            positions = torch.tensor(self._lengths, device=ids.device)[:, None]
        logits = self._run(ids, self._cache, mask, positions)[:, -1]
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    @torch.no_grad()
    def _run(
        self,
        ids: Tensor,
        cache: Any,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        keep: int | None = 1,
    ) -> Tensor:
        given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        more = {name: value for name, value in given.items() if value is not None and name in self._arguments}
        where = "cache" if "cache" in self._arguments else "past_key_values"  # depends on transformers' release
        output = self.model(input_ids=ids, use_cache=True, **{where: cache}, **more)
        logits: Tensor = output.logits
        return logits


def _joined(caches: Several[Any]) -> Any:
    """Return one cache of the rows of all, aligned at the end."""

    def together(parts: Several[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        if not there:  # a layer that uses another layer's keys and values
            return None
        longest = max(part.shape[-2] for part in there)
        return torch.cat([pad(part, (0, 0, longest - part.shape[-2], 0)) for part in there])

    return _rebuilt(zip(*(cache.layers for cache in caches), strict=True), together)


def _selected(cache: Any, rows: list[int], padding: int) -> Any:
    """Return a cache of some rows, without `padding` tokens at the beginning."""

    def part(parts: Several[Tensor | None]) -> Tensor | None:
        (tensor,) = parts
        return None if tensor is None else tensor[rows, ..., padding:, :]

    return _rebuilt(((layer,) for layer in cache.layers), part)


def _rebuilt(layers: Any, change: Callable[[Several[Tensor | None]], Tensor | None]) -> Any:
    from transformers import DynamicCache

    return DynamicCache(
        [
            (change([layer.keys for layer in parts]), change([layer.values for layer in parts]))
            for parts in (list(each) for each in layers)
        ]
    )


@torch.no_grad()
def can_batch(
    model: nn.Module,
    by_sample: Callable[[list[str | None]], None],
    alone: Callable[[str | None], None],
    key: str | None,
) -> bool:
    """Return whether decoding a sequence in a batch gives the logits of the full sequence by itself.

    Models with other state than keys and values (Mamba) or without support for padding do not; adapters that act on a
    whole batch, or on a module whose arguments cannot be divided into samples, cannot be in one.

    Args:
        model: the model.
        by_sample: give the samples of a batch their adapters.
        alone: activate an adapter for whole batches.
        key: name of the adapter on the model, which is tried next to the base; None for the base.
    """
    batch, keys = Batch(model), [key, None]
    try:
        caches = []
        for prompt, one in zip(_PROBED, keys, strict=True):
            by_sample([one])
            caches.append(batch.prefill(list(prompt))[1])
        batch._cache, batch._lengths = _joined(caches), [len(prompt) for prompt in _PROBED]
        batch.sequences = [_Probe([_NEXT]) for _ in keys]  # type: ignore[misc]
        by_sample(keys)
        found = batch.step().float()
        for row, prompt, one in zip(found, _PROBED, keys, strict=True):
            alone(one)
            whole = batch.model(input_ids=torch.tensor([[*prompt, _NEXT]], device=row.device), use_cache=False)
            if not _near(row, whole.logits[0, -1].float()):
                return False
    except Exception:  # a model's own code, called in a way for which it may not be made
        return False
    return True


class _Probe:
    """Stand-in for a sequence whose tokens are given."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens


def _near(row: Tensor, whole: Tensor) -> bool:
    """Return whether two rows of logits agree but for rounding; a wrong mask or position moves them by their spread."""
    return bool((row - whole).abs().max() <= 0.1 * whole.std())


@torch.no_grad()
def prompt_logits(model: nn.Module, prompt: list[int]) -> Tensor:
    """Return the logits `[tokens, V]` of a prompt, for models and adapters that cannot be in a batch with others."""
    loaded: Any = model
    output = loaded(input_ids=torch.tensor([prompt], device=loaded.device), use_cache=False)
    logits: Tensor = output.logits[0, -len(prompt) :]  # a soft prompt's come first
    return logits


def generate_alone(model: nn.Module, sequence: Sequence, is_closed: Callable[[], bool]) -> None:
    """Continue a sequence, which may have begun, by the model's `generate`, to its end, or until `is_closed()`.

    For models and adapters that cannot be in a batch with others, such as prefixes.
    """
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    class Chooser(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            sequence.extend(scores[0])
            chosen = torch.full_like(scores, -torch.inf)
            chosen[0, sequence.tokens[-1] if sequence.tokens else 0] = 0
            return chosen

    class Done(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            return torch.tensor([sequence.is_done or is_closed()], device=input_ids.device)

    loaded: Any = model
    ids = torch.tensor([[*sequence.prompt, *sequence.tokens]], device=loaded.device)
    loaded.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=sequence.sampling.max_tokens - len(sequence.tokens),
        logits_processor=LogitsProcessorList([Chooser()]),
        stopping_criteria=StoppingCriteriaList([Done()]),
    )
    if not sequence.is_done and not is_closed():  # an end of the model's own that the request does not have
        sequence.fail("generation ended without a reason")

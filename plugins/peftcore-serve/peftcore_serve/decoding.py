"""Continuous batching: sequences join and leave the batch between steps.

The prompt of each sequence is prefilled alone, without padding. Its keys and values are then added to the batch with
left padding, where the attention mask is 0. Each step computes one token of every sequence, with the same arithmetic as
`generate` on a left-padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Several
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from peftcore.plugin import cache_argument, forward_arguments
from peftcore_serve.sequence import Sequence

_PROBE_PROMPTS = ((5, 1, 3), (2, 6, 4, 1, 3, 5, 2))  # token ids of two prompts of different lengths
_PROBE_TOKEN = 4  # follows both


class Batch:
    """Sequences that are decoded in one batch, with their keys and values.

    Args:
        model: a causal language model of transformers whose layers all cache keys and values.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.sequences: list[Sequence] = []
        self._cache: Any = None
        self._lengths: list[int] = []  # number of cached tokens of each sequence
        self._arguments, self._cache_argument = forward_arguments(model), cache_argument(model)

    def prefill(self, prompt: list[int], *, whole: bool = False) -> tuple[Tensor, Any]:
        """Run a prompt, and return the logits `[V]` of the next token and the prompt's cache.

        With `whole`, the logits are `[tokens, V]`, and the last row predicts the next token.
        """
        from transformers import DynamicCache

        # Without the config, layers with a sliding window cache all tokens, and only the mask applies the window.
        cache = DynamicCache()
        ids = torch.tensor([prompt], device=self.model.device)
        logits = self._run(ids, cache, keep=None if whole else 1)[0]
        return logits if whole else logits[-1], cache

    def join(self, sequence: Sequence, cache: Any) -> None:
        """Add a sequence, with its cache from `prefill`."""
        self._cache = cache if self._cache is None else _join([self._cache, cache])
        self.sequences.append(sequence)
        self._lengths.append(len(sequence.prompt) + len(sequence.tokens) - 1)

    def drop_done(self) -> bool:
        """Remove sequences that have ended. Return whether there were any."""
        running = [i for i, sequence in enumerate(self.sequences) if not sequence.is_done]
        if len(running) == len(self.sequences):
            return False
        longest = max(self._lengths)
        self.sequences = [self.sequences[i] for i in running]
        self._lengths = [self._lengths[i] for i in running]
        self._cache = _select(self._cache, running, longest - max(self._lengths)) if running else None
        return True

    def step(self) -> Tensor:
        """Run the last token of each sequence, and return the logits `[sequences, V]` of the next token."""
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in self.sequences], device=self.model.device)
        longest = max(self._lengths)
        mask = positions = None
        if min(self._lengths) < longest:
            padding = torch.tensor([longest - length for length in self._lengths], device=ids.device)
            mask = (torch.arange(longest + 1, device=ids.device) >= padding[:, None]).long()
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
        options: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        supported_options = {
            name: value for name, value in options.items() if value is not None and name in self._arguments
        }
        if self._cache_argument is not None:
            supported_options[self._cache_argument] = cache
        output = self.model(input_ids=ids, use_cache=True, **supported_options)
        logits: Tensor = output.logits
        return logits


def _join(caches: Several[Any]) -> Any:
    """Concatenate caches along the batch dimension, with left padding."""

    def concatenate(parts: Several[Tensor | None]) -> Tensor | None:
        tensors = [part for part in parts if part is not None]
        if not tensors:  # a layer that uses another layer's keys and values
            return None
        longest = max(part.shape[-2] for part in tensors)
        return torch.cat([pad(part, (0, 0, longest - part.shape[-2], 0)) for part in tensors])

    return _rebuild(zip(*(cache.layers for cache in caches), strict=True), concatenate)


def _select(cache: Any, rows: list[int], padding: int) -> Any:
    """Return a cache with some of the rows, and with `padding` tokens removed on the left."""

    def select(parts: Several[Tensor | None]) -> Tensor | None:
        (tensor,) = parts
        return None if tensor is None else tensor[rows, ..., padding:, :]

    return _rebuild(((layer,) for layer in cache.layers), select)


def _rebuild(layers: Any, change: Callable[[Several[Tensor | None]], Tensor | None]) -> Any:
    """Return a cache whose layers are computed from `layers`, tuples with one layer of each cache."""
    from transformers import DynamicCache

    pairs = []
    for parts in map(list, layers):
        keys = change([layer.keys for layer in parts])
        values = change([layer.values for layer in parts])
        pairs.append((keys, values))
    return DynamicCache(pairs)


@torch.no_grad()
def can_batch(
    model: nn.Module,
    activate_by_sample: Callable[[list[str | None]], None],
    activate_alone: Callable[[str | None], None],
    key: str | None,
) -> bool:
    """Return whether decoding in a batch gives the same logits as a forward pass of each sequence alone.

    The logits differ for models with state other than keys and values (Mamba) or without support for padding, and for
    adapters that act on a whole batch or on a module whose arguments cannot be split into samples.

    Args:
        model: the model.
        activate_by_sample: activates an adapter for each sample of a batch.
        activate_alone: activates an adapter for whole batches.
        key: name in the model of the adapter to test in a batch with the base model. None: only the base model.
    """
    batch, keys = Batch(model), [key, None]
    try:
        caches = []
        for prompt, sample_key in zip(_PROBE_PROMPTS, keys, strict=True):
            activate_by_sample([sample_key])
            caches.append(batch.prefill(list(prompt))[1])
        batch._cache, batch._lengths = _join(caches), [len(prompt) for prompt in _PROBE_PROMPTS]
        batch.sequences = [_Probe([_PROBE_TOKEN]) for _ in keys]  # type: ignore[misc]
        activate_by_sample(keys)
        rows = batch.step().float()
        for row, prompt, sample_key in zip(rows, _PROBE_PROMPTS, keys, strict=True):
            activate_alone(sample_key)
            output = batch.model(input_ids=torch.tensor([[*prompt, _PROBE_TOKEN]], device=row.device), use_cache=False)
            if not _near(row, output.logits[0, -1].float()):
                return False
    except Exception:  # a model's own code may not support this call
        return False
    return True


class _Probe:
    """A sequence with fixed tokens, used by `can_batch`."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens


def _near(row: Tensor, expected: Tensor) -> bool:
    """Return whether two rows of logits agree up to rounding. A wrong mask or position would change them much more."""
    return bool((row - expected).abs().max() <= 0.1 * expected.std())


@torch.no_grad()
def prompt_logits(model: nn.Module, prompt: list[int]) -> Tensor:
    """Return the logits `[tokens, V]` of a prompt, for models and adapters that cannot be batched."""
    causal_model: Any = model
    output = causal_model(input_ids=torch.tensor([prompt], device=causal_model.device), use_cache=False)
    logits: Tensor = output.logits[0, -len(prompt) :]  # the states of a soft prompt come first
    return logits


def generate_alone(model: nn.Module, sequence: Sequence, is_closed: Callable[[], bool]) -> None:
    """Generate the rest of a sequence with the model's `generate`, until `is_closed()` becomes true.

    Used for models and adapters that cannot be batched, such as prefixes.
    """
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    class Chooser(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            sequence.extend(scores[0])
            forced_scores = torch.full_like(scores, -torch.inf)
            forced_scores[0, sequence.tokens[-1] if sequence.tokens else 0] = 0
            return forced_scores

    class Done(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            return torch.tensor([sequence.is_done or is_closed()], device=input_ids.device)

    causal_model: Any = model
    ids = torch.tensor([[*sequence.prompt, *sequence.tokens]], device=causal_model.device)
    causal_model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=sequence.sampling.max_tokens - len(sequence.tokens),
        logits_processor=LogitsProcessorList([Chooser()]),
        stopping_criteria=StoppingCriteriaList([Done()]),
    )
    if not sequence.is_done and not is_closed():  # `generate` was stopped by the model's own stopping criterion
        sequence.fail("generation ended without reporting an error")

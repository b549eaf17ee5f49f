"""Short continuations of many prefixes of one text, sampled and scored together (`--ebft mode=strided`).

A row is the text, and after it K blocks of G + 1 tokens: the last token of a prefix, and the G tokens of its
continuation. A block sees its prefix and itself. Whether a model with its adapters computes the same for a block as for
the prefix with its continuation alone is tested (`check`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from peftcore.adaptation.base_modules import original_forward
from peftcore.cli.tasks import packing
from peftcore.errors import PeftcoreError

_ROWS = 256  # tokens whose probabilities are computed at once
Choose = Callable[[Tensor], Tensor]  # tokens [K] of logits [K, vocabulary]


def ends(count: int, first: int, stride: int, tokens: int) -> list[int]:
    """Return the lengths of the prefixes of a text of `count` tokens after which `tokens` more tokens follow."""
    return list(range(first, count - tokens + 1, stride))


def sampled(temperature: float) -> Choose:
    """Return a function that draws tokens at this temperature; the most likely ones at 0."""

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]

    return choose


@torch.no_grad()
def continued(model: Any, text: Tensor, prefixes: Tensor, tokens: int, choose: Choose) -> Tensor:
    """Return continuations, [K, tokens]. The model must be in evaluation mode.

    Args:
        model: a causal language model.
        text: tokens, [length].
        prefixes: lengths of the prefixes, [K].
        tokens: tokens of each continuation.
        choose: how a token is chosen.
    """
    count, before = len(prefixes), max(1, int(prefixes.max()) - 1)
    known = inspect.signature(original_forward(model)).parameters
    name = "cache" if "cache" in known else "past_key_values"  # its name before transformers 5.20
    past = {name: DynamicCache()}  # keeps all tokens, whatever the window of a layer is
    model(input_ids=text[None, :before], use_cache=True, **past, **kept(model, 1))
    seen = torch.arange(before, device=text.device) < (prefixes - 1)[:, None]
    own = torch.eye(count, dtype=torch.bool, device=text.device)
    current, found = text[prefixes - 1], []
    for step in range(tokens):
        seen = torch.cat([seen, own], 1)
        positions = (prefixes - 1 + step)[None]
        inputs = {"attention_mask": _additive(seen, model), "position_ids": positions, **past}
        current = choose(model(input_ids=current[None], use_cache=True, **inputs).logits[0])
        found.append(current)
    return torch.stack(found, 1)


def row(model: Any, text: Tensor, prefixes: Tensor, continuations: Tensor) -> dict[str, Tensor]:
    """Return the inputs of a row: `input_ids`, `position_ids`, and an `attention_mask` between all tokens."""
    size, (count, tokens) = len(text), continuations.shape
    blocks = torch.cat([text[prefixes - 1, None], continuations], 1)
    steps = torch.arange(tokens + 1, device=text.device)
    places = torch.cat([torch.arange(size, device=text.device), ((prefixes - 1)[:, None] + steps).flatten()])
    block = torch.arange(count, device=text.device).repeat_interleave(tokens + 1)
    seen = torch.zeros(len(places), len(places), dtype=torch.bool, device=text.device)
    seen[:size, :size] = True
    seen[size:, :size] = places[:size] < (prefixes - 1)[block, None]
    seen[size:, size:] = block[:, None] == block
    seen &= places <= places[:, None]
    return {
        "input_ids": torch.cat([text, blocks.flatten()])[None],
        "position_ids": places[None],
        "attention_mask": _additive(seen, model),
    }


def logits(model: Any, inputs: dict[str, Tensor], continuations: Tensor) -> Tensor:
    """Return the logits of the tokens of continuations, [K, tokens, vocabulary]."""
    count, tokens = continuations.shape
    found = model(**inputs, use_cache=False, **kept(model, count * (tokens + 1))).logits[0]
    return found[-count * (tokens + 1) :].unflatten(0, (count, tokens + 1))[:, :-1]


def log_probabilities(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of tokens that were sampled at a temperature, [..., tokens], in fp32.

    Rows are taken in parts, which are computed again for the gradient.
    """

    def part(some: Tensor, right: Tensor) -> Tensor:
        return (some.float() / temperature).log_softmax(-1).gather(-1, right[:, None])[:, 0]

    parts = zip(logits.flatten(0, -2).split(_ROWS), tokens.flatten().split(_ROWS), strict=True)
    found = [checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False) for each in parts]
    return torch.cat(found).view(tokens.shape)


def kept(model: nn.Module, last: int) -> dict[str, int]:
    """Return the argument with which a model computes the logits of the last tokens alone, if it has one."""
    known = inspect.signature(original_forward(model)).parameters
    return {"logits_to_keep": last} if "logits_to_keep" in known else {}


def check(model: Any, text: Sequence[int], first: int, tokens: int) -> None:
    """Raise a PeftcoreError unless `model` computes the same for blocks as for prefixes with continuations alone.

    Args:
        model: the model.
        text: the longest of the texts, which is tried.
        first: tokens of its shortest prefix.
        tokens: tokens of a continuation.
    """
    ids = torch.tensor(text, device=next(model.parameters()).device)
    prefixes = torch.tensor([first, len(ids) - tokens], device=ids.device)
    forced = ids.flip(0).repeat(tokens)[: 2 * tokens].view(2, tokens)
    stepwise: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        stepwise.append(logits)
        return forced[:, len(stepwise) - 1]

    why = "it rejects them"
    try:
        with packing.tried(model):
            together = logits(model, row(model, ids, prefixes, forced), forced)
            continued(model, ids, prefixes, tokens, choose)
            alone = torch.stack(
                [
                    model(input_ids=torch.cat([ids[:size], answer])[None], use_cache=False).logits[0, size - 1 : -1]
                    for size, answer in zip(prefixes.tolist(), forced, strict=True)
                ]
            )
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, PeftcoreError) as error:
        why += f" ({str(error).partition(chr(10))[0]})"
    else:
        pairs = ((together, alone), (torch.stack(stepwise, 1), alone))
        apart = max(packing.distance(one.float(), other.float()) for one, other in pairs)
        if apart <= packing.CLOSE.get(next(model.parameters()).dtype, 3e-2):
            return
        why = f"their outputs differ from those alone by {100 * apart:.2g} %"
    raise PeftcoreError(
        f"--ebft mode=strided: {type(model).__name__} with its adapter does not compute blocks with a mask of their "
        f"own: {why}. Use mode=structured with prompts and completions, or a model whose layers all attend to the "
        "whole text"
    )


def _additive(seen: Tensor, model: Any) -> Tensor:
    """Return a mask of what each token sees, [1, 1, tokens, tokens], as attention adds it."""
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(model.dtype).min)[None, None]

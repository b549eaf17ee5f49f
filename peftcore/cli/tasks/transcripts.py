"""Transcripts that a model writes, and how wrong they are.

The word error rate is the number of words to substitute, delete and insert, divided by the number of words of the right
transcripts; case and punctuation are not compared.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftcore.cli.tasks import by_task, encoded_examples, speech
from peftcore.cli.tasks.encoded_examples import Example
from peftcore.cli.tasks.evaluation_mode import batched, evaluating
from peftcore.cli.tasks.metrics import Metrics


def transcribed(
    model: Any, paths: Sequence[Any], processor: Any, max_new_tokens: int, batch_size: int = 8
) -> list[str]:
    """Return the model's greedy transcripts."""
    tokenizer, found = processor.tokenizer, list[str]()
    device = next(model.parameters()).device
    prefix = list(getattr(tokenizer, "prefix_tokens", ())) or [model.config.decoder_start_token_id]
    most = min(max_new_tokens, processor.longest_text - len(prefix) - 1)
    language = getattr(tokenizer, "language", None)
    several = getattr(model.generation_config, "is_multilingual", None) is True
    how = {"language": language, "task": "transcribe"} if several and language else {}
    with evaluating(model):
        for some in batched(paths, batch_size):
            inputs = encoded_examples.in_dtype({"input_features": speech.features(some, processor).to(device)}, model)
            begin = torch.tensor([prefix] * len(some), device=device)
            tokens = model.generate(**inputs, **how, decoder_input_ids=begin, do_sample=False, max_new_tokens=most)
            found += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return found


def measure(
    model: nn.Module, examples: Sequence[Example], processor: Any, batch_size: int = 8, *, answered: int
) -> Metrics:
    """Return the loss over all tokens, and the word error rate of the first `answered` recordings."""
    found = by_task.measure(model, examples, processor, batch_size)
    some = examples[:answered]
    if not some:
        return found
    wanted = [processor.tokenizer.decode(each["labels"], skip_special_tokens=True) for each in some]
    longest = max(len(each["labels"]) for each in some)
    texts = transcribed(model, [each["audio"] for each in some], processor, 2 * longest + 16, batch_size)
    return replace(found, figures={"wer": word_error_rate(texts, wanted), "perplexity": found.perplexity})


def word_error_rate(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the word error rate of `answers`; the number of words in them if `wanted` has none."""
    pairs = [(_words(one), _words(other)) for one, other in zip(answers, wanted, strict=True)]
    return sum(_distance(one, other) for one, other in pairs) / max(1, sum(len(other) for _, other in pairs))


def _words(text: str) -> list[str]:
    """Return the words of a text: letters, marks, numbers, and apostrophes between them."""
    plain = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    kept = "".join(each if each == "'" or unicodedata.category(each)[0] in "LMN" else " " for each in plain)
    return [word for word in (each.strip("'") for each in kept.split()) if word]


def _distance(one: list[str], other: list[str]) -> int:
    """Return the Levenshtein distance of two lists of words."""
    before = list(range(len(other) + 1))
    for i, word in enumerate(one, 1):
        row = [i]
        for j, each in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (word != each)))
        before = row
    return before[-1]

"""Direct preference optimization on conversations with images (`--task image-dpo`).

The loss is the same as in `dpo`. Each answer is encoded as a separate conversation with images (`media_chats`). Images
are decoded batch by batch, and the processor creates the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from peftcore.errors import PeftcoreError
from peftcore_cli.data import image_turns
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.row import Row
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import dpo, encoded_examples, media_chats
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.evaluation_mode import batched, evaluating
from peftcore_cli.tasks.image_text import REQUIRED_MODEL
from peftcore_cli.tasks.judged import Judged, Likelihoods
from peftcore_cli.tasks.media_chats import MediaChats
from peftcore_cli.tasks.metrics import Metrics

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask
    from peftcore_cli.training.trainers import Measuring

SIDES = ("chosen", "rejected")


class ImageDPO(Judged, MediaChats):
    """Preference pairs with images, trained on likelihoods relative to a reference model."""

    name = "image-dpo"
    keys = dpo.DPO.keys
    shown_keys = "prompt/chosen/rejected with images"
    columns_example = dpo.DPO.columns_example
    model_class = "AutoModelForImageTextToText"
    needed_model = REQUIRED_MODEL
    has_reference = True
    family = "seeing"
    figures = dpo.DPO.figures
    step_loss = "dpo"

    def recognises(self, lines: FirstLines) -> bool:
        fields = lines.media
        return fields is not None and not image_turns.has_audio(fields) and {*SIDES} <= fields.keys()

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        return image_turns.preference(location, fields)

    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as {"chosen": example, "rejected": example}. Long answers are truncated at the end.

        Raises:
            PeftcoreError: an image cannot be read or lies beyond `max_length` tokens, the two answers of a row have the
                same tokens, or no row has answers that differ within `max_length` tokens.
        """
        examples, truncated_count = [], 0
        for row in rows:
            pair, is_truncated = _encode_pair(row, processor, max_length)
            truncated_count += is_truncated
            if _answers_differ(pair) and all(map(_has_learned_token, pair.values())):
                examples.append(pair)
        if not examples and not may_be_empty:
            raise PeftcoreError(f"no two answers differ within {max_length} tokens. Increase --max-length")
        return Encoded(examples, truncated_count, len(rows) - len(examples))

    def as_texts(self, examples: Sequence[Example]) -> list[Example]:
        """Return the chosen answers as conversations with images, for methods that initialise from data."""
        return [example["chosen"] for example in examples]

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of the longer conversation."""
        return [max(len(example[side]["input_ids"]) for side in SIDES) for example in examples]

    def likelihoods(
        self, model: nn.Module, examples: Sequence[Example], processor: Any, batch_size: int = 8
    ) -> Likelihoods:
        """Return the log-likelihoods of the chosen and rejected answers, for each batch."""
        device = next(model.parameters()).device
        batches = []
        with evaluating(model):
            for pairs in batched(examples, batch_size):
                batch = media_chats.collate(_conversations(pairs), processor)
                batch = {name: value.to(device) for name, value in batch.items()}
                targets = batch.pop("labels")[:, 1:]
                logits = model(**encoded_examples.in_dtype(batch, model)).logits[:, :-1]
                losses = [
                    F.cross_entropy(row_logits.float(), row_targets, ignore_index=IGNORE_INDEX, reduction="sum")
                    for row_logits, row_targets in zip(logits, targets, strict=True)
                ]
                batches.append(-torch.stack(losses).cpu())
        return batches

    def figures_of(
        self, policy: Likelihoods, reference: Likelihoods, examples: Sequence[Example], beta: float
    ) -> Metrics:
        return dpo.margins(policy, reference, len(examples), beta)

    def step_of(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        return super().step_of(_conversations(examples), processor)

    def inputs_of(self, batch: Any, model: nn.Module) -> Any:
        return encoded_examples.in_dtype(batch, model)

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        arguments["data_collator"] = trl_collator(processor)
        return super().trainer(arguments, settings, processor, about)


def _encode_pair(row: Row, processor: Any, max_length: int) -> tuple[dict[str, Example], bool]:
    """Return {"chosen": example, "rejected": example} of a row, and whether an answer was truncated.

    Raises:
        PeftcoreError: an image cannot be read or lies beyond `max_length` tokens, or the answers have the same tokens.
    """
    prompt = row.messages or []
    pair: dict[str, Example] = {}
    is_truncated = False
    for side, answer in zip(SIDES, (row.completion, row.rejected), strict=True):
        conversation = replace(row, messages=[*prompt, *(answer or [])], learned_from=len(prompt))
        # Only the answer is learned, so the conversation is encoded as a single example.
        (pair[side],), truncated_count = media_chats.encode_row(conversation, processor, max_length)
        is_truncated = is_truncated or truncated_count > 0
    if not is_truncated and not _answers_differ(pair):
        raise PeftcoreError(
            f"{row.location}: 'chosen' and 'rejected' have the same tokens, so neither can be preferred. Remove the "
            "row, or use a model whose tokenizer distinguishes them"
        )
    return pair, is_truncated


def _answers_differ(pair: dict[str, Example]) -> bool:
    return bool(pair["chosen"]["input_ids"] != pair["rejected"]["input_ids"])


def _has_learned_token(example: Example) -> bool:
    return any(label != IGNORE_INDEX for label in example["labels"][1:])


def _conversations(pairs: Sequence[Example]) -> list[Example]:
    """Return the chosen conversations of `pairs`, followed by the rejected ones."""
    return [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]


def trl_collator(processor: Any) -> Callable[[list[Example]], dict[str, Any]]:
    """Return a collator for TRL's DPOTrainer, whose batches have the chosen conversations before the rejected ones."""

    def batch(pairs: list[Example]) -> dict[str, Any]:
        tensors = media_chats.collate(_conversations(pairs), processor)
        mask = tensors.pop("labels") != IGNORE_INDEX
        return {**tensors, "completion_mask": mask.long()}

    return batch

"""Conversations with images as a model's processor prepares them; the assistant's turns are learned.

The text is that of the chat template, as for conversations without images. The processor replaces each image in it by
as many tokens as the model reads for it, or by one that a mask of cross-attention refers to (Llama 3.2); these are
never learned. Images are decoded batch by batch, so that a data set need not fit into memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch

from peftcore.cli import conversations, image_files
from peftcore.cli.conversations import IGNORED
from peftcore.cli.image_turns import PLACE
from peftcore.cli.row import Row
from peftcore.errors import PeftcoreError

Example = dict[str, Any]


def encode(rows: Sequence[Row], processor: Any, max_length: int) -> tuple[list[Example], int, int]:
    """Return (examples, number of truncated rows, number of those without a token to learn).

    An example has `text` and `images` for the processor, and `input_ids` and `labels` as the processor makes them.

    Raises:
        PeftcoreError: an image cannot be read, the template does not write it, or it is beyond `max_length` tokens.
    """
    examples: list[Example] = []
    truncated = left_out = 0
    for row in rows:
        found, cut = encoded(row, processor, max_length)
        learned = [example for example in found if any(label != IGNORED for label in example["labels"][1:])]
        examples, truncated, left_out = examples + learned, truncated + cut, left_out + len(found) - len(learned)
    if not examples:
        raise PeftcoreError(f"no answer begins within {max_length} tokens in any conversation. Increase --max-length")
    return examples, truncated, left_out


def encoded(row: Row, processor: Any, max_length: int) -> tuple[list[Example], int]:
    """Return a row's examples, also those that learn nothing within `max_length`, and how many of them were cut.

    Raises:
        PeftcoreError: see `encode`.
    """
    examples, truncated, sizes = [], 0, _sizes(row, processor)
    for part in conversations.texts_and_spans(row, processor.tokenizer):
        example = _example(row, part, sizes, processor)
        ids, labels = example["input_ids"], example["labels"]
        if len(ids) > max_length:
            images = sum(map(len, sizes))
            if not _image_ids(processor).isdisjoint(ids[max_length:]):
                raise PeftcoreError(
                    f"{row.where}: the conversation has {len(ids):,} tokens, {images:,} of them for "
                    f"{len(sizes)} images, which cannot be cut; --max-length is {max_length:,}. Increase it"
                )
            truncated += 1
            example |= {"input_ids": ids[:max_length], "labels": labels[:max_length]}
        examples.append(example)
    return examples, truncated


def _sizes(row: Row, processor: Any) -> list[list[int]]:
    """Return the tokens that the processor puts in the place of each image of a row."""
    if not row.images:
        return []
    texts, images = [processor.image_token] * len(row.images), [[image] for image in _opened(row.images, row.where)]
    found = _prepared(processor, texts, images, add_special_tokens=False)["input_ids"]
    begin = processor.tokenizer.bos_token_id  # Llama 3.2's processor begins every text with it
    return [[id_ for id_ in ids if id_ != begin] for ids in found]


def _example(
    row: Row, part: tuple[str, list[tuple[int, int]], int], sizes: list[list[int]], processor: Any
) -> dict[str, Any]:
    """Return one example of `conversations.texts_and_spans`, with the tokens of its images."""
    text, spans, count = part
    tokenizer = processor.tokenizer
    place = tokenizer.convert_tokens_to_ids(processor.image_token)
    written = list(tokenizer(text, add_special_tokens=False)["input_ids"]).count(place)
    shown = sum(part == PLACE for message in (row.messages or [])[:count] for part in message.get("content", ()))
    if written != shown:
        raise PeftcoreError(
            f"{row.where}: the chat template writes {written} images, and the conversation has {shown}. Pass "
            "one that writes them: --chat-template FILE"
        )
    expanded, images = text, iter(sizes)
    if getattr(processor, "full_image_sequence", None):  # Gemma's, with line ends that join others in a token
        expanded, spans = _expanded(text, spans, processor.image_token, processor.full_image_sequence)
        images = itertools.repeat([place])
    plain = conversations.example(tokenizer, expanded, spans)
    bare = list(tokenizer(expanded, add_special_tokens=False)["input_ids"])
    if len(plain["input_ids"]) > len(bare):  # a template without an end mark
        text, expanded, bare = text + tokenizer.eos_token, expanded + tokenizer.eos_token, plain["input_ids"]
    whole = list(tokenizer(expanded, add_special_tokens=_adds_special(text, tokenizer))["input_ids"])
    front = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    ids, labels = whole[:front], [IGNORED] * front
    for id_, label in zip(bare, plain["labels"], strict=True):
        tokens = next(images) if id_ == place else [id_]
        ids += tokens
        labels += [IGNORED] * len(tokens) if id_ == place else [label]
    rest = whole[front + len(bare) :]
    return {
        "text": text,
        "images": list(row.images[:shown]),
        "input_ids": ids + rest,
        "labels": labels + [IGNORED] * len(rest),
    }


def _expanded(text: str, spans: list[tuple[int, int]], mark: str, written: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text with `written` in the place of each `mark`, and the spans in it."""
    more = len(written) - len(mark)
    moved = [(begin + more * text[:begin].count(mark), end + more * text[:end].count(mark)) for begin, end in spans]
    return text.replace(mark, written), moved


def collate(examples: Sequence[Example], processor: Any) -> dict[str, Any]:
    """Return a batch as the processor makes it, such as `pixel_values`, with `labels` [batch, length].

    Raises:
        PeftcoreError: the processor's tokens depend on the batch.
    """
    texts = [example["text"] for example in examples]
    images = [_opened(example["images"]) for example in examples]
    special = _adds_special(texts[0], processor.tokenizer)
    batch = _prepared(
        processor, texts, images, add_special_tokens=special, padding=True, padding_side="right", return_tensors="pt"
    )
    shape, length = batch["input_ids"].shape, max(len(example["labels"]) for example in examples)
    for row, example in zip(batch["input_ids"].tolist(), examples, strict=True):
        if row[: len(example["input_ids"])] != example["input_ids"]:
            raise PeftcoreError(
                f"{type(processor).__name__} writes other tokens for a conversation in a batch than for it "
                "alone, so the learned part cannot be determined. Use --batch-size 1"
            )
    tensors = {
        name: value[:, :length] if value.shape[:2] == shape and not name.startswith("pixel") else value
        for name, value in batch.items()
    }
    labels = [example["labels"] + [IGNORED] * (length - len(example["labels"])) for example in examples]
    return {**tensors, "labels": torch.tensor(labels)}


def question(row: Row, processor: Any) -> dict[str, Any]:
    """Return a conversation as the inputs of a model that writes its next turn, [1, length].

    Raises:
        PeftcoreError: an image cannot be read, or the template rejects the conversation.
    """
    try:
        text = conversations.rendered(processor.tokenizer, row.messages or [], row.tools, begins_answer=True)
    except PeftcoreError as error:
        raise PeftcoreError(f"{row.where}: {error}") from error
    special = _adds_special(text, processor.tokenizer)
    images = [_opened(row.images, row.where)]
    return _prepared(processor, [text], images, add_special_tokens=special, return_tensors="pt")


def _prepared(processor: Any, texts: list[str], images: list[list[Any]], **options: Any) -> dict[str, Any]:
    """Return what the processor makes of texts with the images of each."""
    try:
        return dict(processor(text=texts, images=images if any(images) else None, **options))
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise PeftcoreError(
            f"{type(processor).__name__} rejects conversations with {list(map(len, images))} images: {str(error)[:400]}"
        ) from error


def _opened(paths: Sequence[str], where: str | None = None) -> list[Any]:
    try:
        return [image_files.opened(path) for path in paths]
    except PeftcoreError as error:
        raise PeftcoreError(f"{where}: {error}" if where else str(error)) from error


def _adds_special(text: str, tokenizer: Any) -> bool:
    """Return whether the tokenizer adds its special tokens, as `ProcessorMixin.apply_chat_template` decides it."""
    return not (tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token))


def _image_ids(processor: Any) -> set[int]:
    """Return the tokens of images, in a chat template's text and in a model's input."""
    tokens = (processor.image_token, getattr(processor.tokenizer, "image_token", None))
    return {processor.tokenizer.convert_tokens_to_ids(token) for token in tokens if token is not None}


def checked(processor: Any, model: str) -> Any:
    """Return the processor of `model`, after its tokenizer has its chat template.

    Raises:
        PeftcoreError: it prepares no images.
    """
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        name = os.path.basename(model)
        raise PeftcoreError(
            f"'{name}' has no processor for texts with images (preprocessor_config.json and a tokenizer). Copy these "
            "files from the model's original folder, or use --task causal-lm for texts"
        )
    if getattr(processor, "image_token", None) is None:
        raise PeftcoreError(
            f"{type(processor).__name__} has no token for images, so the learned part cannot be determined. Use a "
            "model such as SmolVLM, Qwen2.5-VL or LLaVA"
        )
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return processor

"""Base class of tasks on conversations with images or audio. The assistant's turns are learned.

The chat template writes the text, as for conversations without images. The processor replaces each image in the text
with image tokens, or with a single token for cross-attention (Llama 3.2). These tokens are never learned. Images are
decoded batch by batch, so the data set does not have to fit into memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import PreTrainedModel, ProcessorMixin

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import adapter_tokenizer, models
from peftcore_cli.bases.adapter_folders import has_tokenizer
from peftcore_cli.data import audio_files, image_files, image_turns
from peftcore_cli.data.row import Row, naming
from peftcore_cli.tasks import conversations, encoded_examples, mistral_chats, text_generation
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.task import Keys, Task

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask

NAMES = {"image": "images", "audio": "recordings"}  # by the type of a content part
_OF_MEDIA = ("pixel", "input_features", "feature_")  # tensors whose second dimension is not the length
_WINDOW = 30  # maximum length in seconds if the feature extractor has no limit


class MediaChats(Task):
    """Conversations with images or audio in their turns.

    Attributes:
        hears: whether the model takes audio as input.
    """

    keys: ClassVar[Keys] = (("messages",), ("conversations",), ("prompt", "completion"))
    columns_example = "messages=chat"
    has_positions = answers_texts = generates = False
    predicts = examples_count = needs_examples = True
    no_chat = "answers turns with images or audio. Use peftcore predict --data CONVERSATIONS.jsonl"
    hears: ClassVar[bool] = False

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        return image_turns.row_of(location, fields, hears=self.hears)

    def read_question(self, location: str, fields: dict[str, Any], about: AdapterTask) -> Row:
        return image_turns.row_to_answer(location, fields, self.name, hears=self.hears)

    def load_processor(self, model: str, adapter: Path | None = None) -> Any:
        processor = check_processor(models.chat_processor(model, self.name, hears=self.hears), model, hears=self.hears)
        if adapter is not None and has_tokenizer(adapter):
            tokenizer = adapter_tokenizer.load(adapter)
            tokenizer.chat_template = tokenizer.chat_template or processor.tokenizer.chat_template
            processor.tokenizer = tokenizer
        return processor

    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as `text`, `images` and `sounds` for the processor, and its `input_ids` and `labels`.

        Raises:
            PeftcoreError: an image cannot be read, is ignored by the template, or lies beyond `max_length` tokens.
        """
        examples: list[Example] = []
        truncated_count = left_out = 0
        for row in rows:
            row_examples, truncated_examples = encode_row(row, processor, max_length)
            learnable = [
                example for example in row_examples if any(label != IGNORE_INDEX for label in example["labels"][1:])
            ]
            examples += learnable
            truncated_count += truncated_examples
            left_out += len(row_examples) - len(learnable)
        if not examples and not may_be_empty:
            raise PeftcoreError(f"no conversation has an answer within {max_length} tokens. Increase --max-length")
        return Encoded(examples, truncated_count, left_out)

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        return collate(examples, processor)

    def step_of(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        """Return the tensors of the longest example as a batch, which determine the memory of a step."""
        return {"example": collate([max(examples, key=encoded_examples.length)], processor)}

    @torch.no_grad()
    def predict(
        self, model: PreTrainedModel, rows: Sequence[Row], processor: Any, about: AdapterTask, *, answer_tokens: int
    ) -> list[dict[str, Any]]:
        """Return the images and last turn of each conversation, with the model's greedy answer."""
        tokenizer, answers = processor.tokenizer, []
        device = next(model.parameters()).device
        generate: Any = model.generate
        for row in rows:
            inputs = {name: value.to(device) for name, value in question(row, processor).items()}
            tokens = generate(
                **encoded_examples.in_dtype(inputs, model),
                do_sample=False,
                max_new_tokens=answer_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=text_generation.end_tokens(model, tokenizer),
            )
            answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            prompt = "".join(part.get("text", "") for part in (row.messages or [])[-1]["content"])
            answers.append({"images": list(row.images), "prompt": prompt, "answer": answer})
        return answers


def encode_row(row: Row, processor: Any, max_length: int) -> tuple[list[Example], int]:
    """Return the examples of a row, including examples without a token to learn, and the number of truncated examples.

    Raises:
        PeftcoreError: see `encode`.
    """
    examples, truncated_count = [], 0
    for example in _examples(row, processor):
        ids, labels = example["input_ids"], example["labels"]
        if len(ids) > max_length:
            media_ids = _media_token_ids(processor)
            if not media_ids.isdisjoint(ids[max_length:]):
                count = sum(id_ in media_ids for id_ in ids)
                media = {"images": example["images"], "recordings": example["sounds"]}
                shown = " and ".join(f"{len(paths)} {name}" for name, paths in media.items() if paths)
                raise PeftcoreError(
                    f"{row.location}: the conversation has {len(ids):,} tokens ({count:,} for {shown}) and cannot be "
                    f"truncated to --max-length {max_length:,}. Increase --max-length"
                )
            truncated_count += 1
            example |= {"input_ids": ids[:max_length], "labels": labels[:max_length]}
        examples.append(example)
    return examples, truncated_count


def _examples(row: Row, processor: Any) -> list[Example]:
    """Return the examples of a row before truncation."""
    if mistral_chats.is_used_by(processor):
        return mistral_chats.examples(row, processor)
    sizes = _sizes(row, processor)
    return [_example(row, part, sizes, processor) for part in conversations.texts_and_spans(row, processor.tokenizer)]


def _sizes(row: Row, processor: Any) -> dict[str, list[list[int]]]:
    """Return {kind: token ids that the processor inserts for each image or recording of a row}."""
    begin = processor.tokenizer.bos_token_id  # the processor of Llama 3.2 adds this token to every text
    sizes: dict[str, list[list[int]]] = {"image": [], "audio": []}
    for kind, paths in (("image", row.images), ("audio", row.sounds)):
        if not paths:
            continue
        token = getattr(processor, f"{kind}_token", None)
        if token is None:
            raise PeftcoreError(
                f"{row.location}: {type(processor).__name__} does not support {NAMES[kind]}. Use another model"
            )
        images = [[image] for image in _open_images(paths, row.location)] if kind == "image" else [[] for _ in paths]
        sounds = _read_recordings(paths, processor, row.location) if kind == "audio" else []
        token_ids = _process(processor, [token] * len(paths), images, sounds, add_special_tokens=False)["input_ids"]
        sizes[kind] = [[id_ for id_ in ids if id_ != begin] for ids in token_ids]
    return sizes


def _example(
    row: Row, part: tuple[str, list[tuple[int, int]], int], sizes: dict[str, list[list[int]]], processor: Any
) -> dict[str, Any]:
    """Return the example for a result of `conversations.texts_and_spans`, with the tokens of its images and audio."""
    text, _, count = part
    tokenizer = processor.tokenizer
    media_counts = _count_media(row, count)
    marked_text, spans, insertions = _mark_media(row, part, sizes, processor, media_counts)
    plain = conversations.example(tokenizer, marked_text, spans)
    bare_ids = list(tokenizer(marked_text, add_special_tokens=False)["input_ids"])
    if len(plain["input_ids"]) > len(bare_ids):  # the template writes no end-of-turn token
        text, marked_text = text + tokenizer.eos_token, marked_text + tokenizer.eos_token
        bare_ids = plain["input_ids"]
    # The tokenizer may add special tokens before and after the text, which are not learned.
    all_ids = list(tokenizer(marked_text, add_special_tokens=_adds_special(text, tokenizer))["input_ids"])
    starts = range(len(all_ids) - len(bare_ids) + 1)
    front = next((start for start in starts if all_ids[start : start + len(bare_ids)] == bare_ids), 0)
    back_ids = all_ids[front + len(bare_ids) :]
    ids, labels = all_ids[:front], [IGNORE_INDEX] * front
    for id_, label in zip(bare_ids, plain["labels"], strict=True):
        if id_ in insertions:
            tokens = next(insertions[id_])
            ids += tokens
            labels += [IGNORE_INDEX] * len(tokens)
        else:
            ids.append(id_)
            labels.append(label)
    return {
        "text": text,
        "images": list(row.images[: media_counts["image"]]),
        "sounds": list(row.sounds[: media_counts["audio"]]),
        "input_ids": ids + back_ids,
        "labels": labels + [IGNORE_INDEX] * len(back_ids),
    }


def _count_media(row: Row, count: int) -> dict[str, int]:
    """Return the number of images and recordings in the first `count` messages of a row, by kind."""
    parts = _parts_of(row, count)
    return {kind: parts.count({"type": kind}) for kind in NAMES}


def _mark_media(
    row: Row,
    part: tuple[str, list[tuple[int, int]], int],
    sizes: dict[str, list[list[int]]],
    processor: Any,
    media_counts: dict[str, int],
) -> tuple[str, list[tuple[int, int]], dict[int, Iterator[list[int]]]]:
    """Return a text to tokenize, its spans, and {placeholder token: tokens to insert, in order}.

    Raises:
        PeftcoreError: the text does not have one placeholder for each image and recording.
    """
    text, spans, _ = part
    tokenizer = processor.tokenizer
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    insertions: dict[int, Iterator[list[int]]] = {}
    for kind, name in NAMES.items():
        token = getattr(processor, f"{kind}_token", None)
        if token is None:
            continue
        placeholder = tokenizer.convert_tokens_to_ids(token)
        if ids.count(placeholder) != media_counts[kind]:
            raise PeftcoreError(
                f"{row.location}: the chat template writes {ids.count(placeholder)} {name}, but the conversation has "
                f"{media_counts[kind]}. Pass a template that writes all of them: --chat-template FILE"
            )
        insertions[placeholder] = iter(sizes[kind])
        full_sequence = getattr(processor, f"full_{kind}_sequence", None)
        if full_sequence:
            # Gemma's placeholders have line breaks, which merge with adjacent ones into a single token.
            text, spans = _expand_marks(text, spans, token, full_sequence)
            insertions[placeholder] = itertools.repeat([placeholder])
    return text, spans, insertions


def _parts_of(row: Row, count: int) -> list[Any]:
    """Return the content parts in the first `count` messages of a row, in order."""
    return [part for message in (row.messages or [])[:count] for part in message.get("content") or ()]


def _expand_marks(
    text: str, spans: list[tuple[int, int]], mark: str, replacement: str
) -> tuple[str, list[tuple[int, int]]]:
    """Replace each `mark` in the text, and return the text with the shifted spans."""
    growth = len(replacement) - len(mark)
    moved_spans = [
        (begin + growth * text[:begin].count(mark), end + growth * text[:end].count(mark)) for begin, end in spans
    ]
    return text.replace(mark, replacement), moved_spans


def collate(examples: Sequence[Example], processor: Any) -> dict[str, Any]:
    """Return a batch of the processor's tensors, such as `pixel_values`, with `labels` [batch, length].

    Raises:
        PeftcoreError: the processor's tokens depend on the batch.
    """
    if mistral_chats.is_used_by(processor):
        return mistral_chats.collate(examples, processor)
    texts = [example["text"] for example in examples]
    images = [_open_images(example["images"]) for example in examples]
    sounds = _read_recordings([path for example in examples for path in example["sounds"]], processor)
    special = _adds_special(texts[0], processor.tokenizer)
    options = {"add_special_tokens": special, "padding": True, "padding_side": "right", "return_tensors": "pt"}
    batch = _process(processor, texts, images, sounds, **options)
    shape, length = batch["input_ids"].shape, max(len(example["labels"]) for example in examples)
    for row, example in zip(batch["input_ids"].tolist(), examples, strict=True):
        if row[: len(example["input_ids"])] != example["input_ids"]:
            raise PeftcoreError(
                f"{type(processor).__name__} tokenizes a conversation differently in a batch than alone, so the "
                "tokens to learn cannot be located. Use --batch-size 1"
            )
    tensors = {
        name: value[:, :length] if value.shape[:2] == shape and not name.startswith(_OF_MEDIA) else value
        for name, value in batch.items()
    }
    labels = [example["labels"] + [IGNORE_INDEX] * (length - len(example["labels"])) for example in examples]
    return {**tensors, "labels": torch.tensor(labels)}


def question(row: Row, processor: Any) -> dict[str, Any]:
    """Return a conversation as model inputs to generate its next turn, [1, length].

    Raises:
        PeftcoreError: an image cannot be read, or the template rejects the conversation.
    """
    if mistral_chats.is_used_by(processor):
        return mistral_chats.question(row, processor)
    with naming(row.location):
        text = conversations.render(processor.tokenizer, row.messages or [], row.tools, begins_answer=True)
    special = _adds_special(text, processor.tokenizer)
    images, sounds = [_open_images(row.images, row.location)], _read_recordings(row.sounds, processor, row.location)
    return _process(processor, [text], images, sounds, add_special_tokens=special, return_tensors="pt")


def _process(
    processor: Any, texts: list[str], images: list[list[Any]], sounds: list[Any], **options: Any
) -> dict[str, Any]:
    """Run the processor on texts with their images, and with all recordings in order."""
    if any(images):
        options["images"] = images
    if sounds:
        options |= {"audio": sounds, "sampling_rate": processor.feature_extractor.sampling_rate}
    try:
        return dict(processor(text=texts, **options))
    except (ValueError, TypeError, IndexError, KeyError) as error:
        shown = f"{list(map(len, images))} images" + (f" and {len(sounds)} recordings" if sounds else "")
        raise PeftcoreError(
            f"{type(processor).__name__} rejects conversations with {shown}: {str(error)[:400]}"
        ) from error


def _read_recordings(paths: Sequence[str], processor: Any, location: str | None = None) -> list[Any]:
    """Return the samples of recordings at the model's rate, and refuse recordings that are too long for the model."""
    if not paths:
        return []
    extractor = processor.feature_extractor
    longest = int(getattr(extractor, "n_samples", None) or _WINDOW * extractor.sampling_rate)
    with naming(location):
        return [audio_files.samples(path, extractor.sampling_rate, longest) for path in paths]


def _open_images(paths: Sequence[str], location: str | None = None) -> list[Any]:
    with naming(location):
        return [image_files.open_image(path) for path in paths]


def _adds_special(text: str, tokenizer: Any) -> bool:
    """Return whether the tokenizer adds special tokens to a chat, as in `ProcessorMixin.apply_chat_template`."""
    return not (tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token))


def _media_token_ids(processor: Any) -> set[int]:
    """Return the token ids of images and audio, as templates write them and as the model reads them."""
    holders = itertools.product((processor, processor.tokenizer), NAMES)
    tokens = [getattr(holder, f"{kind}_token", None) for holder, kind in holders]
    return {processor.tokenizer.convert_tokens_to_ids(token) for token in tokens if token is not None}


def check_processor(processor: Any, model: str, *, hears: bool = False) -> Any:
    """Return the processor of `model`, with the processor's chat template set on its tokenizer.

    Raises:
        PeftcoreError: the processor does not support images, or audio if `hears` is set.
    """
    if hears:
        return _check_audio_processor(processor, model)
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        name = os.path.basename(model)
        raise PeftcoreError(
            f"'{name}' has no processor for images and text (preprocessor_config.json and a tokenizer). Copy these "
            "files from the model's original folder, or use --task causal-lm for texts"
        )
    if getattr(processor, "image_token", None) is None:
        raise PeftcoreError(
            f"{type(processor).__name__} has no image token, so the tokens to learn cannot be located. Use a model "
            "such as SmolVLM, Qwen2.5-VL or LLaVA"
        )
    return _with_template(processor)


def _check_audio_processor(processor: Any, model: str) -> Any:
    if mistral_chats.is_used_by(processor):
        return mistral_chats.check_processor(processor)
    kind = type(processor).__name__
    if getattr(processor, "feature_extractor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise PeftcoreError(
            f"'{os.path.basename(model)}' has no processor for audio and text, found {kind}. Use a model such as "
            "Qwen2-Audio or Gemma 3n, or --task asr for transcripts"
        )
    writes = getattr(type(processor), "replace_audio_token", None)
    if getattr(processor, "audio_token", None) is None or writes in (None, ProcessorMixin.replace_audio_token):
        raise PeftcoreError(
            f"{kind} does not write audio tokens into the chat, so the tokens to learn cannot be located. Use a "
            "model such as Qwen2-Audio or Gemma 3n"
        )
    return _with_template(processor)


def _with_template(processor: Any) -> Any:
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return processor

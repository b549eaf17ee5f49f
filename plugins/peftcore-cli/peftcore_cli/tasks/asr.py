"""Speech recognition with Whisper models (`--task asr`).

Recordings are decoded batch by batch, so the data set does not have to fit into memory.

The word error rate is the number of substituted, deleted and inserted words, divided by the number of words in the
reference transcripts. Case and punctuation are ignored.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import models
from peftcore_cli.data import audio_files
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.labels import text_of
from peftcore_cli.data.row import Row, naming
from peftcore_cli.tasks import encoded_examples, generations, text_examples
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.evaluation_mode import batched, evaluating
from peftcore_cli.tasks.labelled import missing_key
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Evaluation, Task

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask


class Transcripts(Task):
    """A model that transcribes recordings."""

    name = "asr"
    keys = (("audio", "text"), ("audio", "sentence"), ("audio", "transcription"))
    shown_keys = "audio/text"
    columns_example = "audio=file,text=transcript"
    model_class = "AutoModelForSpeechSeq2Seq"
    needed_model = None
    has_positions = divides_by_tokens = counts_tokens = answers_texts = generates = False
    predicts = True
    options = ("language",)
    figures = ("wer", "perplexity")
    no_chat = "transcribes recordings. Use peftcore predict --data RECORDINGS.jsonl"

    def recognises(self, lines: FirstLines) -> bool:
        return not lines.are_labelled and lines.media is None and any(lines.have(*keys) for keys in self.keys)

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        transcript = text_of(location, keys[1], fields[keys[1]])
        if not transcript.strip():
            raise PeftcoreError(f"{location}: '{keys[1]}' is empty. Remove the row, or add a transcript")
        return Row(location, transcript, audio=audio_files.path_of(location, "audio", fields["audio"]))

    def read_question(self, location: str, fields: dict[str, Any], about: AdapterTask) -> Row:
        if "audio" not in fields:
            raise missing_key(location, fields, "audio", self)
        return Row(location, "", audio=audio_files.path_of(location, "audio", fields["audio"]))

    def load_processor(self, model: str, adapter: Path | None = None) -> Any:
        """Return the processor, with the maximum number of tokens of a transcript as its attribute `longest_text`."""
        processor, config = models.speech_processor(model, self.name, adapter)
        processor.longest_text = int(config.max_target_positions)
        return processor

    def check_config(self, model: str, config: PretrainedConfig) -> None:
        """Raise a PeftcoreError unless the model is a Whisper model."""
        if config.model_type != "whisper":
            raise PeftcoreError(
                f"--task asr needs a Whisper model with its feature extractor and tokenizer, found '{model}' "
                f"({config.model_type}). Use a model such as openai/whisper-small"
            )

    def prepare(self, processor: Any, about: AdapterTask, base: str) -> AdapterTask:
        set_language(processor, about.language, models.load_generation_config(base))
        return about

    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as `audio`, the path of a file, and `labels`, the tokens of the transcript.

        Raises:
            PeftcoreError: a recording cannot be read, or a recording or transcript is too long for the model.
        """
        examples, longest = [], min(max_length, processor.longest_text)
        for row in rows:
            _read(processor, row.audio, row.location)
            tokens = list(processor.tokenizer(str(row.text))["input_ids"])
            if len(tokens) > longest:
                raise PeftcoreError(
                    f"{row.location}: the transcript has {len(tokens):,} tokens, but the limit is {longest:,} "
                    "(--max-length, or the model's positions). Split the recording"
                )
            examples.append({"audio": row.audio, "labels": tokens})
        return Encoded(examples, 0)

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        """Return a batch of `input_features` and `labels` [batch, length].

        The model prepends its start token to the labels, so a start token in the labels is removed.
        """
        start = getattr(processor.tokenizer, "prefix_tokens", [None])[0]
        labels = [example["labels"][1:] if example["labels"][0] == start else example["labels"] for example in examples]
        length = max(map(len, labels))
        labels_tensor = torch.tensor([[*example, *[IGNORE_INDEX] * (length - len(example))] for example in labels])
        return {
            "input_features": features([example["audio"] for example in examples], processor),
            "labels": labels_tensor,
        }

    def answer_count(self, metric: str | None, count: int | None) -> int:
        if generations.is_user_function(metric):
            return super().answer_count(metric, count)
        return generations.DEFAULT_COUNT if count is None else count

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        evaluation: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        """Return the loss over all tokens, and the word error rate on the first examples."""
        loss_metrics = text_examples.measure(model, examples, self, replace(evaluation, longest=None))
        answered_examples = examples[: evaluation.answer_count] if answers else ()
        if not answered_examples:
            return loss_metrics
        processor = evaluation.processor
        references = [
            processor.tokenizer.decode(example["labels"], skip_special_tokens=True) for example in answered_examples
        ]
        longest = max(len(example["labels"]) for example in answered_examples)
        texts = transcribe(
            model,
            [example["audio"] for example in answered_examples],
            processor,
            2 * longest + 16,
            evaluation.batch_size,
        )
        return replace(
            loss_metrics, figures={"wer": word_error_rate(texts, references), "perplexity": loss_metrics.perplexity}
        )

    def tokens_of_step(self, length: int, config: PretrainedConfig) -> int:
        return min(length, int(config.max_target_positions))  # the model cannot generate longer transcripts

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Row], processor: Any, about: AdapterTask, *, answer_tokens: int
    ) -> list[dict[str, Any]]:
        """Return the path of each recording with its transcript."""
        paths = [row.audio for row in rows]
        transcripts = transcribe(model, paths, processor, processor.longest_text)
        return [{"audio": path, "text": text} for path, text in zip(paths, transcripts, strict=True)]


def set_language(processor: Any, language: str | None, generation: Any) -> None:
    """Make the tokenizer begin transcripts with the tokens of `language`.

    Raises:
        PeftcoreError: `language` is missing for a multilingual model, or not supported.
    """
    is_multilingual = getattr(generation, "is_multilingual", None) is True
    if language is None:
        if is_multilingual:
            raise PeftcoreError("this model is multilingual. Pass the language of the recordings: --language english")
        return
    if not is_multilingual or not hasattr(processor.tokenizer, "set_prefix_tokens"):
        raise PeftcoreError(
            f"--language {language} only works with multilingual models, but this model knows one language. Remove "
            "--language"
        )
    try:
        processor.tokenizer.set_prefix_tokens(language=language, task="transcribe")
    except ValueError as error:
        raise PeftcoreError(f"the model does not support --language {language}: {str(error)[:300]}") from error


def _read(processor: Any, path: Any, location: str | None = None) -> Any:
    extractor = processor.feature_extractor
    with naming(location):
        return audio_files.samples(str(path), extractor.sampling_rate, extractor.n_samples)


def features(paths: Sequence[Any], processor: Any) -> Any:
    """Return the model's `input_features` for recordings."""
    extractor = processor.feature_extractor
    arrays = [_read(processor, path) for path in paths]
    return extractor(arrays, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]


def transcribe(model: Any, paths: Sequence[Any], processor: Any, max_new_tokens: int, batch_size: int = 8) -> list[str]:
    """Return the model's greedy transcripts."""
    tokenizer, transcripts = processor.tokenizer, list[str]()
    device = next(model.parameters()).device
    prefix = list(getattr(tokenizer, "prefix_tokens", ())) or [model.config.decoder_start_token_id]
    limit = min(max_new_tokens, processor.longest_text - len(prefix) - 1)
    language = getattr(tokenizer, "language", None)
    is_multilingual = getattr(model.generation_config, "is_multilingual", None) is True
    language_options = {"language": language, "task": "transcribe"} if is_multilingual and language else {}
    with evaluating(model):
        for batch in batched(paths, batch_size):
            inputs = encoded_examples.in_dtype({"input_features": features(batch, processor).to(device)}, model)
            begin = torch.tensor([prefix] * len(batch), device=device)
            tokens = model.generate(
                **inputs, **language_options, decoder_input_ids=begin, do_sample=False, max_new_tokens=limit
            )
            transcripts += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return transcripts


def word_error_rate(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the word error rate of `answers`, or their number of words if the references have none."""
    pairs = [
        (_words(answer_words), _words(reference_words))
        for answer_words, reference_words in zip(answers, references, strict=True)
    ]
    return sum(_distance(answer_words, reference_words) for answer_words, reference_words in pairs) / max(
        1, sum(len(reference_words) for _, reference_words in pairs)
    )


def _words(text: str) -> list[str]:
    """Split a text into words of letters, marks, numbers and inner apostrophes."""
    normalized_text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    letters = "".join(
        character if character == "'" or unicodedata.category(character)[0] in "LMN" else " "
        for character in normalized_text
    )
    words = [word.strip("'") for word in letters.split()]
    return [word for word in words if word]


def _distance(words: list[str], reference: list[str]) -> int:
    """Return the Levenshtein distance between two lists of words."""
    previous = list(range(len(reference) + 1))
    for i, word in enumerate(words, 1):
        row = [i]
        for j, reference_word in enumerate(reference, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (word != reference_word)))
        previous = row
    return previous[-1]

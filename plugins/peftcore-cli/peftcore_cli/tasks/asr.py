"""Recordings and their transcripts (`--task asr`), by models with Whisper's inputs.

Recordings are read batch by batch, so that a data set need not fit into memory.

The word error rate is the number of words to substitute, delete and insert, divided by the number of words of the right
transcripts; case and punctuation are not compared.
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
from peftcore_cli.tasks.conversations import IGNORED
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.evaluation_mode import batched, evaluating
from peftcore_cli.tasks.labelled import missing_key
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Evaluation, Task

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask


class Transcripts(Task):
    """A model that writes what is said in a recording."""

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

    def read_row(self, where: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        said = text_of(where, keys[1], fields[keys[1]])
        if not said.strip():
            raise PeftcoreError(f"{where}: '{keys[1]}' is empty")
        return Row(where, said, audio=audio_files.named(where, "audio", fields["audio"]))

    def read_question(self, where: str, fields: dict[str, Any], about: AdapterTask) -> Row:
        if "audio" not in fields:
            raise missing_key(where, fields, "audio", self)
        return Row(where, "", audio=audio_files.named(where, "audio", fields["audio"]))

    def load_processor(self, model: str, adapter: Path | None = None) -> Any:
        """Return the processor, with the largest number of tokens of a transcript as `longest_text`."""
        processor, config = models.speech_processor(model, self.name, adapter)
        processor.longest_text = int(config.max_target_positions)
        return processor

    def check_config(self, model: str, config: PretrainedConfig) -> None:
        """Raise a PeftcoreError unless the model is of Whisper's kind."""
        if config.model_type != "whisper":
            raise PeftcoreError(
                f"--task asr needs a model of Whisper's kind with its feature extractor and tokenizer, found '{model}' "
                f"({config.model_type}). Use one such as openai/whisper-small"
            )

    def prepared(self, processor: Any, about: AdapterTask, base: str) -> AdapterTask:
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
        """Return rows as `audio`, the path of a file, and `labels`, the tokens of the transcript.

        Raises:
            PeftcoreError: a recording cannot be read or is longer than the model reads, or a transcript is too long.
        """
        examples, longest = [], min(max_length, processor.longest_text)
        for row in rows:
            _read(processor, row.audio, row.where)
            tokens = list(processor.tokenizer(str(row.text))["input_ids"])
            if len(tokens) > longest:
                raise PeftcoreError(
                    f"{row.where}: the transcript has {len(tokens):,} tokens; at most {longest:,} fit (--max-length, "
                    "and the model's limit). Split the recording"
                )
            examples.append({"audio": row.audio, "labels": tokens})
        return Encoded(examples, 0)

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        """Return a batch: `input_features`, and `labels` [batch, length].

        The model puts its start token before the labels, so labels that begin with it are given without it.
        """
        start = getattr(processor.tokenizer, "prefix_tokens", [None])[0]
        labels = [each["labels"][1:] if each["labels"][0] == start else each["labels"] for each in examples]
        length = max(map(len, labels))
        padded = torch.tensor([[*each, *[IGNORED] * (length - len(each))] for each in labels])
        return {"input_features": features([each["audio"] for each in examples], processor), "labels": padded}

    def answered(self, metric: str | None, given: int | None) -> int:
        if generations.is_own(metric):
            return super().answered(metric, given)
        return generations.COUNT if given is None else given

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        how: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        """Return the loss over all tokens, and the word error rate of the first recordings."""
        found = text_examples.measure(model, examples, self, replace(how, longest=None))
        some = examples[: how.answered] if answers else ()
        if not some:
            return found
        processor = how.processor
        wanted = [processor.tokenizer.decode(each["labels"], skip_special_tokens=True) for each in some]
        longest = max(len(each["labels"]) for each in some)
        texts = transcribed(model, [each["audio"] for each in some], processor, 2 * longest + 16, how.batch_size)
        return replace(found, figures={"wer": word_error_rate(texts, wanted), "perplexity": found.perplexity})

    def tokens_of_step(self, length: int, config: PretrainedConfig) -> int:
        return min(length, int(config.max_target_positions))  # a transcript has no more than the model can write

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Row], processor: Any, about: AdapterTask, *, answer_tokens: int
    ) -> list[dict[str, Any]]:
        """Return each recording with its transcript."""
        paths = [row.audio for row in rows]
        found = transcribed(model, paths, processor, processor.longest_text)
        return [{"audio": path, "text": text} for path, text in zip(paths, found, strict=True)]


def set_language(processor: Any, language: str | None, generation: Any) -> None:
    """Make the tokenizer begin transcripts as the model does in `language`.

    Raises:
        PeftcoreError: the model needs a language and none is given, or does not know it.
    """
    several = getattr(generation, "is_multilingual", None) is True
    if language is None:
        if several:
            raise PeftcoreError("this model knows many languages. Pass that of the recordings: --language english")
        return
    if not several or not hasattr(processor.tokenizer, "set_prefix_tokens"):
        raise PeftcoreError(f"this model knows one language only, found --language {language}. Leave it out")
    try:
        processor.tokenizer.set_prefix_tokens(language=language, task="transcribe")
    except ValueError as error:
        raise PeftcoreError(f"--language {language} is not known: {str(error)[:300]}") from error


def _read(processor: Any, path: Any, where: str | None = None) -> Any:
    extractor = processor.feature_extractor
    with naming(where):
        return audio_files.samples(str(path), extractor.sampling_rate, extractor.n_samples)


def features(paths: Sequence[Any], processor: Any) -> Any:
    """Return the inputs of the model for recordings."""
    extractor = processor.feature_extractor
    arrays = [_read(processor, path) for path in paths]
    return extractor(arrays, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]


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
            inputs = encoded_examples.in_dtype({"input_features": features(some, processor).to(device)}, model)
            begin = torch.tensor([prefix] * len(some), device=device)
            tokens = model.generate(**inputs, **how, decoder_input_ids=begin, do_sample=False, max_new_tokens=most)
            found += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return found


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

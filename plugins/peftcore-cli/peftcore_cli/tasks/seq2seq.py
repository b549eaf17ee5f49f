"""Encoder-decoder models such as T5 and BART, trained on sources and targets (`--task seq2seq`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError
from peftcore_cli.data import text_rows
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import generations
from peftcore_cli.tasks.encoded_examples import Encoded
from peftcore_cli.tasks.task import Task


class Seq2Seq(Task):
    """An encoder-decoder model."""

    name = "seq2seq"
    keys = (("source", "target"), ("prompt", "completion"), ("instruction", "output"))
    shown_keys = "source/target"
    columns_example = "source=german,target=english"
    writes = True
    model_class = "AutoModelForSeq2SeqLM"
    needed_model = (
        "an encoder-decoder model such as T5 or BART, found {}. For other models use --task causal-lm, with "
        "prompt/completion"
    )
    peft_task_type = "SEQ_2_SEQ_LM"
    divides_by_tokens = False
    figures = ("perplexity", *generations.FIGURES)
    no_chat = "answers single texts instead of conversations. Use peftcore generate"

    def recognises(self, lines: FirstLines) -> bool:
        return not lines.are_labelled and lines.have("source", "target")

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        return text_rows.plain(location, fields, keys)

    def encode(
        self,
        rows: Sequence[Row],
        processor: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as `input_ids` (source) and `labels` (target), both truncated at the end.

        The model derives the decoder's input from the labels. A target that is not truncated ends with the
        end-of-text token.

        Raises:
            PeftcoreError: a source or a target has no tokens.
        """
        examples, truncated_count = [], 0
        for row in rows:
            source = list(processor(row.text)["input_ids"])
            target = list(processor(text_target=str(row.completion))["input_ids"])
            end = processor.eos_token_id
            if not source or not set(target) - {end}:
                raise PeftcoreError(
                    f"{row.location}: the {('source' if not source else 'target')} has no tokens. Remove the row"
                )
            if end is not None and target[-1] != end:
                target.append(end)
            truncated_count += len(source) > max_length or len(target) > max_length
            examples.append({"input_ids": source[:max_length], "labels": target[:max_length]})
        return Encoded(examples, truncated_count)

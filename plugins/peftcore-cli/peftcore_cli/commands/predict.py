"""`peftcore predict`: the answers of a classifier on new examples, as JSON lines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from peftcore.errors import PeftcoreError
from peftcore_cli import options
from peftcore_cli.console import number, print_answer, say

EXAMPLES = (
    "peftcore predict run -d new.jsonl -o answers.jsonl",
    "peftcore predict run -d photos/",
)


def predict(
    adapter: options.Adapter,
    data: Annotated[
        list[str],
        typer.Option(
            "--data", "-d", help="Examples without labels: a file, a folder of files, an image, a folder of images."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new .jsonl file for the answers; default: print them.")
    ] = None,
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,  # the application reads it
    labels: options.Labels = None,
    columns: options.Columns = None,
    max_length: options.MaxLength = None,
    answer_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of tokens of an answer (image-text, audio-text).")
    ] = 64,
    chat_template: options.ChatTemplate = None,
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Answer new examples with a classifier, a tagger, an image model, a model of conversations with images or pairs.

    A model of pairs writes the vector of each text, of length 1; one of speech the transcript of each recording. The
    answers are a JSON object per example, in order.

    Labels in the data are not read. To measure the adapter on examples with labels, use peftcore eval.
    """
    from peftcore_cli.bases import adapter_folders, base_and_adapter
    from peftcore_cli.data.data_files import parsed_columns
    from peftcore_cli.tasks import conversations, registered

    task = adapter_folders.adapter_task(adapter, labels)
    task = replace(task, max_length=max_length or task.max_length)
    found = registered.find(task.task)
    if not found.predicts:
        raise PeftcoreError(
            f"predict is for classifiers, image-text, audio-text, pairs and asr, found an adapter for {task.task}. Use "
            f"peftcore {'generate --prompt TEXT' if found.generates else 'eval'}"
        )
    if output is not None and output.exists():
        raise PeftcoreError(f"'{output}' exists already. Pass a new file: --output FILE")
    base = adapter_folders.base_of(adapter, model)

    rows = found.read_questions(data, parsed_columns(columns), task)
    processor = found.load_processor(base, adapter)
    task = found.prepared(processor, task, base)
    conversations.set_template(processor, chat_template, task.chat_template)
    loaded = base_and_adapter.load_base(base, task, adapter, quantize=quantize, dtype=dtype, device=device)
    base_and_adapter.load_adapter(loaded, adapter)
    answers = found.predict(loaded, rows, processor, task, answer_tokens=answer_tokens)
    lines = [json.dumps(each, ensure_ascii=False) for each in answers]
    if output is None:
        for line in lines:
            print_answer(line)
        return
    try:
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise PeftcoreError(f"'{output}' cannot be written: {error.strerror or error}") from error
    say(f"{output}: {number(len(lines), 'answer')}")

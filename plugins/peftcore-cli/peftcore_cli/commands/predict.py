"""`peftcore predict`: run an adapter on new examples and write the answers as JSON lines."""

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
            "--data", "-d", help="Examples without labels: a data file, an image, or a folder of data files or images."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New .jsonl file to write the answers to; default: standard output."),
    ] = None,
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,  # `app` reads this option
    labels: options.Labels = None,
    columns: options.Columns = None,
    max_length: options.MaxLength = None,
    answer_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of tokens per answer (image-text, audio-text).")
    ] = 64,
    chat_template: options.ChatTemplate = None,
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Run an adapter on new examples: classification, tagging, image and audio chats, embeddings or transcription.

    The output has one JSON object per example, in order. Models trained on pairs output a unit-length embedding of each
    text, speech models a transcript of each recording.

    Labels in the data are ignored. To measure the adapter on labelled examples, use peftcore eval.
    """
    from peftcore_cli.bases import adapter_folders, base_and_adapter
    from peftcore_cli.data.data_files import parse_columns
    from peftcore_cli.tasks import conversations, registered

    task_record = adapter_folders.adapter_task(adapter, labels)
    task_record = replace(task_record, max_length=max_length or task_record.max_length)
    task = registered.find(task_record.task)
    if not task.predicts:
        raise PeftcoreError(
            f"predict does not support {task.name}, which the adapter in '{adapter}' was trained for. Use peftcore "
            f"{'generate --prompt TEXT' if task.generates else 'eval'}"
        )
    if output is not None and output.exists():
        raise PeftcoreError(f"'{output}' exists already. Pass a new file: --output FILE")
    base = adapter_folders.base_of(adapter, model)

    rows = task.read_questions(data, parse_columns(columns), task_record)
    processor = task.load_processor(base, adapter)
    task_record = task.prepare(processor, task_record, base)
    conversations.set_template(processor, chat_template, task_record.chat_template)
    loaded_model = base_and_adapter.load_base(base, task_record, adapter, quantize=quantize, dtype=dtype, device=device)
    base_and_adapter.load_adapter(loaded_model, adapter)
    answers = task.predict(loaded_model, rows, processor, task_record, answer_tokens=answer_tokens)
    lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    if output is None:
        for line in lines:
            print_answer(line)
        return
    try:
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise PeftcoreError(
            f"cannot write '{output}': {error.strerror or error}. Pass another file: --output FILE"
        ) from error
    say(f"{output}: {number(len(lines), 'answer')}")

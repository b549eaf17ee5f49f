"""`peftcore generate`: answer one prompt with a model and an adapter; a classifier answers with a label."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcore.errors import PeftcoreError
from peftcore_cli import options
from peftcore_cli.console import print_answer, say, warn

EXAMPLES = ('peftcore generate run -p "Is it good?" --compare',)


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text of the prompt.")],
    pair: Annotated[str | None, typer.Option(help="Second text, for classifiers of text pairs.")] = None,
    adapter: options.MaybeAdapter = None,
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,  # `app` reads this option
    chat: Annotated[
        bool | None,
        typer.Option(
            help="Format the prompt with the chat template. By default, only if the adapter was trained on chats."
        ),
    ] = None,
    chat_template: options.ChatTemplate = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also show the base model's answer.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of tokens in the answer.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="X", help="Sampling temperature; 0 means greedy decoding.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    labels: options.Labels = None,
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Answer a prompt with an adapter, a base model, or (with --compare) both."""
    import peftcore
    from peftcore_cli.bases import adapter_folders, base_and_adapter, base_files, models
    from peftcore_cli.tasks import conversations, registered

    _check_options(adapter, model, labels, compare=compare)
    if adapter is None:
        task_record, base = adapter_folders.AdapterTask(registered.default_name(), 512), base_files.resolve(str(model))
    else:
        task_record, base = adapter_folders.adapter_task(adapter, labels), adapter_folders.base_of(adapter, model)
    task = registered.find(task_record.task)
    if not task.generates:
        adapter_folders.refuse_without_prompts(str(adapter), task_record.task)
    if pair is not None and not task.takes_pairs:
        raise PeftcoreError(f"--pair only works with a classifier (the task is {task_record.task}). Remove --pair")
    loaded_model = base_and_adapter.load_base(base, task_record, adapter, quantize=quantize, dtype=dtype, device=device)
    if loaded_model.device.type == "cpu":
        peftcore.fuse(loaded_model)
    tokenizer = models.load_tokenizer(base, adapter)

    conversations.set_template(tokenizer, chat_template, task_record.chat_template)
    if chat is None:
        chat = conversations.has_template(tokenizer) if task_record.chat is None else task_record.chat
        chat = chat and task.no_chat is None

    def answer() -> str:
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        return task.answer(loaded_model, tokenizer, prompt, task_record, chat=bool(chat), pair=pair, **sampling)

    if adapter is None:
        print_answer(answer())
        return
    if compare:
        if base_and_adapter.fit_vocabulary(loaded_model, adapter):
            warn(base_and_adapter.NEW_ROWS)
        say("base:", "bold")
        print_answer(answer().strip() + "\n")
        say("with the adapter:", "bold")
    base_and_adapter.load_adapter(loaded_model, adapter)
    print_answer(answer().strip() if compare else answer())


def _check_options(adapter: Path | None, model: str | None, labels: str | None, *, compare: bool) -> None:
    """Raise a PeftcoreError if the command has neither an adapter nor a model, or an option that needs an adapter."""
    if adapter is not None:
        return
    if model is None:
        raise PeftcoreError(
            "no model was given. Pass an adapter (peftcore generate FOLDER), a model (--model MODEL), or both"
        )
    for option, is_set in (("--compare", compare), ("--labels", labels is not None)):
        if is_set:
            raise PeftcoreError(f"{option} needs an adapter. Pass one, or remove {option}")

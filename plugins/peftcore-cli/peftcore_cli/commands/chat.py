"""`peftcore chat`: talk with a model and its adapters in the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcore.errors import PeftcoreError, nearest
from peftcore_cli import completion, options
from peftcore_cli.console import out, print_answer, say, warn

EXAMPLES = (
    "peftcore chat run",
    "peftcore chat one=run1 two=run2",
)

BASE = "base"
HELP = """/use NAME       answer with this adapter; /use base for the base
/adapters       list the loaded adapters
/system TEXT    set the system message and start again
/reset          start again
/quit           end (also Ctrl-D)"""


def chat(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]ADAPTER",
            autocompletion=completion.adapters,
            help="Folders of adapters or runs of one base; without any, the base answers.",
        ),
    ] = None,
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,  # the application reads it
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of tokens to write.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="X", help="Sampling temperature; 0: greedy decoding.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling, for a temperature above 0.")] = 0,
    chat_template: options.ChatTemplate = None,
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Talk with a model; /help lists the commands of the chat itself.

    Several adapters of one base may be loaded; switch between them with /use NAME.
    """
    import peftcore
    from peftcore_cli.bases import (
        adapter_folders,
        base_and_adapter,
        base_files,
        base_quantization,
        dtype_choice,
        models,
    )
    from peftcore_cli.tasks import conversations, registered

    folders = _named(adapters or [])
    if not folders and model is None:
        raise PeftcoreError(
            "nothing to talk with. Pass an adapter (peftcore chat FOLDER), a model (--model MODEL), or both"
        )
    about = {name: adapter_folders.adapter_task(folder) for name, folder in folders.items()}
    for name, task in about.items():
        why = registered.find(task.task).no_chat
        if why is not None:
            raise PeftcoreError(f"'{folders[name]}' {why}")
    bases = {name: adapter_folders.base_of(folder, model) for name, folder in folders.items()}
    base = next(iter(bases.values()), model)
    other = next((name for name, named in bases.items() if named != base), None)
    if other is not None:
        raise PeftcoreError(
            f"'{other}' was trained on '{bases[other]}', but '{next(iter(bases))}' on '{base}'. Name one base "
            "for all: --model MODEL"
        )
    base = base_files.resolve(str(base))
    wide = any(task.dtype == "fp32" for task in about.values())
    task_name = registered.without_a_name()
    dtype = dtype_choice.of_base(base, task_name, dtype, device, (), "fp32" if wide else None).say()
    base_as = base_quantization.of_adapters(quantize, about)
    loaded = models.load_model(base, task_name, dtype=dtype, device=device, quantize=base_as)
    peftcore.fuse(loaded)
    grown = _fit_vocabulary(loaded, folders)
    for name, folder in folders.items():
        base_and_adapter.load_adapter(loaded, folder, name)
    tokenizers = {name: models.load_tokenizer(base, folder) for name, folder in folders.items()}
    if not grown:  # otherwise the base has no rows for some tokens
        tokenizers[BASE] = models.load_tokenizer(base)
    for name, tokenizer in tokenizers.items():
        own = about[name].chat_template if name in about else None
        first = next((task.chat_template for task in about.values() if task.chat_template), None)
        conversations.set_template(tokenizer, chat_template, own or (first if name == BASE else None))
    start = next(reversed(folders), BASE)
    conversations.rendered(tokenizers[start], [{"role": "user", "content": "."}])  # check that there is one
    talk = Talk(loaded, tokenizers, system, max_new_tokens, temperature, seed)
    talk.use(start)
    say("/help lists the commands; Ctrl-D ends", "dim")
    while (line := _read()) is not None:
        if line.strip() and not talk.hear(line.strip()):
            break


class Talk:
    """A conversation: the messages, and the adapter that answers.

    `tokenizers`: by name, of each adapter and of the base.
    """

    def __init__(
        self,
        model: Any,
        tokenizers: dict[str, Any],
        system: str | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        self.model, self.tokenizers, self.system = model, tokenizers, system
        self.tokenizer = next(iter(tokenizers.values()))
        self.how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        self.reset()

    def reset(self) -> None:
        """Forget the messages."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def use(self, name: str) -> None:
        """Switch to the adapter `name`, or to the base."""
        import peftcore

        if name not in self.tokenizers:
            there = list(self.tokenizers)
            why = f"no adapter '{name}' is loaded{nearest(name, there)}"
            if name == BASE:
                why = "the base has no rows for the new tokens of the adapter's vocabulary"
            warn(f"{why}. Loaded: {', '.join(there)}")
            return
        if self.tokenizers.keys() != {BASE}:
            peftcore.activate(self.model, [] if name == BASE else name)
        self.model.eval()
        self.tokenizer = self.tokenizers[name]
        say(f"{name} answers", "dim")

    def hear(self, line: str) -> bool:
        """Answer a message, or run a command that begins with a slash; return False to end."""
        command, _, rest = line.partition(" ")
        if not command.startswith("/"):
            self.answer(line)
        elif command == "/quit":
            return False
        elif command == "/use":
            self.use(rest.strip())
        elif command == "/adapters":
            say(", ".join(self.tokenizers))
        elif command == "/system":
            self.system = rest.strip() or None
            self.reset()
        elif command == "/reset":
            self.reset()
        else:
            say(HELP)
        return True

    def answer(self, text: str) -> None:
        from transformers import TextStreamer

        from peftcore_cli.tasks import text_generation

        class Printed(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                print_answer(text, end="\n" if stream_end else "")

        streamer = Printed(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = text_generation.generate_text(self.model, self.tokenizer, asked, streamer=streamer, **self.how)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            say("\n(stopped; the last message is forgotten)", "dim")
            return
        except PeftcoreError as error:
            warn(str(error))
            return
        self.messages = [*asked, {"role": "assistant", "content": answer}]


def _fit_vocabulary(model: Any, folders: dict[str, Path]) -> bool:
    """Resize the model's vocabulary for all adapters. Return whether it differs from the base's."""
    from peftcore.files import vocabulary_rows
    from peftcore_cli.bases import base_and_adapter

    before = base_and_adapter.vocabulary(model)
    wanted = {name: vocabulary_rows(model, folder) or before for name, folder in folders.items()}
    if len(set(wanted.values())) > 1:
        which = ", ".join(f"'{name}' {rows}" for name, rows in wanted.items())
        raise PeftcoreError(f"these adapters have different vocabularies: {which} tokens. Load one at a time")
    return any([base_and_adapter.fit_vocabulary(model, folder) for folder in folders.values()])


def _named(texts: list[str]) -> dict[str, Path]:
    """Return folders by name: the given name, or the last part of the path."""
    from peftcore_cli.bases.adapter_folders import adapter_folder

    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        is_named = bool(equals) and not os.path.exists(text)
        where = Path(path if is_named else text)
        name = name if is_named else where.resolve().name
        if name in folders or name == BASE:
            raise PeftcoreError(f"two adapters have the name '{name}'. Name them: NAME=FOLDER")
        folders[name] = adapter_folder(where)
    return folders


def _read() -> str | None:
    """Return what the user types; None at the end."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        out.print()
        return None

"""`peftcore chat`: chat with a model and its adapters in the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcore.errors import PeftcoreError, nearest
from peftcore_cli import completion, options
from peftcore_cli.console import out, print_answer, say, warn

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask

EXAMPLES = (
    "peftcore chat run",
    "peftcore chat one=run1 two=run2",
)

BASE = "base"
HELP = (
    "/use NAME       switch to this adapter, or to the base (/use base)\n/adapters       list the loaded "
    "adapters\n/system TEXT    set the system message and start again\n/reset          start again\n/quit           "
    "end the chat (also Ctrl-D)"
)


def chat(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]ADAPTER",
            autocompletion=completion.adapters,
            help="Folders of adapters or runs that share a base; default: chat with the base alone.",
        ),
    ] = None,
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,  # `app` reads this option
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of tokens per answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="X", help="Sampling temperature; 0 means greedy decoding.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    chat_template: options.ChatTemplate = None,
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Chat with a model; inside the chat, /help lists its commands.

    You can load several adapters of one base and switch between them with /use NAME.
    """
    import peftcore
    from peftcore_cli.bases import base_and_adapter, base_files, base_quantization, dtype_choice, models
    from peftcore_cli.tasks import conversations, registered

    folders = _folders_by_name(adapters or [])
    if not folders and model is None:
        raise PeftcoreError(
            "nothing to chat with. Pass an adapter (peftcore chat FOLDER), a model (--model MODEL), or both"
        )
    about = _adapter_tasks(folders)
    base = base_files.resolve(_common_base(folders, model))
    any_fp32 = any(task.dtype == "fp32" for task in about.values())
    task_name = registered.default_name()
    dtype = dtype_choice.choose_for_inference(base, task_name, dtype, device, (), "fp32" if any_fp32 else None).report()
    base_as = base_quantization.of_adapters(quantize, about)
    loaded_model = models.load_model(base, task_name, dtype=dtype, device=device, quantize=base_as)
    if loaded_model.device.type == "cpu":
        peftcore.fuse(loaded_model)
    is_resized = _fit_vocabulary(loaded_model, folders)
    for name, folder in folders.items():
        base_and_adapter.load_adapter(loaded_model, folder, name)
    tokenizers = {name: models.load_tokenizer(base, folder) for name, folder in folders.items()}
    for name, tokenizer in tokenizers.items():
        conversations.set_template(tokenizer, chat_template, about[name].chat_template)
    if not is_resized:  # the base alone cannot answer, because its new rows are untrained
        tokenizers[BASE] = models.load_tokenizer(base)
        templates = [task.chat_template for task in about.values() if task.chat_template]
        conversations.set_template(tokenizers[BASE], chat_template, templates[0] if templates else None)
    start = next(reversed(folders), BASE)
    conversations.render(tokenizers[start], [{"role": "user", "content": "."}])  # raises without a template
    session = ChatSession(loaded_model, tokenizers, system, max_new_tokens, temperature, seed)
    session.use(start)
    say("Type /help for commands, Ctrl-D to end", "dim")
    while (line := _read()) is not None:
        if line.strip() and not session.handle(line.strip()):
            break


def _adapter_tasks(folders: dict[str, Path]) -> dict[str, AdapterTask]:
    """Return the task of each adapter.

    Raises:
        PeftcoreError: an adapter is for a task that cannot chat.
    """
    from peftcore_cli.bases import adapter_folders
    from peftcore_cli.tasks import registered

    about = {name: adapter_folders.adapter_task(folder) for name, folder in folders.items()}
    for name, task in about.items():
        reason = registered.find(task.task).no_chat
        if reason is not None:
            raise PeftcoreError(f"'{folders[name]}' {reason}")
    return about


def _common_base(folders: dict[str, Path], model: str | None) -> str:
    """Return `model`, or by default the base that all adapters were trained on.

    Raises:
        PeftcoreError: the adapters were trained on different bases.
    """
    from peftcore_cli.bases import adapter_folders

    bases = {name: adapter_folders.base_of(folder, model) for name, folder in folders.items()}
    if not bases:
        return str(model)
    first_name, base = next(iter(bases.items()))
    for name, other_base in bases.items():
        if other_base != base:
            raise PeftcoreError(
                f"the adapter '{name}' was trained on '{other_base}', but '{first_name}' on '{base}'. Pass one base "
                "for all adapters: --model MODEL"
            )
    return base


class ChatSession:
    """A conversation with the base or one of the adapters.

    `tokenizers`: the tokenizer of each adapter and of the base, by name.
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
        self.sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def use(self, name: str) -> None:
        """Switch to the adapter `name`, or to the base."""
        import peftcore

        if name not in self.tokenizers:
            names = list(self.tokenizers)
            reason = f"no adapter '{name}' is loaded{nearest(name, names)}"
            if name == BASE:
                reason = "the base has no embeddings for the new tokens of the adapter's vocabulary"
            warn(f"{reason}. Loaded: {', '.join(names)}")
            return
        if self.tokenizers.keys() != {BASE}:
            peftcore.activate(self.model, [] if name == BASE else name)
        self.model.eval()
        self.tokenizer = self.tokenizers[name]
        say(f"{name} answers", "dim")

    def handle(self, line: str) -> bool:
        """Answer a message or run a slash command; return False to end the chat."""
        command, _, argument = line.partition(" ")
        if not command.startswith("/"):
            self.answer(line)
        elif command == "/quit":
            return False
        elif command == "/use":
            self.use(argument.strip())
        elif command == "/adapters":
            say(", ".join(self.tokenizers))
        elif command == "/system":
            self.system = argument.strip() or None
            self.reset()
        elif command == "/reset":
            self.reset()
        else:
            say(HELP)
        return True

    def answer(self, text: str) -> None:
        from transformers import TextStreamer

        from peftcore_cli.tasks import text_generation

        class PrintingStreamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                print_answer(text, end="\n" if stream_end else "")

        streamer = PrintingStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = text_generation.generate_text(
                self.model, self.tokenizer, messages, streamer=streamer, **self.sampling
            )
        except KeyboardInterrupt:
            say("\n(stopped; the last message was dropped)", "dim")
            return
        except PeftcoreError as error:
            warn(str(error))
            return
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def _fit_vocabulary(model: Any, folders: dict[str, Path]) -> bool:
    """Resize the model's vocabulary for the adapters, and return whether the size changed."""
    from peftcore.files import vocabulary_rows
    from peftcore_cli.bases import base_and_adapter

    base_rows = base_and_adapter.vocabulary(model)
    sizes = {name: vocabulary_rows(model, folder) or base_rows for name, folder in folders.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"'{name}' {rows}" for name, rows in sizes.items())
        raise PeftcoreError(f"the adapters have vocabularies of different sizes: {shown} tokens. Load one at a time")
    return any([base_and_adapter.fit_vocabulary(model, folder) for folder in folders.values()])


def _folders_by_name(texts: list[str]) -> dict[str, Path]:
    """Parse [NAME=]ADAPTER arguments; the default name is the last part of the path."""
    from peftcore_cli.bases.adapter_folders import adapter_folder

    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        is_named = bool(equals) and not os.path.exists(text)
        folder = Path(path if is_named else text)
        name = name if is_named else folder.resolve().name
        if name in folders or name == BASE:
            raise PeftcoreError(f"two adapters have the name '{name}'. Give each a name: NAME=FOLDER")
        folders[name] = adapter_folder(folder)
    return folders


def _read() -> str | None:
    """Return the next line of input, or None at its end."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        out.print()
        return None

"""Conversations as tokens, by the tokenizer's chat template; the assistant's turns are learned.

A turn is found by difference: what the conversation including the turn adds to the conversation before it, with the
generation prompt that the template writes (`add_generation_prompt`). So what is learned is what the model has to write,
including the mark that ends its turn. If a template changes earlier turns once later ones follow (Qwen3 removes their
thinking), each turn becomes an example, as it is when the model answers.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from peftcore.errors import PeftcoreError
from peftcore_cli.data.row import Messages, Row, naming

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML}
MISTRAL = "MistralCommonBackend"  # the class of tokenizers that have no chat template, mistral-common's
IGNORED = -100  # label that the loss ignores


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor of texts with other inputs, or the tokenizer itself."""
    found: PreTrainedTokenizerBase = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    return found


def set_template(processor: Any, template: str | None, of_adapter: str | None = None) -> None:
    """Set the tokenizer's chat template.

    Args:
        processor: the tokenizer, or a processor with one.
        template: the user's: `chatml`, a file with a template, or its text.
        of_adapter: the adapter's, used if the user gives none: `chatml`, or text.

    Raises:
        PeftcoreError: the file does not exist, or the tokenizer has no templates.
    """
    tokenizer = tokenizer_of(processor)
    if template is not None and type(tokenizer).__name__ == MISTRAL:
        raise PeftcoreError(
            "--chat-template needs a tokenizer with templates, and this model's is mistral-common's, which has none. "
            "Remove the option"
        )
    if template is None or template == of_adapter:
        if of_adapter is not None:
            tokenizer.chat_template = BUILT_IN.get(of_adapter, of_adapter)
        return
    if template in BUILT_IN:
        template = BUILT_IN[template]
    elif "{" not in template:
        try:
            template = Path(os.path.expanduser(template)).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PeftcoreError(
                f"--chat-template '{template}' cannot be read: {error}. Pass a file, or chatml"
            ) from error
    tokenizer.chat_template = template


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Any = None, *, begins_answer: bool = False
) -> str:
    """Return the text that the template makes of a conversation, with a generation prompt if `begins_answer`.

    transformers renders it in Jinja's sandbox: it reads no file and reaches no Python code, but it may loop.

    Raises:
        PeftcoreError: there is no template, or it rejects the conversation.
    """
    if type(tokenizer).__name__ == MISTRAL:
        raise PeftcoreError(
            "the tokenizer is mistral-common's, which has no chat template to turn messages into text. Add "
            "tokenizer.json and tokenizer_config.json of transformers to the model's folder, or pass prompt and "
            "completion"
        )
    if not has_template(tokenizer):
        name = os.path.basename(str(tokenizer.name_or_path))
        raise PeftcoreError(
            f"the tokenizer of '{name}' has no chat template to turn messages into text. Pass one: "
            "--chat-template chatml, or a file"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=begins_answer)
        text = str(text)
        text.encode()
    except UnicodeEncodeError as error:
        raise PeftcoreError(
            "the chat template writes half a surrogate pair, which is not text. Pass another: --chat-template chatml"
        ) from error
    except RecursionError as error:
        raise PeftcoreError("the chat template is nested too deeply. Pass another: --chat-template chatml") from error
    except Exception as error:  # a template may raise anything
        reason = str(error)[:400] or type(error).__name__
        raise PeftcoreError(
            f"the chat template rejects the conversation: {reason}. Pass another: --chat-template chatml, or a file"
        ) from error
    return text


def encode(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return a conversation as `input_ids` and `labels`, in one example, or one for each turn.

    Raises:
        PeftcoreError: the template rejects it, or turns cannot be separated from what came before.
    """
    return [example(tokenizer, text, spans) for text, spans, _ in texts_and_spans(row, tokenizer)]


def texts_and_spans(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[tuple[int, int]], int]]:
    """Return (text, spans of characters that are learned, number of messages in the text) of each example.

    Raises:
        PeftcoreError: the template rejects it, or turns cannot be separated from what came before.
    """
    messages = row.messages or []
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= row.learned_from]
    turns = [i for i in turns if i not in row.not_learned]
    with naming(row.where):
        whole = rendered(tokenizer, messages, row.tools)
        _refuse_what_vanishes(tokenizer, row, whole)
        spans = [_span(tokenizer, row, turn) for turn in turns]
    if all(whole.startswith(text) for text, _ in spans):
        return [(whole, [(begin, len(text)) for text, begin in spans], len(messages))]
    return [(text, [(begin, len(text))], turn + 1) for turn, (text, begin) in zip(turns, spans, strict=True)]


def _refuse_what_vanishes(tokenizer: PreTrainedTokenizerBase, row: Row, whole: str) -> None:
    """Raise a PeftcoreError if `whole`, the template's text, lacks the tools or a tool call."""
    messages = row.messages or []
    if row.tools and rendered(tokenizer, messages) == whole:
        raise PeftcoreError(
            "the chat template does not write the tools. Pass one that does: --chat-template FILE; or remove 'tools'"
        )
    for index, message in enumerate(messages):
        if not message.get("tool_calls"):
            continue
        without = {"content": "", **{name: value for name, value in message.items() if name != "tool_calls"}}
        if rendered(tokenizer, [*messages[:index], without, *messages[index + 1 :]], row.tools) == whole:
            raise PeftcoreError(
                f"the chat template does not write the tool_calls of messages[{index}]. Pass one that does: "
                "--chat-template FILE; or write the calls as content"
            )


def _span(tokenizer: PreTrainedTokenizerBase, row: Row, turn: int) -> tuple[str, int]:
    """Return (conversation up to and including `turn`, index in it where the turn begins)."""
    messages = row.messages or []
    if turn == 0:
        raise PeftcoreError("the first turn is the assistant's. Start with a turn of the user or the system")
    text = rendered(tokenizer, messages[: turn + 1], row.tools)
    before = rendered(tokenizer, messages[:turn], row.tools, begins_answer=True)
    begin = next((i for i, (one, other) in enumerate(zip(text, before, strict=False)) if one != other), len(before))
    begin = min(begin, len(text))
    if begin < len(before) and begin < len(rendered(tokenizer, messages[:turn], row.tools)):
        raise PeftcoreError(
            f"the chat template changes what came before messages[{turn}] when that turn follows, so the learned "
            "part cannot be determined. Pass another: --chat-template chatml, or a file"
        )
    return text, begin


def example(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]) -> dict[str, Any]:
    """Return tokens of `text`, of which those in the spans are learned, up to the mark that ends each turn."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = list(encoded["input_ids"]), [begin for begin, _ in encoded["offset_mapping"]]
    else:  # in pieces, so that no token spans two
        ids, places, edges = [], [], sorted({0, len(text), *(edge for span in spans for edge in span)})
        for begin, end in itertools.pairwise(edges):
            piece = tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
            ids, places = ids + list(piece), places + [begin] * len(piece)
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {*tokenizer.all_special_ids, *special, tokenizer.eos_token_id}
    labels = [IGNORED] * len(ids)
    for begin, end in spans:
        inside = [i for i, place in enumerate(places) if begin <= place < end]
        marks = [i for i in inside if ids[i] in ends]
        for i in inside:
            if not marks or i <= marks[-1]:
                labels[i] = ids[i]
        if not marks and end == len(text) and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)  # a template without an end mark: the model must learn to stop
            labels.append(tokenizer.eos_token_id)
    return {"input_ids": ids, "labels": labels}

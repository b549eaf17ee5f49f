"""Encode conversations with the tokenizer's chat template. The assistant's turns are learned.

A turn is located by rendering the conversation twice: up to and including the turn, and up to the generation prompt
before it (`add_generation_prompt`). The difference is the text of the turn. The learned tokens are thus exactly the
tokens that the model has to generate, including the end-of-turn token. Some templates change earlier turns when later
turns follow (Qwen3 removes their thinking). Then each turn becomes an example of its own, with the text that the model
sees when it answers.
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
MISTRAL = "MistralCommonBackend"  # class of mistral-common's tokenizers, which have no chat template
IGNORE_INDEX = -100  # label that the loss ignores


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a multimodal processor, or the tokenizer itself."""
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    return tokenizer


def set_template(processor: Any, template: str | None, of_adapter: str | None = None) -> None:
    """Set the tokenizer's chat template.

    Args:
        processor: the tokenizer, or a processor with one.
        template: the user's template: `chatml`, a file, or text.
        of_adapter: the adapter's template, the default of `template`: `chatml` or text.

    Raises:
        PeftcoreError: the file does not exist, or the tokenizer has no templates.
    """
    tokenizer = tokenizer_of(processor)
    if template is not None and type(tokenizer).__name__ == MISTRAL:
        raise PeftcoreError(
            "--chat-template does not work with mistral-common's tokenizer, which has no templates. Remove "
            "--chat-template"
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
            raise PeftcoreError(f"cannot read --chat-template '{template}': {error}. Pass a file, or chatml") from error
    tokenizer.chat_template = template


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Any = None, *, begins_answer: bool = False
) -> str:
    """Render a conversation with the chat template, followed by a generation prompt if `begins_answer` is set.

    transformers renders templates in Jinja's sandbox: they cannot read files or call Python code, but they can loop
    forever.

    Raises:
        PeftcoreError: there is no template, or the template rejects the conversation.
    """
    if type(tokenizer).__name__ == MISTRAL:
        raise PeftcoreError(
            "mistral-common's tokenizer has no chat template to format messages with. Add tokenizer.json and "
            "tokenizer_config.json in transformers' format to the model's folder, or use examples with prompt and "
            "completion"
        )
    if not has_template(tokenizer):
        name = os.path.basename(str(tokenizer.name_or_path))
        raise PeftcoreError(
            f"the tokenizer of '{name}' has no chat template to format messages with. Pass one: --chat-template "
            "chatml, or a file"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=begins_answer)
        text = str(text)
        text.encode()
    except UnicodeEncodeError as error:
        raise PeftcoreError(
            "the chat template writes an unpaired surrogate, which is not valid Unicode. Pass another template: "
            "--chat-template chatml"
        ) from error
    except RecursionError as error:
        raise PeftcoreError(
            "the chat template is nested too deeply. Pass another template: --chat-template chatml"
        ) from error
    except Exception as error:  # a template may raise any exception
        reason = str(error)[:400] or type(error).__name__
        raise PeftcoreError(
            f"the chat template rejects the conversation: {reason}. Pass another template: --chat-template chatml, "
            "or a file"
        ) from error
    return text


def encode(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Encode a conversation as `input_ids` and `labels`, in one example, or in one example per turn.

    Raises:
        PeftcoreError: the template rejects it, or turns cannot be separated from what came before.
    """
    return [example(tokenizer, text, spans) for text, spans, _ in texts_and_spans(row, tokenizer)]


def texts_and_spans(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[tuple[int, int]], int]]:
    """Return (text, learned spans of characters, number of messages in the text) for each example.

    Raises:
        PeftcoreError: the template rejects it, or turns cannot be separated from what came before.
    """
    messages = row.messages or []
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= row.learned_from]
    turns = [i for i in turns if i not in row.not_learned]
    with naming(row.location):
        full_text = render(tokenizer, messages, row.tools)
        _refuse_what_vanishes(tokenizer, row, full_text)
        spans = [_span(tokenizer, row, turn) for turn in turns]
    if all(full_text.startswith(text) for text, _ in spans):
        return [(full_text, [(begin, len(text)) for text, begin in spans], len(messages))]
    return [(text, [(begin, len(text))], turn + 1) for turn, (text, begin) in zip(turns, spans, strict=True)]


def _refuse_what_vanishes(tokenizer: PreTrainedTokenizerBase, row: Row, full_text: str) -> None:
    """Raise a PeftcoreError if `full_text` does not contain the tools or a tool call."""
    messages = row.messages or []
    if row.tools and render(tokenizer, messages) == full_text:
        raise PeftcoreError(
            "the chat template ignores tools. Pass a template that writes them (--chat-template FILE), or remove "
            "'tools'"
        )
    for index, message in enumerate(messages):
        if not message.get("tool_calls"):
            continue
        message_without_calls = {"content": "", **message}
        del message_without_calls["tool_calls"]
        messages_without_calls = [*messages[:index], message_without_calls, *messages[index + 1 :]]
        if render(tokenizer, messages_without_calls, row.tools) == full_text:
            raise PeftcoreError(
                f"the chat template ignores the tool_calls of messages[{index}]. Pass a template that writes them "
                "(--chat-template FILE), or write the calls as content"
            )


def _span(tokenizer: PreTrainedTokenizerBase, row: Row, turn: int) -> tuple[str, int]:
    """Return (text up to and including `turn`, index of the turn's first character)."""
    messages = row.messages or []
    if turn == 0:
        raise PeftcoreError("the conversation starts with an assistant turn. Start with a user or system turn")
    text = render(tokenizer, messages[: turn + 1], row.tools)
    prefix = render(tokenizer, messages[:turn], row.tools, begins_answer=True)
    common_length = min(len(text), len(prefix))
    begin = next((i for i in range(common_length) if text[i] != prefix[i]), common_length)
    if begin < len(prefix) and begin < len(render(tokenizer, messages[:turn], row.tools)):
        raise PeftcoreError(
            f"the chat template rewrites earlier turns when messages[{turn}] is added, so the tokens to learn cannot "
            "be located. Pass another template: --chat-template chatml, or a file"
        )
    return text, begin


def example(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]) -> dict[str, Any]:
    """Tokenize `text`. The tokens in each span are learned, up to its end-of-turn token."""
    ids, offsets = _tokens_with_offsets(tokenizer, text, spans)
    special_ids = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    end_tokens = {*tokenizer.all_special_ids, *special_ids, tokenizer.eos_token_id}
    labels = [IGNORE_INDEX] * len(ids)
    for begin, end in spans:
        indices = [i for i, offset in enumerate(offsets) if begin <= offset < end]
        end_indices = [i for i in indices if ids[i] in end_tokens]
        for i in indices:
            if not end_indices or i <= end_indices[-1]:
                labels[i] = ids[i]
        if not end_indices and end == len(text) and tokenizer.eos_token_id is not None:
            # The template writes no end-of-turn token, but the model must learn to stop.
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
    return {"input_ids": ids, "labels": labels}


def _tokens_with_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Return the tokens of `text`, and the index of the character where each token starts."""
    if tokenizer.is_fast:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoding["input_ids"]), [begin for begin, _ in encoding["offset_mapping"]]
    # Tokenize the pieces separately, so that no token crosses the boundary of a span.
    edges = sorted({0, len(text), *itertools.chain.from_iterable(spans)})
    ids: list[int] = []
    offsets: list[int] = []
    for begin, end in itertools.pairwise(edges):
        piece = list(tokenizer(text[begin:end], add_special_tokens=False)["input_ids"])
        ids += piece
        offsets += [begin] * len(piece)
    return ids, offsets

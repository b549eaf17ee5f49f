"""OpenAI's protocol: validated requests, errors, and the bodies of answers."""

from __future__ import annotations

import itertools
import math
import time
import uuid
from collections.abc import Callable, Container, Mapping, Sequence as Several
from dataclasses import dataclass, replace
from typing import Any

from peftcore.plugin import nearest
from peftcore_serve.sequence import Piece, Sampling, TokenLogprob

SEQUENCES = 256  # maximum number of answers to a request: prompts times n
COMPLETION_TOKENS = 16  # the protocol's default
_SEEDS = 1 << 63
_TOKENS = (1 << 31) - 1  # maximum number of tokens of an answer
_MIN_TEMPERATURE = 1e-5  # lowest temperature above 0
_WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Unsupported fields, and the values at which they have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    "verbosity": (),
    "echo": (False,),
}
_SHARED = ("model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "logprobs")
_COMPLETION = (*_SHARED, "prompt", "best_of", "echo")
_CHAT = (*_SHARED, "messages", "max_completion_tokens", "top_logprobs")
_COMPLETION_TOP, _CHAT_TOP = 5, 20
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ProtocolError(Exception):
    """An error in the format of the protocol.

    Args:
        message: the problem, and what to do.
        status: HTTP status.
        param: name of the invalid field.
        code: the protocol's error code.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Request:
    """A checked request.

    Args:
        model: name of the base model or of an adapter.
        prompts: texts, lists of tokens, or conversations. Each prompt gets `n` answers.
        n: number of answers to each prompt.
        sampling: sampling settings. `max_tokens` is 0 if the request sets no limit.
        stop: texts that end an answer.
        stream: whether to stream answers.
        include_usage: whether to end the stream with the token counts.
        is_chat: whether the prompt is a conversation.
        echo: whether to begin each answer with its prompt, including the prompt's log probabilities if they are
            requested.
    """

    model: str
    prompts: list[Any]
    n: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    is_chat: bool
    echo: bool = False


def completion(body: Any) -> Request:
    """Read the body of `/v1/completions`.

    Raises:
        ProtocolError: a field is missing, unknown, wrong or not supported.
    """
    fields = _fields(body, _COMPLETION)
    prompt = fields.get("prompt")
    if prompt is None:
        raise ProtocolError("'prompt' is missing. Pass a text, or a list of texts", param="prompt")
    if not (isinstance(prompt, str) or (isinstance(prompt, list) and prompt)):
        raise _wrong("prompt", "a text, a list of texts, or lists of tokens", prompt)
    is_list = isinstance(prompt, list) and not _is_token(prompt[0])
    prompts: list[Any] = prompt if is_list else [prompt]  # type: ignore[assignment]
    for item in prompts:
        is_tokens = isinstance(item, list) and item and all(_is_token(token) for token in item)
        if not (isinstance(item, str) or is_tokens):
            raise _wrong("prompt", "a text, a list of texts, or lists of tokens", item)
    logprobs, echo = _integer(fields, "logprobs", 0, _COMPLETION_TOP), _flag(fields, "echo")
    max_tokens = _integer(fields, "max_tokens", 0 if echo else 1, _TOKENS)
    max_tokens = COMPLETION_TOKENS if max_tokens is None else max_tokens
    request = replace(_request(fields, prompts, max_tokens, logprobs, is_chat=False), echo=echo)
    if fields.get("best_of") not in (None, request.n):
        raise ProtocolError("best_of is not supported. Remove the field, or set n", param="best_of")
    return request


def chat(body: Any) -> Request:
    """Read the body of `/v1/chat/completions`; see `completion`."""
    fields = _fields(body, _CHAT)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list of at least one message", messages)
    conversation = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    wants_logprobs, top = _flag(fields, "logprobs"), _integer(fields, "top_logprobs", 0, _CHAT_TOP)
    if top is not None and not wants_logprobs:
        raise ProtocolError("top_logprobs needs logprobs: true. Add it, or remove top_logprobs", param="top_logprobs")
    limits = [_integer(fields, name, 1, _TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    return _request(
        fields, [conversation], limits[0] or limits[1] or 0, (top or 0) if wants_logprobs else None, is_chat=True
    )


def _request(
    fields: Mapping[str, Any], prompts: list[Any], max_tokens: int, logprobs: int | None, *, is_chat: bool
) -> Request:
    model, stop = fields.get("model"), fields.get("stop")
    if not isinstance(model, str):
        raise _wrong("model", "the name of a model; GET /v1/models lists them", model)
    if stop is None:
        stop = []
    elif isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
        raise _wrong("stop", "a non-empty text, or a list of at most 4", stop)
    n, stream = _integer(fields, "n", 1, SEQUENCES) or 1, _flag(fields, "stream")
    if n * len(prompts) > SEQUENCES:
        raise ProtocolError(
            f"the request asks for {n * len(prompts):,} answers, but the limit is {SEQUENCES}. Lower n, or send "
            "several requests",
            param="n",
        )
    options = fields.get("stream_options")
    if options is not None and not (isinstance(options, dict) and options.keys() <= {"include_usage"} and stream):
        raise _wrong("stream_options", 'such as {"include_usage": true}, with stream: true', options)
    temperature = _number(fields, "temperature", 0, 2)
    if 0 < temperature < _MIN_TEMPERATURE:
        raise _wrong(
            "temperature", f"0, for the most likely tokens, or a number from {_MIN_TEMPERATURE:g} to 2", temperature
        )
    sampling = Sampling(
        max_tokens,
        temperature,
        _number(fields, "top_p", 0, 1),
        _integer(fields, "seed", -_SEEDS, _SEEDS - 1),
        logprobs,
    )
    usage = _flag(options or {}, "include_usage")
    return Request(model, prompts, n, sampling, tuple(stop), stream, usage, is_chat)


def _fields(body: Any, names: Several[str]) -> dict[str, Any]:
    """Return the fields that have a value, and refuse unknown and unsupported fields."""
    if not isinstance(body, dict):
        raise ProtocolError(f"the body must be a JSON object, found {type(body).__name__}")
    for name, value in body.items():
        if value is None or name in names or name in _WITHOUT_EFFECT:
            continue
        if name not in _NEUTRAL:
            raise ProtocolError(f"unknown field '{name}'{nearest(name, names)}. Remove the field", param=name)
        if value not in _NEUTRAL[name]:
            raise ProtocolError(f"this server does not support {name}. Remove the field", param=name)
    return {name: value for name, value in body.items() if value is not None}


def _message(message: Any, path: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _wrong(path, "an object with role and content", message)
    unknown = next((name for name in message if name not in ("role", "content", "name", "refusal")), None)
    if unknown is not None and message[unknown]:
        raise ProtocolError(f"this server does not support {path}.{unknown}. Remove the field", param=path)
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise _wrong(f"{path}.role", f"one of {', '.join(_ROLES)}", role)
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        parts = [text for text in texts if isinstance(text, str)]
        content = "".join(parts) if len(parts) == len(content) else content
    if not isinstance(content, str):
        raise _wrong(f"{path}.content", "a text, or a list of parts of type text", content)
    return {"role": _ROLES[role], "content": content}


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _SEEDS


def _integer(fields: Mapping[str, Any], name: str, minimum: int, maximum: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not _is_token(value) or not minimum <= value <= maximum:
        raise _wrong(name, f"a whole number from {minimum} to {maximum}", value)
    return int(value)


def _number(fields: Mapping[str, Any], name: str, minimum: float, maximum: float) -> float:
    value = fields.get(name, 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
        raise _wrong(name, f"a number from {minimum:g} to {maximum:g}", value)
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def _wrong(name: str, expected: str, value: Any) -> ProtocolError:
    shown = f"{value!r:.100}" if value is not None else "nothing"
    return ProtocolError(f"'{name}' must be {expected}, found {shown}", param=name.partition("[")[0])


class Answer:
    """Builds the bodies of the answer to one request.

    Args:
        request: the request.
        name: (token) -> text of the token.
        prompt_tokens: number of tokens of all prompts.
        special: tokens that are not part of the text, such as the beginning-of-text token.
    """

    def __init__(
        self, request: Request, name: Callable[[int], str], prompt_tokens: int, special: Container[int] = ()
    ) -> None:
        self.request, self._name, self._prompt_tokens, self._special = request, name, prompt_tokens, special
        self._offsets: dict[int, int] = {}
        prefix, kind = ("chatcmpl", "chat.completion") if request.is_chat else ("cmpl", "text_completion")
        kind += ".chunk" if request.stream and request.is_chat else ""
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": request.model,
        }  # fmt: skip

    def full(self, texts: Several[Several[Piece]], reasons: Several[str], token_count: int) -> dict[str, Any]:
        """Return the body of an answer that is not streamed, from all pieces of each sequence."""
        choices = []
        for i, (pieces, reason) in enumerate(zip(texts, reasons, strict=True)):
            logprobs = itertools.chain.from_iterable(part.logprobs for part in pieces)
            piece = Piece("".join(part.text for part in pieces), tuple(logprobs))
            content: dict[str, Any] = {"text": piece.text}
            if self.request.is_chat:
                content = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            choices.append({"index": i, **content, "logprobs": self._logprobs(i, piece), "finish_reason": reason})
        return {**self._head, "choices": choices, "usage": self._usage(token_count)}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that begins a sequence's stream, or None."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.request.is_chat else None

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a sequence's next piece."""
        return self._chunk(index, {"content": piece.text}, piece)

    def end(self, index: int, reason: str) -> dict[str, Any]:
        """Return the chunk that ends a sequence's stream."""
        return self._chunk(index, {}, None, reason)

    def usage(self, token_count: int) -> dict[str, Any]:
        """Return the chunk with the token counts."""
        return {**self._head, "choices": [], "usage": self._usage(token_count)}

    def _chunk(
        self, index: int, delta: dict[str, Any], piece: Piece | None, reason: str | None = None
    ) -> dict[str, Any]:
        text = "" if piece is None else piece.text
        content = {"delta": delta} if self.request.is_chat else {"text": text}
        logprobs = None if piece is None else self._logprobs(index, piece)
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self.request.include_usage else chunk

    def _usage(self, token_count: int) -> dict[str, int]:
        total = self._prompt_tokens + token_count
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": token_count, "total_tokens": total}

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if self.request.sampling.logprobs is None:
            return None
        if self.request.is_chat:
            content = []
            for token_logprob in piece.logprobs:
                top = [self._chat_logprob(token, logprob) for token, logprob in token_logprob.top]
                entry = self._chat_logprob(token_logprob.token, token_logprob.logprob)
                content.append({**entry, "top_logprobs": top})
            return {"content": content, "refusal": None}
        offsets, offset = [], self._offsets.get(index, 0)
        for token_logprob in piece.logprobs:
            offsets.append(offset)
            offset += 0 if token_logprob.token in self._special else len(self._name(token_logprob.token))
        self._offsets[index] = offset
        return {
            "tokens": [self._name(token_logprob.token) for token_logprob in piece.logprobs],
            "token_logprobs": [_finite(token_logprob.logprob) for token_logprob in piece.logprobs],
            "top_logprobs": [self._top(token_logprob) for token_logprob in piece.logprobs],
            "text_offset": offsets,
        }

    def _top(self, token_logprob: TokenLogprob) -> dict[str, float | None] | None:
        if token_logprob.logprob is None:
            return None
        return {self._name(token): _finite(value) for token, value in token_logprob.top}

    def _chat_logprob(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(name.encode())}


def _finite(value: float | None) -> float | None:
    """Return a number that JSON can represent: the protocol's -9999 for an impossible token."""
    return value if value is None or math.isfinite(value) else -9999.0

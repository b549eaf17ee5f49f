"""OpenAI's protocol: requests as they are read and checked, errors, and the bodies of answers."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Container, Mapping, Sequence as Several
from dataclasses import dataclass, replace
from typing import Any

from peftcore.plugin import nearest
from peftcore_serve.sequence import Piece, Sampling, TokenLogprob

SEQUENCES = 256  # of one request: prompts times n
COMPLETION_TOKENS = 16  # the protocol's default
_SEEDS = 1 << 63
_TOKENS = (1 << 31) - 1  # of an answer, and of a vocabulary
_COLDEST = 1e-5  # temperature above 0 at which tokens are sampled
_WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields that nothing here computes, and the values at which they ask for nothing.
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
    """An error with the protocol's body.

    Args:
        message: what is wrong, and what to do.
        status: HTTP status.
        param: the field that is wrong.
        code: the protocol's code.
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
        model: name of the base or of an adapter.
        prompts: texts, tokens, or conversations. Each gets `n` answers.
        n: answers to each prompt.
        sampling: how tokens are chosen, as the request says; `max_tokens` 0 if it does not.
        stop: texts that end an answer.
        stream: send answers while they grow.
        include_usage: end the stream with the counts of tokens.
        is_chat: the prompt is a conversation.
        echo: begin each answer with its prompt, and with the prompt's log probabilities if there are any.
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
        ProtocolError: a field is missing, unknown, wrong, or asks for something that this server does not do.
    """
    fields = _fields(body, _COMPLETION)
    prompt = fields.get("prompt")
    if prompt is None:
        raise ProtocolError("'prompt' is missing. Pass a text, or a list of texts", param="prompt")
    if not (isinstance(prompt, str) or (isinstance(prompt, list) and prompt)):
        raise _wrong("prompt", "a text, a list of texts, or lists of tokens", prompt)
    several = isinstance(prompt, list) and not _is_token(prompt[0])
    prompts: list[Any] = prompt if several else [prompt]  # type: ignore[assignment]
    for each in prompts:
        is_tokens = isinstance(each, list) and each and all(_is_token(token) for token in each)
        if not (isinstance(each, str) or is_tokens):
            raise _wrong("prompt", "a text, a list of texts, or lists of tokens", each)
    logprobs, echo = _whole(fields, "logprobs", 0, _COMPLETION_TOP), _flag(fields, "echo")
    max_tokens = _whole(fields, "max_tokens", 0 if echo else 1, _TOKENS)
    max_tokens = COMPLETION_TOKENS if max_tokens is None else max_tokens
    request = replace(_request(fields, prompts, max_tokens, logprobs, is_chat=False), echo=echo)
    if fields.get("best_of") not in (None, request.n):
        raise ProtocolError("best_of is not supported. Leave it out, or give n answers: n", param="best_of")
    return request


def chat(body: Any) -> Request:
    """Read the body of `/v1/chat/completions`; see `completion`."""
    fields = _fields(body, _CHAT)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list of at least one message", messages)
    conversation = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    wants, top = _flag(fields, "logprobs"), _whole(fields, "top_logprobs", 0, _CHAT_TOP)
    if top is not None and not wants:
        raise ProtocolError("top_logprobs needs logprobs: true", param="top_logprobs")
    most = [_whole(fields, name, 1, _TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    return _request(fields, [conversation], most[0] or most[1] or 0, (top or 0) if wants else None, is_chat=True)


def _request(
    fields: Mapping[str, Any], prompts: list[Any], max_tokens: int, logprobs: int | None, *, is_chat: bool
) -> Request:
    model, stop = fields.get("model"), fields.get("stop")
    if not isinstance(model, str):
        raise _wrong("model", "the name of a model; GET /v1/models lists them", model)
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(each, str) and each for each in stop):
        raise _wrong("stop", "a text that is not empty, or a list of at most 4", stop)
    n, stream = _whole(fields, "n", 1, SEQUENCES) or 1, _flag(fields, "stream")
    if n * len(prompts) > SEQUENCES:
        raise ProtocolError(f"{n * len(prompts):,} answers are asked for; at most {SEQUENCES} may be", param="n")
    options = fields.get("stream_options")
    if options is not None and not (isinstance(options, dict) and options.keys() <= {"include_usage"} and stream):
        raise _wrong("stream_options", 'such as {"include_usage": true}, with stream: true', options)
    temperature = _number(fields, "temperature", 0, 2)
    if 0 < temperature < _COLDEST:
        raise _wrong("temperature", f"0, for the most likely tokens, or a number from {_COLDEST:g} to 2", temperature)
    sampling = Sampling(
        max_tokens,
        temperature,
        _number(fields, "top_p", 0, 1),
        _whole(fields, "seed", -_SEEDS, _SEEDS - 1),
        logprobs,
    )
    usage = _flag(options or {}, "include_usage")
    return Request(model, prompts, n, sampling, tuple(stop), stream, usage, is_chat)


def _fields(body: Any, known: Several[str]) -> dict[str, Any]:
    """Return the fields that have a value; refuse unknown ones and what is not supported."""
    if not isinstance(body, dict):
        raise ProtocolError(f"the body must be a JSON object, found {type(body).__name__}")
    for name, value in body.items():
        if value is None or name in known or name in _WITHOUT_EFFECT:
            continue
        if name not in _NEUTRAL:
            raise ProtocolError(f"unknown field '{name}'{nearest(name, known)}. Leave it out", param=name)
        if value not in _NEUTRAL[name]:
            raise ProtocolError(f"{name} is not supported by this server. Leave it out", param=name)
    return {name: value for name, value in body.items() if value is not None}


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _wrong(where, "an object with role and content", message)
    unknown = next((name for name in message if name not in ("role", "content", "name", "refusal")), None)
    if unknown is not None and message[unknown]:
        raise ProtocolError(f"{where}.{unknown} is not supported by this server. Leave it out", param=where)
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise _wrong(f"{where}.role", f"one of {', '.join(_ROLES)}", role)
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        parts = [text for text in texts if isinstance(text, str)]
        content = "".join(parts) if len(parts) == len(content) else content
    if not isinstance(content, str):
        raise _wrong(f"{where}.content", "a text, or a list of parts of type text", content)
    return {"role": _ROLES[role], "content": content}


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _SEEDS


def _whole(fields: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not _is_token(value) or not least <= value <= most:
        raise _wrong(name, f"a whole number from {least} to {most}", value)
    return int(value)


def _number(fields: Mapping[str, Any], name: str, least: float, most: float) -> float:
    value = fields.get(name, 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise _wrong(name, f"a number from {least:g} to {most:g}", value)
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def _wrong(name: str, expected: str, found: Any) -> ProtocolError:
    shown = f"{found!r:.100}" if found is not None else "nothing"
    return ProtocolError(f"'{name}' must be {expected}, found {shown}", param=name.partition("[")[0])


class Answer:
    """Bodies of the answer to one request.

    Args:
        request: the request.
        name: (token) -> its text.
        prompt_tokens: tokens of all prompts.
        special: tokens that are not part of a text, such as its begin.
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

    def whole(self, texts: Several[Several[Piece]], reasons: Several[str], written: int) -> dict[str, Any]:
        """Return the body of an answer that is not streamed, from all pieces of each sequence."""
        choices = []
        for i, (pieces, reason) in enumerate(zip(texts, reasons, strict=True)):
            piece = Piece("".join(each.text for each in pieces), tuple(one for each in pieces for one in each.logprobs))
            said: dict[str, Any] = {"text": piece.text}
            if self.request.is_chat:
                said = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            choices.append({"index": i, **said, "logprobs": self._logprobs(i, piece), "finish_reason": reason})
        return {**self._head, "choices": choices, "usage": self._usage(written)}

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that begins a sequence's stream, or None."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.request.is_chat else None

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a sequence's next piece."""
        return self._chunk(index, {"content": piece.text}, piece)

    def end(self, index: int, reason: str) -> dict[str, Any]:
        """Return the chunk that ends a sequence's stream."""
        return self._chunk(index, {}, None, reason)

    def usage(self, written: int) -> dict[str, Any]:
        """Return the chunk with the counts of tokens."""
        return {**self._head, "choices": [], "usage": self._usage(written)}

    def _chunk(
        self, index: int, delta: dict[str, Any], piece: Piece | None, reason: str | None = None
    ) -> dict[str, Any]:
        said = {"delta": delta} if self.request.is_chat else {"text": "" if piece is None else piece.text}
        logprobs = None if piece is None else self._logprobs(index, piece)
        chunk = {**self._head, "choices": [{"index": index, **said, "logprobs": logprobs, "finish_reason": reason}]}
        return {**chunk, "usage": None} if self.request.include_usage else chunk

    def _usage(self, written: int) -> dict[str, int]:
        asked = self._prompt_tokens
        return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if self.request.sampling.logprobs is None:
            return None
        if self.request.is_chat:
            content = [
                {**self._named(one.token, one.logprob), "top_logprobs": [self._named(*each) for each in one.top]}
                for one in piece.logprobs
            ]
            return {"content": content, "refusal": None}
        offsets, at = [], self._offsets.get(index, 0)
        for one in piece.logprobs:
            offsets.append(at)
            at += 0 if one.token in self._special else len(self._name(one.token))
        self._offsets[index] = at
        return {
            "tokens": [self._name(one.token) for one in piece.logprobs],
            "token_logprobs": [_finite(one.logprob) for one in piece.logprobs],
            "top_logprobs": [self._top(one) for one in piece.logprobs],
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprob) -> dict[str, float | None] | None:
        if one.logprob is None:
            return None
        return {self._name(token): _finite(value) for token, value in one.top}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(name.encode())}


def _finite(value: float | None) -> float | None:
    """Return a number that JSON has: the protocol's -9999 for a token that is impossible."""
    return value if value is None or math.isfinite(value) else -9999.0

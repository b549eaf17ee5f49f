"""The Starlette application: routes, and answers built from the events of sequences."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftcore_cli import AdapterTask
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from peftcore import PeftcoreError
from peftcore.plugin import nearest
from peftcore_serve import folders, protocol
from peftcore_serve.folders import Folder, Text, Texts, TooLong
from peftcore_serve.protocol import Answer, ProtocolError, Request
from peftcore_serve.scheduler import ENDING, Busy, Scheduler
from peftcore_serve.sequence import Event, Failed, Finished, Piece, Sampling, Sequence

_BODY_BYTES = 16 << 20
_MAX_NAMES = 20  # maximum number of names in an error
_PORT = re.compile(r":\d*$")


class Server:
    """Answers requests with a base model and a folder of adapters.

    Args:
        model: the loaded base model.
        base: folder or hub id of the base.
        name: name of the base for clients.
        root: the folder of adapters.
        limit: maximum number of adapters in memory.
        batch_size: maximum number of sequences decoded together.
        max_new_tokens: default maximum number of tokens of a chat answer.
        chat_template: chat template of all conversations, as in `--chat-template`.
        trust_templates: whether to render the chat templates of adapters.
        hosts: host names that requests may be sent to, without ports. None: any.
        refuse: function of an adapter's name and task that raises an error if the adapter does not fit the base model.
    """

    def __init__(
        self,
        model: Any,
        base: str,
        name: str,
        root: Path | None = None,
        *,
        limit: int = 16,
        batch_size: int = 16,
        max_new_tokens: int = 512,
        chat_template: str | None = None,
        trust_templates: bool = False,
        hosts: Collection[str] | None = None,
        refuse: Callable[[str, AdapterTask], None] | None = None,
    ) -> None:
        from transformers import GenerationConfig

        self.name, self.root, self._max_new_tokens = name, root, max_new_tokens
        self.texts = Texts(model, base, chat_template, trust_templates, refuse)
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # The base's penalties and filters would only affect sequences that run alone through `generate`.
        model.generation_config = GenerationConfig(
            eos_token_id=getattr(model.generation_config, "eos_token_id", None),
            pad_token_id=self.texts.of_base.tokenizer.pad_token_id,
        )
        self.scheduler = Scheduler(model, lambda name: folders.find_one(root, name), limit, batch_size)
        self._creation_time = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={ProtocolError: _on_refusal, HTTPException: _on_no_route, Exception: _on_crash},
            lifespan=self._lifespan,
            middleware=[] if hosts is None else [Middleware(_KnownHosts, hosts=frozenset(hosts))],
        )

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await run_in_threadpool(self.scheduler.close)

    async def _health(self, _request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, _request: HttpRequest) -> Response:
        try:
            adapters = await run_in_threadpool(self.adapters)
        except PeftcoreError as error:
            raise ProtocolError(str(error), 500) from error
        return JSONResponse({"object": "list", "data": [self._describe(name) for name in (self.name, *adapters)]})

    async def _model(self, request: HttpRequest) -> Response:
        name = request.path_params["model"]
        await run_in_threadpool(self._folder, name)
        return JSONResponse(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        body = {"id": name, "object": "model", "created": self._creation_time, "owned_by": "peftcore"}
        return body if name == self.name else {**body, "parent": self.name}

    async def _completions(self, request: HttpRequest) -> Response:
        return await self._answer(request, protocol.completion)

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, protocol.chat)

    async def _answer(self, http: HttpRequest, read: Callable[[Any], Request]) -> Response:
        request = read(await _json(http))
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(index: int, event: Event) -> None:
            with suppress(RuntimeError):  # the event loop is closed, so no request waits for the event
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        text, sequences = await run_in_threadpool(self._sequences, request, put)
        prompt_tokens = sum(len(sequence.prompt) for sequence in sequences[:: request.n])
        answer = Answer(request, text.decode_one, prompt_tokens, text.special)
        try:
            self.scheduler.submit(sequences)
        except Busy as error:
            raise ProtocolError(str(error), 503 if str(error) == ENDING else 429) from None
        running = _Running(sequences, events, http)
        try:
            first_event = await running.next_event()
        except BaseException:
            running.end()
            raise
        if first_event is None:
            return Response(status_code=499)  # the client has disconnected, so nobody reads this
        if isinstance(first_event[1], Failed):
            running.end()
            raise _failure(first_event[1])
        if request.stream:
            return StreamingResponse(_stream(running, first_event, answer), media_type="text/event-stream")
        return await _collect(running, first_event, answer)

    def _sequences(self, request: Request, put: Callable[[int, Event], None]) -> tuple[Text, list[Sequence]]:
        """Return the tokenizer of the request's model, and a sequence for each answer."""
        folder = self._folder(request.model)
        try:
            text = self.texts.of_base if folder is None else self.texts.for_adapter(folder)
            prompts = [
                list(prompt_input) if _is_tokens(prompt_input) else text.tokens(prompt_input)
                for prompt_input in request.prompts
            ]
        except TooLong as error:
            raise _too_long(request, str(error)) from error
        except (PeftcoreError, OSError) as error:
            raise ProtocolError(str(error)) from error
        adapter = None if folder is None else folder.name
        sequences: list[Sequence] = []
        for prompt_text, prompt in zip(request.prompts, prompts, strict=True):
            sampling = self._limit_tokens(request, prompt)
            for _ in range(request.n):
                index = len(sequences)
                seed = None if sampling.seed is None else (sampling.seed + index) % (1 << 63)

                def notify(event: Event, index: int = index) -> None:
                    put(index, event)

                sequence = Sequence(prompt, adapter, replace(sampling, seed=seed), text.ends, text.decode, notify)
                sequence.stop, sequence.streams = request.stop, request.stream
                if request.echo:
                    sequence.echo = prompt_text if isinstance(prompt_text, str) else text.decode(prompt)
                sequences.append(sequence)
        return text, sequences

    def _limit_tokens(self, request: Request, prompt: list[int]) -> Sampling:
        """Return the sampling settings of a prompt, with a number of tokens that fits the model's context."""
        unknown_token = next((token for token in prompt if not 0 <= token < self._vocabulary), None)
        if unknown_token is not None:
            raise ProtocolError(
                f"tokens in 'prompt' must be between 0 and {self._vocabulary - 1}, found {unknown_token}",
                param="prompt",
            )
        max_tokens = request.sampling.max_tokens
        if max_tokens == 0 and request.is_chat:
            max_tokens = self._max_new_tokens
            if self._context is not None:
                max_tokens = min(max_tokens, max(1, self._context - len(prompt)))
        if self._context is not None and len(prompt) + max_tokens > self._context:
            raise _too_long(
                request,
                f"the prompt has {len(prompt):,} tokens and the answer may have {max_tokens:,}, but the model's "
                f"context has {self._context:,}. Shorten the prompt, or lower max_tokens",
            )
        return replace(request.sampling, max_tokens=max_tokens)

    def adapters(self) -> dict[str, Folder]:
        """Return the adapters in the folder."""
        return folders.find(self.root)

    def _folder(self, name: str) -> Folder | None:
        """Return the adapter of this name; None for the base model."""
        try:
            folder = folders.find_one(self.root, name)
            names = [self.name] if folder is not None or name == self.name else [self.name, *self.adapters()]
        except PeftcoreError as error:
            raise ProtocolError(str(error), 500) from error
        if name == self.name and folder is not None:
            raise ProtocolError(f"'{name}' names both the base and an adapter. Rename the adapter's folder")
        if folder is None and name != self.name:
            remainder = f" and {len(names) - _MAX_NAMES} more (GET /v1/models)" if len(names) > _MAX_NAMES else ""
            shown_names = f"{', '.join(names[:_MAX_NAMES])}{remainder}"
            raise ProtocolError(
                f"there is no model '{name}'{nearest(name, names)}. The models are: {shown_names}",
                404,
                "model",
                "model_not_found",
            )
        return folder


class _KnownHosts:
    """Middleware that refuses requests to other host names, to prevent DNS rebinding.

    A web page can have a host name that resolves to this machine's loopback address. The browser would then let the
    page read the answers.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            header = HttpRequest(scope).headers.get("host", "")
            host = header.rpartition(":")[0] if _PORT.search(header) else header
            if host.lower() not in self._hosts:
                error = ProtocolError(
                    f"the host '{host}' of the request is not allowed (allowed: {', '.join(sorted(self._hosts))}). "
                    "Start the server with --allowed-host NAME to allow another name",
                    403,
                )
                await JSONResponse(error.body, error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Running:
    """The running sequences of a request, which are cancelled when the client disconnects."""

    def __init__(self, sequences: list[Sequence], events: asyncio.Queue[tuple[int, Event]], http: HttpRequest) -> None:
        self.sequences, self._events, self._open = sequences, events, len(sequences)
        self._disconnect = asyncio.ensure_future(_wait_for_disconnect(http))
        self._disconnect.add_done_callback(lambda _: self._cancel())

    async def next_event(self) -> tuple[int, Event] | None:
        """Return the next event, or None when all sequences have ended or the client has disconnected."""
        if self._open == 0:
            return None
        waiting = asyncio.ensure_future(self._events.get())
        try:
            await asyncio.wait((waiting, self._disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self.end()
                return None
            event = waiting.result()
        finally:
            waiting.cancel()
        self._open -= not isinstance(event[1], Piece)
        return event

    @property
    def is_over(self) -> bool:
        return self._open == 0

    def end(self) -> None:
        self._cancel()
        self._disconnect.cancel()

    def _cancel(self) -> None:
        for sequence in self.sequences:
            sequence.cancel()


async def _wait_for_disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _collect(running: _Running, first_event: tuple[int, Event], answer: Answer) -> Response:
    """Return the answer when all sequences have ended."""
    texts: list[list[Piece]] = [[] for _ in running.sequences]
    reasons, token_count = [""] * len(texts), 0
    item: tuple[int, Event] | None = first_event
    try:
        while item is not None:
            index, event = item
            if isinstance(event, Failed):
                raise _failure(event)
            if isinstance(event, Finished):
                reasons[index], token_count = event.reason, token_count + event.tokens
            texts[index].append(event.last_piece if isinstance(event, Finished) else event)
            item = await running.next_event()
        if not running.is_over:
            return Response(status_code=499)
        return JSONResponse(answer.full(texts, reasons, token_count))
    finally:
        running.end()


async def _stream(running: _Running, first_event: tuple[int, Event], answer: Answer) -> AsyncIterator[bytes]:
    """Yield server-sent events."""
    token_count, item, begun = 0, first_event, set[int]()
    try:
        while item is not None:
            index, event = item
            if isinstance(event, Failed):
                yield _server_sent_event(_failure(event).body)
                return
            if index not in begun and (chunk := answer.first_chunk(index)) is not None:
                yield _server_sent_event(chunk)
            begun.add(index)
            piece = event.last_piece if isinstance(event, Finished) else event
            if piece.text or piece.logprobs:
                yield _server_sent_event(answer.piece(index, piece))
            if isinstance(event, Finished):
                token_count += event.tokens
                yield _server_sent_event(answer.end(index, event.reason))
            item = await running.next_event()  # type: ignore[assignment]
        if running.is_over:
            if answer.request.include_usage:
                yield _server_sent_event(answer.usage(token_count))
            yield b"data: [DONE]\n\n"
    finally:
        running.end()


def _server_sent_event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _failure(event: Failed) -> ProtocolError:
    if event.is_users:
        return ProtocolError(event.message, 400)
    return ProtocolError(event.message, 503 if event.message == ENDING else 500)


def _too_long(request: Request, message: str) -> ProtocolError:
    return ProtocolError(message, param="messages" if request.is_chat else "prompt", code="context_length_exceeded")


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and isinstance(prompt[0], int)


async def _json(http: HttpRequest) -> Any:
    kind = http.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        # Browsers send other content types across origins without a preflight request.
        raise ProtocolError(f"the content type of the request must be application/json, found '{kind}'", 415)
    body = b""
    async for part in http.stream():
        body += part
        if len(body) > _BODY_BYTES:
            raise ProtocolError(
                (f"the body of the request exceeds {_BODY_BYTES >> 20} MiB. Send several smaller requests"), 413
            )
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ProtocolError("the body contains an unpaired surrogate, which is not valid Unicode. Remove it") from None
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the body is not valid JSON: {error}") from None
    return content


async def _on_refusal(_request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ProtocolError)
    return JSONResponse(error.body, error.status)


async def _on_no_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. See GET /v1/models"
    return JSONResponse(ProtocolError(message, error.status_code).body, error.status_code, headers=error.headers)


async def _on_crash(_request: HttpRequest, error: Exception) -> Response:
    return JSONResponse(ProtocolError(f"{type(error).__name__}: {error}", 500).body, 500)

"""The Starlette application: routes, and events of sequences as answers."""

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
_SHOWN = 20  # names in an error
_PORT = re.compile(r":\d*$")


class Server:
    """A base and a folder of adapters that answer requests.

    Args:
        model: the loaded base.
        base: its folder or hub id.
        name: its name for clients.
        root: the folder of adapters.
        limit: number of adapters in memory.
        batch_size: number of sequences that are decoded together.
        max_new_tokens: tokens of a chat's answer if the request does not say how many.
        chat_template: the template of all conversations, as `--chat-template` takes it.
        trust_templates: whether chat templates that came with adapters are rendered.
        hosts: host names that requests may be sent to, without ports; None for any.
        refuse: called with the name and the task of each adapter, to raise an error if it does not fit the base.
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
        # Penalties and filters of the base's config would act on answers of `generate` only.
        model.generation_config = GenerationConfig(
            eos_token_id=getattr(model.generation_config, "eos_token_id", None),
            pad_token_id=self.texts.of_base.tokenizer.pad_token_id,
        )
        self.scheduler = Scheduler(model, lambda name: folders.find_one(root, name), limit, batch_size)
        self._created = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={ProtocolError: _refused, HTTPException: _no_route, Exception: _crashed},
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
            there = await run_in_threadpool(self.adapters)
        except PeftcoreError as error:
            raise ProtocolError(str(error), 500) from error
        return JSONResponse({"object": "list", "data": [self._described(name) for name in (self.name, *there)]})

    async def _model(self, request: HttpRequest) -> Response:
        name = request.path_params["model"]
        await run_in_threadpool(self._folder, name)
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        described = {"id": name, "object": "model", "created": self._created, "owned_by": "peftcore"}
        return described if name == self.name else {**described, "parent": self.name}

    async def _completions(self, request: HttpRequest) -> Response:
        return await self._answer(request, protocol.completion)

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, protocol.chat)

    async def _answer(self, http: HttpRequest, read: Callable[[Any], Request]) -> Response:
        request = read(await _json(http))
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(index: int, event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        text, sequences = await run_in_threadpool(self._sequences, request, put)
        prompt_tokens = sum(len(each.prompt) for each in sequences[:: request.n])
        answer = Answer(request, text.decode_one, prompt_tokens, text.special)
        try:
            self.scheduler.submit(sequences)
        except Busy as error:
            raise ProtocolError(str(error), 503 if str(error) == ENDING else 429) from None
        running = _Running(sequences, events, http)
        try:
            first = await running.next()
        except BaseException:
            running.end()
            raise
        if first is None:
            return Response(status_code=499)  # the client has gone; nobody reads this
        if isinstance(first[1], Failed):
            running.end()
            raise _failed(first[1])
        if request.stream:
            return StreamingResponse(_streamed(running, first, answer), media_type="text/event-stream")
        return await _whole(running, first, answer)

    def _sequences(self, request: Request, put: Callable[[int, Event], None]) -> tuple[Text, list[Sequence]]:
        """Return the tokenizer of the request's model, and a sequence for each answer."""
        folder = self._folder(request.model)
        try:
            text = self.texts.of_base if folder is None else self.texts.of(folder)
            prompts = [list(each) if _is_tokens(each) else text.tokens(each) for each in request.prompts]
        except TooLong as error:
            raise _too_long(request, str(error)) from error
        except (PeftcoreError, OSError) as error:
            raise ProtocolError(str(error)) from error
        adapter = None if folder is None else folder.name
        sequences: list[Sequence] = []
        for given, prompt in zip(request.prompts, prompts, strict=True):
            sampling = self._bounded(request, prompt)
            for _ in range(request.n):
                index = len(sequences)
                seed = None if sampling.seed is None else (sampling.seed + index) % (1 << 63)

                def notify(event: Event, index: int = index) -> None:
                    put(index, event)

                one = Sequence(prompt, adapter, replace(sampling, seed=seed), text.ends, text.decode, notify)
                one.stop, one.streams = request.stop, request.stream
                if request.echo:
                    one.echo = given if isinstance(given, str) else text.decode(prompt)
                sequences.append(one)
        return text, sequences

    def _bounded(self, request: Request, prompt: list[int]) -> Sampling:
        """Return the sampling of a prompt's answers, with a number of tokens that fits the model."""
        wrong = next((token for token in prompt if not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            raise ProtocolError(
                f"'prompt' has the token {wrong}, but the model has tokens 0 to {self._vocabulary - 1}", param="prompt"
            )
        asked = request.sampling.max_tokens
        if asked == 0 and request.is_chat:
            asked = self._max_new_tokens
            if self._context is not None:
                asked = min(asked, max(1, self._context - len(prompt)))
        if self._context is not None and len(prompt) + asked > self._context:
            raise _too_long(
                request,
                f"the prompt has {len(prompt):,} tokens and the answer may have {asked:,}, but the model's context has "
                f"{self._context:,}. Shorten the prompt, or lower max_tokens",
            )
        return replace(request.sampling, max_tokens=asked)

    def adapters(self) -> dict[str, Folder]:
        """Return the adapters in the folder."""
        return folders.find(self.root)

    def _folder(self, name: str) -> Folder | None:
        """Return the adapter of this name; None for the base."""
        try:
            found = folders.find_one(self.root, name)
            names = [self.name] if found is not None or name == self.name else [self.name, *self.adapters()]
        except PeftcoreError as error:
            raise ProtocolError(str(error), 500) from error
        if name == self.name and found is not None:
            raise ProtocolError(f"'{name}' is the name of the base and of an adapter. Rename the adapter's folder")
        if found is None and name != self.name:
            more = f" and {len(names) - _SHOWN} more (GET /v1/models)" if len(names) > _SHOWN else ""
            shown = f"{', '.join(names[:_SHOWN])}{more}"
            raise ProtocolError(
                f"there is no model '{name}'{nearest(name, names)}. There are: {shown}", 404, "model", "model_not_found"
            )
        return found


class _KnownHosts:
    """Middleware that refuses requests to other host names.

    A page in a browser can name a host of its own that resolves to this machine's loopback address, and would then be
    allowed to read the answers.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = HttpRequest(scope).headers.get("host", "")
            host = given.rpartition(":")[0] if _PORT.search(given) else given
            if host.lower() not in self._hosts:
                error = ProtocolError(
                    f"the request is for the host '{host}', which this server does not answer for. Start it with "
                    f"--allowed-host NAME to allow the name; allowed are {', '.join(sorted(self._hosts))}",
                    403,
                )
                await JSONResponse(error.body, error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Running:
    """The sequences of a request while they run; they are cancelled when the client disconnects."""

    def __init__(self, sequences: list[Sequence], events: asyncio.Queue[tuple[int, Event]], http: HttpRequest) -> None:
        self.sequences, self._events, self._open = sequences, events, len(sequences)
        self._gone = asyncio.ensure_future(_disconnected(http))
        self._gone.add_done_callback(lambda _: self._cancel())

    async def next(self) -> tuple[int, Event] | None:
        """Return the next event; None when all sequences have ended, or the client has gone."""
        if self._open == 0:
            return None
        waiting = asyncio.ensure_future(self._events.get())
        try:
            await asyncio.wait((waiting, self._gone), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self.end()
                return None
            found = waiting.result()
        finally:
            waiting.cancel()
        self._open -= not isinstance(found[1], Piece)
        return found

    @property
    def is_over(self) -> bool:
        return self._open == 0

    def end(self) -> None:
        self._cancel()
        self._gone.cancel()

    def _cancel(self) -> None:
        for sequence in self.sequences:
            sequence.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _whole(running: _Running, first: tuple[int, Event], answer: Answer) -> Response:
    """Return the answer when all sequences have ended."""
    texts: list[list[Piece]] = [[] for _ in running.sequences]
    reasons, written = [""] * len(texts), 0
    found: tuple[int, Event] | None = first
    try:
        while found is not None:
            index, event = found
            if isinstance(event, Failed):
                raise _failed(event)
            if isinstance(event, Finished):
                reasons[index], written = event.reason, written + event.tokens
            texts[index].append(event.last if isinstance(event, Finished) else event)
            found = await running.next()
        if not running.is_over:
            return Response(status_code=499)
        return JSONResponse(answer.whole(texts, reasons, written))
    finally:
        running.end()


async def _streamed(running: _Running, first: tuple[int, Event], answer: Answer) -> AsyncIterator[bytes]:
    """Yield server-sent events."""
    written, found, began = 0, first, set[int]()
    try:
        while found is not None:
            index, event = found
            if isinstance(event, Failed):
                yield _sent(_failed(event).body)
                return
            if index not in began and (chunk := answer.first(index)) is not None:
                yield _sent(chunk)
            began.add(index)
            piece = event.last if isinstance(event, Finished) else event
            if piece.text or piece.logprobs:
                yield _sent(answer.piece(index, piece))
            if isinstance(event, Finished):
                written += event.tokens
                yield _sent(answer.end(index, event.reason))
            found = await running.next()  # type: ignore[assignment]
        if running.is_over:
            if answer.request.include_usage:
                yield _sent(answer.usage(written))
            yield b"data: [DONE]\n\n"
    finally:
        running.end()


def _sent(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _failed(event: Failed) -> ProtocolError:
    return ProtocolError(event.message, 400 if event.is_users else 503 if event.message == ENDING else 500)


def _too_long(request: Request, message: str) -> ProtocolError:
    return ProtocolError(message, param="messages" if request.is_chat else "prompt", code="context_length_exceeded")


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and isinstance(prompt[0], int)


async def _json(http: HttpRequest) -> Any:
    kind = http.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        # A page in a browser may send anything else without asking this server first.
        raise ProtocolError(f"the body must be sent as content-type application/json, found '{kind}'", 415)
    body = b""
    async for part in http.stream():
        body += part
        if len(body) > _BODY_BYTES:
            raise ProtocolError(f"the body has more than {_BODY_BYTES >> 20} MiB", 413)
    try:
        found = json.loads(body)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ProtocolError("the body contains half a surrogate pair, which is not text") from None
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the body is not JSON: {error}") from None
    return found


async def _refused(_request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ProtocolError)
    return JSONResponse(error.body, error.status)


async def _no_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. See GET /v1/models"
    return JSONResponse(ProtocolError(message, error.status_code).body, error.status_code, headers=error.headers)


async def _crashed(_request: HttpRequest, error: Exception) -> Response:
    return JSONResponse(ProtocolError(f"{type(error).__name__}: {error}", 500).body, 500)

"""A real server on a socket, and the client of the `openai` package."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import uvicorn
from peftcore_serve import command
from peftcore_serve.app import Server

from .conftest import TEMPLATE, written

TOKENS = 2000


@pytest.fixture(scope="module")
def running(llama: Path, saved: Path) -> Iterator[tuple[Server, openai.OpenAI]]:
    """A server, in a thread, and a client."""
    listening = command.listen("127.0.0.1", 0)
    server = command.make(str(llama), saved, chat_template=TEMPLATE)
    runs = uvicorn.Server(command.uvicorn_config(server))
    thread = threading.Thread(target=runs.run, args=([listening],))
    thread.start()
    with openai.OpenAI(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", api_key="none") as client:
        yield server, client
    runs.should_exit = True
    thread.join()
    listening.close()


def test_the_client_of_openai(running: tuple[Server, openai.OpenAI], llama: Path, saved: Path) -> None:
    server, client = running
    assert [model.id for model in client.models.list()][:1] == [server.name]
    text = written(llama, saved / "one", "the film is", 6)
    completion = client.completions.create(model="one", prompt="the film is", max_tokens=6, temperature=0)
    assert completion.choices[0].text == text
    assert completion.usage is not None and completion.usage.completion_tokens == 6
    chat = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "the film"}], max_tokens=6, temperature=0
    )
    assert chat.choices[0].message.content == text
    stream = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "the film"}], max_tokens=6, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_errors_are_those_of_the_client(running: tuple[Server, openai.OpenAI]) -> None:
    _, client = running
    with pytest.raises(openai.NotFoundError, match="there is no model 'three'"):
        client.completions.create(model="three", prompt="a")
    with pytest.raises(openai.BadRequestError, match="copy it again"):
        client.completions.create(model="broken", prompt="a")
    with pytest.raises(openai.BadRequestError, match="'temperature' must be a number from 0 to 2, found 9"):
        client.completions.create(model="one", prompt="a", temperature=9)


@pytest.mark.parametrize("stream", [False, True])
def test_generation_stops_when_the_client_disconnects(
    running: tuple[Server, openai.OpenAI], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = running
    monkeypatch.setattr(server.texts.of_base, "ends", frozenset())
    before = server.scheduler.steps
    options = {"model": server.name, "prompt": "the film", "max_tokens": TOKENS, "temperature": 0}
    if stream:
        with client.completions.create(**options, stream=True) as answer:  # type: ignore[call-overload]
            next(iter(answer))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2, max_retries=0).completions.create(**options)  # type: ignore[call-overload]
    while server.scheduler.is_busy:
        time.sleep(0.01)
    assert server.scheduler.steps - before < TOKENS - 1

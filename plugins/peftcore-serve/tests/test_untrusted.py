"""What strangers may send: folders of adapters, long texts, and requests of pages in a browser."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from peftcore_cli.bases import models
from peftcore_cli.tasks import conversations
from peftcore_serve import command, folders
from peftcore_serve.app import Server
from peftcore_serve.command import make
from peftcore_serve.folders import Text, TooLong
from starlette.testclient import TestClient
from support.commands import save_tokenizer
from tokenizers import PreTokenizedString
from tokenizers.pre_tokenizers import PreTokenizer

from .conftest import TEMPLATE, written

HELLO = {"messages": [{"role": "user", "content": "the film"}], "temperature": 0, "max_tokens": 5}


def with_template(source: Path, folder: Path, template: str | None) -> None:
    """Copy an adapter, with a tokenizer that has this chat template."""
    shutil.copytree(source, folder)
    save_tokenizer(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def test_a_chat_template_that_came_with_an_adapter_is_not_rendered(llama: Path, saved: Path, tmp_path: Path) -> None:
    # A template of a stranger can have more loops; this one ends, so that the test would fail at once.
    endless = "{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}"
    templates = {"endless": endless, "same": TEMPLATE, "chatml": conversations.CHATML, "none": None}
    for name, template in templates.items():
        with_template(saved / "one", tmp_path / name, template)
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    with TestClient(make(str(base), tmp_path).app) as client:
        answers = {name: client.post("/v1/chat/completions", json={**HELLO, "model": name}) for name in templates}
        expected = written(llama, saved / "one", "the film is", 5)
        assert answers["endless"].status_code == 400
        assert (
            answers["endless"]
            .json()["error"]["message"]
            .startswith("the adapter 'endless' has its own chat template, which this server does not render. ")
        )
        for name in ("same", "none"):
            assert answers[name].json()["choices"][0]["message"]["content"] == expected
        assert answers["chatml"].status_code == 200
        body = {"model": "endless", "prompt": "the film is", "temperature": 0, "max_tokens": 5}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected


def test_a_long_text_is_refused_before_it_is_tokenized(
    shared: tuple[Server, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = shared
    most = 2048 * min(16, max(map(len, server.texts.of_base.tokenizer.get_vocab())))

    def tokenize(*_: object, **__: object) -> None:
        raise AssertionError("the text was tokenized")

    monkeypatch.setattr(type(server.texts.of_base.tokenizer), "__call__", tokenize)
    long = "a" * (most + 1)
    for path, field, prompt in (
        ("/v1/completions", "prompt", long),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": long}]),
    ):
        error = client.post(path, json={"model": "one", field: prompt}).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)
        assert f"the limit for the model's context of 2,048 tokens is {most:,}" in error["message"]


def test_a_vocabulary_with_long_tokens_allows_no_longer_text(llama: Path) -> None:
    tokenizer: Any = models.load_tokenizer(str(llama))
    tokenizer.add_tokens("-" * 128)  # as in the vocabularies of Llama 3 and GPT-4
    text = Text(tokenizer, frozenset(), context=100)
    assert len(text.tokens("the " * 400)) == 400
    with pytest.raises(TooLong, match=r"has 1,601 characters, but the limit for the model's context of .* is 1,600"):
        text.tokens("-" * 1601)


def test_a_text_that_is_tokenized_slowly_keeps_nobody_waiting(llama: Path) -> None:
    tokenizer: Any = models.load_tokenizer(str(llama))
    began, ends = threading.Event(), threading.Event()

    class Slow:
        def pre_tokenize(self, text: PreTokenizedString) -> None:
            if threading.current_thread() is not threading.main_thread():
                began.set()
                assert ends.wait(60)
            text.split(lambda _, part: [part])

    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Slow())
    text = Text(tokenizer, frozenset())
    slow = threading.Thread(target=text.tokens, args=("the",))
    slow.start()
    assert began.wait(60)
    assert text.decode(text.tokens("film")) == "film"
    assert slow.is_alive()
    ends.set()
    slow.join()


def test_other_files_of_an_adapter_are_not_read(llama: Path, saved: Path, tmp_path: Path) -> None:
    with_template(saved / "one", tmp_path / "one", TEMPLATE)
    with open(tmp_path / "one" / "optimizer.pt", "wb") as file:
        file.truncate(1 << 43)  # a sparse file of 8 TiB
    with TestClient(make(str(llama), tmp_path).app) as client:
        body = {"model": "one", "prompt": "the film", "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 200


def test_a_folder_whose_name_is_not_utf_8_is_left_out(
    llama: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders._is_utf8.cache_clear()
    shutil.copytree(saved / "one", tmp_path / "one")
    shutil.copytree(saved / "one", os.fsdecode(os.fsencode(tmp_path) + b"/t\xe9o"))
    with TestClient(make(str(llama), tmp_path).app) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]][1:] == ["one"]
        assert client.get("/v1/models").status_code == 200
    message = capsys.readouterr().err
    assert (
        message.count("the adapter in 't\\udce9o' is not served, because the name of its folder is not valid UTF-8")
        == 1
    )


def test_other_hosts_are_refused(llama: Path) -> None:
    hosts = command.known_hosts("127.0.0.1", "127.0.0.1", ["Box.local"])
    with TestClient(make(str(llama), hosts=hosts).app) as client:
        for host in ("127.0.0.1", "127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "box.local:80"):
            assert client.get("/health", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1].evil.example:1"):
            answer = client.get("/v1/models", headers={"host": host})
            assert answer.status_code == 403, host
            assert "Start the server with --allowed-host NAME" in answer.json()["error"]["message"]


def test_the_hosts_of_an_address() -> None:
    loopback = {"localhost", "127.0.0.1", "[::1]"}
    assert command.known_hosts("localhost", "127.0.0.1", []) == loopback
    assert command.known_hosts("::1", "::1", []) == loopback
    assert command.known_hosts("0.0.0.0", "0.0.0.0", []) is None
    assert command.known_hosts("0.0.0.0", "0.0.0.0", ["box"]) == {"0.0.0.0", "box"}


def test_the_log_is_escaped(shared: tuple[Server, TestClient], capsys: pytest.CaptureFixture[str]) -> None:
    command.uvicorn_config(shared[0])
    logging.getLogger("uvicorn.error").error("no folder \x1b[2J")
    assert capsys.readouterr().err == "ERROR: no folder \\x1b[2J\n"

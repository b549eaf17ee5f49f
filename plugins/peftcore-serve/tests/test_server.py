"""The server in this process: answers are those of `generate`, errors those of the protocol."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_serve import folders
from peftcore_serve.app import Server
from peftcore_serve.command import make
from peftcore_serve.decoding import Batch
from starlette.testclient import TestClient
from support.commands import save_tokenizer

import peftcore
from peftcore.engine.adaptation.fused_forward import fused_modules

from .conftest import METHODS, PROMPTS, with_adapter, written

JSON = {"content-type": "application/json; charset=utf-8"}


def ask(client: TestClient, model: str, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    actual: dict[str, Any] = response.json()
    return actual


def test_the_base_is_fused(shared: tuple[Server, TestClient]) -> None:
    assert fused_modules(shared[0].scheduler.adapters.model)["attention"] == 2


def refused(client: TestClient, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    response = client.post(path, json=body)
    assert response.json().keys() == {"error"}
    return response.status_code, response.json()["error"]


def chunks(text: str) -> list[dict[str, Any]]:
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_the_base_and_each_adapter_are_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    names = [each["id"] for each in listed["data"]]
    assert listed["object"] == "list"
    assert names[0].startswith("llama") and names[1:] == sorted([*METHODS, "broken", "classifier"])
    assert client.get("/v1/models/one").json()["parent"] == names[0]
    assert client.get("/v1/models/none").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}


def test_every_answer_of_a_batch_is_that_of_generate(
    shared: tuple[Server, TestClient], llama: Path, saved: Path
) -> None:
    server, client = shared
    requested = [
        (name, prompt) for prompt in PROMPTS[:3] for name in ("one", "two", "wide", "scaled", "prefix", server.name)
    ]
    with ThreadPoolExecutor(len(requested)) as pool:
        before = server.scheduler.steps
        actual = list(pool.map(lambda each: ask(client, *each)["choices"][0]["text"], requested))
    together = server.scheduler.steps - before
    folders = {name: saved / name / ("adapter" if name == "two" else "") for name in METHODS}
    expected = [written(llama, folders.get(name), prompt) for name, prompt in requested]
    assert actual == expected
    assert len(set(expected)) > len(requested) // 2
    assert together < 8 * len(requested) / 2  # several were decoded in each step
    assert actual[:6] == [ask(client, *each)["choices"][0]["text"] for each in requested[:6]]


def test_usage_counts_and_ends(client: TestClient) -> None:
    actual = ask(client, "one", ["the film is", "a"], max_tokens=2, n=2)
    assert [each["index"] for each in actual["choices"]] == [0, 1, 2, 3]
    assert actual["choices"][0]["text"] == actual["choices"][1]["text"] != actual["choices"][2]["text"]
    assert actual["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    assert actual["choices"][0]["finish_reason"] == "length"
    words = ask(client, "one", "the film is")["choices"][0]["text"].split()
    assert len(set(words)) > 2
    stop = next(word for i, word in enumerate(words) if i > 1 and word not in " ".join(words[:i]))
    stopped = ask(client, "one", "the film is", stop=[stop])["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (" ".join(words).partition(stop)[0], "stop")


def test_tokens_as_a_prompt(client: TestClient, shared: tuple[Server, TestClient]) -> None:
    tokens = shared[0].texts.of_base.tokens("the film")
    assert ask(client, "one", tokens)["choices"][0]["text"] == ask(client, "one", "the film")["choices"][0]["text"]


def test_a_seed_repeats_a_sample(client: TestClient) -> None:
    samples = [ask(client, "one", "the film", temperature=1.5, seed=seed, n=2) for seed in (3, 3, 4)]
    texts = [[each["text"] for each in sample["choices"]] for sample in samples]
    assert texts[0] == texts[1] and texts[0] != texts[2] and texts[0][0] != texts[0][1]
    greedy = ask(client, "one", "the film")["choices"][0]["text"]
    assert ask(client, "one", "the film", temperature=1, top_p=0)["choices"][0]["text"] == greedy


def test_a_conversation_is_rendered_by_the_chat_template(client: TestClient) -> None:
    body = {"model": "two", "messages": [{"role": "user", "content": [{"type": "text", "text": "the film"}]}]}
    actual = client.post("/v1/chat/completions", json={**body, "temperature": 0, "max_completion_tokens": 5}).json()
    message = actual["choices"][0]["message"]
    assert message["role"] == "assistant" and actual["object"] == "chat.completion"
    assert message["content"] == ask(client, "two", "the film is", max_tokens=5)["choices"][0]["text"]


@pytest.mark.parametrize("model", ["one", "prefix"])
def test_a_stream_has_the_text_of_the_whole_answer(client: TestClient, model: str) -> None:
    body = {"model": model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    text = client.post("/v1/completions", json={**body, "prompt": "the film", "max_tokens": 8}).text
    *parts, usage = chunks(text)
    full = ask(client, model, "the film")
    assert "".join(part["choices"][0]["text"] for part in parts) == full["choices"][0]["text"]
    assert len(parts) > 2 and parts[-1]["choices"][0]["finish_reason"] == full["choices"][0]["finish_reason"]
    assert usage["usage"] == full["usage"] and usage["choices"] == []
    messages = [{"role": "user", "content": "the film"}]
    text = client.post("/v1/chat/completions", json={**body, "messages": messages, "max_tokens": 4, "n": 2}).text
    *parts, _ = chunks(text)
    for index in (0, 1):
        deltas = [p["choices"][0]["delta"] for p in parts if p["choices"][0]["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        message = "".join(delta.get("content", "") for delta in deltas)
        assert message == ask(client, model, "the film is", max_tokens=4)["choices"][0]["text"]


def test_log_probabilities_are_the_model_s(client: TestClient, llama: Path) -> None:
    name = client.get("/v1/models").json()["data"][0]["id"]
    actual = ask(client, name, "the film is", max_tokens=2, logprobs=2)["choices"][0]["logprobs"]
    model, tokenizer = models.load_model(str(llama), "causal-lm"), models.load_tokenizer(str(llama))
    with torch.no_grad():
        values = model(tokenizer("the film is", return_tensors="pt")["input_ids"]).logits[0, -1].log_softmax(-1)
    best = values.topk(2)
    assert actual["tokens"][0] == tokenizer.decode([best.indices[0]])
    assert actual["token_logprobs"][0] == pytest.approx(best.values[0].item(), abs=1e-5)  # sums in another order
    assert actual["top_logprobs"][0][tokenizer.decode([best.indices[1]])] == pytest.approx(
        best.values[1].item(), abs=1e-5
    )
    messages = [{"role": "user", "content": "the film"}]
    body = {"model": name, "messages": messages, "max_tokens": 2, "logprobs": True, "temperature": 0}
    chat = client.post("/v1/chat/completions", json={**body, "top_logprobs": 2}).json()["choices"][0]["logprobs"]
    assert [each["token"] for each in chat["content"]] == actual["tokens"]
    assert len(chat["content"][0]["top_logprobs"]) == 2


@pytest.mark.parametrize("adapter", [None, "one", "prefix"])
def test_a_prompt_that_is_echoed_has_its_log_probabilities(
    shared: tuple[Server, TestClient], llama: Path, saved: Path, adapter: str | None
) -> None:
    server, client = shared
    tokenizer = models.load_tokenizer(str(llama))
    prompts, model = ["the film is good", "a"], with_adapter(llama, adapter and saved / adapter)
    actual = ask(client, adapter or server.name, prompts, max_tokens=1, logprobs=2, echo=True, n=2)
    plain = ask(client, adapter or server.name, prompts, max_tokens=1, logprobs=2, n=2)
    assert actual["usage"] == plain["usage"]
    for i, (choice, without) in enumerate(zip(actual["choices"], plain["choices"], strict=True)):
        prompt = prompts[i // 2]
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            values = model(input_ids=ids).logits[0, -ids.shape[1] :].log_softmax(-1)
        expected = [float(values[j, token]) for j, token in enumerate(ids[0, 1:])]
        scored = choice["logprobs"]
        assert choice["text"] == prompt + without["text"]
        assert scored["tokens"] == [tokenizer.decode([token]) for token in ids[0]] + without["logprobs"]["tokens"]
        assert scored["token_logprobs"][0] is scored["top_logprobs"][0] is None
        assert scored["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-5)  # sums in another order
        for top, row in zip(scored["top_logprobs"][1:-1], values[:-1], strict=True):
            assert list(top.values()) == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)
        assert scored["token_logprobs"][-1] == pytest.approx(without["logprobs"]["token_logprobs"][0], abs=1e-5)


def test_a_prompt_can_be_scored_without_an_answer(shared: tuple[Server, TestClient]) -> None:
    server, client = shared
    full = ask(client, server.name, "the film is", max_tokens=0, logprobs=1, echo=True)
    assert full["choices"][0]["finish_reason"] == "length" and full["usage"]["completion_tokens"] == 0
    tokens = server.texts.of_base.tokens("the film is")
    body = {"model": server.name, "prompt": tokens, "max_tokens": 2, "temperature": 0, "logprobs": 1, "echo": True}
    *parts, _ = chunks(client.post("/v1/completions", json={**body, "stream": True}).text)
    first = parts[0]["choices"][0]
    assert first["text"] == full["choices"][0]["text"] == "the film is"
    assert first["logprobs"] == full["choices"][0]["logprobs"]
    written = ask(client, server.name, "the film is", max_tokens=2)["choices"][0]["text"]
    assert "".join(part["choices"][0]["text"] for part in parts) == f"the film is{written}"
    status, error = refused(client, "/v1/completions", model=server.name, prompt="a", max_tokens=0)
    assert (status, error["message"]) == (400, "'max_tokens' must be a whole number from 1 to 2147483647, found 0")


def test_an_unknown_model_names_those_that_there_are(client: TestClient) -> None:
    status, error = refused(client, "/v1/completions", model="onne", prompt="a")
    assert status == 404 and error["code"] == "model_not_found" and error["param"] == "model"
    assert error["message"].startswith("there is no model 'onne' (nearest: 'one'). The models are: llama")
    assert error["message"].endswith("broken, classifier, one, prefix, scaled, two, wide")
    assert refused(client, "/v1/completions", model="../one", prompt="a")[0] == 404
    assert refused(client, "/v1/completions", model="notes", prompt="a")[0] == 404


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("broken", "The file may be truncated, so copy it again"),
        ("classifier", "is a classifier and cannot write text"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_unusable_adapter_is_an_error_for_its_request(
    client: TestClient, model: str, message: str, stream: bool
) -> None:
    status, error = refused(client, "/v1/completions", model=model, prompt="a", stream=stream)
    assert status == 400 and message in error["message"], error
    assert ask(client, "one", "a")["choices"]


def test_other_paths_and_bodies_are_refused(client: TestClient) -> None:
    for response, status in (
        (client.get("/v1/nothing"), 404),
        (client.get("/v1/completions"), 405),
        (client.post("/v1/completions", content=b"{", headers=JSON), 400),
        (client.post("/v1/completions", content=b'{"model": "one", "prompt": "\\ud800"}', headers=JSON), 400),
        (client.post("/v1/completions", content=b" " * ((16 << 20) + 1), headers=JSON), 413),
        (client.post("/v1/completions", content=b'{"model": "one", "prompt": "a"}'), 415),
        (client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415),
    ):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_prompt_must_fit_the_context(client: TestClient, shared: tuple[Server, TestClient]) -> None:
    status, error = refused(client, "/v1/completions", model="one", prompt="a", max_tokens=2048)
    assert status == 400 and error["code"] == "context_length_exceeded"
    assert (
        "the prompt has 1 tokens and the answer may have 2,048, but the model's context has 2,048" in error["message"]
    )
    status, error = refused(client, "/v1/completions", model="one", prompt=[99999])
    assert status == 400 and "must be between 0 and 22, found 99999" in error["message"]


def test_folders_that_change_while_the_server_runs(llama: Path, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "one", tmp_path / "first")
    server = make(str(llama), tmp_path, limit=1)
    with TestClient(server.app) as client:
        first = ask(client, "first", "the film")["choices"][0]["text"]
        assert refused(client, "/v1/completions", model="later", prompt="a")[0] == 404
        shutil.copytree(saved / "wide", tmp_path / "later")
        later = ask(client, "later", "the film")["choices"][0]["text"]
        assert [*server.scheduler.adapters.by_name] == ["later"] and later != first
        shutil.rmtree(tmp_path / "first")
        shutil.copytree(saved / "wide", tmp_path / "first")  # another adapter with the name
        assert ask(client, "first", "the film")["choices"][0]["text"] == later
        shutil.rmtree(tmp_path / "first")
        assert refused(client, "/v1/completions", model="first", prompt="a")[0] == 404
        shutil.copytree(saved / "one", tmp_path / server.name)
        error = refused(client, "/v1/completions", model=server.name, prompt="a")[1]
        assert "names both the base and an adapter" in error["message"]


def test_a_sequence_waits_until_an_adapter_can_leave(llama: Path, saved: Path) -> None:
    server = make(str(llama), saved, limit=1, batch_size=4)
    requested = [(name, prompt) for prompt in PROMPTS[:2] for name in ("one", "wide", "scaled")]
    with TestClient(server.app) as client, ThreadPoolExecutor(len(requested)) as pool:
        actual = list(pool.map(lambda each: ask(client, *each)["choices"][0]["text"], requested))
        assert actual == [ask(client, *each)["choices"][0]["text"] for each in requested]


def test_closing_ends_answers_with_an_error(llama: Path, saved: Path) -> None:
    server = make(str(llama), saved)
    with TestClient(server.app) as client, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "the film", "max_tokens": 2000, "temperature": 1, "seed": 0}
        bodies = [{**body, "model": name, "n": 8} for name in ("one", "two")]
        running = [pool.submit(client.post, "/v1/completions", json=each) for each in bodies]
        while not server.scheduler.steps:
            time.sleep(0.01)
        server.scheduler.close()
        for each in running:
            assert each.result().status_code == 503
            assert each.result().json()["error"]["message"] == "the server is shutting down"
        assert refused(client, "/v1/completions", model="one", prompt="a")[0] == 503
    assert server.scheduler._thread not in threading.enumerate()


def test_an_error_while_tokens_are_decoded_is_of_its_request_alone(
    shared: tuple[Server, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = shared
    expected = ask(client, "one", "the film")["choices"][0]["text"]

    decode = server.texts.of_base.decode

    def fails(tokens: list[int]) -> str:
        if len(tokens) == 3:
            raise OverflowError("out of range")
        return decode(tokens)

    monkeypatch.setattr(server.texts.of_base, "decode", fails)
    body = {"model": server.name, "prompt": "the film", "max_tokens": 3, "temperature": 0}
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(ask, client, "one", "the film")
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "OverflowError: out of range"
    assert answer.result()["choices"][0]["text"] == expected


def test_a_batch_that_fails_is_continued_one_by_one(llama: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make(str(llama), saved)
    step = Batch.step

    def fails(batch: Batch) -> Any:
        if len(batch.sequences) > 1:
            raise RuntimeError("not together")
        return step(batch)

    monkeypatch.setattr(Batch, "step", fails)
    with TestClient(server.app) as client:
        actual = [each["text"] for each in ask(client, "one", ["the film", "a"])["choices"]]
        assert actual == [ask(client, "one", prompt)["choices"][0]["text"] for prompt in ("the film", "a")]


def test_adapters_with_a_tokenizer_or_a_vocabulary_of_their_own(llama: Path, saved: Path, tmp_path: Path) -> None:
    for name in ("ann", "eve"):
        shutil.copytree(saved / "one", tmp_path / name)
        save_tokenizer(tmp_path / name)
        own = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        own["chat_template"] = "{% for m in messages %}{{ m['content'] + ' was ' }}{% endfor %}"
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(own))
    shutil.copytree(saved / "one", tmp_path / "plain")
    larger = models.load_model(str(llama), "causal-lm")
    larger.resize_token_embeddings(25)
    peftcore.apply(larger, "lora", modules_to_save=["embed_tokens", "lm_head"])
    peftcore.save(larger, tmp_path / "larger")
    server = make(str(llama), tmp_path, trust_templates=True)
    with TestClient(server.app) as client:
        body = {"messages": [{"role": "user", "content": "the film"}], "temperature": 0, "max_tokens": 5}
        actual = client.post("/v1/chat/completions", json={**body, "model": "ann"}).json()
        assert actual["choices"][0]["message"]["content"] == written(llama, saved / "one", "the film was", 5)
        there = folders.find(tmp_path)
        assert (
            server.texts.for_adapter(there["ann"]) is server.texts.for_adapter(there["ann"]) is not server.texts.of_base
        )
        assert server.texts.for_adapter(there["plain"]) is server.texts.of_base
        status, error = refused(client, "/v1/chat/completions", **body, model="plain")
        assert status == 400 and "has no chat template" in error["message"]
        status, error = refused(client, "/v1/completions", model="larger", prompt="a")
        assert status == 400
        assert "'larger' has a vocabulary of 25 tokens, but the base has 23. Merge the adapter" in error["message"]

"""Requests of OpenAI's protocol: what is read, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from peftcore_serve import protocol
from peftcore_serve.protocol import Answer, ProtocolError, Request
from peftcore_serve.sequence import Piece, Sampling, TokenLogprob

HUGE = 10**4300 - 1  # the longest number that JSON is read with, which cannot be added to and printed
HELLO = [{"role": "user", "content": "hello"}]


def test_fields_have_the_defaults_of_the_protocol() -> None:
    assert protocol.completion({"model": "m", "prompt": "a", "user": "x", "seed": None, "n": 1}) == Request(
        "m", ["a"], 1, Sampling(16, 1.0, 1.0, None, None), (), False, False, False
    )
    actual = protocol.chat({"model": "m", "messages": HELLO, "max_tokens": 3, "stop": "x", "frequency_penalty": 0})
    assert actual == Request("m", [HELLO], 1, Sampling(3, 1.0, 1.0, None, None), ("x",), False, False, True)


def test_prompts_are_texts_or_tokens() -> None:
    for prompt, prompts in ((["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])):
        assert protocol.completion({"model": "m", "prompt": prompt}).prompts == prompts


def test_roles_and_parts_of_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts, "name": "ann"}]
    expected = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "ab"}]
    assert protocol.chat({"model": "m", "messages": messages}).prompts == [expected]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", 3, "'model' must be the name of a model; GET /v1/models lists them, found 3"),
        ("prompt", None, "'prompt' is missing. Pass a text, or a list of texts"),
        ("prompt", [], "'prompt' must be a text, a list of texts, or lists of tokens, found []"),
        ("prompt", [True], "'prompt' must be a text, a list of texts, or lists of tokens, found True"),
        ("prompt", ["a", 1], "'prompt' must be a text, a list of texts, or lists of tokens, found 1"),
        ("max_tokens", 0, "'max_tokens' must be a whole number from 1 to 2147483647, found 0"),
        ("max_tokens", 1.5, "'max_tokens' must be a whole number from 1 to 2147483647, found 1.5"),
        ("temperature", 3, "'temperature' must be a number from 0 to 2, found 3"),
        ("temperature", math.nan, "'temperature' must be a number from 0 to 2, found nan"),
        ("top_p", "1", "'top_p' must be a number from 0 to 1, found '1'"),
        ("max_tokens", HUGE, "'max_tokens' must be a whole number from 1 to 2147483647, found 9999"),
        ("temperature", 5e-324, "'temperature' must be 0, for the most likely tokens, or a number from 1e-05 to 2"),
        ("temperature", HUGE, "'temperature' must be a number from 0 to 2, found 9999"),
        ("prompt", [HUGE], "'prompt' must be a text, a list of texts, or lists of tokens, found 9999"),
        ("n", HUGE, "'n' must be a whole number from 1 to 256, found 9999"),
        ("n", 300, "'n' must be a whole number from 1 to 256, found 300"),
        ("seed", True, "'seed' must be a whole number from -9223372036854775808 to 9223372036854775807, found True"),
        ("stop", ["a"] * 5, "'stop' must be a non-empty text, or a list of at most 4, found ['a', 'a'"),
        ("stop", "", "'stop' must be a non-empty text, or a list of at most 4, found ['']"),
        ("stream", 1, "'stream' must be true or false, found 1"),
        (
            "stream_options",
            {},
            "'stream_options' must be such as {\"include_usage\": true}, with stream: true, found {}",
        ),
        ("logprobs", 6, "'logprobs' must be a whole number from 0 to 5, found 6"),
        ("best_of", 2, "best_of is not supported. Remove the field, or set n"),
        ("echo", 1, "'echo' must be true or false, found 1"),
        ("logit_bias", {"1": 2}, "this server does not support logit_bias. Remove the field"),
        ("temprature", 1, "unknown field 'temprature' (nearest: 'temperature'). Remove the field"),
    ],
)
def test_wrong_fields_of_completions(field: str, value: Any, message: str) -> None:
    with pytest.raises(ProtocolError) as error:
        protocol.completion({"model": "m", "prompt": "a", field: value})
    actual = error.value.body["error"]
    assert str(actual["message"]).startswith(message)
    assert (error.value.status, actual["type"], actual["param"]) == (400, "invalid_request_error", field)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "'messages' must be a list of at least one message, found []"),
        ({"messages": ["a"]}, "'messages[0]' must be an object with role and content, found 'a'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "'messages[0].role' must be one of system, developer, user"),
        ({"messages": [*HELLO, {"role": "user"}]}, "'messages[1].content' must be a text, or a list of parts of type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "'messages[0].content' must be a text, or a list of parts of type text, found",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "this server does not support messages[0].tool_calls. Remove the field",
        ),
        ({"tools": [{}]}, "this server does not support tools. Remove the field"),
        ({"response_format": {"type": "json_object"}}, "this server does not support response_format"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"logprobs": 2}, "'logprobs' must be true or false, found 2"),
        ({"prompt": "a"}, "unknown field 'prompt'"),
    ],
)
def test_wrong_fields_of_chats(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError) as error:
        protocol.chat({"model": "m", "messages": HELLO, **fields})
    assert str(error.value).startswith(message)


def test_a_body_is_an_object() -> None:
    with pytest.raises(ProtocolError, match="the body must be a JSON object, found list"):
        protocol.completion([])


def test_an_impossible_token_has_a_log_probability_that_json_has() -> None:
    request = protocol.completion({"model": "m", "prompt": "a", "logprobs": 1})
    piece = Piece("ab", (TokenLogprob(1, -0.5), TokenLogprob(2, -math.inf, ((3, -math.inf),))))
    body = Answer(request, "<{}>".format, 4).full([[piece]], ["stop"], 2)
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["<1>", "<2>"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{}, {"<3>": -9999.0}],
        "text_offset": [0, 3],
    }

"""A sequence: which tokens are chosen, which text is certain, and where it ends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peftcore_serve.sequence import Event, Failed, Finished, Piece, Sampling, Sequence, TokenLogprob


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


def sequence(max_tokens: int = 99, **fields: Any) -> tuple[Sequence, list[Event]]:
    events: list[Event] = []
    names = ("stop", "streams", "ends")
    given = {name: fields.pop(name) for name in names if name in fields}
    options = {"ends": frozenset({0}), **given}
    return Sequence([1], None, Sampling(max_tokens, **fields), decode=decode, notify=events.append, **options), events


def feed(one: Sequence, text: bytes) -> None:
    for value in text:
        one.extend(torch.nn.functional.one_hot(torch.tensor(value), 256).float())


def test_pieces_are_whole_characters() -> None:
    one, events = sequence(streams=True)
    feed(one, "aé😀b".encode() + b"\0")
    assert [event.text for event in events if isinstance(event, Piece)] == ["a", "é", "😀", "b"]
    assert events[-1] == Finished(Piece("\0"), "stop", 9)


@pytest.mark.parametrize("streams", [False, True])
def test_no_part_of_a_stop_text_is_sent(streams: bool) -> None:
    one, events = sequence(stop=("END", "\n"), streams=streams)
    feed(one, b"an EN EEND more")
    pieces = [event.text for event in events if isinstance(event, Piece)]
    assert isinstance(events[-1], Finished) and (events[-1].reason, events[-1].tokens) == ("stop", 10)
    assert "".join(pieces) + events[-1].last_piece.text == "an EN E"
    assert pieces == (["a", "n", " ", "EN ", "E"] if streams else [])


def test_what_was_held_for_a_stop_text_is_sent_at_the_end() -> None:
    one, events = sequence(3, stop=("abcd",), streams=True)
    feed(one, b"abc")
    assert events == [Finished(Piece("abc"), "length", 3)]


def test_log_probabilities_come_with_the_text_of_their_tokens() -> None:
    one, events = sequence(2, logprobs=1, streams=True, stop=("ab",))
    feed(one, b"ax")
    (finished,) = events
    assert isinstance(finished, Finished) and [each.token for each in finished.last_piece.logprobs] == list(b"ax")
    value = torch.nn.functional.one_hot(torch.tensor(97), 256).float().log_softmax(-1)[97].item()
    assert finished.last_piece.logprobs[0] == TokenLogprob(97, value, ((97, value),))


def test_nan_is_an_error() -> None:
    one, events = sequence()
    one.extend(torch.full((256,), torch.nan))
    assert events == [
        Failed("the model's logits contain NaN. Check the adapter, or serve the base in fp32: --dtype fp32", False)
    ]
    feed(one, b"a")
    assert len(events) == 1 and one.tokens == []


def test_samples_follow_temperature_and_top_p() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for options, expected in (
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, (probabilities**2 / (probabilities**2).sum()).tolist()),
        ({"temperature": 1.0, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ):
        one, _ = sequence(1001, seed=1, ends=frozenset(), **options)
        for _ in range(1000):
            one.extend(probabilities.log())
        counts = Counter(one.tokens)
        assert [counts[token] / 1000 for token in range(4)] == pytest.approx(expected, abs=0.05)  # three deviations

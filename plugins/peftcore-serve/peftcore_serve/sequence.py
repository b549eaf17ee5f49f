"""A sequence that the model continues: sampling, stopping, and its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftcore import PeftcoreError

STOP, LENGTH = "stop", "length"  # finish reasons of the protocol
_NAN = "the model's logits contain NaN. Check the adapter, or serve the base in fp32: --dtype fp32"


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Args:
        max_tokens: maximum number of tokens. 0 is only allowed if the prompt is echoed.
        temperature: sampling temperature; 0 means greedy decoding.
        top_p: sample from the most likely tokens that together have this probability.
        seed: random seed of this sequence, or None for a random seed.
        logprobs: number of most likely tokens to report for each token, or None for no log probabilities.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token, and the log probabilities of the most likely tokens at its position.

    The first token of a prompt has no log probability.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next part of a sequence's text, with the log probabilities of its tokens if requested."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a sequence, with its last piece, the reason, and the number of generated tokens."""

    last_piece: Piece
    reason: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The error that ended a sequence. `is_users`: whether the request caused the error."""

    message: str
    is_users: bool


Event = Piece | Finished | Failed


@dataclass(eq=False)
class Sequence:
    """A prompt that the model continues.

    Args:
        prompt: tokens, at least one.
        adapter: name of the adapter in the folder of adapters, or None for the base model.
        sampling: sampling settings.
        ends: tokens that end the sequence.
        decode: (tokens) -> text.
        notify: function that receives the events, in the scheduler's thread.
        stop: texts that end the sequence and are not part of it.
        streams: whether to send pieces while the sequence grows.
        echo: text of the prompt, sent as the first piece, or None.
    """

    prompt: list[int]
    adapter: str | None
    sampling: Sampling
    ends: frozenset[int]
    decode: Callable[[list[int]], str]
    notify: Callable[[Event], None]
    stop: tuple[str, ...] = ()
    streams: bool = False
    echo: str | None = None
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False
    _sent_length: int = 0
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.sampling.seed)

    def cancel(self) -> None:
        """End the sequence without an event. The scheduler drops it before the next step."""
        self.is_done = True

    def fail(self, message: str, *, is_users: bool = False) -> None:
        """End the sequence with an error."""
        if not self.is_done:
            self.is_done = True
            self.notify(Failed(message, is_users))

    @property
    def scores_prompt(self) -> bool:
        """Whether `begin` needs the logits of the prompt."""
        return self.echo is not None and self.sampling.logprobs is not None

    def begin(self, logits: Tensor | None) -> None:
        """Send the prompt if `echo` is set; `logits` `[tokens, V]` are those of the prompt if `scores_prompt`."""
        if self.is_done or self.echo is None:
            return
        logprobs: list[TokenLogprob] = []
        if logits is not None and self.sampling.logprobs is not None:
            if bool(logits.isnan().any()):
                self.fail(_NAN)
                return
            logprobs.append(TokenLogprob(self.prompt[0], None))
            logprobs += [
                _logprob(row.float(), token, self.sampling.logprobs)
                for row, token in zip(logits[:-1], self.prompt[1:], strict=True)
            ]
        self.notify(Piece(self.echo, tuple(logprobs)))
        self.echo = None
        if self.sampling.max_tokens == 0:
            self.is_done = True
            self.notify(Finished(Piece(""), LENGTH, 0))

    def extend(self, logits: Tensor) -> None:
        """Choose the next token from `logits` `[V]`, and send an event for the text that it adds."""
        if self.is_done:
            return
        logits = logits.float()
        if bool(logits.isnan().any()):
            self.fail(_NAN)
            return
        token = self._choose(logits)
        if self.sampling.logprobs is not None:
            self._logprobs.append(_logprob(logits, token, self.sampling.logprobs))
        self.tokens.append(token)
        at_end, is_full = token in self.ends, len(self.tokens) >= self.sampling.max_tokens
        text, at_stop = self._text(at_end or is_full)
        if at_end or at_stop or is_full:
            self.is_done = True
            self.notify(Finished(self._piece(text), STOP if at_end or at_stop else LENGTH, len(self.tokens)))
        elif self.streams and len(text) > self._sent_length:
            self.notify(self._piece(text))

    def _choose(self, logits: Tensor) -> int:
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = (logits.cpu().double() / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            sorted_probabilities, order = probabilities.sort(descending=True)
            preceding = sorted_probabilities.cumsum(-1) - sorted_probabilities
            probabilities[order[1:][preceding[1:] >= self.sampling.top_p]] = 0
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _text(self, ends: bool) -> tuple[str, bool]:
        """Return the text that later tokens cannot change, and whether a stop text ended it."""
        if not (ends or self.stop or self.streams):
            return "", False
        text = self.decode(self.tokens)
        positions = [text.find(stop) for stop in self.stop if stop in text]
        if positions:
            return text[: min(positions)], True
        if ends:
            return text, False
        text = text.rstrip("\ufffd")  # an incomplete character at the end
        overlap = max((_overlap(text, stop) for stop in self.stop), default=0)
        return text[: len(text) - overlap], False

    def _piece(self, text: str) -> Piece:
        piece = Piece(text[self._sent_length :], tuple(self._logprobs))
        self._sent_length, self._logprobs = max(self._sent_length, len(text)), []
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    values = logits.log_softmax(-1)
    best = values.topk(min(count, len(values)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(values[token]), top)


def error_message(error: Exception) -> str:
    """Return an error's message in one line."""
    is_ours = isinstance(error, PeftcoreError)
    return str(error) if is_ours else f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"

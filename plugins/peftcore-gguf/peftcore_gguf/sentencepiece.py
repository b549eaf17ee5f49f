"""SentencePiece BPE as GGUF keys: texts are not split, spaces are ▁, unknown characters are bytes (Llama 2, Gemma).

transformers merges the pair with the lowest rank. llama.cpp merges the pair whose token has the highest score, and the
first of equal pairs (src/llama-vocab.cpp, llm_tokenizer_spm). The two agree if every pair that forms a token is a
merge, and the ranks of a token's pairs are contiguous. The score of a token is then -rank.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

from peftcore.plugin import warn

SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
DEFAULTS = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}

Merge = tuple[str, str]
Steps = list[dict[str, Any]]

_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
# Metaspace prepends no space to a text that begins with one, so this normalizer doubles it.
_DOUBLE_SPACE = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": SPACE * 2}


def _metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_SPACES = "llama.cpp adds a space before a text that begins with one, and"
_ALWAYS_DIFFERS = f"{_SPACES} before a part of it after a special token that does. This tokenizer does not"
_FIRST_DIFFERS = (
    f'{_SPACES} after each special token in it. This tokenizer does not (set "legacy": true in the base\'s '
    "tokenizer_config.json before training to change that)"
)
# (normalizer, pre-tokenizer, whether a space is prepended, how llama.cpp differs)
SCHEMES: list[tuple[Steps, Steps, bool, str]] = [
    ([_PREPEND, _ESCAPE], [], True, ""),
    ([_ESCAPE, _DOUBLE_SPACE], [_metaspace("always")], True, ""),
    ([_ESCAPE], [], False, ""),
    ([_ESCAPE], [_AT_SPACES], False, ""),  # spaces are already ▁, so the split finds none
    ([], [_metaspace("never")], False, ""),
    ([], [_metaspace("always")], True, _ALWAYS_DIFFERS),
    ([], [_metaspace("first")], True, _FIRST_DIFFERS),
]


def is_sentencepiece(parts: dict[str, Any]) -> bool:
    """Return whether the tokenizer.json is a SentencePiece BPE tokenizer."""
    return parts["model"]["type"] == "BPE" and bool(parts["model"].get("byte_fallback"))


def byte_of(token: str) -> str | None:
    """Return the byte token of an ASCII character, which llama.cpp uses if the character has no token."""
    return BYTES[ord(token)] if len(token) == 1 and token.isascii() else None


def prepends_space(parts: dict[str, Any]) -> bool:
    """Return whether a space is prepended to texts. llama.cpp then also adds a space after special tokens.

    Raises:
        ValueError: llama.cpp handles spaces differently. The message is the reason.
    """
    normalizer, pre_tokenizer = (
        _as_steps(parts["normalizer"], "normalizers"),
        _as_steps(parts["pre_tokenizer"], "pretokenizers"),
    )
    scheme = next((scheme for scheme in SCHEMES if scheme[:2] == (normalizer, pre_tokenizer)), None)
    if scheme is None:
        step_types = ", ".join(step["type"] for step in [*normalizer, *pre_tokenizer]) or "nothing"
        raise ValueError(f"it handles spaces differently than SentencePiece ({step_types})")
    prepends, difference = scheme[2:]
    if difference:
        warn(f"{difference}: llama.cpp will tokenize such texts differently")
    for added_token in parts["added_tokens"]:
        if normalizer and added_token["normalized"] and (prepends or {" ", SPACE} & set(added_token["content"])):
            raise ValueError(
                f"its token {added_token['content']!r} is matched after normalization. Add it as AddedToken(..., "
                "normalized=False)"
            )
    return prepends


def merge_scores(parts: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, float]:
    """Return {token: score} for all tokens that are merges of two others.

    Raises:
        ValueError: llama.cpp would merge in another order. The message is the reason.
    """
    model = parts["model"]
    unsupported_keys = [key for key, value in DEFAULTS.items() if (model.get(key) or value) != value]
    if unsupported_keys:
        raise ValueError(f"its BPE sets {', '.join(unsupported_keys)}")
    missing_bytes = set(BYTES) - vocabulary.keys()
    if missing_bytes:
        raise ValueError(f"it has no token for {len(missing_bytes)} of the 256 bytes, such as {min(missing_bytes)}")
    merges = [_as_pair(each) for each in model["merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    _refuse_missing_merges(parts, vocabulary, ranks)
    groups = _groups(merges)
    token_scores = {
        left_token + right_token: -float(i) for i, group in enumerate(groups) for left_token, right_token in group
    }
    _refuse_ambiguous(groups, ranks, token_scores)
    return token_scores


def _as_steps(component: dict[str, Any] | None, key: str) -> Steps:
    """Return the steps of a normalizer or pre-tokenizer. None has no steps, and a Sequence has a list under `key`."""
    if not component:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [component]


def _as_pair(merge: str | list[str]) -> Merge:
    left_token, right_token = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left_token, right_token


def _refuse_missing_merges(parts: dict[str, Any], vocabulary: dict[str, int], ranks: dict[Merge, int]) -> None:
    """Raise a ValueError if llama.cpp would merge a pair that transformers does not merge."""
    added_contents = {added_token["content"] for added_token in parts["added_tokens"]}  # split off before any merge
    for token in vocabulary:
        if token in added_contents and SPACE not in token:
            continue
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair not in ranks and all(len(part) == 1 or part in vocabulary for part in pair):
                raise ValueError(f"it has the token {token!r}, but no merge of {pair[0]!r} and {pair[1]!r}")


def _groups(merges: list[Merge]) -> list[list[Merge]]:
    """Group the merges in order, so that all pairs that form a token are in one group with one score."""
    last_ranks = {left_token + right_token: rank for rank, (left_token, right_token) in enumerate(merges)}
    groups: list[list[Merge]] = []
    end = -1
    for rank, (left_token, right_token) in enumerate(merges):
        if rank > end:
            groups.append([])
        groups[-1].append((left_token, right_token))
        end = max(end, last_ranks[left_token + right_token])
    return groups


def _refuse_ambiguous(groups: list[list[Merge]], ranks: dict[Merge, int], token_scores: dict[str, float]) -> None:
    """Raise a ValueError if merging by equal scores and merging by ranks give different tokens."""
    for group in groups:
        right_parts: defaultdict[str, list[str]] = defaultdict(list)
        for left_token, right_token in group:
            right_parts[left_token].append(right_token)
        for left_token, middle in group:
            for right_token in right_parts[middle]:
                if ranks[middle, right_token] >= ranks[left_token, middle]:
                    continue
                text = left_token + middle + right_token
                if _merge(text, token_scores, {}) != _merge(text, {}, ranks):
                    raise ValueError(f"its merges of {text!r} have an order that scores cannot express")


def _merge(text: str, token_scores: dict[str, float], ranks: dict[Merge, int]) -> list[str]:
    """Return the tokens of a short text, merged by scores or by ranks. The unused mapping is empty."""
    tokens = list(text)
    while True:
        pairs = list(enumerate(pairwise(tokens)))
        candidates = [(ranks[pair], i) for i, pair in pairs if pair in ranks]
        candidates += [(-token_scores[a + b], i) for i, (a, b) in pairs if a + b in token_scores]  # type: ignore[misc]
        if not candidates:
            return tokens
        i = min(candidates)[1]
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]

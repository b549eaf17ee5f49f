"""SentencePiece BPE as GGUF keys: whole texts, spaces as ▁, bytes for unknown characters (Llama 2, Mistral, Gemma).

transformers merges the pair of lowest rank, llama.cpp the pair whose token has the highest score, the first of equals
(src/llama-vocab.cpp, llm_tokenizer_spm). Both agree if every pair that makes a token is a merge and the ranks of a
token's pairs are contiguous; a token's score is then -rank.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

from peftcore.plugin import warn

SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PLAIN = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}

Merge = tuple[str, str]
Steps = list[dict[str, Any]]

_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
# Metaspace adds no space to a text that begins with one.
_TWICE = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": SPACE * 2}


def _metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_SPACES = "llama.cpp puts a space before a text that begins with one, and"
_ALWAYS = f"{_SPACES} before a part of it after a special token that does. This tokenizer does not"
_FIRST = (
    f'{_SPACES} after each special token in it. This tokenizer does not (set "legacy": true in the base\'s '
    "tokenizer_config.json before training to change that)"
)
WAYS: list[tuple[Steps, Steps, bool, str]] = [  # normalizer, pre-tokenizer, whether a space is prepended, difference
    ([_PREPEND, _ESCAPE], [], True, ""),
    ([_ESCAPE, _TWICE], [_metaspace("always")], True, ""),
    ([_ESCAPE], [], False, ""),
    ([_ESCAPE], [_AT_SPACES], False, ""),  # no character is left for merges
    ([], [_metaspace("never")], False, ""),
    ([], [_metaspace("always")], True, _ALWAYS),
    ([], [_metaspace("first")], True, _FIRST),
]


def is_sentencepiece(parts: dict[str, Any]) -> bool:
    """Return whether the tokenizer.json is a SentencePiece BPE tokenizer."""
    return parts["model"]["type"] == "BPE" and bool(parts["model"].get("byte_fallback"))


def byte_of(token: str) -> str | None:
    """Return the byte token of a character, which llama.cpp uses if the character has no token."""
    return BYTES[ord(token)] if len(token) == 1 and token.isascii() else None


def space_before(parts: dict[str, Any]) -> bool:
    """Return whether a space is prepended to a text; llama.cpp then also puts one after special tokens.

    Raises:
        ValueError: spaces are handled differently; the message says how.
    """
    normalizer, before = _steps(parts["normalizer"], "normalizers"), _steps(parts["pre_tokenizer"], "pretokenizers")
    way = next((way for way in WAYS if way[:2] == (normalizer, before)), None)
    if way is None:
        found = ", ".join(step["type"] for step in [*normalizer, *before]) or "nothing"
        raise ValueError(f"it handles spaces differently from SentencePiece ({found})")
    space, differs = way[2:]
    if differs:
        warn(f"{differs}: such texts would be tokenized differently by llama.cpp")
    for each in parts["added_tokens"]:
        if normalizer and each["normalized"] and (space or {" ", SPACE} & set(each["content"])):
            raise ValueError(
                f"its token {each['content']!r} is searched for after normalization. Add it as AddedToken(..., "
                "normalized=False)"
            )
    return space


def scores(parts: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, float]:
    """Return {token: score} for tokens made by merging two others.

    Raises:
        ValueError: llama.cpp would merge in another order; the message says why.
    """
    model = parts["model"]
    odd = [key for key, value in PLAIN.items() if (model.get(key) or value) != value]
    if odd:
        raise ValueError(f"its BPE has {', '.join(odd)}")
    missing = set(BYTES) - vocabulary.keys()
    if missing:
        raise ValueError(f"it has no token for {len(missing)} of the 256 bytes, such as {min(missing)}")
    merges = [_pair(each) for each in model["merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    _refuse_unlike(parts, vocabulary, ranks)
    groups = _groups(merges)
    found = {left + right: -float(i) for i, group in enumerate(groups) for left, right in group}
    _refuse_ambiguous(groups, ranks, found)
    return found


def _steps(given: dict[str, Any] | None, key: str) -> Steps:
    steps = given[key] if given and given["type"] == "Sequence" else [given] if given else []
    return list(steps)


def _pair(merge: str | list[str]) -> Merge:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _refuse_unlike(parts: dict[str, Any], vocabulary: dict[str, int], ranks: dict[Merge, int]) -> None:
    """Raise a ValueError if a pair that llama.cpp would merge is not a merge."""
    apart = {each["content"] for each in parts["added_tokens"]}  # split off before merging
    for token in vocabulary:
        if token in apart and SPACE not in token:
            continue
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair not in ranks and all(len(part) == 1 or part in vocabulary for part in pair):
                raise ValueError(f"{pair[0]!r} and {pair[1]!r} are not a merge, though {token!r} is a token")


def _groups(merges: list[Merge]) -> list[list[Merge]]:
    """Return the merges in order, grouped by those whose tokens must share a score."""
    last = {left + right: rank for rank, (left, right) in enumerate(merges)}
    groups: list[list[Merge]] = []
    end = -1
    for rank, (left, right) in enumerate(merges):
        if rank > end:
            groups.append([])
        groups[-1].append((left, right))
        end = max(end, last[left + right])
    return groups


def _refuse_ambiguous(groups: list[list[Merge]], ranks: dict[Merge, int], found: dict[str, float]) -> None:
    """Raise a ValueError if equal scores lead llama.cpp to other tokens than ranks lead transformers to."""
    for group in groups:
        behind = defaultdict(list)
        for left, right in group:
            behind[left].append(right)
        for left, middle in group:
            for right in behind[middle]:
                text = left + middle + right
                if ranks[middle, right] < ranks[left, middle] and _merged(text, found, {}) != _merged(text, {}, ranks):
                    raise ValueError(f"its merges of {text!r} have an order that scores cannot express")


def _merged(text: str, found: dict[str, float], ranks: dict[Merge, int]) -> list[str]:
    """Return the tokens of a short text, merged by scores or by ranks."""
    tokens = list(text)
    while True:
        pairs = list(enumerate(pairwise(tokens)))
        open_ = [(ranks[pair], i) for i, pair in pairs if pair in ranks]
        open_ += [(-found[a + b], i) for i, (a, b) in pairs if a + b in found]  # type: ignore[misc]
        if not open_:
            return tokens
        i = min(open_)[1]
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]

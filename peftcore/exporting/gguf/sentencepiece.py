"""SentencePiece's BPE as keys of GGUF: a text whole, spaces as ▁, what has no token in bytes (Llama 2, Mistral, Gemma).

transformers merges the pair of the lowest rank, llama.cpp the two whose token scores highest, and of equals the first
(src/llama-vocab.cpp, llm_tokenizer_spm). Both are the same where every pair that makes a token is a merge, and the
ranks of a token's pairs lie together; a token's score is then -rank.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from itertools import pairwise
from typing import Any

SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PLAIN = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}

Merge = tuple[str, str]
Steps = list[dict[str, Any]]

_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_TWICE = {
    "type": "Replace",
    "pattern": {"Regex": r"\A▁"},
    "content": SPACE * 2,
}  # since Metaspace spares a text with one


def _metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_SPACES = "llama.cpp puts a space before a text that begins with one, and"
_ALWAYS = f"{_SPACES} before a part of it behind a special token that does. This tokenizer puts none there"
_FIRST = (
    f'{_SPACES} behind each special token in it. This tokenizer puts none there ("legacy": true in the base\'s '
    "tokenizer_config.json, before training, has it put those behind special tokens)"
)
WAYS: list[tuple[Steps, Steps, bool, str]] = [  # normalizer, pre-tokenizer, a space before the text, what differs
    ([_PREPEND, _ESCAPE], [], True, ""),
    ([_ESCAPE, _TWICE], [_metaspace("always")], True, ""),
    ([_ESCAPE], [], False, ""),
    ([_ESCAPE], [_AT_SPACES], False, ""),  # of which none are left
    ([], [_metaspace("never")], False, ""),
    ([], [_metaspace("always")], True, _ALWAYS),
    ([], [_metaspace("first")], True, _FIRST),
]


def is_sentencepiece(parts: dict[str, Any]) -> bool:
    """Whether the tokenizer.json is one of those."""
    return parts["model"]["type"] == "BPE" and bool(parts["model"].get("byte_fallback"))


def byte_of(token: str) -> str | None:
    """The token of the byte that a character is; llama.cpp writes it so where the character has none."""
    return BYTES[ord(token)] if len(token) == 1 and token.isascii() else None


def space_before(parts: dict[str, Any]) -> bool:
    """Whether a text gets a space before it, which llama.cpp then puts behind special tokens, too.

    Raises:
        ValueError: spaces are treated in another way; what is odd.
    """
    normalizer, before = _steps(parts["normalizer"], "normalizers"), _steps(parts["pre_tokenizer"], "pretokenizers")
    way = next((way for way in WAYS if way[:2] == (normalizer, before)), None)
    if way is None:
        found = ", ".join(step["type"] for step in [*normalizer, *before]) or "nothing"
        raise ValueError(f"it treats spaces in another way than SentencePiece ({found})")
    space, differs = way[2:]
    if differs:
        warnings.warn(f"{differs}: such texts get other tokens in llama.cpp", stacklevel=2)
    for each in parts["added_tokens"]:
        if normalizer and each["normalized"] and (space or {" ", SPACE} & set(each["content"])):
            raise ValueError(
                f"its token {each['content']!r} is looked for behind what the normalizer makes of a text. Add it as "
                "AddedToken(..., normalized=False)"
            )
    return space


def scores(parts: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, float]:
    """{token: its score}, of those that are made of two.

    Raises:
        ValueError: llama.cpp would merge in another order; what is odd.
    """
    model = parts["model"]
    odd = [key for key, value in PLAIN.items() if (model.get(key) or value) != value]
    if odd:
        raise ValueError(f"its BPE has {', '.join(odd)}")
    missing = set(BYTES) - vocabulary.keys()
    if missing:
        raise ValueError(f"it has no token for {len(missing)} of the 256 bytes, as {min(missing)}")
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
    """A pair that llama.cpp would merge is no merge."""
    apart = {each["content"] for each in parts["added_tokens"]}  # cut out of a text before
    for token in vocabulary:
        if token in apart and SPACE not in token:
            continue
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair not in ranks and all(len(part) == 1 or part in vocabulary for part in pair):
                raise ValueError(f"{pair[0]!r} and {pair[1]!r} are no merge, though {token!r} is a token")


def _groups(merges: list[Merge]) -> list[list[Merge]]:
    """The merges in their order, those together whose tokens must have one score."""
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
    """Of equal scores llama.cpp merges the first, transformers that of the lower rank: do they end in the same?"""
    for group in groups:
        behind = defaultdict(list)
        for left, right in group:
            behind[left].append(right)
        for left, middle in group:
            for right in behind[middle]:
                text = left + middle + right
                if ranks[middle, right] < ranks[left, middle] and _merged(text, found, {}) != _merged(text, {}, ranks):
                    raise ValueError(f"its merges of {text!r} have an order that no scores have")


def _merged(text: str, found: dict[str, float], ranks: dict[Merge, int]) -> list[str]:
    """The tokens of a short text by scores, or by ranks."""
    tokens = list(text)
    while True:
        pairs = list(enumerate(pairwise(tokens)))
        open_ = [(ranks[pair], i) for i, pair in pairs if pair in ranks]
        open_ += [(-found[a + b], i) for i, (a, b) in pairs if a + b in found]  # type: ignore[misc]
        if not open_:
            return tokens
        i = min(open_)[1]
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]

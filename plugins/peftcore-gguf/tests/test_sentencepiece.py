"""SentencePiece's BPE as keys of GGUF, read by transformers and, as it is written down here, by llama.cpp."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.exported import keys, llama
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

import peftcore
from peftcore import PeftcoreError

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁a", "ab", "▁ab", "ba", "aba", "▁▁", "\n\n", "▁▁▁▁", "▁▁▁", "b▁", "ab▁ab", "éa"]  # from the likeliest
KIND = gguf.TokenType


def vocabulary(*special: str) -> dict[str, int]:
    return {token: i for i, token in enumerate([*special, *BYTES, *"▁ab\né", *WORDS])}


def merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs that make a token, as transformers reads them off a SentencePiece model: the longest left first."""
    pairs = [(word[:i], word[i:]) for word in WORDS for i in range(len(word) - 1, 0, -1)]
    return [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]


def llama_tokenizer(edit: Callable[[dict[str, Any]], Any] | None = None, **options: Any) -> Any:
    """Of Llama; `edit` changes its tokenizer.json."""
    vocab = vocabulary("<unk>", "<s>", "</s>")
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges(vocab), **options)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    if edit is None:
        return tokenizer
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(parts)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **names)


def as_in_llama_2(parts: dict[str, Any]) -> None:
    """As the tokenizer.json of Llama 2 and Mistral have it: ▁ is prepended by the normalizer."""
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, escape]
    parts.update(normalizer={"type": "Sequence", "normalizers": steps}, pre_tokenizer=None)


def gemma_tokenizer() -> Any:
    vocab = vocabulary("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges(vocab))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("\n\n", "▁▁", "<table>")])
    return tokenizer


def without_spaces(parts: dict[str, Any]) -> None:
    parts["pre_tokenizer"]["prepend_scheme"] = "never"


MADE = {
    "llama": (lambda: llama_tokenizer(as_in_llama_2), True),
    "llama without spaces": (lambda: llama_tokenizer(without_spaces), False),
    "gemma": (gemma_tokenizer, False),
}


def write(tokenizer: Any, file: Path) -> dict[str, Any]:
    return keys(peftcore.export(llama(vocab_size=300), file, format="gguf", tokenizer=tokenizer))


def llama_cpp(facts: dict[str, Any], text: str) -> list[int]:
    """The tokens of a text as llama.cpp finds them (src/llama-vocab.cpp: tokenizer_st_partition, llm_tokenizer_spm)."""
    tokens, scores = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    added_tokens = [t for t, k in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if k in (2, 3, 4)]
    token_ids = [facts["tokenizer.ggml.bos_token_id"]] * bool(facts["tokenizer.ggml.add_bos_token"])
    space = True
    for part in re.split(f"({'|'.join(map(re.escape, sorted(added_tokens, key=len, reverse=True)))})", text):
        if part in added_tokens:
            token_ids.append(ids[part])
            space = True
        elif part:
            symbols = list((" " * (space and facts["tokenizer.ggml.add_space_prefix"]) + part).replace(" ", "▁"))
            space = False
            while pairs := [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]:
                _, i = min(pairs)
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            for symbol in symbols:
                token_ids += [ids[symbol]] if symbol in ids else [ids[BYTES[byte]] for byte in symbol.encode()]
    return token_ids


@pytest.fixture(scope="module", params=MADE)
def written(request: Any, tmp_path_factory: Any) -> tuple[Any, dict[str, Any], Path]:
    tokenizer = MADE[request.param][0]()
    file = tmp_path_factory.mktemp("spm") / "model.gguf"
    return tokenizer, {**write(tokenizer, file), "space": MADE[request.param][1]}, file


def test_the_keys(written: Any) -> None:
    tokenizer, facts, _ = written
    assert facts["tokenizer.ggml.model"] == "llama" and facts["tokenizer.ggml.add_space_prefix"] == facts["space"]
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kind_of_token = dict(zip(tokens, kinds, strict=True))
    assert (
        kind_of_token["<0x0A>"] == KIND.BYTE
        and kind_of_token["▁ab"] == KIND.NORMAL
        and kind_of_token["<unk>"] == KIND.UNKNOWN
    )
    assert kind_of_token[tokenizer.eos_token] == KIND.CONTROL and kind_of_token["[PAD299]"] == KIND.UNUSED
    assert kind_of_token.get("<table>", KIND.USER_DEFINED) == KIND.USER_DEFINED
    ids = {name: facts[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")}
    expected = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert tuple(ids.values()) == expected
    words_by_score = sorted(WORDS[:-1], key=lambda word: -facts["tokenizer.ggml.scores"][tokens.index(word)])
    assert words_by_score == WORDS[:-1], "from the likeliest; of equal rank they never are"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    text=st.lists(
        st.sampled_from(
            ["a", "b", "ab", "é", " ", "  ", "\n", "▁", "</s>", "<s>", "<table>", "<0x41>", "日", "🙂", "x"]
        ),
        max_size=12,
    ).map("".join)
)
def test_llama_cpp_finds_the_tokens_that_transformers_does(written: Any, text: str) -> None:
    tokenizer, facts, _ = written
    assert llama_cpp(facts, text) == tokenizer(text)["input_ids"]


def test_transformers_reads_it(tmp_path: Path) -> None:
    tokenizer = MADE["llama"][0]()  # its reader puts a space before all texts
    write(tokenizer, tmp_path / "model.gguf")
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("ab a aba\n\nab", "aé 🙂b"):
        tokens = back(text, add_special_tokens=False)["input_ids"]
        assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("legacy", [False, True])
def test_where_llama_cpp_puts_other_spaces_is_said(legacy: bool, tmp_path: Path) -> None:
    tokenizer = llama_tokenizer(legacy=legacy)
    with pytest.warns(UserWarning, match="llama.cpp adds a space .* after each special" if not legacy else "that does"):
        facts = write(tokenizer, tmp_path / "model.gguf")
    same = {
        text: llama_cpp(facts, text) == tokenizer(text)["input_ids"] for text in ("ab a", " ab", "a</s>b", "a</s> b")
    }
    assert same == {"ab a": True, " ab": False, "a</s>b": legacy, "a</s> b": False}


def other(**changes: Any) -> Any:
    def edit(parts: dict[str, Any]) -> None:
        as_in_llama_2(parts)
        parts["model"].update(changes)

    return llama_tokenizer(edit)


def without(pair: list[str]) -> Any:
    pairs_left = [merge for merge in merges(vocabulary()) if list(merge) != pair]
    return other(merges=[list(merge) for merge in pairs_left])


def in_turn() -> Any:
    """Of "▁▁▁" one pair is the first of all, the other the last: no score is that of both."""
    pairs_left = [list(merge) for merge in merges(vocabulary())]
    pairs = ["▁", "▁▁"], ["▁▁", "▁"]
    return other(merges=[pairs[0], *(merge for merge in pairs_left if merge not in pairs), pairs[1]])


def added(*tokens: AddedToken) -> Any:
    tokenizer = llama_tokenizer(as_in_llama_2)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def plain(text: str) -> AddedToken:
    return AddedToken(text, normalized=False)


def no_end() -> Any:
    tokenizer = llama_tokenizer(as_in_llama_2)
    tokenizer.eos_token = None
    return tokenizer


def with_backend(**changes: Any) -> Any:
    tokenizer = llama_tokenizer(as_in_llama_2)
    for name, value in changes.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: other(ignore_merges=True), "its BPE sets ignore_merges"),
        (lambda: without(["b", "a"]), "it has the token 'ba', but no merge of 'b' and 'a'"),
        (in_turn, "its merges of 'bab' have an order that scores cannot express"),
        (lambda: with_backend(normalizer=normalizers.NFKC()), r"handles spaces differently .*\(NFKC\)"),
        (
            lambda: with_backend(normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(split=True)),
            r"handles spaces differently .*\(Metaspace\)",
        ),
        (lambda: added(AddedToken("word", normalized=True)), r"its token 'word' is matched after .*normalized=False"),
        (lambda: added(plain("xab"), plain("abcd")), "its tokens 'xab' and 'abcd' may overlap"),
        (no_end, "no end-of-text token"),
    ],
)
def test_what_llama_cpp_would_do_in_another_way_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PeftcoreError, match=message):
        write(make(), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []

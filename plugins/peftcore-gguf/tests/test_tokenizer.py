"""Tokenizers as keys of GGUF: read back by transformers, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from peftcore_gguf.tokenizer import PRE_TOKENIZERS
from support.exported import VOCABULARY, keys, llama, tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import peftcore
from peftcore import PeftcoreError


def write(source: Any, file: Path, **options: Any) -> dict[str, Any]:
    return keys(peftcore.export(llama(), file, format="gguf", tokenizer=source, **options))


def sequence(*steps: Any) -> Any:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def split(name: str) -> Any:
    return sequence(pre_tokenizers.Split(Regex(PRE_TOKENIZERS[name][0]["pattern"]["Regex"]), "isolated"))


CUT = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: split("qwen2"),
    "llama-bpe": lambda: split("llama-bpe"),
}


@pytest.mark.parametrize("name", CUT)
def test_how_a_text_is_cut_has_a_name(name: str, tmp_path: Path) -> None:
    source = tokenizer(CUT[name](), ignore_merges=name == "llama-bpe")
    facts = write(source, tmp_path / "model.gguf")
    assert facts["tokenizer.ggml.model"] == "gpt2" and facts["tokenizer.ggml.pre"] == name
    assert facts["tokenizer.ggml.merges"] == ["a b", "Ġ ab"]
    assert CUT.keys() == PRE_TOKENIZERS.keys()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    source = tokenizer(additional_special_tokens=["<|x|>"])
    source.add_tokens(["word"])
    facts = write(source, tmp_path / "model.gguf")
    kinds = gguf.TokenType
    assert facts["tokenizer.ggml.tokens"][256:] == ["ab", "Ġab", "<|im_start|>", "<|im_end|>", "<|x|>", "word"]
    assert facts["tokenizer.ggml.token_type"][256:] == [kinds.NORMAL] * 2 + [kinds.CONTROL] * 3 + [kinds.USER_DEFINED]
    ids = {key: facts.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding", "unknown")}
    assert ids == {"bos": 258, "eos": 259, "padding": None, "unknown": None}  # what pads is what ends
    assert not facts["tokenizer.ggml.add_bos_token"] and not facts["tokenizer.ggml.add_eos_token"]
    assert facts["tokenizer.chat_template"] == source.chat_template
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "Größe ab<|im_end|> abc"
    assert back(text)["input_ids"] == source(text)["input_ids"]


def test_rows_without_a_token_are_unused(tmp_path: Path) -> None:
    facts = write(tokenizer(), tmp_path / "model.gguf")
    assert facts["tokenizer.ggml.tokens"][260:] == ["[PAD260]", "[PAD261]"]
    assert len(facts["tokenizer.ggml.token_type"]) == VOCABULARY == facts["llama.vocab_size"]
    assert facts["tokenizer.ggml.token_type"][260:] == [gguf.TokenType.UNUSED] * 2


def test_tokens_at_the_ends_of_a_text(tmp_path: Path) -> None:
    source = tokenizer()
    ends = [("<|im_start|>", 258), ("<|im_end|>", 259)]
    source.backend_tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A <|im_end|>", None, ends)
    facts = write(source, tmp_path / "model.gguf")
    assert facts["tokenizer.ggml.add_bos_token"] and facts["tokenizer.ggml.add_eos_token"]
    source.backend_tokenizer.post_processor = processors.TemplateProcessing("<|im_end|> $A", None, ends[1:])
    with pytest.raises(PeftcoreError, match=r"it returns \[259, \d+\] for \[\d+\]"):
        write(source, tmp_path / "model.gguf")


def test_a_template_in_place_of_the_tokenizer_s_and_a_tokenizer_of_another_file(tmp_path: Path) -> None:
    first = write(tokenizer(CUT["smollm"]()), tmp_path / "first.gguf", chat_template="{{ other }}")
    assert first["tokenizer.chat_template"] == "{{ other }}"
    second = write(tmp_path / "first.gguf", tmp_path / "second.gguf")
    assert second == first
    third = write(tmp_path / "first.gguf", tmp_path / "third.gguf", chat_template="{{ third }}")
    assert third == {**first, "tokenizer.chat_template": "{{ third }}"}
    with pytest.raises(PeftcoreError, match="the tokenizer has 262 tokens, but the model's vocabulary has 100 rows"):
        peftcore.export(llama(vocab_size=100), tmp_path / "x.gguf", format="gguf", tokenizer=tmp_path / "first.gguf")
    with pytest.raises(PeftcoreError, match="has 262 tokens, but the model's has 300"):
        peftcore.export(llama(vocab_size=300), tmp_path / "x.gguf", format="gguf", tokenizer=tmp_path / "first.gguf")


def words() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))


def lowercase() -> Any:
    source = tokenizer()
    source.backend_tokenizer.normalizer = normalizers.Lowercase()
    return source


def greedy() -> Any:
    source = tokenizer()
    source.add_special_tokens({"additional_special_tokens": [AddedToken("<m>", lstrip=True)]})
    return source


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            words,
            r"its model is WordLevel \(supported: byte-level BPE with the pre-tokenizers of "
            "gpt-2, smollm, qwen2, llama-bpe",
        ),
        (lowercase, "it has a normalizer, Lowercase"),
        (greedy, "its token '<m>' strips adjacent spaces"),
        (
            lambda: tokenizer(pre_tokenizers.Whitespace()),
            r"splits texts differently \(Whitespace\).*convert_hf_to_gguf",
        ),
        (lambda: tokenizer(pre_tokenizers.ByteLevel()), "prepends a space to texts"),
        (lambda: tokenizer(split("llama-bpe")), "it has ignore_merges=False"),
        (lambda: tokenizer(sequence(pre_tokenizers.Split(Regex("x"), "isolated"))), "splits texts differently"),
        (lambda: tokenizer(eos_token=None), "no end-of-text token"),
        (object, "object has no tokenizer.json"),
        (lambda: "org/name", "cannot read the tokenizer 'org/name' as a GGUF file .*or a transformers tokenizer"),
        (lambda: __file__, "test_tokenizer.py' as a GGUF file"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PeftcoreError, match=message):
        write(make(), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []

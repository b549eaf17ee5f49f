"""Write a tokenizer as GGUF keys: byte-level BPE, SentencePiece BPE, or a copy from another GGUF file.

A GGUF file only names the pre-tokenizer that llama.cpp uses before byte-level merges (src/llama-vocab.cpp). The
tokenizer must split texts in exactly the same way, so its tokenizer.json is compared with those of known
pre-tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftcore.plugin import PeftcoreError
from peftcore_gguf import sentencepiece
from peftcore_gguf.tensor_names import ALTERNATIVE

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES, _BYTES_AND_WORDS = {"type": "ByteLevel", "use_regex": False}, {"type": "ByteLevel", "use_regex": True}


def _split(numbers: str) -> dict[str, Any]:
    pattern = {"Regex": f"{_WORDS}|{numbers}{_SYMBOLS}"}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


# llama.cpp's names of pre-tokenizers, and the steps of a tokenizer.json that split texts in the same way.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES_AND_WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES_AND_WORDS],
    "qwen2": [_split(r"\p{N}"), _BYTES],
    "llama-bpe": [_split(r"\p{N}{1,3}"), _BYTES],
}
WHOLE_WORDS_FIRST = {"llama-bpe"}  # a word that is itself a token is not merged
SPECIAL = ("bos", "eos", "unk", "pad")


def write_tokenizer(writer: Any, tokenizer: Any, rows: int, template: str | None = None) -> None:
    """Add the keys of a transformers tokenizer, or of the GGUF file at a path.

    Args:
        writer: the GGUF writer.
        tokenizer: a transformers tokenizer, or a path.
        rows: size of the model's vocabulary, which may be larger.
        template: chat template to write instead of the tokenizer's.

    Raises:
        PeftcoreError: llama.cpp would tokenize texts differently.
    """
    if isinstance(tokenizer, str | Path):
        _copy_tokenizer(writer, Path(tokenizer), rows, template)
        return
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise _unsupported_tokenizer(f"{type(tokenizer).__name__} has no tokenizer.json")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    _refuse_added(parts["added_tokens"])
    if sentencepiece.is_sentencepiece(parts):
        _write_sentencepiece(writer, parts, rows, tokenizer)
    else:
        _write_byte_level(writer, parts, rows)
    _write_special(writer, tokenizer)
    template = template or _chat_template(tokenizer)
    if template:
        writer.add_chat_template(template)


_UNSUPPORTED_KEYS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")  # settings of a BPE model


def _write_byte_level(writer: Any, parts: dict[str, Any], rows: int) -> None:
    """Write a byte-level BPE tokenizer."""
    pre_tokenizer = _pre_tokenizer(parts)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    if not merges:
        raise _unsupported_tokenizer("it has no merges")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    _write_tokens(writer, parts, rows)
    writer.add_token_merges(merges)


def _write_sentencepiece(writer: Any, parts: dict[str, Any], rows: int, tokenizer: Any) -> None:
    vocabulary = _vocabulary(parts)
    try:
        prepends_space, scores = sentencepiece.prepends_space(parts), sentencepiece.merge_scores(parts, vocabulary)
    except ValueError as odd:
        raise _unsupported_tokenizer(str(odd)) from odd
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    tokens = _write_tokens(writer, parts, rows, unknown=tokenizer.unk_token_id)
    writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
    writer.add_add_space_prefix(prepends_space)


def _vocabulary(parts: dict[str, Any]) -> dict[str, int]:
    return {
        **parts["model"]["vocab"],
        **{added_token["content"]: added_token["id"] for added_token in parts["added_tokens"]},
    }


def _pre_tokenizer(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name for the tokenizer's pre-tokenizer.

    Raises:
        PeftcoreError: llama.cpp has no pre-tokenizer that splits texts in the same way.
    """
    model = parts["model"]
    unsupported_keys = [key for key in _UNSUPPORTED_KEYS if model.get(key)]
    if model["type"] != "BPE" or unsupported_keys:
        suffix = f" with {', '.join(unsupported_keys)}" if unsupported_keys else ""
        raise _unsupported_tokenizer(f"its model is {model['type']}{suffix}")
    if parts["normalizer"] not in (None, {"type": "NFC"}):
        raise _unsupported_tokenizer(f"it has a normalizer, {parts['normalizer']['type']}")
    steps = _steps(parts["pre_tokenizer"])
    if any(step.get("add_prefix_space") for step in steps):
        raise _unsupported_tokenizer("it prepends a space to texts")
    splits = list(map(_without_offsets, steps))
    name = next((name for name, known_steps in PRE_TOKENIZERS.items() if splits == known_steps), None)
    if name is None:
        raise _unsupported_tokenizer(f"it splits texts differently ({', '.join(step['type'] for step in steps)})")
    if bool(model.get("ignore_merges")) != (name in WHOLE_WORDS_FIRST):
        raise _unsupported_tokenizer(f"it has ignore_merges={model.get('ignore_merges')}")
    return name


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer."""
    if not pre_tokenizer:
        return [{"type": "none"}]
    if pre_tokenizer["type"] == "Sequence":
        return list(pre_tokenizer["pretokenizers"])
    return [pre_tokenizer]


def _without_offsets(step: dict[str, Any]) -> dict[str, Any]:
    """Remove the settings of a step that do not change how it splits texts."""
    return {key: value for key, value in step.items() if key not in ("add_prefix_space", "trim_offsets")}


def _refuse_added(added_tokens: list[dict[str, Any]]) -> None:
    """Raise a PeftcoreError if llama.cpp and transformers could find different added tokens in a text.

    llama.cpp searches the whole text for the longest token first. transformers scans from left to right, and takes the
    longest token at each position.
    """
    stripping = [
        added_token["content"]
        for added_token in added_tokens
        if added_token["lstrip"] or added_token["rstrip"] or added_token["single_word"]
    ]
    if stripping:
        raise _unsupported_tokenizer(f"its token {stripping[0]!r} strips adjacent spaces")
    longest: dict[str, str] = {}
    for token in sorted((added_token["content"] for added_token in added_tokens), key=len):
        longest.update((token[:i], token) for i in range(1, len(token)))
    for token in (added_token["content"] for added_token in added_tokens):
        for i in range(1, len(token)):
            overlapping = longest.get(token[i:], "")
            # For runs of a single character, both searches give the same result.
            if len(overlapping) > len(token) and len(set(token + overlapping)) > 1:
                raise _unsupported_tokenizer(f"its tokens {token!r} and {overlapping!r} may overlap")


def _write_tokens(writer: Any, parts: dict[str, Any], rows: int, unknown: int | None = None) -> list[str]:
    import gguf

    vocabulary = _vocabulary(parts)
    _check_size(max(vocabulary.values()) + 1, rows)
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [gguf.TokenType.UNUSED] * rows
    for token, i in vocabulary.items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    if sentencepiece.is_sentencepiece(parts):
        for token in sentencepiece.BYTES:
            tokens[vocabulary[token]], kinds[vocabulary[token]] = token, gguf.TokenType.BYTE
    for added_token in parts["added_tokens"]:
        kinds[added_token["id"]] = gguf.TokenType.CONTROL if added_token["special"] else gguf.TokenType.USER_DEFINED
    if unknown is not None:
        kinds[unknown] = gguf.TokenType.UNKNOWN
    missing_tokens = vocabulary.keys() - set(tokens)  # overwritten above by another token with the same id
    duplicates = {token for token in missing_tokens if sentencepiece.byte_of(token) != tokens[vocabulary[token]]}
    if duplicates:
        raise _unsupported_tokenizer(
            f"its tokens {min(duplicates)!r} and {tokens[vocabulary[min(duplicates)]]!r} have the same id"
        )
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    return tokens


def _write_special(writer: Any, tokenizer: Any) -> None:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    if ids["eos"] is None:
        raise _unsupported_tokenizer("it has no end-of-text token, and llama.cpp would choose one")
    if ids["pad"] == ids["eos"]:  # users set this token to pad batches; it is not a separate token
        ids["pad"] = None
    for name, i in ids.items():
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    plain_ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    full_ids = tokenizer("a")["input_ids"]
    adds_bos = full_ids[:1] == [ids["bos"]] and full_ids[:1] != plain_ids[:1]
    adds_eos = full_ids[-1:] == [ids["eos"]] and full_ids[-1:] != plain_ids[-1:]
    if full_ids != [ids["bos"]] * adds_bos + plain_ids + [ids["eos"]] * adds_eos:
        raise _unsupported_tokenizer(f"with special tokens it returns {full_ids} for {plain_ids}")
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)


def _chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _copy_tokenizer(writer: Any, file: Path, rows: int, template: str | None) -> None:
    import gguf

    try:
        fields = gguf.GGUFReader(file).fields
    except (OSError, ValueError) as error:
        raise PeftcoreError(
            f"cannot read the tokenizer '{file}' as a GGUF file ({error}). Pass a GGUF file, or a transformers "
            "tokenizer: AutoTokenizer.from_pretrained(NAME)"
        ) from error
    tokens = fields.get(gguf.Keys.Tokenizer.LIST)
    if tokens is None:
        raise PeftcoreError(f"the GGUF file '{file}' has no tokenizer. Pass a transformers tokenizer")
    _check_size(len(tokens.data), rows)
    if len(tokens.data) < rows:
        raise PeftcoreError(
            f"the vocabulary of '{file}' has {len(tokens.data)} tokens, but the model's has {rows}. Pass the model's "
            "own tokenizer"
        )
    for key, field in fields.items():
        if not key.startswith("tokenizer.") or (template and key == gguf.Keys.Tokenizer.CHAT_TEMPLATE):
            continue
        item_type = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=item_type)
    if template:
        writer.add_chat_template(template)


def _check_size(tokens: int, rows: int) -> None:
    if tokens > rows:
        raise PeftcoreError(
            f"the tokenizer has {tokens} tokens, but the model's vocabulary has {rows} rows. "
            "Pass the model's own tokenizer"
        )


def _unsupported_tokenizer(reason: str) -> PeftcoreError:
    return PeftcoreError(
        f"cannot write the tokenizer as GGUF: {reason} (supported: byte-level BPE with the pre-tokenizers of "
        f"{', '.join(PRE_TOKENIZERS)}, and SentencePiece BPE with byte fallback). {ALTERNATIVE}"
    )

"""A tokenizer as GGUF keys: byte-level BPE, SentencePiece BPE, or a copy from another GGUF file.

llama.cpp knows by name how a text is split before byte-level merges. The splits by these names are those of
src/llama-vocab.cpp, and must match the tokenizer's own file exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftcore.plugin import PeftcoreError
from peftcore_gguf import sentencepiece
from peftcore_gguf.tensor_names import WAY_ROUND

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES, _BYTES_AND_WORDS = {"type": "ByteLevel", "use_regex": False}, {"type": "ByteLevel", "use_regex": True}


def _split(numbers: str) -> dict[str, Any]:
    pattern = {"Regex": f"{_WORDS}|{numbers}{_REST}"}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


# llama.cpp's names of pre-tokenizers, with the steps of a tokenizer.json that split texts alike.
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
        template: chat template in place of the tokenizer's.

    Raises:
        PeftcoreError: llama.cpp would tokenize differently.
    """
    if isinstance(tokenizer, str | Path):
        _copy(writer, Path(tokenizer), rows, template)
        return
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise _refused(f"{type(tokenizer).__name__} has no tokenizer.json")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    _refuse_added(parts["added_tokens"])
    if sentencepiece.is_sentencepiece(parts):
        _write_sentencepiece(writer, parts, rows, tokenizer)
    else:
        _write_bytes(writer, parts, rows)
    _write_special(writer, tokenizer)
    template = template or _template(tokenizer)
    if template:
        writer.add_chat_template(template)


def _write_bytes(writer: Any, parts: dict[str, Any], rows: int) -> None:
    """Write a byte-level BPE tokenizer."""
    pre_tokenizer = _pre_tokenizer(parts)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    if not merges:
        raise _refused("it has no merges")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    _write_tokens(writer, parts, rows)
    writer.add_token_merges(merges)


def _write_sentencepiece(writer: Any, parts: dict[str, Any], rows: int, tokenizer: Any) -> None:
    vocabulary = _vocabulary(parts)
    try:
        space, scores = sentencepiece.space_before(parts), sentencepiece.scores(parts, vocabulary)
    except ValueError as odd:
        raise _refused(str(odd)) from odd
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    tokens = _write_tokens(writer, parts, rows, unknown=tokenizer.unk_token_id)
    writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
    writer.add_add_space_prefix(space)


def _vocabulary(parts: dict[str, Any]) -> dict[str, int]:
    return {**parts["model"]["vocab"], **{added["content"]: added["id"] for added in parts["added_tokens"]}}


def _pre_tokenizer(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name of the tokenizer's pre-tokenizer.

    Raises:
        PeftcoreError: llama.cpp has none that splits texts alike.
    """
    model, before = parts["model"], parts["pre_tokenizer"]
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    odd = [key for key, value in plain.items() if (model.get(key) or value) != value]
    if model["type"] != "BPE" or odd:
        raise _refused(f"its model is {model['type']}{' with ' + ', '.join(odd) if odd else ''}")
    if parts["normalizer"] not in (None, {"type": "NFC"}):
        raise _refused(f"it has a normalizer, {parts['normalizer']['type']}")
    steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before or {"type": "none"}]
    if any(step.get("add_prefix_space") for step in steps):
        raise _refused("it prepends a space to texts")
    splits = [{k: v for k, v in s.items() if k not in ("add_prefix_space", "trim_offsets")} for s in steps]
    name = next((name for name, known in PRE_TOKENIZERS.items() if splits == known), None)
    if name is None:
        raise _refused(f"it splits texts differently ({', '.join(step['type'] for step in steps)})")
    if bool(model.get("ignore_merges")) != (name in WHOLE_WORDS_FIRST):
        raise _refused(f"it has ignore_merges={model.get('ignore_merges')}")
    return name


def _refuse_added(added: list[dict[str, Any]]) -> None:
    """Raise a PeftcoreError if added tokens match differently.

    llama.cpp searches for the longest token first; transformers goes from left to right and takes the longest that
    begins.
    """
    odd = [each["content"] for each in added if each["lstrip"] or each["rstrip"] or each["single_word"]]
    if odd:
        raise _refused(f"its token {odd[0]!r} strips adjacent spaces")
    longest: dict[str, str] = {}
    for token in sorted((each["content"] for each in added), key=len):
        longest.update((token[:i], token) for i in range(1, len(token)))
    for token in (each["content"] for each in added):
        for i in range(1, len(token)):
            other = longest.get(token[i:], "")
            if len(other) > len(token) and len(set(token + other)) > 1:  # runs of one character give the same result
                raise _refused(f"its tokens {token!r} and {other!r} may overlap")


def _write_tokens(writer: Any, parts: dict[str, Any], rows: int, unknown: int | None = None) -> list[str]:
    import gguf

    vocabulary = _vocabulary(parts)
    _refuse_longer(max(vocabulary.values()) + 1, rows)
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [gguf.TokenType.UNUSED] * rows
    for token, i in vocabulary.items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    if sentencepiece.is_sentencepiece(parts):
        for token in sentencepiece.BYTES:
            tokens[vocabulary[token]], kinds[vocabulary[token]] = token, gguf.TokenType.BYTE
    for each in parts["added_tokens"]:
        kinds[each["id"]] = gguf.TokenType.CONTROL if each["special"] else gguf.TokenType.USER_DEFINED
    if unknown is not None:
        kinds[unknown] = gguf.TokenType.UNKNOWN
    twice = {
        token for token in vocabulary.keys() - set(tokens) if sentencepiece.byte_of(token) != tokens[vocabulary[token]]
    }
    if twice:
        raise _refused(f"its tokens {min(twice)!r} and {tokens[vocabulary[min(twice)]]!r} have the same id")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    return tokens


def _write_special(writer: Any, tokenizer: Any) -> None:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    if ids["eos"] is None:
        raise _refused("it has no end-of-text token, and llama.cpp would choose one")
    if ids["pad"] == ids["eos"]:  # set for padding batches
        ids["pad"] = None
    for name, i in ids.items():
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    first = whole[:1] == [ids["bos"]] and whole[:1] != bare[:1]
    last = whole[-1:] == [ids["eos"]] and whole[-1:] != bare[-1:]
    if whole != [ids["bos"]] * first + bare + [ids["eos"]] * last:
        raise _refused(f"it returns {whole} for {bare}")
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)


def _template(tokenizer: Any) -> str | None:
    found = getattr(tokenizer, "chat_template", None)
    return found.get("default") if isinstance(found, dict) else found


def _copy(writer: Any, file: Path, rows: int, template: str | None) -> None:
    import gguf

    try:
        fields = gguf.GGUFReader(file).fields
    except (OSError, ValueError) as error:
        raise PeftcoreError(
            f"the tokenizer '{file}' cannot be read as a GGUF file ({error}). Pass the path of one, or a transformers "
            "tokenizer: AutoTokenizer.from_pretrained(NAME)"
        ) from error
    tokens = fields.get(gguf.Keys.Tokenizer.LIST)
    if tokens is None:
        raise PeftcoreError(f"'{file}' has no tokenizer. Pass a transformers tokenizer")
    _refuse_longer(len(tokens.data), rows)
    if len(tokens.data) < rows:
        raise PeftcoreError(f"the vocabulary of '{file}' has {len(tokens.data)} tokens, but the model's has {rows}")
    for key, field in fields.items():
        if not key.startswith("tokenizer.") or (template and key == gguf.Keys.Tokenizer.CHAT_TEMPLATE):
            continue
        of_items = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=of_items)
    if template:
        writer.add_chat_template(template)


def _refuse_longer(tokens: int, rows: int) -> None:
    if tokens > rows:
        raise PeftcoreError(
            f"the tokenizer has {tokens} tokens, but the model's vocabulary has {rows} rows. "
            "Pass the model's own tokenizer"
        )


def _refused(why: str) -> PeftcoreError:
    return PeftcoreError(
        f"the tokenizer cannot be written as GGUF: {why}. Supported are byte-level BPE that splits texts like "
        f"{', '.join(PRE_TOKENIZERS)}, and SentencePiece BPE with byte fallback. {WAY_ROUND}"
    )

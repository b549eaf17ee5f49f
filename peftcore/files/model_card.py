"""Model card of an adapter folder: `README.md` with the metadata that model hubs read.

Every save rewrites the text between two marks and the metadata keys `base_model`, `library_name`, `pipeline_tag` and
`peftcore`, and adds missing tags. The rest belongs to its author. A card without the marks is not changed.
Equal adapters get equal cards: there are no dates, and no paths of this machine. What comes from a config or from data
is in code spans, in one line, and cannot end them: see `code`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peftcore import engine
from peftcore.engine.scaling import scaled_config
from peftcore.errors import CheckpointError
from peftcore.files.folder import CARD, write_file
from peftcore.plugin import sharded
from peftcore.plugin.peft_fields import is_of_peft
from peftcore.plugin.registry import registry
from peftcore.plugin.safe_reading import read_bytes
from peftcore.version import installed_version

FILE = CARD
BEGIN = "<!-- peftcore: written by each save; text outside of these two marks is kept -->"
END = "<!-- peftcore: end -->"
_OWN = ("base_model", "library_name", "pipeline_tag", "peftcore")
_TASKS = {  # PEFT's task types by the hub's names
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_PLAIN = re.compile(r"[A-Za-z][\w./-]*(:[\w./-]+)*")  # YAML that needs no quotes, but for these words
_RESERVED = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LONGEST = 200  # characters of a field's value
_BYTES = 1 << 24  # of a card
_ESCAPES = {ord("<"): r"\u003c", ord("`"): r"\u0060", ord("\x7f"): r"\u007f"}
_ESCAPES |= {control: f"\\u{control:04x}" for control in (*range(0x20), *range(0x80, 0xA0), 0x2028, 0x2029)}


def card(model: nn.Module, adapters: Sequence[str], task_type: str | None) -> tuple[dict[str, Any], str]:
    """Return (metadata, text) of the card for these adapters of `model`."""
    base = base_on_hub(model)
    entries = [engine.applied(model, name) for name in adapters]
    methods = list(dict.fromkeys(entry.method for entry in entries))
    read_by_peft = all(is_of_peft(registry.method(method).state.peft_type) for method in methods)
    tags = [*([f"base_model:adapter:{base}"] if base else []), "peftcore", *methods]
    about: dict[str, Any] = {} if base is None else {"base_model": base}
    about["library_name"] = "peft" if read_by_peft else "peftcore"
    if task_type in _TASKS:
        about["pipeline_tag"] = _TASKS[task_type]
    about["tags"] = tags
    about["peftcore"] = {"method": methods[0] if len(methods) == 1 else methods, "version": installed_version()}
    of = base or type(model).__name__
    lines = [f"# Adapter{'s' * (len(adapters) > 1)} of {of}", ""]
    for name in adapters:
        lines += [*([f"## {code_span(name)}", ""] if len(adapters) > 1 else []), *_table(_facts(model, name)), ""]
    lines += ["```python", "import peftcore", ""]
    lines += [f"model = ...  # {of}", 'peftcore.load(model, "ADAPTER")  # this folder, or ORG/NAME on the hub']
    return about, "\n".join([*lines, "```"])


def base_on_hub(model: nn.Module) -> str | None:
    """Return the hub's id of the base; None if the model has none, or was loaded from a folder."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    return name if isinstance(name, str) and _ID.fullmatch(name) and not os.path.isdir(name) else None


def _facts(model: nn.Module, adapter: str) -> list[tuple[str, str]]:
    config = scaled_config(model, adapter)
    trained = sum(sharded.shape_of(parameter).numel() for _, parameter in engine.adapter_parameters(model, adapter))
    rows = [("method", engine.applied(model, adapter).method), ("trained parameters", f"{trained:,}")]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        usual = field.default_factory() if callable(field.default_factory) else field.default
        if value in (None, usual) or (usual is None and value in ([], (), {})):
            continue
        value = sorted(value) if isinstance(value, (set, frozenset)) else value
        text = json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)
        rows.append((code_span(field.name), code_span(text[:_LONGEST] + "…" * (len(text) > _LONGEST))))
    return rows


def code_span(text: str) -> str:
    """Return a Markdown code span of one line that `text` cannot end, whoever wrote it."""
    return f"`{text.translate(_ESCAPES).strip()}`"


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    cells = [[cell.replace("\n", " ").replace("<", "&lt;").replace("|", r"\|") for cell in row] for row in rows]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]


def rewritten(folder: Path, about: Mapping[str, Any], text: str) -> str | None:
    """Return the new card of `folder`; None if it has one without marks, which is left as it is.

    Raises:
        CheckpointError: `README.md` is not a regular file, or cannot be read.
    """
    before = f"{BEGIN}\n{END}\n"
    if os.path.lexists(folder / FILE):
        before = read(folder)
    if BEGIN not in before or END not in before.partition(BEGIN)[2]:
        return None
    head, body = split(before)
    start, _, rest = body.partition(BEGIN)
    _, _, end = rest.partition(END)
    return f"---\n{updated(head, about)}---\n{start}{BEGIN}\n{text}\n{END}{end}"


def read(folder: Path) -> str:
    """Return the card in `folder`; "" if there is none, or it is not text.

    Raises:
        CheckpointError: `README.md` is not a regular file, or cannot be read.
    """
    try:
        return read_bytes(folder / FILE, _BYTES).decode()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
    except CheckpointError as error:
        raise CheckpointError(f"the model card was not written: {error}. Delete it, or use another folder") from error


def add_to_card(folder: Path, heading: str, rows: Sequence[tuple[str, str]], command: str) -> None:
    """Add a table and a command to the marked section, until the next save. A card without marks is left as it is.

    Args:
        rows: (name, value) of each row, as Markdown: what comes from files is in `code`.

    Raises:
        CheckpointError: it cannot be written.
    """
    start, mark, end = read(folder).partition(END)
    if not mark or BEGIN not in start:
        return
    lines = [f"## {heading}", "", *_table(rows), "", "```sh", command.translate(_ESCAPES), "```"]
    write_file(folder / FILE, (start + "\n" + "\n".join(lines) + "\n" + mark + end).encode())


def split(content: str) -> tuple[str, str]:
    """Return (lines of the YAML header, the text after it)."""
    match = re.match(r"---[ \t]*\n(.*?\n|)---[ \t]*(\n|$)", content, re.DOTALL)
    return (match[1], content[match.end() :]) if match else ("", content)


def updated(head: str, about: Mapping[str, Any]) -> str:
    """Return the lines of a YAML header with our keys and tags; all other lines stay as they are."""
    blocks = _blocks(head)
    values: dict[str, Any] = dict(about)
    tags = next((lines for key, lines in blocks if key == "tags"), None)
    if tags is not None:
        missing = [tag for tag in values.pop("tags", []) if not _has(tags, tag)]
        blocks = [(key, _with_tags(lines, missing) if key == "tags" else lines) for key, lines in blocks]
    written: list[str] = []
    for key, lines in blocks:
        if key not in _OWN:
            written.append(lines)
        elif key in values:  # else it is a key of ours that no longer applies
            written.append(_yaml(key, values.pop(key)))
    return "".join([*written, *(_yaml(key, value) for key, value in values.items())])


def _blocks(head: str) -> list[tuple[str, str]]:
    """Return (key, its lines) of a YAML header; lines before the first key have the key ""."""
    blocks: list[tuple[str, str]] = []
    for line in head.splitlines(keepends=True):
        match = re.match(r"([\w-]+)[ \t]*:", line)
        if match or not blocks:
            blocks.append((match[1] if match else "", line))
        else:
            key, lines = blocks[-1]
            blocks[-1] = key, lines + line
    return blocks


def _has(tags: str, tag: str) -> bool:
    return tag in re.findall(r"[\w:./-]+", tags.partition(":")[2])


def _with_tags(lines: str, tags: Sequence[str]) -> str:
    """Return the block of tags with more of them; a single value, or a list of several lines in brackets, stays."""
    first = lines.partition("\n")[0].partition(":")[2].strip()
    if not tags or (first and not (first.startswith("[") and first.endswith("]"))):
        return lines
    if first:
        inside = ", ".join([*filter(None, [first[1:-1].strip()]), *map(_scalar, tags)])
        return f"tags: [{inside}]\n"
    indent = re.search(r"^([ \t]*)- ", lines, re.MULTILINE)
    return lines + "".join(f"{indent[1] if indent else ''}- {_scalar(tag)}\n" for tag in tags)


def _yaml(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        return f"{key}:\n" + "".join(f"  {name}: {_scalar(item)}\n" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return f"{key}:\n" + "".join(f"- {_scalar(item)}\n" for item in value)
    return f"{key}: {_scalar(value)}\n"


def _scalar(value: object) -> str:
    """Return a value as YAML; JSON is YAML."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
        return value
    return json.dumps(value, ensure_ascii=False)

"""Model card of an adapter folder: `README.md` with the metadata that model hubs read.

Every save rewrites the text between two marks and the metadata keys `base_model`, `library_name`, `pipeline_tag` and
`peftcore`, and adds missing tags. The rest belongs to the card's author, and a card without the marks is not changed.
Equal adapters get equal cards, without dates or local paths. Text from configs or data is put into one-line code spans
that it cannot close (see `code_span`).
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
BEGIN = "<!-- peftcore: rewritten by each save; text outside these two marks is preserved -->"
END = "<!-- peftcore: end -->"
_OWN_KEYS = ("base_model", "library_name", "pipeline_tag", "peftcore")
_TASKS = {  # PEFT's task types by the hub's names
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_PLAIN = re.compile(r"[A-Za-z][\w./-]*(:[\w./-]+)*")  # YAML text that needs no quotes, except the reserved words
_RESERVED = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LONGEST = 200  # maximum length of a field's value; longer values are truncated
_BYTES = 1 << 24  # largest card that is read
_ESCAPES = {ord("<"): r"\u003c", ord("`"): r"\u0060", ord("\x7f"): r"\u007f"}
_ESCAPES |= {control: f"\\u{control:04x}" for control in (*range(0x20), *range(0x80, 0xA0), 0x2028, 0x2029)}


def card(model: nn.Module, adapters: Sequence[str], task_type: str | None) -> tuple[dict[str, Any], str]:
    """Return the (metadata, text) of a card for these adapters of `model`."""
    base = base_on_hub(model)
    entries = [engine.applied(model, name) for name in adapters]
    methods = list(dict.fromkeys(entry.method for entry in entries))
    read_by_peft = all(is_of_peft(registry.method(method).state.peft_type) for method in methods)
    tags = [*([f"base_model:adapter:{base}"] if base else []), "peftcore", *methods]
    metadata: dict[str, Any] = {} if base is None else {"base_model": base}
    metadata["library_name"] = "peft" if read_by_peft else "peftcore"
    if task_type in _TASKS:
        metadata["pipeline_tag"] = _TASKS[task_type]
    metadata["tags"] = tags
    metadata["peftcore"] = {"method": methods[0] if len(methods) == 1 else methods, "version": installed_version()}
    base_name = base or type(model).__name__
    lines = [f"# Adapter{'s' * (len(adapters) > 1)} for {base_name}", ""]
    for name in adapters:
        lines += [*([f"## {code_span(name)}", ""] if len(adapters) > 1 else []), *_table(_facts(model, name)), ""]
    lines += ["```python", "import peftcore", ""]
    lines += [f"model = ...  # {base_name}", 'peftcore.load(model, "ADAPTER")  # this folder, or ORG/NAME on the hub']
    return metadata, "\n".join([*lines, "```"])


def base_on_hub(model: nn.Module) -> str | None:
    """Return the base's hub id; None if it is unknown, or the model was loaded from a folder."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    return name if isinstance(name, str) and _ID.fullmatch(name) and not os.path.isdir(name) else None


def _facts(model: nn.Module, adapter: str) -> list[tuple[str, str]]:
    config = scaled_config(model, adapter)
    trained_count = sum(
        sharded.shape_of(parameter).numel() for _, parameter in engine.adapter_parameters(model, adapter)
    )
    rows = [("method", engine.applied(model, adapter).method), ("trained parameters", f"{trained_count:,}")]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value in (None, default) or (default is None and value in ([], (), {})):
            continue
        value = sorted(value) if isinstance(value, (set, frozenset)) else value
        text = json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)
        rows.append((code_span(field.name), code_span(text[:_LONGEST] + "…" * (len(text) > _LONGEST))))
    return rows


def code_span(text: str) -> str:
    """Return `text` as a one-line Markdown code span that untrusted text cannot close."""
    return f"`{text.translate(_ESCAPES).strip()}`"


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    cells = [[cell.replace("\n", " ").replace("<", "&lt;").replace("|", r"\|") for cell in row] for row in rows]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]


def update_card(folder: Path, about: Mapping[str, Any], text: str) -> str | None:
    """Return the new content of the card in `folder`; None if the existing card has no marks.

    Raises:
        CheckpointError: `README.md` is not a regular file, or cannot be read.
    """
    content = f"{BEGIN}\n{END}\n"
    if os.path.lexists(folder / FILE):
        content = read(folder)
    if BEGIN not in content or END not in content.partition(BEGIN)[2]:
        return None
    head, body = split(content)
    start, _, after_begin = body.partition(BEGIN)
    _, _, end = after_begin.partition(END)
    return f"---\n{update_header(head, about)}---\n{start}{BEGIN}\n{text}\n{END}{end}"


def read(folder: Path) -> str:
    """Return the content of the card in `folder`; "" if it does not exist, or is not text.

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
    """Add a table and a command to the marked section, until the next save. A card without marks is not changed.

    Args:
        folder: the adapter's folder.
        heading: heading of the table.
        rows: (name, value) of each row, in Markdown. Put untrusted text into a `code_span`.
        command: shell command, shown below the table.

    Raises:
        CheckpointError: the card cannot be written.
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


def update_header(head: str, about: Mapping[str, Any]) -> str:
    """Return a YAML header with peftcore's keys and tags updated; other lines stay unchanged."""
    blocks = _blocks(head)
    values: dict[str, Any] = dict(about)
    tags = next((lines for key, lines in blocks if key == "tags"), None)
    if tags is not None:
        missing_tags = [tag for tag in values.pop("tags", []) if not _has(tags, tag)]
        blocks = [(key, _with_tags(lines, missing_tags) if key == "tags" else lines) for key, lines in blocks]
    new_lines: list[str] = []
    for key, lines in blocks:
        if key not in _OWN_KEYS:
            new_lines.append(lines)
        elif key in values:  # a peftcore key that is no longer in `values` is dropped
            new_lines.append(_yaml(key, values.pop(key)))
    return "".join([*new_lines, *(_yaml(key, value) for key, value in values.items())])


def _blocks(head: str) -> list[tuple[str, str]]:
    """Split a YAML header into (key, lines of the key); lines before the first key have the key ""."""
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
    """Add tags to the lines of a YAML list. A single value, or a bracketed list over several lines, stays unchanged."""
    first_value = lines.partition("\n")[0].partition(":")[2].strip()
    if not tags or (first_value and not (first_value.startswith("[") and first_value.endswith("]"))):
        return lines
    if first_value:
        tag_list = ", ".join([*filter(None, [first_value[1:-1].strip()]), *map(_scalar, tags)])
        return f"tags: [{tag_list}]\n"
    indent = re.search(r"^([ \t]*)- ", lines, re.MULTILINE)
    return lines + "".join(f"{indent[1] if indent else ''}- {_scalar(tag)}\n" for tag in tags)


def _yaml(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        return f"{key}:\n" + "".join(f"  {name}: {_scalar(item)}\n" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return f"{key}:\n" + "".join(f"- {_scalar(item)}\n" for item in value)
    return f"{key}: {_scalar(value)}\n"


def _scalar(value: object) -> str:
    """Return a value as YAML, using its subset JSON."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
        return value
    return json.dumps(value, ensure_ascii=False)

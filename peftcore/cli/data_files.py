"""Files of examples as records, a table of fields each: JSON lines, a JSON array, CSV, TSV, Parquet, folders of them.

A name that is no path is that of a dataset on Hugging Face's hub, whose split `train` the library `datasets` fetches.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peftcore.cli.console import require
from peftcore.errors import PeftcoreError, nearest

Record = tuple[str, dict[str, Any]]  # FILE:LINE or FILE:INDEX, and the fields
_FIELD = (1 << 31) - 1  # characters; the largest that the csv module takes on every system
_SHOWN = 20  # names of columns in a message
CONVERSIONS = {
    ".txt": 'Write a line {"text": ...} for each example: .jsonl',
    ".xlsx": "Export the sheet as CSV",
    ".xls": "Export the sheet as CSV",
    ".gz": "Unpack it first: gunzip",
    ".zip": "Unpack it first",
    ".yaml": "Write a JSON object on a line for each example: .jsonl",
}


def records(path: str, columns: Mapping[str, str] | None = None) -> Iterator[Record]:
    """Every example of `path`, in its order, with where it stands.

    Args:
        columns: names of fields by the names that the file has for them, see `parsed_columns`.

    Raises:
        PeftcoreError: it is missing, of another kind, or damaged. The message names the file and the line.
    """
    where = Path(os.path.expanduser(path))
    if os.path.isdir(where):
        files = sorted(file for file in where.iterdir() if file.suffix.lower() in READERS)
        if not files:
            raise PeftcoreError(f"the folder '{path}' holds no file of examples ({', '.join(READERS)})")
        found: Iterator[Record] = (record for file in files for record in _of_file(file))
    elif not os.path.exists(where) and _is_hub_id(path):
        found = _of_hub(path)
    else:
        found = _of_file(where)
    return (_renamed(record, columns) for record in found) if columns else found


def parsed_columns(text: str | None) -> dict[str, str]:
    """`prompt=question,completion=answer` as {field: the file's name for it}.

    Raises:
        PeftcoreError: it is not of that form.
    """
    columns = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, theirs = (word.strip() for word in part.partition("="))
        if not (name and equals and theirs):
            raise PeftcoreError(
                f"--columns says which column of the file is which field, found {part!r}. "
                "Try: --columns prompt=question,completion=answer"
            )
        columns[name] = theirs
    return columns


def listed(names: Iterable[str]) -> str:
    """Return names for a message, of which there may be thousands."""
    first = list(itertools.islice(names, _SHOWN + 1))
    return ", ".join(map(str, first[:_SHOWN])) + (", ..." if len(first) > _SHOWN else "")


def alpaca_prompt(instruction: str, more: Any) -> str:
    """Return the prompt of an example of Alpaca's: what to do, and where there is any, the text to do it with."""
    return f"{instruction}\n\n{more}" if isinstance(more, str) and more.strip() else instruction


def _renamed(record: Record, columns: Mapping[str, str]) -> Record:
    where, fields = record
    for name, theirs in columns.items():
        if theirs not in fields:
            raise PeftcoreError(
                f"{where}: --columns says that {name} is '{theirs}', which is not there{nearest(theirs, fields)}"
            )
    taken = set(columns.values())
    rest = {name: value for name, value in fields.items() if name not in taken and name not in columns}
    found = {name: fields[theirs] for name, theirs in columns.items()}
    if columns.get("prompt") == "instruction" and isinstance(found["prompt"], str):  # of Alpaca's, which has an `input`
        found["prompt"] = alpaca_prompt(found["prompt"], rest.pop("input", None))
    return where, rest | found


def _is_hub_id(path: str) -> bool:
    return not Path(path).suffix and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _of_hub(name: str) -> Iterator[Record]:
    require("datasets", extra="datasets")
    import datasets

    try:
        loaded = datasets.load_dataset(name, split="train")
    except Exception as error:  # of a network, a script, a file: whatever it is, the user named this data
        reason = str(error).partition("\n")[0]
        raise PeftcoreError(
            f"'{name}' is no file or folder, and no dataset of the hub could be read: {reason}"
        ) from error
    for index, fields in enumerate(loaded):
        yield f"{name}:{index}", dict(fields)


def _of_file(path: Path) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise PeftcoreError(
            f"'{path}': examples are read from {known}, found '{suffix}'. "
            f"{CONVERSIONS.get(suffix, 'Convert it to one of these')}"
        )
    try:
        yield from READERS[suffix](path)
    except UnicodeDecodeError as error:
        raise PeftcoreError(f"'{path}' is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise PeftcoreError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, PeftcoreError):
            raise
        raise PeftcoreError(f"'{path}' cannot be read: {error}") from error  # its name has a NUL character


def _text(path: Path) -> Any:
    return open(path, encoding="utf-8-sig", newline="")


def _jsonl(path: Path) -> Iterator[Record]:
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(f"{path}:{number}", _parsed(line, f"{path}:{number}"))


def _json(path: Path) -> Iterator[Record]:
    with _text(path) as file:
        found = _parsed(file.read(), str(path))
    if not isinstance(found, list):
        raise PeftcoreError(
            f"{path}: expected a JSON array of examples, found {type(found).__name__}. Where each line is an object, "
            "name the file .jsonl"
        )
    for index, fields in enumerate(found):
        yield _object(f"{path}:[{index}]", fields)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text.strip() else f"line {error.lineno}, column {error.colno}"
        raise PeftcoreError(f"{where}: not JSON: {error.msg} at {place}") from error
    except RecursionError as error:
        raise PeftcoreError(f"{where}: not JSON of examples: it is nested too deeply") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise PeftcoreError(f"{where}: not JSON of examples: {error}") from error


def _object(where: str, fields: Any) -> Record:
    if not isinstance(fields, dict):
        raise PeftcoreError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    return where, fields


def _read_long_fields() -> None:
    """Let the csv module read fields of any length: a document is one. Its own limit is 131,072 characters."""
    csv.field_size_limit(_FIELD)


def _tsv(path: Path) -> Iterator[Record]:
    # Quotes have no meaning: reviews and tweets are full of single ones.
    _read_long_fields()
    with _text(path) as file:
        yield from _table(path, csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _csv(path: Path) -> Iterator[Record]:
    _read_long_fields()
    with _text(path) as file:
        yield from _table(path, csv.reader(file, strict=True))


def _table(path: Path, lines: Any) -> Iterator[Record]:
    """A first line names the columns."""
    try:
        header = next(lines, None)
        if header is None:
            return
        twice = next((name for name, count in Counter(header).items() if count > 1), None)
        if twice is not None:
            raise PeftcoreError(f"{path}:1: the first line names the column '{twice}' twice")
        is_empty = True
        for values in lines:
            if not values:
                continue
            is_empty = False
            if len(values) != len(header):
                raise PeftcoreError(
                    f"{path}:{lines.line_num}: {len(values)} columns, the first line names {len(header)}"
                )
            yield f"{path}:{lines.line_num}", dict(zip(header, values, strict=True))
        if is_empty:
            raise PeftcoreError(
                f"{path}:1: the first line names the columns, here {listed(header)}, and no line follows"
            )
    except csv.Error as error:
        raise PeftcoreError(f"{path}:{lines.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[Record]:
    require("pyarrow", extra="datasets")
    from pyarrow import parquet

    try:
        row = 0
        for group in parquet.ParquetFile(path).iter_batches():
            for fields in group.to_pylist():
                yield f"{path}:[{row}]", fields
                row += 1
    except ValueError as error:  # of every kind of damage
        raise PeftcoreError(f"'{path}' cannot be read as Parquet: {str(error).partition(chr(10))[0]}") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}

"""Files of examples as records: JSON lines, a JSON array, CSV, TSV, Parquet, and folders of these.

A name that is not a path is a dataset id on the Hugging Face hub, loaded by the library `datasets`: ORG/NAME for its
split `train`, ORG/NAME@SPLIT, such as @validation or @train[:20%], and ORG/NAME@CONFIG/SPLIT.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftcore.errors import PeftcoreError, nearest
from peftcore_cli.console import require

Record = tuple[str, dict[str, Any]]  # FILE:LINE or FILE:INDEX, and the fields
_FIELD = (1 << 31) - 1  # characters; the largest value that csv accepts on every system
_SHOWN = 20  # number of column names in a message
CONVERSIONS = {
    ".txt": 'Write one {"text": ...} per line: .jsonl',
    ".xlsx": "Export the sheet as CSV",
    ".xls": "Export the sheet as CSV",
    ".gz": "Unpack it first: gunzip",
    ".zip": "Unpack it first",
    ".yaml": "Write one JSON object per line: .jsonl",
}


def records(path: str, columns: Mapping[str, str] | None = None) -> Iterator[Record]:
    """Yield every example of `path` in order, with its place.

    Args:
        path: file, folder, or dataset id.
        columns: {field: the file's name for it}, see `parsed_columns`.

    Raises:
        PeftcoreError: it is missing, of another kind, or damaged. The message names the file and the line.
    """
    where = Path(os.path.expanduser(path))
    if os.path.isdir(where):
        files = sorted(file for file in where.iterdir() if file.suffix.lower() in READERS)
        if not files:
            raise PeftcoreError(f"folder '{path}' has no file of examples ({', '.join(READERS)})")
        found: Iterator[Record] = (record for file in files for record in _of_file(file))
    elif not os.path.exists(where) and _is_hub_id(path):
        found = _of_hub(path)
    elif not os.path.exists(where):
        raise PeftcoreError(_missing(where, path))
    else:
        found = _of_file(where)
    found = map(checked, found)
    return (renamed(record, columns) for record in found) if columns else found


def records_of_each(paths: Sequence[str], columns: Mapping[str, str] | None) -> list[Iterator[Record]]:
    """Return the records of each data set; where only some have one of the columns, only those rename them."""
    data_sets = [records(path) for path in paths]
    if not columns:
        return data_sets
    first = [list(itertools.islice(each, 1)) for each in data_sets]
    has_columns = [any(not fields.keys().isdisjoint(columns.values()) for _, fields in some) for some in first]
    whole = [itertools.chain(some, rest) for some, rest in zip(first, data_sets, strict=True)]
    return [
        (renamed(record, columns) for record in each) if has or not any(has_columns) else each
        for each, has in zip(whole, has_columns, strict=True)
    ]


def _missing(where: Path, path: str) -> str:
    """Return what to do about a path of examples that does not exist."""
    try:
        names = [each.name for each in where.parent.iterdir()]
    except (OSError, ValueError):  # such as a NUL character
        return f"neither the file '{path}' nor the folder '{where.parent}' exists. Correct the path in --data"
    relative = "" if where.is_absolute() else f". The path is relative to '{Path.cwd()}'"
    near = nearest(where.name, names)
    return (
        f"the file '{path}' does not exist{near}{relative}. Pass a file ({', '.join(READERS)}), a folder "
        "of them, or the id of a hub dataset, ORG/NAME"
    )


def parsed_columns(text: str | None) -> dict[str, str]:
    """Parse `prompt=question,completion=answer` into {field: the file's name for it}.

    Raises:
        PeftcoreError: it has another form.
    """
    columns = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, theirs = (word.strip() for word in part.partition("="))
        if not (name and equals and theirs):
            raise PeftcoreError(
                f"--columns must be FIELD=COLUMN pairs, found {part!r}. For example: --columns "
                "prompt=question,completion=answer"
            )
        columns[name] = theirs
    return columns


def listed(names: Iterable[str]) -> str:
    """Return names for a message, shortened if there are many."""
    first = list(itertools.islice(names, _SHOWN + 1))
    return ", ".join(map(str, first[:_SHOWN])) + (", ..." if len(first) > _SHOWN else "")


def alpaca_prompt(instruction: str, more: Any) -> str:
    """Return the prompt of an Alpaca example: the instruction, and the input if there is one."""
    return f"{instruction}\n\n{more}" if isinstance(more, str) and more.strip() else instruction


def checked(record: Record) -> Record:
    """Return a record that is not the names of the columns themselves.

    Raises:
        PeftcoreError: it is.
    """
    where, fields = record
    if fields and all(isinstance(value, str) and value.strip() == name.strip() for name, value in fields.items()):
        raise PeftcoreError(
            f"{where}: the line repeats the names of the columns, as files that were joined have it. Delete it"
        )
    return record


def renamed(record: Record, columns: Mapping[str, str]) -> Record:
    """Return a record with fields named as `columns` says.

    Raises:
        PeftcoreError: a column does not exist.
    """
    where, fields = record
    for name, theirs in columns.items():
        if theirs not in fields:
            raise PeftcoreError(
                f"{where}: --columns names the column '{theirs}' for {name}, which does not "
                f"exist{nearest(theirs, fields)}"
            )
    taken = set(columns.values())
    rest = {name: value for name, value in fields.items() if name not in taken and name not in columns}
    found = {name: fields[theirs] for name, theirs in columns.items()}
    if columns.get("prompt") == "instruction" and isinstance(found["prompt"], str):  # Alpaca's, which has an `input`
        found["prompt"] = alpaca_prompt(found["prompt"], rest.pop("input", None))
    return where, rest | found


def _is_hub_id(path: str) -> bool:
    path = path.partition("@")[0]
    return not Path(path).suffix and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _of_hub(path: str) -> Iterator[Record]:
    require("datasets", extra="datasets")
    import datasets

    name, at, part = path.partition("@")
    config, _, split = part.rpartition("/")
    if at and not split:
        raise PeftcoreError(f"'{path}' needs the name of a split after @, such as {name}@validation")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # loading may fail anywhere (network, script, file), on data that the user named
        reason = str(error).partition("\n")[0]
        raise PeftcoreError(
            f"'{path}' is not a file or folder, and no hub dataset of that name could be read: {reason}"
        ) from error
    for index, fields in enumerate(loaded):
        yield f"{path}:{index}", dict(fields)


def _of_file(path: Path) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise PeftcoreError(
            f"'{path}' must be one of {known}, found '{suffix}'. "
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
        raise PeftcoreError(f"'{path}' cannot be read: {error}") from error  # the name has a NUL character


def _text(path: Path) -> Any:
    return open(path, encoding="utf-8-sig", newline="")


def _jsonl(path: Path) -> Iterator[Record]:
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield object_of(f"{path}:{number}", line)


def _json(path: Path) -> Iterator[Record]:
    with _text(path) as file:
        found = _parsed(file.read(), str(path))
    if not isinstance(found, list):
        raise PeftcoreError(
            f"{path}: expected a JSON array of examples, found {type(found).__name__}. If each line is an "
            "object, name the file .jsonl"
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
    except ValueError as error:  # an integer with thousands of digits
        raise PeftcoreError(f"{where}: not JSON of examples: {error}") from error


def object_of(where: str, text: str) -> Record:
    """Return the record of a line of JSON.

    Raises:
        PeftcoreError: the line is not a JSON object; the message begins with `where`.
    """
    return _object(where, _parsed(text, where))


def _object(where: str, fields: Any) -> Record:
    if not isinstance(fields, dict):
        raise PeftcoreError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    return where, fields


def _read_long_fields() -> None:
    """Allow the csv module to read fields of any length, such as documents. Its own limit is 131,072 characters."""
    csv.field_size_limit(_FIELD)


def _tsv(path: Path) -> Iterator[Record]:
    # Quotes have no meaning: reviews and tweets are full of unpaired ones.
    _read_long_fields()
    with _text(path) as file:
        yield from _table(path, csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _csv(path: Path) -> Iterator[Record]:
    _read_long_fields()
    with _text(path) as file:
        first = file.readline()
        lines = itertools.chain([first] if first else [], file)
        # Spreadsheets of countries with a decimal comma separate columns by semicolons.
        headers = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in ",;\t"}
        delimiter = max(headers, key=lambda each: len(headers[each]))
        # Where a space follows each delimiter of the first line it belongs to no column, and quotes may follow it.
        others = headers[delimiter][1:]
        is_spaced = bool(others) and all(name.startswith(" ") for name in others)
        reader = csv.reader(lines, strict=True, delimiter=delimiter, skipinitialspace=is_spaced)
        yield from _table(path, reader)


def _table(path: Path, lines: Any) -> Iterator[Record]:
    """Yield the rows of a table whose first line names the columns."""
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
                    f"{path}:{lines.line_num}: {len(values)} columns, but the first line names {len(header)}"
                )
            yield f"{path}:{lines.line_num}", dict(zip(header, values, strict=True))
        if is_empty:
            raise PeftcoreError(
                f"{path}:1: the first line names the columns, found {listed(header)}, and no line follows"
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
    except ValueError as error:  # damage may raise anything
        raise PeftcoreError(f"'{path}' cannot be read as Parquet: {str(error).partition(chr(10))[0]}") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}

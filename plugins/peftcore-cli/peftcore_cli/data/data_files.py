"""Read files of examples as records: JSON lines, a JSON array, CSV, TSV, Parquet, and folders of these.

Names that are not paths are datasets on the Hugging Face hub, loaded with the library `datasets`: ORG/NAME (the split
`train`), ORG/NAME@SPLIT (such as @validation or @train[:20%]) or ORG/NAME@CONFIG/SPLIT.
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
from peftcore_cli.console import number, require

Record = tuple[str, dict[str, Any]]  # FILE:LINE or FILE:INDEX, and the fields
_MAX_FIELD = (1 << 31) - 1  # characters; the largest limit that csv accepts on every system
_MAX_SHOWN = 20  # column names in a message
CONVERSIONS = {
    ".txt": 'Convert it to .jsonl, with one {"text": ...} per line',
    ".xlsx": "Export the sheet as CSV",
    ".xls": "Export the sheet as CSV",
    ".gz": "Unpack it first: gunzip",
    ".zip": "Unpack it first",
    ".yaml": "Convert it to .jsonl, with one JSON object per line",
}


def records(path: str, columns: Mapping[str, str] | None = None) -> Iterator[Record]:
    """Yield every example of `path` in order, as (FILE:LINE, fields).

    Args:
        path: file, folder, or id of a hub dataset.
        columns: {field: column of the file}, as `parse_columns` returns it.

    Raises:
        PeftcoreError: a file is missing, damaged, or of an unsupported type. The message names the file and the line.
    """
    data_path = Path(os.path.expanduser(path))
    if os.path.isdir(data_path):
        files = sorted(file for file in data_path.iterdir() if file.suffix.lower() in READERS)
        if not files:
            raise PeftcoreError(
                f"the folder '{path}' has no data files. Add a file of examples ({', '.join(READERS)}), or pass "
                "another path"
            )
        rows_of_path: Iterator[Record] = (record for file in files for record in _of_file(file))
    elif not os.path.exists(data_path) and _is_hub_id(path):
        rows_of_path = _of_hub(path)
    elif not os.path.exists(data_path):
        raise PeftcoreError(_missing_message(data_path, path))
    else:
        rows_of_path = _of_file(data_path)
    rows_of_path = map(check_header, rows_of_path)
    return (rename_columns(record, columns) for record in rows_of_path) if columns else rows_of_path


def records_of_each(paths: Sequence[str], columns: Mapping[str, str] | None) -> list[Iterator[Record]]:
    """Return the records of each data set, with columns renamed in the data sets that have any of them."""
    data_sets = [records(path) for path in paths]
    if not columns:
        return data_sets
    first_records = [list(itertools.islice(data_set, 1)) for data_set in data_sets]
    has_columns = [
        any(not fields.keys().isdisjoint(columns.values()) for _, fields in firsts) for firsts in first_records
    ]
    restored = [itertools.chain(firsts, rest) for firsts, rest in zip(first_records, data_sets, strict=True)]
    return [
        (rename_columns(record, columns) for record in data_set) if has or not any(has_columns) else data_set
        for data_set, has in zip(restored, has_columns, strict=True)
    ]


def _missing_message(data_path: Path, path: str) -> str:
    """Return the error message for a path that does not exist."""
    try:
        names = [entry.name for entry in data_path.parent.iterdir()]
    except (OSError, ValueError):  # such as a NUL character
        return (
            f"the file '{path}' does not exist, and neither does the folder '{data_path.parent}'. Correct the path in "
            "--data"
        )
    relative = "" if data_path.is_absolute() else f". The path is relative to '{Path.cwd()}'"
    suggestion = nearest(data_path.name, names)
    return (
        f"the file '{path}' does not exist{suggestion}{relative}. Pass a file ({', '.join(READERS)}), a folder "
        "of them, or the id of a hub dataset, ORG/NAME"
    )


def parse_columns(text: str | None) -> dict[str, str]:
    """Parse `prompt=question,completion=answer` into {field: column of the file}.

    Raises:
        PeftcoreError: the text is not a list of FIELD=COLUMN pairs.
    """
    columns = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, column = (word.strip() for word in part.partition("="))
        if not (name and equals and column):
            raise PeftcoreError(
                f"--columns must be FIELD=COLUMN pairs, found {part!r}. For example: --columns "
                "prompt=question,completion=answer"
            )
        columns[name] = column
    return columns


def listed(names: Iterable[str]) -> str:
    """Join names for a message, and shorten long lists."""
    shown = list(itertools.islice(names, _MAX_SHOWN + 1))
    return ", ".join(map(str, shown[:_MAX_SHOWN])) + (", ..." if len(shown) > _MAX_SHOWN else "")


def alpaca_prompt(instruction: str, context: Any) -> str:
    """Return the prompt of an Alpaca example: the instruction, followed by the input if there is one."""
    return f"{instruction}\n\n{context}" if isinstance(context, str) and context.strip() else instruction


def check_header(record: Record) -> Record:
    """Return the record after checking that it is not a repeated header.

    Raises:
        PeftcoreError: every value is the name of its column.
    """
    location, fields = record
    if fields and all(isinstance(value, str) and value.strip() == name.strip() for name, value in fields.items()):
        raise PeftcoreError(f"{location}: the line repeats the header, as in concatenated files. Delete the line")
    return record


def rename_columns(record: Record, columns: Mapping[str, str]) -> Record:
    """Rename the columns of a record to fields, as `columns` says.

    Raises:
        PeftcoreError: a column does not exist.
    """
    location, fields = record
    for name, column in columns.items():
        if column not in fields:
            raise PeftcoreError(
                f"{location}: --columns maps {name} to the column '{column}', which does not "
                f"exist{nearest(column, fields)}"
            )
    used = set(columns.values())
    others = {name: value for name, value in fields.items() if name not in used and name not in columns}
    renamed_fields = {name: fields[column] for name, column in columns.items()}
    if columns.get("prompt") == "instruction" and isinstance(
        renamed_fields["prompt"], str
    ):  # Alpaca's instruction may have an `input`
        renamed_fields["prompt"] = alpaca_prompt(renamed_fields["prompt"], others.pop("input", None))
    return location, others | renamed_fields


def _is_hub_id(path: str) -> bool:
    path = path.partition("@")[0]
    return not Path(path).suffix and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _of_hub(path: str) -> Iterator[Record]:
    require("datasets", extra="datasets")
    import datasets

    name, at, config_and_split = path.partition("@")
    config, _, split = config_and_split.rpartition("/")
    if at and not split:
        raise PeftcoreError(f"'{path}' has no split after @. Pass one, such as {name}@validation")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # loading can fail in many ways: network, script, file
        reason = str(error).partition("\n")[0]
        raise PeftcoreError(
            f"'{path}' is neither a file nor a folder, and cannot be loaded as a hub dataset: {reason}"
        ) from error
    for index, fields in enumerate(dataset):
        yield f"{path}:{index}", dict(fields)


def _of_file(path: Path) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        suffixes = ", ".join(READERS)
        raise PeftcoreError(
            f"'{path}' has the unsupported file type '{suffix}'. {CONVERSIONS.get(suffix, 'Convert it')} (supported: "
            f"{suffixes})"
        )
    try:
        yield from READERS[suffix](path)
    except UnicodeDecodeError as error:
        raise PeftcoreError(
            f"'{path}' is not valid UTF-8: {error.reason} at byte {error.start}. Save the file as UTF-8"
        ) from error
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
        for line_number, line in enumerate(file, 1):
            if line.strip():
                yield object_of(f"{path}:{line_number}", line)


def _json(path: Path) -> Iterator[Record]:
    with _text(path) as file:
        document = _parse_json(file.read(), str(path))
    if not isinstance(document, list):
        raise PeftcoreError(
            f"{path}: the file must contain a JSON array of examples, found {type(document).__name__}. If each line "
            "is an object, rename the file to .jsonl"
        )
    for index, fields in enumerate(document):
        yield _object(f"{path}:[{index}]", fields)


def _parse_json(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text.strip() else f"line {error.lineno}, column {error.colno}"
        raise PeftcoreError(f"{location}: invalid JSON: {error.msg} at {place}") from error
    except RecursionError as error:
        raise PeftcoreError(f"{location}: invalid JSON: the value is nested too deeply") from error
    except ValueError as error:  # an integer with thousands of digits
        raise PeftcoreError(f"{location}: invalid JSON: {error}") from error


def object_of(location: str, text: str) -> Record:
    """Parse a line of JSON into a record.

    Raises:
        PeftcoreError: the line is not a JSON object; the message begins with `location`.
    """
    return _object(location, _parse_json(text, location))


def _object(location: str, fields: Any) -> Record:
    if not isinstance(fields, dict):
        raise PeftcoreError(f"{location}: an example must be a JSON object, found {type(fields).__name__}")
    return location, fields


def _read_long_fields() -> None:
    """Raise the csv module's field limit of 131,072 characters, so that fields can hold whole documents."""
    csv.field_size_limit(_MAX_FIELD)


def _tsv(path: Path) -> Iterator[Record]:
    # Quotes are read literally, because texts such as reviews often contain unpaired quotes.
    _read_long_fields()
    with _text(path) as file:
        yield from _table(path, csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _csv(path: Path) -> Iterator[Record]:
    _read_long_fields()
    with _text(path) as file:
        header_line = file.readline()
        lines = itertools.chain([header_line] if header_line else [], file)
        # Spreadsheets separate columns with semicolons in locales with a decimal comma.
        headers = {delimiter: next(csv.reader([header_line], delimiter=delimiter), []) for delimiter in ",;\t"}
        delimiter = max(headers, key=lambda candidate: len(headers[candidate]))
        # If every delimiter in the header is followed by a space, skip these spaces, so that quoted fields are
        # recognised.
        names = headers[delimiter][1:]
        is_spaced = bool(names) and all(name.startswith(" ") for name in names)
        reader = csv.reader(lines, strict=True, delimiter=delimiter, skipinitialspace=is_spaced)
        yield from _table(path, reader)


def _table(path: Path, lines: Any) -> Iterator[Record]:
    """Yield the rows of a table whose first line names the columns."""
    try:
        header = next(lines, None)
        if header is None:
            return
        duplicate = next((name for name, count in Counter(header).items() if count > 1), None)
        if duplicate is not None:
            raise PeftcoreError(f"{path}:1: the header names the column '{duplicate}' twice. Rename one of the columns")
        is_empty = True
        for values in lines:
            if not values:
                continue
            is_empty = False
            if len(values) != len(header):
                raise PeftcoreError(
                    f"{path}:{lines.line_num}: the row has {number(len(values), 'value')} for "
                    f"{number(len(header), 'column')}. Correct the row"
                )
            yield f"{path}:{lines.line_num}", dict(zip(header, values, strict=True))
        if is_empty:
            raise PeftcoreError(f"{path}:1: the file has a header ({listed(header)}) but no rows. Add examples")
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
    except ValueError as error:  # pyarrow's errors about damaged files are ValueErrors
        raise PeftcoreError(f"'{path}' cannot be read as Parquet: {str(error).partition(chr(10))[0]}") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}

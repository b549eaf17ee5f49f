"""Files of examples of each kind, and what is said of those that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from peftcore_cli.data import mixture, row_reading
from peftcore_cli.data.data_files import parse_columns, records
from peftcore_cli.data.row import Row
from support.counted_lines import growth

from peftcore import PeftcoreError

ROWS = [{"text": 'a "fine" film,\nreally', "label": "1"}, {"text": "dull", "label": "0"}]


def write(path: Path) -> Path:
    """`ROWS` in the format of the name."""
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        texts = {
            ".json": json.dumps(ROWS, indent=1),
            ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
            ".csv": 'text,label\n"a ""fine"" film,\nreally",1\ndull,0\n',
        }
        path.write_text(texts[path.suffix], encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_the_same_rows_of_each_format(suffix: str, tmp_path: Path) -> None:
    found = row_reading.read_rows(write(tmp_path / f"rows.{suffix}"), "classification")
    assert [(row.text, row.label) for row in found] == [(row["text"], row["label"]) for row in ROWS]
    assert all(row.location.startswith(f"{tmp_path / f'rows.{suffix}'}:") for row in found)


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("no data")
    assert [location for location, _ in records(str(tmp_path))] == [
        f"{tmp_path / 'a.jsonl'}:1",
        f"{tmp_path / 'a.jsonl'}:2",
        f"{tmp_path / 'b.csv'}:3",
        f"{tmp_path / 'b.csv'}:4",
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_are_separated_by_what_separates_those_of_the_first_line(delimiter: str, tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text(delimiter.join(["text", "label"]) + "\n" + delimiter.join(['"one, two; three"', "good"]) + "\n")
    assert [fields for _, fields in records(str(file))] == [{"text": "one, two; three", "label": "good"}]


def test_delimiters_in_quoted_names_separate_nothing(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('"a;b;c",d\n1,2\n')
    assert [fields for _, fields in records(str(file))] == [{"a;b;c": "1", "d": "2"}]


def test_spaces_after_the_delimiter_belong_to_no_column(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('"text", "label"\n"a fine, long film", "good"\n')
    assert [fields for _, fields in records(str(file))] == [{"text": "a fine, long film", "label": "good"}]
    file.write_text("prompt,completion\nThe capital of France is, Paris\n")
    assert [fields["completion"] for _, fields in records(str(file))] == [" Paris"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "text,label\nfine,good\ntext,label\n"),
        ("rows.csv", "text,label\nfine,good\ntext, label\n"),
        ("rows.csv", "text, label\nfine, good\ntext, label\n"),
        ("rows.csv", "text\nfine\ntext\n"),
        ("rows.tsv", "text\tlabel\nfine\tgood\ntext\tlabel\n"),
        ("rows.jsonl", '{"text": "fine"}\n{"text": "good"}\n{"text": "text"}\n'),
    ],
)
def test_a_line_that_repeats_the_names_of_the_columns_is_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PeftcoreError, match=f"{name}:3: the line repeats the header"):
        list(records(str(tmp_path / name)))


def test_columns_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,completion,answer\na,x,b\n")
    columns = parse_columns("prompt=question, completion=answer")
    assert row_reading.read_rows(path, "causal-lm", columns) == [Row(f"{path}:2", "a", completion="b")]
    with pytest.raises(
        PeftcoreError,
        match=r"rows.csv:2: --columns maps text to the column 'questoin', which "
        r"does not exist",
    ):
        row_reading.read_rows(path, "causal-lm", {"text": "questoin"})
    with pytest.raises(PeftcoreError, match="--columns must be FIELD=COLUMN pairs, found 'prompt'"):
        parse_columns("prompt")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", r"a.txt' has the unsupported file type '.txt'. Convert it to .jsonl"),
        ("a.xlsx", "x", "Export the sheet as CSV"),
        ("a.json", '{"text": "a"}', r"a.json: the file must contain a JSON array of examples, found dict"),
        ("a.json", '[{"text": "a"}, 3]', r"a.json:\[1\]: an example must be a JSON object, found int"),
        ("a.json", '[{"text"\n: }]', r"a.json: invalid JSON: .* at line 2, column"),
        ("a.json", "[" * 100_000, "a.json: invalid JSON"),
        ("a.csv", 'text\n"a', r"a.csv:2: unexpected end of data"),
        ("a.csv", "text,label\na\n", r"a.csv:2: the row has 1 value for 2 columns"),
        ("a.csv", "text,text\na,b\n", "the header names the column 'text' twice"),
        ("a.parquet", "x", "cannot be read as Parquet"),
    ],
)
def test_a_wrong_file_is_named_with_the_way_out(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PeftcoreError, match=message):
        list(records(str(tmp_path / name)))


def test_an_empty_folder_and_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(PeftcoreError, match="has no data files"):
        records(str(tmp_path))
    (tmp_path / "chat.jsonl").write_text("")
    for path, message in (
        (tmp_path / "chats.jsonl", r"the file '.*chats.jsonl' does not exist \(nearest: 'chat.jsonl'\)\. Pass a file"),
        (tmp_path / "no" / "chat.jsonl", "neither does the folder '.*no'. Correct the path"),
        ("none.jsonl", "The path is relative to '.*'. Pass a file .*ORG/NAME"),
    ):
        with pytest.raises(PeftcoreError, match=message):
            list(records(str(path)))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_field_may_be_a_document(suffix: str, tmp_path: Path) -> None:
    """The csv module's own limit is 131,072 characters."""
    text = "a long, long story " * 20_000
    path = tmp_path / f"rows{suffix}"
    path.write_text(
        f'prompt,completion\n"{text}",good\n' if suffix == ".csv" else f"prompt\tcompletion\n{text}\tgood\n"
    )
    assert row_reading.read_rows(path, "causal-lm") == [Row(f"{path}:2", text, completion="good")]


def test_work_on_columns_grows_with_their_number_alone(tmp_path: Path) -> None:
    def reading(size: int) -> Callable[[], None]:
        path, names = tmp_path / f"{size}.csv", [f"column{i}" for i in range(size + 30)]
        path.write_text(",".join(names) + "\n" + ",".join("x" for _ in names) + "\n")

        def call() -> None:
            assert [len(fields) for _, fields in records(str(path))] == [len(names)]
            with pytest.raises(
                PeftcoreError, match=r"found column0, column1, .*column19, \.\.\.\. If the columns have"
            ):
                row_reading.read_rows(path, "causal-lm")
            with pytest.raises(PeftcoreError, match=r"which does not exist \(nearest: 'column7"):
                row_reading.read_rows(path, "causal-lm", {"text": "colum7"})
            path.write_text(",".join(names) + "\n")
            with pytest.raises(PeftcoreError, match=r"\(column0, .*column19, \.\.\.\) but no rows"):
                list(records(str(path)))

        return call

    assert growth(reading, 2000) < 2.5


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_number_of_thousands_of_digits(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    row = '{"text": "a", "label": ' + "9" * 5_000 + "}"
    path.write_text(row if suffix == ".jsonl" else f"[{row}]")
    with pytest.raises(PeftcoreError, match=r"rows\.jsonl?(:1)?: invalid JSON: Exceeds the limit \(4300( digits)?\)"):
        list(records(str(path)))


@pytest.mark.parametrize("name", ["a\0b", "x" * 5_000, "\ud800", "file/rows", "~no-such-user/a/rows"])
@pytest.mark.parametrize("suffix", ["", ".jsonl", ".csv", ".parquet"])
def test_a_path_that_names_no_file(name: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = f"{name}{suffix}" if name.startswith("~") else str(tmp_path / f"{name}{suffix}")
    with pytest.raises(PeftcoreError, match=r"cannot be read|unsupported file type|does not exist"):
        list(records(path))


def test_json_in_a_field_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    deep = "[" * 50_000 + "]" * 50_000
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "x"}], "tools": deep}))
    with pytest.raises(PeftcoreError, match=r"rows.jsonl:1: 'tools' is not valid JSON: the value is nested too deeply"):
        row_reading.read_rows(path, "causal-lm")
    path.write_text(json.dumps({"text": "x", "labels": deep}))
    with pytest.raises(PeftcoreError, match=r"rows.jsonl:1: 'labels' must be a list of names"):
        row_reading.read_rows(path, "multi-label")


def test_splits_and_configs_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        if split == "none":
            raise ValueError('Unknown split "none". Should be one of train, test')
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    for path in ("o/n", "o/n@test", "o/n@train[:1.5%]", "o/n@sst2/validation"):
        assert list(records(path)) == [(f"{path}:0", ROWS[0]), (f"{path}:1", ROWS[1])]
    assert asked == [
        ("o/n", None, "train"),
        ("o/n", None, "test"),
        ("o/n", None, "train[:1.5%]"),
        ("o/n", "sst2", "validation"),
    ]
    with pytest.raises(PeftcoreError, match=r"cannot be loaded as a hub dataset: Unknown split \"none\""):
        list(records("o/n@none"))
    with pytest.raises(PeftcoreError, match="has no split after @"):
        list(records("o/n@"))
    assert row_reading.sources("o/n@train[:20%]:2") == [mixture.Source("o/n@train[:20%]", 2.0)]
    assert row_reading.sources("o/n@train[:20]") == [mixture.Source("o/n@train[:20]")]

"""Reading examples: what is read, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peftcore_cli.data import row_reading
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import row_labels
from peftcore_cli.tasks.registered import find

from peftcore import PeftcoreError


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '\ufeff{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "ü", "id": 3}\n', "utf-8"
    )
    assert row_reading.read_rows(path, "causal-lm") == [
        Row(f"{path}:1", "a", completion="b"),
        Row(f"{path}:3", "c", completion="ü"),
    ]
    assert row_reading.guess_task(path) == "causal-lm"


def test_tsv_keeps_quotes(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('label\tnote\ttext\n1\tx\ta "fine film\r\n0\ty\tdull\n')
    assert row_reading.read_rows(path, "classification") == [
        Row(f"{path}:2", 'a "fine film', label="1"),
        Row(f"{path}:3", "dull", label="0"),
    ]
    assert row_reading.guess_task(path) == "classification"


@pytest.mark.parametrize(
    ("name", "content", "task", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "causal-lm", "a.jsonl:2: invalid JSON: Expecting value at column"),
        ("a.jsonl", '{"text": "a"}\n\n[1]\n', "causal-lm", "a.jsonl:3: an example must be a JSON object, found list"),
        (
            "a.jsonl",
            '{"txt": "a"}\n',
            "causal-lm",
            "a.jsonl:1: causal-lm needs the keys text, prompt/completion, messages, conversations, instruction/"
            "output or input_ids, found txt",
        ),
        ("a.jsonl", '{"prompt": "a"}\n', "causal-lm", "found prompt"),
        ("a.jsonl", '{"text": 3}\n', "causal-lm", "a.jsonl:1: 'text' must be text, found 3"),
        ("a.jsonl", '{"text": " "}\n', "causal-lm", "a.jsonl:1: 'text' is empty"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "classification", "a.jsonl:1: 'label' must be text, found null"),
        ("a.jsonl", '{"text": "a", "label": ""}\n', "classification", "a.jsonl:1: 'label' is empty"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"prompt": "a", "completion": "b"}\n',
            "causal-lm",
            "a.jsonl:2: this line has prompt/completion, but the first line has text",
        ),
        ("a.jsonl", "", "causal-lm", "a.jsonl' has no examples"),
        ("a.jsonl", "\n \n", "causal-lm", "a.jsonl' has no examples"),
        ("a.tsv", "", "classification", "a.tsv' has no examples"),
        (
            "a.tsv",
            "good\tpos\nbad\tneg\n",
            "classification",
            "a.tsv:2: classification needs the keys text/label, found",
        ),
        (
            "a.tsv",
            "good\tpos\n",
            "classification",
            "a.tsv:1: the file has a header (good, pos) but no rows",
        ),
        ("a.tsv", "text\tlabel\na\tb\na\n", "classification", "a.tsv:3: the row has 1 value for 2 columns"),
        ("a.xml", "<a/>", "classification", "a.xml' has the unsupported file type '.xml'. Convert it"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, content: str, task: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PeftcoreError) as error:
        row_reading.read_rows(tmp_path / name, task)
    assert message in str(error.value)


def test_a_task_is_one_that_there_is(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(PeftcoreError, match=r"--task must be one of causal-lm, seq2seq, .*, found 'chat'"):
        row_reading.read_rows(tmp_path / "d.jsonl", "chat")


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(PeftcoreError, match="does not exist"):
        row_reading.read_rows(tmp_path / "none.jsonl", "causal-lm")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(PeftcoreError, match=r"b.jsonl' is not valid UTF-8: invalid start byte at byte 10"):
        row_reading.read_rows(tmp_path / "b.jsonl", "causal-lm")
    with pytest.raises(PeftcoreError, match="has no examples"):
        (tmp_path / "c.jsonl").write_text("")
        row_reading.guess_task(tmp_path / "c.jsonl")


def test_labels() -> None:
    rows = [Row(f"f:{i}", "t", label=label) for i, label in enumerate(["10", "9", "9"])]
    assert row_labels.labels_of(rows) == ["9", "10"]
    assert row_labels.targets(rows, ["9", "10"]) == [1, 0, 0]
    assert row_labels.labels_of([Row("f", "t", label=label) for label in ("pos", "neg")]) == ["neg", "pos"]
    with pytest.raises(PeftcoreError, match=r"f:0: unknown label '10'"):
        row_labels.targets(rows, ["9", "11"])
    with pytest.raises(
        PeftcoreError, match="every training example has the label '9', but a classifier needs at least two"
    ):
        row_labels.labels_of(rows[1:])
    numbers = [Row(f"f:{i}", "t", label=label) for i, label in enumerate((1.5, 1.5, 2.0))]
    assert row_labels.labels_of(numbers) == []
    with pytest.raises(PeftcoreError, match=r"f:0: every training example has the label 1.5"):
        row_labels.labels_of(numbers[:2])


def test_labels_survive_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in (0, 1, "1")))
    assert [row.label for row in row_reading.read_rows(path, "classification")] == ["0", "1", "1"]


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("fields", "learned_from"),
    [
        ({"messages": MESSAGES}, 0),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, 1),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, 0),
        ({"conversations": MESSAGES}, 0),
        ({"messages": [{**message, "tool_calls": None} for message in MESSAGES], "text": None}, 0),
    ],
)
def test_conversations(fields: dict[str, object], learned_from: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**fields, "tools": '[{"name": "f"}]'}))
    wanted = Row(f"{path}:1", "", messages=MESSAGES, learned_from=learned_from, tools=[{"name": "f"}])
    assert row_reading.read_rows(path, "causal-lm") == [wanted]
    assert row_reading.guess_task(path) == "causal-lm"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": MESSAGES[:1]}, "the conversation has no assistant turn to learn"),
        ({"prompt": MESSAGES, "completion": MESSAGES[:1]}, "the conversation has no assistant turn to learn"),
        ({"messages": "hi"}, "'messages' must be a list of messages, found str"),
        ({"messages": []}, "'messages' must be a list of messages, found an empty list"),
        ({"messages": [{"content": "hi"}]}, r"messages\[0\] must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"messages\[0\] has content parts"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: 'content' must be text, found None"),
        (
            {"conversations": [{"from": "bot", "value": "hi"}]},
            r"'from' of conversations\[0\] must be one of human, .*, found 'bot'",
        ),
        ({"messages": MESSAGES, "tools": "{"}, "'tools' is not valid JSON"),
        ({"messages": MESSAGES, "tools": {}}, "'tools' must be a list, found dict"),
    ],
)
def test_a_wrong_conversation_is_named(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(fields))
    with pytest.raises(PeftcoreError, match=f"rows.jsonl:1: {message}"):
        row_reading.read_rows(path, "causal-lm")


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    a.write_text('{"text": "1"}\n{"text": "2"}\n')
    b.write_text('{"text": "3"}\n')
    c.write_text('{"prompt": "4", "completion": "5"}\n')
    assert [row.text for row in row_reading.read_rows([str(b), str(a)], "causal-lm")] == ["3", "1", "2"]
    assert row_reading.guess_task([str(a), str(b)]) == "causal-lm"
    mixed = row_reading.read_rows([str(a), str(c)], "causal-lm")
    assert [(row.kind, row.source) for row in mixed] == [("text", 0), ("text", 0), ("prompt/completion", 1)]
    b.write_text("")
    with pytest.raises(PeftcoreError, match=r"b.jsonl' has no examples"):
        row_reading.read_rows([str(a), str(b)], "causal-lm")
    a.write_text('{"text": "1", "label": 1}\n')
    b.write_text('{"text": "2", "label": 0.5}\n')
    assert (
        row_reading.guess_task([str(a)]) == "classification"
        and row_reading.guess_task([str(a), str(b)]) == "regression"
    )


TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def conversation(tmp_path: Path, *marks: dict[str, object], key: str = "messages") -> Row:
    path = tmp_path / "rows.jsonl"
    turns = [{**turn, **mark} for turn, mark in zip(TURNS, marks, strict=True)]
    if key == "conversations":
        names = {"role": "from", "content": "value"}
        turns = [{names.get(name, name): value for name, value in turn.items()} for turn in turns]
    path.write_text(json.dumps({key: turns}))
    return row_reading.read_rows(path, "causal-lm")[0]


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}])
def test_turns_that_are_marked_are_not_learned(tmp_path: Path, key: str, mark: dict[str, object]) -> None:
    row = conversation(tmp_path, {}, mark, {}, {"weight": 1}, key=key)
    assert row.not_learned == (1,) and row.messages == TURNS  # without the marks
    assert conversation(tmp_path, {}, {"weight": None}, {}, {"train": True}, key=key).not_learned == ()
    with pytest.raises(PeftcoreError, match=r"rows.jsonl:1: the conversation has no assistant turn to learn"):
        conversation(tmp_path, {}, mark, {}, mark, key=key)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"weight": 0.5}, r"messages\[1\]: 'weight' must be 0 or 1, found 0.5"),
        ({"weight": "0"}, r"messages\[1\]: 'weight' must be 0 or 1, found \"0\""),
        ({"train": 0}, r"messages\[1\]: 'train' must be true or false, found 0"),
        ({"content": " "}, r"messages\[1\] is an empty assistant turn, .*exclude it from the loss: \"weight\": 0"),
    ],
)
def test_marks_and_turns_that_mean_nothing(tmp_path: Path, mark: dict[str, object], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        conversation(tmp_path, {}, mark, {}, {})


def test_an_empty_turn_that_is_not_learned_is_no_harm(tmp_path: Path) -> None:
    assert conversation(tmp_path, {}, {"content": "", "weight": 0}, {}, {}).not_learned == (1,)


@pytest.mark.parametrize("columns", [None, {"prompt": "instruction", "completion": "output"}])
def test_the_input_of_alpaca_is_part_of_the_prompt(tmp_path: Path, columns: dict[str, str] | None) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Say.", "input": " ", "output": "x"},
        {"instruction": "Go.", "output": "y"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert row_reading.guess_task(path, columns) == "causal-lm"
    found = [(row.text, row.completion) for row in row_reading.read_rows(path, "causal-lm", columns)]
    assert found == [("Add.\n\n1, 2", "3"), ("Say.", "x"), ("Go.", "y")]


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "is "}, {"type": "text", "text": "it"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}, answer]}))
    (row,) = row_reading.read_rows(path, "causal-lm")
    assert [message["content"] for message in row.messages or ()] == ["is it", "yes"]
    for content in ([*parts, {"type": "image", "url": "a.png"}], []):
        path.write_text(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
        with pytest.raises(PeftcoreError, match=r"messages\[0\] has content parts other than text"):
            row_reading.read_rows(path, "causal-lm")


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("image-text", {"prompt": "a", "completion": "b"}, "'prompt' and 'completion' must be lists of messages"),
        ("audio-text", {"messages": None}, "'messages' must be a list of messages, found null"),
        (
            "causal-lm",
            {"conversations": [{"from": ["x"], "value": "a"}]},
            r"'from' of conversations\[0\] must be one of .* found \['x'\]",
        ),
    ],
)
def test_fields_of_other_kinds(task: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=f"f:1: {message}"):
        row_reading.row_of("f:1", fields, find(task))


def test_a_turn_of_tool_calls_without_content() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    assert row_reading.row_of("f:1", {"messages": turns}, find("image-text")).messages[1] == turns[1]

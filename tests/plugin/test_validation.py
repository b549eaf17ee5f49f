"""Values of a config's fields are of the annotated types, or the message names the field."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

import peftcore
from peftcore.plugin.registry import registry
from peftcore.plugin.validation import check_types, shown


@dataclass
class Config:
    whole: int = 1
    number: float = 1.0
    flag: bool = False
    text: str = ""
    names: str | Sequence[str] | None = None
    layers: int | Sequence[int] | None = None
    table: dict[str, int] = field(default_factory=dict)
    kind: bool | Literal["gaussian"] = True
    choice: Literal["none", "all"] = "none"
    anything: dict[str, Any] | None = None
    other: Any = None

    def __post_init__(self) -> None:
        check_types(self)


@pytest.mark.parametrize(
    "fields",
    [
        {"number": 3},
        {"names": ["a"]},
        {"names": ("a", "b")},
        {"names": {"a"}},
        {"names": "a"},
        {"layers": [1, 2]},
        {"layers": range(3)},
        {"table": {"a": 1}},
        {"kind": "gaussian"},
        {"choice": "all"},
        {"anything": {"a": [1, {}]}, "other": object()},
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_fits(fields: dict[str, Any]) -> None:
    Config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"whole": 1.0}, r"whole must be a whole number, found 1\.0"),
        ({"whole": True}, "whole must be a whole number, found True"),
        ({"whole": "8"}, "whole must be a whole number, found '8'"),
        ({"whole": 10**30}, "whole must be a whole number, found 1000"),
        ({"whole": 10**5000}, "found a int that is too long to show"),
        ({"number": float("nan")}, "number must be a finite number, found nan"),
        ({"number": 10**400}, "number must be a finite number"),
        ({"number": "1"}, "number must be a finite number, found '1'"),
        ({"flag": 1}, "flag must be true or false, found 1"),
        ({"text": None}, "text must be a text, found None"),
        ({"names": 3}, r"names must be a text or a list \(text\) or None, found 3"),
        ({"names": [1]}, r"names must be a text or a list \(text\) or None, found \[1\]"),
        ({"names": {"a": "b"}}, "names must be"),
        ({"layers": [1, None]}, r"layers must be a whole number or a list \(whole number\) or None"),
        ({"layers": range(10**6)}, "layers must be"),
        ({"table": ["a"]}, r"table must be a table \(text to whole number\), found \['a'\]"),
        ({"table": {"a": "b"}}, "table must be a table"),
        ({"table": {1: 1}}, "table must be a table"),
        ({"kind": "gausian"}, r"kind must be true or false or 'gaussian', found 'gausian' \(nearest: 'gaussian'\)"),
        ({"kind": 1}, "kind must be"),
        ({"choice": ["all"]}, r"choice must be 'none' or 'all', found \['all'\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_does_not(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        Config(**fields)


WRONG = [
    None,
    True,
    -1,
    0,
    1.5,
    float("inf"),
    "x",
    [],
    ["x"],
    [None],
    {},
    {"x": "y"},
    {"x": 1},
    [[]],
    10**400,
    object(),
]


@pytest.mark.parametrize("method", ["lora", "bitfit", "adapter", "prompt-tuning", "prefix-tuning", "qlora"])
def test_every_field_of_every_method(method: str) -> None:
    """A value of any kind is taken, or refused by a message that names a field: never another exception."""
    config_class = registry.method(method).config_class
    refused = 0
    for name in (each.name for each in dataclasses.fields(config_class)):
        for value in WRONG:
            try:
                config_class(**{name: value})
            except peftcore.PeftcoreError as error:
                refused += 1
                assert any(known in str(error) for known in (name, "r must")), (name, value)
    assert refused > len(dataclasses.fields(config_class))


def test_shown_is_short() -> None:
    assert shown("x" * 1000) == "'" + "x" * 199 + "..."
    assert shown(1) == "1"

"""`--set NAME=VALUE` by the types that a config declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from peftcore_cli.fields import describe, parse, text_of

from peftcore import PeftcoreError


@dataclass(frozen=True)
class Config:
    rank: int = 8
    rate: float = 0.1
    on: bool = False
    name: str = ""
    where: str | Sequence[str] = "all-linear"
    layers: int | Sequence[int] | None = None
    saved: list[str] | None = None
    start: bool | Literal["gaussian"] = True
    kind: Literal["none", "all"] = "none"
    ranks: dict[str, int] = field(default_factory=dict)
    anything: Any = None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rank=16", 16),
        ("rank = 16 ", 16),
        ("rate=3", 3),
        ("rate=1e-3", 1e-3),
        ("on=True", True),
        ("on=false", False),
        ("name=true", "true"),
        ("name=a=b", "a=b"),
        ("where=all-linear", "all-linear"),
        ("where=q_proj,v_proj", ["q_proj", "v_proj"]),
        ("where=q_proj, v_proj,", ["q_proj", "v_proj"]),
        ("where=q_proj", ["q_proj"]),
        ("where=layers.0.q_proj", ["layers.0.q_proj"]),
        (r"where=.*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"where=.*{1,2}", r".*{1,2}"),
        ('where=["q_proj"]', ["q_proj"]),
        ("layers=none", None),
        ("layers=3", 3),
        ("layers=0,3", [0, 3]),
        ("layers=[0, 3]", [0, 3]),
        ("saved=None", None),
        ("saved=score", ["score"]),
        ("start=false", False),
        ("start=gaussian", "gaussian"),
        ("kind=all", "all"),
        ("ranks=q_proj:4,layers.0:2", {"q_proj": 4, "layers.0": 2}),
        ('ranks={"q_proj": 4}', {"q_proj": 4}),
        (r"ranks=^a:b$:4", {"^a:b$": 4}),
        ("anything=2", 2),
        ("anything=2.5", 2.5),
        ("anything=word", "word"),
    ],
)
def test_values(setting: str, value: Any) -> None:
    found = parse(Config, [setting])
    (name,) = found
    assert found[name] == value and type(found[name]) is type(value)
    Config(**found)
    again = parse(Config, [f"{name}={text_of(found[name])}"])[name]  # as run.toml keeps it
    assert again == value and type(again) is type(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rank"], "--set must be NAME=VALUE, found 'rank'"),
        (["rnak=3"], "Config has no field 'rnak' (nearest: 'rank'"),
        (["rank=3", "rank=4"], "'rank' is set twice"),
        (["rank=3.5"], "'rank' takes a whole number, found '3.5'"),
        (["rank="], "'rank' takes a whole number, found ''"),
        (["rate=fast"], "'rate' takes a finite number, found 'fast'"),
        (["on=1"], "'on' takes true or false, found '1'"),
        (["start=normal"], "'start' takes true or false or 'gaussian', found 'normal'"),
        (["kind=some"], "'kind' takes 'none' or 'all', found 'some'"),
        (
            ["layers=first"],
            "'layers' takes a whole number or a list (whole number) or None (written a,b), found 'first'",
        ),
        (["ranks=q_proj"], "'ranks' takes a table (text to whole number) (written name:value,...), found 'q_proj'"),
        (["ranks=q_proj:x"], "'ranks' takes a table (text to whole number) (written name:value,...), found 'q_proj:x'"),
        (["ranks={q"], "'ranks' takes a table"),
        (["saved="], "'saved' takes a list (text) or None (written a,b), found ''"),
    ],
)
def test_errors(settings: list[str], message: str) -> None:
    with pytest.raises(PeftcoreError) as error:
        parse(Config, settings)
    assert message in str(error.value)


def test_every_installed_config_can_be_described() -> None:
    import typing

    from peftcore.plugin.registry import registry

    for method in registry.methods().values():
        assert all(describe(hint) for hint in typing.get_type_hints(method.config_class).values())


def test_json_that_is_nested_too_deeply() -> None:
    with pytest.raises(PeftcoreError, match=r"--set saved=\[\[.*\.\.\.$") as told:
        parse(Config, ["saved=[" + "[" * 50_000 + '""'])
    assert len(str(told.value)) < 1_100

"""Patterns give what `re.fullmatch` gives, in bounded time."""

import ast
import re
import sys
from collections.abc import Callable

import pytest
from fuzz.corpus import limit
from hypothesis import given, strategies as st
from support import tiny
from support.counted_lines import growth
from support.imports import ROOT

import peftcore
from peftcore.model import detect, targets
from peftcore.model.targets import patterns

PATHS = [
    "",
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.vision_tower.encoder.layers.3.self_attn.v_proj",
    "transformer.h.2.attn.c_attn",
    "A.B_1",
]
# As users of PEFT write them.
USUAL = [
    r".*\.(q_proj|v_proj)",
    r"^(?!.*vision_tower).*(?:q_proj|v_proj|down_proj)$",
    r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    r".*(?<!vision_tower\.encoder)\.layers\.[0-9]{1,2}\..*(?:attn|mlp).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp|attn)\.(?:(?:down_proj)))",
    r"(?i)MODEL\.(?-i:layers).*",
    r".*\b(q_proj|c_attn)\b",
    r"(?:[a-z_]+\.)*\d+(?:\.\w+)+",
    r"(?:a|A)\.(?:(?s:.))*?1$",
    r"[^.]*\.?[^0-9]*",
]
TRAPS = [
    r"([a-z_.0-9]+)+X",
    r".*.*.*.*.*.*.*.*.*X",
    r"(a|[ab]|\w|.)*X",
    r"((.*)*)*X",
    "(?:m|[lm])?" * 40 + "X",
    r"((((model)*?)?|((a|b|.))+?)*)*\1\d(\w\w)+",  # for which `regex` needs its timeout
    r"((.|[^.])([ab])+|(\w|.){2,9}|(aa|([ab])*?)((q_proj)+?)+?)*\1X",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns(pattern: str) -> None:
    wanted = [re.fullmatch(pattern, path) is not None for path in PATHS]
    assert any(wanted)
    assert list(map(patterns.compile_pattern(pattern, "target_modules"), PATHS)) == wanted


_PIECES = st.recursive(
    st.sampled_from(["a", "b", "ab", ".", "[^a]", r"\w", r"\.", "", "^", "$", r"\b", "(?i:A)", r"\d"]),
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{2,}"])),
        st.builds("({}{})".format, st.sampled_from(["?=", "?!", ""]), inner),
    ),
    max_leaves=6,
)


@given(_PIECES, st.text("ab.A1", max_size=7))
def test_any_pattern_gives_what_re_gives(pattern: str, text: str) -> None:
    assert patterns.compile_pattern(pattern, "target_modules")(text) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize("pattern", TRAPS)
def test_traps_are_answered_or_refused_in_time(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    with limit(60):  # the matching of `re` would take years
        try:
            assert not any(patterns.compile_pattern(pattern, "target_modules")(path) for path in PATHS)
        except peftcore.PeftcoreError as error:
            assert "takes more than 0.2 s" in str(error)


@pytest.mark.parametrize("pattern", TRAPS[:2])
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_every_field_of_a_config_is_bounded(field: str, pattern: str) -> None:
    value = {pattern: 4} if field.endswith("k_pattern") or field == "alpha_pattern" else pattern
    others = {"layers_to_transform": [0], "target_modules": ["q_proj"]} if field == "layers_pattern" else {}
    model, _ = tiny.llama(), peftcore.methods()  # imports
    with limit(60):
        if "_pattern" in field and field != "layers_pattern":
            peftcore.apply(model, "lora", **{field: value})
            assert model.model.layers[0].self_attn.q_proj._modules["peftcore"] is not None
        else:
            with pytest.raises(peftcore.PeftcoreError, match=field):
                peftcore.apply(model, "lora", **{field: value, **others})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"target_modules='\(' cannot be used as a regular expression: missing \)"),
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
        ("(?:(?:(?:a{100}){100}){100}){100}", "counted repeats expand to more than 100,000 copies"),
        ("(?:q_proj){e<=1}", r"'\{' at position 10 has another meaning"),  # approximate matching for `regex`
        ("[[:alpha:]]+", r"'\[:' at position 1 has another meaning"),
        (r"\p{L}+", r"bad escape \\p"),
        (r"(a|\B)", r"'\\B' at position 3 has another meaning"),
        ("a" * 200_000, r"it has 200,000 characters"),
    ],
    ids=["syntax", "deep", "copies", "approximate", "class", "property", "no boundary", "long"],
)
def test_what_cannot_be_used_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        patterns.compile_pattern(pattern, "target_modules")


def test_the_patterns_of_one_load_share_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single pattern is fast enough; too many together are refused."""
    monkeypatch.setattr(patterns, "_SECONDS", 0.1)
    many = [f"(.*\\.)?(q|v)_proj{number}|({'a|b|' * 50}c)*" for number in range(500)]
    assert not any(patterns.compile_pattern(pattern, "rank_pattern")(PATHS[2]) for pattern in many[:3])
    with patterns.limit_matching_time():
        assert not any(patterns.compile_pattern(pattern, "rank_pattern")(PATHS[2]) for pattern in many[:3])
    message = r"takes more than 0\.1 s \(the last pattern was '\(\.\*"
    with pytest.raises(peftcore.PeftcoreError, match=message), patterns.limit_matching_time():
        for pattern in many:
            patterns.compile_pattern(pattern, "rank_pattern")(PATHS[2])


def test_a_file_needs_regex_and_the_users_own_call_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "regex", None)
    pattern = r".*\.(q_proj|x_proj)"
    assert [patterns.compile_pattern(pattern, "target_modules")(path) for path in PATHS[1:4]] == [False, True, False]
    with patterns.limit_matching_time():
        assert patterns.compile_pattern(r"lm.head", "target_modules")("lm_head"), "there is one way to match"
        ends = patterns.compile_suffix_pattern(
            r"^model\.layers\.0\.self_attn\.q_proj$", "rank_pattern"
        )  # as `combine` writes it
        assert [path for path in PATHS if ends(path)] == [PATHS[2]] and not ends(f"a.{PATHS[2]}")
        model = tiny.llama()
        chosen = targets.select(model, detect(model), target_modules=["q_proj"], layers_to_transform=[1])
        assert [*chosen] == ["model.layers.1.self_attn.q_proj"]
        with pytest.raises(peftcore.PeftcoreError, match=r"x_proj.* needs the 'regex' package.*pip install regex"):
            patterns.compile_pattern(pattern, "target_modules")


@pytest.mark.parametrize("many", [[f"{i}(a|b)" for i in range(3000)], [f"{i}{'x' * 9_000}" for i in range(60)]])
def test_the_patterns_of_one_load_are_counted(many: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_full_match", lambda pattern: (re.compile("").fullmatch, False))  # takes a while
    message = r"at most 2,000, with 500,000 characters in all"
    with patterns.limit_matching_time(), pytest.raises(peftcore.PeftcoreError, match=message):
        for pattern in many:
            patterns.compile_pattern(pattern, "rank_pattern")


def test_a_pattern_with_thousands_of_expressions_is_refused() -> None:
    traps = {f"([a-z_.0-9]+)+X{i}": 4 for i in range(3000)}
    with pytest.raises(peftcore.PeftcoreError, match=r"3,000 regular expressions, but at most 1,000 are supported"):
        targets.pattern_value(traps, PATHS[2], 8)


def test_work_on_a_pattern_of_names_grows_with_the_number_of_modules_alone() -> None:
    def looking_up(size: int) -> Callable[[], None]:
        paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(size + 1)]
        values = {path: i for i, path in enumerate(paths)}

        def call() -> None:
            assert [targets.pattern_value(values, path, None) for path in paths] == list(range(size + 1))

        return call

    assert growth(looking_up, 500) < 2.5


_KEYS = st.sampled_from(["a", "b.a", "b_a", "b.b.a", "bxa", ".a", "a.", "b.(a|b)", ".*a", "..", "b.."])


@given(
    st.lists(_KEYS, max_size=5, unique=True), st.sampled_from(["a", "b.a", "b_a", "c.b.a", "cb.a", "b.a.a", "x.bxa"])
)
def test_the_first_key_that_matches_counts(keys: list[str], path: str) -> None:
    matched = [key for key in keys if re.fullmatch(rf"(?:.*\.)?(?:{key})", path)]
    assert targets.pattern_value({key: key for key in keys}, path, None) == (matched[0] if matched else None)
    assert targets.matched_keys(keys, [path]) == set(matched)


# How many calls of `re` have a pattern that is not a constant. All are made of peftcore's own words.
_OWN_WORDS = {
    "peftcore/model/targets/patterns.py": 3,  # the bounded matcher itself
    "plugins/peftcore-cli/peftcore_cli/data/image_turns.py": 1,  # marks of images and recordings
    "peftcore/files/folder.py": 1,  # names of files
    "peftcore/training/fusible.py": 1,  # names of classes
    "plugins/peftcore-lora/peftcore_lora/per_expert.py": 2,  # parts of experts, names of blocks in transformers
    "plugins/peftcore-lora/peftcore_lora/pipelines/diffusers_file.py": 1,  # parts of a pipeline
    "plugins/peftcore-reft/peftcore_reft.py": 1,  # the index of a layer
}
_OF_RE = {"compile", "match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer"}


def _patterns_that_are_not_constant(code: str) -> int:
    count = 0
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module, names = getattr(node, "module", None), {alias.name for alias in node.names}
            assert module != "re", f"from re import {names}"
            assert not {module, *names} & {"fnmatch"}, f"import {names}"
            assert all(alias.asname is None for alias in node.names if alias.name == "re"), "re has one name"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _OF_RE:
            is_of_re = isinstance(node.func.value, ast.Name) and node.func.value.id in ("re", "regex")
            count += is_of_re and not isinstance(node.args[0], ast.Constant)
    return count


def test_no_other_code_matches_patterns_that_may_be_a_strangers() -> None:
    found = {}
    for file in [
        *ROOT.glob("peftcore/**/*.py"),
        *ROOT.glob("plugins/*/*.py"),
        *ROOT.glob("plugins/*/peftcore_*/**/*.py"),
    ]:
        code = file.read_text(encoding="utf-8")
        if re.search(r"\bre\b|regex|fnmatch", code) and (count := _patterns_that_are_not_constant(code)):
            found[file.relative_to(ROOT).as_posix()] = count
    assert found == _OWN_WORDS, "match with peftcore.model.targets, which takes bounded time"

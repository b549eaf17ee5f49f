"""Signatures that a reader can remember: few parameters, none repeated, and public functions that agree."""

import ast
import inspect
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import peftcore.ops

ROOT = Path(peftcore.ops.__file__).parents[2]
MOST_PARAMETERS = 11
MOST_SHARED_LINES = 5
WEIGHT_TYPES = {"PackedWeight", "Weight", "WeightView"}  # in Python; in C++, and what its kernels take
POLICIES = {"NestedScales"}  # of csrc/weight/view.h: they read the scales of a WeightView


class Signature(NamedTuple):
    name: str
    where: str
    parameters: list[str]
    lines: list[str]  # as written, without indentation

    def __str__(self) -> str:
        return f"{self.where}: {self.name} ({len(self.parameters)} parameters)"


def split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "(<[{") - (character in ")>]}")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def in_cpp(text: str, where: str) -> Iterator[Signature]:
    """Functions, declared or defined: a name, and in brackets nothing but types with names."""
    text = re.sub(r"//[^\n]*", "", text)
    parameter = re.compile(r"(const\s+)?[\w:]+(<[^;]*>)?(\s|&|\*|const\b|__restrict__)+\w+(\s*=.*)?", re.S)
    for found in re.finditer(r"\b(\w+)\(", text):
        end, depth = found.end(), 1
        while depth and end < len(text):
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        inside = text[found.end() : end - 1]
        parameters = split(inside)
        if parameters and all(map(parameter.fullmatch, parameters)):
            yield Signature(found[1], where, parameters, [line.strip() for line in inside.split("\n")])


def in_python(text: str, where: str) -> Iterator[Signature]:
    """Functions, and operators' calls, whose fields are the parameters of what makes them."""
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in arguments]
            written = lines[node.lineno - 1 : node.body[0].lineno - 1]
        elif isinstance(node, ast.ClassDef) and is_call(node):
            fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
            names = [ast.unparse(field.target) for field in fields]
            written = [lines[field.lineno - 1] for field in fields]
        else:
            continue
        yield Signature(node.name, where, names, [line.strip() for line in written])


def is_call(node: ast.ClassDef) -> bool:
    """Whether `define_by` defines an operator by it."""
    return any(isinstance(child, ast.FunctionDef) and child.name == "compute" for child in node.body)


def cpp_signatures(root: Path) -> list[Signature]:
    files = [path for end in ("h", "cpp", "cu", "cuh") for path in sorted((root / "csrc").rglob(f"*.{end}"))]
    return [found for path in files for found in in_cpp(path.read_text(), str(path.relative_to(root)))]


def python_signatures(root: Path) -> list[Signature]:
    files = [*sorted((root / "peftcore").rglob("*.py")), *sorted((root / "plugins").rglob("*.py"))]
    return [found for path in files for found in in_python(path.read_text(), str(path.relative_to(root)))]


def shared(one: Signature, other: Signature) -> int:
    """Lines in the longest run that both have."""
    longest, before = 0, [0] * (len(other.lines) + 1)
    for line in one.lines:
        now = [0]
        for j, beside in enumerate(other.lines):
            now.append(before[j] + 1 if line == beside and line else 0)
        longest, before = max(longest, *now), now
    return longest


def repeated(signatures: list[Signature]) -> list[str]:
    long = [s for s in signatures if len(s.lines) > MOST_SHARED_LINES]
    return [f"{a} and {b}" for a, b in combinations(long, 2) if shared(a, b) > MOST_SHARED_LINES]


def weight_types(root: Path) -> set[str]:
    """Structs, classes and named tuples that hold a weight's scales and what reads them, by the names there were."""
    found = set()
    for path in [*(root / "csrc").rglob("*.h"), *(root / "csrc").rglob("*.cu"), *(root / "csrc").rglob("*.cpp")]:
        for name, body in re.findall(r"\b(?:struct|class) (\w+) \{\n(.*?)\n\};", path.read_text(), re.S):
            fields = "\n".join(line for line in body.split("\n") if re.match(r" {4}\w[^(]*$", line))
            if re.search(r"\b(absmax|scales)\b", fields) and re.search(r"\b(quant_map|code|nested\w*)\b", fields):
                found.add(name)
    for path in [*(root / "peftcore" / "ops").rglob("*.py"), *(root / "peftcore" / "quantization").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                fields = {ast.unparse(c.target) for c in node.body if isinstance(c, ast.AnnAssign)}
                if fields & {"absmax"} and fields & {"code", "quant_map"} and not is_call(node):
                    found.add(node.name)
    return found


def test_the_readers_of_signatures_read() -> None:
    text = (
        "void f(const at::Tensor& x,\n       std::optional<Pair<int, int>> y = {}, float* const* z);\ng(x, y);\nh(1);"
    )
    (found,) = in_cpp(text, "")
    assert found.name == "f" and len(found.parameters) == 3 and len(found.lines) == 2
    six = "".join(f"    {name}: int,\n" for name in "abcdef")
    fields = six.replace(",", "") + "    def compute(self): ..."
    one, other, _ = in_python(f"def f(\n{six}): ...\n\nclass G:\n{fields}", "")
    assert one.parameters == other.parameters == list("abcdef")
    twice = list(in_python(f"def f(\n{six}    g: int,\n): ...\n\ndef h(\n    x: int,\n{six}): ...\n", ""))
    assert len(repeated(twice)) == 1 and len(twice[0].parameters) == 7


def test_operators_take_few_arguments() -> None:
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("peftcore::")]
    assert {"peftcore::lora_linear", "peftcore::optim_step_"} <= {schema.name for schema in schemas}
    assert not [str(schema) for schema in schemas if len(schema.arguments) > MOST_PARAMETERS]


def test_functions_of_the_extension_and_its_operators_take_few_parameters() -> None:
    signatures = cpp_signatures(ROOT)
    assert {"peftcore_quant4_linear", "peftcore_lora_down", "lora_linear_backward"} <= {s.name for s in signatures}
    signatures += [s for s in python_signatures(ROOT) if s.where.startswith("peftcore/ops/")]
    assert not [str(s) for s in signatures if len(s.parameters) > MOST_PARAMETERS]


def test_no_signature_repeats_another() -> None:
    assert not repeated(cpp_signatures(ROOT)) + repeated(python_signatures(ROOT))


def test_a_weight_has_three_types() -> None:
    assert weight_types(ROOT) <= WEIGHT_TYPES | POLICIES


FUNCTIONS = {name: value for name in peftcore.__all__ if inspect.isfunction(value := getattr(peftcore, name))}
WITHOUT_MODEL = {"config", "load_sharded", "methods"}  # they need none, or make one
CHANGE_THE_MODEL = {
    *("activate", "apply", "combine", "dequantize", "fuse", "lazy_logits", "load", "merge", "quantize", "remove"),
    *("scale", "set_resident_limit", "set_state_dict", "shard", "unmerge"),
}
REPORTS = {
    "estimate": "Estimate",
    "plan": "Plan",
    "suggest": "Suggestion",
    "summary": "Summary",
    "merge_error": "dict[str, float]",
    "convert": "dict[str, float]",
    "save": "Path",
    "export": "Path",
    "after_step": "None",
}
# What an argument is about, by its name: each is text, of the same annotation wherever it is named so.
SUBJECTS = {"method", "adapter", "adapters", "source", "path"}
POSITIONAL = {
    *("model", *SUBJECTS),
    *("quant_type", "dtype", "mesh", "factor", "limit"),  # the value that the function sets
    *("step", "total_steps", "lr", "weight_decay"),  # numbers of a training loop
}
MISNAMED = {"name", "names", "adapter_name", "layout", "to", "kind", "type", "target", "folder"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_follow_the_conventions(name: str) -> None:  # docs/conventions.md
    signature = inspect.signature(FUNCTIONS[name])
    parameters = list(signature.parameters.values())
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if name not in WITHOUT_MODEL:
        assert by_position[0] == "model"
    assert set(by_position) <= POSITIONAL and len(by_position) <= 3, "other options go by keyword"
    assert not [each for each in by_position[2:] if each in SUBJECTS - {"source"}], "what the call is about is second"
    assert not MISNAMED & signature.parameters.keys()
    if name in CHANGE_THE_MODEL:
        assert signature.return_annotation == parameters[0].annotation  # the type that was given
    elif name in REPORTS:
        assert signature.return_annotation == REPORTS[name]


def test_the_conventions_name_functions_that_exist() -> None:
    text = (ROOT / "docs" / "conventions.md").read_text()
    named = set(re.findall(r"`([a-z_]+)`", text)) & {*CHANGE_THE_MODEL, *REPORTS}
    assert named == {*CHANGE_THE_MODEL, *REPORTS} and named <= FUNCTIONS.keys()


@pytest.mark.parametrize("argument", ["adapter", "format"])
def test_arguments_of_one_name_have_one_type(argument: str) -> None:
    found: dict[Any, list[str]] = {}
    for name, function in FUNCTIONS.items():
        parameter = inspect.signature(function).parameters.get(argument)
        if parameter is not None:
            found.setdefault(str(parameter.annotation).removesuffix(" | None"), []).append(name)
    assert found.keys() == {"str"}

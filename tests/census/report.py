"""The rows of a census as totals by target, causes, and a table by class: docs/census.md, and known.json for CI."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

from census.check import ADVISED, CRASH, EXACT, FIELDS, IMAGES, PROMPTS, REFUSED, WRONG

KNOWN = Path(__file__).with_name("known.json")
_FAMILIES = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "TEXT_ENCODING")
_COLUMNS = (*FIELDS, *(method + IMAGES for method in PROMPTS))
_MARKS = {EXACT: "yes", ADVISED: "advised", REFUSED: "refused", WRONG: "**wrong**", CRASH: "**crash**"}

_HEAD = """# Tested models

Every model class in transformers' auto mappings, as a tiny random instance, under every method of this repository.

| outcome | meaning |
|---|---|
| `yes` | every check below passes |
| `advised` | a `PeftcoreError` says what to do (name modules, make a call first); after that every check passes |
| `refused` | a `PeftcoreError` says why the method does not apply |
| `wrong`, `crash` | a wrong result, or any other exception |
"""

_CHECKED = """## What is checked

- Before training, the adapter computes what the base computes. Changed, it changes the output (changed 1000 times as
  much where rounding hides it: some layers are scaled by 1e-6), and it gets a gradient wherever the adapted weight
  would get one.
- `disabled()` gives the base's outputs. After saving and loading, merging and unmerging, and removing, the outputs are
  as before; removal restores every tensor of the base bit for bit.
- `qlora` quantizes to NF4, `qlora-mxfp4` and `qlora-affine4` to these formats, in blocks of 32.
- A prompt that consists of a token's vectors equals that token. Padding before a row changes nothing where it changes
  nothing in the base. Each step of generation equals one forward of all tokens so far.
- Outputs are equal if they differ by at most 2e-6 of the largest value, or of 1 if that is less, since the order of
  additions in some kernels depends on memory addresses. After a merge, which adds in another order, 2e-3 of what the
  adapter changes plus 1e-4 is allowed; for prompts, padding and steps 1e-3.
- With images, an image comes before most of each row's text, as many tokens as the model makes vectors of it. Models
  that use cross-attention get it in the other columns, too.
- Checks that do not apply, such as a head without tokens, are left out and count as `yes`; the rows that `make census`
  keeps say so in their notes.

Made by `make census`. Versions of transformers: {versions}. Commits: {commits}.
"""


def known() -> dict[str, dict[str, str]]:
    """{class: {method: why}} of what the last whole run found wrong."""
    return json.loads(KNOWN.read_text())["failures"]


def reached() -> list[str]:
    """The classes that the last whole run examined."""
    return json.loads(KNOWN.read_text())["examined"]


def write_known(rows: list[dict[str, Any]]) -> None:
    """Keep what `known` and `reached` give."""
    examined = sorted(row["class"] for row in rows if "none" not in row)
    KNOWN.write_text(json.dumps({"failures": failures(rows), "examined": examined}, indent=1) + "\n")


def failures(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """{class: {method: why}} of wrong results and crashes."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        for method, outcome in row["outcomes"].items():
            if outcome["kind"] in (WRONG, CRASH):
                found[row["class"]][method] = f"{outcome['kind']} ({outcome['at']}): {outcome['why']}"
    return dict(sorted(found.items()))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the whole page."""
    rows = sorted(rows, key=lambda row: row["class"].lower())
    there = [row for row in rows if "none" not in row]
    checked = _CHECKED.format(versions=_counts(rows, "transformers"), commits=_counts(rows, "commit"))
    parts = [
        _HEAD,
        _totals(rows, there),
        _by_method(there),
        checked,
        _causes(there),
        _table(there),
        _without(rows),
    ]
    return "\n".join(parts)


def _counts(rows: list[dict[str, Any]], fact: str) -> str:
    """Return how many classes have each value of a fact that `make census` keeps with every row."""
    found = Counter(re.sub("-dirty$", " with uncommitted changes", row.get(fact, "not recorded")) for row in rows)
    return ", ".join(f"{value} ({count:,} class{'es' * (count != 1)})" for value, count in found.most_common())


def _share(rows: list[dict[str, Any]], method: str) -> str:
    kinds = Counter(row["outcomes"].get(method, {}).get("kind") for row in rows)
    served = kinds[EXACT] + kinds[ADVISED]
    advised = f", {kinds[ADVISED]} of them advised" if kinds[ADVISED] else ""
    return f"{served} of {len(rows)} ({served / max(1, len(rows)):.1%}){advised}"


def _totals(rows: list[dict[str, Any]], there: list[dict[str, Any]]) -> str:
    families = {
        name
        for kind in _FAMILIES
        for names in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values()
        for name in ((names,) if isinstance(names, str) else names)
    }
    lacking = sum("ImportError" in row.get("none", "") or "ModuleNotFound" in row.get("none", "") for row in rows)
    kinds = Counter(outcome["kind"] for row in there for outcome in row["outcomes"].values())
    linear, bias = ([row for row in there if row.get(what)] for what in ("linear", "bias"))
    lines = [
        "| target | found |",
        "|---|---|",
        f"| classes listed | {len(rows)} |",
        f"| examined | {len(there)}; {lacking} more need libraries that are not installed, of "
        f"{len(rows) - len(there) - lacking} no instance runs |",
        f"| no crash | {kinds[CRASH]} of {kinds.total()} outcomes |",
        f"| no wrong result | {kinds[WRONG]} of {kinds.total()} outcomes |",
        f"| LoRA on 99 % of classes with a linear layer | {_share(linear, 'lora')} |",
        f"| BitFit on 99 % of classes with a bias | {_share(bias, 'bitfit')} |",
    ]
    for method in PROMPTS:
        served = [row for row in there if row.get(f"peft {method}")]
        lines.append(f"| {method} on 95 % of classes that PEFT serves | {_share(served, method)} |")
    for method in PROMPTS:
        seeing = [row for row in there if method + IMAGES in row["outcomes"]]
        lines.append(f"| {method} with images and text | {_share(seeing, method + IMAGES)} |")
    chosen = [row for row in there if row["class"] in families]
    lines.append(f"| bottleneck adapters on 95 % of decoders and encoders of text | {_share(chosen, 'adapter')} |")
    return "\n".join([*lines, ""])


def _by_method(there: list[dict[str, Any]]) -> str:
    lines = ["## By method", "", "| | yes | advised | refused | wrong | crash |", "|---|---|---|---|---|---|"]
    for method in _COLUMNS:
        kinds = Counter(row["outcomes"][method]["kind"] for row in there if method in row["outcomes"])
        lines.append(
            f"| {method} | {kinds[EXACT]} | {kinds[ADVISED]} | {kinds[REFUSED]} | {kinds[WRONG]} | {kinds[CRASH]} |"
        )
    return "\n".join([*lines, ""])


def _causes(there: list[dict[str, Any]]) -> str:
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in there:
        for method, outcome in row["outcomes"].items():
            if outcome["kind"] != EXACT:
                found[_MARKS[outcome["kind"]], method, _cause(outcome["why"], row["class"])].append(row["class"])
    lines = ["## Causes", "", "| | method | why | classes |", "|---|---|---|---|"]
    for (kind, method, why), names in sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]), item[0])):
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"| {kind} | {method} | {why} | {some} |")
    return "\n".join([*lines, ""])


def _cause(why: str, name: str) -> str:
    """The message without what differs from class to class."""
    why = why.replace(name, "the model").replace("\n", " ").replace("|", "/")
    why = re.sub(r"'[^']*\.[^']*'", "'…'", why)
    why = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "n", why)
    return why if len(why) <= 160 else f"{why[:159]}…"


def _table(there: list[dict[str, Any]]) -> str:
    lines = ["## By class", "", "| | " + " | ".join(_COLUMNS) + " |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for row in there:
        cells = (row["outcomes"].get(method) for method in _COLUMNS)
        lines.append(f"| {row['class']} | " + " | ".join(_MARKS[c["kind"]] if c else "" for c in cells) + " |")
    return "\n".join([*lines, ""])


def _without(rows: list[dict[str, Any]]) -> str:
    lines = ["## Without an instance", "", "| | why |", "|---|---|"]
    for row in rows:
        if "none" in row:
            lines.append(f"| {row['class']} | {' '.join(row['none'].split())[:110].replace('|', '/')} |")
    return "\n".join([*lines, ""])

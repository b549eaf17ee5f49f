"""Run of the suite: which checks run on which family, what is excused, and the report."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import peftcore
from peftcore.errors import nearest
from peftcore.plugin.registry import registry
from peftcore.testing.case import Case
from peftcore.testing.checks import CHECKS, Check
from peftcore.testing.families import FAMILIES, Family, families_of

APPLIES = "apply, or a refusal that says why not"


@dataclass(frozen=True)
class Result:
    """Result of one check on one family: failed (`error`), not applicable (`reason`), or passed (neither)."""

    name: str
    error: str | None = None
    reason: str | None = None
    family: str = ""


@dataclass(frozen=True)
class Report:
    """Results of `check_method`; printed as a line per check of the first family, and a line per further family."""

    method: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.error)

    @property
    def families(self) -> tuple[str, ...]:
        """Families that were tried."""
        return tuple(dict.fromkeys(result.family for result in self.results if result.family))

    @property
    def first(self) -> str:
        """Family on which all checks ran."""
        return max(self.families, key=lambda family: len(self.of(family)), default="")

    def of(self, family: str) -> tuple[Result, ...]:
        """Return the results on one family."""
        return tuple(result for result in self.results if result.family == family)

    def __str__(self) -> str:
        lines = [f"check_method: {self.method}"]
        for family in self.families:
            results = self.of(family)
            passed = sum(not result.error and not result.reason for result in results)
            lines.append(f" {family}: {passed} of {len(results)} checks passed")
            lines += [_line(r) for r in results if family == self.first or r.error or r.reason]
        lines += [_line(result) for result in self.results if not result.family]
        failed = next((r.name for r in self.failed if r.family and r.name != APPLIES), None)
        if failed is not None:
            lines.append(f"Correct the method. If a check cannot apply: not_applicable={{{failed!r}: 'the reason'}}")
        return "\n".join(lines)


def _line(result: Result) -> str:
    state = "FAILED" if result.error else "not applicable" if result.reason else "passed"
    detail = result.error or result.reason or ""
    return f"  {state:<14}  {result.name}" + (f": {detail}" if detail else "")


def check_method(
    config: Any,
    *,
    families: Sequence[str | Family | Callable[[], nn.Module]] = tuple(FAMILIES),
    not_applicable: Mapping[str, str] | None = None,
    checks: Collection[str] | None = None,
    compile_backend: str = "aot_eager",
    batches: Callable[[nn.Module], Iterable[Any]] | None = None,
) -> Report:
    """Try what users do with the method of `config` on tiny models of each family, and print the report.

    All checks run on the first family that the method can be applied to, and on the others those that depend on the
    model.

    Args:
        config: config of an installed method, without dropout, since the checks compare outputs.
        families: names in `FAMILIES`, your own families, or functions that make a model.
        not_applicable: what this method cannot pass: {check, family, or "family: check": the reason}. A family can be
            excused if `apply` refuses it with a PeftcoreError. Excused checks run nevertheless: an excuse that is not
            needed is a failure, unless its reason begins with "may" (what depends on the processor), and so is a merge
            that is wrong instead of refused.
        checks: run only these.
        batches: (model) -> batches for `apply`, for a method that needs data for its initial values. None: two
            calls of the family, with labels if its models take them.
        compile_backend: backend of `torch.compile(fullgraph=True)`; "inductor" compiles fully and takes a minute.

    Raises:
        AssertionError: a check failed; the message is the report.
        PeftcoreError: `families`, `checks` or `not_applicable` contains an unknown name.
    """
    excuses = _Excuses(dict(not_applicable or {}))
    for each in families:
        if isinstance(each, str) and each not in FAMILIES:
            raise peftcore.PeftcoreError(f"'{each}' is not a family{nearest(each, FAMILIES)}: {', '.join(FAMILIES)}")
    chosen = families_of(families)
    known = [*CHECKS, *(family.name for family in chosen)]
    known += [f"{family.name}: {name}" for family in chosen for name in CHECKS]
    for name in (*excuses.reasons, *(checks or ())):
        if name not in (CHECKS if name in (checks or ()) else known):
            raise peftcore.PeftcoreError(
                f"'{name}' is not a check{nearest(name, known)}. The checks: {', '.join(CHECKS)}"
            )
    results: list[Result] = []
    first: Case | None = None
    for family in chosen:
        case = Case(config, family, compile_backend, first, batches)
        applies = _applies(case, excuses)
        results.append(applies)
        if applies.error or applies.reason:
            continue
        for check in CHECKS.values():
            if (first is None or check.essential) and (checks is None or check.name in checks):
                results.append(_run(check, case, excuses))
        first = first or case
    meant = {name for r in results if r.error is None for name in (r.name, r.family, f"{r.family}: {r.name}")}
    results += [
        Result(name, error="it is excused, but passes without the excuse. Remove it from not_applicable")
        for name in excuses.reasons
        if name not in excuses.used and name in meant and not excuses.reasons[name].startswith("may ")
    ]
    if first is None and not any(result.error for result in results):
        results.append(Result(APPLIES, error="it applies to none of the families"))
    report = Report(registry.method_of_config(config).name, tuple(results))
    print(report)
    if report.failed:
        raise AssertionError(str(report))
    return report


class _Excuses:
    """Excuses, and which of them were needed."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons
        self.used: set[str] = set()

    def of(self, *names: str) -> str | None:
        """Return the reason for the first of `names` that is excused, and mark the excuse as needed."""
        name = next((name for name in names if name in self.reasons), None)
        if name is None:
            return None
        self.used.add(name)
        return self.reasons[name]


def _applies(case: Case, excuses: _Excuses) -> Result:
    family = case.family.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.add(case.unprepared(), None, "default")
    except peftcore.PluginError as fault:  # a fault of the plugin, not a refusal
        return Result(APPLIES, error=_where(fault), family=family)
    except peftcore.PeftcoreError as refusal:
        reason = excuses.of(family)
        if reason is not None:
            return Result(APPLIES, reason=reason, family=family)
        hint = f"{refusal}. If the method cannot be applied to it: not_applicable={{'{family}': 'the reason'}}"
        return Result(APPLIES, error=hint, family=family)
    except Exception as fault:
        return Result(APPLIES, error=_where(fault), family=family)
    return Result(APPLIES, family=family)


def _run(check: Check, case: Case, excuses: _Excuses) -> Result:
    family = case.family.name
    try:
        with warnings.catch_warnings():  # one of the checks looks for this warning
            warnings.filterwarnings("ignore", ".* of the weight in layers; left out: ")
            # allowed by the method's PeftRules
            warnings.filterwarnings("ignore", "Hugging Face PEFT cannot read this file: ")
            reason = check.run(case)
    except Exception as found:
        is_refusal = isinstance(found, peftcore.PeftcoreError) and not isinstance(found, peftcore.PluginError)
        is_refusal |= not check.refused
        reason = excuses.of(f"{family}: {check.name}", check.name) if is_refusal else None
        error = None if reason is not None else _where(found)
        return Result(check.name, error, reason, family)
    return Result(check.name, None, reason, family)


def _where(error: Exception) -> str:
    raised = error.__cause__ if isinstance(error, peftcore.PluginError) and error.__cause__ is not None else error
    where = traceback.extract_tb(raised.__traceback__)[-1]
    return f"{type(error).__name__}: {error!s:.600} ({where.name}, line {where.lineno})"

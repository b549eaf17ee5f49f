"""Run the suite: choose the checks for each family, apply excuses, and report."""

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
from peftcore.testing.families import FAMILIES, Family, family_of

APPLIES = "apply, or a refusal that says why not"


@dataclass(frozen=True)
class Result:
    """Result of one check on one family: failed (`error`), not applicable (`reason`), or passed (neither)."""

    name: str
    error: str | None = None
    reason: str | None = None
    family: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and not self.reason


@dataclass(frozen=True)
class Report:
    """Results of `check_method`, printed as one line per check of the first family and one line per further family."""

    method: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.error)

    @property
    def families(self) -> tuple[str, ...]:
        """Families that were tested."""
        return tuple(dict.fromkeys(result.family for result in self.results if result.family))

    @property
    def first(self) -> str:
        """Family on which all checks ran."""
        return max(self.families, key=lambda family: len(self.of(family)), default="")

    def of(self, family: str) -> tuple[Result, ...]:
        """Return the results for one family."""
        return tuple(result for result in self.results if result.family == family)

    def __str__(self) -> str:
        lines = [f"check_method: {self.method}"]
        for family in self.families:
            results = self.of(family)
            passed = sum(result.passed for result in results)
            lines.append(f" {family}: {passed} of {len(results)} checks passed")
            lines += [_line(result) for result in results if family == self.first or not result.passed]
        lines += [_line(result) for result in self.results if not result.family]
        failed = next((r.name for r in self.failed if r.family and r.name != APPLIES), None)
        if failed is not None:
            lines.append(f"Correct the method. If a check cannot apply: not_applicable={{{failed!r}: 'the reason'}}")
        return "\n".join(lines)


def _line(result: Result) -> str:
    if result.error:
        return f"  FAILED          {result.name}: {result.error}"
    if result.reason:
        return f"  not applicable  {result.name}: {result.reason}"
    return f"  passed          {result.name}"


def check_method(
    config: Any,
    *,
    families: Sequence[str | Family | Callable[[], nn.Module]] = tuple(FAMILIES),
    not_applicable: Mapping[str, str] | None = None,
    checks: Collection[str] | None = None,
    compile_backend: str = "aot_eager",
    batches: Callable[[nn.Module], Iterable[Any]] | None = None,
) -> Report:
    """Test the method of `config` on tiny models of each family in the ways that users use it, and print a report.

    All checks run on the first family that the method can be applied to. On the other families, the checks that depend
    on the model run.

    Args:
        config: config of an installed method. Dropout must be off, since the checks compare outputs.
        families: names in `FAMILIES`, `Family` objects, or functions that make a model.
        not_applicable: excuses for checks that this method cannot pass, {check, family, or "family: check": reason}. A
            family can be excused if `apply` refuses it with a PeftcoreError. Excused checks run nevertheless. An
            unnecessary excuse is a failure, unless its reason begins with "may" (for what depends on the processor). A
            wrong merge is a failure too; the method must refuse it instead.
        checks: names of the checks to run; by default all.
        batches: (model) -> batches for `apply`, for methods that initialise from data. None for two calls of the
            family, with labels if its models take them.
        compile_backend: backend for `torch.compile(fullgraph=True)`; "inductor" generates code, which takes a minute.

    Raises:
        AssertionError: a check failed; the message is the report.
        PeftcoreError: `families`, `checks` or `not_applicable` contains an unknown name.
    """
    excuses = _Excuses(dict(not_applicable or {}))
    chosen_families = [family_of(family) for family in families]
    _refuse_unknown_names(excuses.reasons, checks or (), chosen_families)
    results: list[Result] = []
    first_case: Case | None = None
    for family in chosen_families:
        case = Case(config, family, compile_backend, first_case, batches)
        of_family = _check_family(case, checks, excuses)
        results += of_family
        if first_case is None and of_family[0].passed:
            first_case = case
    results += excuses.unneeded(results)
    if first_case is None and not any(result.error for result in results):
        results.append(Result(APPLIES, error="the method cannot be applied to any of the families"))
    report = Report(registry.method_of_config(config).name, tuple(results))
    print(report)
    if report.failed:
        raise AssertionError(str(report))
    return report


def _refuse_unknown_names(excused: Iterable[str], checks: Iterable[str], families: Sequence[Family]) -> None:
    """Raise a PeftcoreError if `checks` contains an unknown name, or an excuse names no check or family."""
    known_names = [*CHECKS, *(family.name for family in families)]
    for family in families:
        known_names += [f"{family.name}: {name}" for name in CHECKS]
    unknown = [name for name in excused if name not in known_names] + [name for name in checks if name not in CHECKS]
    if unknown:
        raise peftcore.PeftcoreError(
            f"'{unknown[0]}' is not a check{nearest(unknown[0], known_names)}. The checks are: {', '.join(CHECKS)}"
        )


def _check_family(case: Case, checks: Collection[str] | None, excuses: _Excuses) -> list[Result]:
    """Return the results of `apply` and of the checks: all checks on the first family, essential checks on others."""
    applies = _applies(case, excuses)
    if not applies.passed:
        return [applies]
    family_checks = [check for check in CHECKS.values() if checks is None or check.name in checks]
    if case.first is not None:
        family_checks = [check for check in family_checks if check.essential]
    return [applies, *(_run(check, case, excuses) for check in family_checks)]


class _Excuses:
    """Excuses, and a record of those that were needed."""

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

    def unneeded(self, results: Iterable[Result]) -> list[Result]:
        """Return a failure for each excuse that was not needed, unless its reason begins with "may"."""
        passed: set[str] = set()
        for result in results:
            if result.error is None:
                passed |= {result.name, result.family, f"{result.family}: {result.name}"}
        return [
            Result(name, error="the check is excused but passes without the excuse. Remove it from not_applicable")
            for name, reason in self.reasons.items()
            if name in passed - self.used and not reason.startswith("may ")
        ]


def _applies(case: Case, excuses: _Excuses) -> Result:
    family = case.family.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.add(case.unprepared(), None, "default")
    except peftcore.PluginError as fault:  # a bug in the plugin, not a refusal
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
        with warnings.catch_warnings():  # a check looks for this warning
            warnings.filterwarnings("ignore", ".* of the weights in layers; left out: ")
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
    frame = traceback.extract_tb(raised.__traceback__)[-1]
    return f"{type(error).__name__}: {error!s:.600} ({frame.name}, line {frame.lineno})"

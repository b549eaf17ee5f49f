"""The conformance suite a plugin author runs: `check_method(config)` tries what users do with every method."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import peftcore
from peftcore.registry import registry
from peftcore.testing.case import Case, disturb, tiny_llama
from peftcore.testing.checks import CHECKS

__all__ = ["CHECKS", "Report", "Result", "check_method", "disturb", "tiny_llama"]


@dataclass(frozen=True)
class Result:
    """One check: passed (`error` and `reason` are None), failed (`error`) or not applicable (`reason`)."""

    name: str
    error: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """What `check_method` found. Printing it gives one line a check."""

    method: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.error)

    def __str__(self) -> str:
        lines = [f"check_method: {self.method}"]
        for result in self.results:
            state = "FAILED" if result.error else "not applicable" if result.reason else "passed"
            detail = result.error or result.reason or ""
            lines.append(f"  {state:<14}  {result.name}" + (f": {detail}" if detail else ""))
        return "\n".join(lines)


def check_method(
    config: Any,
    *,
    make_model: Callable[[], nn.Module] = tiny_llama,
    not_applicable: Mapping[str, str] | None = None,
    compile_backend: str = "aot_eager",
) -> Report:
    """Run every check on `make_model()` with the method of `config`, and print the report.

    Args:
        config: of an installed method, with dropout off: the checks compare outputs.
        make_model: a transformers model, the same weights at each call; causal language models get all checks.
        not_applicable: {check: reason} of checks that this method cannot pass; the report prints the reason.
        compile_backend: of `torch.compile(fullgraph=True)`; "inductor" is the real thing and takes a minute.

    Raises:
        AssertionError: a check failed; the message is the report.
        PeftcoreError: `not_applicable` names no check.
    """
    excused = dict(not_applicable or {})
    for name in excused:
        if name not in CHECKS:
            raise peftcore.PeftcoreError(f"'{name}' is no check. The checks: {', '.join(CHECKS)}")
    case = Case(config, make_model, compile_backend)
    results = []
    for name, check in CHECKS.items():
        reason = excused.get(name)
        error = None
        if reason is None:
            try:
                reason = check(case)
            except Exception as found:
                where = traceback.extract_tb(found.__traceback__)[-1]
                error = f"{type(found).__name__}: {found} ({where.name}, line {where.lineno})"
        results.append(Result(name, error, reason))
    report = Report(registry.method_of_config(config).name, tuple(results))
    print(report)
    if report.failed:
        raise AssertionError(str(report))
    return report

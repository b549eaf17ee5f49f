"""A part of the census: no crash and no wrong result that the last whole run did not know."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from census import instances, report
from census.check import FIELDS
from census.worker import Worker
from support.whole_run import WHOLE

# Text with images, recurrence, experts; an encoder, a decoder, an encoder and decoder.
OF_EACH_KIND = ("CLIPModel", "MambaForCausalLM", "MixtralForCausalLM")
IN_CONFORMANCE = ("BertForSequenceClassification", "LlamaForCausalLM", "T5ForConditionalGeneration")
MORE = 64  # in `make test-all`


def _unknown(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    known = report.known()
    return {
        name: {method: why for method, why in methods.items() if method not in known.get(name, {})}
        for name, methods in report.failures(rows).items()
    }


def _examine(names: Sequence[str]) -> None:
    """Fail with what is unknown of these classes. Again, one by one: python -m census --only '^(…)$'"""
    worker = Worker(list(FIELDS), seconds=60)
    try:
        rows = [worker.examine(name) for name in names]
        suspects = [name for name, methods in _unknown(rows).items() if methods]
        again = [worker.examine(name) for name in suspects]  # a loaded machine may be late, not wrong
    finally:
        worker.close()
    assert not {name: methods for name, methods in _unknown(again).items() if methods}
    assert sum("none" not in row for row in rows) > len(names) / 2


def test_a_class_of_each_kind() -> None:
    """Families that every method's conformance tries run in `make test-all`."""
    names = (*OF_EACH_KIND, *(IN_CONFORMANCE if WHOLE else ()))
    assert set(names) <= set(report.reached())
    _examine(names)


@pytest.mark.nightly
def test_many_classes() -> None:
    there = instances.classes()  # of this transformers
    _examine(random.Random(0).sample([name for name in report.reached() if name in there], MORE))

"""The factor of `peftcore.scale` in a file's metadata."""

from __future__ import annotations

import pytest

import peftcore
from peftcore.files.metadata import MULTIPLIER
from peftcore.files.multiplier import read_multiplier


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "1e999", '"much"', "[]", "null"])
def test_a_factor_that_is_not_a_finite_number_is_refused(written: str) -> None:
    metadata = {MULTIPLIER: f'{{"multiplier": {written}, "fields": {{}}}}'}
    with pytest.raises(peftcore.CheckpointError, match=r"the adapter's factor \(.+\) (is|cannot be read)"):
        read_multiplier(metadata)


def test_a_factor_is_read() -> None:
    assert read_multiplier({MULTIPLIER: '{"multiplier": 0.5, "fields": {}}'}) == 0.5
    assert read_multiplier({}) == 1.0

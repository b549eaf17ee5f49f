"""What a plugin's distribution says of the peftcore that it needs, held against pip's own reading of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

from peftcore.requirement import unmet

RELEASES = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
COMPARISONS = st.builds(
    lambda operator, release: operator + (f"{release}.0" if operator == "~=" and "." not in release else release),
    st.sampled_from([">=", "<=", "==", "!=", "~=", ">", "<"]),
    RELEASES,
)


@given(st.lists(COMPARISONS, min_size=1, max_size=3), RELEASES)
def test_agrees_with_pip(comparisons: list[str], version: str) -> None:
    wanted = ",".join(comparisons)
    assert (unmet([f"peftcore{wanted}"], version) is None) == SpecifierSet(wanted).contains(version)


@pytest.mark.parametrize(
    ("requirement", "found"),
    [
        ("peftcore>=99", ">=99"),
        ("PeftCore (>=99,<100)", ">=99"),
        ("peftcore[train] >= 0.1, < 0.2", None),
        ("peftcore==0.1.*", None),
        ("peftcore==0.2.*", "==0.2.*"),
        ("peftcore>=99; extra == 'new'", None),
        ("peftcore>=99; python_version >= '3'", ">=99"),
        ("peftcore-lora>=99", None),
        ("peftcore", None),
        ("torch>=99", None),
    ],
)
def test_forms(requirement: str, found: str | None) -> None:
    assert unmet(["pluggy>=1", requirement], "0.1.0") == found

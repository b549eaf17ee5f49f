"""Requirements of plugins, as pip reads them."""

import pytest

from peftcore.plugin.checks import unmet


@pytest.mark.parametrize(
    ("requirement", "found"),
    [
        ("peftcore>=99", ">=99"),
        ("PeftCore (>=99,<100)", "<100,>=99"),
        ("peftcore[train] >= 0.1, < 0.2", None),
        ("peftcore==0.1.*", None),
        ("peftcore==0.2.*", "==0.2.*"),
        ("peftcore>=99; extra == 'new'", None),
        ("peftcore>=99; python_version >= '3'", ">=99"),
        ("peftcore>=99; python_version < '3'", None),
        ("peftcore===not a version", None),
        ("peftcore-lora>=99", None),
        ("peftcore", None),
        ("torch>=99", None),
    ],
)
def test_forms(requirement: str, found: str | None) -> None:
    assert unmet(["pluggy>=1", requirement], "0.1.0") == found


def test_a_pre_release_counts_as_its_release() -> None:
    assert unmet(["peftcore>=0.1"], "0.1.0.dev3+local") is None

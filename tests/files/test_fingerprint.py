"""What tells one base from another: names, shapes, values, the last rows, and what is no fingerprint at all."""

import pytest
import torch
from hypothesis import given, strategies as st

from peftcore import CheckpointError
from peftcore.files.fingerprint import difference, fingerprint


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (50, 8), "norm.weight": (8,), "head.weight": (3, 8), "head.bias": (3,), "scale": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_same_and_another() -> None:
    told = fingerprint(tensors())
    assert difference(tensors(), told) is None
    assert difference({name: t.bfloat16() for name, t in tensors().items()}, told) is None
    assert "the values of 'embed.weight' differ by 1" in difference(tensors(1), told)


@pytest.mark.parametrize("name", list(tensors()))
def test_any_one_tensor_that_differs_is_found(name: str) -> None:
    told, found = fingerprint(tensors()), tensors()
    found[name] = found[name] + 1
    assert difference(found, told).startswith(f"the values of '{name}' differ by")
    found[name] = torch.zeros(2, *found[name].shape)
    assert difference(found, told).startswith(f"'{name}' has shape [2")
    del found[name]
    assert difference(found, told) == f"it has no parameter '{name}'"


def test_rows_at_the_end_are_seen() -> None:
    """A vocabulary that was resized has the same first rows, and new ones behind."""
    told, found = fingerprint(tensors()), tensors()
    found["embed.weight"][-1] = torch.linspace(-1, 1, 8)
    assert "embed.weight" in difference(found, told)


def test_what_has_no_values_is_passed_over() -> None:
    packed = {**tensors(), "head.weight": torch.zeros(3, 4, dtype=torch.uint8)}
    assert difference(packed, fingerprint(tensors())) is None
    assert difference(tensors(), fingerprint(packed)) is None
    assert difference({n: t.to("meta") for n, t in tensors().items()}, fingerprint(tensors())) is None


def test_infinity_agrees_with_itself_and_nan_with_nothing() -> None:
    found = {"w": torch.tensor([float("inf"), 1.0])}
    assert difference(found, fingerprint(found)) is None
    found = {"w": torch.tensor([float("nan"), 1.0])}
    assert "the values of 'w' differ" in difference(found, fingerprint(found))


@pytest.mark.parametrize(
    "told",
    [
        *("", "[]", "3", "null", "{", '{"w": 1}', '{"w": [1, 2]}', '{"w": [[2], ["a"]]}'),
        *(
            '{"version": 2}',
            '{"version": "2", "tensors": {}}',
            '{"version": 2, "tensors": []}',
            '{"version": 3, "tensors": {}}',
            "[" * 100_000,
        ),
    ],
    ids=lambda text: text[:50],
)
def test_what_is_no_fingerprint_is_an_error(told: str) -> None:
    with pytest.raises(CheckpointError, match="fingerprint"):
        difference({"w": torch.ones(2)}, told)


@given(st.lists(st.integers(0, 7), max_size=3), st.integers(0, 2**31))
def test_any_shape(shape: list[int], seed: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert difference({"w": tensor}, fingerprint({"w": tensor})) is None

"""Files of strangers: limits of size, kind and depth; safetensors read as its own library reads them."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st

from peftcore import CheckpointError
from peftcore.plugin import safe_reading

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "c": torch.tensor(4),
    "d": torch.empty(0, 5),
    "e": torch.tensor([True, False, True]),
}
FILE = safetensors.torch.save(TENSORS, {"format": "pt"})


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


def test_tensors_and_metadata() -> None:
    found, metadata = safe_reading.parse_tensors(bytearray(FILE), Path("x"))
    assert same(found, TENSORS) and metadata == {"format": "pt"}


@settings(max_examples=300)
@given(st.data())
def test_bytes_that_were_changed(data: st.DataObject) -> None:
    """What safetensors reads is read so, or refused; what it refuses is refused."""
    changed = bytearray(FILE)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(changed) - 1))
        changed[where] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed))) :]
    try:
        wanted = safetensors.torch.load(bytes(changed))
    except Exception:
        wanted = None
    try:
        found, _ = safe_reading.parse_tensors(changed, Path("x"))
    except CheckpointError:
        return
    assert wanted is not None and found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and torch.equal(ours, theirs)


def file_of(header: dict | str, data: bytes = b"") -> bytearray:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(1,), place=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": entry(dtype="F3")}, b"0000", "'x' has dtype 'F3'"),
        ({"x": entry(dtype=["F32"])}, b"0000", r"'x' has dtype \['F32'\]"),
        ({"x": entry(shape=[1 << 62, 4])}, b"0000", "has shape"),
        ({"x": entry(shape=[-1])}, b"0000", "has shape"),
        ({"x": entry(shape=[1.0])}, b"0000", "has shape"),
        ({"x": entry(shape=[1] * 70)}, b"0000", "has shape"),
        (
            {"x": entry(shape=[1 << 30, 1 << 30])},
            b"0000",
            "'x' \\(4,611,686,018,427,387,904 bytes\\) is at bytes 0 to 4",
        ),
        ({"x": entry(place=[4, 8])}, b"00000000", "must start at byte 0"),
        ({"x": entry(), "y": entry(place=[2, 6])}, b"000000", "must start at byte 4"),
        ({"x": entry()}, b"00000", "would end at byte"),
        ({"x": entry()}, b"000", "would end at byte"),
        ({"x": 3}, b"", "'x' needs dtype, shape and data_offsets"),
        ({"x" * 2000: entry()}, b"0000", "has 2,000 characters"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must be a table of strings"),
        ({"__metadata__": [1]}, b"", "__metadata__ must be a table of strings"),
        ('{"x": ' * 100_000, b"", "its header cannot be read"),
        ('{"a": 1, "a": 2}', b"", "a name occurs twice"),
        ('{"\\ud800": 3}', b"", "surrogates not allowed"),
        (f'{{"x": {"9" * 5000}}}', b"", "its header cannot be read"),
        ("[]", b"", "its header would end at"),
    ],
)
def test_headers_are_not_trusted(header, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        safe_reading.parse_tensors(file_of(header, data), Path("x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "it is nested too deeply"),
        (b"9" * 5000, "cannot be read as JSON"),
        (b'{"r": NaN}', "it contains NaN, which is not a JSON number"),
        (b'{"r": -Infinity}', "it contains -Infinity"),
        (b"\xff", "cannot be read as JSON"),
        (b'{"r": "\\ud800"}', "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
    ],
)
def test_json_that_cannot_be_read(text: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        safe_reading.parse_json(text, "x")


def test_kinds_of_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"")
    os.truncate(tmp_path / "large", 1 << 40)
    for name, message in {
        "pipe": "is a pipe, not a regular file",
        "link": "is a pipe",
        "circle": "cannot be read",
        "zero": "is a device",
        "": "is a folder",
        "large": "has 1,099,511,627,776 bytes, more than the limit",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            safe_reading.read_bytes(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        safe_reading.read_bytes(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "to file").symlink_to("file")
    assert safe_reading.read_bytes(tmp_path / "to file") == b"abc"
    with pytest.raises(CheckpointError, match="has 3 bytes, more than the limit of 2"):
        safe_reading.read_bytes(tmp_path / "file", 2)


def test_a_header_of_very_many_names_is_refused_before_it_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    header = {f"layers.{i}.lora_A": entry(place=(4 * i, 4 * i + 4)) for i in range(50)}
    assert len(safe_reading.parse_tensors(file_of(header, bytes(200)), Path("x"))[0]) == 50
    monkeypatch.setattr(safe_reading, "_NAMES", 40)
    with pytest.raises(CheckpointError, match="'x' contains 50 tensors, more than the limit of 40"):
        safe_reading.parse_tensors(file_of(header, bytes(200)), Path("x"))
    escaped = json.dumps(header).replace("data_offsets", "data\\u005foffsets")
    with pytest.raises(CheckpointError, match="'x' contains 50 tensors, more than the limit of 40"):
        safe_reading.parse_tensors(file_of(escaped, bytes(200)), Path("x"))


def test_the_limit_of_names_holds_for_whole_files() -> None:
    text = b'{"x": {"data_offsets"' + b'"data_offsets"' * 250_000 + b"}"  # counted before it is read, as no JSON
    with pytest.raises(CheckpointError, match=r"contains 250,001 tensors, more than the limit of 200,000"):
        safe_reading.parse_tensors(bytearray(len(text).to_bytes(8, "little") + text), Path("x"))

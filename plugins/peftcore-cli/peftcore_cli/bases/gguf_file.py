"""Base models in .gguf files: read the header, and read tensors one at a time."""

from __future__ import annotations

import functools
import io
import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    import numpy
    import torch

# Architectures whose tensors transformers converts one at a time, by name. Models of other architectures are read
# whole.
ONE_BY_ONE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
_WITHOUT_PARAMETER = {"rope_freqs.weight", "output.weight"}  # of frequencies, and a head that a classifier replaces
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """Location and storage of a tensor in the file.

    Attributes:
        shape: shape in PyTorch's order.
        kind: number of the GGML type.
        start: offset of the first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors: `fields` contains numbers and strings, but no arrays."""

    fields: dict[str, Any]
    tensors: dict[str, Entry]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))


def header(path: str) -> Header:
    """Read the header of a file, skipping the vocabulary, for which the `gguf` package takes seconds.

    Raises:
        PeftcoreError: the file is not GGUF version 2 or 3, or is truncated.
    """
    try:
        with (
            open(path, "rb") as file,
            mmap(file.fileno(), 0, access=ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            return _Reader(view).header()
    except (ValueError, struct.error, UnicodeDecodeError, KeyError, IndexError, OverflowError) as error:
        raise PeftcoreError(f"cannot load the model of '{path}': {error}. Download it again") from error


class _Reader:
    """Sequential reader of a file's values."""

    def __init__(self, data: memoryview, place: int = 0) -> None:
        self.data, self.place = data, place

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.place)
        self.place += struct.calcsize(code)
        return value

    def text(self) -> str:
        length = self.number("Q")
        start = self.place
        self.place += length
        if self.place > len(self.data):
            raise ValueError("a string extends past the end of the file")
        return bytes(self.data[start : self.place]).decode()

    def value(self, kind: int) -> Any:
        """Return the next value, or None for an array."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            self.place += count * struct.calcsize(_SCALARS[element])
        elif element == _STRING:
            for _ in range(count):
                self.place += 8 + struct.unpack_from("<Q", self.data, self.place)[0]
        else:
            raise ValueError(f"an array has elements of type {element}")
        return None

    def header(self) -> Header:
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError("the file does not begin with GGUF")
        self.place = 4
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"the file has GGUF version {version}, but only versions 2 and 3 are supported")
        tensors, fields = self.number("Q"), {}
        for _ in range(self.number("Q")):
            name = self.text()
            fields[name] = self.value(self.number("I"))
        entries = {}
        for _ in range(tensors):
            name = self.text()
            shape = [self.number("Q") for _ in range(self.number("I"))]
            entries[name] = Entry(tuple(reversed(shape)), self.number("I"), self.number("Q"))
        alignment = fields.get("general.alignment", 32)
        data_offset = -(-self.place // alignment) * alignment
        return Header(fields, {name: Entry(e.shape, e.kind, data_offset + e.start) for name, e in entries.items()})


def check_blocks(path: str) -> None:
    """Raise a PeftcoreError if the file has tensors of fewer blocks than its header promises.

    transformers would build every block first, which takes minutes for a few hundred.
    """
    file_header = header(path)
    blocks = {block for name in file_header.tensors for block in re.findall(r"\bblk\.(\d+)\.", name)}
    count = next((value for key, value in file_header.fields.items() if key.endswith(".block_count")), 0)
    if count > len(blocks):
        raise PeftcoreError(
            f"cannot load the model of '{path}': the header promises {count} blocks, but the file has tensors of "
            f"{len(blocks)}. Download it again"
        )


def stored_dtype(path: str) -> str:
    """Return the dtype that fits the file's matrices: fp32, fp16, or bf16 (for bf16 and fewer bits).

    Raises:
        PeftcoreError: the file cannot be read.
    """
    kinds = Counter(entry.kind for entry in header(path).tensors.values() if len(entry.shape) > 1)
    main_kind = max(kinds, key=kinds.__getitem__, default=0)
    return {0: "fp32", 1: "fp16"}.get(main_kind, "bf16")


@contextmanager
def reading() -> Iterator[None]:
    """Patch transformers to read files without a progress bar, and headers without the vocabulary's strings.

    transformers reads the header for the config, and again for the tokenizer's class. Only the number of tokens is
    used, but `gguf.GGUFReader` creates two arrays for each of 100,000 tokens and merges, which takes seconds.
    """
    from unittest.mock import patch

    import gguf
    import numpy

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type != _ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            data = self.data.data  # the memoryview of an array
            array = _Reader(data, orig_offs)
            array.value(_ARRAY)
            element, count = struct.unpack_from("<IQ", data, orig_offs)
            kind = gguf.GGUFValueType(element)
            if element == _STRING:
                parts, places = [numpy.empty(0, numpy.uint8)], [0] * count
            else:
                values = self._get(orig_offs + 12, self.gguf_scalar_to_np[kind], count)
                parts, places = list(values.reshape(-1, 1)), list(range(count))
            return array.place - orig_offs, parts, places, [gguf.GGUFValueType.ARRAY, kind]

    # No setting of transformers disables the progress bar.
    with patch.object(gguf, "GGUFReader", Reader), redirect_stderr(io.StringIO()):
        yield


class LazyTensor:
    """A lazy tensor of the file, which is read and dequantized when transformers' loader indexes it with `[...]`."""

    def __init__(self, data: numpy.memmap[Any, Any], entry: Entry, read: Any, dtype: torch.dtype) -> None:
        self._data, self._entry, self._read, self._dtype = data, entry, read, dtype
        self.shape = entry.shape

    def __getitem__(self, _: Any) -> torch.Tensor:
        import torch
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        entry = self._entry
        kind = GGMLQuantizationType(entry.kind)
        values, size = GGML_QUANT_SIZES[kind]
        row = entry.shape[-1] // values * size
        count = prod(entry.shape[:-1]) * row
        encoded_rows = self._data[entry.start : entry.start + count].reshape(*entry.shape[:-1], row)
        return torch.tensor(self._read(dequantize(encoded_rows, kind)), dtype=self._dtype)


def load(folder: str, *, gguf_file: str, model_class: Any, config: Any, **options: Any) -> Any:
    """Return a model of one of the architectures `ONE_BY_ONE`, as `model_class.from_pretrained` does.

    Peak memory is the model (in 4 bits with a `quantization_config`) and a single dense tensor.
    """
    import numpy
    import torch
    from transformers import modeling_gguf_pytorch_utils as reading

    path = str(Path(folder, gguf_file))
    file_header, data = header(path), numpy.memmap(path, mode="r")
    processor = reading.TENSOR_PROCESSORS.get(file_header.architecture, reading.TensorProcessor)(
        config=config.to_dict()
    )
    with torch.device("meta"):
        empty = model_class._from_config(config)
    names = _names(empty, file_header.architecture)
    if file_header.tensors.keys() - names.keys() - _WITHOUT_PARAMETER:
        names = reading.get_gguf_hf_weights_map(empty, processor)  # takes seconds: a table of names for every module
    tensors = {}
    for name, entry in file_header.tensors.items():
        if name in names:
            convert = functools.partial(_convert, processor, name)
            tensors[names[name]] = LazyTensor(data, entry, convert, options["dtype"])
    return model_class.from_pretrained(None, config=config, state_dict=tensors, **options)


def _names(model: Any, architecture: str) -> dict[str, str]:
    """Return {name in the file: name of the model's parameter}, from llama.cpp's table."""
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    names = {}
    for parameter in model.state_dict():
        path, _, suffix = parameter.rpartition(".")
        name = table.get_name(path)
        if name is not None:
            names[f"{name}.{suffix}"] = parameter
    return names


def _convert(processor: Any, name: str, weights: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    return processor.process(weights=weights, name=name, tensor_key_mapping={}, parsed_parameters={}).weights

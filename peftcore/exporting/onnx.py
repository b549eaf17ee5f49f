"""Write a text model as ONNX with PyTorch's exporter. The graph includes active adapters, merged or not."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.adaptation.modes import evaluation_mode
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import original_forward
from peftcore.plugin.exporter import Exporter, NoOptions

INPUTS = ("input_ids", "attention_mask")
PROTOBUF_BYTES = 1_900_000_000  # a protobuf holds at most two gigabytes; larger weights go to a second file


def write(model: nn.Module, path: Path, _options: NoOptions) -> None:
    """Write a graph from `input_ids` and `attention_mask`, `[batch, length]` of any size, to logits.

    The graph of a model without a head returns the last hidden state. It has no cache: each call processes the complete
    text.

    Raises:
        PeftcoreError: the packages `onnx` and `onnxscript` are not installed, or the model cannot be exported.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise PeftcoreError(
            f"exporting to ONNX needs '{error.name}', which is not installed. Run: pip install peftcore[onnx]"
        ) from error
    _refuse(model)
    device = next(model.parameters()).device
    example = torch.ones(2, 8, dtype=torch.long, device=device)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    try:
        with _quiet(), torch.no_grad(), evaluation_mode(model), _placed(path) as new:
            torch.onnx.export(
                _Plain(model).eval(),
                (example, example.clone()),  # passing the same tensor twice would give the graph one input
                new,
                input_names=[*INPUTS],
                output_names=["logits" if _gives(model, "logits") else "last_hidden_state"],
                dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
                dynamo=True,
                external_data=size > PROTOBUF_BYTES,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many types of errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PeftcoreError(
            f"{type(model).__name__} cannot be exported to ONNX: {reason}. It may help to merge first: "
            "peftcore.merge(model)"
        ) from error


_QUIET = RLock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings, such as those about missing libraries, within the block; one thread at a time."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verbosity = logging.root.manager.disable
        try:
            logging.disable(logging.WARNING)
            yield
        finally:
            logging.disable(verbosity)


@contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """Yield a path with the same file name in a temporary folder, and move the files written there next to `path`.

    Existing files are replaced only when the new ones are complete.
    """
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / path.name
        for file in sorted(
            Path(folder).iterdir(), key=lambda file: file.name == path.name
        ):  # move the data file before the file that refers to it
            file.replace(path.parent / file.name)


ONNX = Exporter("onnx", "ONNX Runtime", write_model=write, model_file="model.onnx", with_adapters=True)


class _Plain(nn.Module):
    """Wrapper that takes two tensors and returns one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits, or the last hidden state."""
        cache: dict[str, Any] = {"use_cache": False} if hasattr(self.model, "generate") else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **cache)
        return output.logits if "logits" in output else output.last_hidden_state


def _gives(model: nn.Module, name: str) -> bool:
    with torch.no_grad():
        tokens = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        return name in model(input_ids=tokens, attention_mask=tokens, return_dict=True)


def _refuse(model: nn.Module) -> None:
    state = engine.state_of(model)
    if state is not None:
        engine.refuse_per_sample(state, "export")
    parameters = inspect.signature(original_forward(model)).parameters
    missing_inputs = [name for name in INPUTS if name not in parameters]
    if missing_inputs:
        raise PeftcoreError(
            f"{type(model).__name__} cannot be exported to ONNX, because it does not take {missing_inputs[0]}. Only "
            "text models are supported"
        )

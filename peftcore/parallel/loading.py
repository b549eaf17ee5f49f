"""A transformers model from a folder, sharded as it is read: no rank ever holds more than its shards and one weight."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore import ranks
from peftcore.adaptation.adapted import base_parameters
from peftcore.errors import CheckpointError, nearest
from peftcore.parallel.sharding import check_running, shard
from peftcore.quantization.convert import convert_dense
from peftcore.quantization.format import PARTS, from_tensors
from peftcore.quantization.linear import QuantizedLinear
from peftcore.quantization.noted import note_in_config
from peftcore.quantization.parameters import refuse_non_finite
from peftcore.quantization.selection import selected

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def load_sharded(
    path: str | os.PathLike[str],
    quant_type: str | None = None,
    *,
    mesh: DeviceMesh | None = None,
    mixed_precision: MixedPrecisionPolicy | None = None,
    offload: bool = False,
    reshard_after_forward: bool = True,
    double_quant: bool = True,
    skip: Sequence[str] | None = None,
    compute_dtype: torch.dtype | None = None,
    blocksize: int = 64,
    dtype: torch.dtype | None = None,
    model_class: Any = None,
) -> nn.Module:
    """Read a model onto the ranks of a distributed run, each its shards. Collective.

    The model is made on the meta device, sharded (`shard`), and filled tensor by tensor. Apply an adapter to it, then
    call `shard` once more, which gives the adapter to all ranks.

    Args:
        path: a local folder with safetensors in the model's own names, as `save_pretrained` writes it.
        quant_type: None keeps the weights as they are; `nf4` or `fp4` quantizes linear layers as they are read.
            Those that bitsandbytes' 4-bit format holds keep their bits either way.
        mesh, mixed_precision, offload, reshard_after_forward: as for `shard`.
        double_quant, skip, compute_dtype, blocksize: as for `quantize`.
        dtype: of what stays dense; None: the checkpoint's.
        model_class: by default the class that the checkpoint names.

    Raises:
        CheckpointError: a file or a tensor is missing, or does not fit.
    """
    import transformers
    from accelerate import init_empty_weights

    check_running()
    folder = Path(path)
    files = _files(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    named = (config.architectures or [None])[0]
    model_class = model_class or getattr(transformers, named or "", None) or transformers.AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = getattr(model_class, "_from_config", model_class)(config, dtype=dtype or config.dtype)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    model.config._name_or_path = os.fspath(path)
    _make_quantized(model, files, quant_type, skip, double_quant, blocksize, compute_dtype)
    shard(model, mesh, mixed_precision=mixed_precision, offload=offload, reshard_after_forward=reshard_after_forward)
    device = torch.device("cpu") if offload else _device(model)
    _materialize(model, device)
    _read(model, folder, files)
    note_in_config(model)
    return model.eval()


def _files(folder: Path) -> dict[str, str]:
    """The file of every tensor of a checkpoint."""
    if (folder / _INDEX).is_file():
        files = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        for file in sorted(set(files.values())):
            if not (folder / file).is_file():
                raise CheckpointError(f"'{folder}' is not whole: '{file}', which its index names, is missing")
        return files
    if not (folder / _SINGLE).is_file():
        raise CheckpointError(f"'{folder}' holds neither {_SINGLE} nor {_INDEX}: give a local folder with safetensors")
    from safetensors import safe_open

    with safe_open(folder / _SINGLE, framework="pt") as archive:
        return dict.fromkeys(archive.keys(), _SINGLE)


def _make_quantized(
    model: nn.Module,
    files: dict[str, str],
    quant_type: str | None,
    skip: Any,
    double_quant: bool,
    blocksize: int,
    compute_dtype: torch.dtype | None,
) -> None:
    """Turn the layers that are or become 4 bits into quantized ones, on the meta device."""
    packed = {name.removesuffix(".weight.absmax") for name in files if name.endswith(".weight.absmax")}
    chosen = set(selected(model, skip)) if quant_type is not None and not packed else set()
    for path in packed | chosen:
        convert_dense(model.get_submodule(path), quant_type or "nf4", double_quant, blocksize, compute_dtype)


def _device(model: nn.Module) -> torch.device:
    kind: str = next(p for p in model.parameters() if ranks.is_part(p)).device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Memory for every shard, in place of the meta device's."""
    from torch.distributed.tensor import DTensor

    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in made:
                assert ranks.is_part(p)  # all are sharded
                local = torch.empty_like(p.to_local(), device=device)
                whole = DTensor.from_local(
                    local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
                made[id(p)] = nn.Parameter(whole, requires_grad=False)
            module._parameters[name] = made[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _read(model: nn.Module, folder: Path, files: dict[str, str]) -> None:
    from safetensors import safe_open

    parameters = dict(base_parameters(model))
    left = {id(p): name for name, p in parameters.items()}
    buffers = dict(model.named_buffers())
    with ExitStack() as stack, torch.no_grad():
        archives = {
            file: stack.enter_context(safe_open(folder / file, framework="pt")) for file in sorted(set(files.values()))
        }
        for name, file in files.items():
            base, _, part = name.rpartition(".weight.")
            if base and part in PARTS:
                continue
            if name not in parameters:
                if name in buffers:
                    buffers[name].copy_(archives[file].get_tensor(name))
                    continue
                raise CheckpointError(
                    f"'{folder / file}' holds '{name}', for which {type(model).__name__} has no place"
                    f"{nearest(name, parameters)}"
                )
            module = model.get_submodule(name.rpartition(".")[0])
            parameter = parameters[name]
            if isinstance(module, QuantizedLinear) and name.endswith(".weight"):
                parts = {
                    p: archives[files[f"{name}.{p}"]].get_tensor(f"{name}.{p}") for p in PARTS if f"{name}.{p}" in files
                }
                _fill_quantized(module, archives[file].get_tensor(name), parts, name)
            else:
                assert ranks.is_part(parameter)
                _fill_dense(parameter, archives[file].get_slice(name), name)
            left.pop(id(parameter), None)
    if left:
        missing = sorted(left.values())
        raise CheckpointError(
            f"'{folder}' is not whole: {len(missing)} tensors are missing, such as '{missing[0]}'"
            f"{nearest(missing[0], files)}"
        )


def _fill_dense(parameter: DTensor, stored: Any, name: str) -> None:
    """This rank's rows, and no others, from the file."""
    if list(stored.get_shape()) != list(parameter.shape):
        raise CheckpointError(f"'{name}' has shape {stored.get_shape()}, the model needs {list(parameter.shape)}")
    begin, rows = _rows(parameter)
    if rows:
        parameter.to_local().copy_(stored[begin : begin + rows])


def _fill_quantized(module: QuantizedLinear, weight: Tensor, parts: dict[str, Tensor], name: str) -> None:
    if parts:
        packed = from_tensors(weight, parts, name)
    else:
        refuse_non_finite(weight, name)
        packed = module.quantized_parameter("weight", weight)
    parameter = module.weight
    assert ranks.is_part(parameter)
    if packed.codes.shape != parameter.shape or packed.shape != (module.out_features, module.in_features):
        raise CheckpointError(
            f"'{name}' has shape {list(packed.shape)}, this layer {[module.out_features, module.in_features]}"
        )
    module.set_packed_parameter("weight", packed.to(parameter.to_local().device)._replace(codes=parameter))
    begin, rows = _rows(parameter)
    parameter.to_local().copy_(packed.codes[begin : begin + rows])


def _rows(parameter: DTensor) -> tuple[int, int]:
    """(first, number) of the rows of a sharded parameter that this rank has."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], shape[0]

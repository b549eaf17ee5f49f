"""Load a transformers model in shards: a rank's memory never holds more than its shards and one full weight."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore.distributed.process_group import check_running
from peftcore.distributed.sharding import shard
from peftcore.errors import CheckpointError, nearest
from peftcore.model.base_modules import base_parameters
from peftcore.ops.weight import MIN_BLOCKSIZE
from peftcore.plugin import sharded
from peftcore.plugin.layers import is_linear
from peftcore.quantization.config_sync import sync_config
from peftcore.quantization.convert import convert_dense
from peftcore.quantization.formats import PARTS, FourBitSettings, check_quant_type, from_tensors
from peftcore.quantization.packed_experts import pack_experts
from peftcore.quantization.parameters import (
    PackedParameters,
    check_experts,
    parameter_shape,
    quantize_experts,
    refuse_non_finite,
)
from peftcore.quantization.quantizable import select_experts, select_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor

    from peftcore.distributed.checkpoint_files import CheckpointFiles

_PARTS = tuple(f".{part}" for part in PARTS)  # suffixes of the tensors stored beside a packed parameter


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
    """Load a model in shards onto the ranks of a distributed run. Collective.

    The model is created on the meta device, sharded by `shard`, and filled tensor by tensor. Apply an adapter to the
    model, then call `shard` again, which copies the adapter to all ranks.

    Args:
        path: a local folder with safetensors under the model's parameter names, as `save_pretrained` writes it; experts
            may be stored one by one.
        quant_type: None keeps the weights as they are stored. The name of a 4-bit format, such as `nf4`, quantizes the
            weights of linear layers and experts as they are read. Weights that are already stored in a 4-bit format
            keep their bits.
        mesh, mixed_precision, offload, reshard_after_forward: as in `shard`.
        double_quant, skip, compute_dtype, blocksize: as in `quantize`.
        dtype: dtype of dense tensors; None keeps the checkpoint's dtype.
        model_class: class of the model; by default the class named in the checkpoint's config.

    Raises:
        CheckpointError: a file or a tensor is missing, or does not fit.

    Examples:
        >>> model = peftcore.load_sharded("llama-8b", "nf4")
        >>> peftcore.apply(model, "lora", r=16)
        >>> peftcore.shard(model)    # copies the adapter to all ranks
    """
    import transformers
    from accelerate import init_empty_weights

    from peftcore.distributed.checkpoint_files import CheckpointFiles

    settings = FourBitSettings(quant_type or "nf4", double_quant, blocksize, compute_dtype)
    if quant_type is not None:
        check_quant_type(quant_type)
        settings = settings.resolved()
    check_running()
    folder = Path(path)
    tensors = CheckpointFiles(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    architecture = (config.architectures or [None])[0]
    model_class = model_class or getattr(transformers, architecture or "", None) or transformers.AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = getattr(model_class, "_from_config", model_class)(config, dtype=dtype or config.dtype)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    model.config._name_or_path = os.fspath(path)
    tensors.rename(model)
    _make_quantized(model, tensors, settings, skip, quantizes=quant_type is not None)
    shard(model, mesh, mixed_precision=mixed_precision, offload=offload, reshard_after_forward=reshard_after_forward)
    device = torch.device("cpu") if offload else _device(model)
    _materialize(model, device)
    _read(model, tensors)
    sync_config(model)
    return model.eval()


def _make_quantized(
    model: nn.Module,
    tensors: CheckpointFiles,
    settings: FourBitSettings,
    skip: Sequence[str] | None,
    *,
    quantizes: bool,
) -> None:
    """Replace the layers with 4-bit weights, stored or requested, by quantized layers on the meta device.

    Args:
        quantizes: quantize dense weights, unless the checkpoint already has 4-bit weights.
    """
    packed = [name.partition(".quant_state.")[0] for name in tensors.keys if ".quant_state." in name]
    layers: set[str] = set()
    experts: dict[str, dict[str, int]] = {}
    if quantizes and not packed:
        layers.update(select_layers(model, skip))
        experts = select_experts(model, skip, settings.blocksize)
    for name in packed:
        path, _, attribute = name.rpartition(".")
        if attribute == "weight" and is_linear(model.get_submodule(path)):
            layers.add(path)
        else:  # use the file's block size
            experts.setdefault(path, {})[attribute] = MIN_BLOCKSIZE
    for path in layers:
        convert_dense(model.get_submodule(path), settings)
    for path, blocksizes in experts.items():
        pack_experts(model.get_submodule(path), blocksizes, settings)


def _device(model: nn.Module) -> torch.device:
    kind: str = next(p for p in model.parameters() if sharded.is_dtensor(p)).device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Allocate memory for every shard on the meta device."""
    from torch.distributed.tensor import DTensor

    materialized: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in materialized:
                assert sharded.is_dtensor(p)  # all are sharded
                local = torch.empty_like(p.to_local(), device=device)
                full_tensor = DTensor.from_local(
                    local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
                materialized[id(p)] = nn.Parameter(full_tensor, requires_grad=False)
            module._parameters[name] = materialized[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _read(model: nn.Module, tensors: CheckpointFiles) -> None:
    parameters = dict(base_parameters(model))
    remaining = {id(p): name for name, p in parameters.items()}
    buffers = dict(model.named_buffers())
    with closing(tensors), torch.no_grad():
        for name in [*tensors.keys, *tensors.experts]:
            if name.endswith(_PARTS):
                continue
            if name not in parameters:
                key = tensors.keys[name]
                if name in buffers:
                    buffers[name].copy_(tensors.stored(key)[...])
                    continue
                raise CheckpointError(
                    f"'{tensors.folder / tensors.files[key]}' contains '{name}', which {type(model).__name__} does "
                    f"not have{nearest(name, parameters)}. Check that the weights and config.json belong together, "
                    "or pass model_class="
                )
            parameter, (path, _, attribute) = parameters[name], name.rpartition(".")
            module: Any = model.get_submodule(path)
            assert sharded.is_dtensor(parameter)
            if attribute in getattr(module, "packings", ()):
                _fill_quantized(model, module, attribute, tensors, name)
            elif name in tensors.experts:
                begin, rows = _rows(parameter)
                _check_shape(name, tensors.experts[name][1], parameter.shape)
                for i, expert in enumerate(tensors.by_expert(model, name, begin, begin + rows)):
                    parameter.to_local()[i].copy_(expert)
            else:
                _fill_dense(parameter, tensors.stored(tensors.keys[name]), name)
            remaining.pop(id(parameter), None)
    if remaining:
        missing_names = sorted(remaining.values())
        raise CheckpointError(
            f"'{tensors.folder}' is incomplete: {len(missing_names)} tensors are missing, such as '{missing_names[0]}'"
            f"{nearest(missing_names[0], tensors.files)}"
        )


def _fill_dense(parameter: DTensor, tensor: Any, name: str) -> None:
    """Read only this rank's rows from the file."""
    if list(tensor.get_shape()) != list(parameter.shape):
        raise CheckpointError(
            f"'{name}' has shape {tensor.get_shape()} in the checkpoint, but {list(parameter.shape)} in the model. "
            "Check that the weights and config.json belong together"
        )
    begin, rows = _rows(parameter)
    if rows:
        parameter.to_local().copy_(tensor[begin : begin + rows])


def _fill_quantized(
    model: nn.Module, module: PackedParameters, attribute: str, tensors: CheckpointFiles, name: str
) -> None:
    packing, parameter = module.packings[attribute], module.get_parameter(attribute)
    if name in tensors.experts:
        _check_shape(name, tensors.experts[name][1], packing.shape)
        experts = (_finite(expert, name) for expert in tensors.by_expert(model, name, 0, packing.shape[0]))
        packed = quantize_experts(experts, packing.shape, module.settings_of(attribute), packing.turned)
    else:
        weight, parts = tensors.stored(tensors.keys[name])[...], tensors.parts(name)
        packed = (
            from_tensors(weight, parts, name) if parts else module.quantized_parameter(attribute, _finite(weight, name))
        )
        check_experts(packed, name)
    assert sharded.is_dtensor(parameter)
    if packed.codes.shape != parameter.shape or parameter_shape(packed) != packing.shape:
        raise CheckpointError(
            f"'{name}' has shape {list(parameter_shape(packed))} in the checkpoint, but {list(packing.shape)} in the "
            "model. Check that the weights and config.json belong together"
        )
    module.set_packed_parameter(attribute, packed.to(parameter.to_local().device)._replace(codes=parameter))
    begin, rows = _rows(parameter)
    parameter.to_local().copy_(packed.codes[begin : begin + rows])


def _finite(weight: Tensor, name: str) -> Tensor:
    refuse_non_finite(weight, name)
    return weight


def _check_shape(name: str, lists: dict[str, list[str]], shape: Sequence[int]) -> None:
    """Raise a CheckpointError unless the files have the tensors of every expert."""
    counts = {len(keys) for keys in lists.values()}
    if counts != {shape[0]}:
        raise CheckpointError(
            f"the checkpoint has {sorted(counts)} experts for '{name}', but the model has {shape[0]}. Check that the "
            "weights and config.json belong together"
        )


def _rows(parameter: DTensor) -> tuple[int, int]:
    """Return (first, number) of this rank's rows of a sharded parameter."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], shape[0]

"""`Method`, which turns a config into placements, and the formats of its adapters on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from peftcore.plugin.peft_keys import tensor_name

if TYPE_CHECKING:
    from peftcore.plugin.architecture import Architecture
    from peftcore.plugin.placements.placement import Placement


Model = TypeVar("Model", bound=nn.Module)  # type variable: functions return the type of model that they get


class AdapterModules(dict[str, nn.Module]):
    """The modules of one adapter, by `Placement.key`: the path of the adapted module or parameter.

    Modules without a key, such as prompts, have the key "", or, if that is taken, "#1", "#2" in order of placement.

    Attributes:
        trained: the base parameters that the adapter trains, by their names in the model: parameters of `Train`
            placements and of `modules_to_save`. They are copies, which `remove` replaces with the originals.
    """

    def __init__(self, modules: Mapping[str, nn.Module], trained: dict[str, nn.Parameter]) -> None:
        super().__init__(modules)
        self.trained = trained


Tensors = Mapping[str, Tensor]  # by name on disk
Fields = Mapping[str, Any]  # fields of an `adapter_config.json`


@dataclass(frozen=True)
class ForeignFormat:
    """Format of another library's adapter folders, which a method can read but never writes.

    Args:
        name: name for error messages, such as `the library adapters`.
        tensors: name of the library's safetensors file.
        matches: (fields of the library's config, an `adapter_config.json` without `peft_type`) -> whether the config is
            in this format.
        read: (model, fields, tensors) -> (config, tensors under peftcore's names on disk). It raises a PeftcoreError
            for anything that the method cannot compute.
        about: (fields) -> equivalent fields of PEFT's `adapter_config.json`: base_model_name_or_path, and the method's
            main fields.
        config: name of the config file.
    """

    name: str
    tensors: str
    matches: Callable[[dict[str, Any]], bool]
    read: Callable[[nn.Module, dict[str, Any], dict[str, Tensor]], tuple[Any, dict[str, Tensor]]]
    about: Callable[[dict[str, Any]], dict[str, Any]] = lambda _fields: {}
    config: str = "adapter_config.json"


@dataclass(frozen=True)
class FileLayout:
    """Layout of a method's files, other than PEFT's, in which other programs store the same adapter.

    Both functions take (model, tensors on disk, fields on disk) and return (tensors, fields).

    Args:
        name: name of the layout, for `save(..., format=...)`; `load` tries every layout.
        read: convert the content of a file in this layout to PEFT's layout, and return any other content unchanged.
        write: the reverse. It raises a PeftcoreError for content that the layout does not support.
    """

    name: str
    read: Callable[[nn.Module, dict[str, Tensor], Mapping[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]
    write: Callable[[nn.Module, dict[str, Tensor], Mapping[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]


@dataclass(frozen=True)
class FileFormat:
    """Single file without a config, for one model or several models, such as those of a pipeline.

    Tensors and fields have PEFT's layout, and the fields name the method.

    Args:
        name: name of the format, for `save(..., format=...)`; `load` recognizes it by the tensors' names.
        file: name of the file in a folder, which ends in ".safetensors".
        matches: (names of a file's tensors) -> whether it is in this format.
        parts: (model, the user's name for the model, or None) -> the names that the model's part may have in a file. It
            raises a PeftcoreError if the format does not support the model or the name.
        split: (a file's tensors) -> {part: its tensors}, or {"": all tensors} for a file without parts.
        read: (model, part, its tensors, the file's metadata) -> (tensors, fields).
        write: ({part: (model, tensors, fields)}) -> (tensors, metadata). It raises a PeftcoreError for content that the
            format does not support.
    """

    name: str
    file: str
    matches: Callable[[Collection[str]], bool]
    parts: Callable[[nn.Module, str | None], Sequence[str]]
    split: Callable[[Mapping[str, Tensor]], Mapping[str, dict[str, Tensor]]]
    read: Callable[[nn.Module, str, dict[str, Tensor], Mapping[str, str]], tuple[dict[str, Tensor], dict[str, Any]]]
    write: Callable[
        [Mapping[str, tuple[nn.Module, dict[str, Tensor], dict[str, Any]]]], tuple[dict[str, Tensor], dict[str, str]]
    ]


@dataclass(frozen=True)
class PeftRules:
    """Relation between a method's files and Hugging Face PEFT's.

    Args:
        flag: field on disk, such as `use_dora`, that distinguishes files of this method from others of its peft_type.
            Files in which it is set are read by this method, all others by the method without a flag. A file that was
            saved by peftcore names its method.
        own_fields: names of config fields that PEFT does not have and that files must store. They are stored in the
            tensors' metadata, because PEFT would warn about them in `adapter_config.json`, and only if they differ from
            the default, which must therefore never change. If the method is not installed, such a file is refused.
        older_types: peft_types of the same files in older versions of PEFT, which are also read.
        unreadable: (model, paths of adapted modules) -> the paths whose adapters PEFT would misread or reject. `save`
            warns about them.
        refused: (model, tensors on disk, fields on disk) -> why the method cannot reproduce an adapter from a file that
            peftcore did not write, or None.
        scaled: (config, factor) -> config of an adapter with the same tensors and `factor` times the change. It is
            written for adapters that were scaled by `peftcore.scale`, and needed for adapters with a `multiplier`.
    """

    flag: str | None = None
    own_fields: frozenset[str] = frozenset()
    older_types: frozenset[str] = frozenset()
    unreadable: Callable[[nn.Module, Sequence[str]], Sequence[str]] = lambda _model, _paths: ()
    refused: Callable[[nn.Module, Tensors, Fields], str | None] = lambda *_: None
    scaled: Callable[[Any, float], Any] | None = None


def _unchanged(model: nn.Module | None, tensors: Tensors, fields: Fields) -> tuple[Tensors, Fields]:
    return tensors, fields


@dataclass(frozen=True)
class StateRules:
    """Format of a method's adapters on disk.

    Args:
        peft_type: the key by which `load` recognizes the method's files; PEFT's key if PEFT has the method.
        tensor_name: (placement, name of the tensor in its adapter) -> name on disk. Names must be distinct. For `Train`
            it is the parameter's name, or `P.base_layer.bias` if the same adapter is around P. A tensor that several
            adapters share is written once, under its name in the first adapter.
        read: (model, tensors on disk, fields on disk) -> (tensors under current names, fields of the config). It also
            upgrades files of older versions. If only the config is needed, model is None and there are no tensors.
        write: (model, tensors under current names, full and on the CPU, fields of the config) -> (tensors on disk,
            fields on disk); the inverse of `read`. If only the config is needed, model is None and there are no
            tensors.
        formats: other supported formats: folders of other libraries, layouts, single files.
        export: (placement) -> tensors by name on disk that suffice for other libraries to compute the same, if the
            adapter has additional tensors (a reparameterization). They are written in addition to the adapter's
            tensors, or instead of them with `save(..., resumable=False)`. If they are a subset of the adapter's
            tensors, a file may lack the rest, which then keep their initial values (the state of a schedule).
        peft: how the files relate to PEFT's files.
    """

    peft_type: str
    tensor_name: Callable[[Placement, str], str] = tensor_name
    read: Callable[[nn.Module | None, dict[str, Tensor], dict[str, Any]], tuple[Tensors, Fields]] = _unchanged
    write: Callable[[nn.Module | None, dict[str, Tensor], dict[str, Any]], tuple[Tensors, Fields]] = _unchanged
    formats: Sequence[ForeignFormat | FileLayout | FileFormat] = ()
    export: Callable[[Any], Tensors] | None = None
    peft: PeftRules = PeftRules()

    @property
    def layouts(self) -> dict[str, FileLayout]:
        """Layouts among `formats`, by name."""
        return {layout.name: layout for layout in self.formats if isinstance(layout, FileLayout)}

    @property
    def files(self) -> dict[str, FileFormat]:
        """Formats of single files among `formats`, by name."""
        return {file_format.name: file_format for file_format in self.formats if isinstance(file_format, FileFormat)}

    @property
    def foreign(self) -> list[ForeignFormat]:
        """Formats of other libraries among `formats`."""
        return [foreign_format for foreign_format in self.formats if isinstance(foreign_format, ForeignFormat)]

    def read_fields(self, fields: Fields) -> dict[str, Any]:
        """Convert fields on disk to fields of the config."""
        return dict(self.read(None, {}, dict(fields))[1])

    def write_fields(self, fields: Fields) -> dict[str, Any]:
        """Convert fields of the config to fields on disk."""
        return dict(self.write(None, {}, dict(fields))[1])


@dataclass(frozen=True)
class Method:
    """Fine-tuning method.

    Args:
        name: name for `apply(model, name)`, which must be the name of the entry point.
        config_class: a frozen dataclass. If PEFT has the method, fields have PEFT's names. It may have `resolved(model,
            architecture) -> config`, which replaces defaults that depend on the model with explicit values. The core
            handles a field `modules_to_save`: these modules are fully trained, and None means the heads that were not
            pre-trained (a classifier).
        place: (model, config, architecture) -> placements. It builds adapters and must not change the model. Under
            `torch.device("meta")` it must not allocate memory.
        state: format of adapters on disk.
        initialize: (model, adapters, config, batches) -> None, or a new config if the data determines sizes. It sets
            initial values from the base's weights or from data, after the adapters are attached and before they are
            active. `batches` is the argument of `apply`, or None, in which case a method that needs batches must raise
            an error. It may call the model, preferably with `run`, `inputs_of` and `gradients_of`. The model is then in
            evaluation mode, with the previously active adapters, and without gradients unless `initialize` enables
            them. It must only change its own adapters. Mode, gradients, moving buffers, random states and the problem
            type in the model's config are restored afterwards, and if it raises, the adapter is removed. `load` does
            not call it.
        initializes: (config) -> whether `initialize` does anything for this config. Otherwise it is not called, and
            `batches` are refused.
        loss: (adapters, config) -> a scalar with gradients that is added to the loss, or None. Trainers add it once per
            step. With gradient accumulation over n batches, they add 1/n of its value after each batch's forward pass.
        after_step: (adapters, config, step, total_steps) -> None, or a new config that differs in `trained_fields`.
            Called after each optimizer step, counted from 1, before gradients are cleared; for methods with a schedule
            or an importance. `reset_optimizer_state` resets the optimizer's state. Not called after a step that a
            scaler skipped because of non-finite gradients.
        trained_fields: config fields that `after_step` changes, for methods whose buffers change shape in training.
            Files store their values, and resuming restores them and the buffers' shapes.
        schedule: (config, step, total_steps) -> factor of the learning rate of a step, counted from 1, by which
            `Trainer` multiplies its own schedule.
        needs_after_step: (config) -> whether `after_step` does anything for this config. If it does and the training
            loop never calls it, the second optimizer step issues a warning.
        parameter_groups: (adapters, config, lr, weight_decay) -> parameter groups for `torch.optim`. Adapter parameters
            outside these groups get `lr` and `weight_decay`.
        prepare: (model, config) -> None. Changes the base; only called by `apply`, after the placements are checked. It
            may change how weights are stored, but not the paths of modules. `remove` does not undo it.
        recorded_as: (config) -> config of another method, for a method that only prepares the base. The adapter then
            belongs to the other method in every respect, including on disk, and `state` is not used.
        low_rank: (model, config or None, {path: rank}) -> config like `config`, but with adapters at exactly these
            modules, each with `LowRank` changes of the given rank. For `combine` and `convert`.
        learning_rate: default learning rate of `train`, for AdamW.
    """

    name: str
    config_class: type
    place: Callable[[nn.Module, Any, Architecture], Sequence[Placement]]
    state: StateRules
    initialize: Callable[[nn.Module, AdapterModules, Any, Iterable[Any] | None], Any] | None = None
    loss: Callable[[AdapterModules, Any], Tensor | None] | None = None
    after_step: Callable[[AdapterModules, Any, int, int], Any] | None = None
    parameter_groups: Callable[[AdapterModules, Any, float, float], list[dict[str, Any]]] | None = None
    initializes: Callable[[Any], bool] = lambda _config: True
    needs_after_step: Callable[[Any], bool] = lambda _config: True
    prepare: Callable[[nn.Module, Any], None] | None = None
    recorded_as: Callable[[Any], Any] | None = None
    low_rank: Callable[[nn.Module, Any, Mapping[str, int]], Any] | None = None
    learning_rate: float = 2e-4
    trained_fields: Sequence[str] = ()
    schedule: Callable[[Any, int, int], float] | None = None


@dataclass(frozen=True)
class WeightFormat:
    """Conversion between the stored weights of a kind of module and dense tensors.

    Args:
        name: unique name, such as `dense`.
        matches: (module) -> whether this format reads the module. The first matching format is used. Plugins' formats
            are tried before the core's.
        read: (module) -> dense weight, in the layout of the layer's functional form (`[out, in]` for a linear layer).
        write: (module, dense weight) -> the new stored tensors by parameter or buffer name, in their final dtype. The
            core assigns them and keeps the tensors that they replace.
        read_bias: (module) -> the module's bias, one number per output, or None.
        write_bias: (module, bias) -> the new stored tensors, like `write`.
        decode: (module, the result of `write`) -> the dense weight that the result represents, fp32. For formats that
            round coarsely: merging then measures the error, and `merge(dtype=...)` stores a dense `weight`, which the
            module must support.
        plain: (module) -> None, together with `decode`: permanently convert a module that has a dense weight to an
            ordinary module.
        update_config: (model) -> None, together with `decode`: update the model's config to match the stored weights,
            after merging or unmerging.
        quantize: (layer), together with `decode` and `plain`: convert a dense `nn.Linear` to this format in place. The
            format's name then becomes a `quant_type` for `peftcore.quantize`, `peftcore.quantization.load` and
            `--quantize`.
        for_parameter: (name) -> this format for a parameter that is not named `weight`, such as an experts' parameter,
            to which `matches`, `read`, `write` and `decode` then refer. None if the format only stores `weight`.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    read: Callable[[Any], Tensor]  # this and the functions below are called for matching modules
    write: Callable[[Any, Tensor], dict[str, Tensor]] = field(repr=False)
    read_bias: Callable[[Any], Tensor | None] = lambda module: module._parameters.get("bias")
    write_bias: Callable[[Any, Tensor], dict[str, Tensor]] = lambda module, bias: {"bias": bias.to(module.bias.dtype)}
    decode: Callable[[Any, dict[str, Tensor]], Tensor] | None = None
    plain: Callable[[Any], None] | None = None
    update_config: Callable[[nn.Module], None] | None = None
    quantize: Callable[[Any], object] | None = None
    for_parameter: Callable[[str], WeightFormat] | None = None

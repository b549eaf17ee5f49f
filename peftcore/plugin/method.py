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


Model = TypeVar("Model", bound=nn.Module)  # functions return the type of model that they were given


class AdapterModules(dict[str, nn.Module]):
    """The modules of one adapter, by `Placement.key`: the path of the adapted module or parameter.

    Modules without a key, such as prompts, have "", or, if that is taken, "#1", "#2" in order of placement.

    Attributes:
        trained: the base parameters that the adapter trains, by name in the model: those of `Train` placements and of
            `modules_to_save`. They are the adapter's own copies, which `remove` exchanges for the original ones.
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
        name: name for messages, such as `the library adapters`.
        tensors: name of the library's safetensors file.
        matches: (fields of the library's config, an `adapter_config.json` without `peft_type`) -> whether it is this
            format.
        read: (model, fields, tensors) -> (config, tensors under peftcore's names on disk). It raises a PeftcoreError
            for anything that the method cannot compute.
        about: (fields) -> the fields that PEFT's `adapter_config.json` would have: base_model_name_or_path, and fields
            of the method that are worth showing.
        config: name of the config's file.
    """

    name: str
    tensors: str
    matches: Callable[[dict[str, Any]], bool]
    read: Callable[[nn.Module, dict[str, Any], dict[str, Tensor]], tuple[Any, dict[str, Tensor]]]
    about: Callable[[dict[str, Any]], dict[str, Any]] = lambda _fields: {}
    config: str = "adapter_config.json"


@dataclass(frozen=True)
class FileLayout:
    """Layout of a method's files, other than PEFT's, in which other programs read or write the same adapter.

    Both functions take (model, tensors on disk, fields on disk) and return (tensors, fields).

    Args:
        name: name of the layout, for `save(..., format=...)`; `load` tries every layout.
        read: return the content of a file with this layout as PEFT writes it, and of any other file unchanged.
        write: the reverse. It raises a PeftcoreError for content that the layout does not support.
    """

    name: str
    read: Callable[[nn.Module, dict[str, Tensor], Mapping[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]
    write: Callable[[nn.Module, dict[str, Tensor], Mapping[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]


@dataclass(frozen=True)
class FileFormat:
    """Single file without a config, for one model or for several, such as the models of a pipeline.

    Tensors and fields have PEFT's layout; the fields name the method.

    Args:
        name: name of the format, for `save(..., format=...)`; `load` recognises it by the tensors' names.
        file: name of the file in a folder, which ends in ".safetensors".
        matches: (names of a file's tensors) -> whether it is in this format.
        parts: (model, the user's name for it, or None) -> the names that its part may have in a file. It raises a
            PeftcoreError if the format does not support the model, or one with this name.
        split: (a file's tensors) -> {part: its tensors}; {"": all} for a file that names no parts.
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
        flag: field on disk, such as `use_dora`, that marks the files of this method among those of its peft_type. A
            file with this field is read by this method, others by the method without a flag. A file that was
            saved by peftcore names its method.
        own_fields: names of config fields that PEFT does not know and that the file must keep. They are stored with the
            tensors, not in `adapter_config.json`, where PEFT would warn about them, and only if they differ from the
            default, which must therefore never change. Without this method such a file is refused.
        older_types: peft_types under which older versions of PEFT wrote such files, which are also read.
        unreadable: (model, paths of adapted modules) -> the paths whose adapters PEFT would misread or refuse;
            `save` warns about them.
        refused: (model, tensors on disk, fields on disk) -> why the method cannot compute what the file's writer did,
            for files that peftcore did not write, or None.
        scaled: (config, factor) -> config of an adapter with the same tensors and `factor` times the change, which
            is written for an adapter scaled by `peftcore.scale`. For adapters with a `multiplier`.
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
        peft_type: the key by which `load` recognises a method's files, PEFT's if PEFT has the method.
        tensor_name: (placement, name of the tensor in its adapter) -> name on disk. Names must be distinct. For `Train`
            the name is the parameter's; `P.base_layer.bias` if the same adapter is around P. A tensor of a module
            that several adapters share is written once, under its name in the first adapter.
        read: (model, tensors on disk, fields on disk) -> (tensors under current names, fields of the config). Files of
            older versions are upgraded here. If only the config is needed, model is None and there are no tensors.
        write: (model, tensors under current names, full and on the CPU, fields of the config) -> (tensors on disk,
            fields on disk), which `read` reverses. If only the config is needed, model is None and there are no
            tensors.
        formats: other formats of the files: folders of other libraries that the method reads, layouts, single files.
        export: (placement) -> tensors by name on disk from which other libraries compute the same, if the adapter's own
            tensors contain more (a reparameterisation). They are written next to the adapter's, or instead of them with
            `save(..., resumable=False)`. If they are a subset of the adapter's, a file may lack the others,
            which then have their initial values (the state of a schedule).
        peft: relation to PEFT's files.
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
        """Return the config's fields for fields on disk."""
        return dict(self.read(None, {}, dict(fields))[1])

    def write_fields(self, fields: Fields) -> dict[str, Any]:
        """Return the fields on disk for the config's fields."""
        return dict(self.write(None, {}, dict(fields))[1])


@dataclass(frozen=True)
class Method:
    """Fine-tuning method.

    Args:
        name: name for `apply(model, name)`; equals the name of the entry point.
        config_class: a frozen dataclass. If PEFT has the method, fields have PEFT's names. It may have
            `resolved(model, architecture) -> config`, which makes explicit what depends on the model. A field
            `modules_to_save` is handled by the core: these modules are trained in full, and None means the heads
            that pre-training did not train (a classifier's).
        place: (model, config, architecture) -> placements. It builds adapters and changes nothing. Under
            `torch.device("meta")` it must not allocate memory.
        state: format of adapters on disk.
        initialize: (model, adapters, config, batches) -> None, or a new config if data has decided sizes. It sets
            initial values from the base's weights or from data, after the adapters are attached and before they are
            active. `batches` is the argument of `apply`, or None; a method that needs them raises an error then. It may
            call the model, preferably with `run`, `inputs_of` and `gradients_of`: in evaluation mode, without gradients
            unless it enables them, with the adapters that are already active. It changes only its adapters. Mode,
            gradients, moving buffers, random states and the problem type in the model's config are restored afterwards,
            and if it raises, the adapter is removed. `load` does not call it.
        initializes: (config) -> whether `initialize` does anything for this config. If not, it is not called, and
            `batches` are refused.
        loss: (adapters, config) -> a scalar with gradients that is added to the loss, or None. Trainers add it once per
            step, also with gradient accumulation: for each of n batches 1/n of its value after the batch's forward
            pass.
        after_step: (adapters, config, step, total_steps) -> None, or a new config in which `trained_fields` differ.
            Called after each optimizer step, counted from 1, before gradients are cleared; for methods with a schedule
            or an importance. `reset_optimizer_state` resets what the optimizer keeps. Not called after a
            step that a scaler skipped because of non-finite gradients.
        trained_fields: fields of the config that `after_step` changes, in a method whose buffers change shape in
            training. A file has their values, and resuming takes them over with buffers of the file's shapes.
        schedule: (config, step, total_steps) -> factor of the learning rate of a step, counted from 1, by which
            `Trainer` multiplies its own schedule.
        needs_after_step: (config) -> whether `after_step` does anything for this config. If so, a training loop that
            does not call it causes a warning at the second optimizer step.
        parameter_groups: (adapters, config, lr, weight_decay) -> groups as `torch.optim` takes them. Parameters of the
            adapters in no group get `lr` and `weight_decay`.
        prepare: (model, config) -> None. Changes of the base that only `apply` makes, after the placements are checked.
            It may change how weights are stored, but no module's path. `remove` does not undo it.
        recorded_as: (config) -> config of another method, for a method that only prepares the base. The adapter is then
            the other method's in every respect, on disk too, and `state` is not used.
        low_rank: (model, config or None, {path: rank}) -> config of adapters at exactly these modules, each with
            `LowRank` changes of this rank, otherwise like `config`. For `combine` and `convert`.
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
    """Conversion between the stored weight of a kind of module and a dense tensor.

    Args:
        name: name for messages, such as `dense`; no other format has it.
        matches: (module) -> whether this format reads the module. The first that matches is used, plugins' formats
            before the core's.
        read: (module) -> dense weight, in the layout of the layer's functional form (`[out, in]` for a linear layer).
        write: (module, dense weight) -> the new stored tensors by parameter or buffer name, in their final dtype. The
            core assigns them and keeps the ones they replace.
        read_bias: (module) -> its bias, one number per output, or None.
        write_bias: (module, bias) -> the new stored tensors, like `write`.
        decode: (module, the result of `write`) -> the dense weight that the result represents, fp32. For formats that
            round coarsely: merging then measures the error, and `merge(dtype=...)` stores a dense `weight`, with which
            the module must be able to compute.
        plain: (module) -> None, with `decode`: convert a module that has a dense weight to an ordinary one for good.
        update_config: (model) -> None, with `decode`: update the model's config to the stored weights, after
            merging or unmerging.
        quantize: (layer), with `decode` and `plain`: convert a dense `nn.Linear` to this format in place. It makes the
            name of the format a `quant_type` of `peftcore.quantize`, `peftcore.quantization.load` and `--quantize`.
        for_parameter: (name) -> this format for a parameter with another name than `weight`, such as experts':
            `matches`, `read`, `write` and `decode` then refer to that parameter. None: it stores only a `weight`.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    read: Callable[[Any], Tensor]  # for a module that matches; also the functions below
    write: Callable[[Any, Tensor], dict[str, Tensor]] = field(repr=False)
    read_bias: Callable[[Any], Tensor | None] = lambda module: module._parameters.get("bias")
    write_bias: Callable[[Any, Tensor], dict[str, Tensor]] = lambda module, bias: {"bias": bias.to(module.bias.dtype)}
    decode: Callable[[Any, dict[str, Tensor]], Tensor] | None = None
    plain: Callable[[Any], None] | None = None
    update_config: Callable[[nn.Module], None] | None = None
    quantize: Callable[[Any], object] | None = None
    for_parameter: Callable[[str], WeightFormat] | None = None

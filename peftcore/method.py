"""Placements, which say where in a model each adapter is attached, and `Method`, which turns a config into them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from peftcore.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Around:
    """`adapter(base, *args, **kwargs) -> output` replaces the forward of the module at `path`.

    `base` is a :class:`Base`: `base(*args, **kwargs)` calls the module with the adapters inside this one. The adapter
    can be merged where it has `merged`, see :class:`Adapter`.

    Args:
        path: path of the module; "" for the model itself.
        adapter: the adapter.
        branches: names of other adapters of the module that this one combines. Its `base` is a :class:`BranchedBase`:
            `base.branch(name)(*args, **kwargs)` runs one of them alone around the module's own forward (`base.own`).
            While this adapter is active, they act only through it.
    """

    path: str
    adapter: nn.Module
    branches: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class After:
    """`adapter(y) -> y` follows the module at `path`; of a tuple output it gets and replaces the first element."""

    path: str
    adapter: nn.Module


@dataclass(frozen=True, slots=True)
class OnWeight:
    """`adapter(weight) -> weight` changes what the forward of the module at `path` reads of its parameter `name`.

    It works for any module: convolutions, embeddings, `nn.MultiheadAttention` (`in_proj_weight`), experts
    `[E, out, in]`. A dotted name (`out_proj.weight`) is a parameter of a submodule whose weight is read past the
    submodule's forward. The adapter is called once in each call of the module, with the parameter as it is stored, or
    with the dense weight where it is quantized. It is a pure function, so it merges without `merged`.

    An adapter of experts' weights that is a low-rank product for each expert may have `Adapter.expert_low_rank`.
    """

    path: str
    name: str
    adapter: nn.Module


@dataclass(frozen=True)
class SoftPrompt:
    """`adapter() -> [tokens, hidden]` returns vectors that precede the embedded input of the backbone.

    An adapter that depends on the call (`Adapter.needs_call`) returns `[batch, tokens, hidden]`, or
    `[1, tokens, hidden]` for all rows.

    The output at the prompt's positions is removed. Where the adapter's `in_output` returns True, the prompt is first,
    before padding too, and its states stay in the output of the model: an `Around("", ...)` of the method removes them.

    Args:
        adapter: the adapter.
        shape: (tokens, hidden). Required where the adapter depends on the call, since it is not called without one.
    """

    adapter: nn.Module
    shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class PrefixKV:
    """`adapter() -> [layers, 2, kv_heads, tokens, head_dim]` returns keys and values that come first in the cache."""

    adapter: nn.Module


@dataclass(frozen=True)
class Train:
    """Train parameters of the base themselves. Their original values are kept, and `remove` restores them.

    Args:
        names: full names of the parameters.
        saved: only in `tensor_name`: the tensor belongs to `modules_to_save`, the method did not choose it.
    """

    names: Sequence[str]
    saved: bool = False


Model = TypeVar("Model", bound=nn.Module)  # functions give back the type of the model that they were given

AdapterPlacement = Around | After | OnWeight | SoftPrompt | PrefixKV
Placement = AdapterPlacement | Train
# The adapters of one name by the path of their module; an `OnWeight` by that and its parameter's name, a prompt by "",
# or, where that is taken, by "#1", "#2" in the order in which they were placed.
AdapterModules = Mapping[str, nn.Module]


def tensor_name(placement: Placement, name: str) -> str:
    """Return the name on disk of the tensor `name` of a placement, in Hugging Face PEFT's format.

    `base_model.model.` + module path + name; for the vectors of a prompt only the name.
    """
    match placement:
        case OnWeight(path, parameter):
            return ".".join(filter(None, ("base_model.model", path, parameter, name)))
        case Around(path) | After(path):
            return f"base_model.model.{path}.{name}" if path else f"base_model.model.{name}"
        case Train():
            return f"base_model.model.{name}"
        case _:
            return name


def prompt_tensor_name(placement: Placement, name: str) -> str:
    """Return the name on disk like `tensor_name`, for prompts and prefixes: PEFT has one wrapper less around them."""
    return f"base_model.{name}" if isinstance(placement, Train) else name


Tensors = Mapping[str, Tensor]  # by their names on disk
Fields = Mapping[str, Any]  # of an `adapter_config.json`


@dataclass(frozen=True)
class ForeignFormat:
    """A format of adapter folders of another library, which a method can read and never writes.

    Args:
        name: name for messages, such as `the library adapters`.
        tensors: name of the library's safetensors file.
        matches: (fields of the library's config, an `adapter_config.json` without `peft_type`) -> whether it is this
            format.
        read: (model, fields, tensors) -> (config, tensors by the names that they have on disk here). It raises a
            PeftcoreError for what this method cannot compute.
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
    """A form of a method's files, next to PEFT's, in which other programs read or write the same adapter.

    Both functions take (model, tensors on disk, fields on disk) and return (tensors, fields).

    Args:
        name: name of the form, for `save(..., format=...)`; `load` tries every form.
        read: return the content of a file in this form as PEFT writes it, and of any other file unchanged.
        write: the reverse. It raises a PeftcoreError for what has no place there.
    """

    name: str
    read: Callable[[nn.Module, dict[str, Tensor], Mapping[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]
    write: Callable[[nn.Module, dict[str, Tensor], Mapping[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]


@dataclass(frozen=True)
class FileFormat:
    """A single file without a config, for one model or for several, such as those of a pipeline.

    Tensors and fields are those of a folder in PEFT's layout; the fields name the method.

    Args:
        name: name of the format, for `save(..., format=...)`; `load` recognises it by the tensors' names.
        file: name of the file in a folder.
        matches: (names of a file's tensors) -> whether it is in this format.
        parts: (model, what the user calls it, or None) -> the names that its part may have in a file. It raises a
            PeftcoreError where the model, or one of this name, has no place there.
        split: (a file's tensors) -> {part: its tensors}; {"": all} of a file that names no parts.
        read: (model, part, its tensors, the file's metadata) -> (tensors, fields).
        write: ({part: (model, tensors, fields)}) -> (tensors, metadata). It raises a PeftcoreError for what has no
            place there.
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
    """What Hugging Face PEFT makes of a method's files, and the method of PEFT's.

    Args:
        flag: field on disk, such as `use_dora`, that marks the files of this method among those of its peft_type. A
            file in which it is set is read by this method, any other by the method without a flag. A file that was
            saved here names its method.
        own_fields: names of fields of our config that PEFT does not know and that the file must keep. They are stored
            with the tensors, not in `adapter_config.json`, where PEFT would warn of them; only where they differ from
            the default, which therefore stays what it is. Without this method such a file is refused.
        older_types: peft_types under which older versions of PEFT wrote such files, which are read as well.
        unreadable: (model, paths of adapted modules) -> those of them whose adapters PEFT would misread or refuse;
            `save` warns of them.
        refused: (model, tensors on disk, fields on disk) -> why the method cannot compute what the writer of a file did
            that was not written here, or None.
        scaled: (config, factor) -> config of an adapter with the same tensors and `factor` times the change, which
            others read of an adapter that `peftcore.scale` has scaled. For adapters with a `multiplier`.
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
    """How a method's adapters look on disk.

    Args:
        peft_type: the key by which `load` recognises a method's files, PEFT's where PEFT has the method.
        tensor_name: (placement, name of the tensor in its adapter) -> name on disk. Names must be distinct. For `Train`
            the name is the parameter's; `P.base_layer.bias` where the same adapter is around P. A tensor of a module
            that several adapters share is written once, under the name that it has in the first.
        read: (model, tensors on disk, fields on disk) -> (tensors under today's names, fields of the config). Files of
            older versions are upgraded here. Where only the config is needed, model is None and there are no tensors.
        write: (model, tensors under today's names, whole and on the CPU, fields of the config) -> (tensors on disk,
            fields on disk), which `read` takes back. Where only the config is needed, model is None and there are no
            tensors.
        formats: other formats of the files: folders of other libraries that the method reads, layouts, single files.
        export: (placement) -> tensors by name on disk from which others compute what its adapter computes, where the
            adapter's own tensors are more than that (a reparameterisation). They are written next to its own, or with
            `save(..., resumable=False)` in their place. Where they are some of its own, a file may lack the others,
            which then have their initial values (the state of a schedule).
        peft: what PEFT makes of the files, and the method of PEFT's.
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
        """The layouts among `formats` by name."""
        return {each.name: each for each in self.formats if isinstance(each, FileLayout)}

    @property
    def files(self) -> dict[str, FileFormat]:
        """The formats of single files among `formats` by name."""
        return {each.name: each for each in self.formats if isinstance(each, FileFormat)}

    @property
    def foreign(self) -> list[ForeignFormat]:
        """The formats of other libraries among `formats`."""
        return [each for each in self.formats if isinstance(each, ForeignFormat)]

    def read_fields(self, fields: Fields) -> dict[str, Any]:
        """Return the fields of the config that fields on disk mean."""
        return dict(self.read(None, {}, dict(fields))[1])

    def write_fields(self, fields: Fields) -> dict[str, Any]:
        """Return the fields on disk of fields of the config."""
        return dict(self.write(None, {}, dict(fields))[1])


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Args:
        name: what `apply(model, name)` takes; equals the name of the entry point.
        config_class: a frozen dataclass. If PEFT has the method, fields have PEFT's names. It may have
            `resolved(model, architecture) -> config`, which makes explicit what depends on the model. A field
            `modules_to_save` is handled by the core: these modules are trained as a whole, and None means the heads
            that pre-training did not train (a classifier's).
        place: (model, config, architecture) -> placements. It builds adapters and changes nothing. Under
            `torch.device("meta")` it must not allocate memory.
        state: how adapters look on disk.
        initialize: (model, adapters, config, batches) -> None, or a new config if data has decided sizes. It sets first
            values from the base's weights or from data, after the adapters are attached and before they are active.
            `batches` is what `apply` was given, or None; a method that needs them raises an error then. It may call the
            model, best by `run`, `inputs_of` and `gradients_of`: in evaluation mode, without gradients unless it
            enables them, with the adapters that are already active. It changes only its adapters. Mode, gradients,
            moving buffers and random states are restored afterwards, and if it raises, the adapter is removed. `load`
            does not call it.
        initializes: (config) -> whether `initialize` does anything for this config. If not, it is not called, and
            `batches` are refused.
        loss: (adapters, config) -> a scalar with gradients that is added to the loss, or None. Trainers add it once a
            step, however many batches a step has: for each of n batches 1/n of its value after the batch's forward
            pass.
        after_step: (adapters, config, step, total_steps) -> None, called after each optimizer step, counted from 1,
            before gradients are cleared; for methods with a schedule or an importance. Not called after a step that a
            scaler skipped because of gradients that are not finite.
        needs_after_step: (config) -> whether `after_step` does anything for this config. A training loop that does not
            call it is then warned at the second optimizer step.
        parameter_groups: (adapters, config, lr, weight_decay) -> groups as `torch.optim` takes them. Parameters of the
            adapters in no group get `lr` and `weight_decay`.
        prepare: (model, config) -> None. What only `apply` does to the base, after the placements are checked. It may
            change how weights are stored, but no module's path. `remove` does not undo it.
        recorded_as: (config) -> config of another method, for a method that only prepares the base. The adapter is then
            the other method's in every respect, on disk too, and `state` is not used.
        low_rank: (model, config or None, {path: rank}) -> config of adapters at exactly these modules, each with
            :class:`LowRank` changes of this rank, otherwise like `config`. For `combine` and `convert`.
        learning_rate: default learning rate of `train`, for AdamW.
    """

    name: str
    config_class: type
    place: Callable[[nn.Module, Any, Architecture], Sequence[Placement]]
    state: StateRules
    initialize: Callable[[nn.Module, AdapterModules, Any, Iterable[Any] | None], Any] | None = None
    loss: Callable[[AdapterModules, Any], Tensor | None] | None = None
    after_step: Callable[[AdapterModules, Any, int, int], None] | None = None
    parameter_groups: Callable[[AdapterModules, Any, float, float], list[dict[str, Any]]] | None = None
    initializes: Callable[[Any], bool] = lambda _config: True
    needs_after_step: Callable[[Any], bool] = lambda _config: True
    prepare: Callable[[nn.Module, Any], None] | None = None
    recorded_as: Callable[[Any], Any] | None = None
    low_rank: Callable[[nn.Module, Any, Mapping[str, int]], Any] | None = None
    learning_rate: float = 2e-4


@dataclass(frozen=True)
class WeightFormat:
    """How the stored weight of a kind of module is read as a dense tensor and written back.

    Args:
        name: name for messages, such as `dense`.
        matches: (module) -> whether this format reads the module. The first format that does is used, those of plugins
            before the core's.
        read: (module) -> dense weight, in the layout that the layer's functional form takes (`[out, in]` for a linear).
        write: (module, dense weight) -> the new stored tensors by parameter or buffer name, in their final dtype. The
            core puts them in place and keeps the ones they replace.
        read_bias: (module) -> its bias, one number for each output, or None.
        write_bias: (module, bias) -> the new stored tensors, like `write`.
        decode: (module, the result of `write`) -> the dense weight that the result represents, fp32. For formats that
            round coarsely: merging then measures the error, and `merge(dtype=...)` stores a dense `weight`, with which
            the module must be able to compute.
        plain: (module) -> None, with `decode`: convert a module that has a dense weight to an ordinary one for good.
        update_config: (model) -> None, with `decode`: update the model's config to how its weights are stored, after
            merging or unmerging.
        for_parameter: (name) -> this format for a parameter that is not called `weight`, such as those of experts:
            `matches`, `read`, `write` and `decode` then refer to that parameter. None: it stores only a `weight`.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    read: Callable[[Any], Tensor]  # of a module that matches, as the following
    write: Callable[[Any, Tensor], dict[str, Tensor]] = field(repr=False)
    read_bias: Callable[[Any], Tensor | None] = lambda module: module._parameters.get("bias")
    write_bias: Callable[[Any, Tensor], dict[str, Tensor]] = lambda module, bias: {"bias": bias.to(module.bias.dtype)}
    decode: Callable[[Any, dict[str, Tensor]], Tensor] | None = None
    plain: Callable[[Any], None] | None = None
    update_config: Callable[[nn.Module], None] | None = None
    for_parameter: Callable[[str], WeightFormat] | None = None

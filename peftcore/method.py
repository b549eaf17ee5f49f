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
    """The name on disk of the tensor `name` of a placement, in Hugging Face PEFT's format.

    `base_model.model.` + module path + name; vectors of a prompt bear their bare name.
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
    """The same for methods of prompts and prefixes, around whose models PEFT has one wrapper less."""
    return f"base_model.{name}" if isinstance(placement, Train) else name


@dataclass(frozen=True)
class ForeignFormat:
    """Adapter folders of another library, which a method can read; it never writes them.

    Args:
        name: for messages, such as `the library adapters`.
        tensors: name of its safetensors file.
        matches: (fields of its config, an `adapter_config.json` without `peft_type`) -> is it this format?
        read: (model, fields, tensors) -> (config, tensors by the names that they have on disk here). It raises
            a PeftcoreError for what this method cannot compute.
        about: (fields) -> the same facts as an `adapter_config.json` of PEFT has them: base_model_name_or_path, and
            fields of the method that are worth showing.
        config: name of its config's file.
    """

    name: str
    tensors: str
    matches: Callable[[dict[str, Any]], bool]
    read: Callable[[nn.Module, dict[str, Any], dict[str, Tensor]], tuple[Any, dict[str, Tensor]]]
    about: Callable[[dict[str, Any]], dict[str, Any]] = lambda _fields: {}
    config: str = "adapter_config.json"


@dataclass(frozen=True)
class FileLayout:
    """Another form of a method's files, beside that of PEFT, in which others read or write the same adapter.

    Both functions take (model, tensors on disk, fields on disk) and give (tensors, fields).

    Args:
        read: of a file in this form what is in PEFT's; a file in any other it gives back as it is.
        write: the other way round, for `save(..., format=...)`. It raises a PeftcoreError for what has no place there.
    """

    read: Callable[[nn.Module, dict[str, Tensor], Mapping[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]
    write: Callable[[nn.Module, dict[str, Tensor], Mapping[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]


@dataclass(frozen=True)
class FileFormat:
    """One file, without a config beside it, for one model or for several at once, such as those of a pipeline.

    Tensors and fields are, in both directions, those of a folder in PEFT's layout; the fields say which method's.

    Args:
        file: its name in a folder.
        matches: (names of a file's tensors) -> is it in this format?
        parts: (model, what the user calls it, or None) -> the names that its part may have in a file. It raises a
            PeftcoreError where the model, or one of this name, has no place there.
        split: (a file's tensors) -> {part: its tensors}; of a file that names no parts {"": all}.
        read: (model, part, its tensors, the file's metadata) -> (tensors, fields).
        write: ({part: (model, tensors, fields)}) -> (tensors, metadata). It raises a PeftcoreError for what has no
            place there.
    """

    file: str
    matches: Callable[[Collection[str]], bool]
    parts: Callable[[nn.Module, str | None], Sequence[str]]
    split: Callable[[Mapping[str, Tensor]], Mapping[str, dict[str, Tensor]]]
    read: Callable[[nn.Module, str, dict[str, Tensor], Mapping[str, str]], tuple[dict[str, Tensor], dict[str, Any]]]
    write: Callable[
        [Mapping[str, tuple[nn.Module, dict[str, Tensor], dict[str, Any]]]], tuple[dict[str, Tensor], dict[str, str]]
    ]


@dataclass(frozen=True)
class StateRules:
    """How a method's adapters look on disk.

    Args:
        peft_type: the key by which a file's method is known, that of Hugging Face PEFT where it has the method.
        older_types: peft_types under which older versions of PEFT wrote such files, which are read all the same.
        flag: field on disk, such as `use_dora`, that marks the files of this method among those of its peft_type. A
            file in which it is set is read by this method, any other by the method without a flag. A file that was
            saved here names its method; where several methods are left, an error names them.
        tensor_name: (placement, name of the tensor in its adapter) -> name on disk. Names must be distinct.
            For `Train` the name is the parameter's; `P.base_layer.bias` where the same adapter stands around P. A
            tensor of a module that several adapters share is written once, under the name that it has in the first.
        own_fields: names of fields of our config that PEFT does not know and that the file must keep all the same. They
            are kept beside the tensors, not in `adapter_config.json`, where PEFT would warn of them; only where they
            are not the default, which therefore stays what it is. Without this method such a file is refused.
        ignored_fields: fields of others' `adapter_config.json` that do not change what the adapter computes.
        write_config: (fields of our config as JSON) -> fields on disk, where they differ.
        read_config: (fields on disk) -> fields of our config; the place for upgrades of older files.
        read_tensors: (model, tensors on disk, fields on disk) -> tensors under today's names; likewise for older files.
        write_tensors: (tensors under today's names, whole and on the CPU, config) -> tensors on disk, which
            `read_tensors` takes back; for adapters that others know in another shape.
        exported: (placement) -> tensors by name on disk from which others compute what its adapter computes, where its
            own tensors are more than that (a reparameterisation). Written beside its own, or with
            `save(..., resumable=False)` in their place. Where they are some of its own, a file may lack the others,
            which are then as at the start (the state of a schedule).
        config_on_disk: (config, tensors on disk) -> config of an adapter that has these tensors, where the file
            holds only what was exported.
        foreign: formats of other libraries that the method reads.
        unreadable: (model, paths of adapted modules) -> those of them whose adapters PEFT would misread or refuse;
            `save` warns of them.
        refused: (model, tensors on disk, fields on disk) -> why the method cannot compute what the writer of a file did
            that was not written here, or None.
        scaled: (config, factor) -> config of an adapter with the same tensors and `factor` times the change, for
            methods whose adapters have a `multiplier`: what others read of one that `peftcore.scale` has scaled.
        layouts: other forms of the files by name, each of which is tried when one is read.
        files: formats of single files by name, for `save(..., format=...)`; `load` knows them by their tensors' names.
    """

    peft_type: str
    flag: str | None = None
    tensor_name: Callable[[Placement, str], str] = tensor_name
    own_fields: frozenset[str] = frozenset()
    ignored_fields: frozenset[str] = frozenset()
    write_config: Callable[[dict[str, Any]], dict[str, Any]] = dict
    read_config: Callable[[dict[str, Any]], dict[str, Any]] = dict
    read_tensors: Callable[[nn.Module, dict[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]] = (
        lambda _model, tensors, _fields: tensors
    )
    write_tensors: Callable[[dict[str, Tensor], Any], Mapping[str, Tensor]] = lambda tensors, _config: tensors
    exported: Callable[[Any], Mapping[str, Tensor]] = lambda _placement: {}
    config_on_disk: Callable[[Any, Mapping[str, Tensor]], Any] = lambda config, _tensors: config
    foreign: Sequence[ForeignFormat] = ()
    unreadable: Callable[[nn.Module, Sequence[str]], Sequence[str]] = lambda _model, _paths: ()
    refused: Callable[[nn.Module, Mapping[str, Tensor], Mapping[str, Any]], str | None] = lambda *_: None
    scaled: Callable[[Any, float], Any] | None = None
    layouts: Mapping[str, FileLayout] = field(default_factory=dict)
    files: Mapping[str, FileFormat] = field(default_factory=dict)
    older_types: frozenset[str] = frozenset()

    @property
    def exports(self) -> bool:
        """May an adapter have exported tensors?"""
        return self.exported is not StateRules.exported


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Args:
        name: what `apply(model, name)` takes; equals the entry point's name.
        config_class: a frozen dataclass; fields bear PEFT's names where PEFT has the method. It may have
            `resolved(model, architecture) -> config`, which makes explicit what depends on the model.
            A field `modules_to_save` is the core's business: these modules are trained whole, and None means the
            heads that pre-training did not train (a classifier's).
        place: (model, config, architecture) -> placements. It builds adapters and changes nothing; under
            `torch.device("meta")` it must allocate nothing.
        state: how adapters look on disk.
        initialize: (model, adapters, config, batches) -> None, or the config that then holds where data has decided
            sizes; once the adapters stand on the model and before they act: first values from the base's weights or
            data. `batches` is what `apply` was given, or None: a method that needs them says so then. It may call
            the model, best through `peftcore.observation.run`, `inputs_of` and `gradients_of`: in evaluation,
            without gradients unless it asks for them, with the adapters that act already. It changes its adapters
            alone; mode, gradients, moving buffers and random numbers are afterwards what they were, and if it
            raises, the adapter is taken off again. Not called by `load`.
        initializes: (config) -> has `initialize` anything to do for it? Where not it is not called, and `batches` are
            refused.
        loss: (adapters, config) -> a term that is added to the loss, a scalar with gradients, or None. Trainers add it
            once a step, however many batches a step has: to each of n batches 1/n of what it is after its forward.
        after_step: (adapters, config, step, total_steps) -> None, after each optimizer step, counted from 1, while the
            gradients still stand; for methods with a schedule, or an importance, of their own. Not after a step that a
            scaler skipped, whose gradients are not finite.
        needs_after_step: (config) -> does `after_step` do anything for it? Training that leaves it out is then warned
            of, at the second optimizer step.
        parameter_groups: (adapters, config, lr, weight_decay) -> groups as `torch.optim` takes them, of all that the
            adapters train; parameters that no group names are given `lr` and `weight_decay`.
        prepare: (model, config) -> None. What `apply`, and nothing else, does to the base once the placements are
            checked: it may change how weights are stored, and no module's path. `remove` does not undo it.
        recorded_as: (config) -> config of another method, for one that only prepares the base: the adapter is then
            the other's in every respect, on disk too, and `state` is not asked.
        low_rank: (model, config or None, {path: rank}) -> config of adapters at these modules and no other, each with
            :class:`LowRank` changes of this rank; the rest is as `config` has it. For `combine` and `convert`.
        learning_rate: of AdamW, with which training starts where nobody says another.
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
    """How the weight of a kind of module is read as a dense tensor, and written back.

    Args:
        name: for messages, such as `dense`.
        matches: (module) -> does this format read it? The first format that does is used; plugins come first.
        read: (module) -> dense weight, in the layout the layer's functional form takes (`[out, in]` for a linear).
        write: (module, dense weight) -> the new stored tensors by parameter or buffer name, in their final
            dtype; the core puts them in place and keeps the ones they replace.
        read_bias: (module) -> its bias, one number for each output, or None.
        write_bias: (module, bias) -> as `write`.
        decode: (module, what `write` gave) -> the dense weight that it stands for, fp32. A format that rounds
            coarsely has it: merging then measures what is lost of the adapters, and with `merge(dtype=...)` puts a
            dense `weight` in place, with which the module must be able to compute.
        plain: (module) -> None, with `decode`: make a module that holds a dense weight an ordinary one for good.
        update_config: (model) -> None, with `decode`: make the model's config say how its weights are stored, after
            merging has put dense ones in place, or taken them out again.
        for_parameter: (name) -> this format of a parameter that is not called `weight`, such as those of experts:
            `matches`, `read`, `write` and `decode` are then of that one. None: it stores only a `weight`.
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

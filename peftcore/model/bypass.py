"""Detect layers that an adapter cannot reach, since the model reads their weight without a call or changes it.

    fused(x, self.out_proj.weight)        instead of        self.out_proj(x)

A traced forward pass on meta tensors detects such reads (see `tracing`). Reads that happen only on a GPU, with a cache
or in training are listed in tables. If the forward fails on the example inputs, later reads are not detected.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from peftcore.model.base_modules import base_modules, original_class
from peftcore.model.tracing import observe

_ON_CARDS = "the CUDA kernels read its weight without calling it"
_WITH_CACHE = "decoding with a cache reads its weight without calling it"

# {class in transformers: (layers that are called on the CPU in evaluation mode, but read otherwise; condition)}
_READ_IN_OTHER_MODES = {
    "MambaMixer": (("x_proj", "out_proj"), _ON_CARDS),
    "FalconMambaMixer": (("x_proj", "out_proj"), _ON_CARDS),
    "BambaMixer": (("norm", "out_proj"), _ON_CARDS),
    "FalconH1Mixer": (("out_proj",), _ON_CARDS),
    "GraniteMoeHybridMambaLayer": (("norm", "out_proj"), _ON_CARDS),
    "Mamba2Mixer": (("norm", "out_proj"), _ON_CARDS),
    "NemotronHMamba2Mixer": (("norm", "out_proj"), _ON_CARDS),
    "Zamba2MambaMixer": (("norm", "out_proj"), _ON_CARDS),
    "RecurrentGemmaRecurrentBlock": (("conv_1d",), _WITH_CACHE),
    "LSHSelfAttention": (("query_key", "value"), _WITH_CACHE),
    "Gemma3nTextAltUp": (("correction_coefs",), "training clamps its weight without calling it"),
}
# {class in transformers: layers whose weight it changes in place in training}
_REWRITTEN_IN_TRAINING = {"Gemma3nTextAltUp": ("prediction_coefs",)}

# {class in transformers: layer whose dtype it casts its input to}. The traced forward may not reach these classes,
# because it runs on text, or because the router selects other experts.
_CASTS_INPUT = {
    "Cosmos3EdgeVisionEmbeddings": "patch_embedding",
    "Ernie4_5_VLMoePatchEmbed": "proj",
    "Gemma4VisionPatchEmbedder": "input_proj",
    "GradiumPhononTTSModel": "audio_prompt_proj",
    "Inkling2VisionEmbeddings": "patch_embedding",
    "Kosmos2_5VisionMlp": "wo",
    "MuseGlimmerVisionPatchEmbedder": "patch_embedding",
    "MuseSparkVisionPatchEmbedder": "patch_embedding",
    "Pix2StructTextDenseGatedActDense": "wo",
    "Pix2StructVisionMlp": "wo",
    "PocketTTSModel": "audio_prompt_proj",
    "Siglip2VisionEmbeddings": "patch_embedding",
    "SwitchTransformersDenseActDense": "wo",
    "TimesFm2_5ResidualBlock": "input_layer",
    "UdopDenseActDense": "wo",
}

# {fused projection: the projections that it replaces} in attention modules of diffusers with `fused_projections=True`.
_FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def bypassed_layers(model: nn.Module) -> dict[str, str]:
    """Return {path: reason} for layers whose weight is read without calling the layer.

    Layers that the forward pass did not reach are not included, nor are the layers inside `nn.MultiheadAttention`,
    which has one adapter for all its weights.
    """
    modules, observation = dict(base_modules(model)), observe(model)
    layers: dict[str, str] = {}
    for name, readers in observation.other_reads.items():
        path = name.rpartition(".")[0]
        parent = path.rpartition(".")[0]
        if (
            path in observation.called
            or parent in observation.failed
            or isinstance(modules.get(parent), nn.MultiheadAttention)
        ):
            continue
        if modules[path]._modules:  # the model calls its children instead (JetMoE's experts)
            continue
        layers[path] = f"{describe_reader(readers)} reads its weight without calling it"
    for path, module in modules.items():
        layer_names, reason = _READ_IN_OTHER_MODES.get(original_class(module).__name__, ((), ""))
        layers.update((_join(path, name), reason) for name in layer_names if _join(path, name) in modules)
    return layers | dict(_fused_projections(modules))


def modules_without_gradients(model: nn.Module) -> set[str]:
    """Return the paths of modules that only run under `torch.no_grad` (sparse attention's indexers)."""
    observation = observe(model)
    paths: set[str] = observation.called - observation.with_gradients - observation.in_function
    return paths


def external_reads(model: nn.Module) -> dict[str, set[str]]:
    """Return {full name of a parameter: paths of other modules that read it outside a call of its module}."""
    reads: dict[str, set[str]] = observe(model).other_reads
    return reads


def describe_reader(readers: set[str]) -> str:
    """Describe, for error messages, the first module that reads a parameter."""
    reader = min(readers)
    return f"'{reader}'" if reader else "the model's own forward"


def rewritten_layers(model: nn.Module) -> dict[str, str]:
    """Return {path: reason} for layers whose weight the model changes in place, as RWKV does in evaluation mode."""
    modules, layers = dict(base_modules(model)), dict[str, str]()
    for name, reader in observe(model).rewritten.items():
        kind = original_class(modules[reader]).__name__
        layers[name.rpartition(".")[0]] = f"the forward of {kind} changes its {name.rpartition('.')[2]} in place"
    for path, module in modules.items():
        kind = original_class(module).__name__
        for name in _REWRITTEN_IN_TRAINING.get(kind, ()):
            if _join(path, name) in modules:
                layers[_join(path, name)] = f"the forward of {kind} changes its weight in place in training"
    return layers


def layers_read_for_dtype(model: nn.Module) -> list[str]:
    """Return the paths of layers whose weight dtype is read by other modules, to cast an input (ColPali)."""
    paths = [name.removesuffix(".weight") for name in sorted(observe(model).dtype_reads) if name.endswith(".weight")]
    for path, module in base_modules(model):
        layer = _CASTS_INPUT.get(original_class(module).__name__)
        if layer is not None:
            paths.append(_join(path, layer))
    return list(dict.fromkeys(paths))


def _fused_projections(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield (path, reason) for projections replaced by a fused one, and for fused ones that are no longer used."""
    for path, module in modules.items():
        if "fused_projections" not in module.__dict__ and not hasattr(type(module), "fused_projections"):
            continue  # `getattr` below is slow for a module without the attribute
        if getattr(module, "fused_projections", False) is not True:
            continue
        # Unfusing a class without `unfuse_projections` changes the processor, but leaves the fused projection in place.
        processor = type(getattr(module, "processor", None)).__name__
        is_used = hasattr(module, "unfuse_projections") or processor.startswith("Fused")
        for fused_name, parts in _FUSED_PROJECTIONS.items():
            if _join(path, fused_name) in modules and is_used:
                yield from (
                    (_join(path, part), (f"'{fused_name}' contains its weight and is called instead")) for part in parts
                )
            elif _join(path, fused_name) in modules:
                yield _join(path, fused_name), f"{', '.join(parts)} are called instead"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

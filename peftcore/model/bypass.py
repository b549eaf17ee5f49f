"""Layers whose weight is read without calling them, so that an adapter would never run, and layers that change.

    fused(x, self.out_proj.weight)        instead of        self.out_proj(x)

One forward on meta tensors shows such reads (see `tracing`). What runs only on a card or in another mode is in a table.
A model whose forward fails with example inputs shows the reads up to there; nothing is known of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from peftcore.model.base_modules import base_modules, original_class
from peftcore.model.tracing import observe

_ON_CARDS = "the kernels for CUDA read its weight and do not call it"
_WITH_CACHE = "decoding with a cache reads its weight and does not call it"

# {class of transformers: (its layers that a forward on the CPU in evaluation calls and another one reads, when)}
_READ_ELSEWHERE = {
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
    "Gemma3nTextAltUp": (("correction_coefs",), "training clamps its weight and does not call it"),
}
# {class of transformers: its layers whose weight it changes in place in training}
_REWRITTEN_IN_TRAINING = {"Gemma3nTextAltUp": ("prediction_coefs",)}

# {class of transformers that casts its input to the dtype of a layer: the layer}, where a forward on text, or one
# that takes other experts, does not reach the class.
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

# {fused projection: its parts} of diffusers' attentions with `fused_projections=True`.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def bypassed(model: nn.Module) -> dict[str, str]:
    """Return {path: why} of bypassed layers; layers that the forward pass did not reach are left out.

    Layers of `nn.MultiheadAttention` are not included, since it is adapted as a whole.
    """
    modules, seen = dict(base_modules(model)), observe(model)
    layers: dict[str, str] = {}
    for name, readers in seen.other_reads.items():
        path = name.rpartition(".")[0]
        parent = path.rpartition(".")[0]
        if path in seen.called or parent in seen.failed or isinstance(modules.get(parent), nn.MultiheadAttention):
            continue
        if modules[path]._modules:  # only its parts are called (JetMoE's experts)
            continue
        layers[path] = f"{reader_named(readers)} reads its weight and does not call it"
    for path, module in modules.items():
        names, why = _READ_ELSEWHERE.get(original_class(module).__name__, ((), ""))
        layers.update((_join(path, name), why) for name in names if _join(path, name) in modules)
    return layers | dict(_fused(modules))


def without_gradients(model: nn.Module) -> set[str]:
    """Return the paths of modules that the model calls under `torch.no_grad` alone (sparse attention's indexers)."""
    seen = observe(model)
    paths: set[str] = seen.called - seen.with_gradients - seen.in_function
    return paths


def read_by_others(model: nn.Module) -> dict[str, set[str]]:
    """Return {full name of a parameter: paths of the modules whose code reads it outside of its own module}."""
    reads: dict[str, set[str]] = observe(model).other_reads
    return reads


def reader_named(readers: set[str]) -> str:
    """Return one of the modules that read a parameter, as messages name it."""
    reader = min(readers)
    return f"'{reader}'" if reader else "the model's own forward"


def rewritten(model: nn.Module) -> dict[str, str]:
    """Return {path: why} of layers whose weight the model changes in place, as RWKV does for evaluation."""
    modules, layers = dict(base_modules(model)), dict[str, str]()
    for name, reader in observe(model).rewritten.items():
        kind = original_class(modules[reader]).__name__
        layers[name.rpartition(".")[0]] = f"code of {kind} changes its {name.rpartition('.')[2]} in place"
    for path, module in modules.items():
        kind = original_class(module).__name__
        for name in _REWRITTEN_IN_TRAINING.get(kind, ()):
            if _join(path, name) in modules:
                layers[_join(path, name)] = f"code of {kind} changes its weight in place in training"
    return layers


def asked_for_dtype(model: nn.Module) -> list[str]:
    """Return the layers whose weight dtype is read by other code of the model to cast an input (ColPali)."""
    paths = [name.removesuffix(".weight") for name in sorted(observe(model).dtype_reads) if name.endswith(".weight")]
    for path, module in base_modules(model):
        layer = _CASTS_INPUT.get(original_class(module).__name__)
        if layer is not None:
            paths.append(_join(path, layer))
    return list(dict.fromkeys(paths))


def _fused(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield (path, why) of projections replaced by a fused one, or of a fused one that was split again."""
    for path, module in modules.items():
        if "fused_projections" not in module.__dict__ and not hasattr(type(module), "fused_projections"):
            continue  # a failing attribute lookup is slow
        if getattr(module, "fused_projections", False) is not True:
            continue
        # A class without `unfuse_projections` only gets another processor, and keeps the fused projection.
        processor = type(getattr(module, "processor", None)).__name__
        is_used = hasattr(module, "unfuse_projections") or processor.startswith("Fused")
        for whole, parts in _FUSED.items():
            if _join(path, whole) in modules and is_used:
                yield from ((_join(path, part), f"'{whole}' has its weight, and is called") for part in parts)
            elif _join(path, whole) in modules:
                yield _join(path, whole), f"{', '.join(parts)} are called in its place"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

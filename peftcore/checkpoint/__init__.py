"""Save and load adapters: the whole, the config, the tensors, the base that they belong to, what PEFT makes of them."""

from peftcore.checkpoint.loading import load, restore
from peftcore.checkpoint.reading import METHOD, about, adapter_folder, own_fields, read
from peftcore.checkpoint.saving import save, save_each
from peftcore.checkpoint.single_file import contents
from peftcore.checkpoint.tensors import tensors_on_disk

__all__ = [
    "METHOD",
    "about",
    "adapter_folder",
    "contents",
    "load",
    "own_fields",
    "read",
    "restore",
    "save",
    "save_each",
    "tensors_on_disk",
]

"""Saving and loading of adapters: config, tensors, the fingerprint of the base, and compatibility with PEFT."""

from peftcore.checkpoint.loading import load, restore
from peftcore.checkpoint.reading import about, adapter_folder, method_of, own_fields, read
from peftcore.checkpoint.resident import set_resident_limit
from peftcore.checkpoint.single_file import contents
from peftcore.checkpoint.tensors import tensors_on_disk
from peftcore.checkpoint.vocabulary import vocabulary_rows
from peftcore.checkpoint.writing import save, save_each

__all__ = [
    "about",
    "adapter_folder",
    "contents",
    "load",
    "method_of",
    "own_fields",
    "read",
    "restore",
    "save",
    "save_each",
    "set_resident_limit",
    "tensors_on_disk",
    "vocabulary_rows",
]

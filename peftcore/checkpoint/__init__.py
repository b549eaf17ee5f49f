"""Save and load adapters: the whole, the config, the tensors, the base that they belong to, what PEFT makes of them."""

from peftcore.checkpoint.folders import about, load, place, read, restore, save, save_each
from peftcore.checkpoint.tensors import tensors_on_disk

__all__ = ["about", "load", "place", "read", "restore", "save", "save_each", "tensors_on_disk"]

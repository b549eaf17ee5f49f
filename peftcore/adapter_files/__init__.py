"""The files of an adapter folder, in Hugging Face PEFT's format, of one adapter or of several that were saved together.

adapter_config.json, adapter_model.safetensors            an adapter
NAME/adapter_config.json, NAME/adapter_model.safetensors  further ones
peftcore_manifest.json                                    the hashes of all files of one save

A save is there when its manifest is there, by one rename: killed at any point it leaves what was there before, or all
that is new. A reader takes only what the manifest names. Folders without one, as Hugging Face PEFT writes them, are
read as they are.
"""

from peftcore.adapter_files.content import CONFIG, TENSORS
from peftcore.adapter_files.folder import MANIFEST, Folder, read, read_tensors
from peftcore.adapter_files.saving import Content, write, write_file

__all__ = ["CONFIG", "MANIFEST", "TENSORS", "Content", "Folder", "read", "read_tensors", "write", "write_file"]

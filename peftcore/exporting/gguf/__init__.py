"""GGUF, the files of llama.cpp: a model's weights with its tokenizer, and low-rank adapters beside such a file."""

from peftcore.exporting.gguf.adapter import command, write_adapter
from peftcore.exporting.gguf.model import TYPES, write_model
from peftcore.exporting.gguf.tensor_names import family_of

__all__ = ["TYPES", "command", "family_of", "write_adapter", "write_model"]

"""GGUF files for llama.cpp: models with their tokenizers, and low-rank adapters."""

from peftcore.exporting.gguf.adapter_file import command, write_adapter
from peftcore.exporting.gguf.model import TYPES, write_model
from peftcore.exporting.gguf.tensor_names import family_of

__all__ = ["TYPES", "command", "family_of", "write_adapter", "write_model"]

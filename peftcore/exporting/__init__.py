"""Models and adapters for other programs: vLLM and SGLang, PEFT, ONNX, and the formats of plugins."""

from peftcore.exporting.export import export, find, options_of
from peftcore.exporting.one_product import adapter_products

__all__ = ["adapter_products", "export", "find", "options_of"]

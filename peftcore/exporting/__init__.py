"""Models and adapters for other programs: llama.cpp and Ollama, vLLM and SGLang, ONNX."""

from peftcore.exporting.export import FORMATS, export

__all__ = ["FORMATS", "export"]

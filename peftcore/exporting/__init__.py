"""Models and adapters for other programs: llama.cpp and Ollama, vLLM and SGLang, ONNX."""

from peftcore.exporting.export import TARGETS, export

__all__ = ["TARGETS", "export"]

"""Base models: locate, load and quantize them, with their adapters and tokenizers."""

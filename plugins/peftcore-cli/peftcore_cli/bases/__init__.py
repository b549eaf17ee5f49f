"""Base models: where they are, loading and quantizing them, and the adapters and tokenizers that belong to them."""

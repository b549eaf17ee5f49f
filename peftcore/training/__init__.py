"""What a training step gains, fused operators and the loss without logits, and the integrations of trainers.

It imports `files`, `quantization` and what is below them.
"""

"""Kernels for CUDA tensors in Triton, which every CUDA build of PyTorch on Linux includes.

Triton compiles them for the GPU when they are first called. Each function takes the checked call of an operator, whose
formula, schema and PyTorch reference are in the module of `peftcore.ops` that has its name.
"""

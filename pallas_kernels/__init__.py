"""TPU kernels of hkv-jax, a leaf: arrays in, arrays out.

Imports jax and numpy only, and is imported by `hkv_jax.model` only. Nothing here knows requests, blocks or models.
"""

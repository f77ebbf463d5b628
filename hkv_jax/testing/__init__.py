"""Doubles that the tests of hkv-jax and of its users share."""

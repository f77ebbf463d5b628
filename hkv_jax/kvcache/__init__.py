"""The hybrid KV cache on the host: which bytes hold which tokens of which sequence.

Owns: page formats, the split of the budget, slabs, blocks and block tables. Must never: import jax; everything here is
integers and numpy.
"""

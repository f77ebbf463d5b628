"""The device side: pure functions of arrays that a step program is made of. Must never hold requests or block ids."""

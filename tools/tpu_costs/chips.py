"""What the model of time takes from a chip: bandwidth, clock and memories of one core.

Owns: the numbers, all public. Must never: be taken for measurements; the clocks are derived from peak FLOPs.
"""

from __future__ import annotations

import dataclasses

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One core of a chip.

    ``hbm_bytes_per_second`` is its share of the chip's bandwidth, ``hertz`` its clock, ``mxu_flops_per_cycle`` what its
    matrix units do in bf16; ``vmem_bytes`` and ``smem_bytes`` are its vector and scalar memory, ``hbm_bytes`` its HBM.
    """

    name: str
    topology: str
    hbm_bytes_per_second: float
    hertz: float
    bf16_flops_per_second: float
    vmem_bytes: int
    hbm_bytes: int
    smem_bytes: int = MIB


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5e:2x2", 819e9, 1.50e9, 197e12, 128 * MIB, 16 << 30),
        Chip("v5p", "v5p:2x2x1", 2765e9, 1.75e9, 459e12, 64 * MIB, 95 << 30),
        Chip("v6e", "v6e:2x2", 1640e9, 1.75e9, 918e12, 128 * MIB, 32 << 30),
        # Two cores a chip, each a device of its own with half of the memory and of the bandwidth.
        Chip("tpu7x", "tpu7x:2x2x1", 3690e9, 2.20e9, 1153e12, 64 * MIB, 96 << 30),
    )
}
"""By the name before the colon of a topology."""


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as ``v6e:2x2``."""
    return CHIPS[topology.partition(":")[0]]


def topology_named(text: str) -> str:
    """The topology that a user means: a chip's name, or one with as many chips along each axis as ``v6e:2x4``.

    Raises:
        ValueError: a kind of chip that is not in the table, or axes that no slice of it has.
    """
    name, _, axes = text.partition(":")
    if name not in CHIPS:
        raise ValueError(f"--topology {text!r}: no figures for {name!r}; there are some for {', '.join(CHIPS)}")
    usual = CHIPS[name].topology
    if not axes:
        return usual
    lengths = [int(one) if one.isdecimal() else 0 for one in axes.split("x")]
    if len(lengths) != usual.count("x") + 1 or min(lengths) < 1 or any(one % 2 for one in lengths[:2]):
        raise ValueError(f"--topology {text!r}: a slice of {name} is hosts of two by two chips, such as {usual}")
    return text

"""RoPE of each kind of layer, from every spelling a ``config.json`` may use.

Old: ``rope_theta`` beside ``rope_scaling``; Gemma 3 adds ``rope_local_base_freq`` for its sliding layers. New: one
``rope_parameters`` object, or one for each layer type inside it. Owns: these spellings. Must never: compute an angle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from hkv_jax.errors import ConfigError
from hkv_jax.families.fields import MAX_COUNT, Fields, shown
from hkv_jax.spec import LayerKind, Llama3Scaling, RopeSpec

LAYER_TYPES = {LayerKind.GLOBAL: "full_attention", LayerKind.SLIDING: "sliding_attention"}

_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ORIGINAL = "original_max_position_embeddings"
# What these may say without effect where they are not used.
_NEUTRAL = {"factor": 1.0, "partial_rotary_factor": 1.0, "attention_factor": 1.0}


@dataclasses.dataclass(frozen=True, slots=True)
class RopeStyle:
    """How a family spells RoPE.

    Attributes:
        theta: base of every layer when none is given (of the global layers where ``local_theta`` is set).
        local_theta: base of the sliding layers when none is given; ``None``: sliding layers are like global ones.
        absent: what ``rope_parameters`` is when neither it nor ``rope_scaling`` is given.
    """

    theta: float = 10_000.0
    local_theta: float | None = None
    absent: Mapping[str, object] = dataclasses.field(default_factory=dict)


def read_ropes(
    fields: Fields, kinds: Collection[LayerKind], style: RopeStyle, max_position: int
) -> dict[LayerKind, RopeSpec]:
    """The RoPE of each of ``kinds``.

    Raises:
        ConfigError: a scaling that is not supported, a value out of range, or two fields that disagree.
    """
    original = fields.optional_count(_ORIGINAL, None)
    thetas = {LayerKind.GLOBAL: ("rope_theta", style.theta), LayerKind.SLIDING: ("rope_theta", style.theta)}
    if style.local_theta is not None:
        thetas[LayerKind.SLIDING] = ("rope_local_base_freq", style.local_theta)
    ropes = {}
    for kind, (where, parameters) in _by_kind(fields, style).items():
        theta_field, default_theta = thetas[kind]
        theta = fields.number(theta_field, default_theta)
        if kind not in kinds:
            continue
        if parameters is None:
            raise ConfigError(f"{where}: nothing for {LAYER_TYPES[kind]}; layers without RoPE are not supported")
        if theta_field in fields:
            _agree(where, parameters, "rope_theta", fields, theta_field)
        if original is not None:
            _agree(where, parameters, _ORIGINAL, fields, _ORIGINAL)
        filled = {"rope_theta": theta, _ORIGINAL: original or max_position, **parameters}
        ropes[kind] = _rope(Fields(filled, where))
    return ropes


def _by_kind(fields: Fields, style: RopeStyle) -> dict[LayerKind, tuple[str, dict[str, object] | None]]:
    """Where each kind's parameters stand, and what they are; ``None``: the config names the kind's type with null."""
    name, parameters = _parameters(fields, style)
    where = f"{fields.where}: {name}"
    nested = set(LAYER_TYPES.values()) & parameters.keys()
    if not nested:
        if style.local_theta is None:
            return dict.fromkeys(LayerKind, (where, parameters))
        if parameters and name == "rope_parameters":
            raise fields.error(name, f"one object for each of {' and '.join(LAYER_TYPES.values())}")
        if "type" in parameters and "rope_type" not in parameters:
            # The reference implementation reads this spelling elsewhere, and here it drops the scaling.
            raise ConfigError(f"{where}: type is not read in this family; call it rope_type")
        return {LayerKind.GLOBAL: (where, parameters), LayerKind.SLIDING: (where, {})}
    beside = parameters.keys() - nested
    if beside:
        raise ConfigError(f"{where}: {min(beside)} stands beside {min(nested)}; it must be inside of it")
    if fields.raw(_ORIGINAL) is not None:
        raise ConfigError(f"{fields.where}: {_ORIGINAL} must be inside of the objects of {name}, or left out")
    found: dict[LayerKind, tuple[str, dict[str, object] | None]] = {}
    for kind, layer_type in LAYER_TYPES.items():
        own = Fields(parameters, where).mapping(layer_type)
        # Where kinds differ anyway each has defaults of its own; elsewhere a kind left out has none to follow.
        missing_is_default = style.local_theta is not None and layer_type not in parameters
        found[kind] = (f"{where}: {layer_type}", {} if missing_is_default else own)
    return found


def _parameters(fields: Fields, style: RopeStyle) -> tuple[str, dict[str, object]]:
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if scaling and parameters and scaling != parameters:
        raise ConfigError(f"{fields.where}: rope_scaling and rope_parameters disagree; leave one out")
    if parameters:
        return "rope_parameters", parameters
    return "rope_scaling", scaling or dict(style.absent)


def _agree(where: str, parameters: Mapping[str, object], name: str, fields: Fields, outer: str) -> None:
    inner_value, outer_value = parameters.get(name), fields.raw(outer)
    if inner_value is not None and inner_value != outer_value:
        raise ConfigError(
            f"{where}: {name} is {shown(inner_value)}, but {outer} of {fields.where} is {shown(outer_value)}; "
            "leave one out"
        )


def _rope(fields: Fields) -> RopeSpec:
    old, new = fields.raw("type"), fields.raw("rope_type")
    if old is not None and new is not None and old != new:
        raise ConfigError(f"{fields.where}: type is {shown(old)}, but rope_type is {shown(new)}; leave one out")
    name = "rope_type" if new is not None or old is None else "type"
    rope_type = "default" if fields.raw(name) is None else fields.choice(name, "default", _FACTORS)
    used = ("rope_theta", *_FACTORS[rope_type])
    for field, value in fields.unread().items():
        if field not in used and field != _ORIGINAL and value is not None and value != _NEUTRAL.get(field):
            raise ConfigError(f"{fields.where}: {field} ({shown(value)}) is not supported with RoPE type {rope_type}")
    theta = fields.number("rope_theta", None)
    if rope_type == "linear":
        return RopeSpec(theta, linear_factor=fields.number("factor", None))
    if rope_type == "default":
        return RopeSpec(theta)
    low, high = fields.number("low_freq_factor", None), fields.number("high_freq_factor", None)
    if high <= low:
        raise fields.error("high_freq_factor", f"a number above low_freq_factor, which is {low:g}")
    original = fields.count(_ORIGINAL, MAX_COUNT)
    return RopeSpec(theta, llama3=Llama3Scaling(fields.number("factor", None), low, high, original))

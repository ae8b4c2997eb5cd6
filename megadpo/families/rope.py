"""Rotary-embedding settings of a Hugging Face config.json, in one spelling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megadpo.config.architecture import RopeScaling, Rotary
from megadpo.families.reading import HfConfig

_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    # rope type: (keys that must be there, keys that may be there)
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset({"original_max_position_embeddings"})),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    ),
}
_EVERYWHERE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_NOT_POSITIVE = frozenset({"truncate"})
_TRAINED_LENGTH = "original_max_position_embeddings"


def read_rope(config: HfConfig, head_dim: int, max_position_embeddings: int) -> Rotary:
    """From transformers 4's or transformers 5's spelling, the defaults of transformers/modeling_rope_utils.py filled in.

    `dynamic` is plain RoPE: it differs only beyond max_position_embeddings, where a run is refused anyway.
    """
    plain = Rotary(theta=10000.0, dims=head_dim)
    raw, report = config.raw, config.report
    spelling = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    given = raw.get(spelling) or {}
    if not isinstance(given, Mapping):
        report(spelling, given, "a JSON object or null")
        return plain
    other = raw.get("rope_scaling") or {}
    if spelling == "rope_parameters" and not _says_the_same(other, given):
        # transformers 5 reads rope_scaling then, and loses rope_parameters' rope_theta.
        report("rope_scaling", other, f"none beside rope_parameters {given}", "merge it into rope_parameters")
        return plain
    theta = given.get("rope_theta", config.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        report("rope_theta", theta, "a positive number")
        theta = 10000.0
    rotary = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rotary not in (None, 1, 1.0):
        report("partial_rotary_factor", rotary, "1.0", "only models that rotate whole heads are supported")
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in _KEYS:
        known = ", ".join(sorted(_KEYS))
        report(f"{spelling}.rope_type", rope_type, f"one of {known}", "choose a model with one of these RoPE types")
        return plain
    required, optional = _KEYS[rope_type]
    values = {key: value for key, value in given.items() if key not in _EVERYWHERE and value is not None}
    if _TRAINED_LENGTH in optional and raw.get(_TRAINED_LENGTH) is not None:
        values[_TRAINED_LENGTH] = raw[_TRAINED_LENGTH]  # outside, it goes before the one inside (transformers 5)
    sound = True
    for key in sorted(required - values.keys()):
        report(f"{spelling}.{key}", None, f"a number, for rope_type {rope_type}")
        sound = False
    for key, value in values.items():
        if key not in required | optional:
            # Refused rather than dropped: a key that changes the frequencies must not be lost.
            report(f"{spelling}.{key}", value, f"no such key for rope_type {rope_type}", "this RoPE is not supported")
            sound = False
        elif key not in _NOT_POSITIVE and (isinstance(value, bool) or not _positive(value)):
            report(f"{spelling}.{key}", value, "a positive number")
            sound = False
    if not sound or rope_type in ("default", "dynamic"):
        return Rotary(theta=float(theta), dims=head_dim)
    scaling = _with_defaults(rope_type, values, max_position_embeddings)
    return Rotary(theta=float(theta), dims=head_dim, scaling=scaling)


def _says_the_same(other: object, given: Mapping[str, Any]) -> bool:
    """Whether `other`, in transformers 4's spelling, has nothing that `given` has not."""
    if not isinstance(other, Mapping):
        return False
    return all(given.get("rope_type" if key == "type" else key) == value for key, value in other.items())


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _with_defaults(rope_type: str, values: Mapping[str, Any], max_position_embeddings: int) -> RopeScaling:
    """The numbers that `rope_type`'s formula needs, defaults as in transformers."""
    factor, trained = float(values["factor"]), int(values.get(_TRAINED_LENGTH, max_position_embeddings))
    if rope_type == "linear":
        return RopeScaling(rope_type="linear", factor=factor)
    if rope_type == "llama3":
        return RopeScaling(
            rope_type="llama3",
            factor=factor,
            original_max_position_embeddings=trained,
            low_freq_factor=float(values["low_freq_factor"]),
            high_freq_factor=float(values["high_freq_factor"]),
        )
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=trained,
        beta_fast=float(values.get("beta_fast", 32)),
        beta_slow=float(values.get("beta_slow", 1)),
        truncate=bool(values.get("truncate", True)),
        attention_factor=float(values.get("attention_factor", _yarn_attention_factor(values))),
    )


def _yarn_attention_factor(values: Mapping[str, Any]) -> float:
    """What yarn multiplies cos and sin by (arXiv:2309.00071, section 3.4; the mscale form is DeepSeek's)."""

    def mscale(weight: float) -> float:
        factor = float(values["factor"])
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return mscale(values["mscale"]) / mscale(values["mscale_all_dim"])
    return mscale(1.0)

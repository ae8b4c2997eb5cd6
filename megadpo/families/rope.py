"""Rotary-embedding settings of a Hugging Face config.json, in one spelling."""

from __future__ import annotations

import dataclasses
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
    "longrope": (
        frozenset({"short_factor", "long_factor"}),
        frozenset({"factor", "original_max_position_embeddings", "attention_factor"}),
    ),
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
_LISTS = frozenset({"short_factor", "long_factor"})
_TRAINED_LENGTH = "original_max_position_embeddings"


def given_rope(config: HfConfig) -> tuple[str, Mapping[str, Any]]:
    """The key that config.json says something of RoPE under, transformers 5's or else transformers 4's, and what."""
    raw, report = config.raw, config.report
    spelling = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    given = raw.get(spelling) or {}
    if not isinstance(given, Mapping):
        report(spelling, given, "a JSON object or null")
        return spelling, {}
    other = raw.get("rope_scaling") or {}
    if spelling == "rope_parameters" and not _says_the_same(other, given):
        # transformers 5 reads rope_scaling then, and loses rope_parameters' rope_theta.
        report("rope_scaling", other, f"none beside rope_parameters {given}", "merge it into rope_parameters")
        return spelling, {}
    return spelling, given


def read_rope(
    config: HfConfig,
    head_dim: int,
    max_position_embeddings: int,
    *,
    rope: tuple[str, Mapping[str, Any]] | None = None,
    partial: bool = False,
    interleaved: bool = False,
    also: Mapping[str, str] | None = None,
) -> Rotary:
    """Reads transformers 4's or transformers 5's keys, with the defaults of transformers/modeling_rope_utils.py.

    rope: the result of given_rope, or other settings in its form (default: the former). partial: whether only a part of a head
    may be rotated. also: the family's other names of RoPE types. `dynamic` is read as plain RoPE: it differs only beyond
    max_position_embeddings, where a run is refused.
    """
    spelling, given = given_rope(config) if rope is None else rope
    theta = given.get("rope_theta", config.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        config.report("rope_theta", theta, "a positive number")
        theta = 10000.0
    turned = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    turned = 1.0 if turned is None else turned
    if turned != 1 and not partial:
        expected = "1.0: this family turns whole heads"
        config.report("partial_rotary_factor", turned, expected)
    elif isinstance(turned, bool) or not isinstance(turned, (int, float)) or not 0 < turned <= 1:
        config.report("partial_rotary_factor", turned, "a number above 0, at most 1")
        turned = 1.0
    plain = Rotary(theta=float(theta), dims=int(head_dim * turned), interleaved=interleaved)
    rope_type = given.get("rope_type", given.get("type", "default"))
    rope_type = (also or {}).get(rope_type, rope_type)
    values = _sound_values(config, spelling, given, rope_type)
    if values is None or rope_type in ("default", "dynamic"):
        return plain
    if rope_type == "longrope" and len(values["short_factor"]) != plain.dims // 2:
        config.report(f"{spelling}.short_factor", len(values["short_factor"]), f"{plain.dims // 2} numbers")
    scaling = _with_defaults(rope_type, values, max_position_embeddings)
    return dataclasses.replace(plain, scaling=scaling)


def _sound_values(
    config: HfConfig, spelling: str, given: Mapping[str, Any], rope_type: object
) -> dict[str, Any] | None:
    """The numbers given for `rope_type`; None where something is wrong with them, which is noted."""
    if rope_type not in _KEYS:
        known = ", ".join(sorted(_KEYS))
        config.report(
            f"{spelling}.rope_type", rope_type, f"one of {known}", "choose a model with one of these RoPE types"
        )
        return None
    required, optional = _KEYS[str(rope_type)]
    values = {key: value for key, value in given.items() if key not in _EVERYWHERE and value is not None}
    if _TRAINED_LENGTH in optional and config.get(_TRAINED_LENGTH) is not None:
        values[_TRAINED_LENGTH] = config.get(_TRAINED_LENGTH)  # outside, it goes before the one inside (transformers 5)
    problems = len(config.problems)
    for key in sorted(required - values.keys()):
        config.report(f"{spelling}.{key}", None, f"a number, for rope_type {rope_type}")
    for key, value in values.items():
        where = f"{spelling}.{key}"
        if key not in required | optional:
            # Refused rather than dropped: a key that changes the frequencies must not be lost.
            config.report(where, value, f"no such key for rope_type {rope_type}", "this RoPE is not supported")
        elif key in _LISTS and not (isinstance(value, list) and value and all(map(_positive, value))):
            config.report(where, value, "a list of positive numbers")
        elif key not in _LISTS | _NOT_POSITIVE and not _positive(value):
            config.report(where, value, "a positive number")
    return values if len(config.problems) == problems else None


def _says_the_same(other: object, given: Mapping[str, Any]) -> bool:
    """Whether `other`, in transformers 4's spelling, has nothing that `given` has not."""
    if not isinstance(other, Mapping):
        return False
    return all(given.get("rope_type" if key == "type" else key) == value for key, value in other.items())


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _with_defaults(rope_type: str, values: Mapping[str, Any], max_position_embeddings: int) -> RopeScaling:
    """The numbers that `rope_type`'s formula needs, defaults as in transformers."""
    trained = int(values.get(_TRAINED_LENGTH, max_position_embeddings))
    factor = float(values.get("factor", max_position_embeddings / trained))
    if rope_type == "longrope":
        usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
        return RopeScaling(
            rope_type="longrope",
            factor=factor,
            original_max_position_embeddings=trained,
            attention_factor=float(values.get("attention_factor", usual)),
            short_factor=tuple(map(float, values["short_factor"])),
        )
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

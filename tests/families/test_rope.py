"""Rotary settings of config.json, in both spellings, as transformers means them."""

from __future__ import annotations

import math

import pytest

from megadpo.config.architecture import RopeScaling, Rotary
from megadpo.families import parse_architecture
from tests.families.configs import LLAMA, MIXTRAL, YARN


def test_mixtral_has_a_theta_of_its_own():
    for said, theta in (({}, 1e6), ({"rope_parameters": {"rope_type": "default"}}, 1e6), ({"rope_theta": 5e5}, 5e5)):
        assert parse_architecture({**MIXTRAL, **said}).attention.rotary.theta == theta


def test_rope_twice_is_taken_where_both_say_the_same():
    twice = {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {**YARN, "type": "yarn"}}
    arch = parse_architecture({**LLAMA, **twice})
    assert arch.attention.rotary.theta == 1e6 and arch.attention.rotary.scaling is not None


def test_the_trained_length_outside_goes_first():
    arch = parse_architecture({**LLAMA, "rope_scaling": YARN, "original_max_position_embeddings": 4096})
    assert arch.attention.rotary.scaling.original_max_position_embeddings == 4096


ROPES = [
    # what config.json says, (theta, scaling)
    ({"rope_theta": 5e5}, (5e5, None)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, (1e6, None)),
    (
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}},
        (1e6, {"rope_type": "linear", "factor": 2.0}),
    ),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, (10000.0, None)),
    (
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        (
            5e5,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ),
    (
        {"rope_parameters": {**YARN, "rope_theta": 1e6, "beta_fast": None}},
        (
            1e6,
            {
                **YARN,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,
                "attention_factor": 0.1 * math.log(4.0) + 1.0,
            },
        ),
    ),
]


@pytest.mark.parametrize(("said", "wanted"), ROPES)
def test_rope_in_one_spelling(said, wanted):
    rotary, (theta, scaling) = parse_architecture({**LLAMA, **said}).attention.rotary, wanted
    assert rotary == Rotary(theta=theta, dims=16, scaling=scaling and RopeScaling(**scaling))


def test_yarn_attention_factor():
    def factor(**more):
        scaling = parse_architecture({**LLAMA, "rope_scaling": {**YARN, **more}}).attention.rotary.scaling
        return scaling.attention_factor

    assert factor(attention_factor=1.5) == 1.5
    assert factor(mscale=2.0, mscale_all_dim=1.0) == (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    assert factor(factor=0.5) == 1.0

"""The experts of a mixture-of-experts model, as its config.json describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadpo.config.rope import Report

_RESTORE = "restore the model's own config.json"
# What transformers takes where config.json has no such key.
_DEFAULTS: dict[str, dict[str, int]] = {
    "mixtral": {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}
MOE_FAMILIES = frozenset(_DEFAULTS)
_AUX_LOSS_COEF = 0.001
"""transformers' default router_aux_loss_coef in every family."""


@dataclass(frozen=True, kw_only=True)
class MoeArchitecture:
    """The experts of every layer. A token goes to the `experts_per_token` with the highest router logits."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    """Of each expert."""
    normalized_weights: bool
    """True: the chosen experts' weights sum to 1 (softmax over the chosen logits). False: they are their share of the
    softmax over all experts."""
    shared_ffn_hidden_size: int | None
    """Of the shared expert, which every token goes through, times the sigmoid of its own gate; None: there is none."""
    aux_loss_coef: float
    """The model's own router_aux_loss_coef."""


def read_moe(raw: Mapping[str, Any], family: str, report: Report) -> MoeArchitecture | None:
    """The experts that `raw` (config.json) names, None for a family without. `report` takes every problem."""
    if family not in MOE_FAMILIES:
        return None
    _refuse_unsupported(raw, report)
    # transformers 5 writes Qwen3-MoE's and Mixtral's count as num_local_experts, the hub has num_experts for Qwen3-MoE
    count_key = "num_local_experts" if "num_local_experts" in raw else "num_experts"
    experts = _size(raw, count_key, _DEFAULTS[family]["num_experts"], report)
    chosen = _size(raw, "num_experts_per_tok", _DEFAULTS[family]["num_experts_per_tok"], report)
    if chosen > experts and raw.get(count_key) == experts:  # else the count itself is the problem
        report("num_experts_per_tok", chosen, f"at most {count_key} ({experts})", _RESTORE)
    normalized = family == "mixtral" or bool(raw.get("norm_topk_prob", False))
    if chosen == 1 and normalized:
        expected = "at least 2, or norm_topk_prob false: the weight of a single expert is always 1"
        report("num_experts_per_tok", chosen, expected, "choose a model with two or more experts a token")
    ffn_key = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    shared = None
    if family == "qwen2_moe":
        key = "shared_expert_intermediate_size"
        shared = _size(raw, key, _DEFAULTS[family][key], report)
    coef = raw.get("router_aux_loss_coef", _AUX_LOSS_COEF)
    if isinstance(coef, bool) or not isinstance(coef, (int, float)) or coef < 0:
        report("router_aux_loss_coef", coef, "a number >= 0", _RESTORE)
        coef = _AUX_LOSS_COEF
    return MoeArchitecture(
        num_experts=experts,
        experts_per_token=chosen,
        ffn_hidden_size=_size(raw, ffn_key, _DEFAULTS[family].get(ffn_key, 1), report),
        normalized_weights=normalized,
        shared_ffn_hidden_size=shared,
        aux_loss_coef=float(coef),
    )


def _refuse_unsupported(raw: Mapping[str, Any], report: Report) -> None:
    """Layers without experts among the others, and noise on the router's input."""
    if raw.get("decoder_sparse_step", 1) != 1:
        expected = "1: experts in every layer"
        report(
            "decoder_sparse_step", raw["decoder_sparse_step"], expected, "choose a model with experts in every layer"
        )
    if raw.get("mlp_only_layers"):
        expected = "no layer: experts in every layer"
        report("mlp_only_layers", raw["mlp_only_layers"], expected, "choose a model with experts in every layer")
    if raw.get("router_jitter_noise"):
        report("router_jitter_noise", raw["router_jitter_noise"], "0.0", "set it to 0.0: DPO compares exact logps")


def _size(raw: Mapping[str, Any], key: str, default: int, report: Report) -> int:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        report(key, value, "a whole number >= 1", _RESTORE)
        return 1
    return value

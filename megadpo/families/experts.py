"""Layers of experts: what config.json says of them, and which tensors they are."""

from __future__ import annotations

from megadpo.config.architecture import Experts, Mlp, Router
from megadpo.families.layouts import Columns, GatedMLP, Replicated
from megadpo.families.reading import MOST_EXPERTS, HfConfig
from megadpo.families.rows import Row


def read_experts(
    config: HfConfig,
    *,
    ffn: str = "moe_intermediate_size",
    shared_ffn: str | None = None,
    normalized: bool | None = None,
) -> Experts:
    """The experts that `config` names. ffn, shared_ffn: the keys of their sizes; None: there is no shared expert.
    normalized: whether the weights of a token's experts sum to 1; None: by norm_topk_prob."""
    _refuse_uncomputed(config)
    # transformers 5 writes Qwen3-MoE's and Mixtral's count as num_local_experts, the hub has num_experts for Qwen3-MoE
    count_key = "num_local_experts" if "num_local_experts" in config.raw else "num_experts"
    experts = config.size(count_key, most=MOST_EXPERTS)
    chosen = config.size("num_experts_per_tok")
    if chosen > experts and config.raw.get(count_key) == experts:  # else the count itself is the problem
        config.report("num_experts_per_tok", chosen, f"at most {count_key} ({experts})")
    if normalized is None:
        normalized = bool(config.get("norm_topk_prob"))
    if chosen == 1 and normalized:
        expected = "at least 2, or norm_topk_prob false: the weight of a single expert is always 1"
        config.report("num_experts_per_tok", chosen, expected, "choose a model with two or more experts a token")
    shared = None if shared_ffn is None else config.size(shared_ffn)
    return Experts(
        number=experts,
        per_token=chosen,
        mlp=Mlp(ffn_size=config.size(ffn)),
        # a softmax over all experts, divided by the sum of the chosen ones, is the softmax over those
        router=Router(scores="softmax_of_chosen" if normalized else "softmax"),
        shared_ffn_size=shared,
        aux_loss_coef=config.number("router_aux_loss_coef", zero_too=True),
    )


def _refuse_uncomputed(config: HfConfig) -> None:
    """Layers without experts among the others, and noise on the router's input."""
    fix = "choose a model with experts in every layer"
    config.refuse("decoder_sparse_step", "1: experts in every layer", fix, unless=(1,))
    config.refuse("mlp_only_layers", "no layer: experts in every layer", fix)
    config.refuse("router_jitter_noise", "0.0", "set it to 0.0: DPO compares exact logps")


def expert_rows(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A layer of experts after its attention, by the Hugging Face names of the block and of an expert's projections.
    The stacked tensors and the router's other name are transformers 5's own, the same in every family."""
    expert, local, stack = f"{block}.experts.{{e}}.", "mlp.experts.local_experts.{e}.", "mlp.experts.experts."
    router = f"{block}.gate.weight"
    return (
        Row("pre_mlp_layernorm.weight", Replicated(), {"post_attention_layernorm.weight": "h"}),
        Row("mlp.router.weight", Replicated(), {router: "nh"}, also={router: "mlp.gate.weight"}),
        Row(local + "linear_fc1.weight", GatedMLP(), {f"{expert}{gate}.weight": "xh", f"{expert}{up}.weight": "xh"},
            grouped="mlp.experts.linear_fc1.weight{e}", stacked=stack + "linear_fc1.weight",
            hf_stacked="mlp.experts.gate_up_proj"),
        Row(local + "linear_fc2.weight", Columns(), {f"{expert}{down}.weight": "hx"},
            grouped="mlp.experts.linear_fc2.weight{e}", stacked=stack + "linear_fc2.weight",
            hf_stacked="mlp.experts.down_proj"),
    )  # fmt: skip

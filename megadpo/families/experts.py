"""Layers with experts: reads their keys in config.json, and has their weight rows."""

from __future__ import annotations

from megadpo.config.architecture import Experts, Mlp, Router
from megadpo.families.layouts import Columns, GatedMLP, Replicated, TensorLayout
from megadpo.families.reading import MOST_EXPERTS, HfConfig
from megadpo.families.rows import Row


def read_experts(
    config: HfConfig,
    *,
    count: str = "num_experts",
    chosen: str = "num_experts_per_tok",
    ffn: str = "moe_intermediate_size",
    router: Router | None = None,
    shared_ffn_size: int | None = None,
    shared_gate: bool = True,
) -> Experts:
    """The experts of `config`, with this shared expert, if any. count, chosen, ffn: keys of their number, the number per token
    and their width. router: None for a softmax, normalised or not by norm_topk_prob."""
    # transformers 5 writes num_local_experts for Qwen3-MoE and Mixtral; the hub has num_experts for Qwen3-MoE
    if "num_local_experts" in config.raw:
        count = "num_local_experts"
    number, per_token = config.size(count, most=MOST_EXPERTS), config.size(chosen)
    if per_token > number and config.get(count) == number:  # else the count has been reported
        config.report(chosen, per_token, f"at most {count} ({number})")
    if router is None:
        # a softmax over all experts, divided by the sum over the chosen ones, is the softmax over the chosen ones
        router = Router(scores="softmax_of_chosen" if config.get("norm_topk_prob") else "softmax")
    if per_token == 1 and (router.normalized or router.scores == "softmax_of_chosen"):
        expected = "at least 2, or norm_topk_prob false: the weight of a single expert is always 1"
        config.report(chosen, per_token, expected, "choose a model with two or more experts a token")
    if router.groups > 1 and (number % router.groups or number // router.groups < 2):
        config.report("n_group", router.groups, f"groups of equal size, of two or more of the {number} experts")
    elif router.chosen_groups > router.groups or router.chosen_groups * number < min(per_token, number) * router.groups:
        config.report("topk_group", router.chosen_groups, f"at most n_group, and enough for {per_token} experts")
    config.refuse("router_jitter_noise", "0.0", "set it to 0.0: DPO compares exact logps")
    return Experts(
        number=number,
        per_token=per_token,
        mlp=Mlp(ffn_size=config.size(ffn)),
        router=router,
        shared_ffn_size=shared_ffn_size,
        aux_loss_coef=config.number("router_aux_loss_coef", zero_too=True),
        shared_gate=shared_gate,
    )


def refuse_dense_layers(config: HfConfig) -> None:
    """Refuses Qwen's keys for layers without experts."""
    fix = "choose a model with experts in every layer"
    config.refuse("decoder_sparse_step", "1: experts in every layer", fix, unless=(1,))
    config.refuse("mlp_only_layers", "no layer: experts in every layer", fix)


def expert_rows(
    block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Row, ...]:
    """The rows of a layer's experts, with Hugging Face's names of the block and of an expert's projections. The names of
    stacked tensors and the router's second name are transformers 5's, the same in every family."""
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


def shared_expert_rows(block: str) -> tuple[Row, ...]:
    """The shared expert's rows. block: its Hugging Face name."""
    return (
        Row("mlp.shared_experts.linear_fc1.weight", GatedMLP(),
            {f"{block}.gate_proj.weight": "sh", f"{block}.up_proj.weight": "sh"}),
        Row("mlp.shared_experts.linear_fc2.weight", Columns(), {f"{block}.down_proj.weight": "hs"}),
    )  # fmt: skip


def correction_bias_row(hf: str, layout: TensorLayout | None = None, also: str = "") -> Row:
    """The router's correction bias. hf: its Hugging Face name. layout: None for [n] on disk. also: its name in transformers
    5."""
    return Row("mlp.router.expert_bias", layout or Replicated(), {hf: "1n" if layout else "n"}, frozen=True,
               also={hf: also} if also else {})  # fmt: skip

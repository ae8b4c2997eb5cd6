"""The weight table: what it knows beside a folder's tensors."""

from __future__ import annotations

from megadpo.families import parse_architecture, weight_table
from megadpo.families.layouts import Columns, Replicated, Rows
from megadpo.families.rows import Row
from tests.families.configs import LLAMA, MIXTRAL, QWEN2_MOE

LORA = (
    Row("self_attention.linear_proj.lora_a", Columns(), {"self_attn.o_proj.lora_A.weight": "rq"}),
    Row("self_attention.linear_proj.lora_b", Replicated(), {"self_attn.o_proj.lora_B.weight": "hr"}),
    Row("mlp.linear_fc1.lora_b", Rows(), {"mlp.up_proj.lora_B.weight": "fr"}),
)


def test_rows_that_no_base_folder_has():
    arch = parse_architecture(LLAMA)
    base, table = weight_table(arch), weight_table(arch, LORA, {"r": 8})
    assert table.entries == base.entries and table.hf_shapes == base.hf_shapes
    added = {name: entry for name, entry in table.by_name.items() if name not in base.by_name}
    assert len(added) == 3 * arch.num_layers and not any(entry.in_base for entry in added.values())
    entry = added["decoder.layers.2.self_attention.linear_proj.lora_a"]
    assert entry.hf == ("model.layers.2.self_attn.o_proj.lora_A.weight",)
    assert (entry.full_shape, entry.local_shape(2)) == ((8, 64), (8, 32))
    assert all(entry.in_base for entry in base.by_name.values())


def test_a_tied_head_is_known_but_in_no_folder():
    table = weight_table(parse_architecture({**LLAMA, "tie_word_embeddings": True}))
    assert table.by_name["output_layer.weight"].hf == ("model.embed_tokens.weight",)
    assert "lm_head.weight" not in table.hf_shapes
    assert "output_layer.weight" not in [name for entry in table.entries for name in entry.names]


def test_another_name_on_disk():
    entry = weight_table(parse_architecture(MIXTRAL)).by_name["decoder.layers.1.mlp.router.weight"]
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert entry.hf == (router,) and entry.also == {router: "model.layers.1.mlp.gate.weight"}


def test_biases_go_by_the_architecture():
    for bias in (True, False):
        table = weight_table(parse_architecture({**QWEN2_MOE, "qkv_bias": bias}))
        assert ("decoder.layers.0.self_attention.linear_qkv.bias" in table.by_name) == bias

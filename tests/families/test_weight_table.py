"""The weight table: rows that are in no folder, other names on disk, biases."""

from __future__ import annotations

from megadpo.families import parse_architecture, weight_table
from tests.families.configs import LLAMA, MIXTRAL, QWEN2_MOE


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

"""What a pair costs: the formulas, against the segments that are really computed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given

from megadpo.data.batches.pack import pack_pairs
from megadpo.data.batches.work import UNITS_PER_TOKEN, WorkModel, query_keys
from megadpo.data.pairs import FlatPairs, TokenizedPair
from megadpo.families import parse_architecture
from tests.data.builders import tokenized_pairs
from tests.families.configs import QWEN2_MOE

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize("share_prompt", [True, False])
@given(pairs=tokenized_pairs())
def test_query_keys_are_those_of_the_segments(share_prompt: bool, pairs: list[TokenizedPair]) -> None:
    counted = query_keys(FlatPairs.of(pairs).text_tokens(), share_prompt=share_prompt)
    for pair, count in zip(pairs, counted, strict=True):
        batch = pack_pairs([pair], share_prompt=share_prompt, pad_to_multiple=1, pad_token_id=0)
        seen = [segment.key_tokens - back for segment in batch.segments for back in range(segment.query_tokens)]
        assert count == sum(seen)


def test_the_work_of_a_llama_by_hand() -> None:
    model = WorkModel.of(parse_architecture(LLAMA_8B))
    layer_weights = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    assert model.per_token == 2 * 32 * layer_weights
    assert model.per_answer_token == 2 * 4096 * 128256
    (per_key,) = model.per_query_key.values()
    assert per_key == 32 * 32 * (2 * 128 + 2 * 128)
    texts = np.array([[100, 20, 30], [1, 1, 1]])
    keys = 100 * 101 // 2 + 20 * 100 + 20 * 21 // 2 + 30 * 100 + 30 * 31 // 2
    operations = model.per_token * 150 + model.per_answer_token * 50 + per_key * keys
    work = model.pair_work(texts, share_prompt=True)
    assert work.dtype == np.int64 and int(work[0]) == 16 * operations // model.per_token
    assert model.pair_work(texts, share_prompt=False)[0] > work[0]


def test_layers_with_a_window_work_on_fewer_keys() -> None:
    arch = parse_architecture(LLAMA_8B)
    windowed = dataclasses.replace(arch, layers=(*arch.layers[1:], *arch.with_attention(window=64).layers[:1]))
    texts = np.array([[100, 20, 30]])
    both = [WorkModel.of(one).attention(texts, share_prompt=True) for one in (arch, windowed)]
    saved = sum(max(0, place - 64) for end in (100, 120, 130) for place in range(end + 1))
    saved -= 2 * sum(max(0, place - 64) for place in range(101))  # answers' queries only
    assert both[0] - both[1] == 32 * 512 * saved


def test_a_token_is_worked_on_by_the_experts_it_goes_to() -> None:
    arch = parse_architecture({**QWEN2_MOE, "shared_expert_intermediate_size": 32})
    weights = 64 * (2 * 64 + 2 * 32) + 3 * 64 * (2 * 48 + 32)  # not the dense intermediate_size of 128
    assert WorkModel.of(arch).per_token == 2 * 4 * weights


def test_the_largest_pairs_do_not_overflow() -> None:
    huge = parse_architecture({**LLAMA_8B, "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128,
                               "intermediate_size": 53248})  # fmt: skip
    texts = np.array([[131072, 131072, 131072]])
    model = WorkModel.of(huge)
    (work,) = model.pair_work(texts, share_prompt=False)
    keys = int(query_keys(texts, share_prompt=False)[0])
    exact = UNITS_PER_TOKEN * (
        model.per_token * 4 * 131072 + model.per_answer_token * 2 * 131072 + model.per_query_key[None] * keys
    )
    assert work == exact // model.per_token

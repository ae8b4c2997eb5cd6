"""The demo's score against a model whose answers are known, and its tokenizer and model folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from megadpo.demo.measure import answer_logps, score
from megadpo.demo.sums import question, split_sums, worked_answer
from megadpo.demo.tiny_model import make_model

SUMS = split_sums(held_out=20, seed=3)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, [question(a, b) + worked_answer(a, b) for a, b in SUMS], seed=1)
    return folder


def test_tokenizer_keeps_digits_apart_and_loses_nothing(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for a, b in SUMS:
        text = question(a, b) + worked_answer(a, b)
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert not any(len(token.strip("Ġ")) > 1 for token in tokenizer.convert_ids_to_tokens(ids) if "1" in token)
        prompt = tokenizer(question(a, b)).input_ids
        assert ids[: len(prompt)] == prompt
    assert max(ids) < LlamaForCausalLM.from_pretrained(folder).config.vocab_size


def test_a_seed_gives_the_same_model(folder: Path, tmp_path: Path):
    corpus = [question(a, b) + worked_answer(a, b) for a, b in SUMS]
    for name, seed in (("same", 1), ("other", 2)):
        make_model(tmp_path / name, corpus, seed=seed)
    first = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "same/model.safetensors").read_bytes() == first
    assert (tmp_path / "other/model.safetensors").read_bytes() != first


def test_answer_logps_are_those_of_each_answer_alone(folder: Path):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)
    texts = [(question(17, 25), worked_answer(17, 25)), (question(99, 98), "?"), (question(50, 50), "100")]
    batched = answer_logps(model, tokenizer, texts)
    for (prompt, answer), logp in zip(texts, batched, strict=True):
        ids = torch.tensor([*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id])
        start = len(tokenizer(prompt).input_ids)
        probabilities = model(ids[None]).logits[0].double().softmax(-1)
        expected = sum(math.log(probabilities[i - 1, ids[i]].item()) for i in range(start, len(ids)))
        assert logp.item() == pytest.approx(expected, rel=1e-5)


def test_score_of_a_model_that_has_learned_by_heart(folder: Path, tmp_path: Path):
    """A model that was taught the right answers of three sums, and the slip of a fourth."""
    sums = [(17, 25), (38, 44), (55, 66), (10, 11)]
    slips = [False, True, False, False]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)
    texts = [(question(*pair), worked_answer(*pair, slip=slip)) for pair, slip in zip(sums, slips, strict=True)]
    rows = [[*tokenizer(p + a).input_ids, tokenizer.eos_token_id] for p, a in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(120):
        loss = model(ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    result = score(tmp_path, sums)
    assert result.preference_accuracy == 0.75
    assert result.right_answers == 0.75
    assert [margin > 0 for margin in result.margins] == [not slip for slip in slips]
    assert result.mean_margin == pytest.approx(sum(result.margins) / 4, abs=1e-4)
    assert result.example == f"{question(17, 25).strip()} {worked_answer(17, 25)}"


def test_the_demo_fails_below_its_goal_or_if_the_export_is_another_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from tools import demo

    monkeypatch.setattr(demo, "RUN", tmp_path)

    def exit_code(accuracy: float, trained_margin: float = 0.6) -> int:
        def made(accuracy: float, margin: float) -> demo.Score:
            return demo.Score(
                preference_accuracy=accuracy, mean_margin=margin, right_answers=0.5, example="", margins=[margin]
            )

        row = {"validation-sums/rewards/margins": trained_margin, "validation-sums/rewards/accuracies": 1.0}
        return demo.report(made(0.5, 1.0), made(accuracy, 7.0), [{}, row], beta=0.1, seconds=1.0)

    assert exit_code(0.9) == 0
    assert exit_code(0.89) == 1
    assert exit_code(0.95, trained_margin=0.55) == 1
    assert (tmp_path / "result.json").exists()

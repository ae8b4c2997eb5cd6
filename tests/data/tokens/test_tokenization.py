"""Where the prompt ends and what the answer is: TRL's ids for plain text, the template's line for chats."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megadpo.config.problems import ConfigError
from megadpo.data.formats import PreferencePair
from megadpo.data.pairs import TokenizedPair
from megadpo.data.tokens.tokenization import PairTokenizer
from tests.data.builders import text_pair
from tests.helpers.tiny_tokenizer import CHATML, merges, tiny_tokenizer

BOS, EOS = 0, 1
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text("thes um</s>", max_size=20)
answers = texts.filter(lambda text: re.fullmatch(r"(<s>|</s>|<pad>|<\|im_(start|end)\|>|\s)*", text) is None)


def encode(tokenizer: PreTrainedTokenizerFast, *pairs: PreferencePair, **options: Any) -> list[TokenizedPair]:
    chunk = PairTokenizer(tokenizer, **options).encode(pairs)
    assert chunk.problems == []
    return list(chunk.pairs)


def trl_ids(tokenizer: PreTrainedTokenizerFast, pair: PreferencePair) -> tuple[list[int], list[int], list[int]]:
    """What TRL 1.16's DPOTrainer._prepare_dataset does with plain text, where the prompt's ids are a prefix."""
    assert isinstance(pair.prompt, str)
    prompt = tokenizer(pair.prompt)["input_ids"]
    answers = []
    for answer in (pair.chosen, pair.rejected):
        assert isinstance(answer, str)
        if not answer.endswith(tokenizer.eos_token):
            answer = answer + tokenizer.eos_token
        whole = tokenizer(pair.prompt + answer)["input_ids"]
        assume(whole[: len(prompt)] == prompt)
        answers.append(whole[len(prompt) :])
    return prompt, answers[0], answers[1]


@given(texts, answers, answers, st.booleans())
def test_plain_text_has_the_ids_of_trl(prompt: str, chosen: str, rejected: str, adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    pair = text_pair(prompt, chosen, rejected)
    expected = trl_ids(tokenizer, pair)
    assume(expected[0] and expected[1] != expected[2])
    (done,) = encode(tokenizer, pair)
    assert (done.prompt_ids.tolist(), done.chosen_ids.tolist(), done.rejected_ids.tolist()) == expected


def test_plain_text_written_out() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    vocabulary = tokenizer.get_vocab()
    the, is_, sum_ = vocabulary["Ġthe"], vocabulary["Ġis"], vocabulary["Ġsum"]
    (done,) = encode(tokenizer, text_pair(" the sum", " is the", " is</s>"))
    assert done.prompt_ids.tolist() == [BOS, the, sum_]
    assert done.chosen_ids.tolist() == [is_, the, EOS]
    assert done.rejected_ids.tolist() == [is_, EOS], "EOS is there already"
    (done,) = encode(tokenizer, text_pair(" the sum", " is the</s>", " is</s> the"))
    assert done.chosen_ids.tolist() == [is_, the, EOS] and done.rejected_ids.tolist() == [is_, EOS, the, EOS]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_token_of_an_image_typed_as_text_is_named(place: int) -> None:
    """In a prompt or an answer, where a vision-language model's text part is trained."""
    texts = [" the sum", " is", " the"]
    texts[place] += " <|im_start|> that"
    pair, tokenizer = text_pair(*texts), tiny_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<|im_start|>")
    (problem,) = PairTokenizer(tokenizer, media_tokens=(9999, image)).encode([pair]).problems
    assert problem.where == str(pair.place) and "the token '<|im_start|>'" in problem.value
    assert encode(tokenizer, pair, media_tokens=(9999,)) and encode(tokenizer, pair)


def test_an_answer_that_merges_with_the_prompt_is_tokenised_apart_and_counted() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    left, right = merges(tokenizer)[0]  # "t" and "h", that stand as one token
    vocabulary = tokenizer.get_vocab()
    pairs = [text_pair(left, right, "?"), text_pair(left, "!", "?", line=2)]
    done = PairTokenizer(tokenizer).encode(pairs)
    assert done.counts["tokenized_apart"] == 1
    assert done.pairs[0].prompt_ids.tolist() == [BOS, vocabulary[left]], "the prompt as at inference"
    assert done.pairs[0].chosen_ids.tolist() == [vocabulary[right], EOS], "no BOS in the middle"
    assert done.pairs[0].rejected_ids.tolist() == [vocabulary["?"], EOS]


@given(texts, answers, answers)
def test_no_text_is_lost_or_added(prompt: str, chosen: str, rejected: str) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    assume(chosen.removesuffix("</s>") != rejected.removesuffix("</s>"))
    (done,) = encode(tokenizer, text_pair(prompt, chosen, rejected))
    for answer, ids in ((chosen, done.chosen_ids), (rejected, done.rejected_ids)):
        assert tokenizer.decode([*done.prompt_ids, *ids]) == "<s>" + prompt + answer.removesuffix("</s>") + "</s>"


def test_eos_that_the_tokenizer_adds_itself_ends_no_prompt() -> None:
    pair = text_pair("the sum", " is", " that")
    (plain,) = encode(tiny_tokenizer(adds_bos=True), pair)
    (done,) = encode(tiny_tokenizer(adds_bos=True, adds_eos=True), pair)
    assert done.prompt_ids.tolist() == plain.prompt_ids.tolist() and EOS not in done.prompt_ids
    assert done.chosen_ids.tolist() == plain.chosen_ids.tolist() and done.chosen_ids.tolist().count(EOS) == 1


def test_eos_is_added_by_id_where_its_text_is_read_as_something_else() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "</s>"
    encoder = PairTokenizer(tokenizer)
    encoder.eos_token_id = 4  # as if "</s>" were ordinary text
    (done,) = encoder.encode([text_pair("the", " is", " that")]).pairs
    assert done.chosen_ids.tolist()[-2:] == [EOS, 4]


def test_an_empty_prompt_is_bos_alone_or_refused() -> None:
    pair = text_pair("", "yes", "no")
    (done,) = encode(tiny_tokenizer(adds_bos=True), pair)
    assert done.prompt_ids.tolist() == [BOS]
    (said,) = refusal(tiny_tokenizer(), pair)
    assert said.startswith("pairs.jsonl:1: ") and "a prompt without tokens" in said


def test_pairs_keep_their_order_and_rows_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [text_pair(f"the {n}", f" is {n}", " that", line=n + 1) for n in range(10)]
    whole = encode(tiny_tokenizer(), *pairs)
    monkeypatch.setattr("megadpo.data.tokens.tokenization._BATCH_PAIRS", 3)
    parts = encode(tiny_tokenizer(), *pairs)
    assert [pair.index for pair in parts] == list(range(10))
    assert [pair.chosen_ids.tolist() for pair in parts] == [pair.chosen_ids.tolist() for pair in whole]


# Chat templates

MESSAGES = text_pair(
    ({"role": "system", "content": "be"}, {"role": "user", "content": "the sum?"}),
    ({"role": "assistant", "content": "it is"},),
    ({"role": "assistant", "content": "that"},),
)


def test_the_template_draws_the_line_between_prompt_and_answer() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True, chat_template=CHATML)
    (done,) = encode(tokenizer, MESSAGES)
    assert tokenizer.decode(done.prompt_ids) == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nthe sum?<|im_end|>\n<|im_start|>assistant\n"
    ), "and no BOS but the template's own"
    assert tokenizer.decode(done.chosen_ids) == "it is<|im_end|>\n", "EOS is the template's business"
    assert tokenizer.decode(done.rejected_ids) == "that<|im_end|>\n"


def test_template_ids_are_those_of_apply_chat_template() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    (done,) = encode(tokenizer, MESSAGES)
    prompt = list(MESSAGES.prompt)
    opened = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*prompt, *MESSAGES.chosen], return_dict=False)
    assert done.prompt_ids.tolist() == opened and [*done.prompt_ids, *done.chosen_ids] == whole


@pytest.mark.parametrize("role", ["prompt", "chosen", "all"])
def test_plain_strings_become_a_user_and_an_assistant_message(role: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    user, yes, no = ({"role": "user", "content": "so?"},), ({"role": "assistant", "content": "yes"},), "no"
    plain = text_pair("so?" if role in ("prompt", "all") else user, "yes" if role in ("chosen", "all") else yes, no)
    (done,), (expected,) = encode(tokenizer, plain), encode(tokenizer, text_pair(user, yes, no))
    assert done.prompt_ids.tolist() == expected.prompt_ids.tolist()
    assert done.chosen_ids.tolist() == expected.chosen_ids.tolist()
    assert tokenizer.decode(done.rejected_ids) == "no<|im_end|>\n"


def test_null_sets_the_tokenizers_template_aside() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    (done,) = encode(tokenizer, text_pair("so?", " yes", " no"), chat_template=None)
    assert tokenizer.decode(done.prompt_ids) == "so?" and done.chosen_ids[-1] == EOS


def test_template_kwargs_reach_the_template() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML.replace("assistant\n{% endif", "assistant\n{{ mood }}{% endif"))
    template = "{% for m in messages %}[{{ m.role }}{{ mood }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant{{ mood }}]{% endif %}"
    pair = text_pair("so?", "yes", "no")
    (done,) = encode(tokenizer, pair, chat_template=template, chat_template_kwargs={"mood": "!"})
    assert tokenizer.decode(done.prompt_ids) == "[user!]so?[assistant!]"


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "chat_template"])
def test_kwargs_that_draw_the_line_are_not_the_users(name: str) -> None:
    with pytest.raises(ConfigError, match=f"chat_template_kwargs.{name}"):
        PairTokenizer(tiny_tokenizer(chat_template=CHATML), chat_template_kwargs={name: True})


def test_kwargs_that_no_template_reads_are_refused_each() -> None:
    template = "{% set deep = deep | default(0) %}{% generation %}{{ mood }}{{ deep }}{% endgeneration %}" + CHATML
    tokenizer = tiny_tokenizer(chat_template=template)
    with pytest.raises(ConfigError) as refused:
        PairTokenizer(tokenizer, chat_template_kwargs={"mod": 1, "mood": 1, "deep": 1, "enable_thinkng": False})
    assert [one.where.rpartition(".")[2] for one in refused.value.problems] == ["mod", "enable_thinkng"]
    with pytest.raises(ConfigError, match="there is no chat template"):
        PairTokenizer(tokenizer, chat_template=None, chat_template_kwargs={"mood": 1})


def test_text_that_is_no_template_is_one_problem_of_the_setting() -> None:
    with pytest.raises(ConfigError, match="chat_template: .* a Jinja template; Jinja says: .*line 2"):
        PairTokenizer(tiny_tokenizer(), chat_template="{{ a }}\n{{ bad")


def test_tools_that_the_model_would_not_be_told_of_are_refused() -> None:
    pair = dataclasses.replace(text_pair("a", "b", "c"), tools=({"name": "add"},))
    (said,) = refusal(tiny_tokenizer(), pair)
    assert "pairs.jsonl:1: got \"field 'tools'\"; expected no tools, since there is no chat template" in said
    (said,) = refusal(tiny_tokenizer(chat_template=CHATML), pair)
    assert "since the chat template reads none" in said


def test_ids_that_merge_over_the_templates_line_keep_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.get_vocab()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    done = PairTokenizer(tokenizer, chat_template=template).encode([text_pair("t", "he", "!")])
    assert done.counts["tokenized_apart"] == 1
    assert done.pairs[0].prompt_ids.tolist() == [vocabulary["t"]]
    assert tokenizer.decode(done.pairs[0].chosen_ids) == "he"


def refusal(tokenizer: PreTrainedTokenizerFast, *pairs: PreferencePair, **options: Any) -> list[str]:
    return [str(problem) for problem in PairTokenizer(tokenizer, **options).encode(pairs).problems]


def test_messages_without_a_template_are_refused_by_line() -> None:
    (said,) = refusal(tiny_tokenizer(), text_pair("a", "b", "c"), text_pair(MESSAGES.prompt, "b", "c", line=2))
    assert said.startswith("pairs.jsonl:2:") and "policy.tokenizer.chat_template" in said


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    thinking = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    (said,) = refusal(tiny_tokenizer(chat_template=thinking), text_pair("a", "b", "c"))
    assert "pairs.jsonl:1" in said and "chat_template_kwargs" in said


def test_a_template_that_refuses_one_conversation_is_quoted_for_that_one() -> None:
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}" + CHATML
    tokenizer = tiny_tokenizer(chat_template=template)
    pairs = [text_pair(prompt, "b", "c", line=line) for line, prompt in enumerate(("a", "bad", "d", "bad"), start=1)]
    said = refusal(tokenizer, *pairs)
    assert [each.split(":")[1] for each in said] == ["2", "4"] and all("no bad words" in each for each in said)
    assert len(encode(tokenizer, pairs[0], pairs[2])) == 2


def test_a_template_that_drops_the_answer_is_refused() -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    (said,) = refusal(tiny_tokenizer(), text_pair("a", "b", "c"), chat_template=template)
    assert "without tokens after the chat template" in said


def test_answers_equal_as_tokens_are_refused() -> None:
    trimming = CHATML.replace("message.content", "message.content | trim")
    (said,) = refusal(tiny_tokenizer(chat_template=trimming), text_pair("a", "b", "b "))
    assert "not as tokens" in said


def test_problems_stop_at_a_bound() -> None:
    pairs = [text_pair(MESSAGES.prompt, "b", "c", line=n + 1) for n in range(50)]
    assert len(refusal(tiny_tokenizer(), *pairs)) == 20


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ConfigError, match="eos_token"):
        PairTokenizer(tiny_tokenizer(has_eos=False))

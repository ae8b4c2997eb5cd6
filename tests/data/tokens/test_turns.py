"""Answers of several turns: which tokens are in the loss, with a chat template and in plain transcripts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.data.formats import Message, PreferencePair
from megadpo.data.pairs import LossMask, TokenIds, TokenizedPair
from megadpo.data.tokens.tokenization import PairTokenizer
from tests.data.builders import as_lists, text_pair
from tests.helpers.tiny_tokenizer import CHATML, tiny_tokenizer

TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As the Qwen family writes tools, calls and reasoning."""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def encode(pair: PreferencePair, template: str | None = CHATML, **options: Any) -> TokenizedPair:
    (done,) = PairTokenizer(tiny_tokenizer(adds_bos=True), chat_template=template, **options).encode([pair]).pairs
    return done


def in_loss(ids: TokenIds, mask: LossMask | None) -> list[str]:
    """The stretches of the answer that are in the loss, decoded."""
    assert mask is not None and len(mask) == len(ids)
    stretches: list[list[int]] = []
    for number, (token, counts) in enumerate(zip(ids, mask, strict=True)):
        if counts and (number == 0 or not mask[number - 1]):
            stretches.append([])
        if counts:
            stretches[-1].append(int(token))
    return [tiny_tokenizer().decode(stretch) for stretch in stretches]


CHAT = text_pair(
    (user("the sum?"),),
    (bot("it is"), user("sure?"), bot("yes")),
    (bot("that"), user("sure?"), bot("no"), user("then?"), bot("yes")),
)


def test_by_default_the_last_turn_counts_as_in_nemo_rl() -> None:
    done = encode(CHAT)
    assert in_loss(done.chosen_ids, done.chosen_mask) == ["yes<|im_end|>\n"]
    assert in_loss(done.rejected_ids, done.rejected_mask) == ["yes<|im_end|>\n"]
    whole = tiny_tokenizer(chat_template=CHATML).apply_chat_template([*CHAT.prompt, *CHAT.chosen], return_dict=False)
    assert [*done.prompt_ids, *done.chosen_ids] == whole, "the other turns are there, in the template's own ids"


def test_every_turn_that_differs_can_count() -> None:
    done = encode(CHAT, loss_on="differing_turns")
    assert in_loss(done.chosen_ids, done.chosen_mask) == ["it is<|im_end|>\n", "yes<|im_end|>\n"]
    assert in_loss(done.rejected_ids, done.rejected_mask) == [
        "that<|im_end|>\n",
        "no<|im_end|>\n",
        "yes<|im_end|>\n",
    ]


def test_an_equal_turn_at_the_same_place_does_not_count_as_differing() -> None:
    same_end = dataclasses.replace(CHAT, rejected=(bot("that"), user("sure?"), bot("yes")))
    done = encode(same_end, loss_on="differing_turns")
    assert in_loss(done.chosen_ids, done.chosen_mask) == ["it is<|im_end|>\n"]
    assert in_loss(done.rejected_ids, done.rejected_mask) == ["that<|im_end|>\n"]


def test_one_turn_needs_no_mask_whatever_counts() -> None:
    pair = text_pair((user("so?"),), (bot("yes"),), (bot("no"),))
    for loss_on in ("last_turn", "differing_turns"):
        done = encode(pair, loss_on=loss_on)
        assert done.chosen_mask is None and done.rejected_mask is None


def test_conversations_that_part_at_the_users_turn() -> None:
    pair = text_pair((user("a"), bot("b")), (user("c"), bot("d")), (user("e"), bot("f")))
    done = encode(pair)
    assert tiny_tokenizer().decode(done.prompt_ids).endswith("b<|im_end|>\n"), "no header asks for an answer yet"
    assert in_loss(done.chosen_ids, done.chosen_mask) == ["d<|im_end|>\n"]
    assert in_loss(done.rejected_ids, done.rejected_mask) == ["f<|im_end|>\n"]


def test_tool_calls_and_reasoning_go_through_the_template() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    pair = text_pair(
        (user("sum?"),),
        (bot("", tool_calls=[call], reasoning_content="hm"), {"role": "tool", "content": "3"}, bot("it is 3")),
        (bot("it is 4"),),
    )
    pair = dataclasses.replace(pair, tools=({"name": "add"},))
    done = encode(pair, TOOLS, loss_on="differing_turns")
    assert tiny_tokenizer().decode(done.prompt_ids).startswith('<tools>[{"name": "add"}]</tools>\n')
    first = '<think>hm</think><call>add{"a": 1}</call><|im_end|>\n'
    assert in_loss(done.chosen_ids, done.chosen_mask) == [first, "it is 3<|im_end|>\n"]
    assert done.rejected_mask is None
    done = encode(pair, TOOLS)
    assert in_loss(done.chosen_ids, done.chosen_mask) == ["it is 3<|im_end|>\n"]
    assert "tool\n3<|im_end|>" in tiny_tokenizer().decode(done.chosen_ids)


def transcript(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    return dataclasses.replace(text_pair(prompt, chosen, rejected), is_transcript=True)


LONG = transcript("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c\n\nAssistant: d", " e")


def test_a_transcript_in_plain_text() -> None:
    done = encode(LONG, None)
    assert tiny_tokenizer().decode(done.prompt_ids) == "<s>\n\nHuman: a\n\nAssistant:"
    assert in_loss(done.chosen_ids, done.chosen_mask) == [" d</s>"]
    assert tiny_tokenizer().decode(done.chosen_ids) == " b\n\nHuman: c\n\nAssistant: d</s>"
    assert done.rejected_mask is None and tiny_tokenizer().decode(done.rejected_ids) == " e</s>"
    both = encode(LONG, None, loss_on="differing_turns")
    assert in_loss(both.chosen_ids, both.chosen_mask) == [" b", " d</s>"]


def test_a_transcript_that_parts_at_the_humans_turn() -> None:
    prompt = "\n\nHuman: a\n\nAssistant: b"
    pair = transcript(prompt, "\n\nHuman: c\n\nAssistant: d", "\n\nHuman: e\n\nAssistant: f")
    done = encode(pair, None)
    assert in_loss(done.chosen_ids, done.chosen_mask) == [" d</s>"]
    chat = encode(pair)
    messages = text_pair((user("a"), bot("b")), (user("c"), bot("d")), (user("e"), bot("f")))
    assert as_lists(chat) == as_lists(encode(messages))
    assert in_loss(chat.rejected_ids, chat.rejected_mask) == ["f<|im_end|>\n"]


def test_an_eos_that_is_added_by_id_is_in_the_loss() -> None:
    encoder = PairTokenizer(tiny_tokenizer(), chat_template=None)
    encoder.eos_token_id = 4  # as if "</s>" were ordinary text
    (done,) = encoder.encode([LONG]).pairs
    assert done.chosen_mask is not None and len(done.chosen_mask) == done.chosen_tokens
    assert done.chosen_ids[-1] == 4 and done.chosen_mask[-1]


def test_an_answer_may_do_no_more_than_call_a_tool() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    done = encode(text_pair((user("sum?"),), (bot("", tool_calls=[call]),), (bot("3"),)), TOOLS)
    assert tiny_tokenizer().decode(done.chosen_ids) == "<call>add{}</call><|im_end|>\n"


def test_a_transcript_becomes_messages_for_a_template() -> None:
    done = encode(LONG)
    messages = text_pair((user("a"),), (bot("b"), user("c"), bot("d")), (bot("e"),))
    expected = encode(messages)
    assert done.prompt_ids.tolist() == expected.prompt_ids.tolist()
    assert done.chosen_ids.tolist() == expected.chosen_ids.tolist()
    assert done.chosen_mask is not None and expected.chosen_mask is not None
    assert done.chosen_mask.tolist() == expected.chosen_mask.tolist()
    assert done.rejected_ids.tolist() == expected.rejected_ids.tolist()


said = st.text("thes um?.\n", min_size=1, max_size=8).filter(lambda text: text.strip())


@given(st.lists(said, min_size=2, max_size=6), st.lists(said, min_size=1, max_size=6), st.booleans(), st.booleans())
def test_masked_and_counted_tokens_are_those_of_their_turns(
    chosen: list[str], rejected: list[str], differing: bool, plain: bool
) -> None:
    """However turns merge with their surroundings, what is in the loss decodes to the turns that should be."""

    def turns(texts: list[str]) -> list[Message]:
        texts = texts if len(texts) % 2 else texts[:-1]
        return [(bot if number % 2 == 0 else user)(text) for number, text in enumerate(texts)]

    mine, others = turns(chosen), turns(rejected)
    mine[0] = bot("x" + chosen[0])
    if plain:
        names = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
        texts = ["".join(names[m["role"]] + " " + m["content"].strip() for m in ms) for ms in (mine, others)]
        pair = transcript("\n\nHuman: hi\n\nAssistant:", *(text.removeprefix("\n\nAssistant:") for text in texts))
    else:
        pair = text_pair((user("hi"),), tuple(mine), tuple(others))
    done = encode(pair, None if plain else CHATML, loss_on="differing_turns" if differing else "last_turn")
    last_turn = len(mine) - 1
    numbers = [n for n in range(len(mine)) if mine[n]["role"] == "assistant"]
    if differing:
        numbers = [n for n in numbers if mine[n] != (others[n] if n < len(others) else None)]
    else:
        numbers = [last_turn]
    counted = [mine[n] for n in numbers]
    if done.chosen_mask is None:
        assert len(mine) == 1
        return
    text = "".join(in_loss(done.chosen_ids, done.chosen_mask))
    if plain:
        last = "</s>" if numbers[-1] == last_turn else ""
        assert text == "".join(" " + m["content"].strip() for m in counted) + last
    else:
        assert text == "".join(m["content"] + "<|im_end|>\n" for m in counted)


def test_a_cut_inside_a_token_is_made_by_tokenising_apart() -> None:
    """A template without marks between turns: "t" of one turn and "he" of the next would be one token."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    pair = text_pair((user("?"),), (bot("is"), user("t"), bot("he")), (bot("!"),))
    encoder = PairTokenizer(tiny_tokenizer(), chat_template=template)
    done = encoder.encode([pair])
    assert done.counts["tokenized_apart"] == 1
    assert in_loss(done.pairs[0].chosen_ids, done.pairs[0].chosen_mask) == ["he"]
    assert tiny_tokenizer().decode(done.pairs[0].chosen_ids) == "isthe"


def refusal(pair: PreferencePair, template: str | None = CHATML, **options: Any) -> str:
    tokenizer = tiny_tokenizer(adds_bos=True)
    (problem,) = PairTokenizer(tokenizer, chat_template=template, **options).encode([pair]).problems
    assert problem.where == "pairs.jsonl:1"
    return str(problem)


def test_a_template_that_drops_reasoning_of_earlier_turns() -> None:
    """As Qwen3's does: the last turn can be learned from, an earlier one can't be told from what is left of it."""
    template = TOOLS.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    pair = text_pair((user("a"),), (bot("b", reasoning_content="hm"), user("c"), bot("d")), (bot("e"),))
    done = encode(pair, template)
    assert in_loss(done.chosen_ids, done.chosen_mask) == ["d<|im_end|>\n"]
    assert "hm" not in tiny_tokenizer().decode(done.chosen_ids)
    said = refusal(pair, template, loss_on="differing_turns")
    assert "the first 2 messages" in said and "data.loss_on: last_turn" in said


def test_an_answer_without_a_turn_in_the_loss() -> None:
    goes_on = text_pair((user("a"),), (bot("b"),), (bot("b"), user("c"), bot("d")))
    assert "chosen answer without anything in the loss" in refusal(goes_on, loss_on="differing_turns")
    assert in_loss(encode(goes_on).rejected_ids, encode(goes_on).rejected_mask) == ["d<|im_end|>\n"]


@pytest.mark.parametrize("text", ["</s>", "<|im_end|><|im_end|>\n", " <pad> "])
def test_an_answer_of_only_special_tokens(text: str) -> None:
    assert "only special tokens" in refusal(text_pair("a", text, "no"))
    assert "only special tokens" in refusal(text_pair("a", "yes", text), None)


def test_a_template_that_refuses_a_role_is_quoted() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    pair = text_pair(({"role": "system", "content": "be"}, user("a")), (bot("b"),), (bot("c"),))
    assert "System role not supported" in refusal(pair, template + CHATML)

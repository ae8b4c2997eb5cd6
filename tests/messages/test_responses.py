"""Items of the Responses API as chat messages, and back."""

from __future__ import annotations

import pytest

from megadpo.messages.chat import MessageError
from megadpo.messages.responses import ItemReader, to_items, to_messages
from tests.rollouts.builders import call, call_output, message, reasoning


def test_reasoning_joins_the_message_that_follows():
    assert to_messages([reasoning("hm"), message("4")], "output")[0] == [
        {"role": "assistant", "content": "4", "reasoning_content": "hm"}
    ]


def test_reasoning_can_be_left_out():
    assert to_messages([reasoning("hm"), message("4")], "output", keep_reasoning=False)[0] == [
        {"role": "assistant", "content": "4"}
    ]


def test_tool_calls_their_outputs_and_the_answer():
    items = [
        reasoning("look it up"),
        call("find", '{"name": "Ann"}', "call_a"),
        call("find", '{"name": "Bob"}', "call_b"),
        call_output('{"found": 1}', "call_a"),
        call_output([{"type": "input_text", "text": "none"}], "call_b"),
        message("Ann is there"),
    ]
    assert to_messages(items, "output")[0] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "look it up",
            "tool_calls": [
                {"id": "call_a", "type": "function", "function": {"name": "find", "arguments": {"name": "Ann"}}},
                {"id": "call_b", "type": "function", "function": {"name": "find", "arguments": {"name": "Bob"}}},
            ],
        },
        {"role": "tool", "content": '{"found": 1}', "tool_call_id": "call_a", "name": "find"},
        {"role": "tool", "content": "none", "tool_call_id": "call_b", "name": "find"},
        {"role": "assistant", "content": "Ann is there"},
    ]


def test_turns_of_several_sides_stay_apart():
    items = [message("hit"), message("[8, 5, 3]", "user"), reasoning("16"), message("stand")]
    assert to_messages(items, "output")[0] == [
        {"role": "assistant", "content": "hit"},
        {"role": "user", "content": "[8, 5, 3]"},
        {"role": "assistant", "content": "stand", "reasoning_content": "16"},
    ]


def test_messages_of_one_turn_stay_apart():
    items = [message("none"), message("one"), reasoning("more"), message("two")]
    assert to_messages(items, "output")[0] == [
        {"role": "assistant", "content": "none"},
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning_content": "more"},
    ]


def test_chat_completion_messages_without_a_type():
    items = [
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    assert to_messages(items, "output")[0] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "c", "name": "f"},
    ]


def test_a_developer_message_is_a_system_message():
    assert to_messages([{"role": "developer", "content": "short"}], "input")[0] == [
        {"role": "system", "content": "short"}
    ]


@pytest.mark.parametrize("arguments", ['{"a": 1', "[1]", "null", None, 5])
def test_arguments_that_are_no_object_are_refused(arguments: object):
    """Some chat templates would quote them again, others write them bare: training reads objects only."""
    with pytest.raises(MessageError) as refused:
        to_messages([call("f", arguments)], "output")
    assert refused.value.reason == "broken_arguments"


def test_no_arguments_are_an_empty_object():
    assert to_messages([call("f", "")], "output")[0][0]["tool_calls"][0]["function"]["arguments"] == {}


def test_encrypted_reasoning_is_counted():
    items = [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, message("4")]
    assert to_messages(items, "output") == ([{"role": "assistant", "content": "4"}], 1)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("text", "output[0] of type str"),
        ({"type": "web_search_call"}, "'web_search_call'"),
        ({"type": "message", "role": "critic", "content": "x"}, "role 'critic'"),
        ({"type": "message", "role": "user", "content": [{"type": "input_image"}]}, "content[0] of type 'input_image'"),
        ({"type": "message", "role": "user", "content": 3}, "content of type int"),
        ({"type": "function_call", "name": None, "arguments": "{}", "call_id": "c"}, "name of type null"),
        ({"type": "function_call_output", "call_id": "c", "output": {"a": 1}}, "of type object"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}, "tool_calls[0] without a function"),
    ],
)
def test_what_a_chat_cannot_hold_is_refused(item: object, said: str):
    with pytest.raises(MessageError) as refused:
        to_messages([item], "output")
    assert refused.value.reason == "unsupported_item" and said in str(refused.value)


def for_a_server(items: list) -> list[dict]:
    reader = ItemReader(for_template=False)
    for number, item in enumerate(items):
        reader.add(item, f"input[{number}]")
    return reader.messages


def test_a_server_gets_roles_arguments_and_images_as_they_are():
    image = {"type": "input_image", "image_url": "data:1"}
    items = [
        {"role": "developer", "content": "D"},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "what is "}, {"type": "input_text", "text": "it?"}],
        },
        call("f", '{"a":1}', "c"),
        call_output("1", "c"),
        {"role": "user", "content": [{"type": "input_text", "text": "look"}, image]},
    ]
    assert for_a_server(items) == [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "what is it?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "c"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:1"}}],
        },
    ]


@pytest.mark.parametrize("content", [None, []])
def test_a_server_is_not_asked_with_a_message_without_content(content: object):
    with pytest.raises(MessageError, match="input.0..content without text or parts"):
        for_a_server([{"role": "user", "content": content}])


def test_messages_become_items_and_messages_again():
    message_ = {
        "role": "assistant",
        "content": "so",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    items = to_items(message_, "completed")
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
    assert for_a_server(items) == [message_]

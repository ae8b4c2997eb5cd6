"""Text parts, tool calls and tools."""

from __future__ import annotations

import pytest

from megadpo.messages.chat import MessageError, arguments_of, text_of, tool, tool_call


def test_text_is_joined_from_its_parts():
    assert text_of("a", "content") == "a" and text_of(None, "content") == ""
    assert text_of([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"], "content") == "abc"
    assert text_of([{"type": "refusal", "refusal": "no"}], "content", {"refusal": "refusal"}) == "no"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (3, "content of type int"),
        ({"type": "text"}, "content of type object"),
        ([{"type": "image_url"}], r"content\[0\] of type 'image_url'"),
        ([{"type": "text", "text": None}], r"content\[0\] of type 'text'"),
        ([3], r"content\[0\] of type 'int'"),
        ([{}], r"content\[0\] of type 'None'"),
    ],
)
def test_other_content_is_refused(content: object, said: str):
    with pytest.raises(MessageError, match=said):
        text_of(content, "content")


def test_arguments_are_an_object_or_its_text():
    assert arguments_of({"a": 1}, "call") == arguments_of('{"a": 1}', "call") == {"a": 1}
    assert arguments_of(" ", "call") == {}
    for broken in ('{"a"', "[1]", None, 5, "[" * 100_000):
        with pytest.raises(MessageError, match="call with the arguments") as refused:
            arguments_of(broken, "call")
        assert refused.value.reason == "broken_arguments"


def test_arguments_for_a_server_are_text():
    made = tool_call({"name": "f", "arguments": {"a": 1}}, None, "call", for_template=False)
    assert made == {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_tools_of_both_apis_look_the_same():
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    want = {"type": "function", "function": function}
    assert tool({"type": "function", "strict": False, **function}, "tools[0]") == want
    assert tool({"type": "function", "function": function}, "tools[0]") == want
    strict = tool({"type": "function", "strict": False, **function}, "tools[0]", for_template=False)
    assert strict["function"] == {**function, "strict": False}


@pytest.mark.parametrize("given", [{"type": "web_search"}, {"type": "function"}, {"name": "f"}, "f", None])
def test_a_tool_that_is_no_function_is_refused(given: object):
    with pytest.raises(MessageError, match="^tools.0. of type"):
        tool(given, "tools[0]")

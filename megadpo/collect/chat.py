"""The Responses API in terms of `/chat/completions`, which vLLM, SGLang and NIM all have, and back.

Sources: https://platform.openai.com/docs/guides/migrate-to-responses for the two forms;
https://docs.vllm.ai/en/stable/features/reasoning_outputs/ for `reasoning`, called `reasoning_content` before (and still
in SGLang and NIM). Rows hold the Responses form whichever endpoint was asked.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from megadpo.collect.parameters import Body, Findings, Params, extra_body

_SAME = ("temperature", "top_p", "user")
_RENAMED = {"max_output_tokens": "max_tokens"}
# Bookkeeping of a server, without effect on an answer: not sent.
_BOOKKEEPING = {"metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
_HANDLED = {"input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "reasoning", "text", "top_logprobs"}
_NO_EFFECT = {"stream": False, "background": False, "truncation": "disabled", "include": []}
_TEXT_PARTS = ("input_text", "output_text", "text")


def chat_body(params: Params, findings: Findings) -> Body:
    """The body for `/chat/completions`, without `model`. What that endpoint can't say is noted, never left out."""
    body: Body = {"messages": _messages(params, findings)}
    for name, value in params.items():
        if value is None or name in _HANDLED or name in _BOOKKEEPING or _NO_EFFECT.get(name) == value:
            continue
        if name in _SAME or name in _RENAMED:
            body[_RENAMED.get(name, name)] = value
        else:
            findings.add(name, value, "a field that /chat/completions knows too", "use policy_api=responses")
    tools = params.get("tools")
    if tools:
        body["tools"] = [_tool(tool, findings) for tool in tools]
        if params.get("tool_choice") is not None:
            body["tool_choice"] = _tool_choice(params["tool_choice"])
        if params.get("parallel_tool_calls") is not None:
            body["parallel_tool_calls"] = params["parallel_tool_calls"]
    if params.get("top_logprobs"):
        body |= {"logprobs": True, "top_logprobs": params["top_logprobs"]}
    effort = _only(params, "reasoning", "effort", findings)
    if effort is not None:
        body["reasoning_effort"] = effort
    text_format = _only(params, "text", "format", findings)
    if text_format is not None and text_format != {"type": "text"}:
        body["response_format"] = _response_format(text_format)
    return body | extra_body(params)


def response_of_chat(completion: Mapping[str, Any], params: Params) -> Body:
    """A chat completion as a Response. Raises ValueError, saying what is missing, for anything else."""
    choices = completion.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ValueError("an answer without choices")
    message = choices[0].get("message")
    if not isinstance(message, Mapping):
        raise ValueError("an answer without choices[0].message")
    reason = choices[0].get("finish_reason")
    cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(str(reason))
    status = "incomplete" if cut else "completed"
    usage = completion.get("usage")
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "created_at": float(completion.get("created") or time.time()),
        "error": None,
        "incomplete_details": {"reason": cut} if cut else None,
        "instructions": params.get("instructions"),
        "metadata": params.get("metadata"),
        "model": str(completion.get("model") or ""),
        "object": "response",
        "output": _output(message, status),
        "parallel_tool_calls": params.get("parallel_tool_calls") is not False,
        "temperature": params.get("temperature"),
        "tool_choice": params.get("tool_choice") or "auto",
        "tools": params.get("tools") or [],
        "top_p": params.get("top_p"),
        "max_output_tokens": params.get("max_output_tokens"),
        "status": status,
        "usage": _usage(usage) if isinstance(usage, Mapping) else None,
    }


def _messages(params: Params, findings: Findings) -> list[Body]:
    """Chat messages of `instructions` and `input`: calls and their reasoning join the assistant's message."""
    messages: list[Body] = []
    if params.get("instructions"):
        messages.append({"role": "system", "content": params["instructions"]})
    items = params.get("input") or []
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    turn: Body | None = None  # the assistant's message that further items of the same turn join
    for position, item in enumerate(items):
        where = f"input[{position}]"
        kind = item.get("type") or "message" if isinstance(item, Mapping) else None
        if kind == "reasoning" or kind == "function_call" or (kind == "message" and item.get("role") == "assistant"):
            if turn is None or (kind != "function_call" and "content" in turn):
                turn = {"role": "assistant"}
                messages.append(turn)
            _join(turn, kind, item, where, findings)
        elif kind == "message" and item.get("role") in ("user", "system", "developer"):
            messages.append({"role": item["role"], "content": _content(item.get("content"), where, findings)})
            turn = None
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
            turn = None
        else:
            expected = "a message of user, assistant, system or developer, a function call, its output, or reasoning"
            findings.add(where, item, expected, "use policy_api=responses, or take it out")
    for message in messages:
        message.setdefault("content", None)
    return messages


def _join(turn: Body, kind: str, item: Params, where: str, findings: Findings) -> None:
    if kind == "message":
        turn["content"] = _content(item.get("content"), where, findings)
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        turn.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})
    else:
        text = _reasoning_text(item)
        turn |= {"reasoning": text, "reasoning_content": text}  # newer vLLM reads the first name, others the second


def _content(content: object, where: str, findings: Findings) -> str | list[Body]:
    """Text stays text; a list of nothing but text parts becomes one too, since some templates take no lists."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        findings.add(f"{where}.content", content, "text or a list of parts", "give the message's text")
        return ""
    parts: list[Body] = []
    for position, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            parts.append({"type": "text", "text": part["refusal"]})
        elif kind == "input_image" and isinstance(part.get("image_url"), str):
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        else:
            expected = "a part input_text, output_text, refusal or input_image with image_url"
            findings.add(f"{where}.content[{position}]", part, expected, "use policy_api=responses, or take it out")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _reasoning_text(item: Params) -> str:
    parts = [*(item.get("summary") or []), *(item.get("content") or [])]
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))


def _tool(tool: Any, findings: Findings) -> Body:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        findings.add("tools", tool, "tools of type function, each with a name", "use policy_api=responses")
        return {}
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in known if tool.get(name) is not None}}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _only(params: Params, name: str, inner: str, findings: Findings) -> Any:
    """`params[name][inner]`, the one entry of that section that a chat request can say."""
    section = params.get(name)
    if section is None:
        return None
    if not isinstance(section, Mapping):
        findings.add(name, section, f"a mapping with {inner}", "write it so")
        return None
    others = {key: value for key, value in section.items() if key != inner and value is not None}
    if others:
        findings.add(name, others, f"nothing but {inner} for /chat/completions", "use policy_api=responses")
    return section.get(inner)


def _response_format(text_format: Any) -> Any:
    if isinstance(text_format, Mapping) and text_format.get("type") == "json_schema":
        schema = {name: value for name, value in text_format.items() if name != "type" and value is not None}
        return {"type": "json_schema", "json_schema": schema}
    return text_format


def _output(message: Mapping[str, Any], status: str) -> list[Body]:
    output: list[Body] = []
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if reasoning:
        summary = [{"text": str(reasoning), "type": "summary_text"}]
        output.append({"id": _id("rs"), "summary": summary, "type": "reasoning", "encrypted_content": None})
    calls = message.get("tool_calls") or []
    content = message.get("content") or message.get("refusal") or ""
    if content or not calls:
        if not isinstance(content, str):
            raise ValueError("an answer whose content is not text")
        part: Body = {"annotations": [], "text": content, "type": "output_text", "logprobs": None}
        shared = {"role": "assistant", "status": status, "type": "message"}
        output.append({"id": _id("msg"), "content": [part], **shared})
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise ValueError("an answer with a tool call that is not a function call")
        named = {"name": function.get("name"), "arguments": function.get("arguments"), "call_id": call.get("id")}
        output.append({**named, "type": "function_call", "id": _id("fc"), "status": status})
    return output


def _usage(usage: Mapping[str, Any]) -> Body:
    read, written = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": read + written,
    }


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"

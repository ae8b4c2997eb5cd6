"""Requests and answers of the two endpoints, `/chat/completions` (in vLLM, SGLang and NIM) and `/responses`. Rows always
have the form of the Responses API.

Sources: https://platform.openai.com/docs/guides/migrate-to-responses for the two forms;
https://docs.vllm.ai/en/stable/features/reasoning_outputs/ for `reasoning`, which SGLang, NIM and older vLLM call
`reasoning_content`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from megadpo.collect.client import TryAgain
from megadpo.collect.options import PolicyApi
from megadpo.collect.parameters import Body, Findings, Params, extra_body
from megadpo.messages.chat import MessageError, tool
from megadpo.messages.responses import ItemReader, new_id, to_items

PATHS: dict[PolicyApi, str] = {"chat_completions": "chat/completions", "responses": "responses"}

_SAME = ("temperature", "top_p", "user")
_RENAMED = {"max_output_tokens": "max_tokens"}
# Fields without effect on an answer. They are not sent.
_BOOKKEEPING = {"metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
_HANDLED = {"input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "reasoning", "text", "top_logprobs"}
_NO_EFFECT = {"stream": False, "background": False, "truncation": "disabled", "include": []}
_OTHER_API = "use policy_api=responses"


def request_body(params: Params, api: PolicyApi, findings: Findings) -> Body:
    """The body for the endpoint, without `model`. Problems go to `findings`."""
    return chat_body(params, findings) if api == "chat_completions" else responses_body(params)


def read_answer(answer: dict[str, Any], params: Params, api: PolicyApi) -> Body:
    """The endpoint's answer as a Response. Raises TryAgain for a temporary failure, ValueError for an unusable answer."""
    try:
        return response_of_chat(answer, params) if api == "chat_completions" else _checked_response(answer)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"an answer in an unknown form ({error})") from error


def responses_body(params: Params) -> Body:
    """The body for `/responses`, without `model`: all parameters except null ones, and the extra body."""
    body = {name: value for name, value in params.items() if value is not None and name not in ("stream", "background")}
    metadata = {name: value for name, value in (params.get("metadata") or {}).items() if name != "extra_body"}
    body.pop("metadata", None)
    return body | ({"metadata": metadata} if metadata else {}) | extra_body(params)


def chat_body(params: Params, findings: Findings) -> Body:
    """The body for `/chat/completions`, without `model`. Parameters that it doesn't have are reported, not dropped."""
    body: Body = {"messages": _messages(params, findings)}
    for name, value in params.items():
        if value is None or name in _HANDLED or name in _BOOKKEEPING or _NO_EFFECT.get(name) == value:
            continue
        if name in _SAME or name in _RENAMED:
            body[_RENAMED.get(name, name)] = value
        else:
            findings.add(name, value, "a field that /chat/completions has", _OTHER_API)
    tools = params.get("tools")
    if tools:
        body["tools"] = _tools(tools, findings)
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


def _messages(params: Params, findings: Findings) -> list[Body]:
    """Chat messages of `instructions` and `input`."""
    given = params.get("input") or []
    reader = ItemReader(for_template=False)
    for position, item in enumerate([{"role": "user", "content": given}] if isinstance(given, str) else given):
        try:
            reader.add(item, f"input[{position}]")
        except MessageError as error:
            expected = "messages of text or images (image_url), function calls, their outputs, reasoning"
            findings.add(error.where, error.value, expected, f"{_OTHER_API}, or take it out")
    for message in reader.messages:
        if "tool_calls" in message:
            message["content"] = message["content"] or None
        if "reasoning_content" in message:
            message["reasoning"] = message["reasoning_content"]  # the name in newer vLLM; others read reasoning_content
    instructions = params.get("instructions")
    return [*([{"role": "system", "content": instructions}] if instructions else []), *reader.messages]


def _tools(tools: Any, findings: Findings) -> list[Body]:
    made = []
    for position, given in enumerate(tools if isinstance(tools, list) else [tools]):
        try:
            made.append(tool(given, f"tools[{position}]", for_template=False))
        except MessageError as error:
            findings.add(error.where, given, "a tool of type function with a name", _OTHER_API)
    return made


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _only(params: Params, name: str, inner: str, findings: Findings) -> Any:
    """`params[name][inner]`. It is the only entry of this section that a chat request has; others are reported."""
    section = params.get(name)
    if section is None:
        return None
    if not isinstance(section, Mapping):
        findings.add(name, section, f"a mapping with {inner}", "write a mapping")
        return None
    others = {key: value for key, value in section.items() if key != inner and value is not None}
    if others:
        findings.add(name, others, f"nothing but {inner} for /chat/completions", _OTHER_API)
    return section.get(inner)


def _response_format(text_format: Any) -> Any:
    if isinstance(text_format, Mapping) and text_format.get("type") == "json_schema":
        schema = {name: value for name, value in text_format.items() if name != "type" and value is not None}
        return {"type": "json_schema", "json_schema": schema}
    return text_format


def response_of_chat(completion: Mapping[str, Any], params: Params) -> Body:
    """A chat completion as a Response. Raises ValueError if a part is missing."""
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
        "id": new_id("resp"),
        "created_at": float(completion.get("created") or time.time()),
        "error": None,
        "incomplete_details": {"reason": cut} if cut else None,
        "instructions": params.get("instructions"),
        "metadata": params.get("metadata"),
        "model": str(completion.get("model") or ""),
        "object": "response",
        "output": to_items(message, status),
        "parallel_tool_calls": params.get("parallel_tool_calls") is not False,
        "temperature": params.get("temperature"),
        "tool_choice": params.get("tool_choice") or "auto",
        "tools": params.get("tools") or [],
        "top_p": params.get("top_p"),
        "max_output_tokens": params.get("max_output_tokens"),
        "status": status,
        "usage": _usage(usage) if isinstance(usage, Mapping) else None,
    }


def _checked_response(answer: dict[str, Any]) -> Body:
    status, error = answer.get("status"), answer.get("error")
    if status == "failed" or error:
        reason = error.get("message", error) if isinstance(error, dict) else error
        raise TryAgain(f"status {status}: {str(reason)[:300]}")
    if status not in (None, "completed", "incomplete"):
        raise ValueError(f"an answer of status {status}")
    output = answer.get("output")
    if not isinstance(output, list) or not all(isinstance(item, dict) for item in output):
        raise ValueError("an answer without a list output")
    return answer


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

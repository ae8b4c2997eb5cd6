"""The model that is asked: one request, one answer in the Responses form."""

from __future__ import annotations

from typing import Any

from megadpo.collect.chat import response_of_chat
from megadpo.collect.client import JsonClient, TryAgain
from megadpo.collect.failure import RolloutFailure
from megadpo.collect.options import PolicyApi
from megadpo.collect.parameters import Body, Findings, Params
from megadpo.collect.prompts import request_body
from megadpo.config.problems import ConfigError, Problem

_PATHS: dict[PolicyApi, str] = {"chat_completions": "chat/completions", "responses": "responses"}
_MODEL_ATTEMPTS = 3
_MODEL_TIMEOUT_S = 30.0


class Policy:
    """Asks one model through one endpoint."""

    def __init__(self, client: JsonClient, api: PolicyApi, model: str) -> None:
        self._client = client
        self._api = api
        self._model = model

    async def answer(self, params: Params) -> Body:
        """The model's Response to these parameters. Raises RolloutFailure."""
        body = {"model": self._model, **request_body(params, self._api, Findings("", []))}

        def read(answer: dict[str, Any]) -> Body:
            try:
                return _response(answer) if self._api == "responses" else response_of_chat(answer, params)
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"an answer of an unknown form ({error})") from error

        answer: Body = await self._client.post(_PATHS[self._api], body, read)
        return answer


async def model_to_ask(client: JsonClient, base_url: str, wanted: str | None) -> str:
    """`wanted`, or the only model that the server has. Raises ConfigError where the server can't be reached, has another
    model, or several. A server that does not list its models is believed to have the one that is wanted."""
    try:
        listed = await client.get("models", max_attempts=_MODEL_ATTEMPTS, timeout_s=_MODEL_TIMEOUT_S)
        names = [str(one["id"]) for one in listed.get("data") or []]
    except (TypeError, KeyError, AttributeError):
        names = []
    except RolloutFailure as failure:
        if failure.status in (401, 403):
            fix = "export the key and give its variable's name as policy_api_key_env"
            raise _refused("policy_api_key_env", failure.reason, "a key that the server takes", fix) from failure
        if failure.status is None:
            fix = "start the server, or mend the address; it ends in /v1 for vLLM, SGLang and NIM"
            expected = "a server that answers"
            raise _refused("policy_base_url", f"{base_url} ({failure.reason})", expected, fix) from failure
        names = []
    if wanted is None:
        if len(names) != 1:
            fix = "name it: policy_model_name=..."
            has = f"one model; the server lists {', '.join(names) or 'none'}"
            raise _refused("policy_model_name", None, has, fix)
        return names[0]
    if names and wanted not in names:
        raise _refused("policy_model_name", wanted, f"one of {', '.join(names[:20])}", "choose one of these")
    return wanted


def _refused(where: str, value: object, expected: str, fix: str) -> ConfigError:
    return ConfigError(Problem(where, value, expected, fix))


def _response(answer: dict[str, Any]) -> Body:
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

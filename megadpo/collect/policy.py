"""The model: one request, one answer in the form of the Responses API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megadpo.collect.client import JsonClient, RolloutFailure
from megadpo.collect.endpoints import PATHS, read_answer, request_body
from megadpo.collect.options import PolicyApi
from megadpo.collect.parameters import Body, Findings, Params
from megadpo.config.problems import ConfigError, Problem

_MODEL_ATTEMPTS = 3
_MODEL_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Policy:
    """One model behind one endpoint."""

    client: JsonClient
    api: PolicyApi
    model: str

    async def answer(self, params: Params) -> Body:
        """The model's Response to these parameters. Raises RolloutFailure."""
        body = {"model": self.model, **request_body(params, self.api, Findings("", []))}
        response: Body = await self.client.post(
            PATHS[self.api], body, lambda answer: read_answer(answer, params, self.api)
        )
        return response


async def model_to_ask(client: JsonClient, base_url: str, wanted: str | None) -> str:
    """`wanted`, or the only model of the server. Raises ConfigError if the server can't be reached, if it lists models but
    not `wanted` (unless that is a folder), or if `wanted` is None and it doesn't list exactly one."""
    try:
        listed = await client.get("models", max_attempts=_MODEL_ATTEMPTS, timeout_s=_MODEL_TIMEOUT_S)
        names = [str(one["id"]) for one in listed.get("data") or []]
    except (TypeError, KeyError, AttributeError):
        names = []
    except RolloutFailure as failure:
        if failure.status in (401, 403):
            fix = "export the key and give its variable's name as policy_api_key_env"
            problem = Problem("policy_api_key_env", failure.reason, "a key that the server accepts", fix)
            raise ConfigError(problem) from failure
        if failure.status is None:
            fix = "start the server, or correct the address; it ends in /v1 for vLLM, SGLang and NIM"
            found = f"{base_url} ({failure.reason})"
            raise ConfigError(Problem("policy_base_url", found, "a server that answers", fix)) from failure
        names = []
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None:
        expected = f"one model; the server lists {', '.join(names) or 'none'}"
        raise ConfigError(Problem("policy_model_name", None, expected, "name it: policy_model_name=..."))
    if (
        names and wanted not in names and not Path(wanted).is_dir()
    ):  # transformers serve lists the hub's cache, not a folder
        expected = f"one of {', '.join(names[:20])}"
        raise ConfigError(Problem("policy_model_name", wanted, expected, "choose one of these"))
    return wanted

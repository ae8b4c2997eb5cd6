"""The options of `megadpo collect`: the names of NeMo Gym's ng_collect_rollouts, as `key=value` or `+key=value`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from megadpo.config.problems import ConfigError, Problem
from megadpo.config.reader import Reader, dotted_paths
from megadpo.config.tree import apply_override
from megadpo.config.types import PositiveFloat, PositiveInt, Text

PolicyApi = Literal["chat_completions", "responses"]

_HIDDEN = "(not shown)"
# Sampling options that users often write at the top, but belong in responses_create_params
_SAMPLING = ("temperature", "top_p", "max_output_tokens")


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """The options of one collection."""

    input_jsonl_fpath: Text
    """Prompts: NeMo Gym rows, one on each line, with `responses_create_params.input`."""
    output_jsonl_fpath: Text
    """Rollouts. In the same folder: `<output>.journal` while collecting, and `<stem>_failures.jsonl`."""
    policy_base_url: Text
    """The server's address, up to and including `/v1`."""
    policy_model_name: Text | None = None
    """The model's name; None: the only model of the server."""
    policy_api: PolicyApi = "chat_completions"
    """The endpoint: `/chat/completions` or `/responses`."""
    policy_api_key_env: Text | None = None
    """Name of the environment variable with the API key; None: no key is sent."""
    responses_create_params: dict[str, Any] = field(default_factory=dict)
    """Replaces parameters of the rows: temperature, top_p, max_output_tokens, ..."""
    num_repeats: PositiveInt = 1
    """Answers for each prompt."""
    num_repeats_add_seed: bool = False
    """Give each answer of a prompt its own sampling seed: its `_ng_rollout_index`."""
    num_samples_in_parallel: PositiveInt = 10
    """Concurrent requests."""
    limit: PositiveInt | None = None
    """Use only this many prompts from the beginning of the file."""
    agent_name: Text | None = None
    """Written as `agent_ref.name` to rows without an `agent_ref`."""
    reward_function: Text | None = None
    """`module:function`. It gets the row and returns a number, or a mapping with `reward`."""
    resources_server_url: Text | None = None
    """A NeMo Gym resources server, whose `/verify` gives the reward."""
    request_timeout_s: PositiveFloat = 600.0
    """Time limit of one request in seconds, with generation."""
    max_attempts: PositiveInt = 8
    """A request is sent at most this many times; then its rollout has failed."""
    retry_wait_s: PositiveFloat = 1.0
    """First wait between attempts, in seconds. It doubles each time, up to a minute."""
    stop_after_failures: PositiveInt = 100
    """Stop after this many failed rollouts in a row."""
    resume_from_cache: bool = True
    """False: delete the rollouts of an earlier run with this output file, as ng_collect_rollouts does."""

    @property
    def journal(self) -> Path:
        """The file of finished rollouts, until all are finished."""
        return Path(self.output_jsonl_fpath + ".journal")

    @property
    def failures(self) -> Path:
        """The file of failed rollouts, with ng_collect_rollouts' name."""
        output = Path(self.output_jsonl_fpath)
        return output.with_name(output.stem + "_failures.jsonl")


def parse_options(arguments: Sequence[str]) -> CollectOptions:
    """`key=value` arguments, with or without Hydra's `+`, to options. Raises ConfigError with every problem."""
    problems: list[Problem] = []
    tree: dict[str, Any] = {}
    for argument in arguments:
        if "api_key=" in argument and "api_key_env" not in argument:
            name = argument.partition("=")[0].lstrip("+")
            fix = "export the key in an environment variable and give its name as policy_api_key_env=NAME"
            problems.append(Problem(name, _HIDDEN, "no API key on a command line, which others can see", fix))
            continue
        apply_override(tree, argument, problems)
    for name in _SAMPLING:
        if name in tree:
            fix = f"write responses_create_params.{name}={tree[name]}"
            problems.append(Problem(name, tree.pop(name), "a known key", fix))
    reader = Reader(frozenset(dotted_paths(CollectOptions)))
    options = reader.section(CollectOptions, tree, "")
    here = [replace(one, fix=one.fix.replace(" in the file or on the command line", "=...")) for one in reader.problems]
    problems += here
    problems += _broken_rules(options, reader.bad)
    if problems:
        raise ConfigError(problems)
    return options


def api_key(options: CollectOptions) -> str | None:
    """The key from the environment, or None. It is never logged or written."""
    name = options.policy_api_key_env
    return os.environ.get(name) if name else None


def _broken_rules(options: CollectOptions, bad: set[str]) -> list[Problem]:
    """Checks that go beyond types. `bad`: options that could not be read; they are not reported again."""
    problems: list[Problem] = []
    for name in ("policy_base_url", "resources_server_url"):
        url = getattr(options, name)
        if url is not None and name not in bad:
            problems += _url_problems(name, url)
    name_of_key = options.policy_api_key_env
    if name_of_key and not os.environ.get(name_of_key):
        fix = "export the key in that variable, or leave policy_api_key_env out if the server needs no key"
        shown = name_of_key if name_of_key.isidentifier() else _HIDDEN  # it may be the key itself, by mistake
        problems.append(Problem("policy_api_key_env", shown, "the name of an environment variable that is set", fix))
    key = api_key(options)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        fix = "export it again, without spaces and line breaks"
        problems.append(Problem("policy_api_key_env", name_of_key, "a key of printable ASCII letters", fix))
    rewards = [options.reward_function, options.resources_server_url]
    unread = {"reward_function", "resources_server_url"} & bad
    if not unread and sum(reward is not None for reward in rewards) != 1:
        fix = "give reward_function=module:function, or resources_server_url=http://host:port of a NeMo Gym server"
        value = rewards if any(rewards) else None
        problems.append(Problem("reward_function, resources_server_url", value, "exactly one of the two", fix))
    if not {"input_jsonl_fpath", "output_jsonl_fpath"} & bad:
        problems += _path_problems(options)
    return problems


def _url_problems(name: str, url: str) -> list[Problem]:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good, parts = False, urlsplit("")
    example = "http://localhost:8000/v1" if name == "policy_base_url" else "http://localhost:11000"
    if parts.username or parts.password:
        fix = "give the key by policy_api_key_env; leave user and password out of the address"
        return [Problem(name, _HIDDEN, "an address without credentials", fix)]
    if not good:
        return [Problem(name, url, "an http:// or https:// address", f"write it as {example}")]
    if parts.query or parts.fragment:
        return [Problem(name, url.partition("?")[0] + "?...", "an address without ? and #", f"write it as {example}")]
    for ending in ("/chat/completions", "/responses", "/verify"):
        if parts.path.rstrip("/").endswith(ending):
            return [Problem(name, url, f"the address without {ending}", "remove this ending; the collector adds it")]
    return []


def _path_problems(options: CollectOptions) -> list[Problem]:
    output = Path(options.output_jsonl_fpath)
    same = "another file than input_jsonl_fpath"
    if output.resolve() == Path(options.input_jsonl_fpath).resolve():
        return [Problem("output_jsonl_fpath", str(output), same, "name another file")]
    if output.is_dir():
        return [Problem("output_jsonl_fpath", str(output), "a file, not a folder", "add a file name to it")]
    folder = next(one for one in output.absolute().parents if one.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        fix = "choose a folder that you may write to"
        return [
            Problem(
                "output_jsonl_fpath",
                str(output),
                f"a file in a folder that can be written ({folder} can't be written)",
                fix,
            )
        ]
    return []

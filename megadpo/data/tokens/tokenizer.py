"""Loads a tokenizer with EOS, and finds its chat template.

transformers is imported only when a tokenizer is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadpo.config.problems import ConfigError, Problem, first_line
from megadpo.config.regular_files import require_regular_files
from megadpo.files.regular import read_at_most

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TEMPLATE_BYTES = 2**20
OWN_TEMPLATE = "default"
"""`policy.tokenizer.chat_template: default`: the tokenizer's own template, or plain text if it has none."""


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name. Raises ConfigError if it can't be loaded or has no EOS."""
    from transformers import AutoTokenizer

    require_regular_files(Path(name_or_path), "policy.tokenizer.name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)  # None would ask "[y/N]"
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, plain Exception
        raise ConfigError(
            Problem(
                where="policy.tokenizer.name",
                value=name_or_path,
                expected=f"a folder or hub name with a tokenizer (transformers says: {first_line(error)})",
                fix="name a folder with tokenizer.json or tokenizer_config.json; "
                "without a network, a hub name must be in the cache already",
            )
        ) from error
    require_eos(tokenizer)
    return tokenizer


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token, which ends every plain-text answer. Raises ConfigError if there is none."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            Problem(
                where="policy.tokenizer.name",
                value=f"{tokenizer.name_or_path or type(tokenizer).__name__}, whose eos_token is not set",
                expected="a tokenizer with an end-of-sequence token, which ends each answer",
                fix='set "eos_token" in its tokenizer_config.json to a token of its vocabulary',
            )
        )
    return int(tokenizer.eos_token_id)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of padding: the tokenizer's own, else EOS. It never influences loss or gradients."""
    return require_eos(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def backend_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The tokenizers library's description of all that this tokenizer does; None if it doesn't use that library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state: dict[str, Any] = json.loads(backend.to_str())
    state.pop("truncation", None)  # each call of the tokenizer sets these two
    state.pop("padding", None)
    return state


def resolve_chat_template(tokenizer: PreTrainedTokenizerBase, setting: str | None) -> str | None:
    """The Jinja text for the setting `policy.tokenizer.chat_template`, or None for plain text.

    As in NeMo RL: "default" is the tokenizer's own template (None if it has none); None is no template; a name ending in
    .jinja is a template file; anything else is the template itself. Raises ConfigError.
    """
    if setting is None:
        return None
    if setting == OWN_TEMPLATE:
        own = tokenizer.chat_template
        if own is None or isinstance(own, str):
            return own
        if OWN_TEMPLATE in own:  # transformers allows several named templates
            return str(own[OWN_TEMPLATE])
        raise ConfigError(
            _template_problem(f"the tokenizer's templates {sorted(own)}", "one of them with the name default")
        )
    if setting.endswith(".jinja"):
        try:
            return read_at_most(Path(setting), MOST_TEMPLATE_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(_template_problem(setting, f"a template file ({first_line(error)})")) from error
    if "{" not in setting:
        raise ConfigError(_template_problem(setting, "'default', null, a .jinja file or the jinja text itself"))
    return setting


def template_variables(template: str) -> frozenset[str]:
    """The variables that a chat template reads. Raises ConfigError for text that isn't a Jinja template."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """transformers' `{% generation %}`, which marks the assistant's text."""

        tags = {"generation"}  # noqa: RUF012  declared like this in the base class

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(template)
    except jinja2.TemplateSyntaxError as error:
        reason = f"{error.message} (line {error.lineno} of the template)"
        raise ConfigError(_template_problem(template, f"a Jinja template; Jinja says: {reason}")) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise ConfigError(_template_problem(template, f"a Jinja template; Jinja says: {reason}")) from error
    return frozenset(name.name for name in parsed.find_all(nodes.Name) if name.ctx == "load")


def _template_problem(value: str, expected: str) -> Problem:
    return Problem(
        where="policy.tokenizer.chat_template",
        value=value,
        expected=expected,
        fix="set default for the tokenizer's own template, null for plain text, or give a template",
    )

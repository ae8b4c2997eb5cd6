"""The tokenizer as this system needs it: loaded, with an EOS, and with a settled chat template.

transformers is imported when a tokenizer is loaded, not before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megadpo.config.problems import ConfigError, Problem, first_line
from megadpo.config.regular_files import require_regular_files
from megadpo.files.regular import read_at_most

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TEMPLATE_BYTES = 2**20
OWN_TEMPLATE = "default"
"""`policy.tokenizer.chat_template: default`: the tokenizer's own template, or plain text if it has none."""


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name. Raises ConfigError if there is none or it has no EOS."""
    from transformers import AutoTokenizer

    require_regular_files(Path(name_or_path), "policy.tokenizer.name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)  # unsaid, it asks "[y/N]"
    except Exception as error:  # transformers raises anything here: OSError, ValueError, KeyError, bare Exception
        raise ConfigError(
            Problem(
                where="policy.tokenizer.name",
                value=name_or_path,
                expected=f"a folder or hub name with a tokenizer (transformers says: {first_line(error)})",
                fix="name a folder that holds tokenizer.json or tokenizer_config.json; "
                "without a network a hub name must be in the cache already",
            )
        ) from error
    require_eos(tokenizer)
    return tokenizer


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token, which ends every plain-text answer. Raises ConfigError without one."""
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
    """The id that fills up a pack: the tokenizer's own, else EOS. Nothing is ever learned from it, or read off it."""
    return require_eos(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def resolve_chat_template(tokenizer: PreTrainedTokenizerBase, setting: str | None) -> str | None:
    """The jinja text that `policy.tokenizer.chat_template` means, or None for plain text.

    `setting`, as in NeMo RL: "default" is the tokenizer's own template (None if it has none); None is no template;
    a name ending in .jinja is a file with one; anything else is the template itself. Raises ConfigError.
    """
    if setting is None:
        return None
    if setting == OWN_TEMPLATE:
        own = tokenizer.chat_template
        if own is None or isinstance(own, str):
            return own
        if OWN_TEMPLATE in own:  # several named templates, as transformers keeps them
            return str(own[OWN_TEMPLATE])
        raise ConfigError(
            _template_problem(f"the tokenizer's templates {sorted(own)}", "one of them to be named default")
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
    """The names that a chat template reads. Raises ConfigError for text that is no Jinja template."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """transformers' `{% generation %}` around what the assistant said."""

        tags = {"generation"}  # noqa: RUF012  as the base class declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(template)
    except jinja2.TemplateSyntaxError as error:
        said = f"{error.message} (line {error.lineno} of the template)"
        raise ConfigError(_template_problem(template, f"a Jinja template; Jinja says: {said}")) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        said = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise ConfigError(_template_problem(template, f"a Jinja template; Jinja says: {said}")) from error
    return frozenset(name.name for name in parsed.find_all(nodes.Name) if name.ctx == "load")


def _template_problem(value: str, expected: str) -> Problem:
    return Problem(
        where="policy.tokenizer.chat_template",
        value=value,
        expected=expected,
        fix="say default for the tokenizer's own template, null for plain text, or give a template",
    )

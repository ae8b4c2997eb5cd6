"""The tokenizer and chat template of a run as files, to be saved with checkpoints."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadpo.config.bounded import bounded
from megadpo.data.tokens.tokenizer import backend_state, require_eos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "answer-4711"


def saved_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> dict[str, bytes]:
    """File name -> content, for a folder that transformers loads as `tokenizer` with this template (None: no template)."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = chat_template
    with tempfile.TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def end_ids(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> list[int]:
    """The tokens that end an answer: the special token that the template writes after an answer (if any), and EOS."""
    eos = require_eos(tokenizer)
    if chat_template is None:
        return [eos]
    messages: Any = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        with bounded():
            text = str(tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False))
    except Exception:  # a template may raise any exception, for example without tools
        return [eos]
    rest = text.rpartition(_ANSWER)[2].lstrip()
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = max((name for name in special if rest.startswith(name)), key=len, default=None)
    return [eos] if found is None or special[found] == eos else [special[found], eos]


def same_token_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both give the same ids for every text."""
    state = backend_state(one)
    if state is None:
        return type(one) is type(other) and one.get_vocab() == other.get_vocab()
    return state == backend_state(other)

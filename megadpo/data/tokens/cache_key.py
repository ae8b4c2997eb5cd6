"""What the token ids of a file depend on, as one hash: the name of their cache.

The file counts with its content, not with its size and time: copying with `-p`, `rsync -t` or a coarse clock leaves
those as they were while the pairs change, and training on the wrong pairs is worse than reading the file once at the
start (about a second a gigabyte). Its name and place don't count, so that moving it makes no second cache.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadpo.data.sources.rows import source_digest
from megadpo.data.sources.tables import file_digest
from megadpo.data.tokens.arrays import DataSettings
from megadpo.data.tokens.encode import pair_tokenizer, settings_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets")
_AFTER_TOKENS = frozenset(
    {"loader.py", "pack.py", "plan.py", "prefetch.py", "rebalance.py", "statistics.py", "work.py"}
)
"""Files of this folder that token ids can't depend on. A further one needn't be listed: it costs a rebuild when it
changes, no more."""


def cache_key(path: str | Path, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> str:
    """64 hexadecimal digits that change with the file's content, the tokenizer, the template, any setting, this
    package's own reading code and the libraries under it.

    Raises DataError for a file that can't be read, ConfigError for an unusable tokenizer or template.
    """
    encoder = pair_tokenizer(tokenizer, settings)
    parts = {
        "source": source_digest(path),
        "tokenizer": tokenizer_digest(tokenizer),
        "settings": asdict(settings),
        "resolved": settings_text(settings, encoder),  # a template as text, where the settings name a file
        "code": _code_digest(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that a tokenizer does: its vocabulary, merges, normalisation and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state: dict[str, Any] = json.loads(backend.to_str())
        # Calls set these two as they need them
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"files": _saved_files(tokenizer)}
    state["class"] = type(tokenizer).__name__
    state["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    state["options"] = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if isinstance(value, (bool, int, str, type(None))) and not name.endswith(("_file", "_path"))
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _saved_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A tokenizer without the tokenizers library behind it is what it saves."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: file_digest(path) for path in Path(folder).rglob("*") if path.is_file()}


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in _AFTER_TOKENS:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None

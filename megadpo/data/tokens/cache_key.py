"""What token ids depend on, as one hash: the name of their cache.

The source counts with its content, not with its size and time: copying with `-p` or `rsync -t` leaves those as they were
while the pairs change, and training on the wrong pairs is worse than reading the source once at the start (about a second
a gigabyte). Its name and place don't count, so that moving it makes no second cache.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadpo.config.variants import FORMATS
from megadpo.data.sources.tables import file_digest
from megadpo.data.tokens.encode import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets")
_PACKAGE = Path(__file__).parents[2]
_CODE = ("data/*.py", "data/sources/*.py", "data/formats/*.py", "data/tokens/*.py", "messages/*.py", "files/jsonl.py")
"""What token ids can depend on."""


def cache_key(digest: str, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> str:
    """64 hexadecimal digits that change with the source's `digest`, the tokenizer, the template, any setting, the code of
    this package that reads and tokenises, and the libraries under it.

    Raises ConfigError for an unusable tokenizer or template.
    """
    parts = {
        "source": digest,
        "tokenizer": tokenizer_digest(tokenizer),
        "settings": asdict(settings),
        "resolved": settings.text(settings.pair_tokenizer(tokenizer)),  # a template as text, where it is a file
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
    """What a tokenizer saves that has no tokenizers library behind it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: file_digest(path) for path in Path(folder).rglob("*") if path.is_file()}


def _code_digest() -> str:
    """Of the package's own modules, and of those that add further formats."""
    formats = {getattr(sys.modules.get(one.__module__), "__file__", None) for one in FORMATS}
    paths = {path for pattern in _CODE for path in _PACKAGE.glob(pattern)} | {Path(file) for file in formats if file}
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: (path.parent.name, path.name)):
        digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None

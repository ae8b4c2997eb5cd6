"""The name of a cache: one hash of all that its token ids depend on.

The content of the source is hashed, not its size and time: `cp -p` or `rsync -t` can replace the pairs and keep these, and
training on the wrong pairs is worse than reading the source once at the start (about a second per gigabyte). The path
is not hashed, so a moved source keeps its cache.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from megadpo.config.variants import FORMATS
from megadpo.data.sources.tables import file_digest
from megadpo.data.tokens.encode import DataSettings
from megadpo.data.tokens.tokenizer import backend_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets")
_PACKAGE = Path(__file__).parents[2]
_CODE = ("data/*.py", "data/sources/*.py", "data/formats/*.py", "data/tokens/*.py", "messages/*.py", "files/jsonl.py")
"""The modules that token ids depend on."""


def cache_key(digest: str, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> str:
    """64 hexadecimal digits that depend on the source's `digest`, the tokenizer, the template, all settings, this
    package's code for reading and tokenising, and the versions of the libraries that it uses.

    Raises ConfigError for an unusable tokenizer or template.
    """
    parts = {
        "source": digest,
        "tokenizer": tokenizer_digest(tokenizer),
        "settings": asdict(settings),
        "resolved": settings.text(settings.pair_tokenizer(tokenizer)),  # with the text of a template file
        "code": _code_digest(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of a tokenizer: its vocabulary, merges, normalisation and special tokens."""
    state = backend_state(tokenizer)
    if state is None:
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
    """File name -> sha256 of what a tokenizer saves. For those that don't use the tokenizers library."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: file_digest(path) for path in Path(folder).rglob("*") if path.is_file()}


def _code_digest() -> str:
    """sha256 of the modules in _CODE, and of plugins that add formats."""
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

"""Parses a text of `data.train_data_path` or `data.val_data_paths`: a file, a folder, or a hub data set."""

from __future__ import annotations

import re
from dataclasses import dataclass

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
"""Endings of data files."""
COMPRESSIONS = (".gz", ".zst")
"""May follow the suffix of a text file."""

# org/name:subset@split; a split may be a slice such as train[:90%], as `datasets` writes it
_DATASET = re.compile(r"(?P<path>.+?)(?::(?P<subset>[^:@/\[\]]+))?(?:@(?P<split>[^@/]+))?")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class DataSource:
    """A source of rows."""

    path: str
    """A file, a folder, or a hub name."""
    subset: str | None = None
    split: str | None = None
    """None: train, as in NeMo RL."""

    def __str__(self) -> str:
        subset = f":{self.subset}" if self.subset else ""
        return self.path + subset + (f"@{self.split}" if self.split else "")

    @property
    def is_file(self) -> bool:
        """Whether the path ends like a file of rows."""
        return file_suffix(self.path) is not None

    @property
    def is_hub_name(self) -> bool:
        """Whether the path looks like org/name. (A folder of that name comes first.)"""
        return not self.is_file and _HUB_NAME.fullmatch(self.path) is not None


def parse_source(text: str) -> DataSource:
    """Parses `path`, `folder[:subset][@split]` or `org/name[:subset][@split]`. A text with the ending of a data file is that
    file."""
    if file_suffix(text) is not None:
        return DataSource(text)
    match = _DATASET.fullmatch(text)
    return DataSource(text) if match is None else DataSource(match["path"], match["subset"], match["split"])


def file_suffix(path: str) -> str | None:
    """The ending without compression, such as `.jsonl` of `pairs.jsonl.gz`; None if it is not in FILE_SUFFIXES."""
    name = path.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((suffix for suffix in FILE_SUFFIXES if name.endswith(suffix)), None)

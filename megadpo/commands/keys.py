"""Print the keys of a config: megadpo keys [WORD ...]

Prints every key with its type, default and meaning. With WORDs it prints the keys with one of them in name or meaning.
`--write docs` writes docs/config.md and the tables of docs/losses.md and docs/families.md instead. Exit code 1 where no key
has any of the words.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megadpo.commands import command_parser
from megadpo.config.catalogue import page, sections, with_kernels, with_losses


def main(arguments: Sequence[str]) -> int:
    """Print the keys or write the page; returns the exit code."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument("words", nargs="*", help="only keys with one of these in their name or meaning")
    parser.add_argument("--write", type=Path, metavar="DOCS", help="write the pages in folder DOCS, print nothing")
    options = parser.parse_args(arguments)
    if options.write is not None:
        for name, with_table in (("losses.md", with_losses), ("families.md", with_kernels)):
            path = options.write / name
            path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
        (options.write / "config.md").write_text(page(), encoding="utf-8")
        return 0
    words = [word.lower() for word in options.words]
    keys = [key for section in sections() for key in section.keys]
    found = [key for key in keys if not words or any(word in f"{key.path} {key.meaning}".lower() for word in words)]
    console = Console(highlight=False)
    for key in found:
        console.print(Text.assemble((key.path, "bold"), f": {key.expected}; default {key.default}"))
        console.print(Text(f"    {key.meaning}"))
    if not found:
        print(f"no key has {' or '.join(options.words)} in its name or meaning", file=sys.stderr)
    return 0 if found else 1

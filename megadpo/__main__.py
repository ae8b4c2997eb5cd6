"""python -m megadpo COMMAND ..."""

from __future__ import annotations

import sys

from megadpo.commands import main

if __name__ == "__main__":
    sys.exit(main())

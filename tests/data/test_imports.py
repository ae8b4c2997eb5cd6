"""What importing the data room may cost: no transformers, no megatron."""

from __future__ import annotations

import subprocess
import sys


def test_the_data_room_imports_neither_transformers_nor_megatron() -> None:
    code = (
        "import pkgutil, importlib, sys, megadpo.data as room\n"
        "names = [m.name for m in pkgutil.walk_packages(room.__path__, 'megadpo.data.')]\n"
        "assert len(names) > 20, names\n"
        "for name in names: importlib.import_module(name)\n"
        "print([m for m in ('transformers', 'megatron', 'tokenizers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr

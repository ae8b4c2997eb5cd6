"""What importing the data room may cost: no transformers, no megatron."""

from __future__ import annotations

import subprocess
import sys


def test_the_data_room_imports_neither_transformers_nor_megatron() -> None:
    code = (
        "import pkgutil, importlib, sys, megadpo.data as room\n"
        "names = [m.name for m in pkgutil.iter_modules(room.__path__)]\n"
        "assert len(names) > 8, names\n"
        "for name in names: importlib.import_module('megadpo.data.' + name)\n"
        "print([m for m in ('transformers', 'megatron', 'tokenizers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr

"""What every run imports and reads before its first step, done once: in the server that ranks are forked from."""

from __future__ import annotations

import importlib

from megadpo.config.nemo_rl.translate import nemo_keys
from megadpo.config.variants import FAMILIES, KINDS

for kind in (*KINDS, FAMILIES):
    kind.names()
nemo_keys()
for family in ("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral"):
    importlib.import_module(f"transformers.models.{family}.configuration_{family}")
